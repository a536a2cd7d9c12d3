"""Seeds times arms: each a normal training run in a folder of its own, so that a killed comparison goes on.

`<save_dir>/compare/<dataset>/<arm>/seed<k>/` holds what `train_test` leaves there, and `comparison.json`, which says of
what settings it is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from diffmoe.comparison.arms import WITH_TEXT, Arm
from diffmoe.config import UserError, dataset_name
from diffmoe.config.settings import Settings
from diffmoe.files import write_atomically
from diffmoe.runs import ELSEWHERE, check_run, silent, test_run, train_run
from diffmoe.storage.run_files import RunFiles
from diffmoe.tasks import task_of_data
from diffmoe.training.loop import StopRequested

COMPARED = ("test_accuracy", "test_accuracy_tta", "i2t_r1", "t2i_r1", "bleu4", "cider")
"""Metrics of a test that arms are compared by, of whatever task; more is better."""
MANY_EPOCHS = 1000
"""At equal time an arm's epochs are the first one's times this: its time is over before."""
MARK = "comparison.json"
Advance = Callable[["Run", bool], object]
"""Told of each run that is finished, and whether it was before."""


@dataclass(frozen=True)
class Run:
    """One arm with one seed."""

    arm: Arm
    seed: int
    settings: Settings
    data: str
    """The data's fingerprint."""
    waits_for: Run | None = None
    """The run whose training time this one gets."""

    @cached_property
    def files(self) -> RunFiles:
        """What it leaves."""
        return RunFiles(self.settings.data.dataset, self.settings.run.save_dir)

    @property
    def mark(self) -> Path:
        """The file that says of what settings it is."""
        return Path(self.settings.run.save_dir) / MARK

    def metrics(self) -> dict[str, Any]:
        """Of what is finished: `metrics.json`."""
        return self.files.read_metrics()

    def fingerprint(self) -> str:
        """What tells it from a run of other settings or other data."""
        fields = dataclasses.replace(self.arm, settings=self.timed()).fields()
        kept = {name: value for name, value in fields.items() if name not in ELSEWHERE}
        return hashlib.sha256(json.dumps([kept, self.data], sort_keys=True, default=str).encode()).hexdigest()[:32]

    def timed(self) -> Settings:
        """The settings, with the time of the run that it waits for: that must be finished."""
        if self.waits_for is None:
            return self.settings
        training = self.settings.training
        seconds = self.waits_for.metrics()["train_seconds"]
        timed = dataclasses.replace(training, max_seconds=seconds, epochs=training.epochs * MANY_EPOCHS)
        return dataclasses.replace(self.settings, training=timed)

    def is_finished(self) -> bool:
        """Whether it was trained and tested. Raises `UserError` where its folder holds a run of other settings."""
        if not self.mark.is_file():
            return False
        if self.waits_for is not None and not self.waits_for.is_finished():
            return False
        if self.marked()["fingerprint"] != self.fingerprint():
            raise UserError(
                f"{self.mark.parent} holds a run of other settings or data: give --overwrite or another --save_dir"
            )
        # Asked for other views, it is not tested yet; its training is not done again.
        return self.marked()["tta"] == self.settings.run.tta and any(name in self.metrics() for name in COMPARED)

    def marked(self) -> dict[str, Any]:
        """What its mark says. Raises `UserError` where it is damaged."""
        try:
            found = json.loads(self.mark.read_text(encoding="utf-8"))
            return {"fingerprint": found["fingerprint"], "threads": found["threads"], "tta": found.get("tta", "none")}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.mark} is damaged: begin anew with --overwrite") from error

    def begun(self, threads: int) -> Settings:
        """The settings to begin it with, or to go on with where it was begun; marks it as begun."""
        goes_on = self.mark.is_file() and self.files.last.is_file()
        mark = {"fingerprint": self.fingerprint(), "threads": threads, "tta": self.settings.run.tta}
        write_atomically(self.mark, lambda path: path.write_text(json.dumps(mark), encoding="utf-8"))
        run = dataclasses.replace(self.settings.run, resume=goes_on, overwrite=not goes_on)
        return dataclasses.replace(self.timed(), run=run)


