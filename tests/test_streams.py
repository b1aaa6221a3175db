from __future__ import annotations

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
