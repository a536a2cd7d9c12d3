"""The defaults are the specification's, the recipes make valid configs, and an impossible value is one clear line."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from diffmoe.config import (
    DataConfig,
    GenerationConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
    UserError,
    VisualizationConfig,
    dataset_name,
    nearest,
)
from diffmoe.recipes import config_dir, presets, read_yaml, recipe

SPECIFIED = {
    "img_size": 28,
    "patch_size": 4,
    "in_channels": 1,
    "embed_dim": 512,
    "num_general_experts": 4,
    "num_modality_specific_experts": 2,
    "top_k": 2,
    "num_heads": 8,
    "img_encoder_layers": 6,
    "text_encoder_layers": 4,
    "fusion_layers": 3,
    "num_classes": 10,
    "dropout": 0.2,
    "activation": "gelu",
    "layer_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "position_range": 0.02,
    "use_gradient_checkpointing": True,
    "vocab_size": 50000,
    "max_text_len": 32,
    "text_embed_dim": 128,
    "router_z_loss_weight": 0.001,
    "router_balance_loss_weight": 0.01,
    "cross_modal_alignment_weight": 0.1,
    "contrastive_loss_weight": 0.1,
}
"""The specification's table."""

DEFAULTS = {
    "model": ModelConfig,
    "training": TrainingConfig,
    "generation": GenerationConfig,
    "visualization": VisualizationConfig,
}
RECIPES = [path.stem for path in sorted(config_dir().glob("*.yaml")) if path.stem not in ("presets", *DEFAULTS)]


