"""What is minimised, by hand; a window of batches is one big batch; and nothing but a step changes a model."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.small import SMALL
from tests.training.trainees import Batch, ListBatches, Regression, made_of, make_trainee
from torch import Tensor, nn

from diffmoe.config import END_ID, START_ID, VOCAB_SIZE, ModelConfig
from diffmoe.model.captioner import Captioner
from diffmoe.model.dispatch import BACKENDS
from diffmoe.model.heads import Head, ImageClassifier, Score
from diffmoe.model.multimodal import MultiModalMoE
from diffmoe.model.outputs import ClassifierOutput, Losses, Output
from diffmoe.training.objective import Objective, means

CONFIG = dataclasses.replace(
    SMALL, img_encoder_layers=2, num_general_experts=4, expansion_factor=1, vocab_size=VOCAB_SIZE
)
OWN_LOSSES_OFF = {
    field.name: 0.0 for field in dataclasses.fields(ModelConfig) if field.name.endswith(("loss_weight", "ment_weight"))
}
DESCRIPTIONS = torch.tensor([[[START_ID, 320, END_ID]], [[START_ID, 400, END_ID]], [[START_ID, 539, END_ID]]])


def make_classifier(**changes: Any) -> ImageClassifier:
    torch.manual_seed(0)
    return ImageClassifier(dataclasses.replace(CONFIG, **changes), DESCRIPTIONS)


def make_captioner(**changes: Any) -> Captioner:
    """It writes six words and the end."""
    torch.manual_seed(0)
    return Captioner(dataclasses.replace(CONFIG, **changes), torch.tensor([3, 320, 400, 539, 1000, 2000, END_ID]))


def pictures(count: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 8, 8, generator=generator), torch.randint(3, (count,), generator=generator)


def captions(*texts: list[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures, and captions of these words between a start and an end, as wide as the longest."""
    tokens = nn.utils.rnn.pad_sequence([torch.tensor([START_ID, *words, END_ID]) for words in texts], batch_first=True)
    lengths = torch.tensor([len(words) + 2 for words in texts])
    mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
    return pictures(len(texts), seed)[0], tokens, mask


def weights(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


class TestObjective:
    def test_is_smoothed_cross_entropy_beside_the_models_own_losses(self) -> None:
        class Fixed(ImageClassifier):
            """Says the same of every batch."""

            def run(self, batch: Any, **_: Any) -> ClassifierOutput:
                logits = torch.tensor([[0.7, 0.2, 0.1], [0.2, 0.7, 0.1]]).log()
                return ClassifierOutput(**vars(made_of(logits, 0.5, part=2.0)), logits=logits)

        step = Objective(Fixed(CONFIG), label_smoothing=0.3)(torch.zeros(2, 1), torch.tensor([0, 0]))
        # Targets: 0.7 + 0.3 / 3 = 0.8 on the label, 0.1 on each other class.
        first = -(0.8 * math.log(0.7) + 0.1 * math.log(0.2) + 0.1 * math.log(0.1))
        second = -(0.8 * math.log(0.2) + 0.1 * math.log(0.7) + 0.1 * math.log(0.1))
        assert step.task_loss.item() == pytest.approx((first + second) / 2, abs=1e-6)
        assert (step.own_loss, step.accuracy) == (0.5, 0.5)
        assert {name: float(value) for name, value in step.parts.items()} == dict.fromkeys(PARTS, 2.0)

    def test_of_captions_is_the_next_tokens_loss(self) -> None:
        model = make_captioner()
        images, tokens, mask = captions([320, 400], [539])
        step = Objective(model, label_smoothing=0.2)(images, tokens, mask)
        out = model(images, tokens, mask)
        real = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]  # position t predicts token t + 1; the last of row 1 is padding
        logits = torch.stack([out["logits"][row, t] for row, t in real])
        columns = {token: column for column, token in enumerate(model.output_tokens.tolist())}
        targets = torch.tensor([columns[int(tokens[row, t + 1])] for row, t in real])
        torch.testing.assert_close(step.task_loss, F.cross_entropy(logits, targets, label_smoothing=0.2))
        torch.testing.assert_close(step.own_loss, out["router_loss"])
        assert step.accuracy.item() == pytest.approx((logits.argmax(-1) == targets).float().mean().item())

    def test_has_the_load_of_every_routed_block(self) -> None:
        images, tokens, mask = captions([320, 400], [539])
        loads = Objective(make_captioner())(images, tokens, mask).loads
        assert loads.keys() == {"image_0", "image_1", "text_0", "fusion_0"}
        assert int(loads["image_0"].sum()) == 2 * 4 * CONFIG.top_k  # 4 patches a picture
        assert int(loads["text_0"].sum()) == int(mask.sum()) * CONFIG.top_k  # padding is sent nowhere


