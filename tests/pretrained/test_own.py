"""A start from a model of our own: what fits is copied, and a dense FFN cut into experts computes what it did."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.model.pools import WIDTH, randn, randomize
from tests.small import SMALL
from torch import Tensor

from diffmoe.config import ModelConfig, UserError
from diffmoe.model.captioner import Captioner
from diffmoe.model.heads import Classifier, Head, ImageClassifier
from diffmoe.model.layers import Expert
from diffmoe.model.moe import GeneralExperts
from diffmoe.model.routers import AttentiveRouter
from diffmoe.pretrained import start_from
from diffmoe.pretrained.own import clusters, gates_sum, upcycle
from diffmoe.storage.model_files import DataInfo, save_model

MOE = replace(SMALL, num_general_experts=4, top_k=2, classify_with="descriptions")
DENSE = replace(MOE, dense=True)
TOKENS = torch.arange(24).view(3, 2, 4)


def classifier(config: ModelConfig) -> ImageClassifier:
    return ImageClassifier(config, TOKENS[: config.num_classes])


def save(model: Head, path: Path, classes: int = 3) -> str:
    names = tuple("abcdefgh"[:classes]) if isinstance(model, Classifier) else ()
    mean_std = (0.5,) * model.config.in_channels
    save_model(path, model, DataInfo("some", names, mean_std, mean_std, 0.1, 0.1, 0))
    return str(path)


def trained(config: ModelConfig) -> ImageClassifier:
    """In float32, with nothing at its default: each weight is a sample of its own."""
    return randomize(classifier(config)).float().eval()


def pictures(count: int = 5, size: int = 8, channels: int = 1) -> Tensor:
    return randn(count, channels, size, size, seed=7).float()


def pool_and_ffn(
    hidden: int, experts: int, units: int, top_k: int = 2, **options: Any
) -> tuple[GeneralExperts, Expert]:
    pool = randomize(GeneralExperts(WIDTH, experts, top_k, units / WIDTH, **options)).eval()
    return pool, randomize(Expert(WIDTH, hidden / WIDTH)).eval()


class TestUpcycledPool:
    @pytest.mark.parametrize(
        ("hidden", "experts", "units", "top_k"),
        [
            (12, 4, 12, 2),  # copies
            (12, 3, 12, 3),
            (24, 4, 12, 2),  # slices: what a dense model has by default
            (24, 8, 12, 4),  # two of each
            (36, 3, 12, 3),  # one group
            (20, 4, 12, 2),  # units divided into two
            (5, 4, 12, 2),
        ],
    )
    @pytest.mark.parametrize("gate_scale", [1.0, 2.5])
    def test_computes_what_the_ffn_did(
        self, hidden: int, experts: int, units: int, top_k: int, gate_scale: float
    ) -> None:
        pool, ffn = pool_and_ffn(hidden, experts, units, top_k, gate_scale=gate_scale)
        how = upcycle(pool, ffn, scale=0.7)
        assert how.slices * units >= hidden
        x = randn(40, 5, WIDTH, seed=3)
        y, routing = pool(x)
        assert len(routing.expert_ids.unique()) > 1
        torch.testing.assert_close(y, 0.7 * ffn(x), rtol=1e-12, atol=1e-12)

    def test_for_one_expert_a_token_times_its_probability(self) -> None:
        pool, ffn = pool_and_ffn(12, 4, 12, top_k=1)
        upcycle(pool, ffn)
        x = randn(40, WIDTH, seed=3)
        y, routing = pool(x)
        torch.testing.assert_close(y, routing.gates / gates_sum(pool) * ffn(x), rtol=1e-12, atol=1e-12)
        assert 0.25 < gates_sum(pool) < 1

    @pytest.mark.parametrize("router", ["hash", "merged"])
    def test_copies_do_with_every_router_whose_gates_add_up(self, router: str) -> None:
        pool, ffn = pool_and_ffn(12, 4, 12, top_k=1, router=router, gate_scale=1.5)
        upcycle(pool, ffn)
        x = randn(6, 5, WIDTH, seed=3)
        torch.testing.assert_close(pool(x)[0], ffn(x), rtol=1e-12, atol=1e-12)

    def test_merged_experts_are_copies_of_the_strongest_units(self) -> None:
        pool, ffn = pool_and_ffn(24, 4, 12, router="merged")
        assert upcycle(pool, ffn).slices == 1
        assert torch.equal(pool.fc1_weight[0], pool.fc1_weight[3])

    def test_with_equal_gates_the_slices_add_up_whoever_chooses(self) -> None:
        pool, ffn = pool_and_ffn(24, 5, 8, top_k=3, gate_scale=3.0)
        assert upcycle(pool, ffn).slices == 3
        x_normed = F.layer_norm(x := randn(9, WIDTH), (WIDTH,))
        plan = pool.router(x_normed).plan
        for ids in ([0, 1, 2], [3, 4, 2]):
            chosen = plan._replace(
                expert_ids=torch.tensor(ids).expand(9, 3),
                gates=torch.ones(9, 3).double(),
                tokens_per_expert=torch.bincount(torch.tensor(ids).repeat(9), minlength=5),
            )
            torch.testing.assert_close(pool.run(x_normed, chosen), ffn(x), rtol=1e-12, atol=1e-12)

    def test_the_weakest_units_are_left_out(self) -> None:
        pool, ffn = pool_and_ffn(26, 4, 12)
        with torch.no_grad():
            ffn.fc2.weight[:, [3, 17]] *= 1e-12
        assert str(upcycle(pool, ffn)).startswith("a dense FFN of 26 units, the 24 strongest kept, cut into 2 slices")
        x = randn(40, WIDTH, seed=3)
        torch.testing.assert_close(pool(x)[0], ffn(x), rtol=1e-9, atol=1e-9)


class TestStartAt:
    @pytest.mark.parametrize("experts", [2, 5, 9])
    def test_the_nearest_centroid_has_the_largest_logit(self, experts: int) -> None:
        router = AttentiveRouter(16, experts, 1).double()
        centroids = F.layer_norm(randn(experts, 16), (16,))
        router.start_at(centroids)
        x = F.layer_norm(randn(200, 16, seed=1), (16,))
        logits = router.score(x)
        assert torch.equal(logits.argmax(-1), torch.cdist(x, centroids).argmin(-1))
        torch.testing.assert_close(logits.mean(-1), torch.zeros(200).double(), atol=1e-12, rtol=0)
        torch.testing.assert_close(router.score(centroids).std(), torch.tensor(1.0).double())
        torch.testing.assert_close(router.keys @ router.keys.T, torch.eye(experts).double())

    def test_centroids_are_where_the_tokens_are(self) -> None:
        means = 10 * randn(3, 6)
        tokens = (means[:, None] + 0.01 * randn(3, 50, 6, seed=1)).flatten(0, 1)
        found = clusters(tokens, 3)
        assert found is not None
        assert torch.equal(torch.cdist(means, found).argmin(1).sort().values, torch.arange(3))
        torch.testing.assert_close(found[torch.cdist(means, found).argmin(1)], means, atol=0.02, rtol=0)
        again = clusters(tokens, 3)
        assert again is not None
        assert torch.equal(found, again)

    def test_fewer_different_tokens_than_clusters_are_not_clustered(self) -> None:
        assert clusters(randn(2, 6), 3) is None
        assert clusters(torch.ones(9, 6), 3) is None


class TestModels:
    @pytest.mark.parametrize("with_pictures", [False, True])
    def test_a_routed_model_starts_as_the_dense_one(self, tmp_path: Path, with_pictures: bool) -> None:
        dense, model = trained(DENSE), classifier(MOE)
        lines = start_from(model, save(dense, tmp_path / "dense.pth"), pictures(64) if with_pictures else None)
        assert "patch_embed: copied, all of it" in lines
        ffn = "a dense FFN of 64 units cut into 2 slices for 4 experts of 32"
        assert f"image_encoder: copied, {ffn}" in lines
        assert ("routers: 3 of 3 start at clusters of tokens, of 64 pictures" in lines) is with_pictures
        x = pictures()
        with torch.no_grad():
            expected, found = dense.double().classify(x.double()), model.eval().double().classify(x.double())
        # The groups' logits are equal up to float32, in which the routers were made.
        torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-4 if with_pictures else 1e-10)

    def test_the_same_model_is_copied_whole(self, tmp_path: Path) -> None:
        source, model = trained(MOE), classifier(MOE)
        lines = start_from(model, save(source, tmp_path / "m.pth"))
        assert {line.split(": ", 1)[1] for line in lines} == {"copied, all of it"}
        for name, value in source.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name

    def test_a_head_of_other_classes_keeps_its_start_and_so_do_their_descriptions(self, tmp_path: Path) -> None:
        model = ImageClassifier(replace(MOE, num_classes=2), TOKENS[1:])
        before = model.head.weight.clone()
        lines = start_from(model, save(trained(MOE), tmp_path / "m.pth"))
        assert "head: skipped, weight is 2 x 16 here and 3 x 16 in the file" in lines
        assert torch.equal(model.head.weight, before)
        assert model.class_tokens is not None
        assert torch.equal(model.class_tokens, TOKENS[1:])

    def test_the_rows_of_classes_of_the_same_name_are_copied(self, tmp_path: Path) -> None:
        file = save(source := trained(MOE), tmp_path / "m.pth")  # of a, b, c
        model = classifier(MOE)
        before = model.head.weight.clone()
        assert "head: copied, 2 of 3 classes, by name" in start_from(model, file, class_names=("c", "new", "a"))
        expected = torch.stack([source.head.weight[2], before[1], source.head.weight[0]])
        assert torch.equal(model.head.weight, expected)
        more = ImageClassifier(replace(MOE, num_classes=4), TOKENS[[0, 1, 2, 0]])
        assert "head: copied, 1 of 4 classes, by name" in start_from(more, file, class_names=("x", "b", "y", "z"))
        assert torch.equal(more.head.bias[1], source.head.bias[1])
        other = classifier(MOE)
        before = other.head.weight.clone()
        assert "head: skipped, the classes are others" in start_from(other, file, class_names=("x", "y", "z"))
        assert torch.equal(other.head.weight, before)
        same = classifier(MOE)
        assert "head: copied, all of it" in start_from(same, file, class_names=("a", "b", "c"))

    def test_positions_of_another_grid_are_interpolated(self, tmp_path: Path) -> None:
        source, model = trained(MOE), classifier(replace(MOE, img_size=16, max_text_len=12))
        lines = start_from(model, save(source, tmp_path / "m.pth"))
        assert "image_position: copied, 4 positions interpolated to 16" in lines
        assert "text_position: copied, 8 of 12 rows" in lines
        # What it does itself for pictures of another size.
        expected = source.backbone._image_position(pictures(1, 16))
        assert torch.equal(model.backbone.image_position, expected)

    def test_a_captioner_takes_a_classifiers_towers_and_the_other_way_around(self, tmp_path: Path) -> None:
        captioner = Captioner(MOE, torch.arange(5))
        lines = start_from(captioner, save(trained(replace(MOE, classify_with="image")), tmp_path / "c.pth"))
        assert "image_encoder: copied, all of it" in lines
        assert "fusion: skipped, the file has none" in lines
        assert "output_projection: skipped, the file has none" in lines
        model = classifier(MOE)
        lines = start_from(model, save(captioner, tmp_path / "w.pth"))
        assert "fusion: copied, all of it" in lines
        assert "head: skipped, the file has none" in lines

    def test_the_bias_of_other_words_is_not_copied(self, tmp_path: Path) -> None:
        source, model = randomize(Captioner(MOE, torch.arange(5))).float(), Captioner(MOE, torch.arange(1, 6))
        lines = start_from(model, save(source, tmp_path / "w.pth"))
        assert "output_bias: skipped, the words that can be written are others" in lines
        assert not model.output_bias.any()
        assert torch.equal(model.output_tokens, torch.arange(1, 6))

    def test_an_ffn_of_another_width_is_not_cut(self, tmp_path: Path) -> None:
        model = classifier(replace(MOE, embed_dim=32))
        lines = start_from(model, save(trained(DENSE), tmp_path / "m.pth"))
        assert any(line.startswith("image_encoder: skipped, blocks.0.") for line in lines)
        assert "log_scale: copied, all of it" in lines


class TestMistakes:
    def test_are_one_line(self, tmp_path: Path) -> None:
        whole = Path(save(trained(MOE), tmp_path / "whole.pth")).read_bytes()
        (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
        damaged = bytearray(whole)
        damaged[whole.index(trained(MOE).backbone.image_position.detach().numpy().tobytes()) + 3] ^= 255
        (tmp_path / "damaged.pth").write_bytes(damaged)
        torch.save({"format": "diffmoe-run-2"}, tmp_path / "last.ckpt")
        for name in ("half.pth", "damaged.pth", "last.ckpt", "missing.pth"):
            model = classifier(MOE)
            before = {name: value.clone() for name, value in model.state_dict().items()}
            with pytest.raises(UserError) as caught:
                start_from(model, str(tmp_path / name))
            assert str(tmp_path / name) in str(caught.value)
            assert "\n" not in str(caught.value)
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    @pytest.mark.parametrize(("name", "other"), [("activation", "relu"), ("num_heads", 1)])
    def test_what_would_compute_something_else_is_one_line(self, tmp_path: Path, name: str, other: Any) -> None:
        source = save(trained(MOE), tmp_path / "m.pth")
        with pytest.raises(UserError, match=rf"its {name} is .*: give --{name} {getattr(MOE, name)}$"):
            start_from(classifier(replace(MOE, **{name: other})), source)

    def test_a_baseline_has_nothing_of_clips(self, tmp_path: Path) -> None:
        from diffmoe.baselines import Baseline

        model = Baseline(ModelConfig(architecture="cnn", patch_embed="conv", embed_dim=32))
        with pytest.raises(UserError, match="architecture 'cnn' has no part that is CLIP's"):
            start_from(model, "open_clip:ViT-B-32/openai")
        with pytest.raises(UserError, match="nothing of it fits this model"):
            start_from(model, save(trained(MOE), tmp_path / "m.pth"))


def best_validation(out: str) -> float:
    return max(float(share) for share in re.findall(r"validation (\S+)%", out))


class TestCommandLine:
    def test_a_dense_model_of_digits_goes_on_as_experts(self, cli: Any, tiny_flags: list[str], tmp_path: Path) -> None:
        flags = [*tiny_flags, "--dense", "true", "--lr", "0.01", "--epochs", 14, "--save_dir", tmp_path / "dense"]
        dense = cli("train", *flags)
        assert dense.code == 0
        file = tmp_path / "dense" / "digits_model.pth"
        # At next to no learning rate: what is validated is the start, but for BatchNorm's statistics.
        moe = cli("train", *tiny_flags, "--lr", "1e-12", "--epochs", 1, "--save_dir", tmp_path / "moe", "--init", file)
        assert moe.code == 0
        assert "image_encoder: copied, a dense FFN of 32 units cut into 2 slices for 8 experts of 16" in moe.out
        assert "routers: 2 of 2 start at clusters of tokens, of 256 pictures" in moe.out
        assert best_validation(dense.out) > 50
        assert best_validation(moe.out) == pytest.approx(best_validation(dense.out), abs=4)

    def test_a_file_that_is_not_there_is_one_line(self, cli: Any, tiny_flags: list[str], tmp_path: Path) -> None:
        done = cli("train", *tiny_flags, "--save_dir", tmp_path, "--init", tmp_path / "missing.pth")
        assert done.code == 2
        assert done.err.count("\n") == 1
