"""The routed pool against the dense FFN of equal active width: `python benchmarks/moe_layer.py [--peers] [--json]`.

Forward and backward on tokens that are new at every step, with a router that moves at every step, in each mode.
`--num_experts 8 64` also compares the pool with itself at other numbers of experts, `--skew` with itself where one
expert gets half of the slots, `--backends sorted padded ...` its backends, `--peers` what one would pick instead.

Shapes: T tokens, D width, E experts, K experts chosen for a token.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from peers import PEERS, Routed, Shape, why_not
from tables import Row, comparison, show
from timing import add_timing_flags, autocast, float32_products, parse, race
from torch import Tensor, nn

from diffmoe.model.dispatch import BACKENDS
from diffmoe.model.layers import Expert
from diffmoe.model.moe import GeneralExperts

GOALS = {
    (512, "float32"): 1.08,
    (512, "onednn"): 1.12,
    (512, "bfloat16"): 1.20,
    (256, "float32"): 1.10,
    (256, "onednn"): 1.25,
    (256, "bfloat16"): 1.30,
    (128, "float32"): 1.12,
    (128, "onednn"): 1.24,
    (128, "bfloat16"): 1.50,
}
"""(D, mode) -> the pool's time over the dense layer's, at most; 2 CPU cores, E 8, K 2, 4,096 tokens."""
GPU_GOAL = 1 / 0.7
"""At least 70% of the dense layer's throughput, bfloat16."""
FLAT_GOAL = 1.25
"""E 64 over E 8, D 512."""
SKEW_GOAL = 1.25
"""One expert with half of the slots over uniform routing."""


def main(argv: list[str] | None = None) -> None:
    """Print the table, or with `--json` an object."""
    args = parse_args(argv)
    rows = [row for width in args.embed_dim for mode in args.modes for row in compare(width, mode, args)]
    show("moe_layer", args, {"Routed pool": rows}, notes(args))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--embed_dim", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--num_experts", type=int, nargs="+", default=[8], help="the first is what all else has")
    parser.add_argument("--top_k", type=int, default=2)
    parser.add_argument("--expansion_factor", type=float, default=4)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--seq_len", type=int, default=64, help="for peers that route within a sequence")
    parser.add_argument("--backends", nargs="+", default=["auto"], choices=("auto", *BACKENDS))
    parser.add_argument("--skew", action="store_true", help="also: one expert gets half of the slots")
    parser.add_argument("--peers", action="store_true", help="also: what a user would pick instead")
    add_timing_flags(parser, rounds=9, steps=2, modes=("float32", "onednn", "bfloat16"))
    args = parse(parser, argv)
    if args.peers and args.tokens % args.seq_len:
        parser.error(f"tokens is {args.tokens}: it must be a multiple of seq_len ({args.seq_len})")
    if args.skew and args.top_k > 2:
        parser.error(f"skew takes a top_k of at most 2, not {args.top_k}: an expert gets a token only once")
    return args


def compare(width: int, mode: str, args: argparse.Namespace) -> list[Row]:
    """One race, all layers of a width in a mode."""
    torch.manual_seed(args.seed)
    layers = build(width, args)
    generator = torch.Generator().manual_seed(args.seed)

    def draw() -> tuple[Tensor, Tensor]:
        x_TD, grad_TD = (torch.randn(args.tokens, width, generator=generator) for _ in range(2))
        return x_TD.to(args.device), grad_TD.to(args.device)

    steps = {name: LayerStep(layer.to(args.device), mode, args.device) for name, layer in layers.items()}
    times = race(dict(steps), draw, args)
    first = f"routed E{args.num_experts[0]}"
    rows = [comparison(times, first, "dense", at_most=over_dense(width, mode, args))]
    rows += [comparison(times, name, "dense") for name in layers if name not in ("dense", first)]
    at_most = FLAT_GOAL if is_promised(args) and width == 512 else None
    more_experts = [f"routed E{num_experts}" for num_experts in args.num_experts[1:]]
    rows += [comparison(times, name, first, at_most=at_most if name == "routed E64" else None) for name in more_experts]
    if args.skew:
        at_most = SKEW_GOAL if is_promised(args) else None
        rows += [comparison(times, f"skewed E{args.num_experts[0]}", first, at_most=at_most)]
    return [{"embed_dim": width, "mode": mode, **row} for row in rows]


