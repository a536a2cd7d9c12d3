"""CLIP's byte-pair tokenizer: the same ids as OpenAI's, through the `tokenizers` library.

The vocabulary is the file that the open-clip-torch wheel ships; open_clip itself is not imported (it would take
seconds). B texts, T tokens.
"""

from __future__ import annotations

import functools
import gzip
import html
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffmoe.config import END_ID, START_ID, VOCAB_SIZE

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_MERGES = VOCAB_SIZE - 2 * 256 - 2
"""The file has more: CLIP leaves room for each byte, each byte at a word's end, and the two special tokens."""

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
"""What is a word before pairs are merged (Radford et al. 2021, `simple_tokenizer.py`)."""


def tokenize(texts: Sequence[str], max_len: int) -> tuple[Tensor, Tensor]:
    """Input ids and attention mask (1 = real token), both int64 (B, T), padded on the right with 0, as CLIP does.

    T <= max_len is the length of the longest text; one that is longer is cut, and keeps its start and end tokens.
    Text that spells a special token is text. Raises `ValueError` for `max_len` under 3: no room for a word.
    """
    if max_len < 3:
        raise ValueError(f"max_len is {max_len}: it must be at least 3, for the start, a token and the end")
    tokenizer = _tokenizer()
    # One by one: a batch would start threads, and warn when the data loader forks its workers.
    words = [tokenizer.encode(_clean(text)).ids[: max_len - 2] for text in texts]
    longest = max(map(len, words), default=0) + 2
    input_ids = torch.zeros(len(words), longest, dtype=torch.int64)
    attention_mask = torch.zeros(len(words), longest, dtype=torch.int64)
    for row, ids in enumerate(words):
        input_ids[row, : len(ids) + 2] = torch.tensor([START_ID, *ids, END_ID])
        attention_mask[row, : len(ids) + 2] = 1
    return input_ids, attention_mask


def detokenize(input_ids: Tensor | Iterable[Sequence[int]]) -> list[str]:
    """The text of each row of ids (B, T), up to its first end token; lower case, as the tokenizer made it."""
    rows = input_ids.tolist() if isinstance(input_ids, Tensor) else [list(row) for row in input_ids]
    ends = [row.index(END_ID) if END_ID in row else len(row) for row in rows]
    words = [[id for id in row[:end] if id != START_ID] for row, end in zip(rows, ends, strict=True)]
    return [_tokenizer().decode(ids, skip_special_tokens=False).strip() for ids in words]


def _clean(text: str) -> str:
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


@functools.cache
def _tokenizer() -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    merges = _read_merges()
    alphabet = _byte_characters()
    symbols = [*alphabet, *(f"{character}</w>" for character in alphabet), *map("".join, merges)]
    vocabulary = {symbol: id for id, symbol in enumerate([*symbols, "<start_of_text>", "<end_of_text>"])}
    assert len(vocabulary) == VOCAB_SIZE, f"{len(vocabulary)} tokens"
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " ")])
    return tokenizer


def _read_merges() -> list[tuple[str, str]]:
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the CLIP vocabulary is in the package open-clip-torch, which is not installed")
    with gzip.open(Path(spec.origin).with_name("bpe_simple_vocab_16e6.txt.gz"), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : _MERGES + 1]  # the first line is a version
    return [(left, right) for left, right in map(str.split, lines)]


def _byte_characters() -> list[str]:
    """GPT-2's printable stand-in for each byte, in the vocabulary's order: itself, or the next one after 255."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]
