"""The commands of pictures with captions, end to end on a small folder: train, test, caption, retrieve, zero-shot."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffmoe import Captioner, load_model
from diffmoe.cli import main
from diffmoe.commands import captions, training
from diffmoe.commands.captions import is_captions_file, save_captions
from diffmoe.data import shapes

Cli = Callable[..., Any]
MODEL = (
    *("--img_size", "16", "--in_channels", "3", "--embed_dim", "16", "--num_heads", "2", "--img_encoder_layers", "1"),
    *("--text_encoder_layers", "1", "--fusion_layers", "1", "--text_embed_dim", "8", "--max_text_len", "24"),
)
FLAGS = (*MODEL, "--device", "cpu", "--epochs", "2", "--batch_size", "8", "--preset", "tiny")


@dataclass(frozen=True)
class Written:
    """A folder with a captions table, and a captioner trained on it for two epochs: for reading only."""

    folder: Path
    pictures: list[Path]
    save_dir: Path
    model: Path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, isolate: Callable[[Path], Any]) -> Written:
    root = tmp_path_factory.mktemp("captions")
    folder = root / "drawn"
    folder.mkdir()
    rows = []
    for number, scene in enumerate(shapes.scenes("train")[:40]):
        picture = shapes.draw(scene, 20, 3)
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
        split = "train" if number < 24 else "validation" if number < 32 else "test"
        rows.append({"image": f"{number}.png", "captions": shapes.captions_of(scene), "split": split})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    save_dir = root / "checkpoints"
    with isolate(root / "cache"):
        assert main(["train", "--dataset", str(folder), "--save_dir", str(save_dir), *FLAGS]) == 0
    return Written(folder, sorted(folder.glob("*.png")), save_dir, save_dir / "drawn_model.pth")


def test_training_leaves_a_model_that_loads_alone_and_the_promised_metrics(run: Written) -> None:
    model = load_model(run.model)
    assert isinstance(model, Captioner)
    images = torch.randn(2, 3, 16, 16)
    assert model.generate(images, decoding="greedy").shape[0] == 2
    metrics = json.loads((run.save_dir / "drawn" / "metrics.json").read_text())
    promised = {"dataset", "mode", "seed", "epochs", "steps", "images_per_second", "train_seconds", "val_accuracy"}
    assert metrics.keys() >= promised | {"parameters_total", "parameters_active"}
    assert (metrics["epochs"], metrics["steps"]) == (2, 6)


def test_captions_of_ones_own_shapes_are_not_judged_as_the_drawn_ones(
    run: Written, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captions, "score_captions", lambda *_: {})  # METEOR's Java takes seconds
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "shapes").symlink_to(run.folder)
    where = ("--save_dir", tmp_path / "own", "--output_dir", tmp_path, "--data_dir", tmp_path / "sets")
    result = cli("test", "--dataset", "shapes", "--checkpoint", run.model, *where, "--device", "cpu")
    assert result.code == 0, result.err
    assert "test, 8 pictures" in result.out
    metrics = json.loads((tmp_path / "own" / "shapes" / "metrics.json").read_text())
    assert metrics["dataset"] == "shapes"
    assert not [name for name in metrics if name.startswith("captions_right")]


def test_testing_adds_captions_retrieval_and_pictures(run: Written, cli: Cli, tmp_path: Path) -> None:
    result = cli(
        *("test", "--dataset", run.folder, "--save_dir", run.save_dir, "--output_dir", tmp_path, "--device", "cpu"),
        *MODEL,
    )
    assert result.code == 0, result.err
    metrics = json.loads((run.save_dir / "drawn" / "metrics.json").read_text())
    for name in ("bleu1", "bleu4", "rouge_l", "cider", "i2t_r1", "i2t_r10", "t2i_r1", "t2i_median_rank"):
        assert name in metrics
        assert name in result.out
    assert metrics["epochs"] == 2  # what training wrote is kept
    written = json.loads((tmp_path / "drawn" / "captions.json").read_text())
    assert len(written) == 8
    assert all(len(row["references"]) == 5 and row["caption"] for row in written)
    assert {path.name for path in (tmp_path / "drawn").iterdir()} == {
        "captions.json",
        "captions.png",
        "retrieval.png",
        "training_curves.png",
    }


def test_training_resumes_to_the_same_weights(
    run: Written, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--dataset", run.folder, "--save_dir", tmp_path, *FLAGS]
    with monkeypatch.context() as patch:
        save_run = training.save_run

        def die_after_the_first(*args: Any) -> None:
            save_run(*args)
            raise KeyboardInterrupt

        patch.setattr(training, "save_run", die_after_the_first)
        assert cli("train", *flags).code == 130
    assert cli("train", *flags, "--resume").code == 0
    first = torch.load(tmp_path / "drawn" / "last.ckpt", weights_only=True)
    again = torch.load(run.save_dir / "drawn" / "last.ckpt", weights_only=True)
    assert all(torch.equal(first["model"][name], tensor) for name, tensor in again["model"].items())


def test_captions_are_printed_saved_and_drawn(run: Written, cli: Cli, tmp_path: Path) -> None:
    asked = run.pictures[:3]
    flags = ("--checkpoint", run.model, "--output_dir", tmp_path, "--device", "cpu")
    result = cli("caption", *asked, *flags, "--decoding", "greedy", "--json")
    assert result.code == 0, result.err
    written = json.loads(result.out)
    assert [row["image"] for row in written] == list(map(str, asked))
    assert json.loads((tmp_path / "captions.json").read_text()) == written
    with Image.open(tmp_path / "captions.png") as sheet:
        assert sheet.size[0] > 100
    sampled = [
        cli("caption", asked[0], *flags, "--decoding", "sample", "--seed", seed).out for seed in ("1", "1", "2", "3")
    ]
    assert sampled[0] == sampled[1]
    assert len(set(sampled)) > 1


FOREIGN = {
    "captions.json": '[{"image": "a.png", "caption": "mine"}]',  # its keys, not in its layout
    "captions.png": "a picture of mine",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_others_are_not_overwritten(run: Written, cli: Cli, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(FOREIGN[name])
    flags = ("caption", run.pictures[0], "--checkpoint", run.model, "--output_dir", tmp_path, "--device", "cpu")
    result = cli(*flags)
    assert result.code == 2
    assert result.err == (
        f"diffmoe: error: {tmp_path / name} is not one that this program wrote: "
        "give another --output_dir or --overwrite\n"
    )
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: FOREIGN[name]}
    assert cli(*flags, "--overwrite").code == 0
    assert cli(*flags).code == 0  # what it wrote itself it replaces


@pytest.mark.parametrize("mode", ["test", "train_test"])
def test_testing_overwrites_no_captions_of_others(run: Written, cli: Cli, tmp_path: Path, mode: str) -> None:
    mine = tmp_path / "drawn" / "captions.json"
    mine.parent.mkdir()
    mine.write_text("{}")
    save_dir = run.save_dir if mode == "test" else tmp_path / "save"
    before = sorted(run.save_dir.rglob("*"))
    result = cli(mode, "--dataset", run.folder, "--save_dir", save_dir, "--output_dir", tmp_path, *FLAGS)
    assert result.code == 2
    assert f"{mine} is not one that this program wrote" in result.err
    assert mine.read_text() == "{}"
    assert (sorted(run.save_dir.rglob("*")), (tmp_path / "save").exists()) == (before, False)


def test_captions_that_were_written_are_recognised(tmp_path: Path) -> None:
    path = tmp_path / "captions.json"
    for references in (None, [["ein Hund", "狗"]]):
        save_captions(path, ["é.png"], ["a dog"], references)
        assert is_captions_file(path)
    for text in (
        "",
        "[",
        "[1]",
        "{}",
        '[{"image": 1}]',
        path.read_text() + "\n",
        path.read_text().replace("狗", "\\u72d7"),
    ):
        path.write_text(text)
        assert not is_captions_file(path)


def test_a_text_finds_pictures_and_the_index_is_reused(run: Written, cli: Cli, tmp_path: Path) -> None:
    flags = ("--checkpoint", run.model, "--output_dir", tmp_path, "--device", "cpu", "--json")
    first = cli("retrieve", run.folder, "--text", "a red circle", *flags, "--top", "3")
    assert first.code == 0, first.err
    found = json.loads(first.out)
    assert len(found["results"]) == 3
    assert Path(found["picture"]).is_file()
    index = Path(found["index"])
    made = index.stat().st_mtime_ns
    again = json.loads(cli("retrieve", run.folder, "--text", "a red circle", *flags, "--top", "3").out)
    for row, former in zip(again.pop("results"), found.pop("results"), strict=True):
        # The product's last digit depends on where in memory the embeddings came to lie.
        assert row == {"item": former["item"], "similarity": pytest.approx(former["similarity"], abs=1e-6)}
    assert again == found
    assert index.stat().st_mtime_ns == made


def test_an_index_of_another_gallery_is_named_and_kept(run: Written, cli: Cli, tmp_path: Path) -> None:
    flags = ("--checkpoint", run.model, "--output_dir", tmp_path, "--device", "cpu", "--text", "a red circle")
    index = tmp_path / "kept.safetensors"
    assert cli("retrieve", run.folder, *flags, "--index", index).code == 0
    content = index.read_bytes()
    other = tmp_path / "galleries" / "other"
    other.mkdir(parents=True)
    (other / "0.png").write_bytes(run.pictures[0].read_bytes())
    result = cli("retrieve", other, *flags, "--index", index)
    assert result.code == 2
    assert str(index) in result.err
    assert index.read_bytes() == content
    assert cli("retrieve", other, *flags, "--index", index, "--overwrite").code == 0


def test_a_picture_finds_texts(run: Written, cli: Cli, tmp_path: Path) -> None:
    sentences = tmp_path / "sentences.txt"
    sentences.write_text("\ufeffa red circle\n\na blue\u2028square\n一只狗", encoding="utf-8")
    flags = ("--checkpoint", run.model, "--output_dir", tmp_path / "out", "--device", "cpu", "--json")
    result = cli("retrieve", run.folder, "--image", run.pictures[0], "--sentences", sentences, *flags)
    assert result.code == 0, result.err
    found = json.loads(result.out)["results"]
    assert {row["item"] for row in found} == {"a red circle", "a blue\u2028square", "一只狗"}
    assert [row["similarity"] for row in found] == sorted((row["similarity"] for row in found), reverse=True)


def test_zero_shot_gives_each_label_a_probability(run: Written, cli: Cli) -> None:
    flags = ("--checkpoint", run.model, "--device", "cpu", "--json")
    result = cli("zero-shot", *run.pictures[:2], "--labels", "a circle", "cross", "--templates", "{} here", *flags)
    assert result.code == 0, result.err
    for row in json.loads(result.out):
        assert {found["class"] for found in row["predictions"]} == {"a circle", "cross"}
        assert sum(found["probability"] for found in row["predictions"]) == pytest.approx(1, abs=1e-5)


def test_predict_weighs_a_text_with_the_picture(run: Written, trained: Any, cli: Cli) -> None:
    flags = ("--device", "cpu", "--json")
    matched = cli("predict", run.pictures[0], "--checkpoint", run.model, "--text", "a red circle", *flags)
    assert matched.code == 0, matched.err
    assert json.loads(matched.out)[0].keys() == {"image", "log_probability", "similarity"}
    classified = cli("predict", run.pictures[0], "--checkpoint", trained.model, "--text", "the number one", *flags)
    assert classified.code == 0, classified.err
    (row,) = json.loads(classified.out)
    alone, both = (
        {found["class"]: found["probability"] for found in row[name]} for name in ("predictions", "with_text")
    )
    assert alone != both


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("predict", "{picture}"), "has no classes: diffmoe caption writes captions; predict needs --text"),
        (("caption", "{picture}", "--beems", "3"), "unknown flag --beems (did you mean 'beams'?)"),
        (("caption", "{picture}", "--beams", "0"), "beams is 0: it must be at least 1"),
        (("caption", "{picture}", "--decoding", "best"), "decoding is 'best'"),
        (("caption", "nowhere.png"), "nowhere.png"),
        (("retrieve", "{folder}"), "retrieve needs either --text, which asks for pictures, or --image"),
        (("retrieve", "{folder}", "--text", "a", "--top", "0"), "top is 0: it must be at least 1"),
        (("zero-shot", "{picture}", "--labels", "cat"), "there must be at least 2 different ones"),
        (("zero-shot", "{picture}", "--labels", "a", "b", "--templates", "no place"), "it must contain {}"),
    ],
)
def test_a_mistake_is_one_line(
    run: Written, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    named = [word.replace("{picture}", str(run.pictures[0])).replace("{folder}", str(run.folder)) for word in words]
    result = cli(*named, "--checkpoint", run.model)
    assert result.code == 2
    assert message in result.err
    assert result.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_models_of_the_other_task_are_refused(run: Written, trained: Any, cli: Cli, tmp_path: Path) -> None:
    result = cli("caption", run.pictures[0], "--checkpoint", trained.model, "--output_dir", tmp_path)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "tells classes apart" in result.err
    tested = cli("test", "--dataset", "digits", "--checkpoint", run.model, "--save_dir", tmp_path / "save")
    assert (tested.code, tested.err.count("\n")) == (2, 1)
    assert "for another task than digits's" in tested.err


def test_captions_need_a_fusion(run: Written, cli: Cli, tmp_path: Path) -> None:
    flags = [word if word != "1" or FLAGS[n - 1] != "--fusion_layers" else "0" for n, word in enumerate(FLAGS)]
    result = cli("train", "--dataset", run.folder, "--save_dir", tmp_path / "save", *flags)
    assert result.code == 2
    assert "fusion_layers is 0" in result.err
