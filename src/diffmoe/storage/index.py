"""A searchable index of a gallery: the embeddings of pictures or texts, in a file, and who made it of what.

Shapes: N items of the gallery, Q queries, D width, K results.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffmoe.config import UserError
from diffmoe.files import write_atomically

INDEX_FORMAT = "diffmoe-index-1"

Embedded = Literal["pictures", "texts"]


@dataclass(frozen=True)
class Index:
    """A gallery, embedded. Raises `ValueError` where the fields do not fit each other."""

    embeddings: Tensor
    """float32 (N, D) on the CPU, of unit norm."""
    items: tuple[str, ...]
    """For each row what was embedded: a picture's name, or the text."""
    kind: Embedded
    model: str
    """`model_fingerprint` of the model that embedded."""
    gallery: str
    """`gallery_fingerprint` of what was embedded."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Embedded):
            raise ValueError(f"the kind is {self.kind!r}: it must be one of {', '.join(get_args(Embedded))}")
        if self.embeddings.dtype != torch.float32 or self.embeddings.dim() != 2:
            raise ValueError(
                f"the embeddings are {self.embeddings.dtype} {tuple(self.embeddings.shape)}, not float32 2D"
            )
        if not 0 < len(self.items) == len(self.embeddings):
            raise ValueError(f"there are {len(self.embeddings)} embeddings for {len(self.items)} items")
        if not ((self.embeddings.norm(dim=1) - 1).abs() < 1e-3).all():  # also where one is not a number
            raise ValueError("the embeddings are not of unit norm")

    def search(self, queries: Tensor, top: int) -> tuple[Tensor, Tensor]:
        """The `top` rows most similar to each query (all of them where there are fewer), the best first.

        Among equals the earlier row comes first.

        Args:
            queries: float (Q, D), of any norm.
            top: at least 1.

        Returns:
            Cosine similarities, float32 (Q, K), and rows, int64 (Q, K); K = min(top, N).
        """
        if top < 1:
            raise ValueError(f"top is {top}: it must be at least 1")
        similarity_QN = F.normalize(queries.float().cpu(), dim=-1) @ self.embeddings.T
        scores_QN, rows_QN = similarity_QN.sort(dim=-1, descending=True, stable=True)
        return scores_QN[:, :top], rows_QN[:, :top]

    def check(self, path: Path, *, model: str, gallery: str) -> None:
        """Raises `UserError` naming `path`, the index's file, where another model or another gallery made it."""
        for found, wanted, made in ((self.model, model, "by another model"), (self.gallery, gallery, "of other data")):
            if found != wanted:
                raise UserError(f"index {path} was made {made}: remove it or give --overwrite")

    def save(self, path: Path) -> None:
        """Write as safetensors, all or nothing. Raises `UserError` where it cannot be written."""
        from safetensors.torch import save

        # As a tensor, because a header, where metadata is, ends at 100 MB; ASCII carries names that are no UTF-8 too.
        items = torch.frombuffer(bytearray(json.dumps(self.items), "ascii"), dtype=torch.uint8)
        tensors = {"embeddings": self.embeddings.contiguous(), "items": items}
        metadata = {"format": INDEX_FORMAT, "kind": self.kind, "model": self.model, "gallery": self.gallery}
        # Through memory: safetensors reports a full disk as a failure of its own.
        content = save(tensors, metadata)
        write_atomically(path, lambda unfinished: unfinished.write_bytes(content))

    @classmethod
    def load(cls, path: Path) -> Self:
        """The index in a file. Raises `UserError` naming `path` where it is not there, damaged, or something else."""
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            raise UserError(f"index {path} does not exist")
        try:
            with safe_open(path, framework="pt") as file:
                about: dict[str, Any] = file.metadata() or {}
                if about.pop("format", None) != INDEX_FORMAT:
                    raise ValueError(f"it is not a {INDEX_FORMAT} file")
                items = json.loads(file.get_tensor("items").numpy().tobytes())
                return cls(embeddings=file.get_tensor("embeddings"), items=tuple(items), **about)
        except (SafetensorError, OSError, TypeError, ValueError) as error:
            raise UserError(f"index {path} is damaged or is not an index: remove it or give --overwrite") from error


def model_fingerprint(model: nn.Module) -> str:
    """What tells a model from another: 32 hex digits of the SHA-256 of its weights' names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def gallery_fingerprint(items: Sequence[str], files: Sequence[Path] = ()) -> str:
    """What tells a gallery from another: 32 hex digits of its items in their order, and its files' sizes and times.

    Raises `UserError` naming a file that cannot be read.
    """
    try:
        states = [(state.st_size, state.st_mtime_ns) for state in (path.stat() for path in files)]
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error
    return hashlib.sha256(json.dumps([list(items), states]).encode()).hexdigest()[:32]
