"""What the commands' parsers share: errors of one line, the flags of a trained model, JSON or a table."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, set_parsing_settings

from diffmoe.config import UserError, expanded

DEVICES = ("auto", "cpu", "cuda", "mps")


def _path(text: str) -> str:
    """`expanded`, whose reason argparse would not tell."""
    try:
        return expanded(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def bare_parser(command: str, description: str) -> argparse.ArgumentParser:
    """A parser without flags, whose errors are one line."""
    parser = argparse.ArgumentParser(prog=f"diffmoe {command}", description=description, allow_abbrev=False)

    def error(message: str) -> NoReturn:
        raise UserError(f"{message}; {parser.prog} --help lists all flags")  # argparse's own is two lines and an exit

    parser.register("type", expanded, _path)
    parser.error = error
    return parser


def model_parser(command: str, description: str, images: str | None = None) -> argparse.ArgumentParser:
    """A parser with the flags that all uses of a model share."""
    parser = bare_parser(command, description)
    if images:
        parser.add_argument("images", nargs=images, metavar="IMAGE", help="picture files of any size and kind")
    parser.add_argument(
        "--checkpoint", required=True, type=expanded, help="model file, such as checkpoints/cifar10_model.pth"
    )
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


@contextmanager
def unread_is_no_error() -> Iterator[None]:
    """Where nobody reads stdout any more (`| head -1`), work goes on, and what is printed from then on goes nowhere."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def list_fields(parser: argparse.ArgumentParser, config: type) -> None:
    """Add the fields of a config, which are flags too (`parse_group`), to the help, as that of `train` has them."""
    own = parser.format_help

    def format_help() -> str:
        set_parsing_settings(docstring_parse_attribute_docstrings=True)
        fields = ArgumentParser(usage=argparse.SUPPRESS, add_help=False)
        fields.add_class_arguments(config, nested_key=None)
        return f"{own()}\n{fields.format_help()}"

    parser.format_help = format_help


def show(results: Any, as_json: bool, table: Callable[[Any], object]) -> int:
    """Print, and return the exit code."""
    if as_json:
        print(_json(results))
    else:
        table(results)
    return 0


def _json(results: Any) -> str:
    """With escapes where stdout could not carry it as it is: a name that is read back must be the same."""
    text = json.dumps(results, ensure_ascii=False, indent=2)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(results, indent=2)
    return text


def print_predictions(rows: list[dict[str, Any]]) -> None:
    """The rows of `predict` and `zero-shot`."""
    for row in rows:
        print(row["image"])
        for name, title in (("predictions", ""), ("with_text", "  with the text:")):
            if title and name in row:
                print(title)
            for predicted in row.get(name, ()):
                bar = "█" * round(predicted["probability"] * 30)
                print(f"  {predicted['probability']:6.1%}  {predicted['class']:20} {bar}")
        for name, title in (("similarity", "similarity to the text"), ("log_probability", "log-probability a token")):
            if row.get(name) is not None:
                print(f"  {title}: {row[name]:.3f}")
        if "cannot_write" in row:
            print(f"  log-probability: none, as this model cannot write {', '.join(row['cannot_write'])}")
