"""Schedulers: which layers to quantize first, as pure functions of (seed, epoch) and released values.

A draw reads no private data and touches no global random state: whatever it returns is post-processing.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from emulation.errors import InputError, suggestion

Scheduler = Literal["full", "static", "pls", "dpquant", "greedy", "annealed", "cooldown", "delayed"]
SCHEDULERS: tuple[Scheduler, ...] = get_args(Scheduler)

COOLDOWN = 0.2
"""The share of a run's steps that ``cooldown`` ends in full precision where its goal is a number of layers; pretraining
in NVFP4 took 18 % (arXiv 2509.25149)."""
SHORTEST_COOLDOWN = 0.05
"""The same at the least where its goal is a speedup; a longer one if the layers that are worth it allow."""
LONGEST_COOLDOWN = 1 / 3
"""And beyond this share it takes fewer layers rather than end earlier. Chosen on the digits, on seeds that
docs/results.md does not use: what a third layer did harm in the first epochs a still longer end did not give back."""
WORTH = 0.2
"""What makes a layer worth quantizing to ``cooldown``: it saves this share of what the layer saves that saves most.
Chosen on the runs of docs/results.md: on CIFAR-10 the layers below it did more harm than they saved time."""


def probability(sensitivities: Sequence[float], beta: float) -> list[float]:
    """``softmax(-beta * sensitivities)``: the probability with which each layer is drawn first.

    Args:
        sensitivities: released loss impact of quantizing each layer; all finite.
        beta: zero or more; 0 is uniform.

    Raises:
        InputError: a sensitivity that is not finite, or ``beta`` out of range.
    """
    logits = _logits(sensitivities, beta)
    top = max(logits, default=0.0)
    weights = [math.exp(x - top) for x in logits]
    total = math.fsum(weights)
    return [w / total for w in weights]


def draw_order(
    scheduler: Scheduler,
    layers: Sequence[str],
    *,
    sensitivities: Mapping[str, float] | None = None,
    beta: float = 0.0,
    savings: Mapping[str, float] | None = None,
    epoch: int,
    seed: int,
) -> tuple[str, ...]:
    """The layers in the order in which they are to be quantized.

    Args:
        scheduler: ``full``: none is ever quantized. ``static``: one uniform order for the whole run. ``pls``: a new
            uniform order every epoch. ``dpquant``: every epoch layer after layer without replacement, each with
            probability softmax(-beta * sensitivity) among those left (arXiv 2509.03472), drawn as a descending sort
            of ``-beta * sensitivity`` plus Gumbel noise, which is the same distribution (arXiv 1903.06059).
            ``greedy``: those that save most time first, so that the fewest are needed, the same in every epoch.
            ``annealed`` and ``delayed`` choose epochs (:func:`share_of_epoch`): the order, uniform and new every epoch,
            matters where only a part of the layers is quantized. ``cooldown`` chooses both: the first of the order of
            ``greedy``, in the first epochs.
        layers: names, each once.
        sensitivities: released values by layer name, for ``dpquant``; None (nothing released yet) is a uniform draw.
        beta: how strongly sensitive layers are avoided, per unit of sensitivity; 0 is uniform.
        savings: modelled seconds that quantizing each layer saves, for ``greedy`` and ``cooldown``: of public shapes
            alone.
        epoch: which draw this is.
        seed: of the run's schedule.

    Returns:
        All of ``layers``, reordered; nothing for ``full``.

    Raises:
        InputError: unknown scheduler, a layer given twice, a layer without a sensitivity, a value out of range.
    """
    if scheduler not in SCHEDULERS:
        raise InputError(f"unknown scheduler={scheduler!r}", hint=suggestion(str(scheduler), SCHEDULERS))
    if len(set(layers)) != len(layers):
        twice = next(name for name in layers if list(layers).count(name) > 1)
        raise InputError(f"layer={twice!r} is given twice")
    if scheduler == "full":
        return ()
    if scheduler in ("greedy", "cooldown"):
        saved = savings or {}
        if missing := [name for name in layers if name not in saved]:
            raise InputError(f"layer={missing[0]!r} has no savings", hint=suggestion(missing[0], saved))
        return tuple(sorted(layers, key=lambda name: -saved[name]))
    logits = [0.0] * len(layers)
    if scheduler == "dpquant" and sensitivities is not None:
        if missing := [name for name in layers if name not in sensitivities]:
            raise InputError(f"layer={missing[0]!r} has no sensitivity", hint=suggestion(missing[0], sensitivities))
        logits = _logits([sensitivities[name] for name in layers], beta)
    uniform = _uniform(seed, "static" if scheduler == "static" else epoch)
    keys = [logit - math.log(-math.log(_open(uniform))) for logit in logits]
    return tuple(layers[i] for i in sorted(range(len(layers)), key=lambda i: -keys[i]))


def share_of_epoch(
    scheduler: Scheduler, share: float, *, layers: int, steps: int, steps_done: int, run_steps: int
) -> float:
    """The share of the layers that an epoch quantizes, so that ``share`` is their average over the run's steps.

    ``annealed`` quantizes everything at first and nothing at the end (as pretraining in NVFP4 may end in a higher
    precision, arXiv 2509.25149), ``delayed`` nothing at first and everything at the end; ``cooldown`` as few layers
    as leave the last ``COOLDOWN`` of the run in full precision, or all of them where that is too few; all others
    quantize the same share in every epoch.

    Args:
        scheduler: one of ``SCHEDULERS``.
        share: of the run's layers times steps, between 0 and 1.
        layers: that can be quantized.
        steps: taken when the epoch ends.
        steps_done: taken when it starts.
        run_steps: of the whole run.
    """
    if scheduler not in ("annealed", "cooldown", "delayed"):
        return share
    most = 1.0
    if scheduler == "cooldown":
        most = math.ceil(layers * min(share / (1 - COOLDOWN), 1.0) - 1e-9) / max(layers, 1)
    elsewhere = run_steps - steps if scheduler == "delayed" else steps_done  # steps that quantize all there is
    return min(max((share * run_steps - most * elsewhere) / (steps - steps_done), 0.0), most)


def _logits(sensitivities: Sequence[float], beta: float) -> list[float]:
    if not math.isfinite(beta) or beta < 0:
        raise InputError(f"beta={beta!r} is out of range", hint="a finite number, zero or more; 0 draws uniformly")
    for value in sensitivities:
        if not math.isfinite(value):
            raise InputError(f"sensitivity={value!r} is not finite")
    return [-beta * value for value in sensitivities]


def _uniform(seed: int, position: int | str) -> random.Random:
    """A generator keyed by (seed, position); Python promises its ``random()`` the same bits in every version."""
    label = f"schedule:{seed}:{position}".encode()
    return random.Random(int.from_bytes(hashlib.sha256(label).digest(), "big"))


def _open(uniform: random.Random) -> float:
    """Uniform in the open interval (0, 1), so that both logarithms exist."""
    while not 0 < (u := uniform.random()) < 1:
        pass
    return u
