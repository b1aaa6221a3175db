"""One private run on several processes, one device each: what they share out, what they sum, and how they fail.

Every process holds the whole model and takes every k-th example of the one Poisson sample that all of them draw from
the run's root seed. A step needs one all-reduce: of each process's clipped sum, into which the first process has put
the noise. So the noise is added once, exists nowhere before the first process has the step in its ledger, and every
process receives the same released bits, whatever its device's random generator would have made of the seed.

Gaussian noise of 1/k of the variance from each of k processes would do as well, but then every process would have to
wait for the ledger; the same noise drawn on every process would need devices whose generators agree to the bit.
"""

from __future__ import annotations

import hashlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from emulation.errors import InputError

_TIMEOUT = timedelta(minutes=10)  # for a process that hangs; one that dies is noticed at once
_LOST = "another process of this run stopped, so this one did; --resume goes on, on any number of processes"
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Value = TypeVar("Value")
Items = TypeVar("Items", Tensor, list[int])


@dataclass(frozen=True, kw_only=True)
class Processes:
    """The processes of a run, as one of them sees them; alone by default, and then every method is the identity.

    Attributes:
        rank: which one this is, from 0; the first keeps the run folder and the ledger, adds the noise, and talks.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes, adds noise and talks."""
        return self.rank == 0

    def share(self, items: Items) -> Items:
        """This process's part of what all of them hold: every ``size``-th item, so that parts differ by at most one."""
        return items[self.rank :: self.size]

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums over all processes, the same bits in each; one flat all-reduce, whatever the number of tensors.

        Raises:
            ConnectionError: another process has stopped.
        """
        if self.size == 1:
            return list(tensors)
        flat = torch.cat([t.detach().reshape(-1) for t in tensors])
        _collective(lambda: dist.all_reduce(flat))
        parts = flat.split([t.numel() for t in tensors])
        return [part.view(t.shape).to(t.dtype) for part, t in zip(parts, tensors, strict=True)]

    def broadcast(self, value: Value, device: torch.device | str = "cpu") -> Value:
        """What the first process holds: tensors, numbers, strings and containers of them; no code is ever received.

        Args:
            value: ignored on all but the first.
            device: where the tensors in it are to lie on this process.

        Raises:
            ConnectionError: another process has stopped.
        """
        if self.size == 1:
            return value
        buffer = io.BytesIO()
        if self.first:
            torch.save(value, buffer)
        length = torch.tensor([buffer.getbuffer().nbytes])
        _collective(lambda: dist.broadcast(length, src=0))
        data = bytearray(buffer.getvalue()) if self.first else bytearray(int(length))
        payload = torch.frombuffer(data, dtype=torch.uint8)
        _collective(lambda: dist.broadcast(payload, src=0))
        return value if self.first else torch.load(io.BytesIO(data), map_location=device, weights_only=True)

    def agree(self, what: str, *values: object, tensors: Iterable[Tensor] = ()) -> None:
        """Asserts that every process holds the same values, by a checksum.

        Args:
            what: named in the error.
            values: whose ``repr`` says all of them.
            tensors: compared by the sum of each one's bits.

        Raises:
            RuntimeError: they differ; what was computed from them must not be used.
            ConnectionError: another process has stopped.
        """
        if self.size == 1:
            return
        said = repr((values, [_sum_of_bits(t) for t in tensors]))
        digest = int.from_bytes(hashlib.blake2b(said.encode(), digest_size=7).digest(), "big")
        extremes = torch.tensor([digest, -digest])
        _collective(lambda: dist.all_reduce(extremes, op=dist.ReduceOp.MAX))
        if int(extremes[0]) != -int(extremes[1]):
            raise RuntimeError(f"the {self.size} processes of this run differ in {what}, and cannot go on together")


ALONE = Processes()


def _sum_of_bits(tensor: Tensor) -> int:
    return int(tensor.detach().reshape(-1).view(_BITS[tensor.element_size()]).sum(dtype=torch.int64))


@contextmanager
def joined() -> Iterator[Processes]:
    """Joins the processes that ``torchrun`` started, for as long as the block lasts; elsewhere there is one, alone.

    Tensors on CUDA go through NCCL, others through gloo; with CUDA each process takes the device of its local rank.
    Where the block fails, the first process to fail raises, for its error to be shown; the others leave in silence. A
    process that ``torchrun`` stops because another one died says so and ends, also from within a collective.

    Raises:
        InputError: more processes on this host than it has CUDA devices.
        ConnectionError: the others cannot be reached.
    """
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    store, rank, size = _collective(lambda: next(rendezvous("env://", timeout=_TIMEOUT)))
    failures = store.clone()  # a connection of its own: the other may be waiting

    def first_to_fail() -> bool:
        try:
            return bool(failures.add("dpquant/failures", 1) == 1)
        except RuntimeError:  # whoever kept the store is gone
            return True

    with _ending_when_told(first_to_fail):
        try:
            backend = _backend(int(os.environ.get("LOCAL_RANK", rank)))
            options = {"store": store, "rank": rank, "world_size": size, "timeout": _TIMEOUT}
            _collective(lambda: dist.init_process_group(backend, **options))
            yield Processes(rank=rank, size=size)
        except (Exception, KeyboardInterrupt) as error:
            if first_to_fail():
                raise
            raise SystemExit(2 if isinstance(error, InputError) else 1) from error
        dist.destroy_process_group()


def _backend(local_rank: int) -> str:
    """What carries the tensors; with CUDA, this process takes its device."""
    devices = torch.cuda.device_count()
    if not devices:
        return "gloo"
    if local_rank >= devices:
        raise InputError(
            f"process local_rank={local_rank} has no CUDA device: there are {devices}",
            hint=f"torchrun --nproc-per-node {devices}, or CUDA_VISIBLE_DEVICES= to train on the CPU",
        )
    torch.cuda.set_device(local_rank)
    return "cpu:gloo,cuda:nccl"


@contextmanager
def _ending_when_told(first_to_fail: Callable[[], bool]) -> Iterator[None]:
    """On SIGTERM says that the run has lost a process, and ends this one.

    A thread waits for the signal: the main one may be inside a collective that never returns, where no Python handler
    would run.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        while received := os.read(reader, 1):
            if received[0] == signal.SIGTERM:
                if first_to_fail():
                    print(f"error: {_LOST}", file=sys.stderr, flush=True)
                os._exit(1)

    handler = signal.signal(signal.SIGTERM, lambda *_: None)
    wakeup = signal.set_wakeup_fd(writer)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGTERM, handler)
        os.close(writer)
        watcher.join()
        os.close(reader)


def _collective(call: Callable[[], Any]) -> Any:
    """The call's result; that a peer is gone, which torch says in many ways, as one error."""
    try:
        return call()
    except RuntimeError as error:
        said = str(error).strip().splitlines()[0]
        gone = any(word in said for word in ("closed by peer", "reset by peer", "Broken pipe"))
        raise ConnectionError(_LOST if gone else f"the processes of this run lost one another: {said}") from error
