"""Named ranges around a model's parts, put there for as long as it is profiled and then taken away again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from lightning_fabric import Fabric
from torch import nn
from torch.autograd.profiler import record_function

from diffmoe.model.captioner import Captioner
from diffmoe.model.heads import ImageClassifier
from diffmoe.profiling.parts import HEAD, LOSSES, OPTIMIZER, OTHER, Part, module_parts

PREFIX = "diffmoe/"
STEP, BACKWARD = f"{PREFIX}step", f"{PREFIX}backward"


def label(part: Part) -> str:
    """The name of a part's range in a trace: diffmoe/image/router, diffmoe/head."""
    return PREFIX + "/".join(piece for piece in part if piece)


def part_of_label(name: str) -> Part | None:
    """The part of a range called `name`; None where it is no part's."""
    if not name.startswith(PREFIX) or name in (STEP, BACKWARD):
        return None
    place, _, part = name.removeprefix(PREFIX).rpartition("/")
    return Part(place, part)


@contextmanager
def ranges(model: ImageClassifier | Captioner, objective: nn.Module, fabric: Fabric) -> Iterator[None]:
    """Within it, each part of a training step runs in a range of its own, and the backward pass in one.

    Where a part is no module but a method, the object gets a wrapped method of its own. The optimizer's ranges are
    torch's.
    """
    with ExitStack() as stack:
        stack.enter_context(_module_range(objective, LOSSES))
        stack.enter_context(_module_range(model, OTHER))
        for _, module, part in module_parts(model):
            stack.enter_context(_module_range(module, part))
        stack.enter_context(_method_range(model.backbone, "assemble", label(LOSSES)))
        if isinstance(model, Captioner):
            stack.enter_context(_method_range(model, "logits", label(HEAD)))
        stack.enter_context(_method_range(fabric, "clip_gradients", label(OPTIMIZER)))
        stack.enter_context(_method_range(fabric, "backward", BACKWARD))
        yield


@contextmanager
def _module_range(module: nn.Module, part: Part) -> Iterator[None]:
    opened: list[Any] = []

    def enter(*_: object) -> None:
        opened.append(record_function(label(part)))
        opened[-1].__enter__()

    def leave(*_: object) -> None:
        opened.pop().__exit__(None, None, None)

    # always_call: gradient checkpointing leaves a module by an exception as soon as it has what it needs.
    handles = (module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _method_range(owner: Any, name: str, title: str) -> Iterator[None]:
    method: Callable[..., Any] = getattr(owner, name)

    def ranged(*args: Any, **kwargs: Any) -> Any:
        with record_function(title):
            return method(*args, **kwargs)

    setattr(owner, name, ranged)
    try:
        yield
    finally:
        delattr(owner, name)
