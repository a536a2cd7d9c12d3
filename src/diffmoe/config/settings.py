"""From a command line to checked settings: defaults < preset < recipe < the user's YAML < flags.

Imports nothing heavy. Whatever is wrong comes out as one `UserError` line that names the key, before any data is read.
"""

from __future__ import annotations

import dataclasses
import json
import re
import reprlib
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from diffmoe.config import (
    EMBEDDED_DATASETS,
    DataConfig,
    GenerationConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
    UserError,
    VisualizationConfig,
    expanded,
    nearest,
    set_names,
)
from diffmoe.config.recipes import read_yaml, recipe

GROUPS = {
    "data": DataConfig,
    "model": ModelConfig,
    "training": TrainingConfig,
    "run": RunConfig,
    "generation": GenerationConfig,
    "visualization": VisualizationConfig,
}
FIELDS = {field.name: field for group in GROUPS.values() for field in dataclasses.fields(group)}
MODES = ("train", "test", "train_test")
BEGINNING = ("resume", "overwrite")
"""Fields that say how a run begins, not what it is."""


@dataclass(frozen=True)
class Settings:
    """Everything one run is told."""

    mode: str
    data: DataConfig
    model: ModelConfig
    training: TrainingConfig
    run: RunConfig
    generation: GenerationConfig
    visualization: VisualizationConfig
    given: frozenset[str] = frozenset()
    """The fields that the user set, by flag or YAML."""
    as_json: bool = False
    """Print the metrics as JSON, and nothing else."""


def build_parser(prog: str, mode: str | None) -> ArgumentParser:
    """The parser of train, test and train_test; `mode` None adds the flag --mode (the flat form)."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    description = "Every field of every config is a flag here and a key of the YAML given with --config."
    parser = ArgumentParser(
        prog=prog,
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
        print_config=None,  # jsonargparse's own knows no recipes
    )
    if mode is None:
        parser.add_argument("--mode", choices=MODES, default="train_test", help="What to do (default: train_test).")
    parser.add_argument("--config", help="YAML file of fields; flags win over it.")
    parser.add_argument("--print_config", action="store_true", help="Print all fields as such a file, and do no more.")
    parser.add_argument("--json", action="store_true", help="Print the metrics as JSON, and nothing else.")
    for group in ("data", "run", "training", "model", "generation", "visualization"):
        parser.add_class_arguments(GROUPS[group], nested_key=None)
    return parser


def parse_settings(argv: Sequence[str], prog: str = "diffmoe", mode: str | None = None) -> Settings:
    """Parse and check. Raises `UserError`; SystemExit(0) when it has printed what --help or --print_config ask for."""
    from_yaml, flags = _read_configs(argv, with_mode=mode is None)
    argv = [*from_yaml, *_bare_flags_are_true(flags)]  # the last word wins
    given = frozenset(word[2:].split("=")[0] for word in argv if word.startswith("--")) & set(FIELDS)
    parser = build_parser(prog, mode)
    first = _parse(parser, argv)  # tells the dataset and the preset, which bring defaults of their own
    # One's own is called like a built-in set, but not it; or with a `+`, as if it were several.
    is_one_with_plus = "+" in first.dataset and len(set_names(first.dataset, first.data_dir)) == 1
    own = first.data_dir is not None and (first.dataset in EMBEDDED_DATASETS or is_one_with_plus)
    parser.set_defaults(recipe("folder" if own else first.dataset, first.preset))
    parsed = _parse(parser, argv)
    groups: dict[str, Any] = {
        name: group(**{field.name: parsed[field.name] for field in dataclasses.fields(group)})
        for name, group in GROUPS.items()
    }
    settings = Settings(mode=mode or parsed.mode, given=given, as_json=parsed.json, **groups)
    if parsed.print_config:
        print(as_yaml(settings, with_mode=mode is None), end="")
        raise SystemExit(0)
    return settings


def parse_field(group: type, name: str, word: str) -> Any:
    """One field of a config, from the word behind its flag; checked, as far as it can be alone. Raises `UserError`."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_class_arguments(group, nested_key=None)
    parsed = _parse(parser, [f"--{name}={word}"])
    return getattr(group(**{field.name: parsed[field.name] for field in dataclasses.fields(group)}), name)


