"""Decoded sets on disk, as safetensors: the second start maps them into memory instead of decoding again."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

from torch import Tensor

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Part of every file's name: raise it when decoding or the layout changes, and old files are no longer read."""


def cache_dir() -> Path:
    """`$DIFFMOE_CACHE`, or `~/.cache/diffmoe`."""
    return Path(os.environ.get("DIFFMOE_CACHE") or "~/.cache/diffmoe").expanduser()


def cache_path(fingerprint: str, *, img_size: int, in_channels: int) -> Path:
    """The file of a set with this content, decoded to this size."""
    return cache_dir() / f"{fingerprint}-{img_size}x{img_size}x{in_channels}-v{FORMAT_VERSION}.safetensors"


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

    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, metadata)
        partial.replace(path)
    except (SafetensorError, OSError) as error:
        log.warning("cannot cache the decoded pictures in %s (%s): set DIFFMOE_CACHE", path.parent, error)
        with contextlib.suppress(OSError):  # a full disk leaves a part of it, a read-only one nothing
            partial.unlink()
