"""Random streams keyed by (root seed, purpose, position): a run resumes without saving any generator state."""

from __future__ import annotations

import hashlib
import secrets
import threading

import torch

GLOBAL_RANDOM = threading.RLock()
"""Held by whoever seeds or restores torch's one global generator: runs may train in threads side by side."""


def fresh_root() -> int:
    """A root seed of 63 bits from the operating system's entropy: secret, and different at every call."""
    return secrets.randbits(63)


def stream_seed(root: int, purpose: str, *position: int) -> int:
    """The 63-bit seed of one stream: a cryptographic hash of its root, purpose and position.

    Args:
        root: the run's root seed.
        purpose: what the numbers are for (``"noise"``, ``"sampling"``): streams of two purposes are independent.
        position: where in the run (step, epoch): the same position always gives the same stream.
    """
    label = ":".join([str(root), purpose, *map(str, position)])
    return int.from_bytes(hashlib.blake2b(label.encode(), digest_size=8).digest(), "big") >> 1


def stream(root: int, purpose: str, *position: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on ``device`` at the start of the stream that :func:`stream_seed` names."""
    return torch.Generator(device).manual_seed(stream_seed(root, purpose, *position))
