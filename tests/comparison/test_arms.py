"""What an arm is, from its word; and which arms may not be compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffmoe.comparison.arms import ARMS, Arm, Match, parse_arms
from diffmoe.config import UserError

BASE = ("--preset", "tiny")


def parse(*words: str, match: Match = "flops", argv: tuple[str, ...] = BASE) -> dict[str, Arm]:
    return {arm.name: arm for arm in parse_arms(words, argv, match, "diffmoe compare")}


def test_every_named_arm_is_one() -> None:
    arms = parse(*ARMS)
    assert list(arms) == list(ARMS)
    models = {name: arm.settings.model for name, arm in arms.items()}
    assert models["dense"] == models["moe"].dense_twin()
    assert {name: model.architecture for name, model in models.items()} == {
        **{"moe": "moe", "dense": "moe", "vit": "moe", "timm": "timm", "cnn": "cnn", "cnn-fast": "cnn"}
    }
    assert [name for name, model in models.items() if not model.dense] == ["moe"]
    assert [models[name].patch_embed for name in ("cnn", "cnn-fast", "vit")] == ["conv", "whitened", "linear"]
    assert {arm.settings.training.optimizer for name, arm in arms.items() if name != "cnn-fast"} == {"adamw"}
    assert arms["cnn-fast"].settings.training.optimizer == "muon"
    vit = models["vit"]
    assert (vit.top_k, vit.num_modality_specific_experts, vit.fusion_layers) == (1, 0, 0)


def test_an_arm_with_other_fields() -> None:
    arms = parse("moe", "wide:expansion_factor=2,router=attentive", "dense:lr=0.01", "cnn:embed_dim=48")
    assert list(arms) == ["moe", "wide", "dense_lr_0.01", "cnn_embed_dim_48"]
    wide, dense, cnn = (arms[name].settings for name in list(arms)[1:])
    assert arms["wide"].differs_from(arms["moe"]) == {"expansion_factor": (2.0, 1)}
    assert wide.training == arms["moe"].settings.training
    assert (dense.training.lr, dense.model.dense) == (0.01, True)
    assert (cnn.model.embed_dim, arms["cnn_embed_dim_48"].is_sized) == (48, True)


def test_an_arm_from_a_file_in_which_flags_win(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("top_k: 1\ndropout: 0.3\n")
    arms = parse("moe", f"mine={path}", argv=(*BASE, "--dropout", "0.1"))
    assert arms["mine"].differs_from(arms["moe"]) == {"top_k": (1, 2)}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["moe"], "there must be at least 2"),
        (["moe", "dens"], r"unknown arm 'dens' \(did you mean 'dense'\?\); known are moe, dense, "),
        (["moe", "dense", "moe"], "arm moe occurs twice"),
        (["moe", "a/b"], "arm is 'a/b': it must be a name, NAME=FILE.yaml or NAME:FIELD=VALUE"),
        (["moe", "a:"], "arm is 'a:': it must be"),
        (["moe", "a:top_k"], "arm a: 'top_k' must be FIELD=VALUE"),
        (["moe", "a:topk=1"], r"arm a: 'topk=1' must be FIELD=VALUE, of a field that is a flag \(did you mean 'top_k'"),
        (["moe", "a:top_k=99"], "arm a: top_k is 99: it must be at most num_general_experts"),
        (["moe", "a=nowhere.yaml"], "arm a: nowhere.yaml: No such file"),
        (["moe", "a:top_k=2"], "arms moe and a are the same: there is nothing to compare"),
        (["moe", "a:dataset=cifar10"], "arms moe and a are not alike: "),
        (
            ["moe", "a:val_fraction=0.2"],
            "arms moe and a are not alike: val_fraction is 0.1 and 0.2; give both the same$",
        ),
        (
            ["moe", "a:epochs=3"],
            "epochs is 15 and 3; give both the same, or compare at equal time with --match seconds",
        ),
        (["moe", "a:flip=true"], "flip is False and True"),
        (["moe", "a:seed=1"], "seed is 0 and 1"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says) as raised:
        parse(*words)
    assert "\n" not in str(raised.value)


def test_at_equal_time_steps_and_augmentation_are_an_arms_own() -> None:
    assert parse("moe", "a:epochs=3,batch_size=32,crop_padding=2,alternate_flip=true,cutout=4", match="seconds")
    with pytest.raises(UserError, match="val_fraction"):
        parse("moe", "a:val_fraction=0.2", match="seconds")
    with pytest.raises(UserError, match="max_seconds is given with --match seconds"):
        parse("moe", "dense", match="seconds", argv=(*BASE, "--max_seconds", "9"))


def test_what_would_stop_arms_unalike_is_refused() -> None:
    with pytest.raises(UserError, match="patience is 2: it must be 0 in a comparison"):
        parse("moe", "dense", argv=(*BASE, "--patience", "2"))
    with pytest.raises(UserError, match="arm dense: the settings are of a dense model already"):
        parse("moe", "dense", argv=("--preset", "tiny-dense"))


def test_how_pools_are_trained_is_no_difference_from_a_dense_arm() -> None:
    arms = parse("first:dense_fraction=0.3", "dense", "moe")
    assert "dense_fraction" not in arms["dense"].differs_from(arms["first"])
    assert arms["first"].differs_from(arms["moe"]) == {"dense_fraction": (0.3, 0.0)}
    with pytest.raises(UserError, match="are the same"):
        parse("dense", "other:dense=true,dense_fraction=0.3", "again:dense=true")
