"""How good written captions are: COCO's metrics, through pycocoevalcap (the extra `caption`)."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import re
import shutil
import threading
from collections.abc import Iterable, Sequence

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
