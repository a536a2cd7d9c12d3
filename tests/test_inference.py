"""A trained model in use: what it says of paths and PIL pictures, of one or many, and what it refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffmoe import Predictor, visualization
from diffmoe.config import GenerationConfig, UserError
from diffmoe.config.recipes import generation_config
from diffmoe.data import pictures as data_pictures
from diffmoe.data.text import detokenize, tokenize
from diffmoe.evaluation.views import views
from diffmoe.model.captioner import Captioner
from diffmoe.model.heads import ImageClassifier
from diffmoe.storage.model_files import load_model_file, save_model
from diffmoe.tasks.captioning import Captioning


@pytest.fixture(scope="module")
def classifier(trained: Any) -> Predictor:
    return Predictor(trained.model, device="cpu")


@pytest.fixture
def small(drawn: list[Path]) -> list[Path]:
    """Without the one that is so large that its file is decoded at a half of its size."""
    return [path for path in drawn if path.name != "big.jpg"]


@pytest.fixture(scope="module")
def captioner(captioned: Any) -> Predictor:
    return Predictor(captioned.model, device="cpu")


def opened(paths: list[Path]) -> list[Image.Image]:
    pictures: list[Image.Image] = [Image.open(path) for path in paths]
    for picture in pictures:
        picture.load()
    return pictures


def images_of(rows: list[dict[str, Any]]) -> list[str | None]:
    return [row["image"] for row in rows]


ASKED = {
    "classify": lambda p, pictures: p.classify(pictures, top=3),
    "zero_shot": lambda p, pictures: p.zero_shot(pictures, ["one", "two"]),
    "compare": lambda p, pictures: p.compare(pictures, "the number one", top=2),
}


class TestRows:
    """A row belongs to a picture, in their order, and says its path."""

    @pytest.mark.parametrize("ask", ASKED.values(), ids=ASKED.keys())
    def test_of_paths_and_of_pictures_say_the_same(self, classifier: Predictor, small: list[Path], ask: Any) -> None:
        by_path, by_name = ask(classifier, small), ask(classifier, [str(path) for path in small])
        by_picture = ask(classifier, opened(small))
        assert by_path == by_name
        assert images_of(by_path) == [str(path) for path in small]
        assert images_of(by_picture) == [None] * len(small)
        for row, other in zip(by_path, by_picture, strict=True):
            assert {**row, "image": None} == other

    def test_home_in_a_pictures_name(
        self, classifier: Predictor, small: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", str(small[0].parent))
        (row,) = classifier.classify(f"~/{small[0].name}")
        assert row == {**classifier.classify(small[0])[0], "image": f"~/{small[0].name}"}

    @pytest.mark.parametrize("ask", ASKED.values(), ids=ASKED.keys())
    def test_of_one_picture_is_a_list_of_one(self, classifier: Predictor, small: list[Path], ask: Any) -> None:
        (expected,) = ask(classifier, [small[1]])
        assert ask(classifier, small[1]) == ask(classifier, str(small[1])) == [expected]
        assert ask(classifier, Image.open(small[1])) == [{**expected, "image": None}]

    def test_a_picture_is_left_as_it_was(self, classifier: Predictor) -> None:
        picture = Image.new("RGBA", (9, 7), (10, 20, 30, 40))
        before = (picture.mode, picture.size, picture.tobytes())
        classifier.classify(picture)
        assert (picture.mode, picture.size, picture.tobytes()) == before

    def test_pixels_of_the_models_size_are_taken_as_they_are(self, classifier: Predictor, small: list[Path]) -> None:
        pixels = classifier.read(small)
        assert isinstance(pixels, torch.Tensor)
        assert (pixels.shape, pixels.dtype) == ((len(small), 1, 8, 8), torch.uint8)
        assert classifier.classify(pixels) == classifier.classify(opened(small))

    def test_more_than_one_batch_of_them(
        self, classifier: Predictor, drawn: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole, embedded = classifier.probabilities(drawn), classifier.embed_texts(["a", "b c", "d"])
        monkeypatch.setattr(data_pictures, "EVALUATION_VALUES", 2 * 8 * 8)
        assert classifier.picture.evaluation_batch == 2
        torch.testing.assert_close(classifier.probabilities(drawn), whole, rtol=0, atol=1e-6)
        torch.testing.assert_close(classifier.embed_texts(["a", "b c", "d"]), embedded, rtol=0, atol=1e-6)


class TestClassify:
    def test_says_the_most_probable_classes(self, classifier: Predictor, drawn: list[Path]) -> None:
        assert isinstance(classifier.model, ImageClassifier)
        images = classifier.prepare(torch.stack([classifier.picture.read(path) for path in drawn]))
        with torch.no_grad():
            expected = (classifier.model(images)["logits"] / classifier.temperature).softmax(-1)
        torch.testing.assert_close(classifier.probabilities(drawn), expected, rtol=0, atol=1e-6)
        for row, probabilities in zip(classifier.classify(drawn, top=99), expected, strict=True):
            said = {found["class"]: found["probability"] for found in row["predictions"]}
            assert list(said) == [str(digit) for digit in probabilities.argsort(descending=True).tolist()]
            assert sum(said.values()) == pytest.approx(1, abs=1e-5)
        assert [len(row["predictions"]) for row in classifier.classify(drawn)] == [5] * len(drawn)

    def test_is_as_sure_as_the_temperature_of_the_file_lets_it(
        self, classifier: Predictor, drawn: list[Path], tmp_path: Path
    ) -> None:
        save_model(tmp_path / "m.pth", classifier.model, classifier.info, temperature=3.0)
        unsure = Predictor(tmp_path / "m.pth", "cpu")
        assert unsure.temperature == 3
        raw = classifier.temperature * classifier.probabilities(drawn).double().log()
        torch.testing.assert_close(unsure.probabilities(drawn).double(), (raw / 3).softmax(-1), rtol=0, atol=1e-6)

    @pytest.mark.parametrize(("tta", "count"), [("flip", 2), ("flip_shift", 6)])
    def test_is_the_mean_over_the_views(self, classifier: Predictor, small: list[Path], tta: str, count: int) -> None:
        images = classifier.prepare(torch.stack([classifier.picture.read(path) for path in small]))
        seen = list(views(images, tta))
        assert len(seen) == count
        with torch.no_grad():
            expected = torch.stack(
                [(classifier.model(view)["logits"] / classifier.temperature).softmax(-1) for view in seen]
            ).mean(0)
        found = classifier.probabilities(small, tta=tta)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        assert not torch.allclose(found, classifier.probabilities(small), rtol=0, atol=1e-6)
        row, *_ = classifier.classify(small, top=1, tta=tta)
        assert row["predictions"][0]["probability"] == pytest.approx(float(found[0].max()))

    def test_of_unknown_views_is_one_line(self, classifier: Predictor, drawn: list[Path]) -> None:
        with pytest.raises(UserError, match="tta is 'many': it must be one of none, flip, flip_shift"):
            classifier.classify(drawn, tta="many")

    def test_of_a_captioner_is_one_line(self, captioner: Predictor, drawn: list[Path]) -> None:
        assert not captioner.has_classes
        with pytest.raises(UserError, match="this model has no classes"):
            captioner.classify(drawn)


class TestTexts:
    @pytest.mark.parametrize("of", ["classifier", "captioner"])
    def test_embeddings_are_of_unit_norm_and_the_towers_own(
        self, of: str, drawn: list[Path], request: pytest.FixtureRequest
    ) -> None:
        used: Predictor = request.getfixturevalue(of)
        texts = ["a red circle", "the number three"]
        images, of_texts = used.embed_images(drawn), used.embed_texts(texts)
        tokens, mask = tokenize(texts, used.model.config.max_text_len)
        with torch.no_grad():
            expected = used.backbone.encode_text(tokens, mask)
            pixels = used.prepare(torch.stack([used.picture.read(path) for path in drawn]))
            torch.testing.assert_close(images, used.backbone.encode_image(pixels), rtol=0, atol=1e-6)
        torch.testing.assert_close(of_texts, expected, rtol=0, atol=1e-6)
        for embeddings, count in ((images, len(drawn)), (of_texts, 2)):
            assert (embeddings.shape, embeddings.dtype) == ((count, 16), torch.float32)
            torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(count))
            embeddings += 1  # a tensor like any other: it may be changed
        assert torch.equal(used.embed_texts(texts[0]), used.embed_texts([texts[0]]))

    def test_zero_shot_averages_the_sentences_of_a_label(self, classifier: Predictor, drawn: list[Path]) -> None:
        sentences = classifier.embed_texts(["one", "a one", "two", "a two"]).view(2, 2, -1)
        labels = torch.nn.functional.normalize(sentences.mean(1), dim=-1)
        logits = classifier.backbone.scale.detach() * classifier.embed_images(drawn) @ labels.T
        found = classifier.label_probabilities(drawn, ["one", "two"], ["{}", "a {}"])
        torch.testing.assert_close(found, logits.softmax(-1), rtol=0, atol=1e-5)
        rows = classifier.zero_shot(drawn, ["one", "two", "one"], ["{}", "a {}"])
        for row, expected in zip(rows, found, strict=True):
            said = {label["class"]: label["probability"] for label in row["predictions"]}
            assert said == pytest.approx({"one": float(expected[0]), "two": float(expected[1])}, abs=1e-6)
            assert list(said.values()) == sorted(said.values(), reverse=True)

    def test_compare_weighs_a_text_with_the_picture(self, classifier: Predictor, drawn: list[Path]) -> None:
        rows = classifier.compare(drawn, "the number one", top=10)
        cosines = classifier.embed_images(drawn) @ classifier.embed_texts("the number one")[0]
        assert [row["similarity"] for row in rows] == pytest.approx(cosines.tolist(), abs=1e-6)
        assert classifier.classes is not None
        classes = classifier.classes.embedding
        given_text = (classifier.backbone.scale * classes @ classifier.embed_texts("the number one")[0]).softmax(-1)
        both = classifier.probabilities(drawn) * given_text.detach()
        for row, expected in zip(rows, both / both.sum(1, keepdim=True), strict=True):
            said = {found["class"]: found["probability"] for found in row["with_text"]}
            assert [said[str(digit)] for digit in range(10)] == pytest.approx(expected.tolist(), abs=1e-5)

    def test_a_model_that_read_no_descriptions_compares_nothing(
        self, classifier: Predictor, drawn: list[Path], tmp_path: Path
    ) -> None:
        save_model(tmp_path / "model.pth", ImageClassifier(classifier.model.config), classifier.info)
        used = Predictor(tmp_path / "model.pth", "cpu")
        assert not used.reads_texts
        assert len(used.classify(drawn)) == len(drawn)
        for ask in (lambda: used.embed_texts(["a"]), lambda: used.zero_shot(drawn, ["a", "b"])):
            with pytest.raises(UserError, match="trained without class descriptions"):
                ask()

    @pytest.mark.parametrize(
        ("labels", "templates", "says"),
        [
            (["cat"], ["{}"], r"labels are cat: there must be at least 2 different ones"),
            (["cat", "cat"], ["{}"], "at least 2 different ones"),
            ("cat", ["{}"], r"labels are cat: there must be at least 2"),
            (["cat", "dog"], ["a photo"], r"template is 'a photo': it must contain {}"),
        ],
    )
    def test_labels_that_tell_nothing_apart(
        self, classifier: Predictor, drawn: list[Path], labels: Any, templates: list[str], says: str
    ) -> None:
        with pytest.raises(UserError, match=says):
            classifier.zero_shot(drawn, labels, templates)


class TestCaption:
    def test_is_what_the_model_writes(self, captioner: Predictor, captioned: Any) -> None:
        paths = captioned.pictures[:3]
        rows = captioner.caption(paths, decoding="greedy")
        assert images_of(rows) == [str(path) for path in paths]
        assert isinstance(captioner.model, Captioner)
        images = captioner.prepare(torch.stack([captioner.picture.read(path) for path in paths]))
        expected = detokenize(captioner.model.generate(images, decoding="greedy"))
        assert [row["caption"] for row in rows] == expected
        assert [row["caption"] for row in captioner.caption(opened(paths), decoding="greedy")] == expected
        assert captioner.caption(str(paths[0]), decoding="greedy") == rows[:1]

    def test_of_a_set_of_ones_own_is_written_as_one_of_no_recipe(
        self, captioned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It may be called as the built-in one, whose captions are written otherwise."""
        loaded, configs = load_model_file(captioned.model), []
        monkeypatch.setattr(Captioning, "caption", lambda *args: configs.append(args[3]) or [""])
        for own in (True, False):
            info = dataclasses.replace(loaded.data, dataset="shapes", own=own)
            save_model(tmp_path / "shapes_model.pth", loaded.model, info)
            Predictor(tmp_path / "shapes_model.pth", device="cpu").caption(captioned.pictures[0])
        assert configs == [GenerationConfig(), generation_config("shapes")]
        assert configs[0] != configs[1]

    def test_fields_win_over_a_config(self, captioner: Predictor, captioned: Any) -> None:
        paths, config = captioned.pictures[:2], GenerationConfig(decoding="greedy")
        varied = captioner.caption(paths, config, no_repeat_ngram=1)
        assert varied == captioner.caption(paths, dataclasses.replace(config, no_repeat_ngram=1))
        assert varied != captioner.caption(paths, config)

    def test_samples_go_by_the_seed_and_not_by_the_batch(self, captioner: Predictor, captioned: Any) -> None:
        paths = captioned.pictures[:4]
        first, again, other = (captioner.caption(paths, seed=seed, decoding="sample") for seed in (1, 1, 50))
        assert first == again
        assert first != other
        assert captioner.caption(paths[2], seed=3, decoding="sample") == first[2:3]  # the third of seed 1

    def test_compare_says_how_likely_a_caption_is(self, captioner: Predictor, captioned: Any) -> None:
        text = "a red circle"
        rows = captioner.compare(captioned.pictures[:2], text)
        assert isinstance(captioner.model, Captioner)
        tokens, mask = tokenize([text], 24)
        for path, row in zip(captioned.pictures, rows, strict=False):
            image = captioner.prepare(captioner.picture.read(path)[None])
            with torch.no_grad():
                logits = captioner.model(image, tokens, mask)["logits"][0, :-1].log_softmax(-1)
            columns = [captioner.model.output_tokens.tolist().index(token) for token in tokens[0, 1:].tolist()]
            expected = logits[torch.arange(len(columns)), columns].mean()
            assert row.keys() == {"image", "similarity", "log_probability"}
            assert row["log_probability"] == pytest.approx(float(expected), abs=1e-5)

    def test_compare_names_the_words_that_cannot_be_written(self, captioner: Predictor, captioned: Any) -> None:
        rows = captioner.compare(captioned.pictures[:2], "a red zeppelin")
        assert [(row["log_probability"], row["cannot_write"]) for row in rows] == [(None, ["zeppelin"])] * 2

    def test_of_a_classifier_is_one_line(self, classifier: Predictor, drawn: list[Path]) -> None:
        with pytest.raises(UserError, match="this model tells classes apart"):
            classifier.caption(drawn)


