"""The command line: parses, composes, and turns a user's mistake into one line and exit code 2.

    diffmoe train|test|train_test|predict [flags]
    python main.py --dataset cifar10 --mode train_test --epochs 10        (the flat form)

Whatever is heavy (torch above all) is imported by the command that needs it.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
from collections.abc import Sequence

from diffmoe.config import UserError, nearest
from diffmoe.settings import MODES, parse_settings

COMMANDS = {
    "train": "train a model",
    "test": "score a trained model on the test split",
    "train_test": "both, one after the other",
    "predict": "classify pictures with a trained model",
}

HELP = f"""usage: diffmoe <command> [flags]      (or: python main.py --mode {{{",".join(MODES)}}} [flags])

A multimodal Mixture-of-Experts Transformer: train it, test it, use it.

commands:
{chr(10).join(f"  {name:12}{text}" for name, text in COMMANDS.items())}

examples:
  diffmoe train_test                                         handwritten digits, in a minute, no download
  diffmoe train_test --dataset cifar10 --preset tiny         CIFAR-10 on a laptop
  diffmoe predict --checkpoint checkpoints/cifar10_model.pth cat.jpg

`diffmoe <command> --help` lists the flags of one command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for a user's mistake, 128 + the signal's number when stopped."""
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="diffmoe: %(message)s", level=logging.WARNING)
    try:
        return dispatch(argv)
    except UserError as error:
        print(f"diffmoe: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("diffmoe: stopped", file=sys.stderr)
        return 128 + signal.SIGINT


def dispatch(argv: list[str]) -> int:
    """Find the command and run it. Raises `UserError`."""
    if not argv or argv[0] == "help" or (argv[0] in ("-h", "--help") and len(argv) == 1):
        print(HELP)
        return 0
    command = argv[0]
    if command == "predict":
        return predict(argv[1:])
    if command.startswith("-"):
        settings = parse_settings(argv)
    elif command in COMMANDS:
        settings = parse_settings(argv[1:], prog=f"diffmoe {command}", mode=command)
    else:
        raise UserError(f"unknown command {command!r}{nearest(command, COMMANDS)}; diffmoe --help lists all")
    from diffmoe import commands

    return commands.run(settings)


def predict(argv: list[str]) -> int:
    """Parse and run `diffmoe predict`."""
    parser = argparse.ArgumentParser(prog="diffmoe predict", description="Classify pictures.", allow_abbrev=False)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="picture files of any size and kind")
    parser.add_argument("--checkpoint", required=True, help="model file, such as checkpoints/cifar10_model.pth")
    parser.add_argument("--top", type=int, default=5, help="classes to show for each picture (default: 5)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = _parse_or_raise(parser, argv)
    if args.top < 1:
        raise UserError(f"top is {args.top}: it must be at least 1")
    from diffmoe.commands.predict import predict as run

    results = run(args.images, args.checkpoint, args.top, args.device)
    if args.json:
        print(json.dumps(results, ensure_ascii=False, indent=2))
        return 0
    for result in results:
        print(result["image"])
        for row in result["predictions"]:
            bar = "█" * round(row["probability"] * 30)
            print(f"  {row['probability']:6.1%}  {row['class']:20} {bar}")
    return 0


def _parse_or_raise(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parse; argparse's own report is two lines and an exit, ours is a `UserError`."""

    def error(message: str) -> None:
        raise UserError(f"{message}; {parser.prog} --help lists all flags")

    parser.error = error  # pyright: ignore[reportAttributeAccessIssue] - the documented way is to override it
    return parser.parse_args(argv)
