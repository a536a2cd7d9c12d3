"""Every field by flag and by YAML, each layer over the one before, and whatever is wrong in one line."""

from __future__ import annotations

import functools
import json
import os
import re
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import yaml

from diffmoe.config import GenerationConfig, UserError
from diffmoe.config.recipes import recipe
from diffmoe.config.settings import FIELDS, GROUPS, Settings, as_yaml, parse_field, parse_settings

GROUP_OF = {name: group for group, config in GROUPS.items() for name in get_type_hints(config)}

OTHER: dict[str, Any] = {
    "start_size": 0.75,
    "init": "open_clip:ViT-B-32/laion2b_s34b_b79k",
    "sample_top_p": 0.5,
    "dataset": "cifar10",
    "preset": "small",
    "data_dir": "some where",
    "checkpoint": "a: b.pth",
    "save_dir": "2024",
    "output_dir": "1e5",
    "router": "off",
    "img_size": 12,
    "patch_size": 4,
    "embed_dim": 64,
    "num_heads": 2,
    "num_modality_specific_experts": 1,
}
"""A valid value beside digits' own for fields whose neighbours will not do, or whose text is a trap for a parser."""


def value(settings: Settings, name: str) -> Any:
    return getattr(getattr(settings, GROUP_OF[name]), name)


def parse(*argv: str, mode: str | None = "train") -> Settings:
    return parse_settings(argv, mode=mode)


@functools.cache
def digits() -> Settings:
    return parse()


def another(name: str, current: Any) -> Any:
    """A valid value of the field that is not `current`."""
    hint = get_type_hints(GROUPS[GROUP_OF[name]])[name]
    if name in OTHER:
        return OTHER[name]
    if get_origin(hint) is Literal:
        return next(choice for choice in get_args(hint) if choice != current)
    if current is None:  # and what may be given is a number
        return 7 if int in get_args(hint) else 2.5
    return not current if hint is bool else current + 1 if hint is int else current + 0.03125


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_a_flag_and_a_key(name, tmp_path):
    current = value(digits(), name)
    wanted = another(name, current)
    assert wanted != current
    path = tmp_path / "my.yaml"
    path.write_text(f"{name}: {json.dumps(wanted)}\n")
    text = str(wanted).lower() if isinstance(wanted, bool) else str(wanted)
    for argv in ([f"--{name}={text}"], ["--config", str(path)]):
        settings = parse(*argv)
        assert value(settings, name) == wanted
        assert type(value(settings, name)) is type(wanted)
        assert name in settings.given


def test_nothing_is_given_unless_the_user_gives_it():
    assert parse().given == frozenset()


class TestPrecedence:
    """defaults < preset < recipe < YAML < flags; the middle two are test_recipes' as well."""

    def test_recipe_and_preset_over_defaults(self):
        settings = parse("--dataset", "cifar10")
        assert (settings.model.img_size, settings.model.embed_dim) == (32, 512)  # the recipe's, the default
        settings = parse("--dataset", "cifar10", "--preset", "small")
        assert (settings.model.img_size, settings.model.embed_dim) == (32, 192)
        assert settings.data.dataset == "cifar10"

    def test_yaml_over_preset(self, tmp_path):
        path = tmp_path / "my.yaml"
        path.write_text("embed_dim: 96\n")
        assert parse("--preset", "small", "--config", str(path)).model.embed_dim == 96

    @pytest.mark.parametrize("flag_first", [True, False])
    def test_flags_over_yaml_wherever_they_stand(self, tmp_path, flag_first):
        path = tmp_path / "my.yaml"
        path.write_text("lr: 0.5\nepochs: 7\n")
        config, flag = ["--config", str(path)], ["--lr", "0.25"]
        settings = parse(*(flag + config if flag_first else config + flag))
        assert (settings.training.lr, settings.training.epochs) == (0.25, 7)

    def test_later_yaml_over_earlier(self, tmp_path):
        (tmp_path / "a.yaml").write_text("lr: 0.5\nepochs: 7\n")
        (tmp_path / "b.yaml").write_text("lr: 0.25\n")
        settings = parse("--config", str(tmp_path / "a.yaml"), f"--config={tmp_path / 'b.yaml'}")
        assert (settings.training.lr, settings.training.epochs) == (0.25, 7)
        assert settings.given == {"lr", "epochs"}

    def test_dataset_and_preset_of_the_yaml_bring_their_recipes(self, tmp_path):
        path = tmp_path / "my.yaml"
        path.write_text("dataset: cifar10\npreset: tiny\nlr: 1e-3\nmode: test\n")
        settings = parse("--config", str(path), mode=None)
        expected = recipe("cifar10", "tiny")
        assert (settings.model.img_size, settings.model.embed_dim) == (expected["img_size"], expected["embed_dim"])
        assert (settings.training.lr, settings.mode) == (0.001, "test")


