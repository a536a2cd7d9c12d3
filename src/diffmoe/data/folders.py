"""Sets that are folders of pictures: `DIR/train/<class>/*`, with optional `validation` (or `val`) and `test`."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from diffmoe.config import UserError, nearest
from diffmoe.data.pictures import HEIC_SUFFIXES, PICTURE_SUFFIXES, UNREAD_SUFFIXES, LazyImages, PictureSpec
from diffmoe.data.splits import (
    SPLIT_ALIASES,
    SPLIT_WORDS,
    ClassesAndSplits,
    Split,
    check_one_alias,
    check_two_classes,
    split_of,
)

_SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found")
"""Folders that systems make beside the user's, some with thumbnails: as if they were not there."""


@dataclass(frozen=True)
class FilePictures:
    """Pictures that are files of one folder."""

    root: Path
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def read(self, rows: Sequence[int]) -> list[bytes | Path]:
        """The paths of the pictures at `rows`."""
        return [self.root / self.names[row] for row in rows]

    def where(self, row: int) -> str:
        """The picture's path."""
        return str(self.root / self.names[row])


@dataclass(frozen=True)
class FolderSource:
    """A set in class folders. `splits` are the folders that hold them: the set's own where it has no `train`."""

    root: Path
    splits: dict[str, Path]
    classes: dict[str, dict[str, tuple[str, ...]]]
    """For each split and class the pictures, as paths from the split's folder."""
    has_captions = False

    @classmethod
    def open(cls, root: Path) -> FolderSource:
        """List the pictures, reading none. Raises `UserError` naming a folder that has none or should not be there."""
        splits = _split_folders(root)
        classes = {split: _list_classes(folder) for split, folder in splits.items()}
        _check_class_names(splits["train"], tuple(classes["train"]))
        for split, folder in splits.items():
            for name in classes[split].keys() - classes["train"].keys():
                hint = nearest(name, classes["train"])
                raise UserError(f"{folder / name} is a class that is not in {splits['train']}{hint}: it must be there")
        return cls(root, splits, classes)

    def __len__(self) -> int:
        return sum(len(names) for classes in self.classes.values() for names in classes.values())

    def fingerprint(self) -> str:
        """Changes when a picture is added, removed, renamed or written (its size or time)."""
        digest = hashlib.sha256()
        for split, classes in self.classes.items():
            for name in (name for names in classes.values() for name in names):
                status = file_status(self.splits[split] / name)
                digest.update(
                    f"{split}/{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogateescape")
                )
        return digest.hexdigest()[:32]

    def left_out(self) -> Iterator[str]:
        """What looks as if it were meant to be read and is not, in a line each."""
        for folder in _subfolders(self.root) if self.root not in self.splits.values() else ():
            if folder not in self.splits.values() and (names := picture_files(folder, whole=False)):
                yield (
                    f"{folder} is not read, with its pictures ({len(names):,}): "
                    f"a split must be called {', '.join(SPLIT_ALIASES)}"
                )
        for folder in self.splits.values():
            if loose := sum(is_picture(path.name) for path in _entries(folder)):
                yield f"{folder} has pictures beside its class folders ({loose:,}), which are not read"
            unread = Counter(os.path.splitext(name)[1].lower() for name in _list_files(folder, folder, UNREAD_SUFFIXES))
            for suffix, count in sorted(unread.items()):
                yield f"{folder} has {suffix} files ({count:,}), which are not read: {_remedy(suffix)}"

    def read(self, picture: PictureSpec, in_memory: bool) -> ClassesAndSplits:
        """Class names, and for each split its pictures and labels, int64 (N,). Files stay on disk either way."""
        class_names = tuple(self.classes["train"])
        splits = {}
        for split, classes in self.classes.items():
            names = tuple(name for names in classes.values() for name in names)
            labels = [class_names.index(label) for label, names in classes.items() for _ in names]
            images = LazyImages.of(FilePictures(self.splits[split], names), picture)
            splits[split] = Split(images, torch.tensor(labels))
        return class_names, splits


def has_class_folders(root: Path) -> bool:
    """Whether `root` holds `train/`, or folders with pictures."""
    return has_train_folder(root) or bool(picture_folders(root))


def has_train_folder(root: Path) -> bool:
    """Whether `root` holds `train/`, in capitals or not."""
    return bool(_named(root, "train"))


def has_train_classes(root: Path) -> bool:
    """Whether there are pictures in `train/<class>/`."""
    return any(any(_list_files(folder, folder)) for train in _named(root, "train") for folder in _subfolders(train))


def picture_folders(root: Path) -> list[Path]:
    """The folders in `root` with pictures, not those with pictures only deeper in them."""
    return [folder for folder in _subfolders(root) if any(is_picture(path.name) for path in _entries(folder))]


