"""The page's answers are those of the commands, what may not be read is refused in a sentence, and clients can ask."""

from __future__ import annotations

import json
import os
import socket
import stat
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

pytest.importorskip("gradio", reason="gradio is not there: pip install 'diff-moe[app]'")


from diffmoe.app import check_address, upload_folder
from diffmoe.app.models import Models
from diffmoe.app.page import drawn
from diffmoe.app.seen import enlarged, patch_at
from diffmoe.app.texts import texts
from diffmoe.commands import caption, predict, retrieve
from diffmoe.config import ModelConfig, UserError
from diffmoe.inference import Predictor
from diffmoe.visualization.attention import attention_maps
from diffmoe.visualization.language import speaking


def panels(figure: Figure) -> list[str]:
    """The titles of a figure's panels."""
    return [title for axes in figure.axes if (title := axes.get_title(loc="left") or axes.get_title())]


def checkpoint(folder: Path, name: str) -> str:
    return str(folder / "models" / name)


class TestAnswers:
    def test_predictions_are_those_of_the_command(self, folder, answers, picture):
        (wanted,) = predict.predict([picture], checkpoint(folder, "classifier.pth"), 3, "cpu")
        found = answers.predict(picture, "classifier.pth")
        assert found == pytest.approx({row["class"]: row["probability"] for row in wanted["predictions"]})
        assert list(found) == ["cat", "dog", "cow"]

    def test_zero_shot_is_that_of_the_command(self, folder, answers, picture):
        labels = ["a cat, asleep", "dog"]
        (wanted,) = Predictor(checkpoint(folder, "classifier.pth"), "cpu").zero_shot([picture], ["cat", "dog"])
        found = answers.zero_shot(picture, " cat \n\n dog,cat", "classifier.pth")
        assert found == pytest.approx({row["class"]: row["probability"] for row in wanted["predictions"]})
        assert len(answers.zero_shot(picture, "\n".join(labels), "classifier.pth")) == 3

    def test_a_caption_is_that_of_the_command(self, folder, answers, picture, tmp_path):
        where: dict[str, Any] = {"output_dir": str(tmp_path), "device": "cpu"}
        (wanted,) = caption.caption([picture], checkpoint(folder, "captioner.pth"), {}, seed=0, **where)
        assert answers.caption(picture, "captioner.pth") == wanted["caption"]

    def test_pictures_found_are_those_of_the_command(self, folder, answers, tmp_path):
        root = folder / "gallery" / "1"
        model = checkpoint(folder, "classifier.pth")
        found = retrieve.retrieve(model, str(root), text="a cat", output_dir=str(tmp_path), device="cpu")["results"]
        results = answers.retrieve("a cat", None, "1", "classifier.pth")
        wanted = [f"{Path(row['item']).relative_to(root)}  {row['similarity']:.3f}" for row in found]
        assert [text for _, text in results] == wanted
        assert all(image.size == (30, 20) for image, _ in results)

    def test_pictures_behind_links_out_of_the_gallery_are_not_found(self, answers, folder):
        key = str(folder / "secret" / "key.png")
        found = answers.retrieve("", key, "0", "classifier.pth")
        assert len(found) == 6
        assert "1.000" not in found[0][1]

    def test_what_only_has_a_pictures_name_is_not_waited_for(self, answers, folder, picture):
        os.mkfifo(folder / "gallery" / "1" / "pipe.png")
        try:
            assert all("pipe" not in text for _, text in answers.retrieve("", picture, "1", "classifier.pth"))
        finally:
            (folder / "gallery" / "1" / "pipe.png").unlink()

    def test_a_picture_finds_itself_where_there_is_no_text(self, folder, answers):
        results = answers.retrieve(" ", str(folder / "gallery" / "1" / "7.jpg"), ".", "classifier.pth")
        assert results[0][1] == "1/7.jpg  1.000"

    def test_a_picture_that_is_new_in_the_gallery_is_found(self, folder, answers, picture):
        assert "new" not in answers.retrieve("", picture, "1", "classifier.pth")[0][1]
        new = folder / "gallery" / "1" / "new.png"
        new.write_bytes(Path(picture).read_bytes())
        try:
            assert answers.retrieve("", picture, "1", "classifier.pth")[0][1] == "new.png  1.000"
        finally:
            new.unlink()

    def test_folders_to_choose_from_do_not_lead_out(self, answers):
        assert answers.folders() == [".", "0", "1", "empty"]

    @pytest.mark.parametrize("outside", ["..", "../secret", "/", "way_out", "0/../../secret", "missing", "0/0.jpg"])
    def test_a_folder_that_is_none_of_the_gallery_is_refused(self, answers, outside):
        with pytest.raises(UserError, match=r"^.* is no folder of the gallery: only its folders may be searched\.$"):
            answers.retrieve("a cat", None, outside, "classifier.pth")

    def test_without_a_gallery_nothing_is_searched(self, answers):
        with pytest.raises(UserError, match="--gallery DIR"):
            replace(answers, gallery=None).retrieve("a cat", None, ".", "classifier.pth")

    def test_routing_of_all_blocks_or_one(self, answers, picture):
        assert len(panels(answers.routing(picture, 0, "classifier.pth"))) == 1 + 3
        for block in (1, 2, 3):
            titles = panels(answers.routing(picture, block, "classifier.pth"))
            assert len(titles) == 2
            assert str(block) in titles[1]

    @pytest.mark.parametrize(
        ("ask", "sentence"),
        [
            (lambda a, p: a.routing(p, 0, "dense.pth"), "This model is dense: it has no experts"),
            (lambda a, p: a.routing(p, 4, "classifier.pth"), "Block is 4: it must be from 0 (all) to 3."),
            (lambda a, p: a.attention(p, 17, "classifier.pth"), "Patch is 17: it must be from 0 (all) to 16."),
            (lambda a, p: a.attention(p, -1, "classifier.pth"), "Patch is -1"),
            (lambda a, p: a.predict(p, "captioner.pth"), "This model has no classes"),
            (lambda a, p: a.caption(p, "dense.pth"), "This model tells classes apart"),
            (lambda a, p: a.zero_shot(p, "a\nb", "no_text.pth"), "trained without texts"),
            (lambda a, p: a.retrieve("a cat", None, ".", "no_text.pth"), "trained without texts"),
            (lambda a, p: a.zero_shot(p, "a,a\na ", "classifier.pth"), "Give at least 2 different labels"),
            (
                lambda a, p: a.zero_shot(p, ",".join(map(str, range(1001))), "classifier.pth"),
                "Give at most 1000 labels.",
            ),
            (lambda a, p: a.predict(None, "classifier.pth"), "There is no picture yet"),
            (lambda a, p: a.predict("/etc/passwd", "classifier.pth"), "This picture was not uploaded here"),
            (lambda a, p: a.predict(p, "../secret/key.png"), "There is no model ../secret/key.png: choose one of "),
            (lambda a, p: a.predict(p, None), "There is no model None"),
            (lambda a, p: a.retrieve("a cat", None, "empty", "classifier.pth"), "has no pictures"),
        ],
    )
    def test_what_cannot_be_answered_is_a_sentence(self, answers, picture, ask, sentence):
        with pytest.raises(UserError) as caught:
            ask(answers, picture)
        assert sentence in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_attention_of_the_patch_that_was_chosen(self, answers, picture):
        used = answers.models.open("classifier.pth")
        pixels = used.read([picture])
        with torch.inference_mode():
            maps = used.attention(pixels)
        for patch, number in ((None, 0), (0, 1), (15, 16)):
            wanted = drawn(attention_maps(pixels[0], maps, patch))
            assert drawn(answers.attention(picture, number, "classifier.pth")).tobytes() == wanted.tobytes()

    def test_a_picture_is_answered_in_under_a_second(self, answers, picture):
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            answers.predict(picture, "classifier.pth")
            seconds.append(time.perf_counter() - started)
        assert min(seconds) < 1


