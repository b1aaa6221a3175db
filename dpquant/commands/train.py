"""``dpquant train``: a private run from a configuration, into a folder that can be resumed and reported on."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpquant.render import Output
from emulation.errors import InputError

if TYPE_CHECKING:
    from dpquant.config import RunConfig
    from dpquant.distributed import Processes
    from dpquant.progress import Progress
    from dpquant.rundir import EpochRecord, RunFolder
    from dpquant.train import Training

SUMMARY = "Train privately from a configuration; resumable."
EXAMPLES = """\
examples:
  dpquant train digits                     a configuration that ships
  dpquant train my.yaml --out runs/mine --target-speedup 1.4
  dpquant train digits --scheduler static --seed 1 --out runs/static-1
  dpquant train --resume runs/mine         goes on where it stopped
  torchrun --nproc-per-node 8 -m dpquant train my.yaml --device cuda
                                           on eight devices of one host"""

_NO_FSDP = (
    "an example's gradient norm needs the whole weight gradient of each layer as it was quantized, and the sharded "
    "path of Opacus clips by a second backward, which rounds anew; use --parallel data"
)
_METAVARS = {int: "N", float: "X", str: "NAME"}
_OVERRIDES: dict[str, tuple[tuple[str | int, ...], Any, str]] = {
    "target_speedup": (("schedule", "target_speedup"), float, "modelled speedup the whole run must meet"),
    "fraction": (("schedule", "fraction"), float, "share of the layers to quantize instead of a target speedup"),
    "scheduler": (("schedule", "scheduler"), str, "full, static, pls, dpquant, greedy, annealed, cooldown or delayed"),
    "hardware": (("hardware", "profile"), str, "hardware profile"),
    "basis": (("hardware", "basis"), str, "peak or calibrated"),
    "format": (
        ("format",),
        str,
        "number format of the quantized layers; of several, with commas, each layer takes one",
    ),
    "epochs": (("training", "epochs"), int, "epochs"),
    "target_epsilon": (("privacy", "target_epsilon"), float, "budget of training and analyses together"),
    "data_root": (("data", "root"), str, "folder of the data set's files"),
    "device": (("training", "device"), str, "cpu or cuda"),
    "seed": (("seed",), int, "root of all random streams"),
}


def add_arguments(parser: argparse.ArgumentParser, common: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="a YAML file, or a shipped one: digits, ...")
    parser.add_argument("--out", metavar="DIR", help="run folder; default: runs/NAME-DATE-TIME")
    parser.add_argument("--resume", metavar="RUN", help="continue the run in this folder")
    parser.add_argument(
        "--download", action="store_true", help="have torchvision fetch the data set into its root first"
    )
    parser.add_argument("--tensorboard", action="store_true", help="also write event files into the run folder")
    parser.add_argument(
        "--parallel",
        choices=("data", "fsdp"),
        default="data",
        help="how the processes of torchrun share the work: data (each holds the whole model), or fsdp (refused)",
    )
    changes = parser.add_argument_group("in place of what the configuration says")
    for name, (_, kind, text) in _OVERRIDES.items():
        changes.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=_METAVARS[kind], help=text)


def run(args: argparse.Namespace, out: Output) -> int:
    """Run the command; returns its exit code. Of the processes of ``torchrun``, the first one talks."""
    from dpquant.distributed import joined

    with joined() as processes:
        return _run(args, out if processes.first else Output(out.form, True), processes)


def _run(args: argparse.Namespace, out: Output, processes: Processes) -> int:
    if (args.config is None) == (args.resume is None):
        raise InputError("give a CONFIG, or --resume RUN", hint="dpquant train digits is the demonstration")
    if args.parallel == "fsdp":
        raise InputError("--parallel fsdp: sharded weights cannot be trained with exact clipping yet", hint=_NO_FSDP)
    given = {name: value for name in _OVERRIDES if (value := getattr(args, name)) is not None}
    if args.tensorboard:
        _summary_writer()  # refused now rather than after the first epoch
    if args.resume is not None and (given or args.out):
        option = "--out" if args.out else f"--{next(iter(given)).replace('_', '-')}"
        raise InputError(f"{option} cannot change a run that is resumed", hint="start a new one")
    from dpquant.rundir import load_run

    complete = processes.broadcast(args.resume is not None and processes.first and load_run(args.resume).complete)
    if complete:
        path = Path(args.resume)
        out.say(f"{path} is complete")
    else:
        training, folder = (
            _resumed(args.resume, out, processes) if args.resume else _started(args, given, out, processes)
        )
        if folder is None:
            from dpquant.train import train

            for _ in train(training, None):
                pass
            return 0
        with folder:
            _talk(training, folder, args.tensorboard, out)
        path = folder.path
    if not processes.first:
        return 0
    from dpquant import report

    finished = load_run(path)
    if out.form == "json":
        out.json(report.to_json(finished))
    elif out.form == "csv":
        out.table(report.records_table(finished))
    else:
        out.show("", *report.report(finished, width=out.console().width))
    out.say(f"run folder: {finished.path} (dpquant report {finished.path})")
    return 0


def _started(
    args: argparse.Namespace, given: dict[str, Any], out: Output, processes: Processes
) -> tuple[Training, RunFolder | None]:
    """A new run: everything that can be refused is, before its folder is made."""
    config = _configuration(args.config, given)
    from dpquant.rundir import RunFolder
    from dpquant.train import prepare

    if args.download and processes.first:
        from dpquant.data import DataSettings
        from dpquant.download import download

        with config.at("data", "name"):
            download(DataSettings(**config["data"]))
    processes.broadcast(None)  # the others wait for the files
    out.say("preparing: data, workload, noise")
    training = prepare(config, processes=processes)
    if not processes.first:
        return training, None
    path = Path(args.out) if args.out else _fresh_folder(config["name"])
    return training, RunFolder.create(path, config=config.data, facts=training.facts)


def _resumed(path: str, out: Output, processes: Processes) -> tuple[Training, RunFolder | None]:
    from dpquant.config import load_config
    from dpquant.rundir import RunFolder
    from dpquant.train import prepare

    folder = RunFolder.resume(path) if processes.first else None
    try:
        state = folder.load_checkpoint() if folder is not None else None
        out.say(f"resuming {path}")
        root = state["engine"]["root"] if state else None
        training = prepare(load_config(Path(path) / "config.yaml"), root=root, processes=processes)
    except BaseException:
        if folder is not None:
            folder.close()
        raise
    return training, folder


def _configuration(path: str, given: dict[str, Any]) -> RunConfig:
    from dpquant.config import load_config, with_alternatives

    overrides: dict[tuple[str | int, ...], Any] = {_OVERRIDES[name][0]: value for name, value in given.items()}
    if "," in given.get("format", ""):
        overrides["format",] = [word.strip() for word in given["format"].split(",")]
    return load_config(path, with_alternatives(overrides))


def _fresh_folder(name: str) -> Path:
    stem = Path("runs") / f"{name.replace('/', '-')}-{time.strftime('%Y%m%d-%H%M%S')}"
    return next(p for i in range(1000) if not (p := stem.with_name(stem.name + (f"-{i}" if i else ""))).exists())


def _talk(training: Training, folder: RunFolder, tensorboard: bool, out: Output) -> None:
    """Train, print each epoch as it ends, and meanwhile say how far it is, how fast, and how long still."""
    from dpquant import report
    from dpquant.progress import Progress
    from dpquant.train import train

    facts = training.facts
    if note := _idle_cores(training):
        out.say(note)
    for line in (*report.opening(facts), report.LIVE_HEADER):
        out.say(line)
    steps = sum(record.steps for record in folder.records())
    try:
        with Progress(out, "training", facts.steps, "steps", done=steps) as progress:
            records = train(_watched(training, progress), folder)
            for record in _with_events(records, folder.path) if tensorboard else records:
                progress.line(report.live_line(record, facts))
                progress.status(report.status(record, facts))
    except KeyboardInterrupt:
        print(f"stopped; go on with: dpquant train --resume {shlex.quote(str(folder.path))}", file=sys.stderr)
        raise
    if (end := training.engine.last_step) < facts.steps:
        out.say(f"ended at step {end} of {facts.steps}: what was taken again after a stop has spent the rest")


def _idle_cores(training: Training) -> str | None:
    """What to say where a lone process trains on one thread, though it may use more cores: mostly a cluster's default.

    torchrun gives each of its processes one thread on purpose, and says so itself.
    """
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    module = training.parts[0]
    on_cpu = next(module.parameters()).device.type == "cpu"
    if not on_cpu or training.engine.processes.size > 1 or torch.get_num_threads() > 1 or cores == 1:
        return None
    asked = os.environ.get("OMP_NUM_THREADS")
    why = f" (OMP_NUM_THREADS={asked})" if asked else ""
    return f"note: training on 1 thread of the {cores} cores that this process may use{why}"


class _Watched:
    """A loader that tells of every batch once the loop is done with it."""

    def __init__(self, loader: Iterable[Any], done: Callable[[int], None]) -> None:
        self._loader, self._done = loader, done

    def __iter__(self) -> Iterator[Any]:
        for inputs, labels in self._loader:
            yield inputs, labels
            self._done(len(labels))


def _watched(training: Training, progress: Progress) -> Training:
    """The same training, telling how far it is as it goes."""
    *parts, loader = training.parts
    examples, begun = 0, time.monotonic()

    def done(count: int) -> None:
        nonlocal examples
        examples += count
        progress.update(training.engine.step, rate=f"{examples / (time.monotonic() - begun):,.0f} examples/s")

    return replace(training, parts=(*parts, _Watched(loader, done)))


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError("--tensorboard needs the package tensorboard", hint="pip install 'dpquant[plots]'") from error
    return SummaryWriter


def _with_events(records: Iterator[EpochRecord], path: Path) -> Iterator[EpochRecord]:
    """The records as they come, each also written as TensorBoard scalars."""
    with _summary_writer()(str(path / "tensorboard")) as writer:
        for record in records:
            for name, value in vars(record).items():
                if isinstance(value, (int, float)) and name != "epoch":
                    writer.add_scalar(name, value, record.epoch)
            for layer, value in (record.sensitivities or {}).items():
                writer.add_scalar(f"sensitivity/{layer}", value, record.epoch)
            writer.add_scalar("layers_quantized", len(record.quantized), record.epoch)
            writer.flush()
            yield record
