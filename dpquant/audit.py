"""An empirical lower bound on epsilon: the very training step, the very analysis, or a whole run, attacked.

White-box: whoever audits sees what is released (the noisy gradient sums, the noisy sensitivities) and knows the canary.
A bound above the claim is a violation; a bound below it proves nothing but that this attack found none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dpquant import train
from dpquant.audit_bounds import gaussian_epsilon, gdp_lower_bound, one_run_lower_bound
from dpquant.config import RunConfig
from dpquant.data import DataSettings, Splits, load_data
from dpquant.privacy import PrivacyLedger
from dpquant.streams import fresh_root, stream, stream_seed
from emulation.errors import InputError
from hwmodels.strict_yaml import KeyPath

Mechanism = Literal["training", "analysis"]
_DIRECTION_DRAWS = 4  # stochastic rounding moves the canary's own contribution from draw to draw
_CANARY_MARK = 2.0**20  # above any pixel, and float32 still counts on from there
_CANARY_SLOPE = 1e6


@dataclass(frozen=True, kw_only=True)
class AuditResult:
    """What an audit found.

    Attributes:
        mechanism: ``training`` (one step), ``analysis`` (one sensitivity analysis) or ``run`` (all of a run).
        canary: what was added to the data.
        trials: runs of the mechanism, with and without the canary together; for ``run`` the number of canaries.
        confidence: probability with which the lower bound holds.
        delta: at which both epsilons are.
        epsilon_claimed: what the ledger says of what was run, given that the example takes part; for ``run`` with
            the amplification by sampling.
        epsilon_lower_bound: what is certain to have been spent, with the stated confidence.
        movement: how far the canary moves the un-noised release, over its declared sensitivity; must not exceed 1.
            None for ``run``.
    """

    mechanism: str
    canary: str
    trials: int
    confidence: float
    delta: float
    epsilon_claimed: float
    epsilon_lower_bound: float
    movement: float | None = None

    @property
    def violated(self) -> bool:
        """Whether more was spent than was claimed."""
        return not self.epsilon_lower_bound <= self.epsilon_claimed


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The same mechanism on two neighbouring data sets, every example taking part.

    Attributes:
        mechanism: what is run.
        canary: the name of the example that only ``bigger`` holds.
        smaller: a run that is ready to start, on the data without the canary.
        bigger: on the data with it.
        root: of every random stream of the audit.
    """

    mechanism: Mechanism
    canary: str
    smaller: train.Training
    bigger: train.Training
    root: int


def pair(
    config: RunConfig, mechanism: Mechanism, canary: str, *, examples: int | None = None, seed: int | None = None
) -> Pair:
    """Two neighbouring runs of a configuration's mechanism, whose batch is all of the data.

    All quantizable layers are quantized in the training step. The noise multiplier is the one that the configuration
    calibrates to.

    Args:
        config: the run whose mechanism is audited.
        mechanism: ``training`` or ``analysis``.
        canary: a name of :func:`canaries`.
        examples: size of the data without the canary; default: the expected batch size.
        seed: of weights, rounding and noise; None: from the operating system.

    Raises:
        InputError: the configuration cannot be run, or has no such mechanism.
    """
    planned = train.prepare(config)
    if mechanism == "analysis" and not planned.engine.analyses_planned:
        made = f"scheduler={planned.engine.goal.scheduler!r}, estimator={planned.engine.analysis.estimator!r}"
        raise InputError(f"{made} makes no analyses", hint="audit the training mechanism")
    engine = planned.engine
    batch = engine.expected_batch_size if mechanism == "training" else engine.analysis.expected_batch_size
    size = min(examples or batch, len(planned.splits.train))
    whole = config.changed(_everyone(size, planned.engine.noise_multiplier, mechanism))
    x, y = (t[:size] for t in planned.splits.train.tensors)
    extra_x, extra_y = canaries(planned.splits)[canary]
    bigger = TensorDataset(torch.cat([x, extra_x]), torch.cat([y, extra_y]))
    root = fresh_root() if seed is None else stream_seed(seed, "audit")
    runs = [
        train.prepare(whole, root=root, splits=replace(planned.splits, train=data))
        for data in (TensorDataset(x, y), bigger)
    ]
    return Pair(mechanism=mechanism, canary=canary, smaller=runs[0], bigger=runs[1], root=root)


def _everyone(size: int, noise_multiplier: float, mechanism: Mechanism) -> dict[KeyPath, Any]:
    """Changes to a configuration that make every example take part in one step or one analysis."""
    return {
        ("training", "epochs"): 1,
        ("training", "batch_size"): size,
        ("training", "dataset_size"): size,
        ("privacy", "target_epsilon"): None,
        ("privacy", "noise_multiplier"): noise_multiplier,
        ("schedule", "scheduler"): "static" if mechanism == "training" else "dpquant",
        ("schedule", "target_speedup"): None,
        ("schedule", "fraction"): 1.0,
        ("analysis", "expected_batch_size"): size,
    }


