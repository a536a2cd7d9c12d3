"""The command line: finds the command, and turns a user's mistake into one line and exit code 2.

diffmoe <command> [flags]
python main.py --dataset cifar10 --mode train_test --epochs 10        (the flat form)
"""

from __future__ import annotations

import io
import logging
import os
import shutil
import signal
import sys
import textwrap
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from docstring_parser import parse_from_object

from diffmoe.commands.parsing import unread_is_no_error
from diffmoe.config import DataConfig, RunConfig, TrainingConfig, UserError, nearest
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

FLAGS = (
    *("dataset", "data_dir", "preset", "batch_size", "epochs", "lr", "weight_decay", "seed"),
    *("save_dir", "checkpoint", "resume", "overwrite", "device", "precision"),
)
"""Of train and test those that most users want."""


USAGE = f"""usage: diffmoe <command> [flags]      (or: python main.py --mode {{{",".join(MODES)}}} [flags])

A multimodal Mixture-of-Experts Transformer: train it, test it, use it."""

EXAMPLES = """examples:
  diffmoe train_test                                         handwritten digits, in a minute, no download
  python main.py --dataset cifar10 --mode train_test --preset tiny     CIFAR-10 on a laptop
  diffmoe predict cat.jpg --checkpoint checkpoints/cifar10_model.pth
  diffmoe train_test --dataset shapes                        learn to caption drawn shapes, in minutes, no download
  diffmoe caption picture.png --checkpoint checkpoints/shapes_model.pth

`diffmoe <command> --help` lists the flags of one command."""


def help_text() -> str:
    """What the program can do, on lines that end between words in a narrow terminal too."""
    commands = [f"  {name:16}{text}" for name, text in COMMANDS.items()]
    flags = [f"  --{name:14}{text}" for name, text in _flags().items()]
    parts = (
        (USAGE.splitlines(), 4),
        (["commands:", *commands], 18),
        ([f"flags of {', '.join(MODES)}; diffmoe train --help lists all:", *flags], 18),
        (EXAMPLES.splitlines(), 6),
    )
    fold = textwrap.TextWrapper(shutil.get_terminal_size().columns, break_long_words=False, break_on_hyphens=False)
    told = []
    for lines, indent in parts:
        fold.subsequent_indent = " " * indent
        told.append("\n".join(fold.fill(line) for line in lines))
    return "\n\n".join(told)


def _flags() -> dict[str, str]:
    """What each of `FLAGS` is for: the first sentence of its field's docstring."""
    documented = [parse_from_object(config) for config in (DataConfig, TrainingConfig, RunConfig)]
    texts = {field.arg_name: " ".join((field.description or "").split()) for doc in documented for field in doc.params}
    told = {name: texts[name].partition(". ")[0].removesuffix(".") for name in FLAGS}
    return {"dataset": told["dataset"], "mode": f"{', '.join(MODES)}; of main.py, whose default is {MODES[-1]}", **told}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for a user's mistake, 128 + the signal's number when stopped."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that lacks a character gets another one
        sys.stdout.reconfigure(errors="replace")
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"  # of several processes, which all would say the same
    warnings.filterwarnings("ignore", module=r"PIL\.")  # a picture that will not do is one line
    logging.basicConfig(format="diffmoe: %(message)s", level=logging.WARNING if is_first else logging.ERROR)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells where its cache is, where there is no home
    try:
        return dispatch(argv)
    except UserError as error:
        if not error.told:
            print(f"diffmoe: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if is_first:
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
