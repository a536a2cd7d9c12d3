"""A model file is bit-exact and stands alone; what is no model file is refused in one line."""

from __future__ import annotations

import dataclasses
import gzip
import io
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.small import SMALL
from torch import Tensor

from diffmoe import load_model
from diffmoe.config import DataConfig, UserError
from diffmoe.model.captioner import Captioner
from diffmoe.model.heads import ImageClassifier
from diffmoe.storage.model_files import MODEL_FORMAT, DataInfo, ModelFile, load_model_file, read, save_model

CONFIG = dataclasses.replace(
    SMALL, patch_size=2, patch_embed="conv", vocab_size=20, max_text_len=6, classify_with="descriptions"
)
INFO = DataInfo("pets", ("bird", "cat", "dog"), (0.5,), (0.25,), 0.1, 0.2, 7)


def make_model() -> ImageClassifier:
    """Nothing in it is at its default: BatchNorm has seen pictures, the balancing bias is not 0."""
    model = ImageClassifier(CONFIG, torch.randint(20, (3, 2, 6)), torch.ones(3, 2, 6, dtype=torch.int64))
    model(torch.randn(5, 1, 8, 8))
    for name, buffer in model.named_buffers():
        if name.endswith("balance_bias"):
            buffer.uniform_()
    return model.eval()


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.pth"
    save_model(path, make_model(), INFO)
    return path


