"""How far training is, for who watches: a bar on a terminal; elsewhere a line now and then, ever more rarely."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

BAR = "{desc} {percentage:3.0f}%|{bar:20}| "
LEAST_SECONDS = 5.0
"""Between two lines."""
PAUSE = 0.1
"""Of the time since training began so much passes between two lines: a day of it has about 90, not thousands."""


class Display:
    """Steps of training, shown.

    Args:
        tell: gets the lines.
        silent: show nothing (all processes but the first).
    """

    def __init__(self, tell: Callable[[str], object], silent: bool) -> None:
        self.tell, self.silent = tell, silent
        self.began = self.told = time.perf_counter()

    @contextmanager
    def epoch(self, title: str, steps: int, done: int) -> Iterator[None]:
        """Around an epoch of so many steps, of which some are `done`."""
        self.title, self.steps, self.done = title, steps, done
        self.told = time.perf_counter()  # a line, or that of the epoch before
        self.bar: tqdm[Any] = tqdm(
            desc=title,
            total=steps,
            initial=done,
            unit="step",
            leave=False,
            bar_format=BAR,
            disable=True if self.silent else None,  # None: shown on a terminal only
        )
        with self.bar:
            yield

    def step(self, describe: Callable[[], str]) -> None:
        """One more is done. `describe` waits for the device: it is asked only when something is shown."""
        self.done += 1
        if self.bar.update():
            self.bar.bar_format = BAR + describe()  # tqdm's own postfix begins with a comma
            self.bar.refresh()
        elif self.bar.disable and not self.silent and self._is_due():
            self.told = time.perf_counter()
            self.tell(f"{self.title}  step {self.done}/{self.steps}  {describe()}")

    def _is_due(self) -> bool:
        now = time.perf_counter()
        return now - self.told >= max(LEAST_SECONDS, PAUSE * (now - self.began))


def as_clock(seconds: float) -> str:
    """A time as hours, minutes and seconds: 26:03:05."""
    minutes, left = divmod(round(seconds), 60)
    return f"{minutes // 60:02}:{minutes % 60:02}:{left:02}"


def as_figure(value: float) -> str:
    """A rate or a count of hours: 1.4, 106, 1,250."""
    return f"{value:,.{0 if value >= 10 else 1}f}"
