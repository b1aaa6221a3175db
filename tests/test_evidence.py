"""What a run has released of its layers' sensitivities, kept over analyses, steps and stops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpquant.distributed import ALONE
from dpquant.evidence import Evidence
from dpquant.sensitivity import AnalysisSettings, Estimator, layer_policies
from emulation.layers import quantizable_layers, quantize_model

X, Y = torch.randn(40, 6, generator=torch.Generator().manual_seed(1)), torch.arange(40) % 3


def evidence(estimator: Estimator = "probe") -> tuple[Evidence, nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = quantize_model(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)))
    policies = layer_policies(tuple(quantizable_layers(module)), ["luq_fp4"])
    settings = AnalysisSettings(estimator=estimator, noise_multiplier=0.0, expected_batch_size=40, decay=0.25)
    return Evidence(settings, policies, module, noise_std=0.0, expected_batch_size=40), module


def probe(known: Evidence) -> dict[str, float]:
    def losses(module: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1], reduction="none")

    known.probe(
        losses,
        torch.arange(40),
        lambda part: (X[part], Y[part]),
        torch.Generator().manual_seed(0),
        max_grad_norm=1.0,
        max_physical_batch_size=16,
        processes=ALONE,
    )
    assert known.probed is not None
    return dict(known.probed)


def release(known: Evidence, module: nn.Module, scale: float) -> None:
    for p in module.parameters():
        p.grad = torch.full_like(p, scale)
    known.observe()


def test_probes_are_averaged_over_analyses() -> None:
    known, module = evidence()
    assert known.sensitivities() is None
    first = probe(known)
    assert first.keys() == quantizable_layers(module).keys()
    assert known.sensitivities() == first
    with torch.no_grad():
        module[0].weight *= 3  # type: ignore[index,operator]
    second = probe(known)
    fresh, other = evidence()
    other.load_state_dict(module.state_dict())
    now = probe(fresh)
    assert second == pytest.approx({name: 0.25 * first[name] + 0.75 * now[name] for name in first})


@pytest.mark.parametrize("estimator", ["probe", "released", "both"])
def test_each_estimator_uses_what_it_says(estimator: Estimator) -> None:
    known, module = evidence(estimator)
    release(known, module, 0.1)
    assert known.sensitivities() is None  # the noise of one release cannot be told from what it adds to
    release(known, module, 0.2)
    free = known.sensitivities()
    assert (free is None) == (estimator == "probe")
    probed = probe(known)
    found = known.sensitivities()
    assert found is not None
    assert (found == probed) == (estimator == "probe")
    assert found != free


def test_a_checkpoint_holds_all_of_it() -> None:
    known, module = evidence("both")
    probe(known)
    release(known, module, 0.1)
    release(known, module, 0.3)
    resumed, same = evidence("both")
    resumed.load_state(known.state())
    assert resumed.sensitivities() == known.sensitivities()
    for one, parameters in ((known, module), (resumed, same)):
        release(one, parameters, 0.2)
    assert resumed.sensitivities() == known.sensitivities()
    resumed.load_state(evidence("both")[0].state())
    assert resumed.probed is None
    assert resumed.moments is None