PARTS = ("router_z_loss", "router_balance_loss", "cross_modal_loss", "contrastive_loss")


class TestStep:
    BATCHES = ListBatches(5, 5, 2).batches
    TOGETHER: Batch = (torch.cat([x for x, _ in BATCHES]), torch.cat([y for _, y in BATCHES]))

    def step(self, window: list[Any], rate: float, clip_norm: float) -> tuple[Tensor, dict[str, Tensor]]:
        trainee = make_trainee(model := Regression(), clip_norm=clip_norm)
        before = weights(model)
        sums = trainee.step(window, rate)
        assert all(parameter.grad is None for parameter in model.parameters())
        return weights(model) - before, sums

    @pytest.mark.parametrize("clip_norm", [0.0, 0.01])
    def test_a_ragged_window_is_one_big_batch(self, clip_norm: float) -> None:
        in_parts, sums = self.step(list(self.BATCHES), 0.1, clip_norm)
        at_once, expected = self.step([self.TOGETHER], 0.1, clip_norm)
        assert at_once.norm() > 0
        torch.testing.assert_close(in_parts, at_once, rtol=1e-6, atol=1e-9)  # shares of the window are float32
        assert sums["pictures"] == expected["pictures"] == 12
        torch.testing.assert_close(sums["task_loss"], expected["task_loss"], rtol=1e-12, atol=0)

    def test_the_step_is_the_rate_times_the_clipped_norm(self) -> None:
        moved, _ = self.step(list(self.BATCHES), 0.3, 0.01)
        assert moved.norm().item() == pytest.approx(0.3 * 0.01, rel=1e-3)  # the gradient is longer than 0.01
        free, _ = self.step(list(self.BATCHES), 0.3, 1e6)
        unclipped, _ = self.step(list(self.BATCHES), 0.3, 0)
        assert torch.equal(free, unclipped)

    def test_the_models_own_losses_count_by_pictures(self) -> None:
        class Own(Regression):
            """Its task's loss is 0, its own that of the batch."""

            def run(self, batch: Any, **_: Any) -> Output:
                found = super().run(batch)
                return made_of(found.embedding, (found.embedding - batch[1]).square().mean())

            def score(self, batch: Any, output: Any, label_smoothing: float = 0.0) -> Score:
                return Score(0 * output.embedding.sum(), torch.zeros(()), len(batch[0]))

        trainee = make_trainee(model := Own())
        before = weights(model)
        trainee.step(list(self.BATCHES), 0.1)
        expected, _ = self.step([self.TOGETHER], 0.1, 0.0)
        torch.testing.assert_close(weights(model) - before, expected, rtol=1e-6, atol=1e-9)


def test_means_are_over_targets_for_the_task_and_over_pictures_for_all_else() -> None:
    sums = {"task_loss": 10.0, "own_loss": 6.0, "accuracy": 2.0, "router_z_loss": 3.0, "pictures": 4.0, "targets": 5.0}
    expected = {"loss": 10 / 5 + 6 / 4, "task_loss": 2.0, "accuracy": 0.4, "router_z_loss": 0.75}
    assert means({name: torch.tensor(value) for name, value in sums.items()}) == pytest.approx(expected)


