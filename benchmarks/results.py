"""`docs/results.md`: every figure of comparisons, with the command, the seeds, the machine and the date of each.

    diffmoe compare --dataset digits --seeds 5
    python benchmarks/results.py visualizations/compare/digits/comparison.json     # keeps it in benchmarks/results/
    python benchmarks/results.py                                                   # writes docs/results.md

A file that is given is kept under the name of its dataset and its arms, in the place of an earlier one of the same.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffmoe.comparison.page import arm_table, difference_table
from diffmoe.config import UserError

KEPT = Path(__file__).parent / "results"
WRITTEN = Path(__file__).parents[1] / "docs" / "results.md"
NEEDED = ("command", "date", "machine", "versions", "seeds", "arms", "differences", "dataset", "match")
OF_THE_MACHINE_IT_WAS_ON = ("page", "figures")
"""Of a comparison's JSON: paths, which are not kept."""

HEAD = """# Results

Made by `python benchmarks/results.py` from `benchmarks/results/`; no figure is written by hand. A value is a mean over
seeds ± their standard deviation (n - 1) on the test split, which was read once a run. A difference is the first arm
less the second, seed by seed, in points where it is of a share; p is the paired t-test's, two-sided. FLOPs are those of
one more picture up to the answer, two for each multiply-add of a product or a convolution. Load is an expert's, over
its fair share, the least and the most of all blocks and seeds at the end; flutter the share of a sample's tokens whose
first expert changed in the last epoch.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Keep the files that are given; write the document."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("comparisons", nargs="*", type=Path, help="comparison.json files to keep")
    for path in parser.parse_args(argv).comparisons:
        print(f"kept: {keep(path)}")
    WRITTEN.write_text(document(sorted(KEPT.glob("*.json"))), encoding="utf-8")
    print(f"written: {WRITTEN}")
    return 0


def keep(path: Path) -> Path:
    """Copy a comparison's JSON to `KEPT`. Raises `UserError` where it is none."""
    found = read(path)
    name = "_".join([found["dataset"], found["match"], *found["arms"]])
    kept = {key: value for key, value in found.items() if key not in OF_THE_MACHINE_IT_WAS_ON}
    target = KEPT / f"{name}.json"
    target.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return target


def read(path: Path) -> dict[str, Any]:
    """A comparison's JSON. Raises `UserError` where it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    missing = [name for name in NEEDED if not isinstance(found, dict) or name not in found]
    if missing:
        raise UserError(f"{path} is no comparison.json: it lacks {', '.join(missing)}")
    return found


def document(paths: Sequence[Path]) -> str:
    """The whole of `docs/results.md`."""
    return "\n".join([HEAD, *(section(read(path)) for path in paths)])


def section(found: dict[str, Any]) -> str:
    """One comparison."""
    computer, versions = found["machine"], found["versions"]
    runs_on = computer["gpu"] or f"{computer['cpu']}{', AMX' if computer['amx'] else ', no AMX'}"
    threads = " or ".join(map(str, computer["threads"]))
    made = (
        f"Seeds {' '.join(map(str, found['seeds']))}; {runs_on}, {computer['cores']} cores, {threads} threads a run, "
        f"{computer['jobs']} at once, "
        f"load {computer['load']} at the end; torch {versions['torch']}, Python {versions['python']}; {found['date']}."
    )
    changed = [
        f"- {arm}: " + ", ".join(f"{name} {value}" for name, value in of_arm["differs"].items())
        for arm, of_arm in found["arms"].items()
        if of_arm["differs"]
    ]
    return "\n".join(
        [
            f"## {found['dataset']}, equal {found['match']}: {', '.join(found['arms'])}\n",
            f"`{found['command']}`\n",
            f"{made}\n",
            f"{_markdown(arm_table(found))}\n",
            f"{_markdown(difference_table(found))}\n",
            "What differs from the first arm:\n",
            *changed,
            "",
            *(f"- note: {note}" for note in found.get("notes", [])),
        ]
    )


def _markdown(rows: Sequence[Sequence[object]]) -> str:
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([lines[0], f"| {' | '.join('---' for _ in rows[0])} |", *lines[1:]])


if __name__ == "__main__":
    raise SystemExit(main())
