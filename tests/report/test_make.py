"""`diffmoe visualize`, end to end on tiny models: the page says what is there, and what is not."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffmoe import cli
from diffmoe.commands import visualize
from diffmoe.config import UserError
from diffmoe.data import shapes
from diffmoe.data.pictures import PictureSpec
from diffmoe.report import make, sections, subject
from diffmoe.report.make import make_report
from diffmoe.storage.run_files import RunFiles
from diffmoe.tasks import TASKS
from diffmoe.tasks.captioning import Captioning
from diffmoe.tasks.classification import Classification
from diffmoe.visualization.language import LANGUAGES

Cli = Callable[..., Any]

MODEL = (
    *("--device", "cpu", "--embed_dim", "16", "--num_heads", "2", "--img_encoder_layers", "1", "--max_text_len", "24"),
    *("--text_encoder_layers", "1", "--text_embed_dim", "8", "--num_general_experts", "3"),
    *("--preset", "tiny", "--epochs", "1"),
)
SMALL = ("--device", "cpu", "--dpi", "40")
EVIL = "<script>"
SPARSE_TITLES = (
    "Expert utilisation",
    "Load over training time",
    "Which expert takes which patch",
    "The patches that each expert likes most",
    "Experts and classes",
    "Experts that work together",
    "Router confidence and entropy",
    "Without each expert",
)


@dataclass(frozen=True)
class Trained:
    """A model file and its set."""

    model: Path
    data: Path


@dataclass(frozen=True)
class Shown:
    """A model with its set, and the page about it: for reading only."""

    root: Path
    model: Path
    data: Path
    page: Path
    figures: tuple[str, ...]

    @property
    def html(self) -> str:
        """Without the figures."""
        return re.sub(r"data:image/[^\"]+", "data:", self.page.read_text(encoding="utf-8"))

    @property
    def titles(self) -> list[str]:
        """Of the sections, as they are in the page."""
        return re.findall(r"<h2 id=\"h\d+\">(.*)</h2>", self.html)

    @property
    def notes(self) -> list[str]:
        """Those at the top."""
        return re.findall(r"<li>([^<]+)</li>", self.html)


def show(root: Path, trained: Trained, *flags: object) -> Shown:
    """Run the command; the page and its figures are in `root`."""
    written: list[dict[str, Any]] = []
    argv = ("visualize", "--checkpoint", trained.model, "--dataset", trained.data, "--output_dir", root, *SMALL, *flags)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subject, "EXAMPLES", 2)
        patch.setattr(visualize, "show", lambda result, *_: written.append(result) or 0)
        assert cli.main([str(word) for word in argv]) == 0
    return Shown(root, trained.model, trained.data, Path(written[0]["report"]), tuple(written[0]["figures"]))


def make_classes(folder: Path) -> Path:
    """Three classes of pictures, one of them with a name that is code; 12 to train with and 4 to test with of each."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 12), ("test", 4)):
        for number, name in enumerate((EVIL, "b", "c")):
            (folder / split / name).mkdir(parents=True)
            for picture in range(count):
                pixels = torch.randint(80 * number, 80 * number + 90, (16, 16), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / split / name / f"{picture}.png")
    return folder


def make_captions(folder: Path) -> Path:
    """Drawn scenes with their captions."""
    folder.mkdir(parents=True)
    rows = []
    for number, scene in enumerate(shapes.scenes("train")[:30]):
        Image.fromarray(shapes.draw(scene, PictureSpec(16, 3)).permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
        split = "train" if number < 16 else "validation" if number < 20 else "test"
        rows.append({"image": f"{number}.png", "captions": shapes.captions_of(scene), "split": split})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory, isolate: Callable[[Path], Any]) -> Callable[..., Trained]:
    def run(make: Callable[[Path], Path], channels: int, *flags: str) -> Trained:
        root = tmp_path_factory.mktemp("run")
        data = make(root / "drawn")
        size = ("--img_size", "16", "--in_channels", str(channels))
        with isolate(root / "cache"):
            assert (
                cli.main(["train", "--dataset", str(data), "--save_dir", str(root / "ck"), *MODEL, *size, *flags]) == 0
            )
        return Trained(root / "ck" / "drawn_model.pth", data)

    return run


@pytest.fixture
def call(request: pytest.FixtureRequest) -> Cli:
    """Runs a command in this process."""
    return request.getfixturevalue("cli")


@pytest.fixture(scope="module")
def sparse(train: Callable[..., Trained]) -> Trained:
    return train(make_classes, 1, "--classify_with", "descriptions", "--val_fraction", "0.4")


@pytest.fixture(scope="module")
def shown(sparse: Trained, tmp_path_factory: pytest.TempPathFactory, isolate: Callable[[Path], Any]) -> Shown:
    root = tmp_path_factory.mktemp("shown")
    with isolate(root / "cache"):
        return show(root / "out", sparse)


def test_every_part_is_there_in_order(shown: Shown) -> None:
    assert shown.titles == [
        *("Scores", "Training", "Predictions, right and wrong", "Confusion matrix", "Calibration"),
        *("Class by class", *SPARSE_TITLES[:7]),
        *("Attention", "Attention rollout", "Pictures and class descriptions", "Embedding space"),
        SPARSE_TITLES[7],
    ]
    assert shown.notes == []
    assert "Left out" not in shown.html


