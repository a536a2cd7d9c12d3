"""Muon: matrices are moved by the orthogonalised momentum of their gradients (Jordan et al. 2024).

Shapes: B matrices of R rows and C columns; P parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from diffmoe.hardware import has_bfloat16

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Of the polynomial a x + b x^3 + c x^5, which raises small singular values as fast as can be (Jordan et al. 2024)."""
STEPS = 5


class Muon(AdamW):
    """Muon for the parameter groups that have a `momentum`, AdamW for all others: one optimizer, as gradients are
    clipped together and saved together.

    A weight W, seen as a matrix, with gradient G: the momentum M becomes μ M + (1 - μ) G, and W is moved by
    -lr * sqrt(max(1, rows / columns)) * orthogonalized(μ M + (1 - μ) G) (Nesterov), after it was scaled by
    1 - lr * weight_decay. A convolution is a matrix of (out, in * height * width); three axes are a stack of matrices,
    such as those of the routed experts, each of which is moved as if it were alone.

    torch's own `torch.optim.Muon` takes matrices only, one at a time: no stack of experts and no convolution, and on a
    processor without bfloat16 it is slow, as it always rounds to that.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all groups."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if "momentum" in group:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._move(parameter, parameter.grad, group)
                        parameter.grad = None  # it is used up: AdamW passes over what has none
        super().step()
        return loss

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)  # AdamW expects one of every parameter that has a state
            state["momentum"] = torch.zeros_like(parameter)
        state["step"] += 1
        momentum, decay = state["momentum"], group["momentum"]
        momentum.lerp_(gradient, 1 - decay)
        update = _matrices(gradient.lerp(momentum, decay))
        rows, columns = update.shape[-2:]
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        rate = group["lr"] * max(1, rows / columns) ** 0.5
        parameter.add_(orthogonalized(update).view_as(parameter), alpha=-rate)


def orthogonalized(matrices: Tensor) -> Tensor:
    """(..., R, C) -> about the nearest matrices whose rows (or columns, where these are fewer) are orthonormal.

    For M = U S V' that is U V'; five Newton-Schulz steps leave singular values of 0.7 to 1.2 instead of 1, which does
    as well. In bfloat16 where the device computes in it, else in the precision of `matrices`.
    """
    a, b, c = NEWTON_SCHULZ
    in_bfloat16 = matrices.dtype == torch.float32 and has_bfloat16(matrices.device)
    # The length of all entries is at least the largest singular value, which the polynomial must find at most 1.
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    x = x.bfloat16() if in_bfloat16 else x
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if is_tall else x).to(matrices.dtype)


def _matrices(weight: Tensor) -> Tensor:
    return weight if weight.dim() == 3 else weight.flatten(1)
