"""What the commands' parsers share: errors of one line, the flags of a trained model, JSON or a table."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, set_parsing_settings

from diffmoe.config import UserError, expanded, nearest
from diffmoe.config.settings import parse_field

log = logging.getLogger(__name__)

PICTURE_FILES = "picture files of any size and kind"
DEVICES = ("auto", "cpu", "cuda", "mps")


def _path(text: str) -> str:
    """`expanded`, whose reason argparse would not tell."""
    try:
        return expanded(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


class Parser(argparse.ArgumentParser):
    """One whose errors are one line; what is no flag of its own has the nearest named."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"diffmoe {command}", description=description, allow_abbrev=False)
        self.register("type", expanded, _path)
        self.configs: list[type] = []

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help lists all flags")  # argparse's own is two lines and an exit

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """All of a command line. Raises `UserError`."""
        parsed, rest = self.parse_known_args(argv)
        known = [flag.removeprefix("--") for flag in self._option_string_actions if flag.startswith("--")]
        for word in rest:
            if word.startswith("--"):
                name = word.removeprefix("--").partition("=")[0]
                self.error(f"unknown flag --{name}{nearest(name, known)}")
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return parsed

    def add_fields(self, config: type) -> None:
        """The fields of a config as flags; those that are given are the dict `fields` of what is parsed.

        In the help they stand as in that of `train`.
        """
        self.configs.append(config)
        self.set_defaults(fields={})

        class Field(argparse.Action):
            """Checked on the spot: what follows a flag is its value, never one of the pictures."""

            def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
                namespace.fields = {**namespace.fields, self.dest: parse_field(config, self.dest, values)}

        for field in dataclasses.fields(config):
            self.add_argument(f"--{field.name}", action=Field, default=argparse.SUPPRESS, help=argparse.SUPPRESS)

    def format_help(self) -> str:
        set_parsing_settings(docstring_parse_attribute_docstrings=True)
        told = [super().format_help()]
        for config in self.configs:
            listed = ArgumentParser(usage=argparse.SUPPRESS, add_help=False)
            listed.add_class_arguments(config, nested_key=None)
            told.append(listed.format_help())
        return "\n".join(told)


def model_parser(command: str, description: str, images: str | None = None, what: str = PICTURE_FILES) -> Parser:
    """A parser with the flags that all uses of a model share; `what` the `images` may be, for the help."""
    parser = Parser(command, description)
    if images:
        parser.add_argument("images", nargs=images, metavar="IMAGE", help=what)
    parser.add_argument(
        "--checkpoint", required=True, type=expanded, help="model file, such as checkpoints/cifar10_model.pth"
    )
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


@contextmanager
def unread_is_no_error() -> Iterator[None]:
    """Where nobody reads stdout any more (`| head -1`), work goes on, and what is printed from then on goes nowhere.

    So it is where stdout cannot be written, as on a full disk; but that is said.
    """
    try:
        yield
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            log.warning("stdout cannot be written (%s): what is printed is lost from here on", error.strerror)


def tell(line: str) -> None:
    """Print a line as soon as it is known."""
    with unread_is_no_error():
        print(line, flush=True)


def show(results: Any, as_json: bool, table: Callable[[Any], object]) -> int:
    """Print, and return the exit code."""
    with unread_is_no_error():
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
        print(row.get("error") or row["image"] + ("  unsure" if row.get("unsure") else ""))
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
