"""What the experts do: the routing of many pictures, load and imbalance, specialisation.

Shapes: N pictures or texts, T tokens of each, K experts chosen for a token, E experts, C classes, L blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffmoe.evaluation.passes import Autocast, run_over
from diffmoe.model.heads import Head
from diffmoe.model.outputs import Output
from diffmoe.model.routing import Routing


@dataclass(frozen=True)
class BlockRouting:
    """Where one block sent its tokens, on the CPU; what `Routing` holds, without what only a loss needs."""

    place: str
    """image, text or fusion."""
    layer: int
    """The block's number there, from 0."""
    num_experts: int
    expert_ids: Tensor
    """(N, T, K) int16, best first; -1, no expert, at padding and where the router gave a token fewer than K."""
    gates: Tensor
    """(N, T, K) float32, the weights of the chosen experts; 0 where there is none."""
    confidence: Tensor
    """(N, T) float32, the largest router probability, 1/E to 1; nan at padding."""
    entropy: Tensor
    """(N, T) float32, of the router's probabilities, in nats, 0 to ln E; nan at padding."""

    @classmethod
    def of(cls, routing: Routing) -> BlockRouting:
        """Of a `Routing` over (N, T) tokens, on any device."""
        num_experts = routing.probs.shape[-1]
        confidence, entropy = routing.probs.amax(-1), torch.special.entr(routing.probs).sum(-1)
        expert_ids = routing.expert_ids.masked_fill(routing.expert_ids == num_experts, -1)
        if routing.mask is not None:
            confidence, entropy = (x.masked_fill(~routing.mask, math.nan) for x in (confidence, entropy))
        tensors = (expert_ids.short(), routing.gates.float(), confidence.float(), entropy.float())
        return cls(routing.place, routing.layer, num_experts, *(x.detach().cpu() for x in tensors))

    @property
    def top_k(self) -> int:
        """K."""
        return self.expert_ids.shape[-1]

    @property
    def real(self) -> Tensor:
        """(N, T) bool, False at padding."""
        return ~self.confidence.isnan()

    def __getitem__(self, rows: slice | Tensor) -> BlockRouting:
        """The routing of some of the N: a slice, int64 (M,) or bool (N,)."""
        tensors = {name: getattr(self, name)[rows] for name in _TENSORS}
        return replace(self, **tensors)


_TENSORS = ("expert_ids", "gates", "confidence", "entropy")


