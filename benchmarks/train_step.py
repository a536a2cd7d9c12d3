"""A whole training step, MoE over dense: `python benchmarks/train_step.py [--baseline] [--memory] [--json]`.

Forward, backward, clipping and optimizer step of the classifier, on pictures that are new at every step, over the
dense preset of equal active compute. `--baseline` also compares the `tiny` preset with the same model written naively
(`naive.py`) and with timm's ViT of equal active FLOPs; `--memory` compares peak memory (`memory.py`); `--profile` says
where the time goes. On a GPU: `--device cuda --presets base --embed_dim 512 --top_k 2 --compile --profile`.
"""

from __future__ import annotations

import argparse
import dataclasses

import torch
from classifiers import PlainStep, TrainingStep, active_flops, batch_source, classifier, preset_config, resized
from memory import peak_of_steps
from naive import NaiveStep, naive_classifier
from tables import Row, Tables, comparison, judged, show, slowdown
from timing import Contender, Times, add_timing_flags, parse, race
from torch.profiler import ProfilerActivity, profile
from vits import timm_classifier

from diffmoe.config import ModelConfig
from diffmoe.hardware import keep_freed_memory

GOALS = {64: 1.30, 128: 1.10, 192: 1.00}
"""Width -> the step's time over the dense preset's, at most; tiny and small, batch 128, 2 CPU cores, oneDNN mode."""
NAIVE_GOAL = 3.0
"""The naive step's time over `tiny`'s, at least."""
MEMORY_GOAL = 1.15
"""Peak memory over the dense preset's, at most."""
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}
"""Of bfloat16 matrix products without sparsity, from the makers' data sheets (SXM)."""
PROFILED_STEPS = 3