class TestBareFlags:
    def test_alone_is_true(self):
        settings = parse("--flip", "--overwrite", "--epochs", "3", "--compile")
        assert settings.data.flip
        assert settings.run.overwrite
        assert settings.training.compile
        assert settings.training.epochs == 3

    @pytest.mark.parametrize("word", ["false", "False", "no"])
    def test_false_can_be_said(self, word):
        assert not parse("--use_gradient_checkpointing", word).model.use_gradient_checkpointing


FLAT = {
    "--dataset cifar10 --mode train --batch_size 64 --epochs 10": {
        "mode": "train",
        "dataset": "cifar10",
        "batch_size": 64,
        "epochs": 10,
    },
    "--dataset cifar10 --mode test --checkpoint checkpoints/cifar10_model.pth": {
        "mode": "test",
        "dataset": "cifar10",
        "checkpoint": "checkpoints/cifar10_model.pth",
    },
    "--dataset flickr8k --mode train --batch_size 32 --epochs 20": {
        "mode": "train",
        "dataset": "flickr8k",
        "batch_size": 32,
        "epochs": 20,
    },
    "--dataset cifar10 --mode train_test --batch_size 64 --epochs 10": {
        "mode": "train_test",
        "dataset": "cifar10",
        "batch_size": 64,
        "epochs": 10,
    },
}
"""The command lines that users know, and what they say."""


@pytest.mark.parametrize("line", FLAT)
def test_flat_command_lines(line):
    settings = parse(*line.split(), mode=None)
    said = dict(FLAT[line])
    assert settings.mode == said.pop("mode")
    assert {name: value(settings, name) for name in said} == said
    assert settings.given == said.keys()
    assert settings.run.save_dir == "checkpoints"


def test_flat_form_trains_and_tests_unless_told():
    assert parse(mode=None).mode == "train_test"