def test_each_figure_is_a_file_too(shown: Shown) -> None:
    assert shown.page == shown.root / "drawn" / "report.html"
    names = {Path(path).name for path in shown.figures}
    assert {path.name for path in shown.page.parent.iterdir()} == names | {"report.html"}
    assert len(names) == len(shown.figures) == shown.html.count("<img ")
    assert {"confusion_matrix.png", "routing_maps_1.png", "routing_maps_2.png", "without_experts.png"} <= names
    assert shown.page.stat().st_size < 10_000_000


def test_each_figure_has_its_sentence(shown: Shown) -> None:
    for part in shown.html.split("<section ")[1:]:
        assert ("<img " in part) == ("How to read it: " in part)


def test_top_5_of_three_classes_is_left_out(shown: Shown) -> None:
    assert "expected calibration error" in shown.html
    assert "top-5" not in shown.html


def test_a_class_that_is_code_is_text(shown: Shown) -> None:
    assert "<script" not in shown.page.read_text(encoding="utf-8")


def test_the_header_has_the_facts(shown: Shown) -> None:
    facts = dict(re.findall(r"<div><dt>(?:<code>)?([^<]*)(?:</code>)?</dt><dd>([^<]*)</dd></div>", shown.html))
    metrics = json.loads((shown.model.parent / "drawn" / "metrics.json").read_text())
    assert facts["Dataset"] == "drawn"
    assert facts["Pictures"] == "12 of test"
    assert facts["Parameters"] == f"{metrics['parameters_total']:,}"
    assert facts["Active for a token"] == f"{metrics['parameters_active']:,}"
    assert facts["embed_dim"] == "16"
    assert facts["classify_with"] == "descriptions"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d", facts["Date"])
    assert f"diffmoe visualize --checkpoint {shown.model}" in shown.html


def test_the_accuracy_is_that_of_the_test_command(shown: Shown, call: Cli, tmp_path: Path) -> None:
    save_dir = tmp_path / "ck"
    shutil.copytree(shown.model.parent, save_dir)
    flags = ("--save_dir", save_dir, "--output_dir", tmp_path, "--device", "cpu")
    assert call("test", "--dataset", shown.data, *flags).code == 0
    accuracy = json.loads((save_dir / "drawn" / "metrics.json").read_text())["test_accuracy"]
    assert f"<dt>Accuracy</dt><dd>{accuracy:.2%}</dd>" in shown.html


def test_a_model_file_alone_in_chinese(sparse: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Classification, "sections", ("training_curves", "load_over_time", "predictions"))
    monkeypatch.setattr(make, "MOST_PICTURES", 5)
    model = tmp_path / "alone.pth"
    shutil.copy(sparse.model, model)
    flags = ("--lang", "zh", "--split", "train", "--figure_format", "svg")
    shown = show(tmp_path, Trained(model, sparse.data), *flags)
    assert shown.titles == ["训练", "训练过程中的负载", "正确与错误的预测"]
    history = tmp_path / "alone" / "history.csv"
    assert f"没有找到训练记录：{history} 不存在。" in shown.notes
    assert any(re.fullmatch(r"从该集的 \d+ 张图片中随机抽取了 5 张。", note) for note in shown.notes)
    assert shown.html.count("未包含：") == 2
    assert [Path(path).name for path in shown.figures] == ["predictions.svg"]


def test_a_dense_model_has_no_routing_and_says_so(train: Callable[..., Trained], tmp_path: Path) -> None:
    dense = train(make_classes, 1, "--dense", "true", "--fusion_layers", "0")
    shown = show(tmp_path, dense)
    assert shown.notes == ["This model is dense: it has no routing, and the parts about experts are left out."]
    assert not set(shown.titles) & set(SPARSE_TITLES)
    assert {"Confusion matrix", "Attention rollout", "Embedding space"} <= set(shown.titles)


def test_a_captioner_that_sends_each_token_to_one_expert(train: Callable[..., Trained], tmp_path: Path) -> None:
    writer = train(make_captions, 3, "--top_k", "1")
    shown = show(tmp_path, writer)
    assert shown.titles == [
        *("Scores", "Training", "Captions", "Retrieval by a caption", *SPARSE_TITLES[:4], *SPARSE_TITLES[5:7]),
        *("Attention", "Attention rollout", "Pictures and words", SPARSE_TITLES[7]),
    ]
    assert re.findall(r"Left out: ([^<]+)", shown.html) == [
        "diffmoe test has written none beside the model file.",
        "every token is sent to one expert only.",
    ]
    for figure in ("caption_sheet.png", "retrieval.png", "utilization.png", "without_experts.png"):
        assert str(shown.page.parent / figure) in shown.figures