def as_yaml(settings: Settings, with_mode: bool = False) -> str:
    """All fields, as a file that `--config` reads: it repeats the run, from its beginning.

    Without those that say how it begins, and without what only the data tells. `with_mode`: for the flat form.
    """
    left_out = {*BEGINNING, *({"num_classes"} - settings.given)}
    fields: dict[str, Any] = {"mode": settings.mode} if with_mode else {}
    for group in GROUPS:
        fields |= vars(getattr(settings, group))
    told = {name: value for name, value in fields.items() if name not in left_out}
    return yaml.safe_dump(told, sort_keys=False, allow_unicode=True)


def _parse(parser: ArgumentParser, argv: list[str]) -> Namespace:
    try:
        return parser.parse_args(argv)
    except ArgumentError as error:
        raise UserError(readable(str(error))) from error
    except (LookupError, AttributeError) as error:  # what its YAML library makes of `!!float` and the like
        raise UserError(f"the value of a flag is not valid YAML ({error}): it must not begin with !!") from error


def readable(message: str) -> str:
    """The parser's message for a wrong value as one plain line: 'lr is 'abc': it must be a float'."""
    message = " ".join(message.split())
    match = re.match(r"Parser key \"(?P<key>[^\"]+)\": Expected an? (?P<kind>.+?)\. Got value: ?(?P<value>.*)", message)
    if match is None:
        return re.sub(r"^Parser key \"(.*?)\":", r"\1:", message.removeprefix("argument "))
    kind = re.sub(r"<class '(\w+)'>|typing\.", r"\1", match["kind"])
    kind = re.sub(r"Literal\[(.+?)\]", r"one of \1", kind)
    kind = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}.get(kind, kind)
    return f"{match['key']} is {match['value']!r}: it must be {kind}"


def _bare_flags_are_true(argv: Sequence[str]) -> list[str]:
    """`--resume` alone means `--resume true`."""
    out: list[str] = []
    for position, word in enumerate(argv):
        out.append(word)
        field = FIELDS.get(word.removeprefix("--")) if word.startswith("--") else None
        is_last = position + 1 == len(argv) or argv[position + 1].startswith("--")
        if field is not None and field.type == "bool" and is_last:
            out.append("true")
    return out


def _read_configs(argv: Sequence[str], with_mode: bool) -> tuple[list[str], list[str]]:
    """The YAML files' fields as flags, and the flags without --config. Checks that each name exists."""
    extra = ("help", "json", "print_config", *(("mode",) if with_mode else ()))
    from_yaml: list[str] = []
    flags: list[str] = []
    words = iter(argv)
    for word in words:
        name, _, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and name == "config":
            path = value or next(words, None)
            if path is None:
                raise UserError("--config: expected one argument")
            from_yaml += _yaml_flags(Path(expanded(path)), with_mode)
            continue
        if word.startswith("--") and name not in FIELDS and name not in extra:
            raise UserError(f"unknown flag --{name}{nearest(name, [*FIELDS, *extra, 'config'])}; --help lists all")
        flags.append(word)
    return from_yaml, flags


def _is_text(name: str) -> bool:
    return name in FIELDS and str(FIELDS[name].type).startswith("str")


def _yaml_flags(path: Path, with_mode: bool) -> list[str]:
    flags = []
    for key, value in read_yaml(path).items():
        if key not in FIELDS and not (key == "mode" and with_mode):
            raise UserError(f"{path}: unknown key {key!r}{nearest(str(key), FIELDS)}")
        if isinstance(value, list | dict | set | tuple):  # which may hold itself
            raise UserError(f"{key} is {reprlib.repr(value)}: it must be a single value in {path}")
        if _is_text(key) and not isinstance(value, str | None):
            raise UserError(f"{key} is {str(value)!r}: it must be text, in quotes in {path}")
        flags.append(f"--{key}={value if isinstance(value, str) else json.dumps(value, default=str)}")
    return flags
