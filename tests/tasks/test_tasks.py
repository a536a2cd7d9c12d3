"""What holds for every task, and how one is found."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import pytest
import torch

from diffmoe.config import DataConfig, UserError
from diffmoe.config.settings import Settings, parse_settings
from diffmoe.data.sources import Kind
from diffmoe.model.routers import ROUTERS, AttentiveRouter
from diffmoe.storage.model_files import HEADS
from diffmoe.tasks import TASKS, task_of_data, task_of_model
from diffmoe.tasks.base import Task
from diffmoe.tasks.captioning import Captioning
from diffmoe.tasks.classification import Classification


def small(*flags: str) -> Settings:
    model = ("--img_size", "8", "--embed_dim", "16", "--num_heads", "2", "--text_embed_dim", "4", "--max_text_len", "8")
    return parse_settings(["--preset", "tiny", *model, "--fusion_layers", "1", *flags], mode="train")


def test_each_kind_of_data_and_each_head_has_one() -> None:
    assert sorted(task.data_kind for task in TASKS) == sorted(get_args(Kind))
    assert all(sum(issubclass(head, task.head) for task in TASKS) == 1 for head in HEADS.values())


def test_a_set_tells_its_task(captioned: Any, flowers: Any) -> None:
    for dataset, kind in (
        ("digits", Classification),
        ("shapes", Captioning),
        (captioned.folder, Captioning),
        (flowers, Classification),
    ):
        assert type(task_of_data(DataConfig(dataset=str(dataset)))) is kind
    with pytest.raises(UserError, match="dataset is 'nowhere'"):
        task_of_data(DataConfig(dataset="nowhere"))


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.data_kind)
class TestEach:
    def test_finds_itself_from_its_model_and_runs_on_noise(self, task: Task) -> None:
        model = task.made_up(small()).eval()
        assert task_of_model(model) is task
        batch = task.noise(model, 3)
        with torch.no_grad():
            output = model.run(batch, need_losses=True)
        loss, accuracy, num_targets = model.score(batch, output)
        assert torch.isfinite(loss)
        assert 0 <= accuracy <= 1
        assert num_targets == int(model.num_targets(batch)) > 0
        assert output.losses is not None

    def test_the_tokenizers_words_must_fit_into_the_model(self, task: Task) -> None:
        with pytest.raises(UserError, match=r"vocab_size is 100: the tokenizer needs at least 49408"):
            task.check(small("--vocab_size", "100"))
        task.check(small())

    def test_a_router_that_nobody_knows_is_one_line(self, task: Task) -> None:
        with pytest.raises(UserError, match=r"router is 'attentife': .* \(did you mean 'attentive'\?\)"):
            task.check(small("--router", "attentife"))
        task.check(small("--router", "attentife", "--dense"))  # nobody asks it

    def test_a_router_that_looks_at_the_batch_is_noted(self, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
        class Crowded(AttentiveRouter):
            dropless = False

        monkeypatch.setitem(ROUTERS, "crowded", Crowded)
        config = small().model
        assert task.notes(config) == []
        crowded = dataclasses.replace(config, router="crowded")
        assert "a prediction depends on the pictures beside it" in task.notes(crowded)[0]
        assert task.notes(dataclasses.replace(crowded, dense=True)) == []


def test_a_router_that_sees_the_future_is_noted_where_captions_are_written() -> None:
    for router in ROUTERS:
        config = small("--router", router).model
        Captioning().check(small("--router", router))
        noted = [note for note in Captioning().notes(config) if "the image tower's alone" in note]
        assert len(noted) == (router != "attentive")
        assert Captioning().notes(dataclasses.replace(config, dense=True)) == []
        assert Classification().notes(config) == []
