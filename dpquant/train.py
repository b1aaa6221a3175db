"""A run from a configuration, top to bottom: prepared, trained epoch by epoch, written down as it goes.

``prepare`` does everything that can be refused and spends nothing; ``train`` yields a record per epoch and prints
nothing. A run that was stopped goes on from its last epoch with the same random streams, so on a CPU it ends with the
same bits as one that was not.
"""

from __future__ import annotations

import hashlib
import pickle
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dpquant import ledger_file, models, privacy
from dpquant.config import RunConfig
from dpquant.data import DataSettings, Splits, data_source, load_data
from dpquant.distributed import ALONE, Processes
from dpquant.engine import DPQuantEngine
from dpquant.modelled import Epoch
from dpquant.rundir import EpochRecord, RunFacts, RunFolder
from dpquant.sensitivity import AnalysisSettings
from dpquant.streams import fresh_root, stream_seed
from emulation.errors import InputError
from emulation.precision import layer_precision
from hwmodels import cost
from hwmodels.profile import HardwareProfile, load_profile

_EVALUATION_BATCH = 1000


@dataclass(frozen=True, kw_only=True)
class Training:
    """A run that is ready to start: nothing has been spent or written."""

    config: RunConfig
    facts: RunFacts
    engine: DPQuantEngine
    splits: Splits
    model: nn.Module
    optimizer: torch.optim.Optimizer
    parts: tuple[Any, ...]


def check_names(config: RunConfig) -> HardwareProfile:
    """Looks up the data set, model, formats and chip of a configuration, and reads no data.

    Returns:
        The chip's profile.

    Raises:
        InputError: a name of none, with the configuration's line.
    """
    with config.at("data", "name"):
        data_source(config["data"]["name"])
    with config.at("model", "name"):
        models.options_of(config["model"]["name"])
    with config.at("format"):
        for fmt in [config["format"]] if isinstance(config["format"], str) else config["format"]:
            layer_precision(fmt)
    with config.at("hardware", "profile"):
        return load_profile(config["hardware"]["profile"])


def prepare(
    config: RunConfig,
    *,
    root: int | None = None,
    splits: Splits | None = None,
    adapt: Callable[[nn.Module], nn.Module] | None = None,
    processes: Processes = ALONE,
) -> Training:
    """Everything before the first step: data, model, workload, hardware, reachability, noise.

    Args:
        config: what to run.
        root: the root seed of a run that is resumed; None derives it from the configuration's seed, or draws one.
        splits: data to use in place of the configuration's.
        adapt: makes of the configuration's model the one to train.
        processes: those that share the run; each calls this, and ``root`` is the first one's.

    Raises:
        InputError: whatever cannot be used or reached, with the configuration's line where there is one.
    """
    profile = check_names(config)
    settings, schedule, budget = config["training"], config["schedule"], config["privacy"]
    if splits is None:
        with config.at("data"):
            splits = load_data(DataSettings(**config["data"]))
    with config.at("training", "device"):
        device = _device(settings["device"])
    splits = replace(splits, train=_on(splits.train, device), test=_on(splits.test, device))
    size = len(splits.train)
    if settings["batch_size"] > size:
        message = f"batch_size={settings['batch_size']} is larger than the data ({size} training examples)"
        raise config.error(("training", "batch_size"), message, hint=f"at most {size}")
    declared = settings["dataset_size"] or size
    with config.at("privacy", "target_delta"):
        privacy.check_delta("target_delta", budget["target_delta"], examples=declared)
    if root is None:
        root = fresh_root() if config["seed"] is None else stream_seed(config["seed"], "root")
    root = processes.broadcast(root)
    model = _model(config, splits, root)
    model = (model if adapt is None else adapt(model)).to(device)
    with config.at("schedule", "target_speedup"):
        engine = DPQuantEngine(
            hardware=profile,
            basis=config["hardware"]["basis"],
            target_speedup=schedule["target_speedup"],
            fraction=schedule["fraction"],
            layers=schedule["layers"],
            format=config["format"],
            scheduler=schedule["scheduler"],
            beta=schedule["beta"],
            analysis=AnalysisSettings(**config["analysis"]),
            accountant=budget["accountant"],
            accumulate=settings["accumulate"],
            keep_freed_memory=settings["keep_freed_memory"],
            root=root,
            processes=processes,
        )
        optimizer = _optimizer(config, model)
        parts = engine.make_private(
            module=model,
            optimizer=optimizer,
            criterion=nn.CrossEntropyLoss(),
            data_loader=DataLoader(splits.train, batch_size=settings["batch_size"]),
            target_epsilon=budget["target_epsilon"],
            noise_multiplier=budget["noise_multiplier"],
            target_delta=budget["target_delta"],
            epochs=settings["epochs"],
            max_grad_norm=settings["max_grad_norm"],
            sample_rate=min(1.0, settings["batch_size"] / declared),
            expected_batch_size=settings["batch_size"],
            clipping=settings["clipping"],
            max_physical_batch_size=settings["max_physical_batch_size"],
            cuda_graphs=settings["cuda_graphs"],
        )
    return Training(
        config=config,
        facts=_facts(config, engine, model),
        engine=engine,
        splits=splits,
        model=model,
        optimizer=optimizer,
        parts=parts,
    )


