"""Sensitivities from what is public already: the noisy gradients that training released, and the weights themselves.

No private data is read, so this costs no budget: it is post-processing. To second order, quantizing a layer moves the
loss by half its Fisher information times the squared error of its weights; an equal relative error of its inputs does
to the layer's output what that error of the weights would. The first-order term is left out: the average of the
released gradients holds the very noise that moved the weights, so that its product with a function of those weights
says more of the noise than of the loss (seen to rank layers backwards).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from emulation.errors import InputError
from emulation.gemms import geometry
from emulation.layers import quantizable_layers
from emulation.precision import by_group, layer_precision

_SAMPLE = 1 << 14  # normal numbers that stand in for a layer's inputs


@dataclass(frozen=True, kw_only=True)
class ReleasedMoments:
    """Averages over the noisy mean gradients that were released so far.

    Attributes:
        steps: how many were averaged.
        mean: parameter name to their average.
        square: parameter name to the average of their elementwise squares.
    """

    steps: int = 0
    mean: Mapping[str, Tensor]
    square: Mapping[str, Tensor]


def observe(past: ReleasedMoments | None, released: Mapping[str, Tensor], horizon: int = 1000) -> ReleasedMoments:
    """The averages after one more release.

    Args:
        past: the averages before; None at the first.
        released: parameter name to the noisy gradient, already divided by the expected batch size.
        horizon: the plain average turns into an exponential one with this many steps of memory.
    """
    gradients = {name: g.detach() for name, g in released.items()}
    if past is None:
        return ReleasedMoments(
            steps=1, mean={n: g.clone() for n, g in gradients.items()}, square={n: g**2 for n, g in gradients.items()}
        )
    share = 1 / min(past.steps + 1, horizon)
    return ReleasedMoments(
        steps=past.steps + 1,
        mean={n: torch.lerp(past.mean[n], g, share) for n, g in gradients.items()},
        square={n: torch.lerp(past.square[n], g**2, share) for n, g in gradients.items()},
    )


def squared_errors(module: nn.Module, format: Any) -> dict[str, Tensor]:
    """The squared error of each layer's weight that stands for quantizing the layer, by layer name.

    What quantizing the weight adds to it, as the layer's forward does it, and the relative mean squared error of
    quantizing inputs, for which normal numbers stand in: the inputs themselves are private.

    Args:
        module: a model that ``quantize_model`` has prepared.
        format: format or preset name.
    """
    precision = layer_precision(format)
    # stochastic rounding has no one error; the nearest value is where it goes on average
    weights, inputs = (replace(q, rounding="nearest_even") for q in (precision.weight, precision.input))
    normal = torch.randn(1, _SAMPLE, generator=torch.Generator().manual_seed(0))
    relative = float((inputs.fake_quantize(normal) - normal).square().sum() / normal.square().sum())
    errors = {}
    with torch.no_grad():
        for name, layer in quantizable_layers(module).items():
            weight = layer.get_parameter("weight")
            grouped = by_group(weight, geometry(layer)) if precision.blocks else weight
            quantized = weights.fake_quantize(grouped, axis=2 if precision.blocks else 1).reshape(weight.shape)
            errors[name] = (quantized - weight).square() + relative * weight.square()
    return errors


def loss_impacts(
    moments: ReleasedMoments, errors: Mapping[str, Tensor], *, noise_std: float, expected_batch_size: int
) -> dict[str, float]:
    """Half the sum of F times the squared error of each layer's weight: what quantizing the layer adds to the loss.

    F is the diagonal of the empirical Fisher matrix of the clipped gradients. A Poisson batch's mean gradient varies by
    F / expected_batch_size; what was released varies by that and by the noise, whose variance is public and is taken
    off. The estimate is unbiased for what is clipped, and may be negative where the noise is larger than what there is
    to see: on d weights it is about noise_multiplier^2 / expected_batch_size * sqrt(2 d / steps) of the squared
    clipping norm, which the layers' parts of it together cannot exceed.

    Args:
        moments: averages over at least two releases.
        errors: layer name to the squared error of its weight; the parameter is ``<layer>.weight``.
        noise_std: standard deviation of the noise in each element of the mean gradients:
            noise_multiplier * max_grad_norm / expected_batch_size.
        expected_batch_size: of the training steps.

    Returns:
        Layer name to its estimate, in units of the loss scaled by the examples' clipping factors.

    Raises:
        InputError: fewer than two releases, or a layer without one.
    """
    if moments.steps < 2:
        raise InputError(f"steps={moments.steps} released gradients are too few", hint="at least 2")
    impacts = {}
    for name, error in errors.items():
        parameter = f"{name}.weight"
        if parameter not in moments.mean:
            raise InputError(f"layer={name!r} has released no gradient of its weight", hint="is it frozen?")
        mean, square = moments.mean[parameter].double(), moments.square[parameter].double()
        variance = (square - mean**2) * (moments.steps / (moments.steps - 1)) - noise_std**2
        impacts[name] = float(0.5 * expected_batch_size * (variance * error.to(mean)).sum())
    return impacts


def relative(impacts: Mapping[str, float]) -> dict[str, float]:
    """Impacts in units of the largest: what clipping scales them by is not public, and the same for all layers."""
    largest = max(map(abs, impacts.values()), default=0.0)
    return {name: impact / largest if largest > 0 else 0.0 for name, impact in impacts.items()}


def combine(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    """Two estimates as one: the second on the first's scale, then averaged; post-processing.

    Args:
        first: sensitivities by layer; the result keeps their unit.
        second: of the same layers, in any unit.
    """

    def spread(values: Mapping[str, float]) -> tuple[float, float]:
        center = sum(values.values()) / len(values)
        return center, (sum((v - center) ** 2 for v in values.values()) / len(values)) ** 0.5

    (center, scale), (other_center, other_scale) = spread(first), spread(second)
    ratio = scale / other_scale if other_scale > 0 else 0.0
    return {name: (first[name] + center + ratio * (second[name] - other_center)) / 2 for name in first}