class TestDefaults:
    def test_the_models_are_the_specifications(self):
        defaults = dataclasses.asdict(ModelConfig())
        assert {name: defaults[name] for name in SPECIFIED} == SPECIFIED
        # What the specification does not have changes nothing unless asked for.
        off = ("dense", "router_noise", "balance_bias_rate", "switch_loss_weight", "entropy_local_weight")
        assert not any(defaults[name] for name in (*off, "entropy_global_weight", "router_logit_z_loss_weight"))

    def test_the_optimizers_are_the_specifications(self):
        assert (TrainingConfig().lr, TrainingConfig().weight_decay) == (0.0005, 0.01)

    @pytest.mark.parametrize("name", DEFAULTS)
    def test_the_yaml_file_says_the_same(self, name):
        written = read_yaml(config_dir() / f"{name}.yaml")
        expected = dataclasses.asdict(DEFAULTS[name]())
        assert written == expected
        assert {key: type(value) for key, value in written.items()} == {k: type(v) for k, v in expected.items()}

    def test_configs_cannot_be_changed_in_place(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            ModelConfig().top_k = 1  # pyright: ignore[reportAttributeAccessIssue] - that is the point


def build(fields: dict[str, Any]) -> dict[str, Any]:
    """A recipe's fields -> the configs that have them, each field in exactly one."""
    configs = (DataConfig, ModelConfig, TrainingConfig, RunConfig, GenerationConfig, VisualizationConfig)
    of_config = {config: {f.name for f in dataclasses.fields(config)} for config in configs}
    for name in fields:
        assert sum(name in names for names in of_config.values()) == 1, name
    return {
        config.__name__: config(**{name: value for name, value in fields.items() if name in names})
        for config, names in of_config.items()
    }


class TestRecipes:
    @pytest.mark.parametrize("preset", [None, *presets()])
    @pytest.mark.parametrize("dataset", RECIPES)
    def test_every_preset_of_every_recipe_is_valid(self, dataset, preset):
        model = build(recipe(dataset, preset))["ModelConfig"]
        assert model.dense == (preset is not None and preset.endswith("dense"))

    @pytest.mark.parametrize("size", [name for name in presets() if not name.endswith("dense")])
    @pytest.mark.parametrize("dataset", RECIPES)
    def test_dense_has_the_same_active_compute(self, dataset, size):
        routed, dense = (build(recipe(dataset, name))["ModelConfig"] for name in (size, f"{size}-dense"))
        assert dense == dataclasses.replace(routed, dense=True)
        # A token meets top_k experts of int(e * D) hidden units, or one of int(top_k * e * D): no rounding between.
        hidden = round(routed.expansion_factor * routed.embed_dim)
        assert round(dense.top_k * dense.expansion_factor * dense.embed_dim) == routed.top_k * hidden

    def test_dense_alone_is_the_base(self):
        assert recipe("cifar10", "dense") == recipe("cifar10", "base-dense")

    @pytest.mark.parametrize("dataset", ["digits", "shapes"])
    def test_small_sets_take_the_tiny_preset(self, dataset):
        if dataset not in RECIPES:
            pytest.skip(f"no recipe of {dataset} yet")
        assert recipe(dataset) == recipe(dataset, "tiny")

    def test_unknown_sets_take_the_folders_recipe(self):
        assert recipe("owner/name") == recipe("some/where/pets") == recipe("folder")

    def test_unknown_preset_names_the_nearest(self):
        with pytest.raises(UserError, match=r"preset is 'tinny'.*tiny, small, base.*did you mean 'tiny'\?"):
            recipe("digits", "tinny")

    def test_layers_lie_over_each_other_as_the_module_says(self, tmp_path, monkeypatch):
        (tmp_path / "presets.yaml").write_text("base: {}\ntiny: {dropout: 0.1, top_k: 1, lr: 0.1}\n")
        text = "preset: tiny\ndropout: 0.3\nlr: 0.3\npresets: {tiny: {lr: 0.4}}\n"
        (tmp_path / "digits.yaml").write_text(text)
        monkeypatch.setattr("diffmoe.recipes.config_dir", lambda: tmp_path)
        # top_k: the preset's; dropout: the recipe's, over the preset's; lr: the recipe's own for this preset.
        assert recipe("digits") == {"top_k": 1, "dropout": 0.3, "lr": 0.4}


IMPOSSIBLE: list[tuple[type, str, Any, str]] = [
    *((ModelConfig, name, 0, "at least 1") for name in ("img_size", "patch_size", "in_channels", "embed_dim")),
    *((ModelConfig, name, 0, "at least 1") for name in ("num_heads", "img_encoder_layers", "text_encoder_layers")),
    *((ModelConfig, name, 0, "at least 1") for name in ("num_general_experts", "top_k", "num_classes")),
    *((ModelConfig, name, -1, "at least 1") for name in ("vocab_size", "text_embed_dim")),
    *(
        (ModelConfig, name, -1, "at least 0")
        for name in ("fusion_layers", "initializer_range", "position_range", "balance_bias_rate")
    ),
    *((ModelConfig, f.name, -0.1, "at least 0") for f in dataclasses.fields(ModelConfig) if "weight" in f.name),
    (ModelConfig, "router_z_loss_weight", math.nan, "at least 0"),
    (ModelConfig, "max_text_len", 2, "at least 3"),
    (ModelConfig, "dropout", 1.0, "not including, 1"),
    (ModelConfig, "dropout", -0.1, "from 0"),
    (ModelConfig, "dropout", math.nan, "from 0"),
    (ModelConfig, "expansion_factor", 0, "over 0"),
    (ModelConfig, "expansion_factor", 0.0005, "over 0|at least|hidden"),  # 512 * 0.0005 = 0.256: no hidden unit
    (ModelConfig, "expansion_factor", math.inf, "finite|over 0"),
    (ModelConfig, "layer_norm_eps", 0.0, "over 0"),
    (ModelConfig, "num_modality_specific_experts", 3, "0, 1 or 2"),
    (ModelConfig, "embed_dim", 510, r"a multiple of num_heads \(8\)"),
    (ModelConfig, "top_k", 5, r"at most num_general_experts \(4\)"),
    (ModelConfig, "img_size", 30, r"a multiple of patch_size \(4\)"),
    *((DataConfig, name, 1.0, "not including, 1") for name in ("val_fraction", "test_fraction", "erase")),
    *((DataConfig, name, 0.0, "over 0") for name in ("val_fraction", "test_fraction")),
    *((DataConfig, name, -1, "at least 0") for name in ("crop_padding", "max_memory_gb", "num_workers", "split_seed")),
    (DataConfig, "split_seed", 2**64, "at most|less|below"),  # torch's generators take 64 bits
    *((TrainingConfig, name, 0, "at least 1") for name in ("epochs", "batch_size", "accumulation_steps")),
    *((TrainingConfig, name, -1, "at least 0") for name in ("weight_decay", "clip_norm", "patience", "seed")),
    (TrainingConfig, "seed", 2**64, "at most|less|below"),
    *((TrainingConfig, "lr", value, "over 0 and finite") for value in (0.0, -1.0, math.inf, math.nan)),
    *((TrainingConfig, name, 1.0, "not including, 1") for name in ("warmup_fraction", "label_smoothing")),
    (TrainingConfig, "final_lr_fraction", 1.1, "from 0 to 1"),
    (RunConfig, "num_devices", 0, "at least 1"),
    (GenerationConfig, "beams", 0, "at least 1"),
    *((GenerationConfig, name, -1, "at least 0") for name in ("no_repeat_ngram", "min_caption_len", "sample_top_k")),
    *((GenerationConfig, "temperature", value, "over 0 and finite") for value in (0.0, math.inf, math.nan)),
    *((GenerationConfig, "sample_top_p", value, "over 0 and at most 1") for value in (0.0, 1.1)),
    (VisualizationConfig, "dpi", 29, "at least 30"),
    *((VisualizationConfig, name, 0, "at least 1") for name in ("examples", "weakest_classes")),
]


@pytest.mark.parametrize(("config", "name", "value", "right"), IMPOSSIBLE)
def test_impossible_value_is_one_line(config, name, value, right):
    """It names the key, what it was and what would be right."""
    with pytest.raises(UserError, match=right) as caught:
        config(**{name: value})
    assert str(caught.value).startswith(f"{name} is {value!r}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (ModelConfig, {"patch_embed": "conv", "patch_size": 7}, "patch_size is 7.*a power of two"),
        (ModelConfig, {"classify_with": "descriptions", "fusion_layers": 0}, "fusion_layers is 0.*at least 1"),
        (RunConfig, {"resume": True, "overwrite": True}, "resume.*without overwrite"),
    ],
)
def test_impossible_together(config, fields, message):
    with pytest.raises(UserError, match=message):
        config(**fields)