def train(training: Training, folder: RunFolder | None) -> Iterator[EpochRecord]:
    """Trains the epochs that are left, each on disk before it is yielded.

    Of several processes the first one keeps the folder; the others have none and yield the same records.

    Args:
        training: what :func:`prepare` gave.
        folder: a new run folder, or one to resume: then the run goes on after its last complete epoch.

    Raises:
        InputError: a checkpoint or ledger that is damaged or of another run.
    """
    engine = training.engine
    data = "" if folder is None else _digest(training.splits.train)
    _restore(training, folder, data)
    module, optimizer, _, loader = training.parts
    for epoch in engine.epochs():
        started = time.perf_counter()
        totals = _Totals(training.splits.train.tensors[0].device)
        nonfinite = optimizer.nonfinite_examples
        module.train()
        for images, labels in loader:
            optimizer.zero_grad()
            outputs, loss = engine.backward(images, labels)
            optimizer.step()
            totals.add(outputs, labels, loss)
        totals.nonfinite = optimizer.nonfinite_examples - nonfinite
        totals.add_up(engine.processes)
        loss_value, accuracy = evaluate(module, training.splits.test, engine.processes)
        record = EpochRecord(
            **_modelled(engine, epoch),
            steps=engine.step - epoch.index * engine.steps_per_epoch,
            noise_multiplier=engine.noise_multiplier,
            epsilon=engine.epsilon(),
            epsilon_analysis=privacy.epsilon(engine.ledger.only("analysis"), engine.delta, engine.accountant),
            train_loss=totals.mean_loss,
            train_accuracy=totals.accuracy,
            test_loss=loss_value,
            test_accuracy=accuracy,
            examples=totals.examples,
            nonfinite_examples=totals.nonfinite,
            wall_s=time.perf_counter() - started,
            analysis_wall_s=epoch.analysis_wall_s,
        )
        if folder is not None:
            folder.append(record)
            _save(training, folder, epoch.index + 1, data)
        yield record


def evaluate(module: nn.Module, data: TensorDataset, processes: Processes = ALONE) -> tuple[float, float]:
    """Mean cross-entropy and accuracy in [0, 1] of the full-precision weights on ``data``, shared by ``processes``."""
    module.eval()
    images, labels = (processes.share(t) for t in data.tensors)
    loss = correct = 0.0
    with torch.no_grad():
        for x, y in zip(images.split(_EVALUATION_BATCH), labels.split(_EVALUATION_BATCH), strict=True):
            outputs = module(x)
            loss += F.cross_entropy(outputs, y, reduction="sum").item()
            correct += (outputs.argmax(1) == y).sum().item()
    (sums,) = processes.sum([torch.tensor([loss, correct], dtype=torch.float64)])
    return float(sums[0]) / len(data), float(sums[1]) / len(data)


class _Totals:
    """Training loss and accuracy of an epoch: diagnostics that the guarantee does not cover.

    They add up on the device: reading them every step would have the host wait for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        self.loss = 0.0
        self.correct = self.examples = self.nonfinite = 0

    def add(self, outputs: Tensor, labels: Tensor, loss: Tensor) -> None:
        if len(labels):
            correct = (outputs.detach().argmax(1) == labels).sum()
            self._sums += torch.stack([loss.detach().double() * len(labels), correct.double()])
            self.examples += len(labels)

    def add_up(self, processes: Processes) -> None:
        """Makes of every process's part the whole."""
        counts = (*self._sums.tolist(), self.examples, self.nonfinite)
        (sums,) = processes.sum([torch.tensor(counts, dtype=torch.float64)])
        self.loss = float(sums[0])
        self.correct, self.examples, self.nonfinite = (int(n) for n in sums[1:])

    @property
    def mean_loss(self) -> float | None:
        return self.loss / self.examples if self.examples else None

    @property
    def accuracy(self) -> float | None:
        return self.correct / self.examples if self.examples else None


