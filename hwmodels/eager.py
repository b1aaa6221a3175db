"""What an eager framework adds to the chip's own work: slower kernels, and a host that launches them one by one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EagerCosts:
    """The constants of eager PyTorch on one host; a profile's ``eager`` block replaces them.

    The defaults were fitted to steps of ResNet-18 and of two small networks on an H200 (``benchmarks/predicted.py
    --fit`` has the fit, and its error on steps that it had not seen).

    Attributes:
        product_efficiency: how fast convolutions run beside the fitted GEMMs of their sizes.
        pass_efficiency: how much of the fitted bandwidth norms and elementwise kernels reach.
        kernel_s: of the host, per kernel: Python, autograd and launch.
        step_s: of the host, per step.
        hooks_layer_s, ghost_layer_s, bookkeeping_layer_s: of the host, per layer with parameters: the hooks of private
            training.
        overlap: exponent p of ``(host^p + device^p)^(1/p)``: infinity takes the longer of the two, as if one of them
            were ahead all the time; lower, each waits for the other in some part of the step.
    """

    product_efficiency: float = 0.679
    pass_efficiency: float = 0.81
    kernel_s: float = 17.9e-6
    step_s: float = 1.2e-3
    hooks_layer_s: float = 0.542e-3
    ghost_layer_s: float = 0.706e-3
    bookkeeping_layer_s: float = 0.262e-3
    overlap: float = 2.07

    def layer_s(self, clipping: str) -> float:
        """Host seconds per layer with parameters for a way of clipping; ``mixed`` is taken for ``ghost``."""
        found: float = getattr(self, f"{'ghost' if clipping == 'mixed' else clipping}_layer_s")
        return found

    def step_seconds(self, host_s: float, device_s: float) -> float:
        """Seconds of a step whose host and device take so long each."""
        longer, shorter = max(host_s, device_s), min(host_s, device_s)
        return longer * (1 + (shorter / longer) ** self.overlap) ** (1 / self.overlap) if longer > 0 else 0.0


EAGER = EagerCosts()
