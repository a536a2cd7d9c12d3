"""The tokenizer gives CLIP's ids, for any text at all."""

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffmoe.config import END_ID, START_ID, VOCAB_SIZE
from diffmoe.data.text import detokenize, tokenize

HARD = [
    "",
    "a photo of a cat",
    "It's the DOG's bone; they'll've said I'M don't 'S",
    "naïve café — “curly quotes” … and mojibake: â€œ",
    "🐶🐱 emoji 👩‍👩‍👧 🇫🇷",
    "中文字符测试，没有空格",
    "عربى हिन्दी ไทย 한국어 日本語",
    "\x00\x01\x1b[31m\x7f control\x0bcharacters",
    "&lt;b&gt; &amp;amp; &eacute; html",
    "ﬁ ligature ſ 'ſ İstanbul ß",
    "1234 5.6e7 ½ ² ⅷ",
    "<|endoftext|> <|startoftext|> <start>",
    "   lots   of\t\nspace\u00a0\u3000 ",
    "a\u0301 combining, \ufeffbom, zero\u200bwidth",
    "!!!???...,,,---",
    "</w> hi</w>",
    "x" * 300,
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
]


@pytest.fixture(scope="module")
def clip() -> Any:
    """open_clip's own tokenizer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of open_clip's and timm's imports
        from open_clip.tokenizer import SimpleTokenizer
    return SimpleTokenizer()


@pytest.mark.parametrize("text", HARD)
def test_ids_and_decoded_text_are_clips(clip: Any, text: str) -> None:
    input_ids, attention_mask = tokenize([text], 400)
    expected = [START_ID, *clip.encode(text), END_ID]
    assert input_ids[0].tolist() == expected
    assert attention_mask[0].tolist() == [1] * len(expected)
    assert detokenize(input_ids) == [clip.decode(expected[1:-1]).strip()]


@pytest.mark.parametrize("max_len", [3, 8, 77])
def test_a_batch_is_clips_cut_and_padded(clip: Any, max_len: int) -> None:
    input_ids, attention_mask = tokenize(HARD, max_len)
    expected = clip(HARD, context_length=max_len)
    assert torch.equal(input_ids, expected[:, : input_ids.shape[1]])
    lengths = (expected == END_ID).int().argmax(1) + 1
    assert torch.equal(attention_mask.sum(1), lengths)
    assert input_ids.shape[1] == lengths.max() <= max_len


@given(texts=st.lists(st.text(max_size=60), max_size=5), max_len=st.integers(3, 40))
def test_any_text_has_its_two_ends(texts: list[str], max_len: int) -> None:
    input_ids, attention_mask = tokenize(texts, max_len)
    assert input_ids.dtype == attention_mask.dtype == torch.int64
    assert input_ids.shape == attention_mask.shape
    assert input_ids.shape[0] == len(texts)
    assert input_ids.shape[1] <= max_len
    for ids, mask in zip(input_ids, attention_mask, strict=True):
        length = int(mask.sum())
        assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
        assert ids[0] == START_ID
        assert ids[length - 1] == END_ID
        assert ((ids[1 : length - 1] >= 0) & (ids[1 : length - 1] < START_ID)).all()


@pytest.mark.parametrize("text", ["<start_of_text> a <end_of_text>", "<END_OF_TEXT>"])
def test_text_that_spells_a_special_token_is_text(text: str) -> None:
    input_ids, _ = tokenize([text], 50)
    assert (input_ids >= START_ID).sum() == 2
    assert detokenize(input_ids)[0].replace(" ", "") == text.lower().replace(" ", "")


def test_very_long_text_is_cut() -> None:
    input_ids, attention_mask = tokenize(["x" * 10_000, "word " * 2_000, "short"], 32)
    assert input_ids.shape == (3, 32)
    assert attention_mask.sum(1).tolist() == [32, 32, 3]


def test_no_texts_and_no_room() -> None:
    assert tokenize([], 8)[0].shape[0] == 0
    with pytest.raises(ValueError, match="max_len is 2: it must be at least 3"):
        tokenize(["a"], 2)


def test_vocabulary_size() -> None:
    from diffmoe.data.text import _tokenizer

    assert _tokenizer().get_vocab_size() == VOCAB_SIZE == END_ID + 1
