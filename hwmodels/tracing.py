"""Reading a model's workload off its forward pass on meta tensors."""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from emulation.errors import InputError
from hwmodels.shapes import meta_result
from hwmodels.traffic import IGNORED, classify
from hwmodels.workload import LayerWork, Pass, Product, SavedTensor, Workload

QUANTIZABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
PRODUCTS = frozenset({"convolution", "mm", "addmm", "bmm", "baddbmm"})


class _Layer:
    """A module while its forward pass is being watched."""

    def __init__(self, name: str, module: nn.Module | None) -> None:
        self.name, self.module = name, module
        self.products: list[Product] = []
        self.passes: list[Pass] = []
        self.quantizable = False
        self.looked_up = 0
        self.calls = 0
        self.kinds: list[str] = []

    def finished(self, parameters: int) -> LayerWork:
        kind = next((k for k in ("conv", "linear", "attention", "embedding", "norm") if k in self.kinds), "other")
        return LayerWork(
            name=self.name,
            kind=kind,
            quantizable=self.quantizable,
            products=tuple(self.products),
            passes=tuple(self.passes),
            parameters=parameters,
            looked_up=self.looked_up,
            calls=max(self.calls, 1),
        )


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operator of a forward pass and books it on the module that called it."""

    def __init__(self, batch_size: int, parameters: dict[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.batch_size = batch_size
        self.layers: dict[str, _Layer] = {}
        self.stack: list[_Layer] = []
        self.calls: list[tuple[str, int]] = []
        self.parameter_names = {_storage(p): name for name, p in parameters.items()}
        self.from_input: set[int] = set()
        self.uses: dict[int, tuple[int, int, _Layer]] = {}
        self.saved: dict[int, tuple[Tensor, list[str]]] = {}
        self.alive: list[Tensor] = list(parameters.values())  # a freed storage's address may be given again
        self.in_attention = False
        self.attention_products = 0
        self.uncounted: dict[str, None] = {}
        self.last_call = ""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keeps torch from loading its compiler, a second's work, at the first operator that the mode sees."""
        return False

    # which module is running

    def enter(self, name: str, module: nn.Module | None) -> _Layer:
        layer = self.layers.setdefault(name, _Layer(name, module))
        self.stack.append(layer)
        return layer

    @property
    def layer(self) -> _Layer:
        return self.stack[-1]

    # what is batched

    def batched(self, *tensors: Tensor) -> bool:
        return any(
            _storage(t) in self.from_input or (t.dim() > 1 and t.shape[0] == self.batch_size and t.stride(0) != 0)
            for t in tensors
        )

    def per_example(self, elements: int, batched: bool) -> int:
        return -(-elements // self.batch_size) if batched else elements

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.last_call = str(func)
        name = func.overloadpacket.__name__
        out = meta_result(name, args, kwargs)
        out = func(*args, **kwargs) if out is None else out
        inputs = list(_tensors([args, kwargs]))
        outputs = list(_tensors(out))
        self.alive += outputs
        if any(_storage(t) in self.from_input for t in inputs):
            self.from_input.update(_storage(t) for t in outputs)
        if name in PRODUCTS:
            self.product(name, args, outputs[0])
        elif outputs and name not in IGNORED and not func.is_view and not name.startswith("_unsafe_view"):
            self.other(func, name, inputs, outputs)
        return out

    def product(self, name: str, args: Any, out: Tensor) -> None:
        layer = self.layer
        if name == "convolution":
            found = self.convolution(args, out)
        else:
            left, right = args[1:3] if name in ("addmm", "baddbmm") else args[:2]
            found = self.matmul(left, right)
        layer.products.append(found)
        weight = args[1] if name == "convolution" else args[2] if name == "addmm" else args[1]
        owner = self.parameter_names.get(_storage(weight), "")
        layer.kinds.append("conv" if name == "convolution" else "linear" if found.weighted else "attention")
        layer.quantizable |= (
            isinstance(layer.module, QUANTIZABLE) and found.weighted and owner == _join(layer.name, "weight")
        )
        if found.weighted and not owner.startswith(layer.name if layer.name != "(model)" else ""):
            self.uncounted[f"{owner}: used by {layer.name}, whose own it is not"] = None
        self.count_use(args[0] if name != "addmm" else args[1])

    def convolution(self, args: Any, out: Tensor) -> Product:
        x, weight, _, _, _, _, transposed, _, groups = args[:9]
        spatial = x.shape[2:] if transposed else out.shape[2:]
        taps = weight[0, 0].numel()
        batched = self.batched(x)
        examples = x.shape[0] if batched else 1
        weight_in, weight_out = weight.shape[1] * taps, weight.shape[0] // groups
        if transposed:  # weight [in, out / groups, taps]: each input position makes out * taps products
            weight_in, weight_out = weight.shape[0] // groups, weight.shape[1] * taps
        return Product(
            rows=spatial.numel() * (x.shape[0] // examples),
            inputs=weight_in,
            outputs=weight_out,
            groups=groups,
            input_elements=x.numel() // examples,
            weighted=_storage(weight) in self.parameter_names,
            grad_input=x.requires_grad,
            grad_weight=weight.requires_grad,
            batched=batched,
            convolution=True,
        )

    def matmul(self, left: Tensor, right: Tensor) -> Product:
        if _storage(left) in self.parameter_names and _storage(right) not in self.parameter_names:
            left, right = right.transpose(-1, -2), left.transpose(-1, -2)
        count = left.shape[0] if left.dim() == 3 else 1
        rows, inputs = left.shape[-2:]
        outputs = right.shape[-1]
        batched = self.batched(left, right)
        weighted = _storage(right) in self.parameter_names
        if weighted:
            rows, count = (rows * count, 1) if right.dim() == 2 or right.stride(0) == 0 else (rows, count)
            rows = self.per_example(rows, batched)
        else:
            count = self.per_example(count, batched) if count > 1 else count
            if count == 1 and left.dim() == 2 and batched:
                rows = self.per_example(rows, batched)
        return Product(
            rows=rows,
            inputs=inputs,
            outputs=outputs,
            groups=count,
            input_elements=rows * inputs * count,
            weighted=weighted,
            grad_input=left.requires_grad,
            grad_weight=right.requires_grad,
            batched=batched,
            on_chip=self.on_chip(),
        )

    def on_chip(self) -> Literal["", "operand", "result"]:
        """Of an attention's two products, the first makes the scores and the second reads them."""
        if not self.in_attention:
            return ""
        self.attention_products += 1
        return "result" if self.attention_products == 1 else "operand"

    def other(self, func: Any, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        batched = self.batched(*inputs, *outputs)
        # what every example shares (a mask, a scale) stays in the cache
        sizes = [0 if batched and not self.batched(t) else self.per_example(t.numel(), batched) for t in inputs]
        written = sum(self.per_example(t.numel(), batched) for t in outputs)
        grads = sum(t.requires_grad for t in inputs)
        kind, found = classify(
            name,
            sizes,
            written,
            grads,
            pointwise=torch.Tag.pointwise in func.tags,
            batched=batched,
            in_attention=self.in_attention,
        )
        layer = self.layer
        layer.passes.append(found)
        layer.kinds.append(kind)
        if kind == "unknown":
            self.uncounted[f"{func}: taken for a pass over its operands, the backward pass for the same"] = None
        if kind == "embedding":
            layer.looked_up += written
        for tensor in inputs:
            self.count_use(tensor)

    def count_use(self, tensor: Tensor) -> None:
        """A tensor used n times gets n gradients, which n - 1 additions bring together."""
        key = _storage(tensor)
        if not tensor.requires_grad or key in self.parameter_names:
            return
        if tensor.numel() * tensor.element_size() != tensor.untyped_storage().nbytes():
            return
        count, _, layer = self.uses.get(key, (0, 0, self.layer))
        self.uses[key] = (count + 1, tensor.numel(), layer)

    def save(self, tensor: Tensor) -> Tensor:
        key = _storage(tensor)
        if not self.in_attention and key not in self.parameter_names and tensor.numel() > 1:
            _, layers = self.saved.setdefault(key, (tensor, []))
            if self.layer.name not in layers:
                layers.append(self.layer.name)
            self.alive.append(tensor)
        return tensor

    def gather_gradients(self) -> None:
        for count, elements, layer in self.uses.values():
            if count > 1:
                size = self.per_example(elements, True)
                layer.passes.append(
                    Pass(
                        operation="gradient accumulation",
                        forward=0,
                        backward=3.0 * size * (count - 1),
                        fused_backward=1.0 * size * (count - 1),
                        kernels_forward=0,
                        kernels_backward=count - 1,
                    )
                )

    def saved_tensors(self) -> Iterator[SavedTensor]:
        for tensor, layers in self.saved.values():
            batched = self.batched(tensor)
            elements = tensor.untyped_storage().nbytes() // tensor.element_size()
            yield SavedTensor(elements=self.per_example(elements, batched), layers=tuple(layers), batched=batched)


class _AttentionMark(TorchFunctionMode):
    """Marks the operators inside a scaled dot-product attention: its kernels keep the scores on the chip."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.recorder.in_attention, self.recorder.attention_products = True, 0
        try:
            out = func(*args, **kwargs)
            if out.dim() == 4:  # attention kernels write [batch, rows, heads, features], whatever the view
                out = out.transpose(1, 2).contiguous().transpose(1, 2)
        finally:
            self.recorder.in_attention = False
        for tensor in (*_tensors([args, kwargs]), out):
            self.recorder.save(tensor)
        return out


def _join(name: str, parameter: str) -> str:
    return parameter if name == "(model)" else f"{name}.{parameter}"


@contextmanager
def _watched(module: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Training mode and hooks that say which module runs; both undone afterwards."""
    modes = {m: m.training for m in module.modules()}
    handles = []
    open_calls: list[int] = []
    for name, child in module.named_modules():
        label = name or "(model)"

        def enter(m: nn.Module, _: Any, label: str = label) -> None:
            recorder.enter(label, m).calls += 1
            open_calls.append(len(recorder.calls))
            recorder.calls.append((label, 0))

        def leave(m: nn.Module, *_: Any, label: str = label) -> None:
            recorder.stack.pop()
            recorder.calls[open_calls.pop()] = label, len(recorder.calls)

        handles.append(child.register_forward_pre_hook(enter, prepend=True))
        handles.append(child.register_forward_hook(leave, always_call=True))
    module.train()
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for m, training in modes.items():
            m.training = training


def _on_meta(value: Any, batch_size: int) -> Any:
    if isinstance(value, Tensor):
        if value.dim() == 0:
            raise InputError("example_input has no batch dimension", hint="give a tensor of shape [batch, ...]")
        return torch.empty(batch_size, *value.shape[1:], dtype=value.dtype, device="meta")
    if isinstance(value, (tuple, list)):
        return tuple(_on_meta(v, batch_size) for v in value)
    raise InputError(
        f"example_input of type {type(value).__name__} cannot be traced", hint="give a tensor or a tuple of tensors"
    )


def _loss(recorder: _Recorder, output: Any) -> None:
    logits = next(_tensors(output), None)
    if logits is None or not logits.is_floating_point() or logits.dim() < 2:
        recorder.uncounted["the loss: the output is not a tensor of logits [batch, ..., classes]"] = None
        return
    flat = logits.reshape(-1, logits.shape[-1])
    target = torch.zeros(flat.shape[0], dtype=torch.long, device="meta")
    recorder.from_input.add(_storage(target))
    recorder.alive.append(target)
    recorder.enter("(loss)", None)
    F.cross_entropy(flat, target)
    recorder.stack.pop()


def trace_module(module: nn.Module, example_input: Any, batch_size: int) -> Workload:
    """See ``hwmodels.workload.trace``."""
    traced = max(batch_size, 2)  # at one example nothing tells the batch from any other dimension
    inputs = _on_meta(example_input, traced)
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    held = [*module.parameters(), *module.buffers()]
    shapes_only = all(t.is_meta for t in held)
    parameters = {
        name: p if shapes_only else nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for name, p in module.named_parameters()
    }
    buffers = {name: torch.empty_like(b, device="meta") for name, b in module.named_buffers()}
    recorder = _Recorder(traced, dict(parameters))
    recorder.from_input.update(_storage(t) for t in inputs)
    recorder.alive += inputs
    recorder.enter("(model)", module)
    with ExitStack() as stack:
        stack.enter_context(_watched(module, recorder))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.device("meta"))
        stack.enter_context(_AttentionMark(recorder))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(recorder.save, lambda t: t))
        stack.enter_context(recorder)
        try:
            if shapes_only:
                output = module(*inputs)
            else:
                output = torch.func.functional_call(module, {**parameters, **buffers}, inputs)
            _loss(recorder, output)
        except InputError:
            raise
        except Exception as error:
            raise _untraceable(module, recorder, error) from error
    recorder.gather_gradients()
    return _workload(recorder, parameters, batch_size)


def _workload(recorder: _Recorder, parameters: dict[str, nn.Parameter], batch_size: int) -> Workload:
    owned: dict[str, int] = {}
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            owner = name.rpartition(".")[0] or "(model)"
            while owner not in recorder.layers and owner != "(model)":  # held by a module that is never called
                owner = owner.rpartition(".")[0] or "(model)"
            owned[owner] = owned.get(owner, 0) + parameter.numel()
    layers = tuple(
        layer.finished(owned.get(layer.name, 0))
        for layer in recorder.layers.values()
        if layer.products or layer.passes or layer.name in owned
    )
    return Workload(
        layers=layers,
        batch_size=batch_size,
        saved=tuple(recorder.saved_tensors()),
        calls=tuple(recorder.calls),
        parameters=sum(p.numel() for p in parameters.values() if p.requires_grad),
        frozen_parameters=sum(p.numel() for p in parameters.values() if not p.requires_grad),
        uncounted=tuple(recorder.uncounted),
    )


def _untraceable(module: nn.Module, recorder: _Recorder, error: Exception) -> InputError:
    names = {id(m): name for name, m in module.named_modules()}
    inside, where = type(module).__name__, recorder.last_call
    for frame, line in traceback.walk_tb(error.__traceback__):
        code, owner = frame.f_code, frame.f_locals.get("self")
        if names.get(id(owner)):
            inside = f"{type(module).__name__}.{names[id(owner)]}"
        if "/torch/" not in code.co_filename and code.co_filename != __file__:
            text = linecache.getline(code.co_filename, line).strip()
            where = f"{code.co_filename}:{line}: {text}" if text else where
    message = (str(error).strip().splitlines() or [type(error).__name__])[0]
    values = any(word in str(error).lower() for word in ("meta", "data-dependent", "item()", "numpy"))
    hint = (
        "shapes are traced without values: take branches on values, .item(), .numpy() and .cpu() out of forward"
        if values
        else "does the model run on an input of this shape, batch first?"
    )
    return InputError(f"cannot trace {inside}: {message} (at {where})", hint=hint)
