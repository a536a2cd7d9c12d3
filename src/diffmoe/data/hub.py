"""Sets on the Hugging Face hub: from the library's cache where they are in it, else downloaded into it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from diffmoe.config import UserError, dataset_name
from diffmoe.data.labels import listed_names

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder

REQUEST_SECONDS = 5
PATIENCE_SECONDS = 8
"""For the whole answer: a request's own limit does not cover a name server that is silent."""


def check_hub(name: str) -> None:
    """Raises `UserError` unless the set `name` (owner/name) is cached, or on a hub that answers; within 10 s."""
    if is_cached(name):
        return
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        in_time(lambda: HfApi().dataset_info(name, timeout=REQUEST_SECONDS))
    except RepositoryNotFoundError as error:
        raise UserError(
            f"dataset is {name!r}: there is no such folder, and no such public set on the hub: "
            "it must be a folder, or a hub name such as owner/name"
        ) from error
    except Exception as error:  # the library lets those of its HTTP client through
        raise _unreachable(name, error) from error


def in_time(ask: Callable[[], object]) -> None:
    """Ask the hub something; raises what the question raises, or `TimeoutError` after `PATIENCE_SECONDS`."""
    failures: list[Exception] = []

    def asking() -> None:
        try:
            ask()
        except Exception as error:  # for the thread that waits
            failures.append(error)

    thread = threading.Thread(target=asking, daemon=True)
    thread.start()
    thread.join(PATIENCE_SECONDS)
    if thread.is_alive():
        raise TimeoutError(f"no answer in {PATIENCE_SECONDS} s")
    if failures:
        raise failures[0]


def load_hub(name: str) -> dict[str, Dataset]:
    """The set's splits, memory-mapped. From the cache where it is there, so that a run needs no network twice.

    Raises `UserError` where the set cannot be downloaded or prepared.
    """
    import datasets
    from datasets.packaged_modules.cache.cache import Cache

    if is_cached(name):
        cached = Cache(dataset_name=dataset_name(name), repo_id=name, version="auto", hash="auto")
        cached.download_and_prepare()
        splits = cached.as_dataset()
    else:
        try:
            builder = datasets.load_dataset_builder(name)
            _check_label_names(name, builder)
            builder.download_and_prepare()
            splits = builder.as_dataset()
        except UserError:
            raise
        except Exception as error:  # anything from a lost connection to a script that is no longer run
            raise _unreachable(name, error) from error
    if not isinstance(splits, datasets.DatasetDict):
        raise UserError(f"{name} on the hub has no splits: it must have a train split")
    return {str(split): dataset for split, dataset in splits.items()}


def _check_label_names(name: str, builder: DatasetBuilder) -> None:
    """Raises `UserError` where Parquet files of a set call their label numbers otherwise than the first of them does.

    The library reads them all with one list of names. Downloads them, as preparing the set does next.
    """
    import pyarrow.parquet as pq
    from datasets import DownloadConfig, DownloadManager
    from datasets.packaged_modules.parquet.parquet import Parquet

    if not isinstance(builder, Parquet):
        return
    files = list(itertools.chain.from_iterable((builder.config.data_files or {}).values()))
    manager = DownloadManager(dataset_name=name, download_config=DownloadConfig(), base_path=builder.base_path)
    first = None
    for path in manager.download(files):
        names = listed_names(pq.read_schema(path))
        first = first or names
        if names and names != first:
            raise UserError(
                f"{name} on the hub has files that number the classes in different ways, such as {Path(path).name}: "
                f"download them, and read them with --data_dir DIR from DIR/{dataset_name(name)}/"
            )


def is_cached(name: str) -> bool:
    """Whether the library's cache holds the set, in one configuration."""
    import datasets.config
    from datasets.naming import camelcase_to_snakecase

    owner, _, repository = name.rpartition("/")
    folder = Path(datasets.config.HF_DATASETS_CACHE).expanduser() / f"{owner}___{camelcase_to_snakecase(repository)}"
    configurations = {path.parts[-4] for path in folder.glob("*/*/*/dataset_info.json")}  # <name>/<version>/<hash>/
    return len(configurations) == 1


def _unreachable(name: str, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [""])[0] or type(error).__name__
    return UserError(
        f"cannot get {name} from the hub ({reason}): there must be a network, "
        f"or --data_dir DIR with DIR/{dataset_name(name)}/train-*.parquet"
    )