def _named(root: Path, split: str) -> list[Path]:
    """The folders in `root` that a split is called by. Raises `UserError` where one is a link to nowhere."""
    found = [path for path in _entries(root) if split_of(path.name) == split]
    for path in found:
        if not path.exists():
            raise UserError(f"{path} is a link to {os.readlink(path)}, which is not there: mend or remove it")
    return [path for path in found if path.is_dir()]


def _split_folders(root: Path) -> dict[str, Path]:
    if not _named(root, "train"):
        return {"train": root}
    folders = {}
    for split in SPLIT_ALIASES:
        found = _named(root, split)
        check_one_alias(str(root), [folder.name for folder in found])
        if found:
            folders[split] = found[0]
    return folders


def _list_classes(folder: Path) -> dict[str, tuple[str, ...]]:
    around = {folder.resolve(), *folder.resolve().parents}
    folders = {path: path.resolve() for path in _subfolders(folder) if path.resolve() not in around}
    visited = set(folders.values())
    if len(visited) < len(folders):
        raise UserError(f"{folder} has links from one class to another: each must have a folder of its own")
    classes = {}
    for class_folder in folders:
        classes[class_folder.name] = tuple(sorted(_list_files(class_folder, folder, visited=visited)))
        if not classes[class_folder.name]:
            unread = next(_list_files(class_folder, folder, UNREAD_SUFFIXES), "")
            hint = f" but such as {unread} ({_remedy(os.path.splitext(unread)[1].lower())})" if unread else ""
            raise UserError(f"{class_folder} holds no pictures{hint}: a class folder must hold some, or be removed")
    if not classes:
        raise UserError(f"{folder} has no class folders: pictures must be in {folder}/<class>/")
    return classes


def _check_class_names(folder: Path, names: tuple[str, ...]) -> None:
    """Raises `UserError` where the class folders of train are no classes to learn: one alone, or those of splits."""
    if not all(name.lower() in SPLIT_WORDS for name in names):
        return check_two_classes(str(folder), names)
    inner = folder / names[0]
    if len(names) == 1 and picture_folders(inner):
        raise UserError(f"{folder} holds nothing but {inner}: the classes are the folders in it, move them to {folder}")
    place = folder if split_of(folder.name) == "train" else folder / "train"
    raise UserError(
        f"{folder} has the folders {', '.join(names)}, which are splits, not classes: "
        f"pictures must be in {place}/<class>/"
    )


def picture_files(root: Path, whole: bool = True) -> tuple[str, ...]:
    """All pictures in a folder and the folders in it, as sorted paths from it.

    Raises `UserError` naming a folder that cannot be looked into; where not the `whole` is wanted it is passed over.
    """
    return tuple(sorted(_list_files(root, root, whole=whole)))


def _list_files(
    folder: Path,
    root: Path,
    suffixes: tuple[str, ...] = PICTURE_SUFFIXES,
    visited: set[Path] | None = None,
    whole: bool = True,
) -> Iterator[str]:
    """The files below `folder` with such endings, as paths from `root`.

    A folder that links lead to again is visited once; never one of `visited`, to which all are added, or one around
    `folder`. Of a folder that cannot be looked into as of `picture_files`.
    """
    visited = set() if visited is None else visited
    around = folder.resolve().parents
    refuse = _refuse_unreadable if whole else None
    for parent, subfolders, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = Path(parent).resolve()
        if real in around or (real in visited and parent != str(folder)):
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if not _is_hidden(name))  # which link is first
        prefix = Path(parent).relative_to(root).as_posix()
        yield from (f"{prefix}/{name}" for name in files if _has_suffix(name, suffixes))


def file_status(path: Path) -> os.stat_result:
    """Of a picture. Raises `UserError` naming it where there is none."""
    try:
        return path.stat()
    except (OSError, ValueError) as error:  # of a name with a NUL
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: {reason}: it must be a picture that can be read") from error


def _remedy(suffix: str) -> str:
    if suffix in HEIC_SUFFIXES:
        return "pip install 'diff-moe[heic]' reads them"
    return "convert them to .jpg or .png"


def _subfolders(folder: Path) -> list[Path]:
    # Path's own raises in a folder that may be listed but not entered.
    return [path for path in _entries(folder) if os.path.isdir(path) and not _is_hidden(path.name)]


def _entries(folder: Path) -> list[Path]:
    """What is in a folder, sorted. Raises `UserError` where it cannot be looked into."""
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        _refuse_unreadable(error)


def _refuse_unreadable(error: OSError) -> NoReturn:
    raise UserError(f"{error.filename}: {error.strerror}: make the folder readable or move it away") from error


def _is_hidden(folder_name: str) -> bool:
    return folder_name.startswith(".") or folder_name in _SYSTEM_FOLDERS


def is_picture(path: str) -> bool:
    """Whether a file so called is read as a picture."""
    return _has_suffix(os.path.basename(path), PICTURE_SUFFIXES)


def _has_suffix(name: str, suffixes: tuple[str, ...]) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes
