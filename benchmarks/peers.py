"""What a user would pick instead of the routed pool: each a layer (T, D) -> (T, D) with a router that can be moved.

Shapes: T tokens, D width, E experts, K experts chosen for a token, F hidden width of an expert.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from tables import installed_version
from torch import Tensor, nn

from diffmoe.model.layers import Expert
from diffmoe.model.moe import GeneralExperts
from diffmoe.model.routing import Routing

MOST_COPIED = 2e9
"""Bytes of weights that a layer may copy before it is left out."""


@dataclass(frozen=True)
class Shape:
    """What all layers of a race have in common."""

    embed_dim: int
    num_experts: int
    top_k: int
    expansion_factor: float
    tokens: int
    seq_len: int
    """Length of the sequences that the tokens are cut into, for layers that route within one."""


class Routed(nn.Module):
    """A routed pool, or what takes its place, without the `Routing` that it returns besides."""

    def __init__(self, pool: GeneralExperts) -> None:
        super().__init__()
        self.pool = pool
        self.router_weight = pool.router.keys

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        return self.pool(x_TD)[0]


class LoopWithMasks(GeneralExperts):
    """The classical routed layer: a loop over the experts, each run on the tokens that a mask picks out.

    Router, weights and output are those of the pool it is made from; a `GeneralExperts`, so that a block takes it.
    """

    def __init__(self, pool: GeneralExperts) -> None:
        nn.Module.__init__(self)  # none of the pool's stacked weights
        self.eps, self.embed_dim = pool.eps, pool.embed_dim
        self.router = copy.deepcopy(pool.router)
        self.experts = nn.ModuleList(_expert(pool, number) for number in range(len(pool.gain)))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Routing]:
        """As the pool's."""
        routing = self.router(F.layer_norm(x, (self.embed_dim,), eps=self.eps), mask)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            chosen = routing.expert_ids == number
            here = chosen.any(-1)
            if here.any():
                gate = (routing.gates * chosen).sum(-1)[here]
                y[here] = y[here] + (gate[:, None] * expert(x[here])).to(y.dtype)
        return y, routing


@torch.no_grad()
def _expert(pool: GeneralExperts, number: int) -> Expert:
    """One expert of the pool as a module of its own, its weights copied."""
    hidden = pool.fc1_weight.shape[1]
    expert = Expert(pool.embed_dim, hidden / pool.embed_dim, pool.activation, pool.dropout, pool.eps).to(pool.gain)
    for target, stack in (
        (expert.norm.weight, pool.gain),
        (expert.norm.bias, pool.shift),
        (expert.fc1.weight, pool.fc1_weight),
        (expert.fc1.bias, pool.fc1_bias),
        (expert.fc2.weight, pool.fc2_weight),
        (expert.fc2.bias, pool.fc2_bias),
    ):
        target.copy_(stack[number])
    return expert


class HuggingFaceExperts(nn.Module):
    """transformers' ungated experts (Nemotron-H) with the pool's router and weights.

    Args:
        pool: whose weights are copied; with its biases and norms as they are when made, the output is the same.
        implementation: transformers' `experts_implementation`: eager, grouped_mm or batched_mm.
    """

    def __init__(self, pool: GeneralExperts, implementation: str) -> None:
        super().__init__()
        from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

        num_experts, hidden, width = pool.fc1_weight.shape
        config = SimpleNamespace(
            n_routed_experts=num_experts,
            hidden_size=width,
            moe_intermediate_size=hidden,
            moe_latent_size=None,
            mlp_hidden_act=pool.activation,
            _experts_implementation=implementation,
        )
        self.eps = pool.eps
        self.router = copy.deepcopy(pool.router)
        self.router_weight = self.router.keys
        self.experts = NemotronHExperts(config).to(pool.gain)
        with torch.no_grad():
            self.experts.up_proj.copy_(pool.fc1_weight)
            self.experts.down_proj.copy_(pool.fc2_weight)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        x_TD = F.layer_norm(x_TD, (x_TD.shape[-1],), eps=self.eps)
        routing = self.router(x_TD)
        return self.experts(x_TD, routing.expert_ids, routing.gates.to(x_TD.dtype))


