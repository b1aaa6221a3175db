"""Random bits as a pure function of (key, element index): no state, so the same on any device and any thread count."""

from __future__ import annotations

import torch
from torch import Tensor

from emulation.errors import InputError

_GOLDEN = 0x9E3779B9
_LOWBIAS = (0x7FEB352D, 0x846CA68B)  # the multipliers of lowbias32 (https://nullprogram.com/blog/2018/07/31/)
_SPLITMIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # of SplitMix64 (Steele, Lea, Flood 2014)
_SPLITMIX_STEP = 0x9E3779B97F4A7C15


def _signed(value: int, bits: int) -> int:
    """``value`` modulo 2^bits, as the signed integer that torch stores."""
    half = 1 << (bits - 1)
    return (value + half) % (1 << bits) - half


def _xor_shift(h: Tensor, shift: int, bits: int) -> Tensor:
    # torch shifts right arithmetically: the mask makes it logical
    return h ^ ((h >> shift) & ((1 << (bits - shift)) - 1))


def chained_key(seed: int, label: int) -> int:
    """The seed that stands for (seed, label): ``derive_keys(chained_key(s, a), b) == derive_keys(s, a, b)``."""
    return _signed(_splitmix_number(seed) + label, 64)


def derive_keys(seed: int | Tensor, *labels: int | Tensor) -> Tensor:
    """Independent-looking int64 keys of (seed, labels...), such as (seed, step, layer, role, example ids).

    Args:
        seed: any whole number, taken modulo 2^64; or such numbers, int64.
        labels: whole numbers or int64 tensors, which broadcast together.

    Returns:
        int64 keys of the labels' broadcast shape (0-d where every label is a number). A pure function of its arguments,
        by chained SplitMix64 finalizers: the order of the labels counts.
    """
    key = seed  # numbers are mixed on the host, up to the first tensor
    for label in labels:
        if isinstance(label, Tensor) and (label.is_floating_point() or label.is_complex()):
            raise InputError(f"key label of dtype={label.dtype}", hint="whole numbers are allowed")
        mixed = _splitmix_number(key) if isinstance(key, int) else _splitmix(key)
        if isinstance(label, Tensor):
            key = label.to(torch.int64) + (_signed(mixed, 64) if isinstance(mixed, int) else mixed)
        else:
            key = mixed + (label if isinstance(mixed, int) else _signed(label, 64))
    if isinstance(key, int):
        return torch.tensor(_signed(_splitmix_number(key), 64))
    return _splitmix(key)


def _splitmix_number(z: int) -> int:
    """SplitMix64's finalizer of a number taken modulo 2^64."""
    z = (z + _SPLITMIX_STEP) % (1 << 64)
    z = (z ^ (z >> 30)) * _SPLITMIX[0] % (1 << 64)
    z = (z ^ (z >> 27)) * _SPLITMIX[1] % (1 << 64)
    return z ^ (z >> 31)


def _splitmix(z: Tensor) -> Tensor:
    """The same of an int64 tensor."""
    z = z + _signed(_SPLITMIX_STEP, 64)
    z = _xor_shift(z, 30, 64) * _signed(_SPLITMIX[0], 64)
    z = _xor_shift(z, 27, 64) * _signed(_SPLITMIX[1], 64)
    return _xor_shift(z, 31, 64)


def key_from(generator: torch.Generator, device: torch.device) -> Tensor:
    """One int64 key, 0-d, drawn from a generator of any device."""
    return torch.randint(2**63 - 1, (), generator=generator, device=generator.device).to(device)


def index_products(count: int, device: torch.device) -> Tensor:
    """The int32 products of the indices 0..count-1 that ``hash_bits`` starts from."""
    return torch.arange(count, dtype=torch.int32, device=device) * _signed(_GOLDEN, 32)


def hash_bits(products: Tensor, keys: Tensor, offset: int = 0) -> Tensor:
    """32 uniform random bits of each (key, index): lowbias32 of the index, the halves of the mixed key stirred in.

    Args:
        products: int32, from ``index_products``; any shape.
        keys: int64, broadcastable to the shape of ``products``.
        offset: added to every index.

    Returns:
        int32 of the broadcast shape; indices count modulo 2^32.
    """
    keys = _splitmix(keys)  # those that differ in a few bits must not give bits that look alike
    low = ((keys << 32) >> 32).to(torch.int32) + _signed(offset * _GOLDEN, 32)
    high = (keys >> 32).to(torch.int32)
    h = _xor_shift(products + low, 16, 32) * _signed(_LOWBIAS[0], 32)
    h = _xor_shift(h ^ high, 15, 32) * _signed(_LOWBIAS[1], 32)
    return _xor_shift(h, 16, 32)
