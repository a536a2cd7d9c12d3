"""Which settings learn best, by validation: `python benchmarks/recipes.py plain decay:weight_decay=0.1 -- --dataset …`.

Each variant is NAME, the settings as given, or NAME:FIELD=VALUE,FIELD=VALUE, with other fields. Every variant is
trained with every seed in a process of its own, and validated after each epoch; the test split is never read. A run
that is finished is not repeated, so that a search can be stopped and added to. At the end: a table for the log.

    python benchmarks/recipes.py plain cutout:cutout=8 ema:ema_decay=0.99 --seeds 3 --jobs 2 --out search \\
        -- --dataset cifar10 --data_dir ../shared/data --preset tiny --epochs 4
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

ROOT = Path(__file__).parents[1]
LAST = ("val_accuracy", "train_accuracy", "images_per_second", "seconds")
"""Of a history's last row, what the table has."""


@dataclass(frozen=True)
class Trial:
    """One variant with one seed."""

    variant: str
    seed: int
    folder: Path
    flags: list[str]

    @property
    def name(self) -> str:
        """The variant's."""
        return self.variant.partition(":")[0]

    def history(self) -> list[dict[str, str]]:
        """The rows of its history.csv; none before it is finished."""
        files = list(self.folder.glob("*/history.csv")) if (self.folder / "finished").exists() else []
        return list(csv.DictReader(files[0].read_text("utf-8").splitlines())) if files else []

    def run(self, threads: int) -> None:
        """Train it, unless that was done. Raises `SystemExit` with what the program said where it failed."""
        if self.history():
            return
        command = [sys.executable, str(ROOT / "main.py"), "--mode", "train", *self.flags]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        done = subprocess.run(
            [*command, "--seed", str(self.seed), "--save_dir", str(self.folder), "--overwrite", "true"],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{self.name}, seed {self.seed}: {done.stderr.strip()}")
        (self.folder / "finished").touch()


def main(argv: list[str] | None = None) -> None:
    """Train what is not trained yet; print the table."""
    args, flags = parse_args(sys.argv[1:] if argv is None else argv)
    trials = [trial(variant, seed, flags, args.out) for seed in range(args.seeds) for variant in args.variants]

    def run(one: Trial) -> None:
        one.run(args.threads)
        curve = " ".join(f"{100 * float(row['val_accuracy']):.1f}" for row in one.history())
        print(f"{one.name}, seed {one.seed}: {curve}", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(run, trials))
    print("\n".join(table(trials)))


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Ours, and after `--` those of the program."""
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("variants", nargs="+", metavar="NAME[:FIELD=VALUE,…]")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--threads", type=int, default=1, help="of each")
    parser.add_argument("--out", type=Path, default=Path("search"), help="where the runs go")
    return parser.parse_args(argv[:split]), argv[split + 1 :]


def trial(variant: str, seed: int, flags: list[str], out: Path) -> Trial:
    """A variant's fields win over the flags."""
    name, _, rest = variant.partition(":")
    changes = [f"--{change}" for change in rest.split(",") if change]
    return Trial(variant, seed, out / name / f"seed{seed}", [*flags, *changes])


def table(trials: list[Trial]) -> list[str]:
    """Means over seeds, and of the validation accuracy the standard deviation."""
    rows = ["| variant | seeds | validation | training | images/s | seconds |", "| --- | --- | --- | --- | --- | --- |"]
    for variant in dict.fromkeys(one.variant for one in trials):
        ends = [one.history()[-1] for one in trials if one.variant == variant]
        accuracies, training, speed, seconds = ([float(end[name]) for end in ends] for name in LAST)
        spread = f" ± {100 * stdev(accuracies):.2f}" if len(ends) > 1 else ""
        rows.append(
            f"| `{variant}` | {len(ends)} | {100 * fmean(accuracies):.2f}{spread} | {100 * fmean(training):.2f} "
            f"| {fmean(speed):.0f} | {fmean(seconds):.0f} |"
        )
    return rows


if __name__ == "__main__":
    main()
