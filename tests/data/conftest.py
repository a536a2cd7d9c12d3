"""No test of the data sees the user's caches, and none reaches the network."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Encode = Callable[..., bytes]


@pytest.fixture(autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Our cache, the `datasets` library's beside it, and the hub offline."""
    import datasets.config
    import huggingface_hub.constants

    folder = tmp_path_factory.mktemp("caches")
    monkeypatch.setenv("DIFFMOE_CACHE", str(folder / "diffmoe"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "huggingface")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return folder


@pytest.fixture
def picture_folder(tmp_path: Path) -> Path:
    """A set in class folders: 3 classes, 10 training and 4 test pictures each, 12x10 colour PNG files."""
    root = tmp_path / "pets"
    generator = np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 4)):
        for name in ("bird", "cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (12, 10, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number:02}.png")
    return root
