"""The layers of the package: a file imports only from its left. And what an import may cost and may shadow."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

import pytest

import diffmoe

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "src" / "diffmoe"

# From left to right. A package is one part: its files may import each other, the parts of one layer may not.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("config",),
    ("files",),
    ("losses", "data"),
    ("model",),
    ("baselines",),
    ("storage", "hardware", "evaluation"),
    ("visualization", "pretrained"),
    ("tasks", "training"),
    ("inference",),
    ("report", "profiling"),
    ("runs", "app"),
    ("comparison",),
    ("commands",),
    ("cli",),
    ("__main__",),
)
LAYER_OF = {part: number for number, parts in enumerate(LAYERS) for part in parts}
# Tensors in, tensors out: the model files need nothing else.
MODEL_IMPORTS = ("torch", "einops", "diffmoe.config", "diffmoe.losses", "diffmoe.model")


def imported(source: str) -> set[str]:
    """Every name that a file imports, dotted, wherever the import stands; a `from` import with what it takes."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def is_under(name: str, *prefixes: str) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def wrong_imports(files: Mapping[str, str]) -> list[str]:
    """The imports that break the rules above, of files given as `dotted name within diffmoe -> source`."""
    wrong = []
    for file, source in files.items():
        part = file.split(".")[0]
        for name in sorted(imported(source)):
            arrow = f"{file} -> {name}"
            if name.startswith("."):
                wrong.append(f"{arrow}: write it in full")
            if is_under(name, "diffmoe"):
                target = name.split(".")[1] if "." in name else ""
                if part not in LAYER_OF or target not in LAYER_OF:
                    wrong.append(f"{arrow}: not a part that LAYERS knows")
                elif target != part and LAYER_OF[target] >= LAYER_OF[part]:
                    wrong.append(f"{arrow}: points to the right")
            top = name.split(".")[0]
            if part == "model" and top not in sys.stdlib_module_names and not is_under(name, *MODEL_IMPORTS):
                wrong.append(f"{arrow}: not for a model file")
    return wrong


def package_files() -> dict[str, str]:
    """Every file but the package's own `__init__.py`, which hands the public names out."""
    paths = {path.relative_to(SOURCES).with_suffix(""): path for path in SOURCES.rglob("*.py")}
    return {
        ".".join(name.parts): path.read_text("utf-8") for name, path in paths.items() if name.parts != ("__init__",)
    }


def test_every_file_imports_only_from_its_left() -> None:
    files = package_files()
    assert {name.split(".")[0] for name in files} == set(LAYER_OF)
    assert wrong_imports(files) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("losses", "from diffmoe.model.routing import Routing"),  # to the right
        ("data.text", "import diffmoe.losses"),  # beside it
        ("tasks.base", "from diffmoe import training"),
        ("data.text", "from diffmoe.model import layers"),  # data and model meet as tensors
        ("model.moe", "from diffmoe.data.text import tokenize"),
        ("model.moe", "import numpy as np"),
        ("model.moe", "from torchvision import ops"),
        ("training.loop", "def f():\n    from diffmoe.cli import main"),  # late imports count
        ("config.data", "if TYPE_CHECKING:\n    from diffmoe.losses import mean_probs"),
        ("evaluation.passes", "from diffmoe import MultiModalMoE"),  # the public names are for users
        ("evaluation.passes", "from .embedding import embed"),
        ("helpers", "from diffmoe.config import UserError"),  # a file that no layer has
    ],
)
def test_a_wrong_import_is_found(file: str, source: str) -> None:
    assert len(wrong_imports({file: source})) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("model.heads", "import math\nimport torch.nn.functional as F\nfrom diffmoe.model.routing import Routing"),
        ("model.heads", "from einops import rearrange\nfrom diffmoe import losses"),
        ("data.text", "import numpy\nfrom diffmoe.data.hub import load\nfrom diffmoe.config import UserError"),
        ("cli", "from diffmoe import commands"),
    ],
)
def test_a_right_import_is_not(file: str, source: str) -> None:
    assert wrong_imports({file: source}) == []


def test_the_command_line_answers_without_torch() -> None:
    code = "import sys, diffmoe.cli; print([m for m in ('torch', 'numpy', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_no_file_shadows_a_library_or_collects_odds_and_ends() -> None:
    folders = [ROOT / name for name in ("src", "tests", "benchmarks", "examples")]
    in_path = [*ROOT.glob("*.py"), *(path for folder in folders for path in folder.glob("*.py"))]
    names = {path.name for path in in_path}
    assert "main.py" in names
    assert names.isdisjoint({"datasets.py", "test.py"})  # a command may be called so: nobody imports it from the root
    everywhere = {path.name for path in chain(in_path, *(folder.rglob("*.py") for folder in folders))}
    assert everywhere.isdisjoint({"utils.py", "common.py", "helpers.py"})


def test_the_public_names_resolve_to_what_is_called_so() -> None:
    promised = {"Captioner", "ImageClassifier", "ModelConfig", "MultiModalMoE", "load_model"}
    assert promised | {"Predictor", "test", "train"} == set(diffmoe.__all__)
    for name in diffmoe.__all__:
        assert getattr(diffmoe, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Mixture'"):
        _ = diffmoe.Mixture
