"""Forward passes that differ only from some layer on: what comes before it is computed once."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Result = TypeVar("Result")


class _OtherOrderError(Exception):
    """A pass called modules in another order than the first one did."""


class SharedPrefix:
    """Passes through one module with the same input and weights, of which each changes what some of its layers do.

    The first pass notes in which order modules are called. A later one that changes some layers skips every module call
    that had ended before any of these layers was first called: its output is taken from the pass before. What is
    between module calls is computed anew. So passes give the same bits as they would alone, and cost what is left of
    them; they are cheapest in the order of their first changed layer. Kept are only the outputs that the next pass can
    use, of the outermost modules that have ended.

    Nothing is skipped where this would not be the same: where the first pass draws random numbers from torch, where
    modules are compiled, scripted or replicated, from where on modules are called in another order, where a module
    changes an argument in place, and where a later operation has changed an output in place.

    Args:
        module: in evaluation mode, its passes without gradients.
    """

    def __init__(self, module: nn.Module) -> None:
        self._modules = list(module.modules())
        self._usable = not any(_is_opaque(m) for m in self._modules)
        self._calls: list[nn.Module] = []
        self._ends: list[int] = []  # of every call: the number of the first call that begins after it has ended
        self._kept: dict[int, tuple[Tensor, int]] = {}  # call -> its output, and the version of that when it was made
        self._position = self._shared = 0

    def record(self, function: Callable[[], Result]) -> Result:
        """The first pass: what ``function``, which calls the module, returns."""
        if not self._usable:
            return function()
        before = self._random_states()
        result = self._patched(self._recording, function)
        after = self._random_states()
        self._usable = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        return result

    def first_call(self, layers: Collection[nn.Module]) -> int:
        """When any of ``layers`` is first called, counted in calls; the number of all calls if none is."""
        return next((n for n, m in enumerate(self._calls) if m in layers), len(self._calls))

    def run(self, function: Callable[[], Result], changed: Collection[nn.Module]) -> Result:
        """A pass like the first in which only the layers ``changed`` do something else."""
        if not self._usable:
            return function()
        self._position, self._shared = 0, self.first_call(changed)
        try:
            return self._patched(self._replaying, function)
        except _OtherOrderError:
            self._usable = False
            self._kept.clear()
            return function()

    def _patched(self, forward: Callable[..., Any], function: Callable[[], Result]) -> Result:
        """``function()`` while every module's ``forward(...)`` is ``forward(module, its own, ...)``."""
        missing = object()
        before = [m.__dict__.get("forward", missing) for m in self._modules]
        try:
            for m in self._modules:
                m.__dict__["forward"] = _bound(forward, m, m.forward)
            return function()
        finally:
            for m, own in zip(self._modules, before, strict=True):
                if own is missing:
                    m.__dict__.pop("forward", None)
                else:
                    m.__dict__["forward"] = own

    def _recording(self, module: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        number = len(self._calls)
        self._calls.append(module)
        self._ends.append(0)
        output = own(*args, **kwargs)
        self._ends[number] = len(self._calls)
        return output

    def _replaying(self, module: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        number = self._position
        if number >= self._shared:
            return own(*args, **kwargs)
        if self._calls[number] is not module:
            raise _OtherOrderError
        end = self._ends[number]
        if number in self._kept:
            output, version = self._kept[number]
            if output._version == version:
                self._position = end
                return output
            del self._kept[number]
        self._position = number + 1
        given = [(t, t._version) for t in tree_leaves((args, kwargs)) if _is_tracked(t)]
        output = own(*args, **kwargs)
        if end <= self._shared:
            if self._position != end:
                raise _OtherOrderError
            for inner in range(number + 1, end):
                self._kept.pop(inner, None)
            if _is_tracked(output) and all(t._version == version for t, version in given):
                self._kept[number] = output, output._version
        return output

    def _random_states(self) -> list[Tensor]:
        devices = {p.device for m in self._modules for p in m.parameters(recurse=False) if p.device.type == "cuda"}
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in sorted(devices, key=str))]


def _bound(forward: Callable[..., Any], module: nn.Module, own: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: forward(module, own, *args, **kwargs)


def _is_tracked(value: object) -> bool:
    """Whether it is a tensor that tells of changes in place."""
    return type(value) is Tensor and not value.is_inference()


def _is_opaque(module: nn.Module) -> bool:
    compiled = getattr(module, "_compiled_call_impl", None) is not None or "_orig_mod" in module._modules
    return compiled or isinstance(module, (torch.jit.ScriptModule, nn.DataParallel))
