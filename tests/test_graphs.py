from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from dpquant.captures import Tape
from dpquant.clipping import PrivateOptimizer, private_criterion, private_module
from dpquant.graphs import GraphedBackward
from dpquant.models import build_model
from emulation.errors import InputError
from emulation.layers import quantizable_layers, quantize_model, set_plan, set_rounding

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")]),
]
CLASSES = 10


class Run:
    """A network, its optimizer and its graphed backward; the plan quantizes every layer, or none."""

    def __init__(self, device: str, preset: str | None, **options: float) -> None:
        torch.manual_seed(0)
        self.module = private_module(quantize_model(build_model("digits_cnn", num_classes=CLASSES), preset or "fp8"))
        self.module.to(device).train()
        self.preset = preset
        self.quantize(preset is not None)
        self.optimizer = PrivateOptimizer(
            torch.optim.SGD(self.module.parameters(), lr=0.1),
            module=self.module,
            noise_multiplier=options.get("noise_multiplier", 0.0),
            max_grad_norm=options.get("max_grad_norm", 0.5),
            expected_batch_size=32,
        )
        self.criterion = private_criterion(nn.CrossEntropyLoss())
        self.graphed = GraphedBackward(self.module, self.criterion, self.optimizer, 32)

    def quantize(self, on: bool) -> None:
        set_plan(self.module, dict.fromkeys(quantizable_layers(self.module), self.preset) if on else {})

    def clipped_sums(self, x: Tensor, y: Tensor, *, step: int, graphed: bool) -> list[Tensor]:
        set_rounding(self.module, seed=5, step=step, example_ids=torch.arange(100, 100 + len(x)))
        self.optimizer.zero_grad()
        if graphed:
            outputs, loss = self.graphed(x, y)
            assert outputs.shape == (len(x), CLASSES)
            assert loss.shape == ()
        else:
            self.criterion(self.module(x), y).backward()  # type: ignore[no-untyped-call]
        self.optimizer.clip_and_accumulate()
        sums = [p.summed_grad.clone() for p in self.optimizer.params]
        self.optimizer.zero_grad()
        return sums


def examples(count: int, device: str, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, 8, 8, generator=generator)
    return x.to(device), torch.randint(CLASSES, (count,), generator=generator).to(device)


def difference(wanted: list[Tensor], found: list[Tensor]) -> float:
    """Relative, in the 2-norm."""
    a, b = (torch.cat([t.flatten() for t in each]) for each in (wanted, found))
    return float((a - b).norm() / a.norm())


@pytest.fixture(autouse=True)
def full_float32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("preset", [None, "luq_fp4", "fp8", "mxfp4", "nvfp4"])
def test_clipped_sums_are_those_of_the_usual_step(device: str, preset: str | None) -> None:
    run = Run(device, preset)
    for step, count in enumerate((29, 17, 31, 3, 18)):  # sizes repeat: first use, capture, replay
        x, y = examples(count, device, seed=step)
        usual = run.clipped_sums(x, y, step=step, graphed=False)
        graphed = run.clipped_sums(x, y, step=step, graphed=True)
        # other batch sizes round sums otherwise, and a number next to a tie is then quantized to its neighbour
        assert difference(usual, graphed) < (1e-5 if preset is None else 0.02)
    assert not run.graphed._refused


@pytest.mark.parametrize("device", DEVICES)
def test_rounding_bits_differ_between_steps_and_follow_the_examples(device: str) -> None:
    run = Run(device, "luq_fp4")
    x, y = examples(20, device)
    sums = [run.clipped_sums(x, y, step=step, graphed=True) for step in (0, 1, 0, 1)]
    assert difference(sums[0], sums[2]) < 1e-4
    assert difference(sums[1], sums[3]) < 1e-4
    assert difference(sums[0], sums[1]) > 0.02


@pytest.mark.parametrize("device", DEVICES)
def test_what_fills_a_batch_up_adds_exactly_nothing(device: str) -> None:
    run = Run(device, None)
    x, y = examples(1, device)
    alone = run.clipped_sums(x, y, step=0, graphed=True)  # 1 example and 15 repetitions
    bound = run.optimizer.max_grad_norm
    norm = torch.cat([s.flatten() for s in alone]).norm()
    assert norm <= bound * (1 + 1e-5)
    assert norm > 0.5 * bound


@pytest.mark.parametrize("device", DEVICES)
def test_an_example_that_is_not_finite_is_dropped_and_counted(device: str) -> None:
    run = Run(device, "luq_fp4")
    x, y = examples(20, device)
    for step in range(3):
        run.clipped_sums(x, y, step=step, graphed=True)
    for bad in (0, 7):  # the first one also fills the batch up
        broken = x.clone()
        broken[bad] = float("nan")
        usual = run.clipped_sums(broken, y, step=9, graphed=False)
        before = run.optimizer.nonfinite_examples
        graphed = run.clipped_sums(broken, y, step=9, graphed=True)
        assert run.optimizer.nonfinite_examples == before + 1
        assert difference(usual, graphed) < 0.02
    after = run.clipped_sums(x, y, step=2, graphed=True)
    assert all(torch.isfinite(s).all() for s in after)


