"""COCO's metrics are pycocoevalcap's, the normalising is its tokenizer's, and the baselines are what they say."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from diffmoe.config import UserError
from diffmoe.evaluation import captions
from diffmoe.evaluation.captions import (
    caption_metrics,
    missing_metrics,
    normalize_captions,
)

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="Java is not installed")

CANDIDATES = ["a dog runs on the grass", "two men play", "", "a red car ."]
REFERENCES = [
    ["a brown dog runs over green grass", "the dog is running on the grass"],
    ["two men play chess in a park"],
    ["a bird on a branch", "a small bird"],
    ["a red car parked by a house", "red car", "a car ."],
]


@pytest.fixture
def no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions.shutil, "which", lambda name: None)


@pytest.mark.usefixtures("no_java")
def test_equal_to_pycocoevalcaps_scorers_on_the_same_strings(capsys: pytest.CaptureFixture[str]) -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    metrics = caption_metrics(CANDIDATES, REFERENCES)
    assert capsys.readouterr().out == ""
    wanted, written = dict(enumerate(REFERENCES)), {n: [text] for n, text in enumerate(CANDIDATES)}
    assert [metrics[f"bleu{n}"] for n in (1, 2, 3, 4)] == Bleu(4).compute_score(wanted, written, verbose=0)[0]
    assert metrics["rouge_l"] == Rouge().compute_score(wanted, written)[0]
    assert metrics["cider"] == Cider().compute_score(wanted, written)[0]
    assert metrics.keys() == {"bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "cider"}


@pytest.mark.usefixtures("no_java")
def test_bleu_by_hand() -> None:
    # 3 of 4 words are in the reference: precision 3/4; 4 words to 5: brevity exp(1 - 5/4).
    metrics = caption_metrics(["a dog runs home"], [["a dog runs very fast"]])
    assert metrics["bleu1"] == pytest.approx(3 / 4 * math.exp(1 - 5 / 4), rel=1e-6)
    assert metrics["bleu2"] == pytest.approx(math.sqrt(3 / 4 * 2 / 3) * math.exp(1 - 5 / 4), rel=1e-6)


@pytest.mark.usefixtures("no_java")
def test_a_caption_that_is_its_reference_has_full_marks() -> None:
    texts = ["a dog runs on the grass", "two men play chess", "a red car by a house", "a bird sits on a branch"]
    metrics = caption_metrics(texts, [[text] for text in texts])
    assert metrics.pop("cider") == pytest.approx(10)
    assert list(metrics.values()) == pytest.approx([1.0] * 5, rel=1e-6)


@needs_java
def test_meteor_equals_pycocoevalcaps_and_its_process_ends() -> None:
    from pycocoevalcap.meteor.meteor import Meteor

    written = [text or "." for text in CANDIDATES]
    scorer = Meteor()
    expected, _ = scorer.compute_score(dict(enumerate(REFERENCES)), {n: [text] for n, text in enumerate(written)})
    for pipe in filter(None, (scorer.meteor_p.stdout, scorer.meteor_p.stderr)):
        pipe.close()
    assert caption_metrics(CANDIDATES, REFERENCES)["meteor"] == expected
    assert 0 < expected < 1
    assert missing_metrics() == {}


@pytest.mark.usefixtures("no_java")
def test_what_cannot_be_computed_is_named() -> None:
    assert missing_metrics() == {"meteor": "it needs Java"}


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'diff-moe\[caption\]'"):
        caption_metrics(["a"], [["a"]])


@pytest.mark.parametrize(
    ("candidates", "references", "message"),
    [
        (["a"], [["a"], ["b"]], "1 candidates for 2 lists"),
        ([], [], "0 candidates"),
        (["a", "b"], [["a"], []], "picture 1 has no references"),
    ],
)
def test_lists_that_do_not_fit(candidates: list[str], references: list[list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        caption_metrics(candidates, references)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A man's dog doesn't run , it walks .", "a man 's dog does n't run it walks"),
        ("he's here; she'll go -- now...", "he 's here she 'll go now"),
        ('T-shirt & jeans (blue) "quoted" 3.5 miles', "t-shirt & jeans -lrb- blue -rrb- quoted 3.5 miles"),
        ("We cannot see Mr. Smith in Washington D.C.", "we can not see mr. smith in washington d.c."),
        ("a Slip 'n' Slide, 20-year-old's", "a slip 'n' slide 20-year-old 's"),
        ("", ""),
    ],
)
def test_normalised_as_stanfords_tokenizer_does(text: str, expected: str) -> None:
    assert normalize_captions([text]) == [expected]


def stanford(texts: list[str]) -> list[str]:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokens = PTBTokenizer().tokenize({number: [{"caption": text}] for number, text in enumerate(texts)})
    return [tokens[number][0] for number in range(len(texts))]


@needs_java
@pytest.mark.data
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_normalised_as_stanfords_tokenizer_does_on_flickr8k(data_dir: Path) -> None:
    table = pq.read_table(data_dir / "flickr8k", columns=[f"caption_{number}" for number in range(5)])
    texts = [text for column in table.columns for text in column.to_pylist()]
    pairs = zip(stanford(texts), normalize_captions(texts), strict=True)
    assert [pair for pair in pairs if pair[0] != pair[1]] == []