@pytest.mark.parametrize(
    ("lang", "names"),
    [
        ("en", ("BLEU-4", "CIDEr-D", "picture -&gt; text R@1", "text -&gt; picture R@1", "next-token loss, nats")),
        ("zh", ("BLEU-4", "CIDEr-D", "图片 → 文字 R@1", "文字 → 图片 R@1", "下一词元损失（nat）")),
    ],
)
def test_a_captioners_scores_have_names_and_the_first_of_them_stand_at_the_top(
    captioned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lang: str, names: tuple[str, ...]
) -> None:
    monkeypatch.setattr(Captioning, "sections", ("caption_scores",))
    shutil.copytree(captioned.save_dir, tmp_path / "ck")
    model = tmp_path / "ck" / captioned.model.name
    values = {"bleu4": 0.13, "cider": 0.275, "i2t_r1": 0.031, "t2i_r1": 0.023, "test_loss": 2.5}
    RunFiles.beside(model).update_metrics(values)
    trained = Trained(model, captioned.folder)
    told = dict(zip(names, ("0.130", "0.275", "3.1%", "2.3%", "2.500"), strict=True))
    page = show(tmp_path, trained, "--lang", lang).html
    cards = dict(re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd>", page))
    assert {name: cards.get(name) for name in names[:4]} == {name: told[name] for name in names[:4]}
    cells = re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", page)
    assert told.items() <= set(zip(cells[::2], cells[1::2], strict=True))
    assert "_r1" not in page
    of_validation = show(tmp_path, trained, "--split", "validation").html
    assert "<dt>BLEU-4</dt>" not in of_validation  # they are of the test split


def test_a_classifiers_scores_have_the_mean_over_views_where_it_was_measured(
    sparse: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Classification, "sections", ("scores",))
    shutil.copytree(sparse.model.parent, tmp_path / "ck")
    trained = Trained(tmp_path / "ck" / sparse.model.name, sparse.data)
    assert "mean over views" not in show(tmp_path, trained).html
    RunFiles.beside(trained.model).update_metrics({"test_accuracy_tta": 0.1234})
    cells = re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", show(tmp_path, trained).html)
    told = dict(zip(cells[::2], cells[1::2], strict=True))
    assert told["accuracy on the test split, mean over views (test --tta)"] == "12.34%"


def test_what_cannot_be_is_one_line_before_any_work(
    sparse: Trained, call: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(make, "load_dataset", lambda *_, **__: pytest.fail("pictures were read"))
    for flags, told in (
        ({"lang": "fr"}, "argument --lang: invalid choice: 'fr'"),
        ({"split": "dev"}, "argument --split: invalid choice: 'dev'"),
        ({"figure_format": "jpg"}, "figure_format is 'jpg': it must be"),
        ({"epochs": "3"}, "unknown flag --epochs"),
        ({"checkpoint": tmp_path / "none.pth"}, "none.pth does not exist"),
        ({"checkpoint": tmp_path / "file"}, "is not a checkpoint"),
        ({"output_dir": tmp_path / "file"}, "cannot be written"),
        ({"dataset": "digits"}, f"dataset is 'digits': the model in {sparse.model} was trained on 'drawn'"),
        ({"dataset": tmp_path / "drawn"}, "it must be one of digits"),
    ):
        given = {"checkpoint": sparse.model, "dataset": sparse.data, "output_dir": tmp_path / "out"} | flags
        result = call("visualize", *(word for name, value in given.items() for word in (f"--{name}", value)))
        assert result.code == 2
        assert told in result.err
        assert result.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_set_of_the_same_name_with_other_classes(sparse: Trained, call: Cli, tmp_path: Path) -> None:
    shutil.copytree(sparse.data, tmp_path / "drawn")
    for split in ("train", "test"):
        (tmp_path / "drawn" / split / "c").rename(tmp_path / "drawn" / split / "d")
    where = ("--dataset", tmp_path / "drawn", "--output_dir", tmp_path / "out")
    result = call("visualize", "--checkpoint", sparse.model, *where)
    assert result.code == 2
    assert "was trained on other classes than those of drawn" in result.err


def test_a_captioned_set_of_the_same_name(sparse: Trained, call: Cli, tmp_path: Path) -> None:
    make_captions(tmp_path / "drawn")
    where = ("--dataset", tmp_path / "drawn", "--output_dir", tmp_path / "out")
    result = call("visualize", "--checkpoint", sparse.model, *where)
    assert result.code == 2
    assert "is for captions: this model was trained for classification" in result.err


def test_a_mistake_of_a_caller_in_python_is_one_line_too(sparse: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make, "Predictor", lambda *_: pytest.fail("the model was read"))
    for asked, told in (({"split": "dev"}, "split is 'dev': it must be"), ({"lang": "fr"}, "lang is 'fr': it must be")):
        with pytest.raises(UserError, match=told):
            make_report(str(sparse.model), **asked)  # pyright: ignore[reportArgumentType]


def test_every_section_that_a_task_names_is_there() -> None:
    named = {name for task in TASKS for name in task.sections}
    made = {
        name
        for name, value in vars(sections).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == sections.__name__
    }
    assert named == made
    assert named > make.NEED_ROUTING


def test_the_command_line_has_every_language(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["visualize", "--help"])
    assert f"{{{','.join(LANGUAGES)}}}" in capsys.readouterr().out
