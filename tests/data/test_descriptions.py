"""Every class is described equally often, by sentences that fit and are no other class's."""

from itertools import chain

import pytest

from diffmoe.data.descriptions import TEMPLATES, class_descriptions, described_sets
from diffmoe.data.text import tokenize

SETS = described_sets()


@pytest.mark.parametrize("dataset", SETS)
def test_sentences_are_many_distinct_and_fit(dataset: str) -> None:
    described = class_descriptions(dataset, list(SETS[dataset]))
    assert described == list(SETS[dataset].values())
    assert len(described) == 10
    assert len({len(sentences) for sentences in described}) == 1
    assert len(described[0]) >= 5
    everything = list(chain.from_iterable(described))
    assert len({sentence.lower() for sentence in everything}) == len(everything)
    assert tokenize(everything, 77)[0].shape[1] <= 32
    assert all(sentence.isascii() and sentence.endswith(".") for sentence in everything)


def test_names_are_found_however_they_are_written_and_ordered() -> None:
    described = class_descriptions("zalando-datasets/fashion_mnist", ["ankle_boot", "T-shirt/top"])
    assert described == [SETS["fashion_mnist"]["Ankle boot"], SETS["fashion_mnist"]["T - shirt / top"]]


def test_other_sets_and_other_classes_get_the_templates() -> None:
    for dataset in ("/home/me/pets", "cifar10"):
        truck, owl = class_descriptions(dataset, ["fire_truck", "Owl"])
        assert truck[0] == "a photo of a fire truck."
        assert owl[0] == "a photo of an Owl."
        assert "an Owl in the middle of the picture." in owl
        assert len(set(truck)) == len(set(owl)) == len(TEMPLATES) >= 5
