"""All that an exact resume needs, written and put back; and the best model beside it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
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
from diffmoe.training.parallel import together, whole_state

RUN_FORMAT = "diffmoe-run-2"


@dataclass
class Saver:
    """Saves a run: the model where it is the best so far, and all that an exact resume needs."""

    files: RunFiles
    trainee: Trainee
    info: DataInfo
    shared: Mapping[str, Any]
    """What a resumed run must have in common with this one, by name: settings, precision, the data."""
    config: str
    """The content of `config.yaml`."""
    is_first: bool
    """Nothing of this run is saved yet; its first files replace those of an earlier run."""

    def save(self, progress: Progress) -> None:
        """Every rank must call it. The model comes first: a `last.ckpt` that is ahead would never write it again."""
        trainee, fabric = self.trainee, self.trainee.fabric
        kept = whole_state(fabric, trainee.model)
        weights: dict[str, Any] = {"model": dict(kept)}
        if trainee.averages is not None:
            kept = whole_state(fabric, trainee.averages.model)
            weights["averages"] = trainee.averages.state(kept)
        place = self.files.replacing() if self.is_first and fabric.is_global_zero else nullcontext(self.files)
        with place as files:
            best = files.model if progress.is_best and fabric.is_global_zero else None
            # Where the disk is full all end, with the first one's line.
            temperature = progress.history[-1].get("temperature", 1.0) if progress.history else 1.0
            together(fabric, lambda: best and save_model(best, trainee.evaluated, self.info, kept, temperature))
            if fabric.is_global_zero:  # of a run that goes on, too: it may have more epochs now
                files.write_config(self.config)
            save_run(files.last, trainee, progress, self.shared, weights)
        self.is_first = False


def save_run(
    path: Path, trainee: Trainee, progress: Progress, shared: Mapping[str, Any], weights: Mapping[str, Any]
) -> None:
    """Write `last.ckpt`; every rank must call it. `weights` has the whole `model`'s state, and `averages` if any."""
    fabric = trainee.fabric
    states = {
        "format": RUN_FORMAT,
        "shared": dict(shared),
        **weights,
        "optimizer": trainee.optimizer.state_dict(),
        "progress": dict(vars(progress)),
        "rng": fabric.all_gather(_rng_state(fabric)),
        "threads": torch.get_num_threads(),
    }
    together(fabric, lambda: write(path, states) if fabric.is_global_zero else None)


def load_run(path: Path, trainee: Trainee, shared: Mapping[str, Any], tell: Callable[[str], object]) -> Progress:
    """Put back what `save_run` wrote; `tell` what it means that the run is to have more epochs than it began with.

    Raises `UserError` where what both must share differs, or the file is damaged.
    """
    states = read(path, RUN_FORMAT)
    try:
        return _put_back(path, states, trainee, shared, tell)
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError, IndexError) as error:
        reason = f"{type(error).__name__} {' '.join(str(error).split())[:200]}"
        raise UserError(f"checkpoint {path} is damaged ({reason}): begin anew with --overwrite") from error


def _put_back(
    path: Path, states: dict[str, Any], trainee: Trainee, shared: Mapping[str, Any], tell: Callable[[str], object]
) -> Progress:
    for name, value in shared.items():
        former = states["shared"].get(name)
        if former == value:
            continue
        if name == DATA:
            raise UserError(
                f"resume: the data is not what the run in {path} began with (its classes, labels, captions or pictures "
                "differ): bring that back, or begin anew with --overwrite"
            )
        if name == EPOCHS and value > former and not shared["dense_fraction"]:
            done = states["progress"]["epoch"]
            tell(
                f"{former} epochs become {value}, {done} of which are done: the learning rate goes on where it "
                f"would be by now in a run of {value}, and rises again; what is learned is not what such a run learns"
            )
            continue
        raise UserError(f"resume: {name} is {value!r} but was {former!r} in {path}: give the flags it began with")
    fabric = trainee.fabric
    trainee.model.load_state_dict(states["model"])
    check_finite(path, states["model"])
    if trainee.averages is not None:
        trainee.averages.load_state(states["averages"])
        check_finite(path, states["averages"]["model"])
    trainee.optimizer.load_state_dict(states["optimizer"])
    rng = states["rng"].view(-1, states["rng"].shape[-1])
    if len(rng) != fabric.world_size:
        raise UserError(f"resume: {path} was written by {len(rng)} devices, not {fabric.world_size}")
    _set_rng_state(fabric, rng[fabric.global_rank])
    if "OMP_NUM_THREADS" not in os.environ:  # the last bit of a sum depends on how many made it
        torch.set_num_threads(states.get("threads", torch.get_num_threads()))
    return Progress.of(states["progress"])


EPOCHS = "epochs"
"""The one setting that a resumed run may have more of; but for what was split after a share of them."""
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
