"""The search for captions, on a toy language whose every caption can be listed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from diffmoe.config import MAX_SEED, GenerationConfig, UserError
from diffmoe.model.generation import Generated, check_generation, constrain, draw, search

END = 0
PLAIN = {"no_repeat_ngram": 0, "length_penalty": 0.0}


class Toy:
    """Log-probabilities that depend on the picture and on the whole prefix, and on nothing else."""

    def __init__(self, pictures: Sequence[int], per_picture: int = 1, columns: int = 4, end_bias: float = 0.0) -> None:
        self.pictures = [picture for picture in pictures for _ in range(per_picture)]
        self.per_picture, self.columns, self.end_bias = per_picture, columns, end_bias
        self.rows_asked: list[int] = []

    def next(self, picture: int, prefix: Sequence[int]) -> Tensor:
        key = picture + 1
        for column in prefix:
            key = key * 31 + column + 1
        logits = 2 * torch.randn(self.columns, generator=torch.Generator().manual_seed(key % 2**31))
        logits[END] += self.end_bias
        return logits.log_softmax(0)

    def step(self, columns: Tensor) -> Tensor:
        assert len(columns) == len(self.pictures)
        self.rows_asked.append(len(columns))
        pairs = zip(self.pictures, columns.tolist(), strict=True)
        return torch.stack([self.next(picture, prefix) for picture, prefix in pairs])

    def select(self, rows: Tensor) -> None:
        assert [self.pictures[row] for row in rows.tolist()] == self.pictures

    def keep(self, rows: Tensor, pictures: Tensor) -> None:
        kept = [self.pictures[:: self.per_picture][picture] for picture in pictures.tolist()]
        self.pictures = [self.pictures[row] for row in rows.tolist()]
        assert self.pictures == [picture for picture in kept for _ in range(self.per_picture)]

    def score(self, picture: int, caption: Sequence[int]) -> float:
        return sum(float(self.next(picture, caption[:t])[column]) for t, column in enumerate(caption))


def run(pictures: Sequence[int], max_tokens: int = 6, seed: int = 0, toy: dict[str, Any] | None = None, **fields: Any):
    config = GenerationConfig(**{"decoding": "greedy", **fields})
    toy_model = Toy(pictures, config.beams if config.decoding == "beam" else 1, **(toy or {}))
    return search(toy_model, len(pictures), END, max_tokens, config, seed), toy_model


def captions(found: Generated) -> list[list[int]]:
    return [[column for column in row if column >= 0] for row in found.tokens.tolist()]


def every_caption(max_tokens: int, columns: int = 4) -> Iterator[tuple[int, ...]]:
    words = [column for column in range(columns) if column != END]
    for length in range(max_tokens):
        for text in itertools.product(words, repeat=length):
            yield (*text, END)


DECODINGS = pytest.mark.parametrize("decoding", ["greedy", "beam", "sample"])


# --- What is found ---


@pytest.mark.parametrize("picture", range(5))
def test_greedy_takes_the_likeliest_each_time(picture: int) -> None:
    found, toy = run([picture], no_repeat_ngram=0)
    expected: list[int] = []
    while not expected or expected[-1] != END:
        expected.append(END if len(expected) == 5 else int(toy.next(picture, expected).argmax()))
    assert captions(found) == [expected]


@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0, 2.0])
def test_a_beam_as_wide_as_the_language_finds_the_best_caption(penalty: float) -> None:
    # 3 words and at most 4 before the end: 27 prefixes of the last word's length, 81 captions of it.
    found, toy = run(range(6), max_tokens=5, decoding="beam", beams=130, no_repeat_ngram=0, length_penalty=penalty)
    for picture, caption in enumerate(captions(found)):
        best = max(every_caption(5), key=lambda text: toy.score(picture, text) / len(text) ** penalty)
        assert caption == list(best)
        assert found.scores[picture].item() == pytest.approx(toy.score(picture, best) / len(best) ** penalty, rel=1e-5)


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_a_wider_beam_finds_better_captions_on_average(penalty: float) -> None:
    one, many = (
        run(range(100), decoding="beam", beams=beams, no_repeat_ngram=0, length_penalty=penalty)[0] for beams in (1, 8)
    )
    assert many.scores.mean() > one.scores.mean() + 0.04


@pytest.mark.parametrize("fields", [{}, PLAIN, {"min_caption_len": 3}, {"no_repeat_ngram": 1, "length_penalty": 2.0}])
def test_one_beam_is_greedy(fields: dict[str, Any]) -> None:
    greedy, beam = run(range(30), **fields)[0], run(range(30), decoding="beam", beams=1, **fields)[0]
    assert torch.equal(beam.tokens, greedy.tokens)
    assert torch.equal(beam.log_probs, greedy.log_probs)
    assert torch.equal(beam.scores, greedy.scores)


@DECODINGS
@pytest.mark.parametrize("fields", [{}, {"no_repeat_ngram": 1}, {"min_caption_len": 4}])
def test_log_probs_are_the_sums_over_the_caption_as_the_model_gave_them(decoding: str, fields: dict[str, Any]) -> None:
    found, toy = run(range(12), decoding=decoding, temperature=1.7, length_penalty=0.5, **fields)
    for picture, caption in enumerate(captions(found)):
        expected = toy.score(picture, caption)
        assert found.log_probs[picture].item() == pytest.approx(expected, rel=1e-5)
        assert found.scores[picture].item() == pytest.approx(expected / len(caption) ** 0.5, rel=1e-5)


# --- What every caption is ---


@DECODINGS
@pytest.mark.parametrize("max_tokens", [1, 2, 5])
@pytest.mark.parametrize("end_bias", [-20.0, 0.0, 20.0])
def test_a_caption_has_one_end_the_last_and_is_never_too_long(decoding: str, max_tokens: int, end_bias: float) -> None:
    found, _ = run(range(9), max_tokens=max_tokens, decoding=decoding, no_repeat_ngram=0, toy={"end_bias": end_bias})
    lengths = {len(caption) for caption in captions(found)}
    assert found.tokens.shape[1] == max(lengths) <= max_tokens
    for row in found.tokens.tolist():
        end = row.index(END)
        assert min(row[:end], default=1) > 0
        assert set(row[end + 1 :]) <= {-1}
    if end_bias:
        assert lengths == {max_tokens if end_bias < 0 else 1}


@DECODINGS
@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_n_gram_comes_twice(decoding: str, n: int) -> None:
    def repeats(n_blocked: int) -> int:
        found, _ = run(
            range(12),
            max_tokens=12,
            decoding=decoding,
            no_repeat_ngram=n_blocked,
            toy={"columns": 3, "end_bias": -3.0},
        )
        grams = [list(itertools.pairwise(c) if n == 2 else zip(*(c[k:] for k in range(n)), strict=False)) for c in
                 captions(found)]  # fmt: skip
        return sum(len(row) - len(set(row)) for row in grams)

    assert repeats(0) > 0
    assert repeats(n) == 0


def test_only_what_would_repeat_is_taken_out() -> None:
    # After 1 2 3 1 2: with n = 3 the run 1 2 3 would come again; with n = 2 also 2 3, the same; with n = 1 all three.
    columns = torch.tensor([[1, 2, 3, 1, 2], [1, 1, 2, 2, 3]])
    for n, out in ((3, [{3}, set()]), (2, [{3}, set()]), (1, [{1, 2, 3}, {1, 2, 3}]), (0, [set(), set()])):
        left = constrain(torch.zeros(2, 6), columns, END, 9, GenerationConfig(no_repeat_ngram=n))
        assert [set(row.isinf().nonzero().flatten().tolist()) for row in left] == out, n


@DECODINGS
@pytest.mark.parametrize("minimum", [1, 3, 5])
def test_a_caption_has_the_least_number_of_tokens(decoding: str, minimum: int) -> None:
    found, _ = run(
        range(12), decoding=decoding, min_caption_len=minimum, no_repeat_ngram=0, toy={"end_bias": 6.0}
    )  # fmt: skip
    assert min(len(caption) - 1 for caption in captions(found)) == minimum


def test_where_blocking_leaves_nothing_the_caption_ends_all_the_same() -> None:
    found, _ = run([0, 1], no_repeat_ngram=1, min_caption_len=5, toy={"columns": 3})  # two words only
    assert [len(caption) for caption in captions(found)] == [3, 3]
    assert found.log_probs.isfinite().all()


# --- Batch-mates ---


@DECODINGS
def test_a_caption_does_not_depend_on_its_batch_mates(decoding: str) -> None:
    together, _ = run(range(16), seed=3, max_tokens=9, decoding=decoding)
    assert len({len(caption) for caption in captions(together)}) > 2  # they finish at different times
    for picture in range(16):
        # In 'sample', picture b's own generator is number seed + b.
        alone, _ = run([picture], seed=3 + picture, max_tokens=9, decoding=decoding)
        assert captions(alone) == captions(together)[picture : picture + 1]
        assert torch.equal(alone.scores[0], together.scores[picture])


@DECODINGS
def test_finished_pictures_are_dropped_when_they_are_half(decoding: str) -> None:
    found, toy = run(range(16), max_tokens=9, decoding=decoding, toy={"end_bias": 1.0})
    assert toy.rows_asked == sorted(toy.rows_asked, reverse=True)
    assert toy.rows_asked[-1] <= toy.rows_asked[0] // 2
    assert len(found.tokens) == 16


@DECODINGS
def test_no_pictures_no_captions(decoding: str) -> None:
    found, _ = run([], decoding=decoding)
    assert found.tokens.shape[0] == found.log_probs.shape[0] == found.scores.shape[0] == 0


# --- Sampling ---


def test_a_seed_gives_the_same_captions_again_and_another_seed_others() -> None:
    def sampled(seed: int) -> list[list[int]]:
        return captions(run(range(20), seed=seed, decoding="sample")[0])

    assert sampled(5) == sampled(5)
    assert sampled(5) != sampled(1005)
    assert len(sampled(MAX_SEED)) == 20  # the second picture's seed is one beyond


def frequencies(log_probs: Tensor, **fields: Any) -> Tensor:
    points = (torch.arange(1000) + 0.5) / 1000  # evenly spread: the frequencies are the probabilities
    drawn = draw(log_probs.expand(1000, -1), points, GenerationConfig(**fields))
    return torch.bincount(drawn, minlength=log_probs.shape[-1]) / 1000


PROBS = torch.tensor([0.1, 0.4, 0.2, 0.0, 0.3])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0, 0.3]),
        ({"temperature": 0.5}, [0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0, 0.09 / 0.3]),  # squares
        ({"temperature": 0.001}, [0, 1, 0, 0, 0]),
        ({"sample_top_k": 2}, [0, 4 / 7, 0, 0, 3 / 7]),
        ({"sample_top_k": 1}, [0, 1, 0, 0, 0]),
        ({"sample_top_k": 99}, [0.1, 0.4, 0.2, 0, 0.3]),
        ({"sample_top_p": 0.65}, [0, 4 / 7, 0, 0, 3 / 7]),  # 0.4 is not enough, 0.4 + 0.3 is
        ({"sample_top_p": 0.75}, [0, 4 / 9, 2 / 9, 0, 3 / 9]),
        ({"sample_top_p": 0.01}, [0, 1, 0, 0, 0]),  # never nothing
        ({"sample_top_k": 3, "sample_top_p": 0.5}, [0, 4 / 7, 0, 0, 3 / 7]),  # 4/9, 3/9, 2/9: the first two have it
    ],
)
def test_draws_follow_the_distribution(fields: dict[str, Any], expected: list[float]) -> None:
    torch.testing.assert_close(
        frequencies(PROBS.log(), **fields), torch.tensor([float(p) for p in expected]), atol=2e-3, rtol=0
    )


def test_a_column_without_probability_is_never_drawn() -> None:
    log_probs = torch.tensor([[-torch.inf, 0.3, 0.2, -torch.inf]]).log_softmax(1)
    for point in (0.0, 1 - 2**-24):  # the ends of what torch.rand gives
        assert draw(log_probs, torch.tensor([point]), GenerationConfig()).item() == (1 if point == 0 else 2)


# --- Wrong settings ---


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decoding": "magic"}, "decoding is 'magic': it must be one of greedy, beam, sample"),
        ({"min_caption_len": 7}, "min_caption_len is 7: it must be at most 6"),
    ],
)
def test_settings_that_cannot_be_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_generation(GenerationConfig(**fields), max_len=8)
    check_generation(GenerationConfig(min_caption_len=6), max_len=8)


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1])
def test_a_seed_that_is_none_is_named(seed: int) -> None:
    with pytest.raises(UserError, match=f"seed is {seed}"):
        run([0], seed=seed, decoding="sample")
