"""What training minimises: a task's loss plus the model's own, one module a task, for `training.fit`.

A module, because the library that wraps models for several devices cannot carry the model's own return value.
"""

from __future__ import annotations

from torch import Tensor, nn

from diffmoe.model.captioner import Captioner

AUXILIARY = ("router_z_loss", "router_balance_loss", "cross_modal_loss", "contrastive_loss")
"""The model's own losses, which are reported one by one."""


class ClassificationObjective(nn.Module):
    """Cross-entropy of the head plus the model's weighted auxiliary losses, for `fit`.

    Args:
        model: called with (images, labels), returns logits, router_loss and its parts.
        label_smoothing: mass spread evenly over the classes.
    """

    def __init__(self, model: nn.Module, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """A batch -> the loss, and what to report; each a mean over the batch."""
        out = self.model(images, labels)
        task = nn.functional.cross_entropy(out["logits"].float(), labels, label_smoothing=self.label_smoothing)
        loss = task + out["router_loss"]
        accuracy = (out["logits"].argmax(-1) == labels).float().mean()
        parts = {name: out[name] for name in AUXILIARY}
        return loss, {"loss": loss, "task_loss": task, "accuracy": accuracy, **parts}


class CaptionObjective(nn.Module):
    """Cross-entropy of the next token plus the model's weighted auxiliary losses, contrast among them, for `fit`.

    Args:
        model: called with (images, tokens, mask), returns caption_features, router_loss and its parts; its
            `caption_loss` scores the features.
        label_smoothing: mass spread evenly over the tokens that can be written.
    """

    def __init__(self, model: Captioner, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing

    def forward(self, images: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """A batch -> the loss, and what to report; each a mean over the batch."""
        out = self.model(images, tokens, mask, need_logits=False)
        task, accuracy = self.model.caption_loss(out["caption_features"], tokens, mask, self.label_smoothing)
        loss = task + out["router_loss"]
        parts = {name: out[name] for name in AUXILIARY}
        return loss, {"loss": loss, "task_loss": task, "accuracy": accuracy, **parts}
