"""All benchmarks, small, and what they gave: `python benchmarks/report.py`, which is `make bench`.

Runs each in a process of its own, one after the other, and writes its tables to `benchmarks/RESULTS.md`, with the
command that gave them, the machine and the versions. Every figure there comes from the run.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tables import Row, markdown

FOLDER = Path(__file__).parent

SUITE = (
    "moe_layer.py --embed_dim 128 256 --rounds 7 --steps 2 --skew",
    "moe_layer.py --embed_dim 512 --num_experts 8 64 --rounds 3 --steps 1 --skew",
    "moe_layer.py --embed_dim 128 --rounds 5 --steps 2 --peers",
    "block.py --embed_dim 128 256 --rounds 5 --steps 2",
    "train_step.py --presets tiny --rounds 5 --steps 3 --embed_dim 64 128 192 --baseline --memory",
    "train_step.py --presets small --rounds 3 --steps 1 --embed_dim 192 --top_k 1 --memory",
    "inference.py --rounds 50 --batch_size 1 8 --generation --generation_rounds 3",
    "data.py --pictures 4000 --epochs 3",
)
"""Commands, without `python benchmarks/`; sizes that take some minutes together on 2 cores."""


def main(argv: list[str] | None = None) -> None:
    """Run the suite and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=FOLDER / "RESULTS.md")
    parser.add_argument("--suite", nargs="+", default=SUITE, metavar="COMMAND", help="such as 'block.py --rounds 3'")
    args = parser.parse_args(argv)
    started = time.monotonic()
    results = []
    for command in args.suite:
        print(command, flush=True)
        results.append((command, run(command)))
    args.output.write_text(page(results, time.monotonic() - started), encoding="utf-8")
    print(f"{args.output}: {summary(results)}")


def run(command: str) -> dict[str, Any]:
    """One benchmark's JSON object. Raises `CalledProcessError` where it fails."""
    script, *flags = shlex.split(command)
    words = [sys.executable, str(FOLDER / script), *flags, "--json"]
    return json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def page(results: list[tuple[str, dict[str, Any]]], seconds: float) -> str:
    """The whole page in Markdown."""
    environment = results[0][1]["environment"]
    facts = [{"": name.replace("_", " "), "here": value} for name, value in environment.items() if value is not None]
    parts = [
        "# Benchmark results",
        f"Written by `make bench` in {seconds / 60:.1f} minutes; {summary(results)}. Contenders ran by turns in one "
        "process on the same new inputs at every step; times are medians over rounds, ratios the median of the "
        "rounds' own ratios. Rounds are few here: for a figure to rely on, run a command below with its default ones.",
        markdown(facts),
    ]
    for command, result in results:
        parts += [f"## {result['benchmark'].replace('_', ' ')}", f"`python benchmarks/{command}`"]
        for title, rows in result["tables"].items():
            parts += [f"### {title}", markdown(rows)]
        parts += ["\n".join(f"- {note}" for note in result["notes"])]
    return "\n\n".join(parts) + "\n"


def summary(results: list[tuple[str, dict[str, Any]]]) -> str:
    """How many goals were reached."""
    rows: list[Row] = [row for _, result in results for table in result["tables"].values() for row in table]
    judged = [row["reached"] == "yes" for row in rows if row.get("reached") is not None]
    return f"{sum(judged)} of {len(judged)} goals reached"


if __name__ == "__main__":
    main()
