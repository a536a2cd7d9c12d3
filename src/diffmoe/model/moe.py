"""The routed pool of general experts: a router, a dispatcher, the experts.

Shapes: T tokens, D width, E experts, K experts chosen for a token, F hidden width of an expert; `...` any leading
token axes.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmoe.model.dispatch import LocalDispatch
from diffmoe.model.experts import ExpertWeights, all_experts
from diffmoe.model.gather import world_size
from diffmoe.model.routers import Mixer, router_kind
from diffmoe.model.routing import Plan, Routing


class GeneralExperts(nn.Module):
    """The routed pool alone: `y, routing = pool(x)` with y = sum over a token's chosen experts of gate * expert(x).

    With a dropless router no token is ever turned away, so that a prediction does not depend on its batch-mates.
    Padding (by `mask`) is sent nowhere and comes out as zeros. The residual connection is the caller's.

    While `whole` is set, by who trains it and never here, the pool is one FFN, whose weights are the mean of its
    experts': y = (sum of the token's gates) * FFN(x), which is what it computes anyway while its experts are copies of
    one (`make_alike`), at the cost of one. The router says where tokens would go, and gets no gradient through y. Each
    expert gets a 1 / E of the FFN's gradient, as they do on average once they run by themselves; copies stay copies.

    Args:
        embed_dim: D.
        num_experts: E.
        top_k: K, experts for each token.
        expansion_factor: hidden width over D.
        activation: gelu, relu or silu.
        dropout: probability, after the activation and at the end.
        layer_norm_eps: epsilon of the experts' LayerNorms.
        router: a name of `routers.ROUTERS`.
        router_noise: learned noise on the router's scores in training.
        gate: softmax or sigmoid, how a token's experts are weighted.
        gate_scale: what a token's gates add up to.
        backend: how tokens get to their experts, a name of `dispatch.BACKENDS`; "auto" is the fastest here.
    """

    def __init__(
        self,
        embed_dim: int,
        num_experts: int,
        top_k: int,
        expansion_factor: float = 4,
        activation: str = "gelu",
        dropout: float = 0.0,
        layer_norm_eps: float = 1e-5,
        router: str = "attentive",
        router_noise: bool = False,
        backend: str = "auto",
        gate: str = "softmax",
        gate_scale: float = 1.0,
    ) -> None:
        super().__init__()
        hidden = round(expansion_factor * embed_dim)
        self.embed_dim, self.activation, self.dropout, self.eps = embed_dim, activation, dropout, layer_norm_eps
        self.router = router_kind(router)(
            embed_dim, num_experts, top_k, noise=router_noise, gate=gate, gate_scale=gate_scale
        )
        self.dispatch = LocalDispatch(backend)
        self.whole = False
        self.gain = nn.Parameter(torch.ones(num_experts, embed_dim))
        self.shift = nn.Parameter(torch.zeros(num_experts, embed_dim))
        self.fc1_weight = nn.Parameter(torch.empty(num_experts, hidden, embed_dim))
        self.fc1_bias = nn.Parameter(torch.zeros(num_experts, hidden))
        self.fc2_weight = nn.Parameter(torch.empty(num_experts, embed_dim, hidden))
        self.fc2_bias = nn.Parameter(torch.zeros(num_experts, embed_dim))
        self.reset_parameters()

    @property
    def weights(self) -> ExpertWeights:
        """The parameters of all experts."""
        return ExpertWeights(*(getattr(self, name) for name in ExpertWeights._fields))

    def reset_parameters(self, std: float = 0.02) -> None:
        """Experts' weights normal with this standard deviation; their biases and norms are set when made."""
        nn.init.normal_(self.fc1_weight, std=std)
        nn.init.normal_(self.fc2_weight, std=std)
        if isinstance(self.router, Mixer) and self.router.alike:
            self.make_alike()

    @torch.no_grad()
    def make_alike(self) -> None:
        """Make all experts copies of the first."""
        for stack in self.weights:
            stack.copy_(stack[:1].expand_as(stack).clone())

    @torch.no_grad()
    def share_gradients(self, share: float) -> None:
        """Let each expert learn from the others' tokens: its gradient G becomes (1 - share) G + share * (sum of all).

        Copies of one that share all stay copies, and are taught as one FFN that sees every token. With less they are
        such an FFN and what each has of its own, which learns slower than they have in common; so no expert needs to
        learn again, from a part of the tokens, what is true of all. Akin to averaging the experts a little at every
        step (Huang et al. 2023, "Experts Weights Averaging", arXiv 2308.06093).
        """
        for stack in self.weights:
            if stack.grad is not None:
                of_all = stack.grad.sum(0, keepdim=True)
                stack.grad.mul_(1 - share).add_(of_all, alpha=share)

    @property
    def is_alike(self) -> bool:
        """Whether all experts are copies of one."""
        return all(torch.equal(stack, stack[:1].expand_as(stack)) for stack in self.weights)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Routing]:
        """(..., D), and mask (...) with True or 1 at real tokens -> (..., D), and the `Routing`.

        Raises `ValueError` where the shapes do not fit or `x` is not floating, and what `run` raises.
        """
        if x.shape[-1] != self.embed_dim or not x.is_floating_point():
            raise ValueError(
                f"x is {x.dtype} of shape {tuple(x.shape)}: it must be floating and (..., {self.embed_dim})"
            )
        if mask is not None and mask.shape != x.shape[:-1]:
            raise ValueError(f"mask is of shape {tuple(mask.shape)}: it must be {tuple(x.shape[:-1])}, as x without D")
        # The experts' LayerNorms differ in gain and bias only: normalise once, before the tokens are copied K times.
        x_normed = F.layer_norm(x, (self.embed_dim,), eps=self.eps)
        if isinstance(self.router, Mixer):
            return self._mix(self.router, x_normed, mask)
        routing = self.router(x_normed, mask)
        if self.whole:
            y = self._run_whole(x_normed)
            return y * routing.gates.sum(-1, keepdim=True).detach().to(y.dtype), routing
        return self.run(x_normed.reshape(-1, self.embed_dim), routing.plan).view(x.shape), routing

    def run(self, x_TD: Tensor, plan: Plan) -> Tensor:
        """Normalised tokens to the experts that the plan has for them, and what comes back, weighted: (T, D) -> (T, D).

        In the dtype of autocast where that is on, else in that of `x_TD`. Raises `ValueError` where shapes do not fit,
        `UserError` where the backend cannot run here, `FloatingPointError` where a gate is not finite (checked on the
        CPU only, as on a GPU it would wait for the device, and never by one of several processes alone).
        """
        if not torch.compiler.is_compiling():
            self._check(plan, len(x_TD))
        weights = self._weights_as(x_TD)
        dtype = weights.gain.dtype
        plan = plan._replace(gates=plan.gates.to(dtype))
        return self.dispatch(x_TD.to(dtype), plan, weights, self.activation, self.dropout if self.training else 0.0)

    def _mix(self, router: Mixer, x_normed: Tensor, mask: Tensor | None) -> tuple[Tensor, Routing]:
        shape = x_normed.shape if x_normed.dim() > 1 else (1, *x_normed.shape)  # a token alone is a sequence of one
        x_BND = x_normed.reshape(-1, *shape[-2:])
        mask_BN = None if mask is None else mask.reshape(x_BND.shape[:2])
        dropout = self.dropout if self.training else 0.0
        run = partial(all_experts, activation=self.activation, dropout=dropout)
        weights = self._weights_as(x_normed)
        if self.whole:
            weights = ExpertWeights(
                *(m.expand_as(stack) for m, stack in zip(self._mean(x_normed), weights, strict=True))
            )
        y, routing = router.mix(x_BND, mask_BN, weights, run)
        y = y * router.gate_scale if mask_BN is None else y * router.gate_scale * mask_BN[..., None]
        return y.view(x_normed.shape), routing.shaped(x_normed.shape[:-1])

    def _run_whole(self, x_normed: Tensor) -> Tensor:
        mean = self._mean(x_normed)
        x_1TD = x_normed.reshape(1, -1, self.embed_dim).to(mean.gain.dtype)
        y_1TD = all_experts(x_1TD, mean, self.activation, self.dropout if self.training else 0.0)
        return y_1TD.view(x_normed.shape)

    def _mean(self, x: Tensor) -> ExpertWeights:
        """The weights of the one FFN that a whole pool is."""
        dtype = self._dtype(x)
        return ExpertWeights(*(stack.mean(0).to(dtype) for stack in self.weights))

    def _weights_as(self, x: Tensor) -> ExpertWeights:
        dtype, weights = self._dtype(x), self.weights
        return weights if self.gain.dtype == dtype else ExpertWeights(*(stack.to(dtype) for stack in weights))

    def _dtype(self, x: Tensor) -> torch.dtype:
        """That products have here: autocast's where it is on, else that of `x`."""
        device = x.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype

    def _check(self, plan: Plan, num_tokens: int) -> None:
        if plan.expert_ids.shape != plan.gates.shape or len(plan.gates) != num_tokens:
            raise ValueError(
                f"expert_ids of shape {tuple(plan.expert_ids.shape)} and gates of shape {tuple(plan.gates.shape)} "
                f"do not fit {num_tokens} tokens: both must be (tokens, K)"
            )
        alone = not self.training or world_size() == 1
        if plan.gates.is_cpu and alone and not math.isfinite(plan.gates.detach().sum(dtype=torch.float32).item()):
            raise FloatingPointError(
                "the router's gates are not finite: training diverged, or the input has nan or inf"
            )


def routed_pools(model: nn.Module) -> dict[str, GeneralExperts]:
    """All routed pools in a model, by the names of the modules; empty where it is dense."""
    return {name: module for name, module in model.named_modules() if isinstance(module, GeneralExperts)}
