"""Random streams keyed by (root seed, purpose, position): a run resumes without saving any generator state."""

from __future__ import annotations

import hashlib
import secrets
import threading

import numpy as np
import torch

_SEEDED_BITS = 63  # of a root that comes from a run's seed
_WORDS, _STATE = 624, 24  # of the Mersenne Twister that is torch's generator on the CPU: words, and bytes before them

GLOBAL_RANDOM = threading.RLock()
"""Held by whoever seeds or restores torch's one global generator: runs may train in threads side by side."""


def fresh_root() -> int:
    """A root seed of 256 bits from the operating system's entropy: secret, and different at every call."""
    return secrets.randbits(256)


def stream_seed(root: int, purpose: str, *position: int) -> int:
    """The 63-bit seed of one stream: a cryptographic hash of its root, purpose and position.

    Args:
        root: the run's root seed.
        purpose: what the numbers are for (``"noise"``, ``"sampling"``): streams of two purposes are independent.
        position: where in the run (step, epoch): the same position always gives the same stream.
    """
    digest = hashlib.blake2b(_label(root, purpose, *position), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 64 - _SEEDED_BITS


def stream(root: int, purpose: str, *position: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on ``device`` at the start of the stream that root, purpose and position name.

    On the CPU torch's own seeding takes 32 bits alone: so few that noise could be told by trying all of them, and that
    two steps of a long run draw the same. A secret root fills the generator's whole state instead. The streams of a
    run's public seed are torch's own.
    """
    generator = torch.Generator(device).manual_seed(stream_seed(root, purpose, *position))
    if generator.device.type == "cpu" and root.bit_length() > _SEEDED_BITS:
        state = generator.get_state().numpy()
        words = np.frombuffer(hashlib.shake_256(_label(root, purpose, *position)).digest(4 * _WORDS), dtype="<u4")
        state[_STATE : _STATE + 8 * _WORDS] = words.astype("<u8").view(np.uint8)
        generator.set_state(torch.from_numpy(state))
    return generator


def _label(root: int, purpose: str, *position: int) -> bytes:
    return ":".join([str(root), purpose, *map(str, position)]).encode()
