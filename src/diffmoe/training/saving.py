"""All that an exact resume needs, written and put back; and the best model beside it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from diffmoe.config import UserError
from diffmoe.storage.model_files import DataInfo, check_finite, read, save_model, write
from diffmoe.storage.run_files import RunFiles
from diffmoe.training.loop import Progress
from diffmoe.training.objective import Trainee
from diffmoe.training.parallel import whole_state

RUN_FORMAT = "diffmoe-run-2"


@dataclass
class Saver:
    """Saves a run: the model where it is the best so far, and all that an exact resume needs."""

    files: RunFiles
    trainee: Trainee
    info: DataInfo
    shared: Mapping[str, Any]
    """What a resumed run must have in common with this one, by name: settings, precision, the data."""
    is_first: bool
    """Nothing of this run is saved yet; its first files replace those of an earlier run."""

    def save(self, progress: Progress) -> None:
        """Every rank must call it. The model comes first: a `last.ckpt` that is ahead would never write it again."""
        fabric, model = self.trainee.fabric, self.trainee.model
        state = whole_state(fabric, model)
        place = self.files.replacing() if self.is_first and fabric.is_global_zero else nullcontext(self.files)
        with place as files:
            if progress.is_best and fabric.is_global_zero:
                save_model(files.model, model, self.info, state)
            save_run(files.last, self.trainee, progress, self.shared, state)
        self.is_first = False


def save_run(
    path: Path, trainee: Trainee, progress: Progress, shared: Mapping[str, Any], state: Mapping[str, torch.Tensor]
) -> None:
    """Write `last.ckpt`; every rank must call it. `state` is the whole model's."""
    fabric = trainee.fabric
    states = {
        "format": RUN_FORMAT,
        "shared": dict(shared),
        "model": dict(state),
        "optimizer": trainee.optimizer.state_dict(),
        "progress": dict(vars(progress)),
        "rng": fabric.all_gather(_rng_state(fabric)),
    }
    if fabric.is_global_zero:
        write(path, states)
    fabric.barrier()


def load_run(path: Path, trainee: Trainee, shared: Mapping[str, Any]) -> Progress:
    """Put back what `save_run` wrote. Raises `UserError` where what both must share differs, or the file is damaged."""
    states = read(path, RUN_FORMAT)
    try:
        return _put_back(path, states, trainee, shared)
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError, IndexError) as error:
        reason = f"{type(error).__name__} {' '.join(str(error).split())[:200]}"
        raise UserError(f"checkpoint {path} is damaged ({reason}): begin anew with --overwrite") from error


def _put_back(path: Path, states: dict[str, Any], trainee: Trainee, shared: Mapping[str, Any]) -> Progress:
    for name, value in shared.items():
        former = states["shared"].get(name)
        if former == value:
            continue
        if name == DATA:
            raise UserError(
                f"resume: the data is not what the run in {path} began with (its classes, labels, captions or pictures "
                "differ): bring that back, or begin anew with --overwrite"
            )
        raise UserError(f"resume: {name} is {value!r} but was {former!r} in {path}: give the flags it began with")
    fabric = trainee.fabric
    trainee.model.load_state_dict(states["model"])
    check_finite(path, states["model"])
    trainee.optimizer.load_state_dict(states["optimizer"])
    rng = states["rng"].view(-1, states["rng"].shape[-1])
    if len(rng) != fabric.world_size:
        raise UserError(f"resume: {path} was written by {len(rng)} devices, not {fabric.world_size}")
    _set_rng_state(fabric, rng[fabric.global_rank])
    return Progress.of(states["progress"])


DATA = "data"
"""The name in `shared` of the data's fingerprint."""


def _rng_state(fabric: Fabric) -> torch.Tensor:
    """The generators of this rank, the processor's and its GPU's, as one row of bytes."""
    state = torch.get_rng_state()
    if fabric.device.type == "cuda":
        state = torch.cat([state, torch.cuda.get_rng_state(fabric.device)])
    return state.to(fabric.device)


def _set_rng_state(fabric: Fabric, state: torch.Tensor) -> None:
    size = len(torch.get_rng_state())
    torch.set_rng_state(state[:size].cpu())
    if fabric.device.type == "cuda":
        torch.cuda.set_rng_state(state[size:].cpu(), fabric.device)
