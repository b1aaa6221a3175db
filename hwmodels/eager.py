"""What an eager framework adds to the chip's own work: slower kernels, and a host that launches them one by one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EagerCosts:
    """The constants of eager PyTorch on one host; a profile's ``eager`` block replaces them.

    The defaults were fitted to steps of ResNet-18 and of two small networks on an H200 (``benchmarks/predicted.py
    --fit`` has the fit, and its error on steps that it had not seen).

    Attributes:
        float32_efficiency, tfloat32_efficiency, bfloat16_efficiency: how fast products, most of them convolutions, run
            beside the fitted GEMMs of their sizes, in these formats and (the last) all narrower ones.
        pass_efficiency: how much of the fitted bandwidth norms and elementwise kernels reach.
        kernel_s: of the host, per kernel: Python, autograd and launch.
        step_s: of the host, per step.
        hooks_layer_s, ghost_layer_s, bookkeeping_layer_s: of the host, per layer with parameters: the hooks of private
            training.
        replay_s: of the host, per step whose kernels are replayed as a graph.
        overlap: exponent p of ``(host^p + device^p)^(1/p)``: infinity takes the longer of the two, as if one of them
            were ahead all the time; lower, each waits for the other in some part of the step.
    """

    float32_efficiency: float = 0.707
    tfloat32_efficiency: float = 0.607
    bfloat16_efficiency: float = 1.1
    pass_efficiency: float = 1.07
    kernel_s: float = 19.5e-6
    step_s: float = 2.27e-3
    hooks_layer_s: float = 0.544e-3
    ghost_layer_s: float = 0.755e-3
    bookkeeping_layer_s: float = 0.259e-3
    replay_s: float = 1.01e-3
    overlap: float = 2.93

    def product_efficiency(self, format_name: str) -> float:
        """How fast products of a format run beside the fitted GEMMs of their sizes."""
        own = {"float32": self.float32_efficiency, "tfloat32": self.tfloat32_efficiency}
        return own.get(format_name, self.bfloat16_efficiency)

    def layer_s(self, clipping: str) -> float:
        """Host seconds per layer with parameters for a way of clipping; ``mixed`` is taken for ``ghost``."""
        found: float = getattr(self, f"{'ghost' if clipping == 'mixed' else clipping}_layer_s")
        return found

    def step_seconds(self, host_s: float, device_s: float) -> float:
        """Seconds of a step whose host and device take so long each."""
        longer, shorter = max(host_s, device_s), min(host_s, device_s)
        return longer * (1 + (shorter / longer) ** self.overlap) ** (1 / self.overlap) if longer > 0 else 0.0


EAGER = EagerCosts()