class TestSaveAndLoad:
    def test_is_bit_equal(self, tmp_path):
        model, images = make_model(), torch.randn(4, 1, 8, 8)
        save_model(tmp_path / "model.pth", model, INFO)
        loaded = load_model_file(tmp_path / "model.pth")
        assert loaded.data == INFO
        assert loaded.model.config == CONFIG
        assert not loaded.model.training
        assert loaded.model.state_dict().keys() == model.state_dict().keys()
        with torch.no_grad():
            expected, found = model(images), loaded.model(images)
        for name in ("logits", "zero_shot_logits", "embedding"):
            assert torch.equal(found[name], expected[name])

    def test_without_descriptions(self, tmp_path):
        config = dataclasses.replace(CONFIG, classify_with="image")
        save_model(tmp_path / "model.pth", ImageClassifier(config), INFO)
        out = load_model(tmp_path / "model.pth")(torch.zeros(1, 1, 8, 8))
        assert "zero_shot_logits" not in out

    def test_opens_without_running_code(self, good):
        content = torch.load(good, weights_only=True)
        assert content["data"]["class_names"] == ("bird", "cat", "dog")

    def test_loads_alone_in_a_fresh_process(self, trained, tmp_path):
        code = "import sys; from diffmoe import load_model; print(type(load_model(sys.argv[1])).__name__)"
        code += "; print([name for name in ('datasets', 'sklearn', 'lightning_fabric') if name in sys.modules])"
        moved = tmp_path / "elsewhere.pth"
        moved.write_bytes(trained.model.read_bytes())
        command = [sys.executable, "-W", "error", "-c", code, str(moved)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stdout == "ImageClassifier\n[]\n"


class Evil:
    """Unpickled, it makes a folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("code_was_run",))


def saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def changed(good: bytes, **parts: Any) -> bytes:
    """The file with some of its parts replaced; None removes one."""
    content = {**torch.load(io.BytesIO(good), weights_only=True), **parts}
    return saved({name: value for name, value in content.items() if value is not None})


def with_config(good: bytes, **fields: Any) -> bytes:
    config = torch.load(io.BytesIO(good), weights_only=True)["model_config"]
    return changed(good, model_config={**config, **fields})


def with_data(good: bytes, **fields: Any) -> bytes:
    data = torch.load(io.BytesIO(good), weights_only=True)["data"]
    return changed(good, data={**data, **fields})


def with_weights(good: bytes, name: str, value: float) -> bytes:
    state = torch.load(io.BytesIO(good), weights_only=True)["state_dict"]
    state[name].view(-1)[0] = value
    return changed(good, state_dict=state)


BAD: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda good: b"", "truncated or is not a checkpoint"),
    **{
        f"cut to {share:.1%}": (
            lambda good, share=share: good[: int(len(good) * share)],
            "truncated or is not a checkpoint",
        )
        for share in (0.01, 0.1, 0.5, 0.9, 0.999)
    },
    "one byte short": (lambda good: good[:-1], "truncated or is not a checkpoint"),
    "text": (lambda good: b"not a checkpoint\n", "not a checkpoint"),
    "zeros": (lambda good: bytes(1000), "not a checkpoint"),
    "pops from nothing": (lambda good: b".", "not a checkpoint"),  # as one random file in 20 does
    "half a number": (lambda good: b"M\x00", "not a checkpoint"),
    "unknown memo": (lambda good: b"\x80\x53h\x07.", "not a checkpoint"),  # and a pickle protocol that torch warns of
    "pickle with code": (lambda good: pickle.dumps(Evil()), "not a checkpoint"),
    "checkpoint with code": (lambda good: saved({"format": "diffmoe-model-1", "data": Evil()}), "refused"),
    "whole module": (lambda good: saved(torch.nn.Linear(2, 2)), "refused"),
    "plain state_dict": (lambda good: saved(torch.nn.Linear(2, 2).state_dict()), "not a diffmoe-model-1 file"),
    "tensor": (lambda good: saved(torch.zeros(3)), "not a diffmoe-model-1 file"),
    "format of tensors": (lambda good: saved({"format": torch.zeros(3)}), "not a diffmoe-model-1 file"),
    "other format": (lambda good: changed(good, format="diffmoe-model-9"), "diffmoe-model-9"),
    "no weights": (lambda good: changed(good, state_dict=None), "does not fit"),
    "no config": (lambda good: changed(good, model_config=None), "does not fit"),
    "no data": (lambda good: changed(good, data=None), "does not fit"),
    "weights of another kind": (lambda good: changed(good, state_dict=[1]), "does not fit"),
    "key of a newer version": (lambda good: with_config(good, warp_speed=9), "warp_speed"),
    "other shapes": (lambda good: with_config(good, embed_dim=32), "does not fit"),
    "other type": (lambda good: with_config(good, embed_dim="16"), "does not fit"),
    "impossible": (lambda good: with_config(good, top_k=9), "top_k is 9"),
    **{
        f"temperature {value}": (lambda good, value=value: changed(good, temperature=value), "temperature is ")
        for value in (0.0, -1.0, math.nan, math.inf, "1", [1.0])
    },
    "router of a newer version": (lambda good: with_config(good, router="seer"), "router is 'seer'"),
    **{
        f"weights {value}": (lambda good, value=value: with_weights(good, "head.bias", value), "head.bias holds values")
        for value in (math.nan, math.inf, -math.inf)
    },
    **{
        f"{name} {value}": (lambda good, name=name, value=value: with_data(good, **{name: value}), f"{name} is ")
        for name, values in {
            "mean": ((), (math.nan,), (-0.1,), (0.5, 0.5), 0.5, ("0.5",), None),
            "std": ((), (math.nan,), (0.0,), (-1.0,), (math.inf,), (0.2, 0.2), 0.2, ("x",), None),
            "dataset": (7, "", "..", "../pets", None),
        }.items()
        for value in values
    },
    **{
        f"classes {names}": (lambda good, names=names: with_data(good, class_names=names), "class_names are ")
        for names in ((), ("a", "b"), tuple("abcd"), (1, 2, 3), ("a", "b", None), "abc", None, 3)
    },
    **{
        f"token {id}": (lambda good, id=id: with_weights(good, "class_tokens", id), "class_tokens are not ids under")
        for id in (-1, 20, 10**12)
    },
    "own that is no truth": (lambda good: with_data(good, own="yes"), "own is 'yes': it must be true or false"),
    "control characters": (lambda good: with_data(good, dataset="\x1b[2J\n\u202epets/"), r"\x1b[2J\n\u202epets"),
    "a key of control characters": (lambda good: with_config(good, **{"\x1b[2J": 1}), r"\x1b[2J"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_file_is_one_line_that_names_it(kind, good, tmp_path, cli, monkeypatch):
    make, message = BAD[kind]
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.pth"
    path.write_bytes(make(good.read_bytes()))
    result = cli("predict", "--checkpoint", path, "picture.png")
    assert result.code == 2
    assert result.err.startswith(f"diffmoe: error: checkpoint {path} ")
    assert message in result.err
    assert len(result.err.splitlines()) == 1
    assert result.err.strip().isprintable()
    assert not (tmp_path / "code_was_run").exists()


def test_random_bytes_are_refused(tmp_path):
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "random.pth"
    for size in [1, 2, 3, 10, 1000] * 60:
        path.write_bytes(bytes(torch.randint(256, (size,), generator=generator).tolist()))
        with pytest.raises(UserError, match=r"random\.pth"):
            load_model_file(path)


@pytest.mark.parametrize("name", ["missing.pth", "."])
def test_missing_file(name, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_model_file(tmp_path / name)


def test_last_ckpt_is_not_a_model_file_nor_the_other_way_round(cli, own_run, tmp_path):
    last = own_run.save_dir / "digits" / "last.ckpt"
    result = cli("predict", "--checkpoint", last, "picture.png")
    assert result.code == 2
    assert result.err == f"diffmoe: error: checkpoint {last} is not a diffmoe-model-1 file but diffmoe-run-2\n"
    last.write_bytes(own_run.model.read_bytes())
    result = cli("train", *own_run.flags, "--save_dir", own_run.save_dir, "--resume")
    assert result.code == 2
    assert str(last) in result.err


@pytest.mark.parametrize("share", [0, 0.5, 0.999])
def test_truncated_last_ckpt_is_not_resumed(share, cli, own_run, snapshot):
    last = own_run.save_dir / "digits" / "last.ckpt"
    last.write_bytes(last.read_bytes()[: int(last.stat().st_size * share)])
    before = snapshot(own_run.save_dir)
    result = cli("train", *own_run.flags, "--save_dir", own_run.save_dir, "--resume")
    assert result.code == 2
    assert result.err == f"diffmoe: error: checkpoint {last} is truncated or is not a checkpoint\n"
    assert snapshot(own_run.save_dir) == before


def make_captioner() -> Captioner:
    config = dataclasses.replace(CONFIG, vocab_size=49408, classify_with="image")
    model = Captioner(config, torch.tensor([5, 7, 320, 49406, 49407]))
    torch.nn.init.normal_(model.output_bias)
    return model


CAPTION_INFO = DataInfo("holidays", (), (0.5,), (0.25,), 0.1, 0.2, 7)


class TestCaptioner:
    def test_is_bit_equal(self, tmp_path):
        model, images = make_captioner(), torch.randn(4, 1, 8, 8)
        tokens = torch.tensor([[49406, 5, 7, 320, 49407]]).expand(4, -1)
        model(images, tokens)  # BatchNorm has seen pictures
        save_model(tmp_path / "model.pth", model.eval(), CAPTION_INFO)
        loaded = load_model_file(tmp_path / "model.pth")
        assert loaded.data == CAPTION_INFO
        found_model = loaded.model
        assert isinstance(found_model, Captioner)
        assert found_model.config == model.config
        assert torch.equal(found_model.output_tokens, model.output_tokens)
        with torch.no_grad():
            expected, found = model(images, tokens), found_model(images, tokens)
        for name in ("logits", "router_loss", "embedding"):
            assert torch.equal(found[name], expected[name])
        losses = [m.caption_loss(expected["caption_features"], tokens) for m in (model, found_model)]
        assert torch.equal(losses[0].loss, losses[1].loss)
        assert torch.equal(found_model.generate(images), model.generate(images))

    @pytest.mark.parametrize(
        ("parts", "message"),
        [
            ({"head": "poet"}, "head is 'poet': it must be one of classifier, captioner"),
            ({"head": "classifier"}, "does not fit"),
            ({"head": None}, "does not fit"),  # a file without a head is a classifier's
            ({"head": [1]}, "head is [1]"),
            ({"state_dict": {}}, "output_tokens"),
            ({"state_dict": {"output_tokens": torch.zeros(2)}}, "output_tokens are torch.float32"),
            ({"state_dict": {"output_tokens": torch.tensor([1, 99999])}}, "under vocab_size (49408)"),
            ({"state_dict": {"output_tokens": torch.tensor([1, 2])}}, "Missing key"),
        ],
    )
    def test_a_damaged_one_is_one_line(self, parts, message, tmp_path):
        path = tmp_path / "model.pth"
        save_model(path, make_captioner(), CAPTION_INFO)
        path.write_bytes(changed(path.read_bytes(), **parts))
        with pytest.raises(UserError) as caught:
            load_model_file(path)
        line = str(caught.value)
        assert line.startswith(f"checkpoint {path} does not fit this version: ")
        assert message in line
        assert "\n" not in line


def test_a_file_without_a_head_is_a_classifier(good, tmp_path):
    assert torch.load(good, weights_only=True)["head"] == "classifier"
    old = tmp_path / "old.pth"
    old.write_bytes(changed(good.read_bytes(), head=None, temperature=None))
    assert isinstance(load_model(old), ImageClassifier)
    assert load_model_file(old).temperature == 1


FORMAT_1 = Path(__file__).parent / "format_1"


class TestFilesOfTheVersionBefore:
    """Models, and what that version computed with them: no weight has lost its place, no number its meaning."""

    def open(self, name: str, folder: Path) -> tuple[ModelFile, dict[str, Tensor], Tensor]:
        path = folder / f"{name}_model.pth"
        path.write_bytes(gzip.decompress((FORMAT_1 / f"{name}_model.pth.gz").read_bytes()))
        loaded, expected = load_model_file(path), load_file(FORMAT_1 / f"{name}_expected.safetensors")
        return loaded, expected, loaded.picture.normalize(expected["pictures"])

    def check(self, out: dict[str, Any], expected: dict[str, Tensor], names: set[str]) -> None:
        routing = out["routing"]
        out = {**out, "expert_ids": routing[0].expert_ids, "gates": routing[0].gates}
        out["tokens_per_expert"] = torch.stack([block.tokens_per_expert for block in routing])
        losses = {name for name in out if name.endswith("_loss")}
        assert len(losses) == 5
        for name in {"embedding", "expert_ids", "gates", "tokens_per_expert", *losses, *names}:
            torch.testing.assert_close(out[name], expected[name], rtol=0, atol=1e-5, msg=name)

    @torch.no_grad()
    def test_a_classifier(self, tmp_path: Path) -> None:
        loaded, expected, images = self.open("digits", tmp_path)
        assert (loaded.data.dataset, loaded.data.class_names) == ("digits", tuple("0123456789"))
        assert isinstance(loaded.model, ImageClassifier)
        self.check(loaded.model(images, torch.arange(6)), expected, {"logits", "zero_shot_logits"})

    @torch.no_grad()
    def test_a_captioner(self, tmp_path: Path) -> None:
        loaded, expected, images = self.open("shapes", tmp_path)
        assert (loaded.data.dataset, loaded.data.class_names) == ("shapes", ())
        assert isinstance(loaded.model, Captioner)
        written = loaded.model.generate_scored(images, decoding="beam", beams=4)
        assert torch.equal(written.tokens, expected["caption_tokens"])
        torch.testing.assert_close(written.log_probs, expected["caption_log_probs"], rtol=0, atol=1e-5)
        tokens = expected["caption_tokens"]
        out = loaded.model(images, tokens, tokens > 0)
        self.check({**out, "logits": out["logits"][:, ::4, ::3]}, expected, {"logits"})


def test_data_info_splits_other_data_as_that_of_the_training() -> None:
    config = DataConfig(dataset="digits", val_fraction=0.3, test_fraction=0.4, split_seed=1, flip=True)
    assert INFO.split_as_trained(config) == DataConfig(
        dataset="digits", val_fraction=0.1, test_fraction=0.2, split_seed=7, flip=True
    )


def same(found: Any, expected: Any) -> bool:
    """Bit for bit, whatever is nested in what."""
    if isinstance(expected, Tensor):
        return found.dtype == expected.dtype and torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in expected)
    return found == expected


def test_no_flipped_bit_changes_what_is_read(good: Path, tmp_path: Path) -> None:
    """One is told of, or lies where nothing is kept."""
    whole, path, told = good.read_bytes(), tmp_path / "flipped.pth", []
    expected = read(good, MODEL_FORMAT)
    generator = torch.Generator().manual_seed(0)
    for place in torch.randint(8 * len(whole), (100,), generator=generator).tolist():
        content = bytearray(whole)
        content[place // 8] ^= 1 << place % 8
        path.write_bytes(content)
        try:
            assert same(read(path, MODEL_FORMAT), expected)
        except UserError as error:
            told.append(str(error))
    assert len(told) >= 40
    assert all(line.startswith(f"checkpoint {path} is ") for line in told)


def test_a_flipped_bit_of_a_weight_is_named(good: Path) -> None:
    content = bytearray(good.read_bytes())
    weights = load_model(good).state_dict()["head.weight"].numpy().tobytes()
    content[content.index(weights)] ^= 1
    good.write_bytes(content)
    with pytest.raises(UserError, match=r"good\.pth is damaged: .*/data/\d+ in it is not as it was written$"):
        load_model(good)
