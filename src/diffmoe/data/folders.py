"""Sets that are folders of pictures: `DIR/train/<class>/*`, with optional `validation` (or `val`) and `test`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from diffmoe.config import UserError, nearest
from diffmoe.data.pictures import PICTURE_SUFFIXES, LazyImages, PictureSpec
from diffmoe.data.splits import SPLIT_ALIASES, SPLIT_WORDS, ClassesAndSplits, Split, check_one_alias, check_two_classes


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
        return cls(splits, classes)

    def __len__(self) -> int:
        return sum(len(names) for classes in self.classes.values() for names in classes.values())

    def fingerprint(self) -> str:
        """Changes when a picture is added, removed, renamed or written (its size or time)."""
        digest = hashlib.sha256()
        for split, classes in self.classes.items():
            for name in (name for names in classes.values() for name in names):
                status = (self.splits[split] / name).stat()
                digest.update(
                    f"{split}/{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogateescape")
                )
        return digest.hexdigest()[:32]

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
    return (root / "train").is_dir() or bool(picture_folders(root))


def has_train_classes(root: Path) -> bool:
    """Whether there are pictures in `train/<class>/`."""
    train = root / "train"
    return train.is_dir() and any(any(_list_pictures(folder, train)) for folder in _subfolders(train))


def picture_folders(root: Path) -> list[Path]:
    """The folders in `root` with pictures, not those with pictures only deeper in them."""
    return [folder for folder in _subfolders(root) if any(_is_picture(path.name) for path in folder.iterdir())]


def _split_folders(root: Path) -> dict[str, Path]:
    if not (root / "train").is_dir():
        return {"train": root}
    folders = {}
    for split, aliases in SPLIT_ALIASES.items():
        found = [root / alias for alias in aliases if (root / alias).is_dir()]
        check_one_alias(str(root), [folder.name for folder in found])
        if found:
            folders[split] = found[0]
    return folders


def _list_classes(folder: Path) -> dict[str, tuple[str, ...]]:
    classes = {}
    for class_folder in _subfolders(folder):
        classes[class_folder.name] = tuple(sorted(_list_pictures(class_folder, folder)))
        if not classes[class_folder.name]:
            raise UserError(f"{class_folder} holds no pictures: a class folder must hold some, or be removed")
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
    place = folder if folder.name == "train" else folder / "train"
    raise UserError(
        f"{folder} has the folders {', '.join(names)}, which are splits, not classes: "
        f"pictures must be in {place}/<class>/"
    )


def picture_files(root: Path) -> tuple[str, ...]:
    """All pictures in a folder and the folders in it, as sorted paths from it."""
    return tuple(sorted(_list_pictures(root, root)))


def _list_pictures(folder: Path, root: Path) -> Iterator[str]:
    for parent, subfolders, files in os.walk(folder, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        prefix = Path(parent).relative_to(root).as_posix()
        yield from (f"{prefix}/{name}" for name in files if _is_picture(name))


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _is_picture(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in PICTURE_SUFFIXES
