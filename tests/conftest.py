"""What all tests share: nothing of the user's is touched, and no test's settings reach the next one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from diffmoe.cli import main

TINY = (
    *("--device", "cpu", "--embed_dim", "16", "--num_heads", "2", "--img_encoder_layers", "1"),
    *("--text_encoder_layers", "1", "--text_embed_dim", "8", "--max_text_len", "8"),
    *("--test_fraction", "0.7", "--val_fraction", "0.5"),
)
"""269 training pictures of digits and a model that takes milliseconds a step."""


MATMUL: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue] - it is there
STOCK_PRECISION, THREADS = MATMUL.fp32_precision, torch.get_num_threads()


@dataclass(frozen=True)
class Result:
    """What a command did."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Trained:
    """A run of digits, 2 epochs: for reading only."""

    save_dir: Path
    model: Path
    flags: tuple[str, ...]


@contextmanager
def isolated(cache: Path) -> Iterator[None]:
    """A cache of its own, and torch's global settings as they are in a fresh process."""
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.setenv("DIFFMOE_CACHE", str(cache))
        MATMUL.fp32_precision = STOCK_PRECISION
        yield
    MATMUL.fp32_precision = STOCK_PRECISION
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def isolation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Every test is `isolated`."""
    with isolated(tmp_path_factory.mktemp("cache")):
        yield


@pytest.fixture(scope="session")
def isolate() -> Callable[[Path], AbstractContextManager[None]]:
    """`isolated`, for fixtures that outlive a test."""
    return isolated


@pytest.fixture
def data_dir() -> Path:
    """The real datasets, beside the checkout."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the real datasets are not there: {folder}")
    return folder


@pytest.fixture(scope="session")
def tiny_flags() -> list[str]:
    """The flags of a run on digits that takes a second."""
    return list(TINY)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run a command in this process."""

    def call(*argv: object) -> Result:
        capsys.readouterr()
        code = main([str(word) for word in argv])
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return call


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A trained model that many tests share."""
    folder = tmp_path_factory.mktemp("trained")
    save_dir = folder / "checkpoints"
    with isolated(folder / "cache"):
        assert main(["train", *TINY, "--epochs", "2", "--lr", "0.003", "--save_dir", str(save_dir)]) == 0
    return Trained(save_dir, save_dir / "digits_model.pth", (*TINY, "--epochs", "2", "--lr", "0.003"))


@pytest.fixture
def own_run(trained: Trained, tmp_path: Path) -> Trained:
    """A copy of `trained` that a test may change."""
    save_dir = tmp_path / "own" / "checkpoints"
    shutil.copytree(trained.save_dir, save_dir)
    return Trained(save_dir, save_dir / trained.model.name, trained.flags)


@pytest.fixture
def snapshot() -> Callable[[Path], dict[str, bytes | None]]:
    """A function that reads a folder: every file's bytes, None for a folder."""

    def read(folder: Path) -> dict[str, bytes | None]:
        paths = sorted(folder.rglob("*"))
        return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}

    return read
