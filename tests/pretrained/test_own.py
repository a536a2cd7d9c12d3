"""A start from one's own model takes what fits and says what not; a dense layer becomes experts that compute it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.small import SMALL
from torch import Tensor

from diffmoe.config import ModelConfig, UserError
from diffmoe.model.captioner import Captioner
from diffmoe.model.heads import Head, ImageClassifier
from diffmoe.model.layers import Expert
from diffmoe.model.moe import GeneralExperts
from diffmoe.model.routers.attentive import AttentiveRouter
from diffmoe.pretrained import start_from
from diffmoe.pretrained.own import EXPERT, upcycled
from diffmoe.storage.model_files import DataInfo, save_model

NAMES = ("cat", "cow", "dog")
DENSE = replace(SMALL, dense=True, num_modality_specific_experts=1)


def saved(model: Head, path: Path, names: tuple[str, ...] = NAMES) -> str:
    """The model, none of whose weights is at its default, in a file."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    channels = model.config.in_channels
    save_model(path, model, DataInfo("farm", names, (0.5,) * channels, (0.2,) * channels, 0.1, 0.2, 0))
    return str(path)


def pictures(config: ModelConfig, count: int = 6) -> Tensor:
    return torch.randn(count, config.in_channels, config.img_size, config.img_size)


def ffn(units: int, width: int = 16) -> tuple[Expert, dict[str, Tensor]]:
    """A dense layer in float64, nothing in it at a default, and its parameters by name."""
    expert = Expert(width, units / width).double()
    for parameter in expert.parameters():
        torch.nn.init.normal_(parameter)
    return expert, {name: dict(expert.named_parameters())[name].detach() for name in EXPERT}


def pool_of(ffn_of: dict[str, Tensor], scale: float = 1.0, **options: Any) -> GeneralExperts:
    pool = GeneralExperts(16, dropout=0.0, **options).double().eval()
    with torch.no_grad():
        for name, value in upcycled(ffn_of, scale, pool).items():
            getattr(pool, name).copy_(value)
    return pool


class TestUpcycling:
    @pytest.mark.parametrize("router", ["attentive", "picture", "merged"])
    @pytest.mark.parametrize(("units", "gate_scale", "scale"), [(32, 1.0, 1.0), (32, 2.0, 0.7), (20, 2.0, 1.0)])
    def test_copies_compute_what_the_layer_does(self, router: str, units: int, gate_scale: float, scale: float) -> None:
        dense, weights = ffn(units)
        pool = pool_of(weights, scale, num_experts=4, top_k=3, expansion_factor=2, router=router, gate_scale=gate_scale)
        x = torch.randn(5, 7, 16, dtype=torch.float64)
        torch.testing.assert_close(pool(x)[0], scale * dense(x), rtol=0, atol=1e-10)

    @pytest.mark.parametrize("units", [64, 58])
    def test_slices_add_up_to_it(self, units: int) -> None:
        """Where a token's experts are all of them, with equal gates: 58 units are 64, six of which give nothing."""
        dense, weights = ffn(units)
        pool = pool_of(weights, 0.7, num_experts=2, top_k=2, expansion_factor=2, router="hash", gate_scale=2.0)
        x = torch.randn(5, 7, 16, dtype=torch.float64)
        torch.testing.assert_close(pool(x)[0], 0.7 * dense(x), rtol=0, atol=1e-10)

    def test_the_weakest_units_are_left_out(self) -> None:
        dense, weights = ffn(66)
        for unit in (3, 40):
            weights["fc2.weight"][:, unit] = 0
        pool = pool_of(weights, num_experts=2, top_k=2, expansion_factor=2, router="hash", gate_scale=2.0)
        x = torch.randn(5, 7, 16, dtype=torch.float64)
        torch.testing.assert_close(pool(x)[0], dense(x), rtol=0, atol=1e-10)


class TestClusters:
    def test_a_router_sends_each_cluster_to_its_own_expert(self) -> None:
        router = AttentiveRouter(16, 5, 1)
        centroids = torch.linalg.qr(torch.randn(16, 5)).Q.T
        router.start_at(centroids)
        tokens = centroids.repeat_interleave(20, 0) + 0.02 * torch.randn(100, 16)
        assert torch.equal(router(tokens).expert_ids[:, 0], torch.arange(5).repeat_interleave(20))
        assert float(router.score(centroids).detach().std()) == pytest.approx(1, abs=1e-4)

    def test_the_image_towers_routers_do(self, tmp_path: Path) -> None:
        source, model = saved(ImageClassifier(DENSE), tmp_path / "dense.pth"), ImageClassifier(SMALL)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        lines = start_from(model, source, NAMES, pictures(SMALL, 20))
        assert "1 routers start from the clusters of their tokens" in lines
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        routers = {name for name in changed if ".router." in name}
        assert routers == {
            f"backbone.image_encoder.blocks.0.general_experts.router.{x}" for x in ("keys", "query.weight")
        }


