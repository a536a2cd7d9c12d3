"""Rows of all processes, for a loss that compares each with all: differentiable."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed


def world_size() -> int:
    """Processes that train together; 1 where there is no process group."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def gather_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors (B, ...), of which B may differ between processes -> (sum of B, ...), in the order of the ranks.

    Every process must call it. The gradient is the sum over processes of what each has for these rows: where all
    compute the same loss and their gradients are averaged (as DDP does), that is the gradient of this one loss.
    """
    device = tensors[0].device
    counts = torch.empty(world_size(), dtype=torch.int64, device=device)
    distributed.all_gather_into_tensor(counts, torch.tensor([len(tensors[0])], device=device))
    return tuple(_RowsOfAll.apply(tensor, counts.tolist()) for tensor in tensors)


class _RowsOfAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int]) -> Tensor:
        ctx.rows = slice(sum(counts[: distributed.get_rank()]), sum(counts[: distributed.get_rank() + 1]))
        longest = max(counts)
        padded = F.pad(x, (*(0, 0) * (x.dim() - 1), 0, longest - len(x))).contiguous()
        parts = [torch.empty_like(padded) for _ in counts]
        distributed.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total[ctx.rows], None
