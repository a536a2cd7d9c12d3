"""What training minimises, and one step of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn

from diffmoe.config import TrainingConfig
from diffmoe.model.heads import Classifier, Head
from diffmoe.model.moe import routed_pools
from diffmoe.model.outputs import ClassifierOutput
from diffmoe.training.averages import Averages
from diffmoe.training.optimizer import make_optimizer
from diffmoe.training.parallel import total

Sums = dict[str, Tensor]
"""Metrics times what they are means over, with `pictures` and `targets`, how many of these there were."""
BY_TARGET = ("task_loss", "accuracy")
"""The metrics that are means over targets (classes, words); all others are means over pictures."""


class Step(NamedTuple):
    """What the objective makes of a batch."""

    task_loss: Tensor
    """Mean over the batch's targets."""
    own_loss: Tensor
    """The model's own losses, weighted and summed: a mean over pictures."""
    accuracy: Tensor
    parts: dict[str, Tensor]
    """The model's own losses one by one."""
    loads: dict[str, Tensor]
    """(E,) tokens that each expert of a routed block got, by the block's `<place>_<layer>`."""


class Objective(nn.Module):
    """A head's cross-entropy beside the model's weighted auxiliary losses.

    A module, because what wraps models for several devices carries no other return value.

    Args:
        model: the head.
        label_smoothing: mass spread evenly over the classes, or the tokens that can be written.
        super_classes: (C,) int64, the expert that pictures of each class are guided to, by router_guidance_weight of
            the model's config; None guides none.
        class_weights: (C,) float32, how much the loss of a picture of each class counts; None: all the same.
    """

    expert_of_class: Tensor | None
    class_weights: Tensor | None

    def __init__(
        self,
        model: Head,
        label_smoothing: float = 0.0,
        super_classes: Tensor | None = None,
        class_weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing
        experts = model.config.num_general_experts
        # Here and not in the model: a trained router needs no super-classes.
        one_hot = None if super_classes is None else F.one_hot(super_classes, experts).float()
        self.register_buffer("expert_of_class", one_hot, persistent=False)
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(self, *batch: Tensor) -> Step:
        """A batch of the head's data."""
        output = self.model.run(batch, need_losses=True)
        assert output.losses is not None
        if self.class_weights is None:
            score = self.model.score(batch, output, self.label_smoothing)
        else:
            assert isinstance(self.model, Classifier)  # or there would be no classes
            told = cast(ClassifierOutput, output)
            score = self.model.score(batch, told, self.label_smoothing, self.class_weights)
        loads = {f"{routing.place}_{routing.layer}": routing.tokens_per_expert for routing in output.routing}
        own, parts = output.losses.router_loss, output.losses.parts()
        if self.expert_of_class is not None:
            assert isinstance(self.model, Classifier)  # or there would be no classes
            guidance = self.model.guidance_loss(batch, output, self.expert_of_class)
            own = own + self.model.config.router_guidance_weight * guidance
            parts["router_guidance_loss"] = guidance
        return Step(score.loss, own, score.accuracy, parts, loads)


class Trainee:
    """A model with all that a training step takes.

    Args:
        fabric: launched.
        model: changed in place.
        config: the loop's settings.
        super_classes, class_weights: as `Objective`.
    """

    def __init__(
        self,
        fabric: Fabric,
        model: Head,
        config: TrainingConfig,
        super_classes: Tensor | None = None,
        class_weights: Tensor | None = None,
    ) -> None:
        self.fabric, self.model, self.config = fabric, model, config
        objective = Objective(model, config.label_smoothing, super_classes, class_weights)
        compiled = cast(nn.Module, torch.compile(objective)) if config.compile else objective
        self.objective, self.optimizer = fabric.setup(compiled, make_optimizer(model, config))
        has_routers = model.config.balance_bias_rate > 0 and not model.config.dense
        self.routers = model.backbone.routers() if has_routers else {}
        self.averages = Averages(model, config.ema_decay) if config.ema_decay > 0 else None
        models = dict.fromkeys((model, self.evaluated))
        self.pools = [pool for one in models for pool in routed_pools(one).values()]

    @property
    def evaluated(self) -> Head:
        """The model that is validated and kept: with averaged weights, where there are any."""
        return self.model if self.averages is None else self.averages.model

    def make_whole(self, whole: bool) -> None:
        """Whether each routed pool is one FFN: of the model, and of the averages."""
        for pool in self.pools:
            pool.whole = whole

    def step(self, window: Sequence[Sequence[Tensor]], rate: float) -> Sums:
        """One optimizer step on a window of batches, as on one batch of them all, ragged or not.

        The task's gradient is that of the mean over all targets of all ranks' windows; that of the model's own losses
        the mean over pictures of what each batch has, as they look at whole batches.

        Returns:
            This rank's sums; tensors, so that nothing waits for the device.
        """
        fabric = self.fabric
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("scale", 1.0)
        pictures = [len(batch[0]) for batch in window]
        targets = torch.stack([torch.as_tensor(self.model.num_targets(batch)) for batch in window]).float()
        sums: Sums = {"pictures": torch.tensor(float(sum(pictures))), "targets": targets.sum()}
        share = total(fabric, torch.stack([targets.new_tensor(sum(pictures)), targets.sum()]), mean=True).clamp_min(1)
        loads: dict[str, Tensor] = {}
        for number, batch in enumerate(window):
            # Gradients travel between devices once a window, with its last batch.
            with fabric.no_backward_sync(self.objective, enabled=number + 1 < len(window)):
                step: Step = self.objective(*batch)
                of_task, of_own = targets[number] / share[1], pictures[number] / share[0]
                fabric.backward(step.task_loss * of_task + step.own_loss * of_own)
            _add(sums, step, pictures[number], targets[number])
            for name, load in step.loads.items():
                loads[name] = loads.get(name, 0) + load
        if self.config.expert_sharing > 0:
            for pool in self.pools:  # those of averages have no gradients
                pool.share_gradients(self.config.expert_sharing)
        if self.config.clip_norm > 0:
            fabric.clip_gradients(
                self.objective, self.optimizer, max_norm=self.config.clip_norm, error_if_nonfinite=False
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._balance(loads)
        if self.averages is not None:
            self.averages.update(self.model)
        return sums

    def _balance(self, loads: dict[str, Tensor]) -> None:
        """Move the routers' biases by the load of the whole window on all devices: never inside `forward`, which
        gradient checkpointing runs twice.
        """
        for name, router in self.routers.items():
            if name in loads:
                router.update_balance_bias(total(self.fabric, loads[name]), self.model.config.balance_bias_rate)


def _add(sums: Sums, step: Step, pictures: int, targets: Tensor) -> None:
    metrics = {"task_loss": step.task_loss, "own_loss": step.own_loss, "accuracy": step.accuracy, **step.parts}
    for name, value in metrics.items():
        sums[name] = sums.get(name, 0) + value.detach() * (targets if name in BY_TARGET else pictures)


def means(sums: Sums) -> dict[str, float]:
    """The metrics, with `loss`, what is minimised: the task's and the model's own. Waits for the device."""
    pictures, targets = float(sums["pictures"]), max(float(sums["targets"]), 1.0)
    found = {
        name: float(value) / (targets if name in BY_TARGET else pictures)
        for name, value in sums.items()
        if name not in ("pictures", "targets")
    }
    return {"loss": found["task_loss"] + found.pop("own_loss"), **found}
