"""What a model can be trained for: one object a task, and nothing else asks which one it is."""

from __future__ import annotations

from diffmoe.config import DataConfig
from diffmoe.data.sources import check_dataset
from diffmoe.model.heads import Head
from diffmoe.tasks.base import Task
from diffmoe.tasks.captioning import Captioning
from diffmoe.tasks.classification import Classification

TASKS: tuple[Task, ...] = (Classification(), Captioning())


def task_of_data(config: DataConfig) -> Task:
    """The task that a set is for. Raises `UserError` where the set is not there; reads no picture."""
    kind = check_dataset(config)
    return next(task for task in TASKS if task.data_kind == kind)


def task_of_model(model: Head) -> Task:
    """The task that a model was made for."""
    return next(task for task in TASKS if isinstance(model, task.head))
