"""Devices and processes: how a run is launched, and what all ranks must know or decide together."""

from __future__ import annotations

from typing import Literal, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from diffmoe.config import RunConfig, UserError
from diffmoe.hardware import pick_device


def make_fabric(run: RunConfig) -> Fabric:
    """A launched Fabric: device, processes, precision. Raises `UserError` where this machine has not so many."""
    device = pick_device(run.device)
    if device.type == "mps" and run.num_devices > 1:
        raise UserError(f"num_devices is {run.num_devices}: on mps it must be 1")
    num_present = torch.cuda.device_count() if device.type == "cuda" else run.num_devices
    if run.num_devices > num_present:
        raise UserError(f"num_devices is {run.num_devices}: this machine has {num_present}")
    precision = run.precision if run.precision != "auto" else best_precision(device)
    fabric = Fabric(accelerator=device.type, devices=run.num_devices, strategy=run.strategy, precision=precision)
    fabric.launch()
    return fabric


def best_precision(device: torch.device) -> Literal["bf16-mixed", "32-true"]:
    """bf16-mixed on a GPU that computes in bfloat16 itself, and does not only emulate it; else 32-true."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16-mixed" if has_bf16 else "32-true"


def total(fabric: Fabric, value: Tensor, mean: bool = False) -> Tensor:
    """The sum (or mean) of a tensor over all ranks; all of them must ask."""
    if fabric.world_size == 1:
        return value
    own = value.to(fabric.device, copy=True)  # which it reduces in place
    return cast(Tensor, fabric.all_reduce(own, reduce_op="mean" if mean else "sum"))


def any_of(fabric: Fabric, *flags: bool) -> list[bool]:
    """For each flag whether any rank has it set; all of them must ask."""
    if fabric.world_size == 1:
        return list(flags)
    return (total(fabric, torch.tensor(flags, dtype=torch.float32)) > 0).tolist()


def share_buffers(fabric: Fabric, model: nn.Module) -> None:
    """Give all ranks the first one's buffers: BatchNorm's statistics are each rank's own."""
    if fabric.world_size > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)


def whole_state(fabric: Fabric, model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the whole model, on the first rank; all ranks must ask, as parameters may be spread."""
    if fabric.world_size == 1:
        return model.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, Tensor], get_model_state_dict(model, options=options))
