from __future__ import annotations

import math

import pytest
import torch

from emulation.compare import DISTRIBUTIONS, rank_formats, sample_data
from emulation.errors import InputError
from emulation.formats import FORMATS, NumberFormat
from emulation.quantizer import Quantizer


def test_all_formats_are_ranked_best_first() -> None:
    ranked = rank_formats(sample_data("normal", 20_000))
    assert {e.format for e in ranked} == set(FORMATS) - {"float8_e8m0fnu"}
    ratios = [e.sqnr_db for e in ranked]
    assert ratios == sorted(ratios, reverse=True)
    assert (ranked[0].format, ranked[0].sqnr_db) == ("float32", math.inf)
    order = [e.format for e in ranked]
    assert order.index("nvfp4") < order.index("mxfp4_e2m1") < order.index("float4_e2m1fn")
    by_name = {e.format: e for e in ranked}
    assert by_name["luq_fp4"].sqnr_db == by_name["float4_e3m0"].sqnr_db


def test_ratio_and_shares_are_those_of_the_definition() -> None:
    x = torch.tensor([[0.0, 0.1, 1.0, 2.2, 6.0, 8.0]])
    (error,) = rank_formats(x, ["mxfp4"])
    q = Quantizer("mxfp4").fake_quantize(x)
    assert q.tolist() == [[0, 0, 1, 2, 6, 8]]
    assert error.overflow_share == 0
    assert error.underflow_share == pytest.approx(1 / 6)
    noise = 0.1**2 + 0.2**2
    assert error.sqnr_db == pytest.approx(10 * math.log10(float((x**2).sum()) / noise), rel=1e-5)
    (over,) = rank_formats(torch.tensor([[7.9, 1.0]]), ["mxfp4"])
    assert over.overflow_share == 0.5
    (cast,) = rank_formats(torch.tensor([[1e6, 1e-9, 1.0, 2.0]]), ["fp16"])
    assert (cast.sqnr_db, cast.overflow_share, cast.underflow_share) == (-math.inf, 0.25, 0.25)


def test_ranking_takes_any_shape_and_format_object() -> None:
    fmt = NumberFormat(name="float5_e3m1", exponent_bits=3, mantissa_bits=1)
    for x in (torch.randn(50), torch.randn(3, 4, 10), torch.tensor(2.0, dtype=torch.float64)):
        assert rank_formats(x, [fmt, "fp4"], granularity="example")[0].sqnr_db > 5


@pytest.mark.parametrize("bad", [[], [1.0, math.nan], [math.inf]])
def test_data_without_finite_numbers_is_refused(bad: list[float]) -> None:
    with pytest.raises(InputError):
        rank_formats(torch.tensor(bad))


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_samples_have_the_moments_of_their_distribution(name: str) -> None:
    x = sample_data(name, 200_000).double()
    assert x.shape == (200, 1000)
    assert torch.equal(x, sample_data(name, 200_000).double())
    mean, variance = {"normal": (0, 1), "lognormal": (math.exp(0.5), (math.e - 1) * math.e), "laplace": (0, 2)}[name]
    assert abs(x.mean() - mean) < 5 * math.sqrt(variance / 200_000)
    assert abs(x.var() / variance - 1) < 0.2


def test_unknown_samples_are_refused() -> None:
    with pytest.raises(InputError, match="unknown distribution") as caught:
        sample_data("norml")
    assert "'normal'" in (caught.value.hint or "")
    with pytest.raises(InputError, match="count=1500"):
        sample_data("normal", 1500)
