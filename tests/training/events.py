"""What TensorBoard shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def read_events(folder: Path) -> Any:
    """What TensorBoard shows of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"histograms": 0, "images": 0})
    return events.Reload()


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Each curve's steps and values."""
    events = read_events(folder)
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