class StMoe(nn.Module):
    """st-moe-pytorch's layer. Its capacity is set to K slots a token, the number of rows that the pool computes."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # beartype's, about that package's own type hints
            from st_moe_pytorch import MoE

            self.layer = MoE(
                shape.embed_dim,
                num_experts=shape.num_experts,
                gating_top_n=shape.top_k,
                expert_hidden_mult=shape.expansion_factor,  # pyright: ignore[reportArgumentType] - fractions work
                capacity_factor_train=float(shape.top_k),
            )
        self.seq_len = shape.seq_len
        self.router_weight = self.layer.gate.to_gates.weight

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        return self.layer(x_TD.unflatten(0, (-1, self.seq_len))).outputs.flatten(0, 1)


class SoftMoe(nn.Module):
    """soft-moe-pytorch's layer, with as many slots as the pool computes rows: K for every token."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        from soft_moe_pytorch import SoftMoE

        self.layer = SoftMoE(
            shape.embed_dim,
            num_experts=shape.num_experts,
            num_slots=_slots_of_expert(shape),
            expert_mult=shape.expansion_factor,  # pyright: ignore[reportArgumentType] - fractions work
            offload_unused_experts_to_cpu=False,
        )
        self.seq_len = shape.seq_len
        self.router_weight = self.layer.slot_embeds

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        return self.layer(x_TD.unflatten(0, (-1, self.seq_len))).flatten(0, 1)


def _slots_of_expert(shape: Shape) -> int:
    return shape.top_k * shape.seq_len // shape.num_experts


@dataclass(frozen=True)
class Peer:
    """Somebody else's routed layer."""

    build: Callable[[GeneralExperts, Shape], nn.Module]
    """From the pool it races and their common shape."""
    package: str | None
    """What must be installed."""
    differs: str
    """What it computes differently."""


PEERS = {
    "loop with masks": Peer(
        lambda pool, _: Routed(LoopWithMasks(pool)),
        None,
        "the same function: each expert a module of its own, run on the tokens that a boolean mask picks out",
    ),
    "transformers eager": Peer(
        lambda pool, _: HuggingFaceExperts(pool, "eager"),
        "transformers",
        "NemotronHExperts: no biases, and one LayerNorm without gain and shift for all experts; the pool's router",
    ),
    "transformers grouped_mm": Peer(
        lambda pool, _: HuggingFaceExperts(pool, "grouped_mm"),
        "transformers",
        "as eager; under autocast its products stay in float32",
    ),
    "transformers batched_mm": Peer(
        lambda pool, _: HuggingFaceExperts(pool, "batched_mm"),
        "transformers",
        "as eager; copies an expert's weights for every slot: made for a handful of tokens",
    ),
    "st-moe-pytorch": Peer(
        lambda _, shape: StMoe(shape),
        "st-moe-pytorch",
        "routes within a sequence, drops what is over an expert's capacity and at random second choices with small "
        "gates; GEGLU experts of about the same size, no LayerNorm; auxiliary losses included",
    ),
    "soft-moe-pytorch": Peer(
        lambda _, shape: SoftMoe(shape),
        "soft-moe-pytorch",
        "no routing: every slot is a mixture of all tokens of a sequence, so none can be left out and none come later",
    ),
}


def why_not(name: str, shape: Shape) -> str | None:
    """What keeps a peer from racing here; None where nothing does."""
    package = PEERS[name].package
    if package is not None and installed_version(package) is None:
        return f"{package} is not installed: pip install -e '.[bench]'"
    if name == "transformers batched_mm":
        hidden = round(shape.expansion_factor * shape.embed_dim)
        copied = 2 * 4 * shape.tokens * shape.top_k * hidden * shape.embed_dim
        if copied > MOST_COPIED:
            return f"it would copy {copied / 1e9:.1f} GB of weights, an expert's for every slot"
    if name == "st-moe-pytorch" and shape.top_k < 2:
        return "it takes no top_k of 1"
    if name == "soft-moe-pytorch" and _slots_of_expert(shape) < 1:
        return f"{shape.top_k * shape.seq_len} slots a sequence are fewer than {shape.num_experts} experts"
    return None
