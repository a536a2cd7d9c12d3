"""Routers that send no token anywhere: experts, or what they are given, are averaged.

Shapes: B sequences, N tokens of each, D width, E experts, S slots of all experts, C rows of a group, G groups.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmoe.model.experts import ExpertWeights
from diffmoe.model.layers import full_precision, widened
from diffmoe.model.routers.attentive import AttentiveRouter, PictureRouter
from diffmoe.model.routers.base import Router, RouterOptions
from diffmoe.model.routing import Routing


class Mixer(Router):
    """Sends no token anywhere: the experts themselves, or what they are given, are mixed by the router's weights."""

    causal = False
    alike: ClassVar[bool] = False
    """The experts must start as copies of one."""

    @abstractmethod
    def mix(
        self, x: Tensor, mask: Tensor | None, weights: ExpertWeights, run: Callable[[Tensor, ExpertWeights], Tensor]
    ) -> tuple[Tensor, Routing]:
        """Route and compute.

        Args:
            x: (B, N, D) normalised tokens.
            mask: (B, N), True or 1 at real tokens.
            weights: of the E experts.
            run: rows (G, C, D) through an FFN for each of G groups, whose weights it is given -> (G, C, D).

        Returns:
            (B, N, D), unscaled and at padding of no meaning; and for whoever looks at it a routing to the K experts
            that weigh most.
        """


class MergedRouter(PictureRouter, Mixer):
    """One FFN a sequence, whose weights are the experts', averaged by the router's probabilities for the mean token.

    Soft merging of experts with adaptive routing (SMEAR, Muqeeth et al. 2023): all experts get a gradient, and none is
    chosen. Copies of one expert at the start, as the mean of unlike ones would be next to nothing. Args: as `Router`.
    """

    causal = False
    alike = True

    def mix(
        self, x: Tensor, mask: Tensor | None, weights: ExpertWeights, run: Callable[[Tensor, ExpertWeights], Tensor]
    ) -> tuple[Tensor, Routing]:
        routing = self(x, mask)
        share_BE = routing.probs[:, 0].to(weights.gain.dtype)
        merged = ExpertWeights(*((share_BE @ stack.flatten(1)).unflatten(1, stack.shape[1:]) for stack in weights))
        return run(x.to(weights.gain.dtype), merged), routing


class SoftRouter(AttentiveRouter, Mixer):
    """Soft MoE (Puigcerver et al. 2023): each expert gets 4 K weighted means of a sequence's tokens, its slots, and a
    token gets a weighted mean of what comes out of all of them.

    An expert's logit in the `Routing` is the log of the summed weight of its slots. Args: as `Router`.
    """

    causal = False
    guidable = False  # every expert gets slots of every picture

    def __init__(self, embed_dim: int, num_experts: int, top_k: int, **options: Unpack[RouterOptions]) -> None:
        super().__init__(embed_dim, num_experts, top_k, **options)
        self.slots = nn.Parameter(torch.empty(num_experts * 4 * top_k, self.keys.shape[1]))
        nn.init.normal_(self.slots, std=0.5)

    def mix(
        self, x: Tensor, mask: Tensor | None, weights: ExpertWeights, run: Callable[[Tensor, ExpertWeights], Tensor]
    ) -> tuple[Tensor, Routing]:
        num_experts = len(self.keys)
        with full_precision(x):
            wide = widened(x)
            keys = (self.keys.repeat_interleave(len(self.slots) // num_experts, 0) + self.slots).to(wide)
            logits_BNS = F.linear(wide, keys @ self.query.weight.to(wide) * keys.shape[1] ** -0.5)
            into_BNS = logits_BNS if mask is None else logits_BNS.masked_fill(~mask.bool()[..., None], -1e9)
            by_expert = logits_BNS.unflatten(-1, (num_experts, -1)).logsumexp(-1)
            routing = self.choose(by_expert, mask)
        dtype = weights.gain.dtype
        slots_BSD = into_BNS.softmax(1).to(dtype).mT @ x.to(dtype)
        slots_EBpD = slots_BSD.unflatten(1, (num_experts, -1)).transpose(0, 1)
        out_ECD = run(slots_EBpD.flatten(1, 2), weights)
        out_BSD = out_ECD.unflatten(1, slots_EBpD.shape[1:3]).transpose(0, 1).flatten(1, 2)
        return logits_BNS.softmax(-1).to(dtype) @ out_BSD, routing
