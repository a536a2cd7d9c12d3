"""How good written captions are: COCO's metrics, through pycocoevalcap (the extra `caption`), and simple baselines."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import re
import shutil
import threading
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from diffmoe.config import UserError

log = logging.getLogger(__name__)

METEOR_SECONDS = 300
"""After so long METEOR's Java process is given up."""
PUNCTUATION = ("''", "'", "``", "`", '"', ".", "?", "!", ",", ":", "-", "--", "...", ";")
"""What COCO's evaluation leaves out (pycocoevalcap, `ptbtokenizer.py`), with the quote that it writes as two."""
_TOKEN = re.compile(
    r"\w+(?=n't\b)|n't\b|'(?:s|re|ve|ll|d|m)\b|'n'|can(?=not\b)"  # do n't, dog 's, rock 'n' roll, can not
    r"|(?:[a-z]\.)+(?!\w)|(?:mr|mrs|ms|dr|jr|sr|st)\.|\w+\.(?:com|org|net)\b"  # d.c., mr., a.com
    r"|\d[\d.,:/]*\d(?![\w-])|\w+(?:(?:[-/]|'(?!(?:s|re|ve|ll|d|m)\b))\w+)*|\.\.\.|--|\S"
)
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
"""As Stanford's tokenizer writes them; in lower case COCO's evaluation keeps them."""


def caption_metrics(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """COCO's metrics of one candidate a picture against its references, of the strings exactly as they are.

    bleu1 to bleu4, rouge_l, and meteor where Java is there, from 0 to 1; cider (CIDEr-D) from 0 to 10. Words are what
    is between spaces: `normalize_captions` first, to compare with published figures.
    Raises `ValueError` where there are no candidates, other than references, or a picture without references;
    `UserError` where pycocoevalcap is not installed.
    """
    if len(candidates) != len(references) or not candidates:
        raise ValueError(f"{len(candidates)} candidates for {len(references)} lists of references")
    if empty := [number for number, texts in enumerate(references) if not texts]:
        raise ValueError(f"picture {empty[0]} has no references")
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise UserError("captions cannot be scored without pycocoevalcap: pip install 'diff-moe[caption]'")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    wanted = {number: list(texts) for number, texts in enumerate(references)}
    written = {number: [text] for number, text in enumerate(candidates)}
    with contextlib.redirect_stdout(io.StringIO()):  # the scorers print
        bleu, _ = Bleu(4).compute_score(wanted, written, verbose=0)
        rouge, _ = Rouge().compute_score(wanted, written)
        cider, _ = Cider().compute_score(wanted, written)
    metrics = {f"bleu{n}": float(score) for n, score in enumerate(bleu, 1)}
    metrics |= {"rouge_l": float(rouge), "cider": float(cider)}
    if "meteor" not in missing_metrics():
        metrics["meteor"] = _meteor(wanted, written)
    return metrics


def missing_metrics() -> dict[str, str]:
    """The metrics that cannot be computed here, and why."""
    return {} if shutil.which("java") else {"meteor": "it needs Java"}


def _meteor(wanted: dict[int, list[str]], written: dict[int, list[str]]) -> float:
    from pycocoevalcap.meteor.meteor import Meteor

    def on_one_line(texts: list[str]) -> list[str]:  # its protocol has a line a caption, and fails on an empty one
        return [" ".join(text.split()) or "." for text in texts]

    scorer = Meteor()
    alarm = threading.Timer(METEOR_SECONDS, scorer.meteor_p.kill)
    alarm.start()
    try:
        score, _ = scorer.compute_score(
            {number: on_one_line(texts) for number, texts in wanted.items()},
            {number: on_one_line(texts) for number, texts in written.items()},
        )
    finally:
        alarm.cancel()
        for pipe in filter(None, (scorer.meteor_p.stdout, scorer.meteor_p.stderr)):
            pipe.close()
    return float(score)


def normalize_captions(texts: Iterable[str]) -> list[str]:
    """Lower case, words apart, no punctuation: as COCO's evaluation with Stanford's tokenizer, but without Java."""
    return [
        " ".join(_BRACKETS.get(token) or token for token in _TOKEN.findall(text.lower()) if token not in PUNCTUATION)
        for text in texts
    ]


def constant_caption(captions: Sequence[Sequence[str]], max_words: int = 10) -> str:
    """The baseline that sees no picture: one caption of `max_words` words or fewer for all pictures.

    Of all training captions, the one whose words are the most common on average, each word of it counted once.
    """
    texts = [text.split() for of_picture in captions for text in normalize_captions(of_picture)]
    frequency = Counter(word for words in texts for word in set(words))

    def commonness(words: Sequence[str]) -> float:
        return sum(frequency[word] for word in set(words)) / len(words)

    candidates = [words for words in texts if max_words // 2 < len(words) <= max_words] or texts
    return " ".join(max(candidates, key=commonness))


def nearest_pictures(images: Tensor, gallery: Tensor, size: int = 8, chunk: int = 256) -> Tensor:
    """The baseline that compares pixels: for each picture (I, C, H, W) the nearest of a gallery (G, C, H, W), (I,).

    By the Euclidean distance of the pictures shrunk to `size` x `size`, their mean taken away and of unit norm.
    """
    vectors = []
    for pictures in (images, gallery):
        small = torch.cat(
            [torch.nn.functional.interpolate(part.float(), size=size, mode="area") for part in pictures.split(chunk)]
        ).flatten(1)
        vectors.append(torch.nn.functional.normalize(small - small.mean(1, keepdim=True), dim=1))
    return (vectors[0] @ vectors[1].T).argmax(1)
