"""A sweep's runs, trained: side by side, each in a folder of its own, each going on where it stopped."""

from __future__ import annotations

import gc
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from dpquant.config import load_config
from dpquant.rundir import EpochRecord, RunFolder, locked, take_lock, versions, write_atomic
from dpquant.streams import GLOBAL_RANDOM
from dpquant.sweep import Sweep, SweepRun
from dpquant.sweep_results import RESULTS, SweepResult, append_result, read_results, write_results
from emulation.errors import InputError

if TYPE_CHECKING:
    from dpquant.engine import DPQuantEngine

BACKENDS = ("loky", "threading", "dask", "ray")


def check_names(sweep: Sweep) -> None:
    """Looks up what the runs' configurations name, each once, and reads no data.

    Raises:
        InputError: a data set, model, chip or format that there is none of.
    """
    from dpquant.train import check_names as check

    named = {str([run.config[key] for key in ("data", "model", "hardware", "format")]): run for run in sweep.runs}
    for run in named.values():
        check(run.config)


def train_sweep(
    sweep: Sweep,
    root: Path,
    *,
    jobs: int = 1,
    backend: str = "loky",
    time_limit: float | None = None,
    started: Callable[[int], None] = lambda count: None,
    ended: Callable[[SweepResult], None] = lambda result: None,
) -> dict[str, SweepResult]:
    """Trains the runs that have no result yet; a run that fails is a result too, and is tried again next time.

    Args:
        sweep: what to run.
        root: the folder of the run folders and of ``results.jsonl``; held by one process at a time.
        jobs: runs at the same time; -1 for one per core.
        backend: joblib's, for more than one job. The processes of ``loky`` are spread over all GPUs. ``dask`` and
            ``ray`` take their scheduler's address from their own settings (``DASK_SCHEDULER_ADDRESS``, ``RAY_ADDRESS``)
            and need ``root`` on a file system all workers share.
        time_limit: seconds after which no run is started and those under way stop at the end of their epoch, to be
            gone on with by the next call.
        started: told how many runs already had a result.
        ended: told each result as it comes.

    Returns:
        Name of a run -> its result, in the sweep's order; without the runs that the time limit left.

    Raises:
        InputError: ``root`` cannot be written, is in use, or holds results of other configurations; or a configuration
            names what there is none of.
    """
    check_names(sweep)
    deadline = math.inf if time_limit is None else time.time() + time_limit
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make folder '{root}': {error.strerror}") from error
    if (root / "run.json").exists():
        raise InputError(f"'{root}' is the folder of a run", hint="give another with --out")
    with take_lock(root):
        root = root.absolute()  # a cluster's workers stand elsewhere
        path = root / RESULTS
        known = read_results(path)
        _check_same(sweep, known, path)
        results = {name: result for name, result in known.items() if result.done}
        left = [run for run in sweep.runs if run.name not in results]
        write_results(path, results.values())  # without what is tried again, and without a line that was cut short
        started(len(sweep.runs) - len(left))
        for result in _trained(left, root, jobs, backend, deadline):
            results[result.name] = result
            append_result(path, result)
            ended(result)
        ordered = {run.name: results.pop(run.name) for run in sweep.runs if run.name in results} | results
        write_results(path, ordered.values())
    return ordered


def _check_same(sweep: Sweep, known: Mapping[str, SweepResult], path: Path) -> None:
    for run in sweep.runs:
        if run.name in known and known[run.name].done and known[run.name].digest != run.config.digest:
            hint = "the specification or its base has changed since: give a new folder with --out"
            raise InputError(f"holds {run.name} of another configuration", hint=hint, file=path)


def _trained(runs: Sequence[SweepRun], root: Path, jobs: int, backend: str, deadline: float) -> Iterator[SweepResult]:
    if not runs or (jobs == 1 and backend in ("loky", "threading")):
        yield from (result for run in runs if (result := run_result(run, root, deadline)) is not None)
        return
    if backend == "threading" and any(run.config["training"]["device"] == "cuda" for run in runs):
        hint = "--backend loky, the default, spreads processes over the GPUs"
        raise InputError("--backend threading cannot train on a GPU: its precision is set per process", hint=hint)
    import joblib
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    owner = os.getpid() if backend == "loky" else None
    tasks = [joblib.delayed(run_result)(run, root, deadline, owner) for run in runs]
    # ray's backend hands nothing out before everything is done
    order = "list" if backend == "ray" else "generator_unordered"
    try:
        with _cluster(backend, jobs), joblib.parallel_config(backend=backend, n_jobs=jobs):
            found = joblib.Parallel(return_as=order, batch_size=1, pre_dispatch="all")(tasks)
            yield from (result for result in found if result is not None)
    except TerminatedWorkerError as error:
        message = "a process that trained was ended from outside, for memory perhaps; fewer --jobs need less"
        raise OSError(f"{message}; the same command goes on with what is left") from error


@contextmanager
def _cluster(backend: str, jobs: int) -> Iterator[None]:
    """Connects to dask's or ray's cluster, or starts one of this machine's processes where none is configured."""
    try:
        if backend == "ray":
            from ray.util.joblib import register_ray

            register_ray()
        elif backend == "dask":
            import dask
            from distributed import Client

            local = {} if dask.config.get("scheduler-address", None) else {"threads_per_worker": 1}
            if local and jobs > 0:
                local["n_workers"] = jobs
            with Client(**local):
                yield
            return
    except ImportError as error:
        package = {"dask": "dask[distributed]", "ray": "ray"}[backend]
        raise InputError(f"--backend {backend} needs the package {package}", hint=f"pip install '{package}'") from error
    yield