def _model(config: RunConfig, splits: Splits, root: int) -> nn.Module:
    name, options = config["model"]["name"], dict(config["model"]["options"])
    with config.at("model", "name"), torch.random.fork_rng(devices=[]):
        takes = models.options_of(name)
        shape = splits.input_shape
        known = {"num_classes": splits.classes, "in_channels": shape[0], "image_size": shape[-1], "length": shape[0]}
        if splits.vocabulary is not None:
            known["vocabulary"] = splits.vocabulary
        options = {key: value for key, value in known.items() if key in takes} | options
        classes = options.get("num_classes")
        if isinstance(classes, int) and classes < splits.classes:
            raise InputError(f"num_classes={classes} is below the {splits.classes} of the data", hint="leave it out")
        if "vocabulary" in takes:
            _check_tokens(splits, options.get("vocabulary", takes["vocabulary"].default))
        torch.manual_seed(stream_seed(root, "initialisation"))
        model = models.build_model(name, **options)
    if config["model"]["weights"] is not None:
        with config.at("model", "weights"):
            load_weights(model, Path(config["model"]["weights"]))
    return model


def load_weights(model: nn.Module, path: Path) -> None:
    """Puts a state dict's tensors into ``model``; what it lacks, such as a classifier of other classes, stays as it is.

    The file must be of public data: what the weights say of it is not covered by the guarantee.

    Raises:
        InputError: no state dict, no tensor in it, or one that the model has not or has in another shape.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = {name: tensor.shape for name, tensor in state.items()}
    except (OSError, EOFError, RuntimeError, ValueError, AttributeError, pickle.UnpicklingError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"weights={str(path)!r} is no state dict ({said})") from error
    own = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if not found:
        raise InputError(f"weights={str(path)!r} holds no tensors")
    for name, shape in found.items():
        if own.get(name) != shape:
            what = "no such tensor" if name not in own else f"it of shape {list(own[name])}"
            message = f"weights={str(path)!r} holds {name} of shape {list(shape)}, and the model has {what}"
            raise InputError(message, hint="leave it out of the file, and it is initialised")
    model.load_state_dict(state, strict=False)


def _check_tokens(splits: Splits, vocabulary: int) -> None:
    for part in (splits.train, splits.test):
        tokens = part.tensors[0]
        if tokens.is_floating_point():
            raise InputError("the model takes token ids and the data set holds images")
        if int(tokens.max()) >= vocabulary:
            message = f"the data holds token {int(tokens.max())} and the model's vocabulary={vocabulary}"
            raise InputError(message, hint="model.options.vocabulary: how many token ids there are")


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device={name!r}: torch {torch.__version__} sees no CUDA device", hint="use device: cpu")
    return torch.device(name)


def _on(data: TensorDataset, device: torch.device) -> TensorDataset:
    return TensorDataset(*(t.to(device) for t in data.tensors))


def _optimizer(config: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
    settings = config["training"]
    options = {"lr": settings["learning_rate"], "weight_decay": settings["weight_decay"]}
    if settings["optimizer"] == "sgd":
        return torch.optim.SGD(model.parameters(), momentum=settings["momentum"], **options)
    rule = torch.optim.Adam if settings["optimizer"] == "adam" else torch.optim.AdamW
    return rule(model.parameters(), **options)


def _facts(config: RunConfig, engine: DPQuantEngine, model: nn.Module) -> RunFacts:
    analysed = engine.analyses_planned > 0
    event = engine.analysis_event(1) if analysed else None
    calibrated = engine.profile.calibration is not None
    notes = []
    if config["training"]["dataset_size"] is None:
        notes.append(
            f"training.dataset_size is not declared: the number of training examples, {engine.dataset_size}, becomes "
            "public"
        )
    if engine.basis == "peak" and calibrated:
        notes.append(
            "planned on published peak rates, the usual kind of theoretical figure; "
            "the calibrated figure beside it is what the chip would be expected to do"
        )
    return RunFacts(
        name=config["name"],
        model=config["model"]["name"],
        dataset=config["data"]["name"],
        layers=engine.workload.quantizable,
        hardware=engine.profile.name,
        format=engine.format,
        scheduler=engine.goal.scheduler,
        basis=engine.basis,
        target_speedup=engine.goal.target_speedup,
        fraction=engine.goal.fraction,
        max_speedup=engine.reach.max_speedup,
        max_speedup_calibrated=engine.modelled.reach("calibrated").max_speedup if calibrated else None,
        epochs=engine.epochs_planned,
        steps=engine.epochs_planned * engine.steps_per_epoch,
        expected_batch_size=engine.expected_batch_size,
        sample_rate=engine.sample_rate,
        noise_multiplier=engine.noise_multiplier,
        max_grad_norm=config["training"]["max_grad_norm"],
        target_epsilon=engine.target_epsilon,
        delta=engine.delta,
        accountant=engine.accountant,
        analyses=engine.analyses_planned,
        analysis_noise_multiplier=event.noise_multiplier if event else None,
        analysis_sample_rate=event.sample_rate if event else None,
        seed=config["seed"],
        parameters=sum(p.numel() for p in model.parameters()),
        notes=tuple(notes),
    )


def _modelled(engine: DPQuantEngine, epoch: Epoch) -> dict[str, Any]:
    """What the hardware model says of an epoch."""
    full: cost.Estimate = engine.estimate({})
    calibrated = None
    if engine.basis == "peak" and engine.profile.calibration is not None:
        calibrated = engine.speedup(epoch.plan, basis="calibrated")
    return {
        "epoch": epoch.index + 1,
        "quantized": dict(epoch.plan),
        "step_s": epoch.estimate.step_s,
        "baseline_step_s": full.step_s,
        "speedup": epoch.speedup,
        "speedup_calibrated": calibrated,
        "energy_joules": epoch.estimate.energy_joules,
        "baseline_energy_joules": full.energy_joules,
        "sensitivities": dict(epoch.sensitivities) if epoch.sensitivities is not None else None,
    }


def _digest(data: TensorDataset) -> str:
    """Of every bit of the examples: repeated on others, the same noise would show the difference."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in data.tensors:
        digest.update(f"{tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _ledger_of(folder: RunFolder, state: Mapping[str, Any] | None, now: Mapping[str, str]) -> privacy.PrivacyLedger:
    """What a folder's ledger holds, a new one's nothing.

    Args:
        folder: new, or of a run that was stopped.
        state: its checkpoint.
        now: what must be as it was when the run began, by its key in the checkpoint.

    Raises:
        InputError: something was spent, and the ledger, the checkpoint or an epoch's record is missing; or the run
            would be another one.
    """
    path, done = folder.ledger_path, {record.epoch for record in folder.records()}
    held = ledger_file.read_ledger(path, folder.run_id) if path.exists() else None
    begun = bool(held.events) if held is not None else state is not None or bool(done)
    if begun and (state is None or held is None):
        missing = folder.checkpoint_path if state is None else path
        raise InputError(
            f"{folder.path} has no {missing.name}, and without it nobody knows which noise was spent",
            hint="put it back, or start a new run in another folder",
        )
    if lost := {*range(1, 1 + (state["engine"]["epoch"] if state else 0))} - done:
        message = f"{folder.path}: records.jsonl has no epoch {min(lost)}, and the checkpoint was written after it"
        raise InputError(message, hint="put the line back, or start a new run in another folder")
    hint = "go on with the same, or start a new run: repeated steps have the noise that they had"
    for key, said in (("data", "the training data are not those"), ("config", "config.yaml is not the one")):
        if state is not None and state.get(key, now[key]) != now[key]:
            raise InputError(f"{folder.path}: {said} that the run began with", hint=hint)
    if held is None:
        ledger_file.create_ledger(path, folder.run_id)
    return privacy.PrivacyLedger() if held is None else held


def _restore(training: Training, folder: RunFolder | None, data: str) -> None:
    """Sets the run to where its folder says it stopped, and makes its ledger write-ahead from here on."""
    engine, device = training.engine, training.config["training"]["device"]
    state = folder.load_checkpoint(map_location=device) if folder is not None else None
    written = privacy.PrivacyLedger()
    if folder is not None:
        written = _ledger_of(folder, state, {"data": data, "config": training.config.digest})
    state = engine.processes.broadcast(state, device)
    if state is not None:
        training.model.load_state_dict(state["model"])
        training.optimizer.load_state_dict(state["optimizer"])
        engine.load_state(state["engine"])
    append = None
    if folder is not None:
        folder.keep_records(engine.epoch)
        append = partial(ledger_file.append_event, folder.ledger_path)
    lines = engine.processes.broadcast(written.to_json_lines())
    engine.write_ahead(privacy.PrivacyLedger.from_json_lines(lines), append or (lambda event: None))
    if folder is not None:
        _save(training, folder, engine.epoch, data)


def _save(training: Training, folder: RunFolder, epochs_done: int, data: str) -> None:
    state = {
        "data": data,
        "config": training.config.digest,
        "model": training.model.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "engine": training.engine.state(epochs_done),
    }
    folder.save_checkpoint(state)
