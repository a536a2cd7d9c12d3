"""What the READMEs say can be done, done: every command on a small set, every Python example, every link; and the
examples.
"""

from __future__ import annotations

import ast
import importlib.util
import itertools
import json
import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffmoe.config import DataConfig, recipes
from diffmoe.data import shapes
from diffmoe.data.caption_files import FLICKR_FOLDERS, FLICKR_TABLE
from diffmoe.data.loading import load_dataset
from diffmoe.data.pictures import PictureSpec
from diffmoe.data.splits import SPLIT_ALIASES

ROOT = Path(__file__).resolve().parents[1]
READMES = ("README.md", "README.zh-CN.md")
SMALL = "--embed_dim 16 --num_heads 2 --img_encoder_layers 1 --text_embed_dim 8 --epochs 1 --device cpu".split()  # noqa: SIM905


def blocks(readme: str, language: str) -> list[str]:
    """The fenced code blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / readme).read_text(encoding="utf-8"), re.DOTALL)


def commands(readme: str) -> list[list[str]]:
    """The commands that a reader is told to type."""
    return [shlex.split(line, comments=True) for block in blocks(readme, "bash") for line in block.splitlines() if line]


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder but for `flowers`, two pictures, and sets named like those of the README."""
    generator = np.random.default_rng(0)
    for dataset in ("flowers", "sets/cifar10", "sets/fashion_mnist"):
        for split, count in (("train", 12), ("test", 4)):
            for name in ("rose", "tulip"):
                folder = tmp_path / dataset / split / name
                folder.mkdir(parents=True)
                for number in range(count):
                    pixels = generator.integers(0, 256, (40, 30, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{number}.jpg")
    Image.fromarray(generator.integers(0, 256, (60, 50, 3), dtype=np.uint8)).save(tmp_path / "cat.jpg")
    captioned = tmp_path / "sets" / "flickr8k"
    (captioned / "photos").mkdir(parents=True)
    rows = []
    for number, split in enumerate([*["train"] * 12, *["validation"] * 2, *["test"] * 2]):
        picture = Image.fromarray(generator.integers(0, 256, (40, 30, 3), dtype=np.uint8))
        picture.save(captioned / "photos" / f"{number}.jpg")
        rows.append({"image": f"photos/{number}.jpg", "caption": f"picture number {number}", "split": split})
    (captioned / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "photos").symlink_to(captioned / "photos")
    Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / "digit.png")
    monkeypatch.setattr(shapes, "SPLIT_SIZES", {"train": 24, "validation": 4, "test": 8})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_runs_in_its_order(
    pictures: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the English one: the Chinese has the same."""
    monkeypatch.setattr("shutil.which", lambda _: None)  # no Java: METEOR's processes take seconds each
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    ran = 0
    for words in commands("README.md"):
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE)
            continue
        if words[0] == ".":
            assert not ran  # before all that needs it
            (venv,) = re.findall(r"^VENV +\?= (\S+)$", makefile, re.MULTILINE)
            assert words == [".", f"{venv}/bin/activate"]
            continue
        assert words[0] == "diffmoe" or words[:2] == ["python", "main.py"], words
        argv = words[1:] if words[0] == "diffmoe" else words[2:]
        if "train_test" in argv:
            argv = [*argv, *SMALL]
        if argv[0] == "compare":
            argv = [*argv, *SMALL, "--seeds", "1"]
        if argv[0] == "profile":
            few = ["--steps", "1", "--batch_sizes", "1", "2", "--batch_size", "8"]
            argv = [*argv, *SMALL[: SMALL.index("--epochs")], *few]
        if argv[0] == "visualize" or {"cifar10", "flickr8k", "cifar10+fashion_mnist+digits"} & set(argv):
            argv = [*argv, "--data_dir", "sets"]  # the reader's come from the hub
        result = cli(*argv)
        assert result.code == 0, (argv, result.err)
        ran += 1
    assert ran >= 4
    for name in ("cifar10", "shapes", "flickr8k"):
        assert (pictures / "checkpoints" / f"{name}_model.pth").exists()


@pytest.fixture
def tiny_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the recipes, only smaller, so that three epochs take a second."""
    small = {"embed_dim": 16, "num_heads": 2, "text_embed_dim": 8, "patch_embed": "linear", "fusion_layers": 1}
    known = recipes.presets()
    monkeypatch.setattr(recipes, "presets", lambda: {**known, "tiny": {**known["tiny"], **small}})


@pytest.mark.usefixtures("tiny_preset")
@pytest.mark.parametrize("readme", READMES)
def test_every_python_example_runs(readme: str, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = blocks(readme, "python")
    assert any("from diffmoe import Predictor, test, train" in source for source in sources)
    for source in sources:
        exec(compile(source, readme, "exec"), {})
    assert (pictures / "routing.png").read_bytes().startswith(b"\x89PNG")
    out, err = capsys.readouterr()
    assert re.fullmatch(r"0\.\d+\n", out)  # the accuracy: quiet is quiet
    assert not err


@pytest.mark.usefixtures("tiny_preset", "pictures")
@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_every_example_runs(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location(example.stem, example)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main()
    out, err = capsys.readouterr()
    assert re.search(r"accuracy.* \d+\.\d%", out)
    assert not err


@pytest.mark.parametrize("readme", READMES)
def test_what_the_program_prints_of_its_data_is_as_shown(readme: str) -> None:
    shown = blocks(readme, "text")[0].splitlines()
    assert shown[0] == load_dataset(DataConfig(dataset="digits"), PictureSpec(8, 1)).summary()


@pytest.mark.parametrize("readme", [*READMES, "docs/performance.md"])
def test_every_link_and_named_file_is_there(readme: str) -> None:
    text = (ROOT / readme).read_text(encoding="utf-8")
    links = [(ROOT / readme).parent / link for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text)]
    named = [ROOT / name for name in re.findall(r"`((?:src|docs|examples|configs|benchmarks|tests)/[\w./-]*)`", text)]
    assert links
    assert named
    assert [target for target in links + named if not target.exists()] == []


@pytest.mark.parametrize("readme", READMES)
def test_the_table_of_files_has_the_whole_package(readme: str) -> None:
    text = (ROOT / readme).read_text(encoding="utf-8")
    there = [path for path in (ROOT / "src" / "diffmoe").iterdir() if not path.name.startswith("_")]
    names = {f"src/diffmoe/{path.name}" + ("/" if path.is_dir() else "") for path in there}
    assert {name for name in names if f"`{name}`" not in text} == set()


def test_the_two_readmes_have_the_same_blocks_of_code_in_the_same_order() -> None:
    """Word for word, but for the comments of the Python examples."""
    english, chinese = (
        [
            (language, ast.dump(ast.parse(code)) if language == "python" else code)
            for language, code in re.findall(
                r"^```(\w*)\n(.*?)^```$", (ROOT / readme).read_text("utf-8"), re.DOTALL | re.MULTILINE
            )
        ]
        for readme in READMES
    )
    assert {language for language, _ in english} == {"bash", "text", "python"}
    assert english == chinese


def test_the_two_readmes_say_the_same() -> None:
    """The same figures, files, flags and pictures; what is code in a sentence is so in the other language."""
    texts = [(ROOT / readme).read_text("utf-8") for readme in READMES]
    for pattern in (r"\d+\.\d+ ?%|\d+\.\d+ GB", r"--\w+", r"\]\((docs/images/.+?)\)", r"pip install [^`]+"):
        english, chinese = (re.findall(pattern, text) for text in texts)
        assert sorted(english) == sorted(chinese), pattern
    english, chinese = ({code for code in re.findall(r"`([^`\n]+)`", text) if code.isascii()} for text in texts)
    assert english - chinese == {"train/<class>/*.jpg"}  # the class is called so in Chinese


@pytest.mark.parametrize("readme", READMES)
def test_a_reader_learns_how_to_make_the_environment_and_which_data_is_read(readme: str) -> None:
    text = (ROOT / readme).read_text("utf-8")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    assert "pip install -r requirements.txt" in text
    assert (ROOT / "requirements.txt").is_file()
    assert set(re.findall(r"pip install -e '\.\[(\w+)\]'", text)) == {"caption", "heic", "app"} <= extras.keys()
    for alias in itertools.chain(*SPLIT_ALIASES.values()):
        assert re.search(rf"`{alias}/?[`<]", text), alias
    for layout in ("JSON Lines", "Parquet", "CSV", "Kaggle", FLICKR_TABLE, FLICKR_FOLDERS[-1], "HEIC"):
        assert layout in text


def test_a_preset_is_for_the_same_everywhere() -> None:
    told = re.findall(
        r"^(\w+):.*# (.+)$", (ROOT / "configs" / "presets.yaml").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(told) == 3
    for name, purpose in told:
        assert f"| `{name}` | {purpose} |" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("readme", READMES)
def test_how_often_shapes_are_described_rightly_is_said_of_old_pairs_new_pairs_and_all(readme: str) -> None:
    recipe = (ROOT / "configs" / "shapes.yaml").read_text(encoding="utf-8")
    (known,) = re.findall(r"([\d.]+)% of the 750 test pictures with known pairs", recipe)
    (new,) = re.findall(r"([\d.]+)% of the 250 with new ones", recipe)
    overall = (750 * float(known) + 250 * float(new)) / 1000
    found = re.findall(r"[\d.]+(?=%)", (ROOT / readme).read_text(encoding="utf-8"))
    assert ",".join([known, new, f"{overall:.1f}"]) in ",".join(found)
