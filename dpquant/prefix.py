"""Forward passes that differ only from some layer on: what comes before it is computed once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Result = TypeVar("Result")


_NEVER = sys.maxsize


class _OtherOrderError(Exception):
    """A pass called modules in another order than the first one did."""


class SharedPrefix:
    """Passes through one module with the same input and weights, of which each changes what some of its layers do.

    The first pass notes in which order modules are called. A later one that changes some layers skips every module call
    that had ended before any of these layers was first called: its output is taken from the passes before. What is
    between module calls is computed anew. So passes give the same bits as they would alone, and cost what is left of
    them: in the order of their first changed layers, a pass that changes nothing last, every call runs once, and once
    more for each pass that changes a layer ahead of it or inside (``hwmodels.planner.forward_runs`` counts that). Kept
    are the outputs of the outermost modules that have ended.

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
        self._kept: dict[int, tuple[Any, list[int]]] = {}  # call -> its output, and its tensors' versions when made
        self._changed: Collection[nn.Module] = ()
        self._position = self._shared = 0

    def results(self, passes: Sequence[tuple[Callable[[], Result], Collection[nn.Module]]]) -> list[Result]:
        """What each pass returns; they run in the cheapest order.

        Args:
            passes: a function that calls the module, and the layers that do something of their own in it.
        """
        first = min(range(len(passes)), key=lambda i: self._first_call(passes[i][1]))
        found = {first: self._run(*passes[first])}
        for index in sorted(range(len(passes)), key=lambda i: self._first_call(passes[i][1])):
            if index != first:
                found[index] = self._run(*passes[index])
        return [found[i] for i in range(len(passes))]

    def _first_call(self, layers: Collection[nn.Module]) -> int:
        """When any of ``layers`` is first called, counted in calls; the number of all calls if none is.

        Before the first pass, when they come in the module.
        """
        calls = self._calls or self._modules
        return next((n for n, m in enumerate(calls) if m in layers), len(calls))

    def _run(self, function: Callable[[], Result], changed: Collection[nn.Module]) -> Result:
        if not self._usable:
            return function()
        self._position, self._changed = 0, changed
        if not self._calls:
            return self._first(function)
        self._shared = self._first_call(changed)
        try:
            return self._patched(self._replaying, function)
        except _OtherOrderError:
            self._usable = False
            self._kept.clear()
            return function()

    def _first(self, function: Callable[[], Result]) -> Result:
        self._shared = _NEVER
        before = self._random_states()
        result = self._patched(self._recording, function)
        after = self._random_states()
        self._usable = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        if not self._usable:
            self._kept.clear()
        return result

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
        if module in self._changed:
            self._shared = min(self._shared, number)
        given = _versions((args, kwargs))
        output = own(*args, **kwargs)
        self._ends[number] = len(self._calls)
        if self._ends[number] <= self._shared:
            self._keep(number, output, given)
        return output

    def _replaying(self, module: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        number = self._position
        if number >= self._shared:
            return own(*args, **kwargs)
        if self._calls[number] is not module:
            raise _OtherOrderError
        end = self._ends[number]
        if number in self._kept and end <= self._shared:
            output, versions = self._kept[number]
            if [t._version for t in tree_leaves(output) if t is not None] == versions:
                self._position = end
                return output
            del self._kept[number]
        self._position = number + 1
        given = _versions((args, kwargs))
        output = own(*args, **kwargs)
        if end <= self._shared:
            if self._position != end:
                raise _OtherOrderError
            self._keep(number, output, given)
        return output

    def _keep(self, number: int, output: Any, given: list[tuple[Tensor, int]]) -> None:
        """Keeps what a call gave in place of what the calls inside it gave, if that can be told to stay the same."""
        several = type(output) is tuple
        if not all(_is_tracked(t) or (several and t is None) for t in (output if several else (output,))):
            return
        if all(t._version == version for t, version in given):
            for inner in range(number + 1, self._ends[number]):
                self._kept.pop(inner, None)
            self._kept[number] = output, [version for _, version in _versions(output)]

    def _random_states(self) -> list[Tensor]:
        devices = {p.device for m in self._modules for p in m.parameters(recurse=False) if p.device.type == "cuda"}
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in sorted(devices, key=str))]


def _bound(forward: Callable[..., Any], module: nn.Module, own: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: forward(module, own, *args, **kwargs)


def _is_tracked(value: object) -> bool:
    """Whether it is a tensor that tells of changes in place."""
    return type(value) is Tensor and not value.is_inference()


def _versions(values: Any) -> list[tuple[Tensor, int]]:
    """The tensors in there, each with a number that changes when it is changed in place."""
    return [(t, t._version) for t in tree_leaves(values) if _is_tracked(t)]


def _is_opaque(module: nn.Module) -> bool:
    compiled = getattr(module, "_compiled_call_impl", None) is not None or "_orig_mod" in module._modules
    return compiled or isinstance(module, (torch.jit.ScriptModule, nn.DataParallel))
