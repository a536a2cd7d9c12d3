"""Picture classifiers of the presets' shapes, and their whole training step as a contender.

Shapes: B pictures, C channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import cast

import torch
from lightning_fabric import Fabric
from timing import float32_products
from torch import Tensor, nn
from torch.optim import Optimizer
from vits import count_flops

from diffmoe.config import ModelConfig, TrainingConfig
from diffmoe.model.heads import ImageClassifier
from diffmoe.objectives import ClassificationObjective
from diffmoe.recipes import recipe
from diffmoe.training import make_optimizer, train_step

LEARNING_RATE = 1e-3
Batch = tuple[Tensor, Tensor]
"""Pictures float32 (B, C, size, size) and labels int64 (B,)."""


def preset_config(preset: str, dataset: str = "fashion_mnist", **changes: object) -> ModelConfig:
    """A preset's model for the pictures of a dataset, with changes."""
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    fields = {name: value for name, value in recipe(dataset, preset).items() if name in known}
    return ModelConfig(**{**fields, **changes})


def resized(preset: str, dataset: str, embed_dim: int | None, top_k: int | None) -> ModelConfig:
    """A preset's model at another width, with heads as wide as its own, and another K; None is its own."""
    config = preset_config(preset, dataset)
    head_dim = config.embed_dim // config.num_heads
    embed_dim, top_k = embed_dim or config.embed_dim, top_k or config.top_k
    return dataclasses.replace(config, embed_dim=embed_dim, num_heads=embed_dim // head_dim, top_k=top_k)


def class_tokens(config: ModelConfig) -> Tensor:
    """Made-up descriptions of the classes: 6 of each, of 20 tokens; the same at every call."""
    generator = torch.Generator().manual_seed(0)
    length = min(20, config.max_text_len)
    return torch.randint(config.vocab_size, (config.num_classes, 6, length), generator=generator)


def classifier(config: ModelConfig, seed: int = 0) -> ImageClassifier:
    """A fresh one."""
    torch.manual_seed(seed)
    return ImageClassifier(config, class_tokens(config))


def batch_source(config: ModelConfig, batch_size: int, device: str, seed: int = 0) -> Callable[[], Batch]:
    """A function that draws a new batch of noise at every call."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Batch:
        shape = (batch_size, config.in_channels, config.img_size, config.img_size)
        labels = torch.randint(config.num_classes, (batch_size,), generator=generator)
        return torch.randn(shape, generator=generator).to(device), labels.to(device)

    return draw


def active_flops(config: ModelConfig, batch_size: int) -> float:
    """Forward FLOPs of a training batch: the dense preset's, the same active compute with neither router nor padding.

    In the batch the class descriptions count once, however many pictures there are.
    """
    changes = {"dense": True, "use_gradient_checkpointing": False}
    model = classifier(dataclasses.replace(config, **changes))
    pictures = torch.zeros(2, config.in_channels, config.img_size, config.img_size)
    labels = torch.zeros(2, dtype=torch.int64)
    one, two = count_flops(model, pictures[:1], labels[:1]), count_flops(model, pictures, labels)
    return one + (batch_size - 1) * (two - one)


class PlainObjective(nn.Module):
    """Cross-entropy of a model of pictures alone, for `train_step`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """A batch -> the loss, and what to report."""
        loss = nn.functional.cross_entropy(self.model(images).float(), labels)
        return loss, {"loss": loss}


class TrainingStep:
    """Forward, backward, clipping and optimizer step, as a contender. The optimizer moves the routers.

    Args:
        model: an `ImageClassifier`, or a model of pictures alone.
        mode: of `timing.FLOAT32_PRODUCTS`.
        device: where to compute.
        optimizer: of the model's parameters; None is the program's own.
        compiled: through torch.compile.
    """

    def __init__(
        self,
        model: nn.Module,
        mode: str = "onednn",
        device: str = "cpu",
        optimizer: Optimizer | None = None,
        compiled: bool = False,
    ) -> None:
        self.mode = mode
        precision = "bf16-mixed" if mode == "bfloat16" else "32-true"
        self.fabric = Fabric(accelerator=device, devices=1, precision=precision)
        is_ours = isinstance(model, ImageClassifier)
        objective = ClassificationObjective(model) if is_ours else PlainObjective(model)
        optimizer = optimizer or make_optimizer(model, TrainingConfig())
        self.objective, self.optimizer = self.fabric.setup(
            cast(nn.Module, torch.compile(objective)) if compiled else objective, optimizer
        )

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """One step; returns what `train_step` does."""
        with float32_products(self.mode):
            return train_step(self.fabric, self.objective, self.optimizer, [batch], rate=LEARNING_RATE, clip_norm=1.0)