class TestModels:
    def test_those_of_a_folder_come_newest_first_and_new_ones_too(self, folder, tmp_path):
        for age, name in enumerate(("b.pth", "run/a.pth", "c.pth")):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(b"")
            os.utime(tmp_path / name, (1000 - age, 1000 - age))
        models = Models([], tmp_path, "cpu")
        assert models.names() == ["b.pth", "run/a.pth", "c.pth"]
        (tmp_path / "d.pth").write_bytes(b"")
        assert models.names()[0] == "d.pth"

    def test_given_files_go_by_their_names_where_these_differ(self, folder):
        paths = [checkpoint(folder, name) for name in ("dense.pth", "captioner.pth")]
        assert Models(paths, Path("unused"), "cpu").names() == ["dense.pth", "captioner.pth"]
        same = ["a/model.pth", "b/model.pth"]
        assert Models(same, Path("unused"), "cpu").names() == same

    def test_none_at_all_is_one_line(self, tmp_path):
        with pytest.raises(UserError, match=r"has no model files .*--checkpoint FILE$"):
            Models([], tmp_path / "missing", "cpu")

    def test_a_file_is_read_once_and_again_when_it_changed(self, folder, tmp_path):
        path = tmp_path / "model.pth"
        path.write_bytes(Path(checkpoint(folder, "classifier.pth")).read_bytes())
        models = Models([], tmp_path, "cpu")
        first = models.open("model.pth")
        assert models.open("model.pth") is first
        path.write_bytes(Path(checkpoint(folder, "dense.pth")).read_bytes())
        os.utime(path, (5, 5))
        assert models.open("model.pth").model.config.dense

    def test_a_damaged_file_is_a_sentence(self, tmp_path):
        (tmp_path / "bad.pth").write_bytes(b"bad")
        with pytest.raises(UserError, match="truncated or is not a checkpoint"):
            Models([], tmp_path, "cpu").open("bad.pth")

    def test_says_what_is_loaded(self, trained):
        about = Models([str(trained.model)], Path("unused"), "cpu").about("digits_model.pth")
        metrics = json.loads((trained.save_dir / "digits" / "metrics.json").read_text())
        for part in (
            "**digits**",
            "10 classes",
            f"**{metrics['parameters_total']:,}**, {metrics['parameters_active']:,} of them",
            f"Validation accuracy: {metrics['val_accuracy']:.1%}",
            "8 × 8, 4 × 4 patches",
            "8 experts, 2 for a patch",
        ):
            assert part in about
        assert "Test accuracy" not in about  # it was not tested

    def test_of_a_captioner_the_accuracy_is_of_the_next_token(self, folder, tmp_path):
        model, metrics = tmp_path / "animals_model.pth", tmp_path / "animals" / "metrics.json"
        model.symlink_to(checkpoint(folder, "captioner.pth"))
        metrics.parent.mkdir()
        scores = {"test_accuracy": 0.445, "val_accuracy": 0.25, "cider": 0.5}
        metrics.write_text(json.dumps({"dataset": "animals", **scores}))
        about = Models([str(model)], Path("unused"), "cpu").about(model.name)
        lines = [line.removeprefix("- ") for line in about.splitlines()[-3:]]
        assert lines == [
            "Next-token accuracy, test: **44.5%**",
            "Next-token accuracy, validation: 25.0%",
            "CIDEr: **0.500**",
        ]

    def test_another_datasets_metrics_are_not_its(self, folder, own_run):
        own_run.model.write_bytes(Path(checkpoint(folder, "dense.pth")).read_bytes())
        about = Models([str(own_run.model)], Path("unused"), "cpu").about("digits_model.pth")
        assert "accuracy" not in about
        assert "dense, no experts" in about


