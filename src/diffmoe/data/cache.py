"""Decoded sets on disk, as safetensors: the second start maps them into memory instead of decoding again."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch
from torch import Tensor

from diffmoe.config import UserError, expanded
from diffmoe.data.pictures import PictureSpec
from diffmoe.files import write_atomically

log = logging.getLogger(__name__)

FORMAT_VERSION = 2
"""Part of every file's name: raise it when decoding or the layout changes, and old files are no longer read."""
CHECKSUM = "xxh3"
"""Name in a file's metadata. Of all that is in it: 0.01 s for CIFAR-10, of 0.4 that opening takes (CRC-32: 0.08 s)."""


def cache_dir() -> Path:
    """`$DIFFMOE_CACHE`, or `~/.cache/diffmoe`; of a user without a home one where nothing can be written."""
    try:
        return Path(expanded(os.environ.get("DIFFMOE_CACHE") or "~/.cache/diffmoe"))
    except UserError:
        return Path(os.devnull, "diffmoe")


def cache_path(fingerprint: str, spec: PictureSpec) -> Path:
    """The file of a set with this content, decoded to this size."""
    return cache_dir() / f"{fingerprint}-{spec.size}x{spec.size}x{spec.channels}-v{FORMAT_VERSION}.safetensors"


def read_cache(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Tensors, mapped from the file, and metadata; None where absent, damaged, or not as it was written."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
        written = metadata.pop(CHECKSUM, None)  # none: of an earlier version
        if written not in (None, _checksum(tensors, metadata)):
            raise ValueError("its checksum does not hold")
        return tensors, metadata
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, ValueError) as error:
        log.warning("%s is damaged and is made again (%s)", path, error)
        return None


def write_cache(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write all or nothing. A cache that cannot be written costs a warning line, not the run."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    content = {**metadata, CHECKSUM: _checksum(tensors, metadata)}
    try:
        write_atomically(path, lambda unfinished: save_file(tensors, unfinished, content))
    except (SafetensorError, UserError) as error:
        log.warning("the decoded pictures are not cached: %s; set DIFFMOE_CACHE to a folder that can be", error)


def _checksum(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """XXH3 of all that is in a file, in hex digits."""
    from xxhash import xxh3_64

    digest = xxh3_64(repr(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
