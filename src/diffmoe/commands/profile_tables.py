"""The tables of `profile` in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.ticker import EngFormatter

WHOLE = ("parameters_total", "parameters_active", "inference_flops_per_image", "training_flops_per_image")


def print_profile(result: Mapping[str, Any]) -> None:
    """The tables of a profile; their columns are called as in its JSON."""
    print(f"{result['dataset']}, {result['task']}, on {result['device']} ({result['threads']} threads)\n")
    models = {"this model": result} | ({"dense": result["dense"]} if result["dense"] else {})
    _print_table([{"model": name} | {key: of[key] for key in WHOLE} for name, of in models.items()])
    step = {name: sum(row[name] for row in result["grouped"]) for name in result["grouped"][0] if name != "part"}
    rows = [*result["grouped"], {"part": "the step"} | step]
    _print_table([row | {"share": f"{row['ms'] / step['ms']:.1%}"} for row in rows])
    megabytes = [f"{result[f'{name}_bytes'] / 1e6:,.1f} MB" for name in ("weight", "optimizer", "peak")]
    print("memory: weights {}, optimizer state {}, peak of a step over both {}\n".format(*megabytes))
    _print_table(result["throughput"])
    files = filter(None, (*result["pictures"], result["trace"]))
    print(*(f"- {note}" for note in result["notes"]), f"written: {', '.join(files)}", sep="\n")


def _print_table(rows: Sequence[Mapping[str, str | float]]) -> None:
    short = EngFormatter(places=2, sep="")  # 1230000 is 1.23M
    cells = [
        [v if isinstance(v, str) else f"{v:.4g}" if abs(v) < 1000 else short(v) for v in row.values()] for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(rows[0], *cells, strict=True)]
    for first, *others in ([*rows[0]], *cells):
        print(first.ljust(widths[0]), *map(str.rjust, others, widths[1:]), sep="  ")
    print()