@pytest.mark.parametrize(("img_size", "patch"), [(8, 2), (16, 4), (28, 7), (500, 100)])
def test_a_click_in_a_frame_chooses_the_framed_patch(img_size, patch):
    config = ModelConfig(img_size=img_size, patch_size=patch)
    pixels = torch.zeros(1, img_size, img_size, dtype=torch.uint8)
    for number in range(1, config.num_patches + 1):
        framed = np.atleast_2d(np.asarray(enlarged(pixels, config, number)).any(-1))
        rows, columns = framed.nonzero()
        assert {patch_at(config, x, y) for y, x in zip(rows.tolist(), columns.tolist(), strict=True)} == {number}
        assert (np.ptp(rows) + 1) * (img_size // patch) == len(framed)
    assert not np.asarray(enlarged(pixels, config, 0)).any()


@pytest.mark.parametrize(
    ("x", "y"), [(-1, 0), (0, -0.1), (448, 0), (0, 448), (float("nan"), 0), (float("inf"), 0), (10**400, 0)]
)
def test_a_click_beside_the_picture_is_a_sentence(x, y):
    config = ModelConfig(img_size=16, patch_size=4)
    assert patch_at(config, 447.9, 447.9) == 16
    with pytest.raises(UserError, match=r"^This is beside the picture: click on one of its patches\.$"):
        patch_at(config, x, y)


class TestUploadFolder:
    @pytest.mark.parametrize("named", ["", "new/inner"])
    def test_it_is_this_servers_alone_and_goes_with_it(self, tmp_path, monkeypatch, named):
        outer = str(tmp_path / named) if named else ""
        monkeypatch.setenv("GRADIO_TEMP_DIR", outer)
        with upload_folder() as folder:
            assert os.environ["GRADIO_TEMP_DIR"] == str(folder) == str(folder.resolve())
            assert folder.parent == Path(outer or tempfile.gettempdir()).resolve()
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            (folder / "a.png").write_bytes(b"")
        assert not folder.exists()
        assert os.environ["GRADIO_TEMP_DIR"] == outer

    def test_where_there_can_be_none_it_is_one_line(self, cli, folder, picture, free_port, monkeypatch):
        monkeypatch.setenv("GRADIO_TEMP_DIR", picture)
        result = cli("app", "--port", free_port(), "--checkpoint", checkpoint(folder, "dense.pth"))
        assert result.code == 2
        assert (
            result.err
            == f"diffmoe: error: GRADIO_TEMP_DIR is {picture!r}: it must be a folder that can be written to\n"
        )


class TestAddress:
    def test_a_port_in_use_is_one_line_before_anything_is_loaded(self, cli):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            port = listener.getsockname()[1]
            result = cli("app", "--port", port, "--checkpoint", "missing.pth")
        assert (result.code, result.out) == (2, "")
        assert result.err.startswith(
            f"diffmoe: error: port {port} of 127.0.0.1 cannot be used (Address already in use)"
        )
        assert result.err.count("\n") == 1

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            (["--port", "0"], "port is 0: it must be from 1 to 65535"),
            (["--port", "65536"], "port is 65536"),
            (["--host", "no..host"], "host is 'no..host': it must be a name or address of this machine"),
            (["--host", "192.0.2.1"], "of 192.0.2.1 cannot be used"),
            (["--checkpoints_dir", "missing"], "missing has no model files"),
            (["--checkpoint", "missing.pth"], "checkpoint missing.pth does not exist"),
            (["--prt", "1"], "unrecognized arguments: --prt 1"),
            (["--lang", "fr"], "invalid choice: 'fr'"),
        ],
    )
    def test_a_mistake_is_one_line(self, cli, flags, words, free_port):
        port = [] if "--port" in flags else ["--port", free_port()]
        result = cli("app", *port, *flags)
        assert (result.code, result.out) == (2, "")
        assert words in result.err
        assert result.err.count("\n") == 1

    def test_a_gallery_that_is_no_folder(self, cli, folder, free_port):
        model = checkpoint(folder, "dense.pth")
        result = cli("app", "--port", free_port(), "--checkpoint", model, "--gallery", model)
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert "it must be a folder of pictures" in result.err

    def test_the_gallery_of_a_user_without_a_home(self, cli, folder, free_port, monkeypatch):
        monkeypatch.setattr("os.path.expanduser", lambda path: path)
        result = cli("app", "--port", free_port(), "--gallery", "~/pictures")
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert "~/pictures begins with ~, and this user has no home" in result.err

    def test_without_gradio_it_says_how_to_get_it(self, cli, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        result = cli("app")
        assert (result.code, result.err) == (2, "diffmoe: error: app needs gradio: pip install 'diff-moe[app]'\n")

    def test_a_free_port_is_not_refused(self, free_port):
        check_address("127.0.0.1", free_port())


def test_the_page_leaves_nothing_in_the_sources():
    """Gradio writes a stub beside every file that derives from a component."""
    assert not list(Path(texts.__code__.co_filename).parent.glob("*.pyi"))


def test_every_text_of_the_page_changes_with_the_language():
    english = texts()
    with speaking("zh"):
        chinese = texts()
    assert english.keys() == chinese.keys()
    for name, written in english.items():
        assert written.keys() == chinese[name].keys()
        assert all(written[part] != chinese[name][part] for part in written), name


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `serve` sets is put back."""
    for name in ("GRADIO_ANALYTICS_ENABLED", "NO_PROXY", "GRADIO_TEMP_DIR"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
