"""The tables of `profile` in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffmoe.profiling.profile import PartCost
from diffmoe.visualization.profile import numbers_of


def print_profile(result: dict[str, Any]) -> None:
    """The tables of a profile."""
    print(f"{result['dataset']}, {result['task']}, on {result['device']} ({result['threads']} threads)\n")
    columns = {"this model": result} | ({"dense": result["dense"]} if result["dense"] else {})
    _print_table(
        ["a model as a whole", *columns],
        [
            ["parameters", *(f"{c['parameters_total']:,}" for c in columns.values())],
            ["parameters active for a token", *(f"{c['parameters_active']:,}" for c in columns.values())],
            ["MFLOPs a picture, inference", *(_mega(c["inference_flops_per_image"]) for c in columns.values())],
            ["MFLOPs a picture, training", *(_mega(c["training_flops_per_image"]) for c in columns.values())],
            ["  rows of padding, beside", *(_mega(c["padding_flops_per_image"]) for c in columns.values())],
        ],
    )
    size = result["batch_size"]
    header = [
        "a training step of " + f"{size}",
        "parameters",
        "active",
        "MFLOPs fwd",
        "bwd",
        "ms fwd",
        "bwd",
        "all",
        "%",
        "MB held",
    ]
    costs = [PartCost(**{name: value for name, value in row.items() if name != "ms"}) for row in result["grouped"]]
    whole = sum(cost.ms for cost in costs)
    rows = [
        [
            cost.part,
            *(numbers := numbers_of(cost, size))[:-1],
            f"{cost.ms / whole:.1%}" if cost.ms else "",
            numbers[-1],
        ]
        for cost in costs
    ]
    rows += [["remainder of the medians", *[""] * 6, f"{result['remainder_ms']:,.2f}", "", ""]]
    rows += [["the step", *[""] * 6, f"{result['step_ms']:,.2f}", "", ""]]
    _print_table(header, rows)
    megabytes = [f"{result[f'{name}_bytes'] / 1e6:,.1f} MB" for name in ("weight", "optimizer", "peak")]
    print("memory: weights {}, optimizer state {}, peak of a step over both {}\n".format(*megabytes))
    _print_table(
        ["throughput", "batch", "model", "ms", "images/s", "time over dense"],
        [
            [
                row["mode"],
                str(row["batch_size"]),
                row["model"],
                f"{row['ms']:,.2f}",
                f"{row['images_per_second']:,.0f}",
                f"{row['time_over_dense']:.2f}" if "time_over_dense" in row else "",
            ]
            for row in result["throughput"]
        ],
    )
    for note in result["notes"]:
        print(f"- {note}")
    print(
        f"pictures: {Path(result['pictures'][0]).parent}/" + (f"   trace: {result['trace']}" if result["trace"] else "")
    )


def _mega(flops: float) -> str:
    return f"{flops / 1e6:,.3f}"


def _print_table(header: list[str], rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for line in (header, *rows):
        print(
            "  ".join(
                cell.ljust(w) if n == 0 else cell.rjust(w) for n, (cell, w) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
        )
    print()