WRONG = {
    "--epoch 3": "unknown flag --epoch (did you mean 'epochs'?)",
    "--top-k 3": "unknown flag --top-k (did you mean 'top_k'?)",
    "--class_tokens 1": "unknown flag --class_tokens; --help lists all",  # and no other setting that is named alike
    "--batch 3": "unknown flag --batch (did you mean 'batch_size'?)",
    "--epo 3": "unknown flag --epo",  # no abbreviations: a new field would change what they mean
    "--mode test": "unknown flag --mode",  # `diffmoe train --mode test`
    "--epochs": "--epochs: expected one argument",
    "--epochs abc": "epochs is 'abc': it must be a whole number",
    "--epochs 1.5": "epochs is '1.5': it must be a whole number",
    "--epochs null": "epochs is 'None': it must be a whole number",
    "--lr fast": "lr is 'fast': it must be a number",
    "--lr nan": "lr is 'nan': it must be a number",
    "--flip maybe": "flip is 'maybe': it must be true or false",
    "--device gpu": "device is 'gpu': it must be one of 'auto', 'cpu', 'cuda', 'mps'",
    "--patch_embed cnn": "patch_embed is 'cnn': it must be one of 'linear', 'conv', 'whitened'",
    "--preset tinny": "did you mean 'tiny'?",
    "--embed_dim 100 --num_heads 8": "embed_dim is 100: it must be a multiple of num_heads (8)",
    "digits": "unrecognized arguments: digits",
    "-lr 3": "unrecognized arguments: -lr 3",
    "--config none.yaml": "none.yaml: No such file",
    "--config": "--config: expected one argument",
    "--lr=": "lr is '': it must be a number",
    "--epochs=": "epochs is '': it must be a whole number",
    "--flip=": "flip is '': it must be true or false",
    "--device=": "device is '': it must be one of",
    "--preset=": "preset is '': it must be one of",
    "--lr !!float": "the value of a flag is not valid YAML",
    **{
        f"--{name}=": f"{name} is '': it must be a name or a path"
        for name in ("dataset", "data_dir", "save_dir", "init")
    },
    **{f"--{name}=": f"{name} is '': it must be a name or a path" for name in ("checkpoint", "output_dir")},
    "--config /dev/zero": "/dev/zero has over 1,000,000 characters",
    f"--config {'x' * 300}": "is no path: 300 bytes are too long",
    f"--dataset {'x' * 300}": "is no path: 300 bytes are too long",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_flag_is_one_line(line):
    with pytest.raises(UserError) as caught:
        parse(*line.split())
    assert WRONG[line] in str(caught.value)
    assert "\n" not in str(caught.value)


LAUGHS = "lr: [&a0 [ha]" + "".join(f", &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)) + "]"
"""A billion and more of them, in one line."""

WRONG_YAML = {
    "learning_rate: 0.1": "unknown key 'learning_rate'",
    "weight_decy: 0.1": "did you mean 'weight_decay'?",
    "training: {lr: 0.1}": "unknown key 'training'",
    "1: 2": "unknown key 1",
    "mode: test": "unknown key 'mode'",
    "lr: fast": "lr is 'fast': it must be a number",
    "lr: [1, 2]": "lr is",
    "epochs: true": "epochs is 'True': it must be a whole number",
    "save_dir: 3": "it must be text",
    "data_dir: [a]": "data_dir is",
    "preset: {a: 1}": "preset is",
    "lr:": "lr is ",
    "epochs: 2024-01-01": "epochs is ",  # a date, to YAML
    "epochs: .nan": "epochs is ",
    "lr: &me [*me]": ": it must be a single value",
    "data_dir: &me {a: *me}": ": it must be a single value",
    f"lr: {'[' * 5000}": "is nested too deep",
    f"{'[' * 5000}": "is nested too deep",
    LAUGHS: "lr is [",
    "lr: !!int x": "is not valid YAML",
    "lr: !!bool x": "is not valid YAML",
    "lr: 2024-99-99": "is not valid YAML",
    f"lr: {'9' * 5000}": "is not valid YAML",
    'save_dir: "\\0"': "is no path: it has a NUL",
    'save_dir: "\\ud800"': "is no path: it has half of a character",
    "lr: [": "is not valid YAML",
    "- lr": "must be a mapping",
}


@pytest.mark.parametrize("text", WRONG_YAML)
def test_wrong_yaml_is_one_line(text, tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(text + "\n")
    with pytest.raises(UserError) as caught:
        parse("--config", str(path))
    assert WRONG_YAML[text] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_empty_yaml_says_nothing(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("# all as it is\n")
    assert parse("--config", str(path)) == parse()


def test_help_names_every_field_with_its_docstring(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(f"--{name} " in text for name in FIELDS)
    assert "Routed experts for each token, K." in text


def test_a_field_alone_is_checked_as_in_its_config() -> None:
    assert parse_field(GenerationConfig, "beams", "2") == 2
    assert parse_field(GenerationConfig, "decoding", "greedy") == "greedy"
    with pytest.raises(UserError, match=r"^beams is 0: it must be at least 1$"):
        parse_field(GenerationConfig, "beams", "0")
    with pytest.raises(UserError, match=r"^decoding is 'a.png': it must be one of 'greedy', 'beam', 'sample'$"):
        parse_field(GenerationConfig, "decoding", "a.png")


class TestPrinted:
    """What `--print_config` prints and a run writes, `--config` reads back as the same settings."""

    def printed(self, capsys: pytest.CaptureFixture[str], *argv: str, mode: str | None = "train") -> str:
        with pytest.raises(SystemExit) as caught:
            parse_settings([*argv, "--print_config"], mode=mode)
        assert caught.value.code == 0
        return capsys.readouterr().out

    @pytest.mark.parametrize(
        "line",
        [
            "",
            "--dataset cifar10 --preset tiny --lr 1e-5 --flip false",
            "--dataset shapes --num_classes 7 --save_dir 1e5",
        ],
    )
    def test_is_all_of_it(self, capsys, tmp_path, line):
        path = tmp_path / "my.yaml"
        path.write_text(self.printed(capsys, *line.split()))
        again, first = parse("--config", str(path)), parse(*line.split())
        assert {group: getattr(again, group) for group in GROUPS} == {group: getattr(first, group) for group in GROUPS}
        assert set(FIELDS) - again.given == {"resume", "overwrite", *({"num_classes"} - first.given)}
        path.write_text(as_yaml(first))
        assert parse("--config", str(path)) == again

    def test_of_the_flat_form_has_its_mode(self, capsys, tmp_path):
        path = tmp_path / "my.yaml"
        path.write_text(self.printed(capsys, "--mode", "test", mode=None))
        assert parse("--config", str(path), mode=None).mode == "test"

    def test_does_not_begin_as_the_run_began(self, capsys):
        """What is repeated with --resume or --overwrite is the user's to say."""
        told = yaml.safe_load(self.printed(capsys, "--overwrite"))
        assert not {"resume", "overwrite"} & told.keys()

    def test_a_name_that_is_no_utf8(self, capsys, tmp_path):
        path, name = tmp_path / "my.yaml", os.fsdecode(b"caf\xe9 \xe6\x97\xa5")
        path.write_text(self.printed(capsys, "--data_dir", name), encoding="utf-8")
        assert parse("--config", str(path)).data.data_dir == name


class TestHome:
    """`~` is the user's home wherever a path is asked for, and no folder of that name is made."""

    @pytest.mark.parametrize("name", ["dataset", "data_dir", "save_dir", "checkpoint", "init", "output_dir"])
    def test_in_a_flag_in_yaml_and_in_python(self, name, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "my.yaml").write_text(f"{name}: ~/a b\n")
        for argv in ([f"--{name}=~/a b"], ["--config", "~/my.yaml"], ["--config=~/my.yaml"]):
            assert value(parse(*argv), name) == f"{tmp_path}/a b"
        assert getattr(GROUPS[GROUP_OF[name]](**{name: "~"}), name) == str(tmp_path)
        assert getattr(GROUPS[GROUP_OF[name]](**{name: "a/~"}), name) == "a/~"

    def test_of_a_user_without_one_is_one_line(self, monkeypatch):
        monkeypatch.setattr("os.path.expanduser", lambda path: path)
        with pytest.raises(UserError, match=r"^~/runs begins with ~, and this user has no home: "):
            parse("--save_dir", "~/runs")


NUMBERS = [name for name, field in FIELDS.items() if field.type in ("int", "float")]
WILD = ["1e308", "-1e308", "1e400", "-1", "-0.5", ".nan", ".inf", "-.inf", str(2**63), str(2**64), str(-(2**63))]


@pytest.mark.parametrize("name", NUMBERS)
def test_no_number_is_wild(name):
    """What is let through is what a run can have; all else is one line that names the field."""
    largest = {"seed": 2**63 - 1, "split_seed": 2**63 - 1, "lr": 1e30}.get(name, 10_000_000)
    refused = {}
    for word in WILD:
        try:
            assert 0 <= value(parse(f"--{name}={word}"), name) <= largest
        except UserError as error:
            refused[word] = str(error)
    assert {"1e308", "1e400", ".nan", ".inf"} <= refused.keys()
    assert all(re.fullmatch(rf"{name} is \S+: it must be .+", message) for message in refused.values())