def main(argv: list[str] | None = None) -> None:
    """Print the tables, or with `--json` an object."""
    args = parse_args(argv)
    keep_freed_memory()
    shapes = [(preset, width, top_k) for preset in args.presets for width in args.embed_dim for top_k in args.top_k]
    tables: Tables = {
        "Training step": [row for shape in shapes for mode in args.modes for row in compare(*shape, mode, args)]
    }
    if args.baseline:
        tables["Against a naive model and timm"] = compare_with_baseline(args)
    if args.memory:
        tables["Peak memory of a step"] = [compare_memory(*shape, args) for shape in shapes]
    if args.profile:
        tables["Where the time goes"] = [row for shape in shapes for row in profile_step(*shape, args)]
    show("train_step", args, tables, notes(args))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--presets", nargs="+", default=["tiny", "small"], choices=("tiny", "small", "base"))
    parser.add_argument("--embed_dim", type=int, nargs="+", default=[64, 128, 192])
    parser.add_argument("--top_k", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dataset", default="fashion_mnist", help="whose pictures' size")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--baseline", action="store_true", help="also: tiny against a naive model and timm's ViT")
    parser.add_argument("--memory", action="store_true", help="also: peak memory")
    parser.add_argument("--profile", action="store_true", help="also: the operations that take longest")
    parser.add_argument("--compile", action="store_true", help="also: through torch.compile")
    parser.add_argument("--peak_tflops", type=float, default=None, help="the device's, for the utilisation")
    add_timing_flags(parser, rounds=7, steps=3, modes=("onednn",))
    args = parse(parser, argv)
    if args.peak_tflops is None and args.device == "cuda":
        name = torch.cuda.get_device_name()
        args.peak_tflops = next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
    return args


def compare(preset: str, width: int, top_k: int, mode: str, args: argparse.Namespace) -> list[Row]:
    """One race: the MoE's step and the dense preset's, and both compiled."""
    config = resized(preset, args.dataset, width, top_k)
    contenders: dict[str, Contender] = {}
    for compiled in (False, True) if args.compile else (False,):
        for name, dense in (("MoE", False), ("dense", True)):
            model = classifier(dataclasses.replace(config, dense=dense), args.seed)
            name = f"{name}, compiled" if compiled else name
            contenders[name] = TrainingStep(model, mode, args.device, compiled=compiled)
    times = race(contenders, batch_source(config, args.batch_size, args.device, args.seed), args)
    promised = args.device == "cpu" and mode == "onednn" and args.batch_size == 128 and preset != "base"
    goals = {"MoE": GOALS.get(width) if promised else None}
    speeds = {name: _speed(times, name, config, args) for name in contenders}
    setting = {"preset": preset, "embed_dim": width, "top_k": top_k, "mode": mode}
    return [
        {**setting, **comparison(times, name, "dense", at_most=goals.get(name)), **speeds[name]} for name in contenders
    ]


def _speed(times: Times, name: str, config: ModelConfig, args: argparse.Namespace) -> Row:
    """Images a second and, where the device's peak is known, the share of it that active FLOPs alone make up."""
    speed: Row = {"images_per_second": 1000 * args.batch_size / times.ms(name)}
    if args.peak_tflops is not None:
        flops = 3 * active_flops(config, args.batch_size)  # the backward pass is twice the forward pass
        speed["model_flops_utilisation"] = flops / (times.ms(name) / 1000) / (args.peak_tflops * 1e12)
    return speed


def compare_with_baseline(args: argparse.Namespace) -> list[Row]:
    """One race: the `tiny` preset, the same model written naively, and timm's ViT of equal active FLOPs."""
    config = preset_config("tiny", args.dataset)
    model = classifier(config, args.seed)
    vit = timm_classifier(config, active_flops(config, args.batch_size) / args.batch_size)
    mode = "onednn" if args.device == "cpu" else args.modes[0]
    contenders: dict[str, Contender] = {
        "tiny": TrainingStep(model, mode, args.device),
        "tiny, naive": NaiveStep(naive_classifier(model), args.device),
        "timm ViT": PlainStep(vit, mode, args.device),
    }
    times = race(contenders, batch_source(config, args.batch_size, args.device, args.seed), args)
    goals = {"tiny, naive": NAIVE_GOAL}
    return [
        {
            **slowdown(times, name, "tiny", at_least=goals.get(name)),
            "images_per_second": 1000 * args.batch_size / times.ms(name),
        }
        for name in contenders
    ]


def compare_memory(preset: str, width: int, top_k: int, args: argparse.Namespace) -> Row:
    """The peaks of the MoE's step and the dense preset's."""
    config = resized(preset, args.dataset, width, top_k)
    peaks = []
    for dense in (False, True):
        step = TrainingStep(classifier(dataclasses.replace(config, dense=dense), args.seed), args.modes[0], args.device)
        draw = batch_source(config, args.batch_size, args.device, args.seed)
        step(draw())
        peaks.append(peak_of_steps(step, [draw() for _ in range(PROFILED_STEPS)], args.device) / 1e6)
    setting = {"preset": preset, "embed_dim": width, "top_k": top_k, "mode": args.modes[0]}
    return {**setting, "MoE_MB": peaks[0], "dense_MB": peaks[1], **judged(peaks[0] / peaks[1], at_most=MEMORY_GOAL)}


def profile_step(preset: str, width: int, top_k: int, args: argparse.Namespace) -> list[Row]:
    """The ten operations that take most of the MoE's step, by the time they spend themselves."""
    config = resized(preset, args.dataset, width, top_k)
    step = TrainingStep(classifier(config, args.seed), args.modes[0], args.device, compiled=args.compile)
    draw = batch_source(config, args.batch_size, args.device, args.seed)
    step(draw())
    on_gpu = args.device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        for _ in range(PROFILED_STEPS):
            step(draw())
    spent = {
        event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total)
        for event in profiler.key_averages()
    }
    total = sum(spent.values())
    longest = sorted(spent, key=lambda name: spent[name], reverse=True)[:10]
    return [
        {
            "preset": preset,
            "embed_dim": width,
            "top_k": top_k,
            "operation": name,
            "ms": spent[name] / 1000 / PROFILED_STEPS,
            "share": spent[name] / total,
        }
        for name in longest
    ]


def notes(args: argparse.Namespace) -> list[str]:
    """What the tables leave unsaid."""
    said = [
        f"Batches of {args.batch_size} new pictures of {args.dataset}'s size at every step; the optimizer moves the "
        "routers. dense: the same model with each pool replaced by one expert K times as wide."
    ]
    if args.baseline:
        said.append(
            "tiny, naive: the same model and weights with a loop with masks for each pool, torch's fused attention "
            "kernel, AdamW without fused, stock float32 products, and an allocator that gives memory back. timm ViT: "
            "as many blocks and hidden units as make its FLOPs those of the dense preset; linear patches, no text."
        )
    if args.memory:
        said.append(
            "Peak memory: what torch's allocator hands out at once during a step, over what it had handed out before; "
            "so activations, gradients and temporaries count, weights and optimizer state do not."
        )
    return said


if __name__ == "__main__":
    main()
