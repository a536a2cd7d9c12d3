"""A race is fair: by turns, on the same new batches, each turn after one that is not timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from diffmoe.profiling.throughput import race


class Fake:
    """A contender that notes its turns and takes known times."""

    def __init__(
        self, name: str, turns: list[tuple[str, str, float]], clock: list[float], seconds: Sequence[float]
    ) -> None:
        self.name, self.turns, self.clock, self.seconds = name, turns, clock, seconds

    def train(self, batch: tuple[torch.Tensor]) -> None:
        self._run("training", batch)

    @contextmanager
    def inference(self) -> Iterator[Callable[..., None]]:
        self.clock[0] += 100  # reading class descriptions is not timed
        yield lambda batch: self._run("inference", batch)
        self.clock[0] += 100

    def wait(self) -> None:
        self.clock[0] += self.seconds[int(self.turns[-1][2]) % len(self.seconds)]

    def _run(self, mode: str, batch: tuple[torch.Tensor]) -> None:
        self.turns.append((self.name, mode, float(batch[0])))


def test_a_race_is_by_turns_on_the_same_new_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[tuple[str, str, float]] = []
    clock, drawn = [0.0], iter(range(100))
    monkeypatch.setattr("diffmoe.profiling.throughput.time.perf_counter", lambda: clock[0])
    fakes: Any = {name: Fake(name, turns, clock, [seconds]) for name, seconds in (("moe", 3.0), ("dense", 2.0))}
    speeds = list(race(fakes, [4], lambda size: (torch.tensor(float(next(drawn))),), rounds=2))
    assert [(s["model"], s["mode"], s["batch_size"], s["ms"], s["time_over_dense"]) for s in speeds] == [
        *[("moe", "inference", 4, 3000, 1.5), ("dense", "inference", 4, 2000, 1)],
        *[("moe", "training", 4, 3000, 1.5), ("dense", "training", 4, 2000, 1)],
    ]
    assert speeds[0]["images_per_second"] == 4 / 3
    # The first round of a mode warms up, and who begins changes.
    assert [(name, number) for name, mode, number in turns if mode == "training"] == [
        *[("moe", 6), ("moe", 7), ("dense", 6), ("dense", 7)],
        *[("dense", 8), ("dense", 9), ("moe", 8), ("moe", 9)],
        *[("moe", 10), ("moe", 11), ("dense", 10), ("dense", 11)],
    ]


def test_a_ratio_is_the_median_of_the_rounds_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[tuple[str, str, float]] = []
    clock, drawn = [0.0], iter(range(100))
    monkeypatch.setattr("diffmoe.profiling.throughput.time.perf_counter", lambda: clock[0])
    # Timed are the odd batches: 1 warms up; 3, 5 and 7 are the rounds of inference.
    moe, dense = [0, 9, 0, 1, 0, 9, 0, 2], [0, 9, 0, 1, 0, 3, 0, 4]
    fakes: Any = {"moe": Fake("moe", turns, clock, moe), "dense": Fake("dense", turns, clock, dense)}
    speed = next(iter(race(fakes, [8], lambda size: (torch.tensor(float(next(drawn))),), rounds=3)))
    assert speed["ms"] == 2000  # of 1, 9 and 2
    assert speed["time_over_dense"] == 1  # of 1, 3 and 1/2; the medians' own ratio is 2/3
