from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emulation.errors import InputError
from emulation.random_bits import chained_key, derive_keys, hash_bits, index_products, key_from

CPU = torch.device("cpu")


def splitmix(z: int) -> int:
    mask = 2**64 - 1
    z = (z + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def lowbias(index: int, key: int) -> int:
    mask, key = 2**32 - 1, splitmix(key)
    h = (index * 0x9E3779B9 + key) & mask
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & mask
    h ^= (key >> 32) & mask
    h = ((h ^ (h >> 15)) * 0x846CA68B) & mask
    return h ^ (h >> 16)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63, 2**64 - 1, 123456789])
def test_keys_are_chained_splitmix(seed: int) -> None:
    expected = splitmix((splitmix((splitmix(seed % 2**64) + 5) % 2**64) - 7) % 2**64)
    assert derive_keys(seed, 5, -7).item() % 2**64 == expected


def test_keys_of_a_tensor_of_ids_are_those_of_each() -> None:
    ids = torch.tensor([3, 0, 2**40, 3])
    keys = derive_keys(9, 1, ids, 4)
    assert keys.tolist() == [derive_keys(9, 1, int(i), 4).item() for i in ids]
    assert keys[0] == keys[3]
    assert derive_keys(9, 1, 2) != derive_keys(9, 2, 1)
    assert derive_keys(1, ids.to(torch.int32) % 7).dtype == torch.int64


def test_keys_of_floats_are_refused() -> None:
    with pytest.raises(InputError, match="key label"):
        derive_keys(1, torch.tensor([1.0]))


@pytest.mark.parametrize("key", [0, 1, -1, 2**62 + 12345, -(2**63)])
@pytest.mark.parametrize("offset", [0, 1000, 2**31, 2**33 + 5])
def test_bits_are_lowbias_of_key_and_index(key: int, offset: int) -> None:
    bits = hash_bits(index_products(50, CPU), torch.tensor(key), offset)
    assert (bits.numpy().view(np.uint32)).tolist() == [lowbias(i + offset, key % 2**64) for i in range(50)]


@pytest.mark.parametrize("keys", [torch.arange(4), derive_keys(1, torch.arange(4)), torch.arange(4) << 32])
def test_bits_are_uniform_and_independent(keys: torch.Tensor) -> None:
    count = 1 << 16
    bits = hash_bits(index_products(count, CPU), keys.view(-1, 1)).numpy().view(np.uint32)
    for shift in (0, 8, 16, 24):
        for row in bits:
            counts = np.bincount((row >> shift) & 255, minlength=256)
            chi2 = ((counts - count / 256) ** 2 / (count / 256)).sum()
            assert 255 - 5 * 22.6 < chi2 < 255 + 5 * 22.6
    uniform = bits / 2.0**32 - 0.5
    spread = 1 / 12 / np.sqrt(count)
    for a in range(4):
        for lag in (1, 2, 640):
            assert abs((uniform[a][lag:] * uniform[a][:-lag]).mean()) < 5 * spread
        for b in range(a):
            assert abs((uniform[a] * uniform[b]).mean()) < 5 * spread


def test_a_generators_key_is_reproducible_and_advances() -> None:
    first, again = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    a, b = key_from(first, CPU), key_from(first, CPU)
    assert a != b
    assert key_from(again, CPU) == a
    assert (a.dtype, a.shape) == (torch.int64, ())


@given(st.integers(-(2**70), 2**70), st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4))
def test_numbers_and_tensors_of_numbers_give_the_same_keys(seed: int, labels: list[int]) -> None:
    tensors = [torch.tensor([label]) for label in labels]
    for split in range(len(labels) + 1):
        mixed = [*labels[:split], *tensors[split:]]
        assert derive_keys(seed, *mixed).reshape(-1).tolist() == derive_keys(seed, *labels).reshape(-1).tolist()
    whole = derive_keys(seed, torch.tensor(0), *labels)  # mixed as tensors from the start
    assert whole.tolist() == derive_keys(seed, 0, *labels).tolist()


@given(st.integers(-(2**70), 2**70), st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**62))
def test_a_chained_key_stands_for_its_labels(seed: int, label: int, last: int) -> None:
    chained = chained_key(seed, label)
    wanted = derive_keys(seed, label, last)
    assert derive_keys(chained, last).item() == wanted.item()
    assert derive_keys(torch.tensor(chained), last).item() == wanted.item()
