"""Picture classifiers of the presets' shapes, and their whole training step as a contender.

Shapes: B pictures, C channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from lightning_fabric import Fabric
from timing import autocast, float32_products
from torch import Tensor, nn
from torch.optim import Optimizer
from vits import count_flops

from diffmoe.config import ModelConfig, TrainingConfig
from diffmoe.config.recipes import recipe
from diffmoe.model.heads import ImageClassifier
from diffmoe.training.objective import Trainee
from diffmoe.training.optimizer import make_optimizer

LEARNING_RATE = 1e-3
CLIP_NORM = 1.0
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


class TrainingStep:
    """Forward, backward, clipping and optimizer step, as a contender: the loop's own. The optimizer moves the routers.

    Args:
        model: the classifier.
        mode: of `timing.FLOAT32_PRODUCTS`.
        device: where to compute.
        optimizer: of the model's parameters; None is the program's own.
        compiled: through torch.compile.
    """

    def __init__(
        self,
        model: ImageClassifier,
        mode: str = "onednn",
        device: str = "cpu",
        optimizer: Optimizer | None = None,
        compiled: bool = False,
    ) -> None:
        self.mode = mode
        precision = "bf16-mixed" if mode == "bfloat16" else "32-true"
        fabric = Fabric(accelerator=device, devices=1, precision=precision)
        config = TrainingConfig(clip_norm=CLIP_NORM, label_smoothing=0.0, compile=compiled)
        self.trainee = Trainee(fabric, model, config)
        if optimizer is not None:
            self.trainee.optimizer = fabric.setup_optimizers(optimizer)

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """One step; returns what `Trainee.step` does."""
        with float32_products(self.mode):
            return self.trainee.step([batch], LEARNING_RATE)


class PlainStep:
    """The same work for a model of pictures alone, as a contender: cross-entropy, clipping, the same optimizer."""

    def __init__(self, model: nn.Module, mode: str = "onednn", device: str = "cpu") -> None:
        self.model, self.mode, self.device = model.to(device), mode, device
        self.optimizer = make_optimizer(model, TrainingConfig(lr=LEARNING_RATE))

    def __call__(self, batch: Batch) -> Tensor:
        """One step; returns the loss."""
        images, labels = batch
        with float32_products(self.mode):
            with autocast(self.mode, self.device):
                loss = nn.functional.cross_entropy(self.model(images).float(), labels)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()
