"""The four parts of a private loop: their backward is the usual calls', their batches are the budget's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dpquant.budget import planned_budget
from dpquant.distributed import ALONE
from dpquant.private_parts import PrivateParts, check_parameters, private_parts
from dpquant.public_numbers import PublicNumbers
from dpquant.sensitivity import AnalysisSettings
from dpquant.streams import stream
from emulation.errors import InputError
from emulation.layers import quantize_model

X, Y = torch.randn(60, 5, generator=torch.Generator().manual_seed(2)), torch.arange(60) % 3


def parts(seen: list[Any] | None = None, root: int = 7, **changes: Any) -> PrivateParts:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = quantize_model(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)))
    numbers = PublicNumbers(sample_rate=0.2, expected_batch_size=12, epochs=1, dataset_size=60)
    analysis = AnalysisSettings(expected_batch_size=10)
    seen = [] if seen is None else seen
    given: dict[str, Any] = {
        "module": module,
        "optimizer": torch.optim.SGD(module.parameters(), lr=1.0),
        "criterion": nn.CrossEntropyLoss(),
        "data_loader": DataLoader(TensorDataset(X, Y), batch_size=12),
        "budget": planned_budget(
            numbers, analysis, 0, noise_multiplier=0.0, target_epsilon=None, target_delta=1e-3, accountant="rdp"
        ),
        "sampling": lambda step: stream(root, "sampling", step),
        "steps": lambda: range(4),
        "inside": seen.append,
        "max_grad_norm": 0.5,
        "clipping": "bookkeeping",
        "max_physical_batch_size": None,
        "cuda_graphs": True,
        "before_noise": torch.Generator,
        "on_batch": lambda ids: seen.append(ids.tolist()),
        "processes": ALONE,
    }
    return private_parts(**(given | changes))


def moved(found: PrivateParts, batch: list[Tensor], usual: bool) -> Tensor:
    found.module.eval()
    with torch.no_grad():
        expected = float(found.losses(found.module, batch).mean())
    before = nn.utils.parameters_to_vector(found.module.parameters()).detach().clone()
    found.optimizer.zero_grad()
    found.module.train()
    if usual:
        found.criterion(found.module(batch[0]), batch[1]).backward()
    else:
        outputs, loss = found.backward(*batch)
        assert not outputs.requires_grad
        assert not loss.requires_grad
        assert float(loss) == pytest.approx(expected)
    found.optimizer.step()
    return nn.utils.parameters_to_vector(found.module.parameters()).detach() - before


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # Opacus's hook on the first layer
@pytest.mark.parametrize("clipping", ["bookkeeping", "hooks"])
def test_backward_is_what_the_usual_calls_do(clipping: str) -> None:
    batch = [X[:12], Y[:12]]
    found, other = parts(clipping=clipping), parts()
    assert found.graphed is None
    assert torch.allclose(moved(found, batch, usual=False), moved(other, batch, usual=True), atol=1e-6)


def test_batches_are_told_to_whoever_keys_them_and_their_beginning_and_end() -> None:
    seen: list[Any] = []
    batches = list(parts(seen).loader)
    assert len(batches) == 4
    assert seen[0] is True
    assert seen[-1] is False
    for ids, (x, y) in zip(seen[1:-1], batches, strict=True):
        assert torch.equal(x, X[ids])
        assert torch.equal(y, Y[ids])
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, parts().loader, strict=True))
    assert [len(x) for x, _ in parts(root=8).loader] != [len(x) for x, _ in batches]


def test_only_float32_and_float64_are_trained() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].to(torch.bfloat16)
    with pytest.raises(InputError, match=r"parameter '1\.weight' is torch\.bfloat16"):
        check_parameters(module)
    module[1].requires_grad_(False)
    check_parameters(module)
    check_parameters(nn.Linear(2, 2).double())
