"""Sets on the Hugging Face hub: from the library's cache where they are in it, else downloaded into it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from diffmoe.config import UserError, dataset_name, expanded
from diffmoe.data.labels import LABEL_COLUMN, FileLabels, encode_labels, listed_names
from diffmoe.data.pictures import LazyImages, PictureSpec
from diffmoe.data.splits import SPLIT_ALIASES, ClassesAndSplits, Split
from diffmoe.data.tables import Columns, TablePictures, check_task, content_fingerprint, with_captions

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder

REQUEST_SECONDS = 5
PATIENCE_SECONDS = 8
"""For the whole answer: a request's own limit does not cover a name server that is silent."""


@dataclass(frozen=True)
class HubSource:
    """A set on the hub, `owner/name`; downloaded when it is first looked into."""

    name: str

    @cached_property
    def tables(self) -> dict[str, Dataset]:
        """The set's splits, memory-mapped."""
        hub = load_hub(self.name)
        found = {split: [hub[alias] for alias in aliases if alias in hub] for split, aliases in SPLIT_ALIASES.items()}
        tables = {split: candidates[0] for split, candidates in found.items() if candidates}
        if "train" not in tables:
            raise UserError(f"{self.name} on the hub has the splits {', '.join(hub)}: one must be named train")
        check_task(
            {split: Columns.of(table.column_names, f"{self.name} {split}") for split, table in tables.items()},
            {split: f"{self.name} {split}" for split in tables},
        )
        return tables

    def __len__(self) -> int:
        return sum(map(len, self.tables.values()))

    def fingerprint(self) -> str:
        """Changes with the content of the library's files."""
        return content_fingerprint(
            {split: [Path(file["filename"]) for file in table.cache_files] for split, table in self.tables.items()}
        )

    def read(self, picture: PictureSpec, in_memory: bool) -> ClassesAndSplits:
        """As `ParquetSource.read`; the tables stay memory-mapped either way."""
        if self.has_captions:
            return (), {
                split: with_captions(self._pictures(split), picture, [table.data.select(self._columns(split).captions)])
                for split, table in self.tables.items()
            }
        files = {}
        for split, table in self.tables.items():
            names = listed_names(table.features.arrow_schema)
            files[split] = [FileLabels(f"{self.name} {split}", table.data.column(LABEL_COLUMN), names)]
        class_names, labels = encode_labels(files)
        return class_names, {
            split: Split(LazyImages.of(self._pictures(split), picture), labels[split]) for split in labels
        }

    @property
    def has_captions(self) -> bool:
        """Captions instead of labels."""
        return bool(self._columns("train").captions)

    def _columns(self, split: str) -> Columns:
        return Columns.of(self.tables[split].column_names, f"{self.name} {split}")

    def _pictures(self, split: str) -> TablePictures:
        column = self.tables[split].select_columns([self._columns(split).picture]).with_format("arrow")
        return TablePictures(column, (f"{self.name} {split}",), (len(column),))


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
    cache = Path(expanded(str(datasets.config.HF_DATASETS_CACHE)))
    folder = cache / f"{owner}___{camelcase_to_snakecase(repository)}"
    configurations = {path.parts[-4] for path in folder.glob("*/*/*/dataset_info.json")}  # <name>/<version>/<hash>/
    return len(configurations) == 1


def _unreachable(name: str, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [""])[0] or type(error).__name__
    return UserError(
        f"cannot get {name} from the hub ({reason}): there must be a network, "
        f"or --data_dir DIR with DIR/{dataset_name(name)}/train-*.parquet"
    )
