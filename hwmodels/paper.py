"""DPQuant's own speed model, line by line, so that its figures can be derived and set beside this project's.

T = T_analysis + (1 - p + p / r) (T_train - T_overhead) + T_overhead, with p the fraction of layers quantized and r the
rate of FP4 over FP16, taken as 4 (arXiv 2509.03472, as summarised). It treats a fraction of the layers as that fraction
of the time, all of it bound by compute, and quantization itself as free.
"""

from __future__ import annotations

from dataclasses import dataclass

from emulation.errors import InputError
from hwmodels.cost import StepModel
from hwmodels.step import PHASES

PUBLISHED_FRACTION, PUBLISHED = 0.9, (2.21, 1.75)
"""The share of layers and the speedups that the formula was published with."""
PRODUCT_PHASES = ("forward", "grad_input", "weight_gradient", "second_backward")
"""What the formula speeds up; every other phase is its T_overhead."""


@dataclass(frozen=True, kw_only=True)
class PaperEstimate:
    """The formula's terms, in units of T_train or in seconds, and the speedup they come to.

    Attributes:
        fraction: p.
        rate_ratio: r.
        train: T_train.
        overhead: T_overhead.
        analysis: T_analysis.
        total: T.
        speedup: T_train / T.
    """

    fraction: float
    rate_ratio: float
    train: float
    overhead: float
    analysis: float
    total: float
    speedup: float

    def lines(self) -> list[tuple[str, float]]:
        """The derivation, one term to a line."""
        p, r = self.fraction, self.rate_ratio
        factor = 1 - p + p / r
        return [
            ("p, fraction of layers quantized", p),
            ("r, rate of FP4 over FP16", r),
            ("1 - p + p / r", factor),
            ("T_train", self.train),
            ("T_overhead", self.overhead),
            ("(1 - p + p / r) (T_train - T_overhead)", factor * (self.train - self.overhead)),
            ("T_analysis", self.analysis),
            ("T = T_analysis + (1 - p + p / r) (T_train - T_overhead) + T_overhead", self.total),
            ("speedup = T_train / T", self.speedup),
        ]


def paper_estimate(
    fraction: float, overhead: float, analysis: float = 0.0, *, train: float = 1.0, rate_ratio: float = 4.0
) -> PaperEstimate:
    """Evaluate the formula.

    Args:
        fraction: of the layers quantized, 0 to 1.
        overhead: T_overhead, in the unit of ``train``, at most all of it.
        analysis: T_analysis, in the unit of ``train``.
        train: T_train.
        rate_ratio: how many times faster the low-precision products are.
    """
    if not 0 <= fraction <= 1:
        raise InputError(f"fraction={fraction} must be between 0 and 1")
    if not (train > 0 and 0 <= overhead <= train and analysis >= 0 and rate_ratio > 0):
        raise InputError(
            f"train={train}, overhead={overhead}, analysis={analysis}, rate_ratio={rate_ratio} make no sense",
            hint="train and rate_ratio above 0, overhead from 0 to train, analysis from 0",
        )
    total = analysis + (1 - fraction + fraction / rate_ratio) * (train - overhead) + overhead
    return PaperEstimate(
        fraction=fraction,
        rate_ratio=rate_ratio,
        train=train,
        overhead=overhead,
        analysis=analysis,
        total=total,
        speedup=train / total,
    )


def implied_overhead(speedup: float, fraction: float, *, rate_ratio: float = 4.0) -> float:
    """The share of T_train that overhead and analysis together must take for the formula to give a speedup.

    The analysis counts as part of the overhead: (1 - p + p / r) (1 - x) + x = 1 / speedup.
    """
    ideal = paper_estimate(fraction, 0.0, rate_ratio=rate_ratio).speedup
    if not 1 <= speedup <= ideal or ideal == 1:
        raise InputError(f"speedup={speedup} is not from 1 to the ideal {ideal:.3f}")
    return (1 / speedup - 1 / ideal) / (1 - 1 / ideal)


def paper_step(
    model: StepModel, fraction: float, *, analysis_s_per_step: float = 0.0, rate_ratio: float = 4.0
) -> PaperEstimate:
    """The formula on this project's own account of a step: T_train and T_overhead in seconds of its phases."""
    phases = dict(zip(PHASES, model.prices(None).seconds.sum(1).tolist(), strict=True))
    train = model.step_s({})
    return paper_estimate(
        fraction,
        train - sum(phases[phase] for phase in PRODUCT_PHASES),
        analysis_s_per_step,
        train=train,
        rate_ratio=rate_ratio,
    )
