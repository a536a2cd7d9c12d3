"""Devices and processes: how a run is launched, and what all ranks must know or decide together."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, TypeVar, cast

import torch
from lightning_fabric import Fabric
from lightning_fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn

from diffmoe.config import RunConfig, UserError
from diffmoe.hardware import has_bfloat16, pick_device

OBSERVER = "lightning_fabric.strategies.launchers.subprocess_script"
TRIAL_PROCESSES = 8
"""On a processor a run may have one for each core, or so many: to try out what is meant for more."""


def make_fabric(run: RunConfig) -> Fabric:
    """A launched Fabric: device, processes, precision. Raises `UserError` where this machine has not so many."""
    device = pick_device(run.device)
    if device.type == "mps" and run.num_devices > 1:
        raise UserError(f"num_devices is {run.num_devices}: on mps it must be 1")
    num_present = torch.cuda.device_count() if device.type == "cuda" else max(TRIAL_PROCESSES, os.cpu_count() or 1)
    if run.num_devices > num_present:
        raise UserError(f"num_devices is {run.num_devices}: this machine has {num_present}")
    precision = run.precision if run.precision != "auto" else best_precision(device)
    # Before it is made: it would tell the number format, which the run tells itself.
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    logging.getLogger(OBSERVER).setLevel(logging.INFO)  # it says so before it ends a run whose process was lost
    fabric = Fabric(accelerator=device.type, devices=run.num_devices, strategy=run.strategy, precision=precision)
    fabric.launch()
    return fabric


def best_precision(device: torch.device) -> Literal["bf16-mixed", "32-true"]:
    """bf16-mixed where bfloat16 is fast: on most GPUs, on a processor with AMX; else 32-true."""
    return "bf16-mixed" if has_bfloat16(device) else "32-true"


Result = TypeVar("Result")


def together(fabric: Fabric, do: Callable[[], Result], first_alone: bool = False) -> Result:
    """What `do` returns. Where it raises `UserError` on any rank, all raise it, and the first one tells of it.

    With `first_alone` the first rank is done before the others begin.
    """
    result: Any = None
    mistake: UserError | None = None
    with fabric.rank_zero_first() if first_alone else nullcontext():
        try:
            result = do()
        except UserError as error:
            mistake = error
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        mistakes: list[Any] = [None] * fabric.world_size
        torch.distributed.all_gather_object(mistakes, mistake and str(mistake))
        first = next(filter(None, mistakes), None)
        mistake = first and UserError(first)
    if mistake is not None:
        mistake.told = not fabric.is_global_zero
        raise mistake
    return result


@contextmanager
def one_ends_all(fabric: Fabric) -> Iterator[None]:
    """Around what all ranks do: of a mistake that all meet the first one tells; a lost rank is a `UserError`, too."""
    try:
        yield
    except UserError as error:
        if error.told is None:
            error.told = not fabric.is_global_zero
        raise
    except RuntimeError as error:  # torch.distributed.DistError among them, where the backend raises that
        if fabric.world_size == 1 or not _is_of_connection(error):
            raise
        raise UserError(
            f"another of the {fabric.world_size} processes of this run has ended (it was killed, or says why itself): "
            "what was saved last stays, and --resume goes on from there"
        ) from error


def _is_of_connection(error: RuntimeError) -> bool:
    words = ("connection", "timed out", "broken pipe", "remote process", "socket", "monitoredbarrier", "gloo", "nccl")
    return any(word in str(error).lower() for word in words)


def is_first_process() -> bool:
    """Of the run that was launched last, or the only one."""
    return getattr(rank_zero_only, "rank", 0) == 0


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
