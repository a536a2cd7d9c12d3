"""The command line: finds the command, and turns a user's mistake into one line and exit code 2.

diffmoe <command> [flags]
python main.py --dataset cifar10 --mode train_test --epochs 10        (the flat form)
"""

from __future__ import annotations

import io
import logging
import shutil
import signal
import sys
import textwrap
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from diffmoe.commands.parsing import unread_is_no_error
from diffmoe.config import UserError, nearest
from diffmoe.config.settings import MODES, parse_settings

COMMANDS = {
    "train": "train a model",
    "test": "score a trained model on the test split",
    "train_test": "both, one after the other",
    "predict": "classify pictures with a trained model",
    "zero-shot": "classify pictures by names or sentences of your own",
    "retrieve": "find pictures by a text, or texts by a picture",
    "caption": "write a sentence for each picture",
    "visualize": "see what the experts do: figures and one page with all of them",
    "profile": "what a model costs: parameters, FLOPs, time and memory by part, speed beside the dense model",
    "compare": "what the experts gain over a dense twin and baselines, over seeds, and whether it is chance",
    "app": "serve a web page that does all of this with a picture",
}

HELP = f"""usage: diffmoe <command> [flags]      (or: python main.py --mode {{{",".join(MODES)}}} [flags])

A multimodal Mixture-of-Experts Transformer: train it, test it, use it.

commands:
{chr(10).join(f"  {name:12}{text}" for name, text in COMMANDS.items())}

examples:
  diffmoe train_test                                         handwritten digits, in a minute, no download
  diffmoe train_test --dataset cifar10 --preset tiny         CIFAR-10 on a laptop
  diffmoe predict --checkpoint checkpoints/cifar10_model.pth cat.jpg
  diffmoe train_test --dataset shapes                        learn to caption drawn shapes, in minutes, no download
  diffmoe caption --checkpoint checkpoints/shapes_model.pth picture.png

`diffmoe <command> --help` lists the flags of one command."""


def help_text() -> str:
    """`HELP`; where the terminal is narrower, its lines end between words."""
    fold = textwrap.TextWrapper(shutil.get_terminal_size().columns, break_long_words=False, break_on_hyphens=False)
    lines = []
    for line in HELP.splitlines():
        fold.subsequent_indent = " " * 14 if line.startswith(" ") else ""
        lines.append(fold.fill(line))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for a user's mistake, 128 + the signal's number when stopped."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that lacks a character gets another one
        sys.stdout.reconfigure(errors="replace")
    logging.basicConfig(format="diffmoe: %(message)s", level=logging.WARNING)
    try:
        return dispatch(argv)
    except UserError as error:
        print(f"diffmoe: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("diffmoe: stopped", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # who reads stdout has seen enough
        return 0
    finally:
        with unread_is_no_error():  # what waits to be printed
            print(end="", flush=True)


def dispatch(argv: list[str]) -> int:
    """Find the command and run it. Raises `UserError`."""
    if not argv or argv[0] == "help" or (argv[0] in ("-h", "--help") and len(argv) == 1):
        print(help_text())
        return 0
    command = argv[0]
    if command == "--version":
        print(f"diffmoe {version('diff-moe')}")
        return 0
    if command.startswith("-"):
        from diffmoe.commands.train import run

        return run(parse_settings(argv))
    if command not in COMMANDS:
        raise UserError(f"unknown command {command!r}{nearest(command, COMMANDS)}; diffmoe --help lists all")
    return import_module(f"diffmoe.commands.{command.replace('-', '_')}").main(argv[1:])