def canaries(splits: Splits) -> dict[str, tuple[Tensor, Tensor]]:
    """Examples that no training set should be shaken by: name to (image [1, ...], label [1])."""
    x, y = (t[:1] for t in splits.test.tensors)
    wrong = (y + 1) % splits.classes
    return {
        "mislabelled": (x, wrong),
        "outlier": (30 * x, wrong),
        "blank": (torch.zeros_like(x), wrong),
        "overflow": (3e38 * torch.sign(x), wrong),
        "infinite": (torch.full_like(x, math.inf), wrong),
    }


def release(training: train.Training, mechanism: Mechanism, root: int) -> tuple[Tensor, PrivacyLedger]:
    """Runs the mechanism once from the initial state: what it releases, and what it says it has spent.

    Args:
        training: a prepared run; its weights are as before when this returns.
        mechanism: which of its mechanisms.
        root: of every random stream of this repetition.
    """
    engine = training.engine
    engine.load_state({"root": root, "epoch": 0, "seconds": [], "sensitivities": None, "ledger": ""})
    epoch = next(engine.epochs())
    if mechanism == "analysis":
        if epoch.sensitivities is None:
            raise InputError("the engine released no sensitivities in its first epoch")
        return torch.tensor(list(epoch.sensitivities.values()), dtype=torch.float64), engine.ledger
    start = {name: value.clone() for name, value in training.model.state_dict().items()}
    module, optimizer, criterion, loader = training.parts
    module.train()
    for inputs, labels in loader:
        optimizer.zero_grad()
        criterion(module(inputs), labels).backward()
        optimizer.step()
    released = torch.cat([p.grad.flatten() for p in training.model.parameters() if p.grad is not None]).double()
    training.model.load_state_dict(start)
    optimizer.zero_grad()
    return released, engine.ledger


@contextmanager
def _without_noise(training: train.Training) -> Iterator[None]:
    """The same mechanism with its noise switched off: it shows where the canary points, and how far."""
    engine, optimizer = training.engine, training.parts[1]
    analysis, multiplier = engine.analysis, optimizer.noise_multiplier
    engine.analysis, optimizer.noise_multiplier = replace(analysis, noise_multiplier=0.0), 0.0
    try:
        yield
    finally:
        engine.analysis, optimizer.noise_multiplier = analysis, multiplier


def direction(subject: Pair) -> tuple[Tensor, float]:
    """Where and how far the canary moves the un-noised release: (mean difference, largest distance / sensitivity)."""
    differences = []
    with _without_noise(subject.smaller), _without_noise(subject.bigger):
        for draw in range(_DIRECTION_DRAWS):
            root = stream_seed(subject.root, "direction", draw)
            differences.append(
                release(subject.bigger, subject.mechanism, root)[0]
                - release(subject.smaller, subject.mechanism, root)[0]
            )
    engine = subject.smaller.engine
    if subject.mechanism == "training":
        sensitivity = subject.smaller.config["training"]["max_grad_norm"] / engine.expected_batch_size
    else:
        sensitivity = engine.analysis.sensitivity
    norms = torch.stack(differences).norm(dim=1)
    return torch.stack(differences).mean(0), float(norms.max()) / sensitivity


def audit_mechanism(
    subject: Pair, *, trials: int, confidence: float = 0.95, progress: Callable[[int], None] = lambda trial: None
) -> AuditResult:
    """Lower-bounds what one release of a mechanism spends, by telling two neighbouring data sets apart.

    The score of a trial is the projection of what was released on the canary's contribution. The claim is what the
    ledger recorded in such a trial, composed: an unrecorded release claims nothing, and is caught.

    Args:
        subject: the mechanism on two neighbouring data sets.
        trials: runs with and without the canary together.
        confidence: probability with which the bound holds.
        progress: told the number of finished trials.
    """
    towards, movement = direction(subject)
    delta = subject.smaller.engine.delta

    def result(mu: float, claimed: float) -> AuditResult:
        return AuditResult(
            mechanism=subject.mechanism,
            canary=subject.canary,
            trials=trials,
            confidence=confidence,
            delta=delta,
            epsilon_claimed=gaussian_epsilon(claimed, delta),
            epsilon_lower_bound=gaussian_epsilon(mu, delta),
            movement=movement,
        )

    _, ledger = release(subject.bigger, subject.mechanism, subject.root)
    claimed = math.sqrt(sum(_squared_mu(e.noise_multiplier) * e.steps for e in ledger.events))
    if not math.isfinite(movement):  # what is not finite shows whether the canary is there, whatever the noise
        return result(math.inf, claimed)
    scores: list[list[float]] = [[], []]
    for trial in range(trials):
        training = (subject.bigger, subject.smaller)[trial % 2]
        released, _ = release(training, subject.mechanism, stream_seed(subject.root, "trial", trial))
        scores[trial % 2].append(float(released @ towards))
        progress(trial + 1)
    return result(gdp_lower_bound(scores[0], scores[1], confidence), claimed)


