"""Bit-exact emulation of low-precision number formats, quantizers, matrix units and layers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emulation.codec import decode as decode
    from emulation.codec import encode as encode
    from emulation.codec import round_to as round_to
    from emulation.errors import InputError as InputError
    from emulation.formats import FORMATS as FORMATS
    from emulation.formats import BlockFormat as BlockFormat
    from emulation.formats import NumberFormat as NumberFormat
    from emulation.formats import from_qtorch as from_qtorch
    from emulation.formats import get_format as get_format
    from emulation.layers import quantize_model as quantize_model
    from emulation.layers import set_plan as set_plan
    from emulation.matmul import MatrixUnit as MatrixUnit
    from emulation.matmul import matmul as matmul
    from emulation.quantizer import QuantizedTensor as QuantizedTensor
    from emulation.quantizer import Quantizer as Quantizer

# Names load on first use: the formats alone (which the hardware profiles read) must not wait for torch.
_HOME = {
    "FORMATS": "formats",
    "BlockFormat": "formats",
    "InputError": "errors",
    "MatrixUnit": "matmul",
    "NumberFormat": "formats",
    "QuantizedTensor": "quantizer",
    "Quantizer": "quantizer",
    "decode": "codec",
    "encode": "codec",
    "from_qtorch": "formats",
    "get_format": "formats",
    "matmul": "matmul",
    "quantize_model": "layers",
    "round_to": "codec",
    "set_plan": "layers",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"emulation.{_HOME[name]}"), name)