class TestStart:
    def test_the_same_model_is_taken_whole(self, tmp_path: Path) -> None:
        first = ImageClassifier(SMALL)
        source, model = saved(first, tmp_path / "a.pth"), ImageClassifier(SMALL)
        lines = start_from(model, source, NAMES)
        assert all(line.endswith(": copied") for line in lines)
        x = pictures(SMALL)
        assert torch.equal(model.eval().classify(x).logits, first.eval().classify(x).logits)

    def test_a_dense_model_becomes_a_routed_one(self, tmp_path: Path) -> None:
        """Of K = 2 slices a token may have one twice: with as wide experts as the layer it is the same model."""
        dense = ImageClassifier(replace(DENSE, num_modality_specific_experts=2, dense_units=32, dense_scale=0.6))
        source, model = saved(dense, tmp_path / "dense.pth"), ImageClassifier(replace(SMALL, gate_scale=2.0))
        lines = start_from(model, source, NAMES)
        assert lines[-1] == "2 dense layers became the experts of as many pools"
        x = pictures(SMALL)
        expected = dense.double().eval().classify(x.double()).logits
        torch.testing.assert_close(model.double().eval().classify(x.double()).logits, expected, rtol=0, atol=1e-6)

    def test_other_classes_keep_a_head_of_their_own(self, tmp_path: Path) -> None:
        source, model = saved(ImageClassifier(SMALL), tmp_path / "a.pth"), ImageClassifier(SMALL)
        head = model.head.weight.clone()
        assert "head: skipped, it is of other sizes, classes or words" in start_from(model, source, ("a", "b", "c"))
        assert torch.equal(model.head.weight, head)

    def test_positions_of_another_picture_size_are_interpolated(self, tmp_path: Path) -> None:
        first = ImageClassifier(SMALL)
        source = saved(first, tmp_path / "a.pth")
        model = ImageClassifier(replace(SMALL, img_size=16))
        assert "image_position: copied" in start_from(model, source, NAMES)
        grid = model.backbone.image_position.unflatten(1, (4, 4)).movedim(-1, 1)
        back = F.interpolate(grid, (2, 2), mode="bicubic", align_corners=False).flatten(2).mT
        assert torch.cosine_similarity(back.flatten(), first.backbone.image_position.flatten(), dim=0) > 0.9

    def test_a_captioner_from_a_classifier_and_back(self, tmp_path: Path) -> None:
        classifier, captioner = ImageClassifier(SMALL), Captioner(SMALL)
        lines = start_from(captioner, saved(classifier, tmp_path / "a.pth"))
        assert {"image_encoder: copied", "text_encoder: copied", "fusion: skipped, the file has none"} <= set(lines)
        lines = start_from(classifier, saved(captioner, tmp_path / "b.pth", ()), NAMES)
        assert {"image_encoder: copied", "head: skipped, the file has none"} <= set(lines)

    def test_mistakes_are_one_line(self, tmp_path: Path) -> None:
        source = saved(ImageClassifier(SMALL), tmp_path / "a.pth")
        model = ImageClassifier(replace(SMALL, activation="relu"))
        with pytest.raises(UserError, match=r"its activation is 'gelu', this model's 'relu': give --activation gelu$"):
            start_from(model, source)
        other = replace(SMALL, embed_dim=32, patch_size=2, text_embed_dim=12, vocab_size=31)
        wide = ImageClassifier(other)
        before = {name: value.clone() for name, value in wide.state_dict().items()}
        with pytest.raises(UserError, match="nothing of it fits this model: it has embed_dim 16") as caught:
            start_from(wide, source)
        assert "\n" not in str(caught.value)
        assert all(torch.equal(value, before[name]) for name, value in wide.state_dict().items())
        whole = Path(source).read_bytes()
        Path(source).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match="it cannot be read, is damaged"):
            start_from(model, source)


def test_a_dense_run_goes_on_with_experts(tmp_path: Path, cli: Callable[..., Any]) -> None:
    """From one epoch of dense training: the upcycled model's first epoch is better than one from nothing."""
    flags = ["train", "--dataset", "digits", "--embed_dim", "32", "--epochs", "1", "--device", "cpu"]
    dense = cli(*flags, "--preset", "tiny-dense", "--save_dir", str(tmp_path / "dense"))
    assert dense.code == 0, dense.err
    accuracy = {}
    for name, more in (("new", ()), ("split", ("--init", str(tmp_path / "dense" / "digits_model.pth")))):
        done = cli(*flags, "--preset", "tiny", "--save_dir", str(tmp_path / name), *more)
        assert done.code == 0, done.err
        accuracy[name] = json.loads((tmp_path / name / "digits" / "metrics.json").read_text())["val_accuracy"]
    assert accuracy["split"] > accuracy["new"] + 0.02
    refused = cli(*flags, "--preset", "tiny", "--save_dir", str(tmp_path / "x"), "--init", str(tmp_path / "none.pth"))
    assert refused.code == 2
    assert "there is no such file" in refused.err
