"""Decoded sets on disk, as safetensors: the second start maps them into memory instead of decoding again."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from torch import Tensor

from diffmoe.config import UserError
from diffmoe.data.pictures import PictureSpec
from diffmoe.files import write_atomically

log = logging.getLogger(__name__)

FORMAT_VERSION = 2
"""Part of every file's name: raise it when decoding or the layout changes, and old files are no longer read."""


def cache_dir() -> Path:
    """`$DIFFMOE_CACHE`, or `~/.cache/diffmoe`; of a user without a home one where nothing can be written."""
    try:
        return Path(os.environ.get("DIFFMOE_CACHE") or "~/.cache/diffmoe").expanduser()
    except RuntimeError:
        return Path(os.devnull, "diffmoe")


def cache_path(fingerprint: str, spec: PictureSpec) -> Path:
    """The file of a set with this content, decoded to this size."""
    return cache_dir() / f"{fingerprint}-{spec.size}x{spec.size}x{spec.channels}-v{FORMAT_VERSION}.safetensors"


def read_cache(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Tensors (mapped from the file, so that unused ones cost nothing) and metadata; None where absent or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError) as error:
        log.warning("%s is damaged and is made again (%s)", path, error)
        return None


def write_cache(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write all or nothing. A cache that cannot be written costs a warning line, not the run."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        write_atomically(path, lambda unfinished: save_file(tensors, unfinished, metadata))
    except (SafetensorError, UserError) as error:
        log.warning("the decoded pictures are not cached: %s; set DIFFMOE_CACHE to a folder that can be", error)