class TestAccumulation:
    """The gradient of a window is that of one batch of all its pictures, whatever they are told by."""

    def gradient(self, model: Head, window: list[Any]) -> Tensor:
        trainee = make_trainee(model.double(), label_smoothing=0.1)
        before = weights(model)
        trainee.step(window, 1.0)
        return before - weights(model)

    def check(self, make: Any, window: list[Any], together: Any) -> None:
        in_parts = self.gradient(make(**OWN_LOSSES_OFF), window)
        at_once = self.gradient(make(**OWN_LOSSES_OFF), [together])
        assert at_once.norm() > 0.1
        torch.testing.assert_close(in_parts, at_once, rtol=1e-5, atol=1e-6 * float(at_once.norm()))

    def test_of_captions_as_many_as_their_words(self) -> None:
        window = [captions([3, 320, 400, 539, 1000], [320]), captions([2000], seed=1), captions([400, 400], seed=2)]
        texts = captions([3, 320, 400, 539, 1000], [320], [2000], [400, 400])[1:]
        self.check_captions(window, texts)

    def test_of_captions_some_of_whose_words_cannot_be_written(self) -> None:
        """Such a word is no target: a batch that has many of them counts for less."""
        window = [captions([3, 7, 8, 9, 10], [7]), captions([2000, 320, 400], seed=1)]
        self.check_captions(window, captions([3, 7, 8, 9, 10], [7], [2000, 320, 400])[1:])

    def check_captions(self, window: list[Any], texts: tuple[Tensor, ...]) -> None:
        images = torch.cat([batch[0] for batch in window]).double()
        self.check(make_captioner, [(batch[0].double(), *batch[1:]) for batch in window], (images, *texts))

    def test_of_pictures(self) -> None:
        window = [pictures(count, seed) for seed, count in enumerate((5, 3, 1))]
        window = [(images.double(), labels) for images, labels in window]
        together = tuple(torch.cat(parts) for parts in zip(*window, strict=True))
        self.check(make_classifier, window, together)

    def test_of_a_batch_without_a_target_is_that_of_the_others(self) -> None:
        """A batch whose captions have no word that can be written, and no end."""
        images, tokens, mask = captions([7, 8])
        mute = (images.double(), tokens[:, :-1], mask[:, :-1])
        told = captions([320], seed=1)
        told = (told[0].double(), *told[1:])
        alone, beside = (self.gradient(make_captioner(**OWN_LOSSES_OFF), w) for w in ([told], [mute, told]))
        torch.testing.assert_close(beside, alone, rtol=1e-5, atol=1e-6)


class TestBalanceBias:
    """It moves in the loop, once a step; `forward` may run twice for one batch, and must then route alike."""

    def test_forward_changes_nothing(self) -> None:
        config = dataclasses.replace(CONFIG, balance_bias_rate=0.1, dropout=0.1, use_gradient_checkpointing=True)
        images, tokens, mask = captions([320, 400], [539])
        labels = torch.tensor([0, 2])
        heads: list[tuple[nn.Module, tuple[Tensor, ...]]] = [
            (MultiModalMoE(config), (images,)),
            (MultiModalMoE(config), (images, tokens, mask)),
            (ImageClassifier(dataclasses.replace(config, patch_embed="conv"), DESCRIPTIONS), (images, labels)),
            (Captioner(config), (images, tokens, mask)),
        ]
        for model, batch in heads:
            before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            out = model.train()(*batch)
            out["router_loss"].backward()
            changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
            # BatchNorm's running statistics are its own affair: what it computes in training does not rest on them.
            assert not {name for name in changed if "running_" not in name and "num_batches" not in name}

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_checkpointing_gives_the_same_gradients_with_every_backend(self, backend: str) -> None:
        found = []
        for checkpointing in (False, True):
            model = make_classifier(
                balance_bias_rate=0.1,
                dropout=0.1,
                use_gradient_checkpointing=checkpointing,
                expert_backend=backend,
            )
            trainee = make_trainee(model)
            trainee.objective.train()
            torch.manual_seed(1)
            for seed in range(3):
                trainee.step([pictures(6, seed), pictures(4, seed + 10)], 0.1)
            found.append(weights(model))
            biases = [router.balance_bias for router in model.backbone.routers().values()]
            assert all(bias.abs().max() > 0 for bias in biases)
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)
        assert (found[0] - weights(make_classifier(expert_backend=backend))).norm() > 0.01

    def test_moves_once_a_step_by_the_load_of_the_whole_window(self) -> None:
        rate = 0.01
        model = make_classifier(balance_bias_rate=rate)
        trainee = make_trainee(model)
        window = [pictures(count, seed) for seed, count in enumerate((7, 5, 3))]
        loads = [trainee.objective(*batch).loads for batch in window]
        trainee.step(window, 0.1)
        routers = model.backbone.routers()
        assert routers.keys() == loads[0].keys() == {"image_0", "image_1", "text_0"}
        by_batch_differs = False
        for name, router in routers.items():
            load = sum(found[name] for found in loads)
            assert isinstance(load, Tensor)
            expected = rate * (load.float().mean() - load).sign()
            torch.testing.assert_close(router.balance_bias, expected)
            by_batch = sum(rate * (found[name].float().mean() - found[name]).sign() for found in loads)
            by_batch_differs |= not torch.allclose(by_batch, expected)  # pyright: ignore[reportArgumentType]
        assert by_batch_differs  # or the test would not tell

    def test_off_it_stays_where_it_is(self) -> None:
        trainee = make_trainee(model := make_classifier())
        trainee.step([pictures(6)], 0.1)
        assert not any(router.balance_bias.any() for router in model.backbone.routers().values())


