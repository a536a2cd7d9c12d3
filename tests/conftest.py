"""What all tests share: nothing of the user's is touched, and no test's settings reach the next one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.chromium import browser

from diffmoe.cli import main

__all__ = ["browser"]
from diffmoe.data import shapes
from diffmoe.data.pictures import PictureSpec

TINY = (
    *("--device", "cpu", "--embed_dim", "16", "--num_heads", "2", "--img_encoder_layers", "1"),
    *("--text_encoder_layers", "1", "--text_embed_dim", "8", "--max_text_len", "8"),
    *("--test_fraction", "0.7", "--val_fraction", "0.5", "--precision", "32-true"),
)
"""269 training pictures of digits and a model that takes milliseconds a step; alike on every processor."""


MATMUL: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue] - it is there
STOCK_PRECISION, THREADS = MATMUL.fp32_precision, torch.get_num_threads()


CAPTIONER = (
    *("--img_size", "16", "--in_channels", "3", "--embed_dim", "16", "--num_heads", "2", "--img_encoder_layers", "1"),
    *("--text_encoder_layers", "1", "--fusion_layers", "1", "--text_embed_dim", "8", "--max_text_len", "24"),
)
"""A model for `Captioned.folder`."""


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


@dataclass(frozen=True)
class Captioned:
    """A folder with a captions table, 24, 8 and 8 drawn scenes, and a captioner of 2 epochs: for reading only."""

    folder: Path
    pictures: list[Path]
    save_dir: Path
    model: Path
    architecture: tuple[str, ...]
    flags: tuple[str, ...]


@contextmanager
def isolated(cache: Path) -> Iterator[None]:
    """A cache of its own, and torch's global settings as they are in a fresh process."""
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.setenv("DIFFMOE_CACHE", str(cache))
        patch.setenv("OMP_NUM_THREADS", str(THREADS))  # or a run would look at what else the machine does
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


@pytest.fixture(scope="session")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Captioned:
    """A trained captioner that many tests share."""
    root = tmp_path_factory.mktemp("captions")
    folder = root / "drawn"
    folder.mkdir()
    rows = []
    for number, scene in enumerate(shapes.scenes("train")[:40]):
        picture = shapes.draw(scene, PictureSpec(20, 3))
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
        split = "train" if number < 24 else "validation" if number < 32 else "test"
        rows.append({"image": f"{number}.png", "captions": shapes.captions_of(scene), "split": split})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    save_dir = root / "checkpoints"
    flags = (*CAPTIONER, "--device", "cpu", "--epochs", "2", "--batch_size", "8", "--preset", "tiny")
    flags += ("--precision", "32-true")
    with isolated(root / "cache"):
        assert main(["train", "--dataset", str(folder), "--save_dir", str(save_dir), *flags]) == 0
    return Captioned(folder, sorted(folder.glob("*.png")), save_dir, save_dir / "drawn_model.pth", CAPTIONER, flags)


Draw = Callable[[], Image.Image]


def noise(mode: str, *shape: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)).convert(mode)


PICTURES: dict[str, Draw] = {
    "grey.png": lambda: noise("L", 8, 8),
    "colour.jpg": lambda: noise("RGB", 20, 30, 3),
    "alpha.png": lambda: noise("RGBA", 9, 9, 4),
    "big.jpg": lambda: noise("RGB", 1500, 2000, 3),
}


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Pictures of every kind, and beside them two that are none: `corrupt.png` and `half.jpg`."""
    folder = tmp_path_factory.mktemp("drawn")
    for name, draw in PICTURES.items():
        draw().save(folder / name)
    (folder / "corrupt.png").write_bytes(b"no picture at all")
    (folder / "half.jpg").write_bytes((folder / "big.jpg").read_bytes()[:9000])
    return [folder / name for name in PICTURES]


@pytest.fixture
def flowers(tmp_path: Path) -> Path:
    """A set of two classes, 12 grey pictures each."""
    for kind, shade in (("rose", 60), ("tulip", 200)):
        folder = tmp_path / "flowers" / "train" / kind
        folder.mkdir(parents=True)
        for number in range(12):
            Image.new("L", (8, 8), shade + number).save(folder / f"{number}.png")
    return tmp_path / "flowers"
