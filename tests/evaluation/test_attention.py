"""Attention summed up is what a loop over its parts gives, and each word has the rows that wrote it."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.small import SMALL
from torch import Tensor

from diffmoe.config import END_ID, START_ID
from diffmoe.data.text import detokenize, tokenize
from diffmoe.evaluation.attention import (
    description_attention,
    image_maps,
    patch_similarity,
    received,
    rollout,
    word_attention,
)
from diffmoe.model.captioner import Captioner
from diffmoe.model.encoders import AttentionMap, Place
from diffmoe.model.heads import ImageClassifier

B, H, N, L, C = 2, 3, 5, 3, 4
CONFIG = dataclasses.replace(
    SMALL,
    img_encoder_layers=2,
    fusion_layers=2,
    num_classes=C,
    dropout=0.5,
    vocab_size=49408,
    max_text_len=12,
    initializer_range=0.5,
)
CLASS_TOKENS = torch.arange(1, 25).view(C, 2, 3)


def random_maps(*shape: int, place: Place = "image", cross: bool = False, layers: int = L) -> list[AttentionMap]:
    generator = torch.Generator().manual_seed(sum(shape))
    weights = torch.randn(layers, *shape, generator=generator).mul(2).softmax(-1)
    return [AttentionMap(weights[layer], place, layer, cross) for layer in range(layers)]


def one_map(weights: list[list[float]], layer: int = 0) -> AttentionMap:
    return AttentionMap(torch.tensor(weights)[None, None], "image", layer)


def classifier(mode: Literal["image", "descriptions"], img_size: int = 8) -> ImageClassifier:
    torch.manual_seed(0)
    return ImageClassifier(dataclasses.replace(CONFIG, classify_with=mode, img_size=img_size), CLASS_TOKENS).eval()


def pictures(size: int = 8) -> Tensor:
    return torch.randn(B, 1, size, size, generator=torch.Generator().manual_seed(1))


class TestRollout:
    def test_by_hand(self) -> None:
        # Block 1 copies patch 1 into patch 0; block 2 copies patch 0 into patch 1. With the residual connection:
        # A1 = [[.5, .5], [0, 1]], A2 = [[1, 0], [.5, .5]], and A2 A1 = [[.5, .5], [.25, .75]].
        maps = [one_map([[0, 1], [0, 1]]), one_map([[1, 0], [1, 0]], layer=1)]
        assert rollout(maps).tolist() == [[[0.5, 0.5], [0.25, 0.75]]]

    def test_heads_count_alike(self) -> None:
        # Mean over heads: [[.5, .5], [.5, .5]]; with the residual connection .75 and .25.
        heads = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]])
        assert rollout([AttentionMap(heads[None], "image", 0)]).tolist() == [[[0.75, 0.25], [0.25, 0.75]]]

    def test_is_every_path_through_the_blocks(self) -> None:
        """A patch's share is the sum over all ways back through the blocks of the product of the steps' weights."""
        maps = random_maps(B, H, N, N)
        weights = [attention.weights.double().mean(1) for attention in maps]
        found = rollout(maps)
        for b, last, first in torch.cartesian_prod(torch.arange(B), torch.arange(N), torch.arange(N)).tolist():
            total = 0.0
            for one, two in torch.cartesian_prod(torch.arange(N), torch.arange(N)).tolist():
                path = (last, two, one, first)
                product = 1.0
                for layer, (to, source) in zip((2, 1, 0), pairwise(path), strict=True):
                    product *= 0.5 * float(weights[layer][b, to, source]) + 0.5 * (to == source)
                total += product
            assert float(found[b, last, first]) == pytest.approx(total, abs=1e-6)

    def test_nothing_is_lost_on_the_way(self) -> None:
        found = rollout(random_maps(B, H, N, N))
        torch.testing.assert_close(found.sum(-1), torch.ones(B, N))

    def test_patches_that_look_only_at_themselves_stay_what_they_are(self) -> None:
        maps = [AttentionMap(torch.eye(N).expand(B, H, N, N), "image", layer) for layer in range(L)]
        assert torch.equal(rollout(maps), torch.eye(N).expand(B, N, N))


def test_received_is_the_mean_over_all_who_look() -> None:
    maps = random_maps(B, H, N, N)
    found = received(maps)
    for b in range(B):
        for patch in range(N):
            looks = [float(m.weights[b, head, n, patch]) for m in maps for head in range(H) for n in range(N)]
            assert float(found[b, patch]) == pytest.approx(sum(looks) / len(looks), abs=1e-6)
    torch.testing.assert_close(found.sum(-1), torch.ones(B))


def test_other_maps_of_the_model_change_nothing() -> None:
    image = random_maps(B, H, N, N)
    others = [*random_maps(B, H, 7, 7, place="text"), *random_maps(B, H, N, N, place="fusion")]
    others += random_maps(B, H, N, N, place="fusion", cross=True)
    mixed = [*others, *image, *others]
    assert image_maps(mixed) == tuple(image)
    assert torch.equal(rollout(mixed), rollout(image))
    assert torch.equal(received(mixed), received(image))


@pytest.mark.parametrize("summary", [image_maps, rollout, received])
def test_without_maps_there_is_nothing_to_sum(summary: object) -> None:
    assert callable(summary)
    with pytest.raises(ValueError, match="need_weights=True"):
        summary(random_maps(B, H, N, N, place="text"))


def looking_at_its_own_number(num_tokens: int) -> list[AttentionMap]:
    """The token at t looks only at patch t."""
    return [AttentionMap(torch.eye(num_tokens).expand(1, H, -1, -1), "fusion", 0, cross=True)]


class TestWords:
    def test_a_word_has_the_rows_that_wrote_its_pieces(self) -> None:
        tokens, _ = tokenize(["a zxqy dog ."], 12)  # start, a, z, x, q, y, dog, ., end
        assert tokens.shape == (1, 9)
        ((words, weights),) = word_attention(looking_at_its_own_number(9), tokens)
        assert words == ["a", "zxqy", "dog", "."]
        # "a" was written at the start (row 0), "dog" by the last piece of "zxqy" (row 5), and no word by "." (row 7).
        rows = [[0], [1, 2, 3, 4], [5], [6]]
        expected = torch.zeros(4, 9)
        for word, written_by in enumerate(rows):
            expected[word, written_by] = 1 / len(written_by)
        assert torch.equal(weights, expected)

    def test_heads_and_layers_count_alike(self) -> None:
        maps = random_maps(B, H, 4, N, place="fusion", cross=True)
        tokens, _ = tokenize(["a dog", "two cats"], 12)
        found = word_attention([*random_maps(B, H, 4, 4, place="fusion"), *maps], tokens)
        for b in range(B):
            assert found[b][0] == [["a", "dog"], ["two", "cats"]][b]
            for word in range(2):
                looks = torch.stack([m.weights[b, head, word] for m in maps for head in range(H)])
                torch.testing.assert_close(found[b][1][word], looks.mean(0))

    @settings(deadline=None, max_examples=50)
    @given(st.text(st.sampled_from("abcdz é猫🐕.,!'1 "), max_size=30))
    def test_the_words_are_the_text(self, text: str) -> None:
        tokens, _ = tokenize([text], 50)
        ((words, weights),) = word_attention(looking_at_its_own_number(tokens.shape[1]), tokens)
        assert " ".join(words) == detokenize(tokens)[0]
        assert all(word and " " not in word for word in words)
        torch.testing.assert_close(weights.sum(-1), torch.ones(len(words)))
        assert len(weights) == len(words)

    def test_padding_and_what_follows_the_end_is_no_word(self) -> None:
        tokens, _ = tokenize(["a", "a b c d"], 12)
        attention = AttentionMap(torch.eye(6).expand(2, H, 6, 6), "fusion", 0, cross=True)
        (first, _), (second, _) = word_attention([attention], tokens)
        assert (first, second) == (["a"], ["a", "b", "c", "d"])

    @pytest.mark.parametrize("ids", [[START_ID, END_ID, 0], [START_ID]])
    def test_an_empty_caption_has_none(self, ids: list[int]) -> None:
        ((words, weights),) = word_attention(looking_at_its_own_number(len(ids)), torch.tensor([ids]))
        assert words == []
        assert weights.shape == (0, len(ids))

    def test_a_caption_cut_short_keeps_its_last_word(self) -> None:
        tokens = tokenize(["a zxqy"], 12)[0][:, :-3]  # start, a, z, x
        ((words, _),) = word_attention(looking_at_its_own_number(4), tokens)
        assert words == ["a", "zx"]

    def test_of_a_captioner(self) -> None:
        torch.manual_seed(0)
        model = Captioner(CONFIG).eval()
        tokens, mask = tokenize(["a dog", "two zxqy cats play"], 12)
        with torch.no_grad():
            maps = model.run((pictures(), tokens, mask), need_weights=True).attention
            alone = model.read(pictures()[:1], tokens[:1, :3], need_weights=True).attention
        found = word_attention(maps, tokens)
        assert [words for words, _ in found] == [["a", "dog"], ["two", "zxqy", "cats", "play"]]
        assert [weights.shape for _, weights in found] == [(2, 4), (4, 4)]
        # Neither the batch-mates and their padding nor the word itself and what follows it are in its row.
        torch.testing.assert_close(word_attention(alone, tokens[:1, :3])[0][1], found[0][1])

    def test_maps_of_other_tokens(self) -> None:
        with pytest.raises(ValueError, match=r"\(1, 5\) tokens for \(1, 4\) tokens"):
            word_attention(looking_at_its_own_number(5), tokenize(["a dog"], 12)[0])

    def test_a_model_in_which_nothing_crosses(self) -> None:
        with pytest.raises(ValueError, match="no maps of cross-attention"):
            word_attention(random_maps(1, H, 4, 4), tokenize(["a dog"], 12)[0])


class TestDescriptions:
    def test_shares_of_each_patch(self) -> None:
        model = classifier("descriptions")
        with torch.no_grad():
            maps = model.run((pictures(),), need_weights=True).attention
        crossing = [attention.weights for attention in maps if attention.cross]
        assert len(crossing) == CONFIG.fusion_layers
        found = description_attention(maps)
        assert found.shape == (B, C, 4)
        torch.testing.assert_close(found.sum(1), torch.ones(B, 4))
        for b, c, patch in torch.cartesian_prod(torch.arange(B), torch.arange(C), torch.arange(4)).tolist():
            looks = [float(w[b, head, patch, c]) for w in crossing for head in range(CONFIG.num_heads)]
            assert float(found[b, c, patch]) == pytest.approx(sum(looks) / len(looks), abs=1e-6)


class TestPatchSimilarity:
    def test_is_the_cosine_in_the_shared_space(self) -> None:
        model = classifier("image")
        classes = model.class_features()
        assert classes is not None
        found = patch_similarity(model, pictures(), classes)
        assert found.shape == (B, C, 4)
        backbone = model.backbone
        features = backbone.image_features(pictures()).features
        for b, c, patch in torch.cartesian_prod(torch.arange(B), torch.arange(C), torch.arange(4)).tolist():
            projected = backbone.image_projection.weight @ features[b, patch]
            cosine = F.cosine_similarity(projected, classes.embedding[c], dim=0).detach()
            torch.testing.assert_close(found[b, c, patch], cosine)

    def test_of_a_picture_of_one_patch_it_is_the_zero_shot_head(self) -> None:
        model = classifier("image", img_size=4)
        classes = model.class_features()
        assert classes is not None
        with torch.no_grad():
            found = model.classify(pictures(4)).zero_shot_logits
        assert found is not None
        cosine = found / model.backbone.scale
        torch.testing.assert_close(patch_similarity(model, pictures(4), classes)[..., 0], cosine)

    def test_leaves_the_model_as_it_was(self) -> None:
        model = classifier("image")
        classes = model.class_features()
        assert classes is not None
        evaluated = patch_similarity(model, pictures(), classes)
        model.train()
        trained = patch_similarity(model, pictures(), classes)
        assert model.training
        assert not trained.requires_grad
        torch.testing.assert_close(trained, evaluated)

    def test_of_any_texts_with_any_head(self) -> None:
        torch.manual_seed(0)
        model = Captioner(CONFIG).eval()
        texts = model.backbone.text_features(*tokenize(["a dog", "a cat", "snow"], 12))
        found = patch_similarity(model, pictures(), texts)
        assert found.shape == (B, 3, 4)
        assert (found.abs() <= 1 + 1e-6).all()
