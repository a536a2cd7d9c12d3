"""What the tests of the page share: models of random weights, a gallery, and one page that is served to all."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffmoe.app.answers import Answers
from diffmoe.app.models import Models
from diffmoe.config import ModelConfig
from diffmoe.data.captions import used_tokens
from diffmoe.data.text import tokenize
from diffmoe.model.captioner import Captioner
from diffmoe.model.heads import ImageClassifier
from diffmoe.storage.model_files import DataInfo, save_model

CONFIG = ModelConfig(
    img_size=16,
    patch_size=4,
    in_channels=3,
    embed_dim=16,
    num_heads=2,
    img_encoder_layers=3,
    text_encoder_layers=1,
    fusion_layers=1,
    text_embed_dim=8,
    max_text_len=8,
    num_classes=3,
    dropout=0.0,
)
NAMES = ("cat", "dog", "cow")
INFO = DataInfo("animals", NAMES, (0.5,) * 3, (0.25,) * 3, 0.1, 0.1, 0)


def tokens(names: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = tokenize(list(names), CONFIG.max_text_len)
    return ids[:, None], mask[:, None]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, isolate: Callable[[Path], AbstractContextManager[None]]) -> Path:
    """`models` of random weights, of each kind; a `gallery` with folders, beside it a `secret`; a `picture.png`."""
    folder = tmp_path_factory.mktemp("app")
    with isolate(folder / "cache"):
        torch.manual_seed(0)
        models = {
            "classifier": ImageClassifier(CONFIG, *tokens(NAMES)),
            "dense": ImageClassifier(replace(CONFIG, dense=True), *tokens(NAMES)),
            "no_text": ImageClassifier(CONFIG),
        }
        for name, model in models.items():
            save_model(folder / "models" / f"{name}.pth", model, INFO)
        captioner = Captioner(CONFIG, used_tokens(*tokenize(["a cat and a dog"], CONFIG.max_text_len)))
        save_model(folder / "models" / "captioner.pth", captioner, replace(INFO, class_names=()))
    generator = np.random.default_rng(0)
    for name in ("picture.png", "secret/key.png", *(f"gallery/{n % 2}/{n}.jpg" for n in range(12))):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(generator.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(folder / name)
    (folder / "gallery" / "empty").mkdir()
    (folder / "gallery" / "0" / "link.png").symlink_to(folder / "secret" / "key.png")
    (folder / "gallery" / "way_out").symlink_to(folder / "secret")
    return folder


@pytest.fixture
def picture(folder: Path) -> str:
    return str(folder / "picture.png")


@pytest.fixture(scope="session")
def answers(folder: Path) -> Answers:
    """What the page must answer."""
    return Answers(Models([], folder / "models", "cpu"), (folder / "gallery").resolve(), folder.resolve())


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """A function that finds a port on which nobody listens."""

    def find() -> int:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            return listener.getsockname()[1]

    return find


@pytest.fixture(scope="session")
def served(folder: Path, free_port: Callable[[], int]) -> Iterator[str]:
    """The address of a page that the command serves, in a process of its own; when that ends no upload is left."""
    pytest.importorskip("gradio", reason="gradio is not there: pip install 'diff-moe[app]'")
    port = free_port()
    command = [
        sys.executable,
        "-c",
        "from diffmoe.cli import main; main()",
        "app",
        "--port",
        str(port),
        "--device",
        "cpu",
    ]
    command += ["--checkpoints_dir", str(folder / "models"), "--gallery", str(folder / "gallery")]
    uploads = folder / "uploads"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GRADIO_TEMP_DIR": str(uploads)}
    settings: dict[str, Any] = {"text": True, "cwd": folder, "env": environment}
    with (
        (folder / "log.txt").open("w") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, **settings) as server,
    ):
        try:
            assert server.stdout
            line = server.stdout.readline()
            assert line.startswith(f"open http://127.0.0.1:{port} "), (folder / "log.txt").read_text()
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
    assert not list(uploads.iterdir())


@pytest.fixture
def log(served: str, folder: Path) -> Path:
    """What the served page writes to stderr."""
    return folder / "log.txt"