ALL_LOSSES = dict.fromkeys(("router_logit_z_loss_weight", "switch_loss_weight", "entropy_local_weight"), 0.1)


class TestPrecision:
    """Under autocast the towers compute in bfloat16; what is minimised and what is told are float32."""

    @staticmethod
    def check(losses: Losses) -> None:
        found = vars(losses)
        assert found.keys() == {"router_loss", *PARTS}
        assert {name: loss.dtype for name, loss in found.items()} == dict.fromkeys(found, torch.float32)

    @pytest.mark.parametrize("classify_with", ["image", "descriptions"])
    def test_of_a_classifier(self, classify_with: str) -> None:
        model = make_classifier(classify_with=classify_with, entropy_global_weight=0.1, **ALL_LOSSES)
        images, labels = pictures(4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model.backbone.patch_embed(images).dtype == torch.bfloat16  # it is on
            out = model.classify(images, labels, need_losses=True)
            step = Objective(model)(images, labels)
        assert out.losses is not None
        self.check(out.losses)
        assert out.zero_shot_logits is not None
        assert out.logits.dtype == out.zero_shot_logits.dtype == torch.float32
        assert step.task_loss.dtype == step.own_loss.dtype == step.accuracy.dtype == torch.float32
        assert out.routing[0].probs.dtype == torch.float32

    def test_of_pictures_with_texts(self) -> None:
        model = MultiModalMoE(dataclasses.replace(CONFIG, **ALL_LOSSES))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model.encode(*captions([320, 400], [539]))
        assert out.losses is not None
        self.check(out.losses)
        assert out.text is not None
        assert out.image.embedding.dtype == out.text.embedding.dtype == torch.float32

    def test_of_a_captioner(self) -> None:
        model = make_captioner(**ALL_LOSSES)
        batch = captions([320, 400], [539])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model.run(batch, need_losses=True)
            step = Objective(model)(*batch)
        assert out.losses is not None
        self.check(out.losses)
        assert step.task_loss.dtype == step.own_loss.dtype == step.accuracy.dtype == torch.float32

    def test_losses_are_those_of_the_same_features_without_autocast(self) -> None:
        model = make_classifier(**ALL_LOSSES)
        images, labels = pictures(8)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model.classify(images, labels, need_losses=True)
        expected = model.backbone.losses(out.routing, out.image, out.text, text_of_image=labels)
        assert out.losses is not None
        assert vars(out.losses) == vars(expected)

        backbone = MultiModalMoE(dataclasses.replace(CONFIG, **ALL_LOSSES))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            paired = backbone.encode(*captions([320, 400], [539], [3, 2000]))
        expected = backbone.losses(paired.routing, paired.image, paired.text, paired=True)
        assert paired.losses is not None
        assert vars(paired.losses) == vars(expected)
