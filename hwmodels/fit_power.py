"""Fitting board power to measured watts: idle, energies and the cap, by least absolute relative error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from emulation.errors import InputError
from hwmodels.calibration import Fitted, PowerCalibration
from hwmodels.fit import errors
from hwmodels.gemm_arrays import Array

FEWEST_ROWS = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class PowerRows:
    """Measured power of one kernel: operations, bytes moved, seconds and board watts, each [rows]."""

    kernel: str
    flops: Array
    moved: Array
    seconds: Array
    watts: Array


def fit_power(rows: Sequence[PowerRows], *, limit_w: float, floor_w: float, source: str) -> PowerCalibration:
    """Power constants fitted to all rows, with the error that a fit to half of them has on the others.

    Args:
        rows: measurements, one entry or more per kernel.
        limit_w: of the board.
        floor_w: least power seen under load; idle power is sought from 0.9 to 1.6 times that.
        source: where the measurements are from.

    Raises:
        InputError: too few measurements.
    """
    if sum(len(part.watts) for part in rows) < FEWEST_ROWS:
        raise InputError("too few power measurements to fit", hint=f"{FEWEST_ROWS} at least")
    kernels = tuple(dict.fromkeys(part.kernel for part in rows))
    everything = _table(rows, kernels)
    side = np.random.default_rng(0).permutation(len(everything)) % 2 == 0
    predicted, measured = [], []
    for trained in (side, ~side):
        found = _fit(everything[trained], kernels, limit_w, floor_w)
        predicted.append(_watts(everything[~trained], found, limit_w))
        measured.append(everything[~trained, -1])
    apart = errors(np.concatenate(predicted), np.concatenate(measured))
    idle, per_byte, saturation, *per_flop = (
        float(f"{value:.4g}") for value in _fit(everything, kernels, limit_w, floor_w)
    )
    return PowerCalibration(
        idle_w=idle,
        joules_per_byte=per_byte,
        joules_per_flop=dict(zip(kernels, per_flop, strict=True)),
        saturation=saturation,
        fitted=Fitted(
            source=source,
            rows=len(everything),
            held_out_mape_percent=round(apart.mape_percent, 2),
            held_out_median_percent=round(apart.median_percent, 2),
            held_out_rank_correlation=round(apart.rank_correlation, 4),
        ),
    )


def _table(rows: Sequence[PowerRows], kernels: Sequence[str]) -> Array:
    """Columns: bytes per second, FLOPs per second of each kernel, and watts."""
    parts = []
    for part in rows:
        table = np.zeros((len(part.watts), len(kernels) + 2))
        table[:, 0] = part.moved / part.seconds
        table[:, 1 + kernels.index(part.kernel)] = part.flops / part.seconds
        table[:, -1] = part.watts
        parts.append(table)
    return np.concatenate(parts)


def _watts(table: Array, constants: Array, limit_w: float) -> Array:
    idle, per_byte, saturation = constants[:3]
    demand = idle + per_byte * table[:, 0] + table[:, 1:-1] @ constants[3:]
    return np.asarray(np.minimum(saturation * limit_w, demand))


def _fit(table: Array, kernels: Sequence[str], limit_w: float, floor_w: float) -> Array:
    """Idle watts, joules per byte, saturation and joules per FLOP of each kernel."""
    from scipy.optimize import minimize

    # what an operation would take if the fastest product seen drew the limit: rows at the cap say no more than
    # "at least", so that energies are held, weakly, to that
    fastest = table[:, 1:-1].max(axis=0)
    usual = np.concatenate(
        [[floor_w, 0.3 * (limit_w - floor_w) / table[:, 0].max(), 0.98], (limit_w - floor_w) / fastest]
    )
    low = np.array([0.9, 0.05, 0.92] + [0.1] * len(kernels))
    high = np.array([1.6, 5.0, 1.02] + [3.0] * len(kernels))

    def loss(x: Array) -> float:
        inside = np.clip(x, low, high)
        off = np.abs(_watts(table, inside * usual, limit_w) / table[:, -1] - 1.0).mean()
        return float(off + 0.3 * np.abs(x - inside).sum() + 0.002 * np.square(np.log(inside[3:])).mean())

    best = None
    for start in (0.6, 1.0, 1.8):
        x0 = np.concatenate([[1.05, 1.0, 1.0], np.full(len(kernels), start)])
        found = minimize(loss, x0, method="Nelder-Mead", options={"maxfev": 4000, "xatol": 1e-4, "fatol": 1e-6})
        if best is None or found.fun < best.fun:
            best = found
    assert best is not None
    return np.asarray(np.clip(best.x, low, high) * usual)
