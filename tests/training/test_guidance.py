"""Routers are guided by super-classes: in training, by labels that reach nothing else."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from tests.small import SMALL

from diffmoe.config import ModelConfig, TrainingConfig, UserError
from diffmoe.config.settings import parse_settings
from diffmoe.model.heads import ImageClassifier
from diffmoe.tasks.captioning import Captioning
from diffmoe.tasks.classification import Classification
from diffmoe.training.objective import Objective, Trainee, means

GROUPS = torch.tensor([2, 0, 0])
"""The experts of three classes."""


def classifier(**fields: Any) -> ImageClassifier:
    torch.manual_seed(0)
    return ImageClassifier(dataclasses.replace(SMALL, router_guidance_weight=0.5, img_encoder_layers=2, **fields))


def shades(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures of three classes: a bright corner each, in noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    images = 0.3 * torch.randn(count, 1, 8, 8, generator=generator)
    for row, label in enumerate(labels.tolist()):
        images[row, 0, 4 * (label // 2) : 4 * (label // 2) + 4, 4 * (label % 2) : 4 * (label % 2) + 4] += 2
    return images, labels


def test_is_the_sum_over_the_image_towers_blocks_and_weighted() -> None:
    model = classifier().double()
    images, labels = shades(6)
    batch = images.double(), labels
    step, plain = Objective(model, 0.0, GROUPS)(*batch), Objective(model)(*batch)
    blocks = model.run(batch).image.routing
    own = [-math.log(block.probs[row, :, GROUPS[labels[row]]].mean().item()) for block in blocks for row in range(6)]
    expected = sum(own) / 6
    assert len(blocks) == 2
    assert step.parts["router_guidance_loss"].item() == pytest.approx(expected)
    assert step.own_loss.item() == pytest.approx(plain.own_loss.item() + 0.5 * expected)
    assert "router_guidance_loss" not in plain.parts
    torch.testing.assert_close(step.task_loss, plain.task_loss, rtol=0, atol=0)


def test_of_mixed_pictures_each_class_has_its_share() -> None:
    objective, (images, labels) = Objective(classifier(), 0.0, GROUPS), shades(6)

    def guidance(*batch: torch.Tensor) -> float:
        return objective(*batch).parts["router_guidance_loss"].item()

    others = labels.flip(0)
    mixed = guidance(images, labels, others, torch.full((6,), 0.75))
    assert mixed == pytest.approx(0.75 * guidance(images, labels) + 0.25 * guidance(images, others))


def test_a_model_file_knows_nothing_of_it() -> None:
    model = classifier()
    before = model.state_dict().keys()
    objective = Objective(model, 0.0, GROUPS)
    assert objective.state_dict().keys() == {f"model.{name}" for name in before}


@pytest.mark.parametrize("router", ["attentive", "picture", "merged"])
def test_a_few_steps_bring_pictures_to_their_experts(router: str) -> None:
    model = classifier(router=router, top_k=1)
    config = TrainingConfig(lr=0.01, clip_norm=0.0)
    trainee = Trainee(Fabric(accelerator="cpu", devices=1), model, config, GROUPS)
    batch = shades(24)
    losses = [means(trainee.step([batch], 0.01))["router_guidance_loss"] for _ in range(60)]
    assert losses[-1] < losses[0] / 2
    for block in model.eval().run(batch).image.routing:
        assert torch.equal(block.probs.mean(1).argmax(-1), GROUPS[batch[1]])


class TestWhoCanBeGuided:
    def check(self, *flags: str) -> None:
        Classification().check(parse_settings(["--router_guidance_weight", "0.3", *flags], mode="train"))

    def test_routers_that_can_send_a_picture_to_one_expert(self) -> None:
        for router in ("attentive", "picture", "merged"):
            self.check("--router", router)

    @pytest.mark.parametrize("router", ["expert_choice", "soft", "hash", "random"])
    def test_no_others(self, router: str) -> None:
        with pytest.raises(UserError, match=rf"0.3: router '{router}' .*attentive, picture, merged"):
            self.check("--router", router)

    @pytest.mark.parametrize("flags", [("--dense", "true"), ("--architecture", "cnn")])
    def test_no_dense_model(self, flags: tuple[str, ...]) -> None:
        with pytest.raises(UserError, match=r"router_guidance_weight is 0.3: this model is dense"):
            self.check(*flags)

    def test_no_captions(self) -> None:
        settings = parse_settings(["--router_guidance_weight", "0.3", "--dataset", "shapes"], mode="train")
        with pytest.raises(UserError, match=r"router_guidance_weight is 0.3: .*captions have none"):
            Captioning().check(settings)


def test_arms_may_differ_in_it() -> None:
    from diffmoe.comparison.arms import parse_arms

    arms = parse_arms(["moe", "dense", "guided:router_guidance_weight=0.3"], ["--dataset", "digits"], "flops", "test")
    assert [arm.settings.model.router_guidance_weight for arm in arms] == [0.0, 0.0, 0.3]
    arms = parse_arms(["moe", "dense"], ["--router_guidance_weight", "0.3"], "flops", "test")
    assert [arm.settings.model.router_guidance_weight for arm in arms] == [0.3, 0.0]
    assert ModelConfig().router_guidance_weight == 0
