"""Fitting board power to measured watts: idle, energies and the cap, by least absolute relative error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from emulation.errors import InputError
from hwmodels.calibration import Fitted, KernelPower, PowerCalibration
from hwmodels.fit import errors
from hwmodels.gemm_arrays import Array

FEWEST_ROWS = 8
HBM_JOULES_PER_BYTE = 31.4e-12
"""The least that a byte is taken to cost: 3.9 pJ per bit of HBM2 (O'Connor et al., MICRO 2017), the board aside."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PowerRows:
    """Measured power of one kernel, each [rows].

    Attributes:
        kernel: a key of ``KERNELS``.
        flops, moved: operations and bytes of a product.
        seconds, watts: of a product, measured while it was repeated.
        predicted_s: of the same product by the kernel's calibration, of short runs on a cool board.
        fixed_s: of the kernel: a launch, in which it does not run yet.
    """

    kernel: str
    flops: Array
    moved: Array
    seconds: Array
    predicted_s: Array
    watts: Array
    fixed_s: float


def fit_power(rows: Sequence[PowerRows], *, limit_w: float, floor_w: float, source: str) -> PowerCalibration:
    """Power constants fitted to all rows, with the error that a fit to half of them has on the others.

    Args:
        rows: measurements, one entry per kernel.
        limit_w: of the board.
        floor_w: least power seen under load; idle power is sought from 0.9 to 1.6 times that.
        source: where the measurements are from.

    Raises:
        InputError: too few measurements.
    """
    if sum(len(part.watts) for part in rows) < FEWEST_ROWS:
        raise InputError("too few power measurements to fit", hint=f"{FEWEST_ROWS} at least")
    random = np.random.default_rng(0)
    sides = [random.permutation(len(part.watts)) % 2 == 0 for part in rows]
    predicted, measured = [], []
    for kept in (sides, [~side for side in sides]):
        found = _fit([_where(part, side) for part, side in zip(rows, kept, strict=True)], limit_w, floor_w)
        for index, (part, side) in enumerate(zip(rows, kept, strict=True)):
            apart = _where(part, ~side)
            predicted.append(np.minimum(_asked(apart, apart.seconds, found, index), found[1] * limit_w))
            measured.append(apart.watts)
    off = errors(np.concatenate(predicted), np.concatenate(measured))
    constants = [float(f"{value:.4g}") for value in _fit(rows, limit_w, floor_w)]
    return PowerCalibration(
        idle_w=constants[0],
        saturation=constants[1],
        throttle=constants[2],
        kernels={
            part.kernel: KernelPower(**dict(zip(_OF_KERNEL, constants[_first(index) : _first(index + 1)], strict=True)))
            for index, part in enumerate(rows)
        },
        fitted=Fitted(
            source=source,
            rows=sum(len(part.watts) for part in rows),
            held_out_mape_percent=round(off.mape_percent, 2),
            held_out_median_percent=round(off.median_percent, 2),
            held_out_rank_correlation=round(off.rank_correlation, 4),
        ),
    )


_OF_KERNEL = ("active_w", "joules_per_byte", "joules_per_flop")


def _first(index: int) -> int:
    """Where a kernel's constants start, behind those of the board."""
    return 3 + len(_OF_KERNEL) * index


def _where(part: PowerRows, chosen: NDArray[np.bool_]) -> PowerRows:
    arrays = {f.name: getattr(part, f.name)[chosen] for f in fields(part) if f.type == "Array"}
    return replace(part, **arrays)


def _asked(part: PowerRows, seconds: Array, constants: Array, index: int) -> Array:
    """Watts that the work asks for."""
    active, per_byte, per_flop = constants[_first(index) : _first(index + 1)]
    running = np.maximum(seconds - part.fixed_s, 0.0)
    dynamic = active * running + per_byte * part.moved + per_flop * part.flops
    return np.asarray(constants[0] + dynamic / seconds)


def _off(part: PowerRows, constants: Array, index: int, limit_w: float) -> Array:
    """How far off each row is: power at the measured time and, at half the weight, energy at the predicted time."""
    cap, throttle = constants[1] * limit_w, constants[2]
    watts = np.minimum(_asked(part, part.seconds, constants, index), cap)
    asked = _asked(part, part.predicted_s, constants, index)
    joules = np.minimum(asked, cap) * part.predicted_s * np.maximum(asked / cap, 1.0) ** throttle
    power, energy = watts / part.watts, joules / (part.watts * part.seconds)
    return np.asarray(np.abs(power - 1.0) + 0.5 * np.abs(energy - 1.0))


def _fit(rows: Sequence[PowerRows], limit_w: float, floor_w: float) -> Array:
    """Idle watts, saturation, throttle, and the constants of each kernel, by least absolute relative error."""
    from scipy.optimize import differential_evolution

    bounds, usual = [(0.9 * floor_w, 1.6 * floor_w), (0.92, 1.02), (0.0, 1.0)], []
    for part in rows:
        # what an operation would take if the fastest product drew the limit: rows at the cap say no more than
        # "at least", so that energies are held, weakly, to that
        usual.append((limit_w - floor_w) / (part.flops / part.seconds).max())
        bounds += [
            (0.0, 1.5 * floor_w),
            (HBM_JOULES_PER_BYTE, 5 * HBM_JOULES_PER_BYTE),
            (0.1 * usual[-1], 3 * usual[-1]),
        ]
    count = sum(len(part.watts) for part in rows)

    def loss(x: Array) -> float:
        off = sum(float(_off(part, x, index, limit_w).sum()) for index, part in enumerate(rows)) / count
        per_flop = [x[_first(index) + 2] / held for index, held in enumerate(usual)]
        return off + 0.002 * float(np.square(np.log(per_flop)).mean())

    found = differential_evolution(loss, bounds, seed=0, maxiter=150, popsize=8, tol=1e-7, polish=False)
    return np.asarray(found.x)
