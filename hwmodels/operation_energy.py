"""Energy from operations and bytes, for chips that do not exist yet: a sum of published picojoules, not a board.

Measured boards draw 3 to 10 times what such sums give, and mostly their power limit whatever they compute, so these
figures are never added to, or set in one column with, the board energy of ``hwmodels.cost``.

Sources: Horowitz, ISSCC 2014 (45 nm, 0.9 V); Jouppi et al., ISCA 2021, table 2 (7 nm), of which only the 8-bit integer
figures were seen in print and the others are taken from secondary accounts. A multiply-accumulate is a multiplication
and an addition to a 32-bit sum, as matrix units do it. No first-party figure for FP8, FP6 or FP4 is public: their
multipliers are float16's (int8's), scaled by the square of the significand's width, and marked ``estimated``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from emulation.errors import InputError, suggestion
from emulation.formats import BlockFormat, get_format
from hwmodels.cost import step_options
from hwmodels.dpsgd import demand
from hwmodels.profile import stored_bytes
from hwmodels.step import PHASES
from hwmodels.workload import Workload

PICO = 1e-12
Status = Literal["published", "secondary", "estimated"]


@dataclass(frozen=True, kw_only=True)
class Technology:
    """Picojoules of one process.

    Attributes:
        title: process and source.
        multiply: format -> picojoules of a multiplication.
        add_float32, add_int32: picojoules of an addition to the sum.
        status: how those are known.
        memory_pj_per_byte: of the memory outside the chip.
        sram_pj_per_byte: of a large on-chip memory.
        memory_status: how the two are known.
    """

    title: str
    multiply: Mapping[str, float]
    add_float32: float
    add_int32: float
    status: Status
    memory_pj_per_byte: float
    sram_pj_per_byte: float
    memory_status: Status


TECHNOLOGIES: Mapping[str, Technology] = MappingProxyType(
    {
        "45nm": Technology(
            title="45 nm, 0.9 V: Horowitz, ISSCC 2014; DDR memory",
            multiply={"int8": 0.2, "float16": 1.1, "float32": 3.7},
            add_float32=0.9,
            add_int32=0.1,
            status="published",
            memory_pj_per_byte=163.0,
            sram_pj_per_byte=12.5,
            memory_status="published",
        ),
        "7nm": Technology(
            title="7 nm: Jouppi et al., ISCA 2021, table 2; HBM2",
            multiply={"int8": 0.07, "bfloat16": 0.21, "float16": 0.34, "float32": 1.31},
            add_float32=0.38,
            add_int32=0.03,
            status="secondary",
            memory_pj_per_byte=31.8,
            sram_pj_per_byte=1.8,
            memory_status="published",
        ),
    }
)


@dataclass(frozen=True, kw_only=True)
class OperationEnergy:
    """Energy of one step by operations: no idle power, no board, no losses.

    Attributes:
        technology: title of the process and its sources.
        compute_joules: of the matrix products' operations.
        sram_joules: of their operands, each read once from on-chip memory per product.
        memory_joules: of all bytes between chip and memory.
        phases: phase -> joules of the three together.
        estimated: formats whose operations' energy is scaled from another's.
    """

    technology: str
    compute_joules: float
    sram_joules: float
    memory_joules: float
    phases: Mapping[str, float]
    estimated: tuple[str, ...]

    @property
    def joules(self) -> float:
        """All of it."""
        return self.compute_joules + self.sram_joules + self.memory_joules


def mac_picojoules(format_name: str, technology: Technology) -> tuple[float, Status]:
    """Picojoules of one multiply-accumulate in a format, and how the figure is known."""
    fmt = get_format(format_name)
    element = fmt.element if isinstance(fmt, BlockFormat) else fmt
    add = technology.add_int32 if element.is_integer else technology.add_float32
    if element.name in technology.multiply:
        return technology.multiply[element.name] + add, technology.status
    reference, width = ("int8", 8) if element.is_integer else ("float16", 11)
    significand = element.bits if element.is_integer else element.mantissa_bits + 1
    return technology.multiply[reference] * (significand / width) ** 2 + add, "estimated"


def operation_energy(
    workload: Workload, plan: Mapping[str, str], technology: str = "7nm", **options: Any
) -> OperationEnergy:
    """Sum the picojoules of a step's operations and bytes; quantization passes aside.

    Args:
        workload: the step.
        plan: layer -> format; the other layers run in the baseline.
        technology: a key of ``TECHNOLOGIES``.
        options: fields of ``StepOptions``.
    """
    if technology not in TECHNOLOGIES:
        raise InputError(f"unknown technology={technology!r}", hint=suggestion(technology, TECHNOLOGIES))
    table, chosen = TECHNOLOGIES[technology], step_options(options)
    for name in plan:
        if name not in workload.quantizable:
            raise InputError(
                f"layer {name!r} of the plan is not quantizable", hint=suggestion(name, workload.quantizable)
            )
    work = demand(workload, chosen)
    formats = [get_format(plan.get(layer.name, chosen.baseline)).name for layer in workload.layers]
    known = {name: mac_picojoules(name, table) for name in set(formats)}
    mac = np.array([known[name][0] for name in formats])[work.rows_layer] * PICO
    width = np.array([stored_bytes(name) for name in formats])[work.rows_layer]
    products = work.products
    compute = products.flops[work.product] / 2 * mac * work.repeats
    operands = products.operand_elements[work.product] * width * work.repeats
    results = products.result_bytes[work.product] * work.repeats
    sram = operands * table.sram_pj_per_byte * PICO
    memory = work.gathered(operands + results) + work.bytes
    memory_joules = memory * table.memory_pj_per_byte * PICO
    phases = (work.gathered(compute + sram) + memory_joules).sum(1)
    return OperationEnergy(
        technology=table.title,
        compute_joules=float(compute.sum()),
        sram_joules=float(sram.sum()),
        memory_joules=float(memory_joules.sum()),
        phases=dict(zip(PHASES, phases.tolist(), strict=True)),
        estimated=tuple(sorted(name for name, (_, status) in known.items() if status == "estimated")),
    )