def is_promised(args: argparse.Namespace) -> bool:
    """Whether the goals are about these settings."""
    sizes = (args.num_experts[0], args.top_k, args.expansion_factor, args.tokens)
    return args.device == "cpu" and args.backends[0] == "auto" and sizes == (8, 2, 4, 4096)


def over_dense(width: int, mode: str, args: argparse.Namespace) -> float | None:
    """What the pool's time over the dense layer's must be at most; None where nothing was promised."""
    if args.device == "cuda":
        promised = mode == "bfloat16" and width in (512, 1024) and args.tokens in (16384, 65536)
        return GPU_GOAL if promised and args.num_experts[0] in (8, 64) else None
    return GOALS.get((width, mode)) if is_promised(args) else None


def build(width: int, args: argparse.Namespace) -> dict[str, nn.Module]:
    """The layers of a race by name, `dense` first, then the pool that the others are compared with."""
    layers: dict[str, nn.Module] = {"dense": Expert(width, args.top_k * args.expansion_factor)}
    for num_experts in args.num_experts:
        for number, backend in enumerate(args.backends):
            name = f"routed E{num_experts}" + (f" {backend}" if number else "")
            layers[name] = Routed(_pool(width, num_experts, args, backend))
    num_experts = args.num_experts[0]
    if args.skew:
        pool = _pool(width, num_experts, args, args.backends[0])
        skew(pool, torch.randn(args.tokens, width))
        layers[f"skewed E{num_experts}"] = Routed(pool)
    if args.peers:
        shape = _shape(width, args)
        pool = _pool(width, num_experts, args, "auto")
        layers |= {name: peer.build(pool, shape) for name, peer in PEERS.items() if why_not(name, shape) is None}
    return layers


def _pool(width: int, num_experts: int, args: argparse.Namespace, backend: str) -> GeneralExperts:
    return GeneralExperts(width, num_experts, args.top_k, args.expansion_factor, backend=backend)


def _shape(width: int, args: argparse.Namespace) -> Shape:
    return Shape(width, args.num_experts[0], args.top_k, args.expansion_factor, args.tokens, args.seq_len)


@torch.no_grad()
def skew(pool: GeneralExperts, x_TD: Tensor) -> None:
    """Bias the choice (not the gates) of a pool with K 1 or 2 so that expert 0 gets half of the slots."""
    if pool.router.top_k == 2:
        pool.router.balance_bias[0] = 1.0  # one choice of every token: no probability is further ahead
        return
    probs_TE = pool.router(F.layer_norm(x_TD, x_TD.shape[-1:])).probs
    pool.router.balance_bias[0] = (probs_TE[:, 1:].amax(-1) - probs_TE[:, 0]).median()


class LayerStep:
    """Forward and backward of a layer, as a contender; its router is somewhere else at every step."""

    def __init__(self, layer: nn.Module, mode: str, device: str) -> None:
        self.layer, self.mode, self.device = layer, mode, device
        self.router_weight = getattr(layer, "router_weight", None)

    def __call__(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        """Tokens and the gradient of the output, both (T, D) -> the gradient of the tokens (T, D)."""
        x_TD, grad_TD = inputs[0].detach().requires_grad_(), inputs[1]
        with float32_products(self.mode):
            with autocast(self.mode, self.device):
                y_TD = self.layer(x_TD)
            y_TD.backward(grad_TD.to(y_TD.dtype))
        self.layer.zero_grad(set_to_none=True)
        if self.router_weight is not None:
            move(self.router_weight)
        assert x_TD.grad is not None
        return x_TD.grad


@torch.no_grad()
def move(weight: Tensor, share: float = 0.05) -> None:
    """A step of a random walk, by this share of the weight's own size: as an optimizer's, only faster."""
    weight.add_(torch.randn_like(weight), alpha=share * weight.std().item())


def notes(args: argparse.Namespace) -> list[str]:
    """What the table leaves unsaid."""
    said = [
        f"Forward and backward of {args.tokens:,} tokens, top-{args.top_k}, expansion {args.expansion_factor:g}; "
        "dense is one FFN as wide as a token's experts together. New tokens and a moved router at every step."
    ]
    if args.skew:
        said.append("skewed: one expert gets half of the slots, the others share the rest.")
    if args.peers:
        said += [f"{name}: {peer.differs}." for name, peer in PEERS.items()]
        for width in args.embed_dim:
            reasons = {name: why_not(name, _shape(width, args)) for name in PEERS}
            said += [f"{name} did not run at embed_dim {width}: {why}." for name, why in reasons.items() if why]
    return said


if __name__ == "__main__":
    main()
