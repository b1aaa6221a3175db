"""stub"""

from emulation.matmul_torch import Operand
from emulation.matrix_units import MatrixUnit
from torch import Tensor


def takes(left: Operand, right: Operand, unit: MatrixUnit) -> bool:
    """stub"""
    return False


def chained_product(left: Operand, right: Operand, unit: MatrixUnit) -> Tensor:
    """stub"""
    raise NotImplementedError