def plan(arms: Sequence[Arm], seeds: int, data: str, equal_time: bool) -> list[Run]:
    """Seed after seed all arms, so that what is finished can be compared at any time."""
    runs: list[Run] = []
    for seed in range(seeds):
        first: Run | None = None
        for arm in arms:
            run = Run(arm, seed, settings_of(arm, seed), data, first if equal_time else None)
            first = first or run
            runs.append(run)
    return runs


def settings_of(arm: Arm, seed: int) -> Settings:
    """Those of an arm's run: its seed, counted from the one given, and folders of its own."""
    settings = arm.settings
    place = Path("compare", dataset_name(settings.data.dataset), arm.name, f"seed{settings.training.seed + seed}")
    run, show = settings.run, settings.visualization
    return dataclasses.replace(
        settings,
        training=dataclasses.replace(settings.training, seed=settings.training.seed + seed),
        run=dataclasses.replace(run, save_dir=str(Path(run.save_dir) / place), resume=False, overwrite=True),
        visualization=dataclasses.replace(show, output_dir=str(Path(show.output_dir) / place)),
    )


def execute(runs: Sequence[Run], jobs: int, overwrite: bool, advance: Advance) -> None:
    """Finish all runs, `jobs` at once in processes of their own that share the threads out; one job: in this process.

    Raises `UserError` where a run fails by a mistake, `StopRequested` or `KeyboardInterrupt` where it was stopped.
    """
    if overwrite:
        for run in runs:
            run.mark.unlink(missing_ok=True)
    waiting = []
    for run in runs:
        if run.is_finished():
            advance(run, True)
        else:
            waiting.append(run)
    if jobs == 1:
        for run in waiting:
            with naming(run):
                train_and_test(run.begun(torch.get_num_threads()))
            advance(run, False)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    for wave in ([run for run in waiting if run.waits_for is None], [run for run in waiting if run.waits_for]):
        with ThreadPoolExecutor(jobs) as pool:
            futures: dict[Future[None], Run] = {pool.submit(_in_a_process, run, threads): run for run in wave}
            try:
                for future in as_completed(futures):
                    future.result()
                    advance(futures[future], False)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def train_and_test(settings: Settings) -> None:
    """A whole run, quietly, without its pictures: `diffmoe test` draws them."""
    train_run(settings, silent)
    test_run(settings, silent, draw=False)


@contextmanager
def naming(run: Run) -> Iterator[None]:
    """A mistake within it is told with the arm and the seed."""
    try:
        yield
    except UserError as error:
        raise UserError(f"arm {run.arm.name}, seed {run.settings.training.seed}: {error}") from error


def _in_a_process(run: Run, threads: int) -> None:
    command = [sys.executable, "-c", "from diffmoe.comparison.run import work; work()"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as told:
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=told, env=environment
        ) as child:
            assert child.stdin is not None
            child.stdin.write(pickle.dumps(run.begun(threads)))
            child.stdin.flush()  # and left open: where this process dies, the child sees its end
            code = child.wait()
        told.seek(0)
        said = told.read().strip()
    with naming(run):
        if code == 2:
            raise UserError(said)
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        raise StopRequested([code - 128])
    if code:
        raise RuntimeError(f"the process of arm {run.arm.name}, seed {run.settings.training.seed}, failed: {said}")


def work() -> None:
    """What a process of `execute` does: the run whose settings it reads; ends as the parent does, saving first."""
    settings: Settings = pickle.load(sys.stdin.buffer)

    def end_with_parent() -> None:
        while os.read(sys.stdin.fileno(), 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        train_and_test(settings)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except StopRequested as stop:
        sys.exit(128 + stop.signal_number)


def check(arms: Sequence[Arm], equal_time: bool) -> None:
    """Before any data is read: each arm can be trained, and its files written. Raises `UserError`."""
    for run in plan(arms, 1, "", equal_time):
        data = run.settings.data
        if run.arm.kind not in WITH_TEXT and task_of_data(data).data_kind != "classification":
            raise UserError(f"arm {run.arm.name} tells classes apart: {data.dataset} has captions")
        with naming(run):
            check_run(run.settings, trains=True)
