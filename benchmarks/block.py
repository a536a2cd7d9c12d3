"""A MoE block against ViT blocks of equal FLOPs: `python benchmarks/block.py [--json]`.

Forward and backward of `UnifiedModalEncoder` (attention; global, vision and top-k routed experts), over a pre-norm ViT
block with the same attention and an MLP as wide as those experts together, and over timm's block of the same sizes.
"""

from __future__ import annotations

import argparse

import torch
from moe_layer import LayerStep
from tables import Row, comparison, show
from timing import add_timing_flags, parse, race
from torch import Tensor, nn
from vits import VitBlock, timm_block

from diffmoe.config import ModelConfig
from diffmoe.model.encoders import UnifiedModalEncoder
from diffmoe.model.moe import GeneralExperts
from diffmoe.model.sequence import TokenSequence

VIT_GOAL = 1.1
"""The block's time over the equal-FLOPs ViT block's, at most."""
TIMM_GOAL = 1.0
"""The block's time over timm's, at most."""
NOTES = [
    "Forward and backward; new tokens and a moved router at every step. The ViT block has the same attention, timm's "
    "its own (fused kernel); all have the same width, heads, active hidden units and, the router's aside, FLOPs."
]


def main(argv: list[str] | None = None) -> None:
    """Print the table, or with `--json` an object."""
    args = parse_args(argv)
    rows = [row for width in args.embed_dim for mode in args.modes for row in compare(width, mode, args)]
    show("block", args, {"Block": rows}, NOTES)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--embed_dim", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--head_dim", type=int, default=32, help="width of an attention head; it must divide embed_dim")
    parser.add_argument("--num_experts", type=int, default=8)
    parser.add_argument("--top_k", type=int, default=2)
    parser.add_argument("--expansion_factor", type=float, default=4)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--seq_len", type=int, default=64)
    add_timing_flags(parser, rounds=7, steps=2, modes=("float32", "onednn", "bfloat16"))
    return parse(parser, argv)


def compare(width: int, mode: str, args: argparse.Namespace) -> list[Row]:
    """One race, the three blocks of a width in a mode."""
    torch.manual_seed(args.seed)
    config = block_config(width, args)
    blocks = {"MoE block": MoeBlock(config), "ViT block": VitBlock(config), "timm block": timm_block(config)}
    generator = torch.Generator().manual_seed(args.seed)

    def draw() -> tuple[Tensor, Tensor]:
        shape = (args.batch_size, args.seq_len, width)
        x_BND, grad_BND = (torch.randn(shape, generator=generator) for _ in range(2))
        return x_BND.to(args.device), grad_BND.to(args.device)

    steps = {name: LayerStep(block.to(args.device), mode, args.device) for name, block in blocks.items()}
    times = race(dict(steps), draw, args)
    goals = {"ViT block": VIT_GOAL, "timm block": TIMM_GOAL}
    rows = [comparison(times, "MoE block", base, at_most=goal) for base, goal in goals.items()]
    return [{"embed_dim": width, "mode": mode, **row} for row in rows]


def block_config(width: int, args: argparse.Namespace) -> ModelConfig:
    """The block's own settings; those of the model around it do not matter."""
    return ModelConfig(
        embed_dim=width,
        num_heads=width // args.head_dim,
        num_general_experts=args.num_experts,
        top_k=args.top_k,
        expansion_factor=args.expansion_factor,
        dropout=0.0,
    )


class MoeBlock(nn.Module):
    """The image tower's block without the `Routing` that it returns besides."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.block = UnifiedModalEncoder(config, "image")
        assert isinstance(self.block.general_experts, GeneralExperts)
        self.router_weight = self.block.general_experts.router.keys

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.block(TokenSequence(x))[0]


if __name__ == "__main__":
    main()
