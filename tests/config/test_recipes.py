"""The YAML files that come with the program: the same defaults as the classes, and recipes that make valid configs."""

from __future__ import annotations

import dataclasses
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
)
from diffmoe.config.recipes import config_dir, generation_config, presets, read_yaml, recipe

DEFAULTS = {
    "model": ModelConfig,
    "training": TrainingConfig,
    "generation": GenerationConfig,
    "visualization": VisualizationConfig,
}
RECIPES = [path.stem for path in sorted(config_dir().glob("*.yaml")) if path.stem not in ("presets", *DEFAULTS)]


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_yaml_file_says_the_same(name):
    written = read_yaml(config_dir() / f"{name}.yaml")
    expected = dataclasses.asdict(DEFAULTS[name]())
    assert written == expected
    assert {key: type(value) for key, value in written.items()} == {k: type(v) for k, v in expected.items()}


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
        monkeypatch.setattr("diffmoe.config.recipes.config_dir", lambda: tmp_path)
        # top_k: the preset's; dropout: the recipe's, over the preset's; lr: the recipe's own for this preset.
        assert recipe("digits") == {"top_k": 1, "dropout": 0.3, "lr": 0.4}


def test_captions_are_written_as_the_recipe_says() -> None:
    assert generation_config("shapes").no_repeat_ngram == 0  # "in the top left" may come twice there
    assert generation_config("somebody/photos") == GenerationConfig()


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