class TestInside:
    @pytest.mark.parametrize("of", ["classifier", "captioner"])
    def test_routing_and_attention_are_the_image_towers(
        self, of: str, drawn: list[Path], request: pytest.FixtureRequest
    ) -> None:
        used: Predictor = request.getfixturevalue(of)
        config = used.model.config
        for asked, count in ((drawn, len(drawn)), (drawn[0], 1), (Image.open(drawn[0]), 1)):
            (block,), (attention,) = used.routing(asked), used.attention(asked)
            assert (block.place, block.layer, block.num_experts) == ("image", 0, config.num_general_experts)
            assert block.expert_ids.shape == (count, config.num_patches, config.top_k)
            torch.testing.assert_close(block.gates.sum(-1), torch.ones(count, config.num_patches))
            shape = (count, config.num_heads, config.num_patches, config.num_patches)
            assert (attention.place, attention.layer, attention.weights.shape) == ("image", 0, shape)
            torch.testing.assert_close(attention.weights.sum(-1), torch.ones(shape[:-1]))

    def test_are_what_the_figures_take(self, classifier: Predictor, drawn: list[Path]) -> None:
        (picture,) = classifier.read(drawn[0])
        routed = visualization.routing_map(picture, classifier.routing(drawn[0]))
        looked = visualization.attention_maps(picture, classifier.attention(drawn[0]))
        assert routed.axes
        assert looked.axes

    def test_a_dense_model_routes_nothing(self, classifier: Predictor, drawn: list[Path], tmp_path: Path) -> None:
        dense = dataclasses.replace(classifier.model.config, dense=True)
        save_model(tmp_path / "dense.pth", classifier.model.like(dense), classifier.info)
        used = Predictor(tmp_path / "dense.pth", "cpu")
        assert used.routing(drawn) == ()
        assert len(used.attention(drawn)) == 1