@pytest.mark.parametrize("device", DEVICES)
def test_a_new_plan_is_followed_at_once(device: str) -> None:
    run = Run(device, "luq_fp4")
    x, y = examples(32, device)
    for _ in range(2):
        for on in (True, False):
            run.quantize(on)
            for _ in range(3):
                usual = run.clipped_sums(x, y, step=0, graphed=False)
                graphed = run.clipped_sums(x, y, step=0, graphed=True)
                assert difference(usual, graphed) < 0.02


@pytest.mark.parametrize("device", DEVICES)
def test_parts_of_a_large_batch_add_up(device: str) -> None:
    run = Run(device, None)
    x, y = examples(48, device)
    whole = run.clipped_sums(x, y, step=0, graphed=False)
    for _ in range(3):
        run.optimizer.zero_grad()
        for part in (slice(0, 32), slice(32, 48)):
            run.graphed(x[part], y[part])
            run.optimizer.clip_and_accumulate()
        for p, a in zip(run.optimizer.params, whole, strict=True):
            torch.testing.assert_close(p.summed_grad, a, rtol=1e-4, atol=1e-5)
        run.optimizer._is_last_step_skipped = False


@pytest.mark.parametrize(
    ("expected", "most"), [(1, None), (32, None), (256, None), (2048, None), (2048, 512), (100, 7)]
)
def test_few_sizes_that_hold_every_batch(expected: int, most: int | None) -> None:
    run = Run("cpu", None)
    graphed = GraphedBackward(run.module, run.criterion, run.optimizer, expected, most)
    deviation = expected**0.5
    usual = range(max(1, int(expected - 2 * deviation)), int(expected + 2 * deviation) + 1)
    counts = range(1, most + 1) if most is not None else usual
    sizes = {count: graphed._size(count) for count in counts}
    assert all(size >= count for count, size in sizes.items())
    if most is None:
        assert len(set(sizes.values())) <= 3
        assert sizes[expected] - expected <= max(16, 2 * deviation)
    else:
        assert sizes[most] == most
        assert max(sizes.values()) == most


def test_an_empty_batch_and_secret_bits_run_as_usual() -> None:
    run = Run("cpu", "luq_fp4", noise_multiplier=1.0)
    x, y = examples(0, "cpu")
    run.graphed(x, y)
    run.optimizer.step()  # noise alone
    set_rounding(run.module, seed=None)
    run.optimizer.zero_grad()
    run.graphed(*examples(5, "cpu"))
    tape = run.module.private_tape
    assert isinstance(tape, Tape)
    assert tape.contributions  # left by the usual backward
    run.optimizer.step()


def test_a_second_forward_before_the_step_is_refused() -> None:
    run = Run("cpu", None)
    x, y = examples(16, "cpu")
    run.graphed(x, y)
    with pytest.raises(InputError, match="second forward"):
        run.module(x)


def test_a_module_without_a_tape_is_refused() -> None:
    run = Run("cpu", None)
    with pytest.raises(InputError, match="no tape"):
        GraphedBackward(nn.Linear(2, 2), run.criterion, run.optimizer, 8)


class Looks(nn.Module):
    """Looks at its data on the host: cannot be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        doubled: Tensor = self.linear(x) * (2.0 if x.sum().item() > 0 else 1.0)
        return doubled


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_what_cannot_be_captured_runs_as_usual_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    module = private_module(quantize_model(Looks())).cuda().train()
    optimizer = PrivateOptimizer(
        torch.optim.SGD(module.parameters(), lr=0.1),
        module=module,
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        expected_batch_size=16,
    )
    criterion = private_criterion(nn.CrossEntropyLoss())
    graphed = GraphedBackward(module, criterion, optimizer, 16)
    x, y = torch.randn(16, 4, device="cuda"), torch.randint(CLASSES, (16,), device="cuda")
    torch.cuda.manual_seed(3)
    first, second = torch.rand(8, device="cuda"), torch.rand(8, device="cuda")
    torch.cuda.manual_seed(3)
    assert torch.equal(torch.rand(8, device="cuda"), first)
    with caplog.at_level(logging.WARNING, "dpquant"):
        for _ in range(3):
            optimizer.zero_grad()
            graphed(x, y)
            optimizer.step()
    assert "without CUDA graphs" in caplog.text
    assert torch.equal(torch.rand(8, device="cuda"), second)  # the failed capture has let go of dropout's generator
    assert all(torch.isfinite(p).all() for p in module.parameters())