def test_num_patches():
    assert ModelConfig(img_size=32, patch_size=8).num_patches == 16  # 4 * 4


@pytest.mark.parametrize(
    ("dataset", "name"), [("cifar10", "cifar10"), ("owner/pets", "pets"), ("/data/pets/", "pets"), ("/", "data")]
)
def test_dataset_name(dataset, name):
    assert dataset_name(dataset) == name


def test_nearest():
    assert nearest("top_kk", ["lr", "top_k"]) == " (did you mean 'top_k'?)"
    assert nearest("zzz", ["lr", "top_k"]) == ""


class TestReadYaml:
    def test_empty_is_no_fields(self, tmp_path):
        (tmp_path / "a.yaml").write_text("# nothing yet\n")
        assert read_yaml(tmp_path / "a.yaml") == {}

    @pytest.mark.parametrize("content", [b"a: [", b"- a\n- b", b"text", b"\xff\xfe\x00", b"a: 1\n b: 2"])
    def test_what_is_no_mapping_names_the_file(self, tmp_path: Path, content):
        path = tmp_path / "bad.yaml"
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"bad\.yaml") as caught:
            read_yaml(path)
        assert "\n" not in str(caught.value)

    def test_missing_names_the_file(self, tmp_path):
        with pytest.raises(UserError, match=r"none\.yaml: No such file"):
            read_yaml(tmp_path / "none.yaml")
