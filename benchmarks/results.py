"""`docs/results.md`: every figure of comparisons and of recipes, with the command, the seeds, the machine and the date.

    diffmoe compare --dataset digits --seeds 5
    python benchmarks/results.py visualizations/compare/digits/comparison.json     # keeps it in benchmarks/results/

    for seed in 0 1 2; do diffmoe train_test --dataset digits --seed $seed --save_dir runs/$seed; done
    python benchmarks/results.py --run plain runs/*/digits                         # keeps them, as the recipe `plain`

    python benchmarks/results.py                                                   # writes docs/results.md, its picture

What is given is kept under the name of its dataset and its arms, or its recipe's, in the place of an earlier one of the
same.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import recipe_results

from diffmoe.comparison.page import arm_table, difference_table
from diffmoe.config import UserError
from diffmoe.visualization.comparison import accuracy_against_time
from diffmoe.visualization.figures import save

KEPT = Path(__file__).parent / "results"
RECIPES = "recipes"
"""The folder in `KEPT` where those are."""
WRITTEN = Path(__file__).parents[1] / "docs" / "results.md"
PICTURE = "images/results.png"
"""Beside `WRITTEN`."""
NEEDED = ("command", "date", "machine", "versions", "seeds", "arms", "differences", "dataset", "match")
MANY = 8
"""A comparison of more arms is a table alone: in a picture none could be told, and no name holds them all."""
OF_THE_MACHINE_IT_WAS_ON = ("page", "figures")
"""Of a comparison's JSON: paths, which are not kept."""
Found = dict[str, Any]
"""What is kept of a comparison, or of a recipe."""

HEAD = f"""# Results

Made by `python benchmarks/results.py` from `benchmarks/results/`; no figure is written by hand. A value is a mean over
seeds ± their standard deviation (n - 1) on the test split, which was read once a run. A difference is the first arm
less another, seed by seed, in points where it is of a share; p is the paired t-test's, two-sided. FLOPs are those of
one more picture up to the answer, two for each multiply-add of a product or a convolution. Load is an expert's, over
its fair share, the least and the most of all blocks and seeds at the end; flutter the share of a sample's tokens whose
first expert changed in the last epoch. Seconds are of training alone, on the machine that is named.

![Test accuracy against seconds of training: every arm and every recipe, a panel a dataset]({PICTURE})
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Keep what is given; write the document and its picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("comparisons", nargs="*", type=Path, help="comparison.json files to keep")
    told = "a recipe's runs to keep: its name, and the <save_dir>/<dataset> of each"
    parser.add_argument("--run", nargs="+", action="append", default=[], metavar="NAME RUN_DIR", help=told)
    parser.add_argument("--here", action="store_true", help="runs that do not say where were made on this machine")
    args = parser.parse_args(argv)
    for path in args.comparisons:
        print(f"kept: {keep(path)}")
    for name, *folders in args.run:
        found = recipe_results.recipe(name, [Path(folder) for folder in folders], args.here)
        file = f"{found['dataset']}_{name}.json"
        print(f"kept: {_keep(KEPT / RECIPES / file, found)}")
    comparisons, recipes = kept()
    WRITTEN.write_text(document(comparisons, recipes), encoding="utf-8")
    print(f"written: {WRITTEN}")
    if panels := contenders(comparisons, recipes):
        print(f"written: {save(accuracy_against_time(panels), WRITTEN.parent / PICTURE)}")
    return 0


def kept() -> tuple[list[Found], list[Found]]:
    """All comparisons and all recipes. Raises `UserError` where a file is none."""
    recipes = sorted((KEPT / RECIPES).glob("*.json"))
    return [read(path) for path in sorted(KEPT.glob("*.json"))], [read_recipe(path) for path in recipes]


def keep(path: Path) -> Path:
    """Copy a comparison's JSON to `KEPT`. Raises `UserError` where it is none."""
    found = read(path)
    name = "_".join([found["dataset"], found["match"], *_few(found["arms"])]).replace(" ", "_")
    told = {key: value for key, value in found.items() if key not in OF_THE_MACHINE_IT_WAS_ON}
    return _keep(KEPT / f"{name}.json", told)


def _few(arms: Collection[str]) -> list[str]:
    """Their names; of many the first and how many more."""
    return list(arms) if len(arms) <= MANY else [f"{next(iter(arms))} and {len(arms) - 1} more"]


def _keep(path: Path, found: Found) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def read(path: Path) -> Found:
    """A comparison's JSON. Raises `UserError` where it is none."""
    return _read(path, NEEDED, "comparison.json")


def read_recipe(path: Path) -> Found:
    """A recipe's. Raises `UserError` where it is none."""
    return _read(path, recipe_results.NEEDED, "recipe")


def _read(path: Path, needed: Sequence[str], kind: str) -> Found:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    missing = [name for name in needed if not isinstance(found, dict) or name not in found]
    if missing:
        raise UserError(f"{path} is no {kind}: it lacks {', '.join(missing)}")
    return found


def contenders(comparisons: Sequence[Found], recipes: Sequence[Found]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Of each set with classes all recipes and arms, by names of which each is there once."""
    named = [(one["dataset"], one["name"], one) for one in recipes]
    for found in comparisons:
        if len(found["arms"]) > MANY:
            continue
        named += [(found["dataset"], f"{arm}, equal {found['match']}", of) for arm, of in found["arms"].items()]
    panels: dict[str, dict[str, Mapping[str, Any]]] = {}
    for dataset, name, one in named:
        if "test_accuracy" not in one or "i2t_r1" in one:  # of captions it is the next word's
            continue
        panel, number = panels.setdefault(dataset, {}), 2
        unique = name
        while unique in panel:
            unique, number = f"{name} ({number})", number + 1
        panel[unique] = one
    return panels


def document(comparisons: Sequence[Found], recipes: Sequence[Found] = ()) -> str:
    """The whole of `docs/results.md`."""
    told: list[str] = []
    if recipes:
        table, made = recipe_results.section(recipes)
        told = ["## Recipes\n", f"{_markdown(table)}\n", *made, ""]
    return "\n".join([HEAD, *told, *map(section, comparisons)])


def section(found: dict[str, Any]) -> str:
    """One comparison."""
    computer, versions = found["machine"], found["versions"]
    threads = " or ".join(map(str, computer["threads"]))
    made = (
        f"Seeds {' '.join(map(str, found['seeds']))}; {recipe_results.computer(computer)}, {threads} threads a run, "
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
            f"## {found['dataset']}, equal {found['match']}: {', '.join(_few(found['arms']))}\n",
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
