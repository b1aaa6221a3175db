from __future__ import annotations

import numpy as np
import torch

from dpquant.streams import fresh_root, stream, stream_seed


def test_a_stream_is_a_function_of_its_name() -> None:
    assert stream_seed(1, "noise", 7) == stream_seed(1, "noise", 7)
    first, second = (torch.rand(5, generator=stream(1, "noise", 7)) for _ in range(2))
    assert torch.equal(first, second)


def test_streams_differ_by_root_purpose_and_position() -> None:
    names = [(r, p, *i) for r in (0, 1) for p in ("noise", "sampling") for i in ((), (0,), (1,), (0, 1), (1, 0))]
    seeds = {stream_seed(*name) for name in names}
    assert len(seeds) == len(names)
    assert all(0 <= s < 2**63 for s in seeds)


def test_positions_do_not_run_together() -> None:
    assert stream_seed(0, "noise", 1, 23) != stream_seed(0, "noise", 12, 3)


def test_fresh_roots_differ() -> None:
    assert len({fresh_root() for _ in range(100)}) == 100


def test_a_secret_root_fills_the_generator_and_not_32_bits_of_it() -> None:
    """torch seeds its CPU generator with the low 32 bits of a seed alone."""
    root = fresh_root() | 1 << 255
    generator = stream(root, "noise", 3)
    fewer = torch.Generator().manual_seed(generator.initial_seed())
    assert not torch.equal(torch.rand(4, generator=generator), torch.rand(4, generator=fewer))
    assert torch.equal(
        torch.rand(4, generator=stream(root, "noise", 3)), torch.rand(4, generator=stream(root, "noise", 3))
    )
    draws = [torch.randn(64, generator=stream(root, "noise", step)) for step in range(200)]
    assert torch.stack(draws).std() < 1.05
    assert torch.corrcoef(torch.stack(draws)).triu(1).abs().max() < 0.8


def test_the_state_is_a_mersenne_twisters_by_numpys_hand() -> None:
    """The words lie where torch reads them: its numbers are those of NumPy's generator with the same state."""
    generator = stream(1 << 255, "noise", 0)
    words = generator.get_state().numpy()[24 : 24 + 8 * 624].view("<u8").astype(np.uint32)
    twister = np.random.MT19937()
    twister.state = {"bit_generator": "MT19937", "state": {"key": words, "pos": 624}}
    expected = (twister.random_raw(2000) & 0xFFFFFF) / 2**24  # a float32 of torch.rand is 24 bits of a word
    assert np.array_equal(torch.rand(2000, generator=generator).numpy(), expected.astype(np.float32))


def test_streams_of_a_seed_are_torchs_own() -> None:
    """What was trained with a seed is trained so again."""
    root = stream_seed(0, "root")
    assert root.bit_length() <= 63
    own = torch.Generator().manual_seed(stream_seed(root, "sampling", 5))
    assert torch.equal(torch.rand(8, generator=stream(root, "sampling", 5)), torch.rand(8, generator=own))