class RoutingCollector:
    """Keeps where every token went: image tower, text tower, fusion; nothing where the model is dense."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, int], list[BlockRouting]] = {}
        self._last: dict[tuple[str, int], Routing] = {}

    def add(self, batch: Sequence[Tensor], output: Output) -> None:
        for routing in output.routing:
            place = (routing.place, routing.layer)
            # A classifier's descriptions are read once for all batches, and then come back with each: they count once.
            if routing is not self._last.get(place):
                self._kept.setdefault(place, []).append(BlockRouting.of(routing))
            self._last[place] = routing

    def blocks(self) -> tuple[BlockRouting, ...]:
        """One a routed block. A captioner's text and fusion blocks have the N captions; a classifier's text blocks the
        descriptions of its classes, its fusion blocks the N pictures.
        """
        return tuple(_join(parts) for parts in self._kept.values())


def trace_experts(
    model: Head, batches: Iterable[Sequence[Tensor]], autocast: Autocast = nullcontext
) -> tuple[BlockRouting, ...]:
    """Run `model` once over `batches` and keep its routing, as `RoutingCollector` has it.

    Raises `ValueError` where there are no batches, `UserError` where an output is not finite.
    """
    collector = RoutingCollector()
    run_over(model, batches, collector.add, autocast=autocast)
    return collector.blocks()


def _join(parts: Sequence[BlockRouting]) -> BlockRouting:
    """The batches of one block as one, texts padded to the longest; ordinary tensors, not those of inference mode."""
    longest = max(part.real.shape[1] for part in parts)
    padding = {"expert_ids": -1, "gates": 0.0, "confidence": math.nan, "entropy": math.nan}

    def joined(name: str) -> Tensor:
        tensors: list[Tensor] = [getattr(part, name) for part in parts]
        whole = tensors[0].new_full((sum(map(len, tensors)), longest, *tensors[0].shape[2:]), padding[name])
        for rows, tensor in zip(whole.split([len(tensor) for tensor in tensors]), tensors, strict=True):
            rows[:, : tensor.shape[1]] = tensor
        return whole

    return replace(parts[0], **{name: joined(name) for name in _TENSORS})


def tokens_per_expert(block: BlockRouting) -> Tensor:
    """(E,) int64, routed slots that each expert received; padding is not counted."""
    return torch.bincount(block.expert_ids[block.expert_ids >= 0], minlength=block.num_experts)


def imbalance(counts: Tensor) -> dict[str, float]:
    """How unevenly the load `counts` (E,) is spread over E experts.

    - `cv`: standard deviation over mean; 0 when even, sqrt(E - 1) when one expert has all (Shazeer et al. 2017, eq. 6,
      has its square);
    - `max_over_mean`: the fullest expert's load over the mean, 1 to E: what the slowest of E devices waits for;
    - `dead`: experts that received nothing;
    - `normalized_entropy`: of the shares, over ln E: 1 when even, 0 when one expert has all; 1 where E is 1.

    Raises `ValueError` where all counts are 0.
    """
    load = counts.double()
    if not load.sum() > 0:
        raise ValueError("no token was routed: there is no load to compare")
    share, mean, num_experts = load / load.sum(), load.mean(), len(load)
    return {
        "cv": (load.std(correction=0) / mean).item(),
        "max_over_mean": (load.max() / mean).item(),
        "dead": float((load == 0).sum()),
        "normalized_entropy": _entropy(share).item() / math.log(num_experts) if num_experts > 1 else 1.0,
    }


def _entropy(shares: Tensor) -> Tensor:
    """In nats."""
    return torch.special.entr(shares).sum()


def class_expert_counts(block: BlockRouting, labels: Tensor, num_classes: int) -> Tensor:
    """(C, E) int64, routed slots of the tokens of each class's pictures that each expert received.

    `labels` (N,) int64. Raises `ValueError` where they are not one a picture.
    """
    if len(labels) != len(block.expert_ids):
        raise ValueError(f"{len(labels)} labels for {len(block.expert_ids)} pictures")
    cell = labels[:, None, None] * block.num_experts + block.expert_ids
    counts = torch.bincount(cell[block.expert_ids >= 0], minlength=num_classes * block.num_experts)
    return counts.view(num_classes, block.num_experts)


def mutual_information(counts: Tensor) -> tuple[float, float]:
    """What the expert of a token tells of the class of its picture, and the other way round: of joint counts (C, E).

    In bits, I = H(class) + H(expert) - H(class, expert), the plug-in estimate, 0 when independent; and its part of the
    smaller of the two entropies: 1 when one tells the other, 0 where nothing varies.

    Of M slots it is too high by about (C - 1)(E - 1) / (2 M ln 2) bits (Miller 1955): nothing, unless M is small.
    Raises `ValueError` where all counts are 0.
    """
    total = counts.sum()
    if not total > 0:
        raise ValueError("no token was routed: there is no information to measure")
    joint = counts.double() / total
    of_class, of_expert = _entropy(joint.sum(1)), _entropy(joint.sum(0))
    nats = max((of_class + of_expert - _entropy(joint)).item(), 0.0)
    smaller = min(of_class, of_expert).item()
    return nats / math.log(2), nats / smaller if smaller > 0 else 0.0


def coactivation(block: BlockRouting) -> Tensor:
    """(E, E) int64, tokens that were sent to both experts; on the diagonal, to that expert. With K = 1 only that."""
    ids = block.expert_ids[block.real].long()
    chosen = torch.zeros(len(ids), block.num_experts + 1, dtype=torch.float64)  # float32 counts to 2^24 only
    chosen.scatter_(1, ids % (block.num_experts + 1), 1)  # no expert, -1, is the last
    return (chosen.T @ chosen).long()[:-1, :-1]


def favourites(block: BlockRouting, expert: int, count: int) -> Tensor:
    """The tokens that an expert has the highest gates for, (M, 2) int64: row of the N and token; M <= count.

    At most one of each picture, so that the best ones differ. Equal gates: the first.
    """
    gate_NT = (block.gates * (block.expert_ids == expert)).sum(-1)
    best_N, token_N = gate_NT.max(1)
    rows = best_N.argsort(descending=True, stable=True)[:count]
    rows = rows[best_N[rows] > 0]
    return torch.stack([rows, token_N[rows]], dim=1)