def _squared_mu(noise_multiplier: float) -> float:
    return math.inf if noise_multiplier == 0 else noise_multiplier**-2


def worst_canary(
    config: RunConfig, mechanism: Mechanism, *, examples: int | None = None, seed: int | None = None
) -> Pair:
    """The pair whose canary moves the un-noised release furthest, the same way whatever the rounding's bits."""
    names = canaries(load_data(DataSettings(**config["data"])))
    pairs = [pair(config, mechanism, name, examples=examples, seed=seed) for name in names]
    moved = [float(direction(p)[0].norm()) for p in pairs]
    return pairs[max(range(len(pairs)), key=lambda i: moved[i] if math.isfinite(moved[i]) else math.inf)]


class CanaryBank(nn.Module):
    """A model with one extra weight per canary, on which that canary's loss depends and nothing else does.

    A canary's gradient is so large that it is clipped to the bound, and lies along its own weight whatever the weights
    are: what is released there is the canary's part in the batch plus noise. All else goes through the model as ever.

    Args:
        model: the model to be trained beside.
        count: number of canaries.
    """

    def __init__(self, model: nn.Module, count: int) -> None:
        super().__init__()
        self.model = model
        self.weights = nn.Embedding(count + 1, 1, padding_idx=count)
        nn.init.zeros_(self.weights.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes]; canaries are known by their images' values."""
        first = x.flatten(1)[:, 0]
        planted = (first >= _CANARY_MARK).unsqueeze(1)
        index = torch.where(planted, first.unsqueeze(1) - _CANARY_MARK, float(self.weights.padding_idx or 0)).long()
        logits: Tensor = self.model(torch.where(planted.view(-1, *[1] * (x.dim() - 1)), torch.zeros_like(x), x))
        weight = self.weights(index).squeeze(2)
        constant = _CANARY_SLOPE * (weight - weight.detach())  # zero, with a slope: the loss never saturates
        return torch.where(planted, F.pad(constant, (0, logits.shape[1] - 1)), logits)


def _planted(count: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The canaries of a :class:`CanaryBank`: (images [count, *shape], labels [count])."""
    numbers = torch.arange(count, dtype=torch.float32) + _CANARY_MARK
    return numbers.view(-1, *[1] * len(shape)).expand(count, *shape).clone(), torch.zeros(count, dtype=torch.int64)


def audit_run(
    config: RunConfig,
    *,
    count: int,
    epochs: int | None = None,
    confidence: float = 0.95,
    seed: int | None = None,
    progress: Callable[[int], None] = lambda epoch: None,
) -> AuditResult:
    """Lower-bounds what a whole run spends, from that one run (Steinke et al., arXiv 2305.08846).

    ``count`` canaries take part in the data, each by a fair coin, and their gradients are as long as clipping allows,
    each in a direction of its own. A canary's score is the sum of all that was released in its direction. Sampling,
    clipping, noise, schedule, analyses and ledger are the run's own.

    Args:
        config: the run; a short one, since it is really trained.
        count: number of canaries.
        epochs: length of the run; default: the configuration's.
        confidence: probability with which the bound holds.
        seed: of coins and run; None: from the operating system.
        progress: told the number of finished epochs.
    """
    splits = load_data(DataSettings(**config["data"]))
    root = fresh_root() if seed is None else stream_seed(seed, "audit")
    included = torch.rand(count, generator=stream(root, "canaries")) < 0.5
    canaries_ = _planted(count, splits.input_shape)
    data = [torch.cat([old, new[included]]) for old, new in zip(splits.train.tensors, canaries_, strict=True)]
    changes: dict[KeyPath, Any] = {
        ("training", "dataset_size"): config["training"]["dataset_size"] or len(splits.train),
        ("training", "epochs"): epochs or config["training"]["epochs"],
    }
    training = train.prepare(
        config.changed(changes),
        root=root,
        splits=replace(splits, train=TensorDataset(*data)),
        adapt=lambda model: CanaryBank(model, count),
    )
    scores = torch.zeros(count, dtype=torch.float64)
    module, optimizer, criterion, loader = training.parts
    bank = dict(training.model.named_parameters())["weights.weight"]

    own_hook = optimizer.step_hook

    def add(stepped: object) -> None:
        if own_hook is not None:
            own_hook(stepped)
        assert bank.grad is not None
        scores.sub_(bank.grad[:count, 0].double())  # a canary's loss falls as its weight rises

    optimizer.attach_step_hook(add)
    for epoch in training.engine.epochs():
        module.train()
        for inputs, labels in loader:
            optimizer.zero_grad()
            criterion(module(inputs), labels).backward()
            optimizer.step()
        progress(epoch.index + 1)
    delta = training.engine.delta
    return AuditResult(
        mechanism="run",
        canary="own weight",
        trials=count,
        confidence=confidence,
        delta=delta,
        epsilon_claimed=training.engine.epsilon(),
        epsilon_lower_bound=one_run_lower_bound(scores.tolist(), included.tolist(), delta, confidence),
    )
