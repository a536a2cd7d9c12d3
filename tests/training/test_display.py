"""What is seen of training: a bar on a terminal, and elsewhere a line now and then, of the same numbers."""

from __future__ import annotations

import io
import itertools
import sys
from types import SimpleNamespace

import pytest

from diffmoe.training import display
from diffmoe.training.display import Display, as_clock, as_figure


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines_of(
    monkeypatch: pytest.MonkeyPatch, step_seconds: float, steps: int, epochs: int = 1
) -> list[tuple[float, str]]:
    """When lines came, and what they said, of steps that all take as long, where nobody has a terminal."""
    now, lines = [0.0], []
    monkeypatch.setattr(display, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(sys, "stderr", piped := io.StringIO())
    shown = Display(lambda line: lines.append((now[0], line)), silent=False)
    for epoch in range(1, epochs + 1):
        with shown.epoch(f"epoch {epoch}/{epochs}", steps, 0):
            for _ in range(steps):
                now[0] += step_seconds
                shown.step(lambda: "loss 1.000")
    assert piped.getvalue() == ""
    return lines


class TestLines:
    def test_a_slow_step_is_told_of_at_once(self, monkeypatch):
        lines = lines_of(monkeypatch, 20.0, 2)
        assert lines == [(20.0, "epoch 1/1  step 1/2  loss 1.000"), (40.0, "epoch 1/1  step 2/2  loss 1.000")]

    def test_they_are_seconds_apart_and_then_ever_more(self, monkeypatch):
        times = [when for when, _ in lines_of(monkeypatch, 1.0, 3600)]
        assert times[:10] == [5 * number for number in range(1, 11)]
        for earlier, later in itertools.pairwise(times[9:]):
            assert 0.1 * later <= later - earlier <= 0.1 * later + 1  # a tenth of all that has passed, and a step

    def test_a_day_of_training_has_no_hundreds(self, monkeypatch):
        assert 50 < len(lines_of(monkeypatch, 10.0, 8640)) < 100

    def test_epochs_of_seconds_have_none_between(self, monkeypatch):
        """Each epoch is a line of its own already."""
        assert lines_of(monkeypatch, 0.5, 9, epochs=30) == []

    def test_other_processes_say_nothing(self, monkeypatch):
        now = iter(range(0, 10**6, 100))
        monkeypatch.setattr(display, "time", SimpleNamespace(perf_counter=lambda: next(now)))
        monkeypatch.setattr(sys, "stderr", terminal := Terminal())
        shown = Display(lambda _: pytest.fail("a line"), silent=True)
        with shown.epoch("epoch 1/1", 2, 0):
            shown.step(lambda: pytest.fail("the device was waited for"))
        assert terminal.getvalue() == ""


class TestBar:
    def test_the_first_step_has_its_numbers(self, monkeypatch):
        monkeypatch.setattr(sys, "stderr", terminal := Terminal())
        shown = Display(lambda _: pytest.fail("a line beside the bar"), silent=False)
        with shown.epoch("epoch 1/1", 4, 1):
            shown.bar.mininterval = 0.0  # as after a step of a tenth of a second
            shown.step(lambda: "3 images/s")
            assert terminal.getvalue().split("\r")[-1].strip().endswith("| 3 images/s")
            assert " 50%|" in terminal.getvalue().split("\r")[-1]

    def test_numbers_are_not_asked_for_more_often_than_it_is_drawn(self, monkeypatch):
        monkeypatch.setattr(sys, "stderr", Terminal())
        asked: list[int] = []
        shown = Display(lambda _: None, silent=False)
        with shown.epoch("epoch 1/1", 10**5, 0):
            for _ in range(1000):  # of microseconds
                shown.step(lambda: asked.append(1) or "")
        assert len(asked) < 100


@pytest.mark.parametrize(
    ("seconds", "clock"), [(0, "00:00:00"), (59.6, "00:01:00"), (3599, "00:59:59"), (26 * 3600 + 185, "26:03:05")]
)
def test_a_clock_goes_on_after_a_day(seconds, clock):
    assert as_clock(seconds) == clock


@pytest.mark.parametrize(("value", "figure"), [(0.04, "0.0"), (1.44, "1.4"), (106.04, "106"), (1249.6, "1,250")])
def test_a_figure_has_a_decimal_where_it_is_small(value, figure):
    assert as_figure(value) == figure
