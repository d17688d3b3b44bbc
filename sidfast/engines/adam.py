"""Adam as the engines use it: without a first moment where it is the gradient anyway, and with a look at gradients.

With beta1 = 0 (method.md, section 8) the first moment, its bias corrected, is the gradient itself:

    v <- beta2 v + (1 - beta2) g^2        w <- w - lr g / (sqrt(v / (1 - beta2^t)) + eps)
"""

import math
from collections.abc import Sequence

import torch


def total_norm(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """The norm of all gradients together, a float64 scalar on their device. (PyTorch's fp32 norm of millions of numbers
    on a CPU is off by some 1e-4.)"""
    return torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients]).norm()


class SecondMomentAdam(torch.optim.Adam):
    """Adam with beta1 = 0, bit for bit, that keeps "step" and "exp_avg_sq" alone: 4 bytes a parameter less in fp32.

    For a step, the gradient itself stands in the first moment's place. PyTorch's fused kernels go through all tensors
    together, need no memory of their own, and write to that place what they have just read there: the gradient.
    """

    def __init__(self, params, lr, beta2, eps):
        super().__init__(params, lr=lr, betas=(0.0, beta2), eps=eps, fused=True)

    @torch.no_grad()
    def step(self) -> None:
        """One step of the parameters that have a gradient."""
        stepped = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p in stepped:
            state = self.state[p]
            if not state:                                # (PyTorch's way to begin would make a first moment)
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["exp_avg_sq"] = torch.zeros_like(p)
            state["exp_avg"] = p.grad
        try:
            super().step()
        finally:
            for p in stepped:
                del self.state[p]["exp_avg"]


class Checked:
    """Before an Adam among a class's bases: leaves out an update whose gradient is not finite, and tells DeepSpeed so
    (`overflow`).

    For the one case where DeepSpeed hands gradients straight to the optimizer: ZeRO stage 0 in fp32. Gradients are
    reduced already, so every process decides alike.
    """

    param_groups: list[dict]
    overflow = False
    _global_grad_norm: float | None = None                             # for the engine's get_global_grad_norm

    def step(self) -> None:
        """One step, or none."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self._global_grad_norm = float(total_norm(gradients))
        self.overflow = not math.isfinite(self._global_grad_norm)
        if not self.overflow:
            super().step()


class CheckedAdam(Checked, torch.optim.Adam):
    """PyTorch's Adam, checked."""


class CheckedSecondMomentAdam(Checked, SecondMomentAdam):
    """SecondMomentAdam, checked."""
