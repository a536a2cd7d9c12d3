"""What a benchmark prints: Markdown tables, or one JSON object; and the machine that it ran on."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
from importlib import metadata
from typing import Any

import torch
from timing import Times, float32_products

from diffmoe.hardware import cpu_name, use_fast_matmul

Row = dict[str, Any]
"""Column -> text or number; None where there is nothing to say."""
Tables = dict[str, list[Row]]
"""Title -> rows."""

PACKAGES = ("torch", "timm", "transformers", "st-moe-pytorch", "soft-moe-pytorch")


def comparison(times: Times, name: str, base: str, *, at_most: float | None = None) -> Row:
    """A contender's time over another one's."""
    return _compared(times, name, base) | judged(times.ratio(name, base), at_most=at_most)


def slowdown(times: Times, name: str, base: str, *, at_least: float | None = None) -> Row:
    """As `comparison`, for a contender that is to be the slower one."""
    return _compared(times, name, base) | judged(times.ratio(name, base), at_least=at_least)


def _compared(times: Times, name: str, base: str) -> Row:
    """With the lowest and the highest ratio of a round: a disturbed run shows itself."""
    ratios = times.ratios(name, base)
    rounds = None if name == base else f"{min(ratios):.2f} to {max(ratios):.2f}"
    return {"contender": name, "ms": times.ms(name), "over": base, "ratio": None, "of_rounds": rounds}


def judged(ratio: float, *, at_most: float | None = None, at_least: float | None = None) -> Row:
    """A ratio beside its goal, if it has one."""
    if at_most is not None:
        return {"ratio": ratio, "goal": f"at most {at_most:.3g}", "reached": _yes(ratio <= at_most)}
    if at_least is not None:
        return {"ratio": ratio, "goal": f"at least {at_least:.3g}", "reached": _yes(ratio >= at_least)}
    return {"ratio": ratio, "goal": None, "reached": None}


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


def show(benchmark: str, args: argparse.Namespace, tables: Tables, notes: list[str]) -> None:
    """Print a finished benchmark: tables for people, with `--json` an object for programs."""
    if args.json:
        parts = {"environment": environment(), "settings": vars(args), "tables": tables, "notes": notes}
        print(json.dumps({"benchmark": benchmark, **parts}))
        return
    print(", ".join(f"{key} {value}" for key, value in environment().items()))
    for title, rows in tables.items():
        print(f"\n{title}\n\n{markdown(rows)}")
    print("\n" + "\n".join(f"- {note}" for note in notes) if notes else "")


def markdown(rows: list[Row]) -> str:
    """An aligned Markdown table; columns in the order in which they first appear, those without a value left out."""
    used = [name for row in rows for name, value in row.items() if value is not None]
    columns = [name for name in dict.fromkeys(name for row in rows for name in row) if name in used]
    lines = [[name.replace("_", " ") for name in columns]]
    lines += [[_cell(row.get(name)) for name in columns] for row in rows]
    widths = [max(len(line[number]) for line in lines) for number in range(len(columns))]
    lines.insert(1, ["-" * width for width in widths])
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"


def environment() -> dict[str, Any]:
    """Machine, versions, date: without them a time says nothing."""
    with float32_products("float32"):
        onednn_is_exact = use_fast_matmul()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "onednn_is_exact": onednn_is_exact,
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version for name in PACKAGES if (version := installed_version(name))},
    }


def installed_version(package: str) -> str | None:
    """A package's version; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
