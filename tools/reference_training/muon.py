"""Muon in float32, matrices of one shape together.

The same update as `torch.optim.Muon` (momentum, Newton-Schulz, the step matched to AdamW's), which runs
one matrix at a time and in bfloat16: for this model that was 27 % of a training step, by a sampling
profiler, on CPU cores without bfloat16 matrix instructions.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_A, _B, _C = 3.4445, -4.7750, 2.0315  # Newton-Schulz coefficients of Keller Jordan's Muon, as in torch


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of matrices `[n, rows, columns]` towards one by Newton-Schulz iterations."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz, for 2-D parameters; options as in `torch.optim.Muon`."""

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
    ) -> None:
        """Take groups of 2-D parameters."""
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append((p, p.grad))
            for shape, pairs in shapes.items():
                updates = []
                for p, grad in pairs:
                    buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                    buffer.lerp_(grad, 1 - group["momentum"])
                    updates.append(grad.lerp(buffer, group["momentum"]))
                step = 0.2 * max(shape) ** 0.5 * group["lr"]
                for (p, _), update in zip(pairs, orthogonalise(torch.stack(updates)), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=step)
