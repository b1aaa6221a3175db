"""Quantizers: a format, the extent of its scales, how they are found, and the rounding."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from emulation import fused
from emulation.blocks import ScaleLayout, expanded, piece
from emulation.codec import (
    Backend,
    by_qtorch,
    check_backend,
    check_input,
    check_rounding,
    codes_of,
    decode,
    fusable,
    pieces,
    rounding_keys,
    straight_through,
)
from emulation.errors import InputError, suggestion
from emulation.formats import SCALE_RULES, BlockFormat, Format, NumberFormat, ScaleRule, get_format, scalar_format
from emulation.kernel_formats import KernelFormat, kernel_format
from emulation.rounding import Overflow, Rounding, on_grid
from emulation.scales import scale_from, two_level_scales

Granularity = Literal["tensor", "example", "channel", "block"]
_FLOAT32 = scalar_format("float32")
GRANULARITIES: tuple[Granularity, ...] = ("tensor", "example", "channel", "block")


@dataclass(frozen=True)
class Quantizer:
    """Rounds a tensor to ``element * scale``, the scale taken from the largest magnitude of what shares it.

    ``granularity`` says how far a number's influence may reach: with ``example`` and ``block`` it stays inside its
    index of dim 0, which is what private training asks for.

    Args:
        format: name, alias or format. Block formats bring block size, scale format and scale rule.
        granularity: what shares a scale: ``tensor``; ``example``: each index of dim 0; ``channel``: each index of
            ``channel_axis``; ``block``: as ``example``, with blocks. For a block format it bounds its blocks and, for
            NVFP4, is what shares the float32 scale above them.
        rounding: ``nearest_even``, ``nearest_away``, ``toward_zero`` or ``stochastic``.
        scale_rule: ``max``: the largest magnitude becomes the largest element, exactly; ``pow2``: that, rounded up to a
            power of two (scaling is then exact); ``floor``, ``rceil``: MX's; ``nvfp4``; ``none``: scale 1. None: the
            block format's; for scalar formats ``max``, and ``none`` for those of 16 bits and more (then overflow is
            that of a cast).
        block_size: elements along the axis that share a scale; None: the block format's.
        square_blocks: blocks of ``block_size`` by ``block_size`` over the axis and the one before it (weights).
        channel_axis: of ``channel``; 0 is the output channels of a weight.
        random_bits: how many random bits a stochastic rounding uses (hardware: 8); None: as many as matter.
        saturation_mask: whether saturated elements get no gradient; otherwise all get it straight through.
        backend: ``exact``, or ``qtorch``: qtorch's own kernels round the elements; see ``round_to``.

    Raises:
        InputError: an unknown name, or parts that do not fit together.
    """

    format: Format
    granularity: Granularity = "example"
    _: KW_ONLY
    rounding: Rounding = "nearest_even"
    scale_rule: ScaleRule | None = None
    block_size: int | None = None
    square_blocks: bool = False
    channel_axis: int = 0
    random_bits: int | None = None
    saturation_mask: bool = False
    backend: Backend = "exact"

    def __init__(
        self,
        format: str | Format,
        granularity: Granularity = "example",
        *,
        rounding: Rounding = "nearest_even",
        scale_rule: ScaleRule | None = None,
        block_size: int | None = None,
        square_blocks: bool = False,
        channel_axis: int = 0,
        random_bits: int | None = None,
        saturation_mask: bool = False,
        backend: Backend = "exact",
    ) -> None:
        fmt = get_format(format)
        block = isinstance(fmt, BlockFormat)
        if scale_rule is None:
            scale_rule = fmt.scale_rule if isinstance(fmt, BlockFormat) else "none" if fmt.bits >= 16 else "max"
        if block_size is None and isinstance(fmt, BlockFormat):
            block_size = fmt.block_size
        for field, value in (
            ("format", fmt),
            ("granularity", granularity),
            ("rounding", rounding),
            ("scale_rule", scale_rule),
            ("block_size", block_size),
            ("square_blocks", square_blocks),
            ("channel_axis", channel_axis),
            ("random_bits", random_bits),
            ("saturation_mask", saturation_mask),
            ("backend", backend),
        ):
            object.__setattr__(self, field, value)
        check_rounding(rounding, "saturate", random_bits)
        check_backend(backend)
        if granularity not in GRANULARITIES:
            raise InputError(f"unknown granularity={granularity!r}", hint=suggestion(str(granularity), GRANULARITIES))
        if scale_rule not in SCALE_RULES:
            raise InputError(f"unknown scale_rule={scale_rule!r}", hint=suggestion(str(scale_rule), SCALE_RULES))
        if block_size is not None and (type(block_size) is not int or block_size < 1):
            raise InputError(f"block_size={block_size!r}", hint="a positive whole number is allowed")
        if block_size is None and (granularity == "block" or square_blocks):
            raise InputError(f"blocks without block_size, and {fmt.name!r} has none", hint="give block_size=")
        if not block and fmt.kind == "exponent":  # type: ignore[union-attr]
            raise InputError(f"format {fmt.name!r} is for scales", hint="quantize to a float or int format")
        if (scale_rule == "nvfp4") != self._two_levels:
            raise InputError(
                f"scale_rule={scale_rule!r} with format {fmt.name!r}", hint="rule 'nvfp4' is that of two-level formats"
            )

    @property
    def element(self) -> NumberFormat:
        """The format of the elements."""
        return self.format.element if isinstance(self.format, BlockFormat) else self.format

    @property
    def scale_format(self) -> NumberFormat:
        """The format of the scales."""
        fmt = self.format.scale if isinstance(self.format, BlockFormat) else _FLOAT32
        assert isinstance(fmt, NumberFormat)
        return fmt

    @property
    def _two_levels(self) -> bool:
        return isinstance(self.format, BlockFormat) and self.format.tensor_scale

    @property
    def _overflow(self) -> Overflow:
        # without a scale a wide format is a cast, and a cast overflows
        return "nonfinite" if self.scale_rule == "none" and self.element.has_inf else "saturate"

    @property
    def mixes_examples(self) -> bool:
        """Whether a number of one example (index of dim 0) may change the result of another.

        Square blocks count as mixing: on two dimensions they run across the first.
        """
        if self.scale_rule == "none":
            return False
        if self.square_blocks:
            return True
        return self.granularity == "tensor" or (self.granularity == "channel" and self.channel_axis != 0)

    def __call__(
        self, x: Tensor, generator: torch.Generator | None = None, keys: Tensor | None = None, *, axis: int = -1
    ) -> QuantizedTensor:
        """The codes and scales of ``x``; arguments as for ``fake_quantize``. Carries no gradient.

        An element without a number (its scale is NaN) has code 0 where its format has no NaN.
        """
        check_input(x, _FLOAT32, None)
        key = self._keys(x, generator, keys)
        layout = self._layout(x, axis, key)
        wide = x.detach().float().contiguous()
        scales = self._scales(wide, layout)
        rounded = torch.empty_like(wide).view(layout.view)
        for where, noise in pieces(wide, layout.view, key) if x.numel() else ():
            rounded[where] = self._rounded(wide.view(layout.view)[where], scales, where, noise)[0]
        return QuantizedTensor(
            codes=codes_of(rounded.view(x.shape), self.element),
            scale=scales.block.reshape(layout.scale_shape if x.dim() else ()),
            unit_scale=None if scales.unit is None else scales.unit.reshape(layout.unit_shape if x.dim() else ()),
            element=self.element,
            block_axes=layout.block_axes if x.dim() else (),
            block_size=layout.block_size,
            dtype=x.dtype,
        )

    def fake_quantize(
        self,
        x: Tensor,
        *,
        generator: torch.Generator | None = None,
        keys: Tensor | None = None,
        axis: int = -1,
        out: Tensor | None = None,
    ) -> Tensor:
        """The values that quantized ``x`` stands for: the same bits as ``self(x).dequantize()``, in one pass.

        A unit (example, block, tensor) that holds NaN or an infinity becomes NaN; no other unit is touched.

        Args:
            x: float16, bfloat16, float32 or float64 (rounded to float32 first), any shape; dim 0 is the examples.
            generator: one key for stochastic rounding is drawn from it.
            keys: instead: int64 [B], one per example, or 0-d; see ``round_to``.
            axis: along which blocks run; any but dim 0 where ``granularity`` keeps inside examples.
            out: receives the result; the shape, dtype and device of ``x``.

        Returns:
            The shape and dtype of ``x``. The gradient passes straight through, but for saturated elements under
            ``saturation_mask``.

        Raises:
            InputError: blocks that would run across examples; stochastic rounding without random bits.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            if out is not None:
                raise InputError("out= with an x that requires a gradient", hint="leave out= away, or use no_grad()")
            key = self._keys(x, generator, keys)
            with torch.no_grad():
                values, mask = self._fake_quantize(x.detach(), key, axis, None, self.saturation_mask)
            return straight_through(x, values, mask)
        key = self._keys(x, generator, keys)
        return self._fake_quantize(x, key, axis, out, False)[0]

    def element_scale(self, x: Tensor, *, axis: int = -1) -> Tensor:
        """What the elements of quantized ``x`` are multiplied by, all levels together.

        Returns:
            float32, broadcastable to ``x``; NaN where a unit holds no number.
        """
        check_input(x, _FLOAT32, None)
        layout = self._layout(x, axis, None)
        scales = self._scales(x.detach().float().contiguous(), layout)
        scale = expanded(scales.block.reshape(layout.scale_shape), layout.shape, layout.block_axes, layout.block_size)
        if scales.unit is not None:
            scale = scale * scales.unit.reshape(layout.unit_shape)
        return scale if x.dim() else scale.reshape(())

    def _keys(self, x: Tensor, generator: torch.Generator | None, keys: Tensor | None) -> Tensor | None:
        if self.backend != "qtorch":
            return rounding_keys(x, self.rounding, generator, keys)
        if generator is not None or keys is not None:
            raise InputError("backend='qtorch' with generator= or keys=", hint="qtorch's random bits cannot be seeded")
        return None

    def _fake_quantize(
        self, x: Tensor, key: Tensor | None, axis: int, out: Tensor | None, masked: bool
    ) -> tuple[Tensor, Tensor | None]:
        check_input(x, _FLOAT32, out)
        x = x.detach()
        if not x.numel():
            return (x.clone() if out is None else out), (torch.ones_like(x, dtype=torch.bool) if masked else None)
        wide = x.float().contiguous()
        if self._form is not None and not masked and fusable(wide):
            fits = out is not None and out.is_contiguous() and out.dtype == wide.dtype
            buffer = out if out is not None and fits else fused.empty_like(wide)
            if self._fused(wide, buffer, axis, key):
                if out is not None:
                    return (out if buffer is out else out.copy_(buffer)), None
                kept = buffer.stride() == x.stride()
                return (buffer if kept else torch.empty_like(x).copy_(buffer)).to(x.dtype), None
        layout = self._layout(x, axis, key)
        source = wide.view(layout.view)
        scales = self._scales(wide, layout)
        mask = torch.empty_like(source, dtype=torch.bool) if masked else None
        target = out.view(layout.view) if out is not None and out.is_contiguous() else None
        for where, noise in pieces(wide, layout.view, key):
            value, scaled = self._rounded(source[where], scales, where, noise)
            if mask is not None:
                mask[where] = (scaled >= self.element.min_value) & (scaled <= self.element.max_value)
            if self.scale_rule != "none":
                value = value * piece(scales.fitted, where)
            if scales.unit is not None:
                value = value * piece(scales.unit, where)
            if not where and target is None:  # the only piece
                target = value.to(x.dtype)
                break
            if target is None:
                target = torch.empty_like(source, dtype=x.dtype)
            target[where] = value
        assert target is not None
        result = target.view(x.shape)
        if out is not None:
            result = out if out.is_contiguous() else out.copy_(result)
        elif not x.is_contiguous():
            result = torch.empty_like(x).copy_(result)
        return result, None if mask is None else mask.view(x.shape)

    @cached_property
    def _form(self) -> KernelFormat | None:
        """What the kernels are told; None where they cannot do it."""
        assert self.scale_rule is not None
        if self.backend != "exact":
            return None
        if self.granularity == "channel" and self.channel_axis != 0 and self.scale_rule != "none":
            return None
        return kernel_format(
            self.element, self.rounding, self._overflow, self.random_bits, self.scale_rule, self.scale_format
        )

    def _fused(self, x: Tensor, out: Tensor, axis: int, key: Tensor | None) -> bool:
        """Quantizes in one pass of a kernel; False where the layout, a rule or a rounding is not one of a kernel's."""
        form, shape = self._form, tuple(x.shape) or (1,)
        assert form is not None
        if self.scale_rule == "none":
            return fused.round_flat(x, out, form, key, 1) is not None
        kept, axes = self._axes(shape, axis)
        units = shape[0] if kept else 1
        if not axes:
            return fused.round_flat(x, out, form, key, units) is not None
        *before, along = axes
        assert self.block_size is not None
        if before:
            if units > 1 and self._two_levels:
                return False
            planes, inner = math.prod(shape[: along - 1]), math.prod(shape[along + 1 :])
            plane = (planes, shape[along - 1], shape[along], inner)
            return fused.quantize_squares(x, out, form, self.scale_format, key, plane, self.block_size)
        if along == 0 and units > 1:
            return False
        seen_as = (math.prod(shape[:along]), shape[along], math.prod(shape[along + 1 :]))
        return fused.quantize_blocks(x, out, form, self.scale_format, key, seen_as, self.block_size, units)

    def _rounded(
        self, x: Tensor, scales: _Scales, where: tuple[slice, ...], noise: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """A piece on the grid of the elements, and the same before it was rounded."""
        if self.scale_rule == "none":
            scaled = x
        elif scales.factor is not None:
            scaled = x * piece(scales.factor, where)
        else:
            scaled = x / piece(scales.fitted, where)
        if self.backend == "qtorch":
            return by_qtorch(scaled, self.element, self.rounding, None, None), scaled
        return on_grid(scaled, self.element, self.rounding, self._overflow, noise, self.random_bits), scaled

    def _layout(self, x: Tensor, axis: int, key: Tensor | None) -> ScaleLayout:
        shape = tuple(x.shape) or (1,)
        kept, axes = self._axes(shape, axis)
        whole_rows = key is not None and key.dim() > 0
        return ScaleLayout(
            shape=shape, kept=kept, block_axes=axes, block_size=self.block_size or 1, whole_rows=whole_rows
        )

    def _axes(self, shape: tuple[int, ...], axis: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The axes along which units differ, and those along which blocks run."""
        kept: tuple[int, ...] = (0,)
        if self.granularity == "tensor":
            kept = ()
        elif self.granularity == "channel":
            kept = (_dimension("channel_axis", self.channel_axis, len(shape)),)
        if self.block_size is None or self.scale_rule == "none":
            return kept, ()
        last = _dimension("axis", axis, len(shape))
        axes = (last - 1, last) if self.square_blocks else (last,)
        if axes[0] < 0:
            raise InputError(f"square blocks with axis={axis} of x of {len(shape)} dimensions", hint="use 2 or more")
        if 0 in axes and self.granularity in ("example", "block"):
            raise InputError(
                f"axis={axis} of x of shape={shape}: blocks of {self.format.name!r} would mix examples",
                hint="choose another axis, or granularity='tensor' for a tensor without examples, as a weight",
            )
        if self.granularity == "channel" and kept[0] in axes:
            raise InputError(f"blocks along channel_axis={self.channel_axis}", hint="choose another axis")
        return kept, axes

    def _scales(self, x: Tensor, layout: ScaleLayout) -> _Scales:
        assert self.scale_rule is not None
        if self.scale_rule == "none" or not x.numel():
            unit = x.new_ones(layout.unit_shape) if self._two_levels else None
            return _Scales(block=x.new_ones(layout.scale_shape), fitted=x, unit=unit)
        amax = layout.amax(x.view(layout.shape))
        if not self._two_levels:
            block = scale_from(amax, self.element, self.scale_format, self.scale_rule)
            return _Scales(block=block, fitted=layout.fit(block))
        block, unit, factor = two_level_scales(amax, layout.unit_amax(amax), self.element, self.scale_format)
        return _Scales(block=block, fitted=layout.fit(block), unit=layout.fit(unit), factor=layout.fit(factor))


@dataclass(frozen=True, kw_only=True)
class QuantizedTensor:
    """Codes and scales: value = element(code) * scale (* unit_scale).

    Args:
        codes: one per element, of the tensor's shape.
        scale: float32 values of the scales; one per block along ``block_axes``, else broadcastable to ``codes``.
        unit_scale: the float32 scales above the block scales, broadcastable to ``codes``; None without a second level.
        element: the format of the codes.
        block_axes: axes along which blocks run.
        block_size: elements of a block along each of these axes.
        dtype: of the tensor that was quantized.
    """

    codes: Tensor
    scale: Tensor
    unit_scale: Tensor | None
    element: NumberFormat
    block_axes: tuple[int, ...]
    block_size: int
    dtype: torch.dtype

    def values(self) -> Tensor:
        """The elements before scaling, float32."""
        return decode(self.codes, self.element)

    def element_scale(self) -> Tensor:
        """The scale of every element, ``unit_scale`` not included; broadcastable to ``codes``."""
        return expanded(self.scale, tuple(self.codes.shape), self.block_axes, self.block_size)

    def dequantize(self) -> Tensor:
        """The values, in the dtype of the tensor that was quantized."""
        values = self.values() * self.element_scale()
        if self.unit_scale is not None:
            values = values * self.unit_scale
        return values.to(self.dtype)


@dataclass(frozen=True, kw_only=True)
class _Scales:
    """Scales of blocks or units; the others in shapes that broadcast against the working view."""

    block: Tensor
    fitted: Tensor
    unit: Tensor | None = None
    factor: Tensor | None = None


def _dimension(name: str, value: int, dims: int) -> int:
    if not -dims <= value < dims:
        raise InputError(f"{name}={value} of x of {dims} dimensions")
    return value % dims