def run_result(run: SweepRun, root: Path, deadline: float = math.inf, owner: int | None = None) -> SweepResult | None:
    """Trains one run, or goes on with one that was stopped; whatever fails in it is said in the result.

    Args:
        run: what to train.
        root: the folder of the run folders.
        deadline: when to stop at the end of an epoch, in seconds since 1970.
        owner: the process that must live on: without it nobody waits for the result, and the device is needed.

    Returns:
        Its result; None where the deadline, or the owner's end, came first.
    """

    def over() -> bool:
        return time.time() >= deadline or (owner is not None and os.getppid() != owner)

    if over():
        return None
    shared: dict[str, Any] = {"name": run.name, "settings": run.settings, "seed": run.seed, "digest": run.config.digest}
    kept = root / run.name / "result.json"
    started = time.perf_counter()
    try:
        earlier = read_results(kept).get(run.name)
        if earlier is not None and earlier.digest == run.config.digest:
            return earlier
        if owner is not None and run.config["training"]["device"] == "cuda":
            _take_gpu(root)
        result = SweepResult(**shared, status="done", versions=versions(), **_measured(run, root / run.name, over))
        write_atomic(kept, result.to_json().encode() + b"\n")
    except _OutOfTime:
        return None
    except Exception as error:  # one run's end is not the sweep's
        line = " ".join(str(error).split())[:500]
        said = line if isinstance(error, InputError) else f"{type(error).__name__}: {line}"
        wall_s = time.perf_counter() - started
        return SweepResult(**shared, status="failed", error=said, versions=versions(), wall_s=wall_s)
    finally:
        _give_memory_back()
    return result


def _take_gpu(root: Path) -> None:
    """Of several GPUs, has this process use the one that falls to its place among the sweep's processes."""
    import torch

    count = torch.cuda.device_count()
    if count > 1:
        torch.cuda.set_device(_place(root)[0] % count)


@cache
def _place(root: Path) -> tuple[int, IO[bytes]]:
    """The first number that no other process of the sweep holds, and the file that holds it until this one ends."""
    places = ((place, locked(root / f"process{place}.lock")) for place in itertools.count())
    return next((place, stream) for place, stream in places if stream is not None)


def _give_memory_back() -> None:
    """What a run held on a GPU: the process that trained it lives on, and others train on the same device."""
    import torch

    if torch.cuda.is_initialized():
        gc.collect()  # a captured step and its module refer to each other
        torch.cuda.empty_cache()


class _OutOfTime(Exception):
    """The end came before a run's last epoch."""


def _measured(run: SweepRun, path: Path, over: Callable[[], bool]) -> dict[str, Any]:
    """Trains what is left of a run, as long as it is not ``over``; its figures."""
    import torch

    from dpquant.report import summarize
    from dpquant.train import prepare, train

    with ExitStack() as held:
        folder, state = None, None
        if (path / "run.json").exists():
            if load_config(path / "config.yaml").digest != run.config.digest:
                raise InputError(f"run folder '{path}' holds a run of another configuration")
            folder = held.enter_context(RunFolder.resume(path))
            state = folder.load_checkpoint(map_location="cpu")
        with GLOBAL_RANDOM:  # for the initial weights; training draws from generators of its own
            training = prepare(run.config, root=state["engine"]["root"] if state is not None else None)
        if folder is None:
            _clear_unstarted(path)
            folder = held.enter_context(RunFolder.create(path, config=run.config.data, facts=training.facts))
        for record in train(training, folder):
            if record.epoch < training.facts.epochs and over():
                raise _OutOfTime
        records = folder.records()
    summary = summarize(training.facts, records)
    device = run.config["training"]["device"]
    return {
        "epochs": len(records),
        "accuracy": summary.test_accuracy,
        "best_accuracy": max((r.test_accuracy for r in records if r.test_accuracy is not None), default=None),
        "test_loss": summary.test_loss,
        "epsilon": summary.epsilon,
        "delta": training.facts.delta,
        "noise_multiplier": training.facts.noise_multiplier,
        "quantized_share": summary.quantized_share,
        **_modelled(training.engine, records),
        "wall_s": summary.wall_s,
        "ended_s": time.time(),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
    }


def _clear_unstarted(path: Path) -> None:
    """Removes what a run leaves that was stopped before ``run.json``, when it had spent nothing."""
    if path.is_dir():
        for file in path.iterdir():
            if file.name == "config.yaml" or file.name.startswith((".config.yaml.", ".run.json.")):
                file.unlink()


def _modelled(engine: DPQuantEngine, records: Sequence[EpochRecord]) -> dict[str, float | None]:
    """Speedup and energy over all steps on both bases, as far as the profile has them."""
    figures: dict[str, float | None] = {}
    for basis in ("peak", "calibrated") if engine.profile.calibration is not None else ("peak",):
        full = engine.estimate({}, basis)
        steps = sum(r.steps for r in records)
        if not steps:
            continue
        shares = [(r.steps / steps, r.quantized) for r in records]
        figures[f"speedup_{basis}"] = 1 / sum(share / engine.speedup(plan, basis) for share, plan in shares)
        energies = [(share, engine.estimate(plan, basis).energy_joules) for share, plan in shares]
        if full.energy_joules is not None:
            mean = sum(share * joules for share, joules in energies if joules is not None)
            figures[f"energy_joules_{basis}"] = mean * steps
            figures[f"energy_share_{basis}"] = mean / full.energy_joules
    return figures