class TestRefusal:
    @pytest.mark.parametrize("bad", ["missing.png", "corrupt.png", "half.jpg", "."])
    def test_a_bad_picture_among_good_ones_is_named(
        self, classifier: Predictor, captioner: Predictor, drawn: list[Path], bad: str
    ) -> None:
        pictures = [drawn[0], drawn[0].parent / bad, drawn[1]]
        for ask in (classifier.classify, classifier.embed_images, classifier.routing, captioner.caption):
            with pytest.raises(UserError) as caught:
                ask(pictures)
            assert str(caught.value).startswith(str(pictures[1]))
            assert "\n" not in str(caught.value)

    def test_nothing_to_look_at(self, classifier: Predictor) -> None:
        for ask in (classifier.classify, classifier.embed_images, classifier.routing, classifier.attention):
            with pytest.raises(UserError, match="there are no pictures: there must be at least 1"):
                ask([])
        with pytest.raises(UserError, match="there are no texts: there must be at least 1"):
            classifier.embed_texts([])

    def test_a_model_file_or_a_device_that_is_not_there(
        self, trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(UserError, match=r"missing\.pth does not exist"):
            Predictor(tmp_path / "missing.pth")
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        with pytest.raises(UserError, match="device is 'mps'"):
            Predictor(trained.model, device="mps")


def test_it_knows_its_file_its_data_and_its_pictures(classifier: Predictor, trained: Any) -> None:
    assert classifier.checkpoint == str(trained.model)
    assert (classifier.info.dataset, classifier.info.class_names) == ("digits", tuple("0123456789"))
    assert (classifier.picture.size, classifier.picture.channels) == (8, 1)
    assert classifier.has_classes
    assert classifier.reads_texts
    assert not classifier.model.training
