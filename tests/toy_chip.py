"""A chip of round numbers, so that expected times can be written down by hand."""

from types import MappingProxyType

from hwmodels.profile import FormatRate, HardwareProfile, Memory, Power


def rate(name: str, peak: float, **fields: object) -> FormatRate:
    values = {"native": True, "timed_as": name, "status": "assumed", "sources": ("hand",)} | fields
    return FormatRate(format=name, peak_flops_per_s=peak, **values)


def toy_chip(**fields: object) -> HardwareProfile:
    """100 TFLOP/s in bfloat16, twice and four times that in 8 and 4 bits, 1 TB/s, 1 TFLOP/s outside the matrix unit."""
    rates = [
        rate("float32", 10e12),
        rate("bfloat16", 100e12),
        rate("float8_e4m3fn", 200e12),
        rate("nvfp4", 400e12, layouts=("TN",)),
        rate("luq_fp4", 400e12, native=False, timed_as="nvfp4"),
        rate("mxfp8_e4m3", 100e12, native=False, timed_as="bfloat16", falls_back_to="bfloat16"),
    ]
    values: dict[str, object] = {
        "name": "toy",
        "title": "Toy",
        "vendor": "nobody",
        "family": "toy",
        "year": 2026,
        "formats": MappingProxyType({r.format: r for r in rates}),
        "memory": Memory(capacity_bytes=80e9, bandwidth_bytes_per_s=1e12),
        "cache_bytes": 50e6,
        "launch_s": 2e-6,
        "power": Power(limit_w=700, idle_w=100),
        "vector_flops_per_s": 1e12,
        "units": 100,
        "matrix_unit": None,
        "calibration": None,
        "calibrated_on": None,
        "provenance": MappingProxyType({}),
        "sources": MappingProxyType({}),
    }
    return HardwareProfile(**(values | fields))
