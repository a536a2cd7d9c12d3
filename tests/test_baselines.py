"""Baselines are heads as others: trained, saved, opened, used; and what they cannot do is one line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from diffmoe import Predictor, load_model
from diffmoe.baselines import Baseline
from diffmoe.config import ModelConfig, UserError

FIELDS: dict[str, Any] = {
    **{"img_size": 8, "patch_size": 2, "in_channels": 1, "embed_dim": 16, "num_heads": 2, "img_encoder_layers": 2},
    **{"dropout": 0.0, "num_classes": 3, "expansion_factor": 1.5},
}
KINDS = [("cnn", "conv"), ("cnn", "whitened"), ("timm", "linear")]


def make(architecture: Any, patch_embed: Any) -> Baseline:
    torch.manual_seed(0)
    return Baseline(ModelConfig(**FIELDS, architecture=architecture, patch_embed=patch_embed))


@pytest.mark.parametrize(("architecture", "patch_embed"), KINDS)
def test_it_tells_classes_from_the_mean_of_its_features(architecture: str, patch_embed: str) -> None:
    model = make(architecture, patch_embed).eval()
    images = torch.randn(5, 1, 8, 8)
    out = model.run((images, torch.zeros(5, dtype=torch.int64)), need_losses=True)
    width = 16 if architecture == "timm" else 24
    assert out.image.features.shape == (5, 4 if patch_embed == "whitened" else 16, width)
    torch.testing.assert_close(out.logits, model.head(out.image.features.mean(1)))
    assert out.losses is not None
    assert out.losses.router_loss == 0
    assert out.routing == ()
    torch.testing.assert_close(model.run((images[1:2],)).logits, out.logits[1:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("architecture", "patch_embed"), KINDS)
def test_every_weight_learns_but_the_whitening(architecture: str, patch_embed: str) -> None:
    model = make(architecture, patch_embed)
    batch = torch.randn(6, 1, 8, 8), torch.arange(6) % 3
    model.score(batch, model.run(batch)).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_trained_by_the_command_it_is_tested_opened_and_used(cli: Any, tiny_flags: Any, tmp_path: Path) -> None:
    flags = [
        *tiny_flags,
        "--architecture",
        "cnn",
        "--epochs",
        2,
        "--save_dir",
        tmp_path,
        "--output_dir",
        tmp_path / "v",
    ]
    result = cli("train_test", *flags)
    assert (result.code, result.err) == (0, "")
    path = tmp_path / "digits_model.pth"
    assert isinstance(load_model(path), Baseline)
    used = Predictor(path, "cpu")
    pictures = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    assert len(used.classify(pictures)) == 2
    for ask in (used.embed_images, used.routing, lambda images: used.zero_shot(images, ["a", "b"])):
        with pytest.raises(UserError, match=r"is a baseline \(cnn\)|trained without class descriptions"):
            ask(pictures)
    report = cli("visualize", "--checkpoint", path, "--device", "cpu", "--output_dir", tmp_path / "v")
    assert (report.code, report.err) == (0, "")


def test_without_timm_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm.models.vision_transformer", None)
    with pytest.raises(UserError, match=r"timm is not installed: pip install 'diff-moe\[bench\]'"):
        make("timm", "linear")


def test_it_reads_no_descriptions() -> None:
    with pytest.raises(UserError, match="classify_with is 'descriptions': it must be 'image' with a baseline"):
        ModelConfig(**FIELDS, architecture="cnn", classify_with="descriptions")
