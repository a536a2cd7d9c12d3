"""A file appears whole or not at all."""

from __future__ import annotations

import os
import resource
import subprocess
from pathlib import Path

import pytest
import torch

from diffmoe.config import DataConfig, UserError
from diffmoe.files import check_outside_data, check_writable, write_atomically
from diffmoe.storage import model_files


def test_writes_and_makes_the_folder(tmp_path):
    path = tmp_path / "a" / "b" / "file.txt"
    write_atomically(path, lambda unfinished: unfinished.write_text("new"))
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError])
def test_a_writer_that_fails_leaves_the_old_file_alone(tmp_path, error):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write(unfinished: Path) -> None:
        unfinished.write_text("half")
        assert path.read_text() == "old"  # what is there stays there until the new one is whole
        raise error("stop")

    with pytest.raises(UserError if error is OSError else error):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def write_into(folder: Path) -> None:
    write_atomically(folder / "new.txt", lambda path: path.write_text("new"))


@pytest.mark.parametrize("write", [write_into, check_writable])
def test_what_cannot_be_written_is_one_line(tmp_path, write):
    """A file stands where a folder is needed: that stops even root."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"file/sub.* cannot be written: ") as caught:
        write(tmp_path / "file" / "sub")
    assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "in the way"


def test_check_writable_makes_nothing(tmp_path):
    check_writable(tmp_path / "new" / "deeper")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_the_old_file_stays(tmp_path):
    path = tmp_path / "model.pth"
    path.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # stands in for the disk
    try:
        with pytest.raises(UserError, match=r"model\.pth cannot be written"):
            model_files.write(path, {"weights": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_table_that_is_named_and_a_made_set_have_no_folder(tmp_path, monkeypatch):
    """Beside either, nothing is looked through: a table in the working folder leaves the defaults usable."""
    monkeypatch.chdir(tmp_path)
    Path("captions.csv").write_text("image,caption\n")
    for dataset in ("captions.csv", "digits", "shapes"):
        check_outside_data(Path("checkpoints") / dataset, DataConfig(dataset=dataset), "save_dir", "checkpoints")
        check_outside_data(Path(dataset), DataConfig(dataset=dataset, data_dir=None), "save_dir", "checkpoints")


def test_a_folder_beside_the_data_is_outside_it_and_one_that_the_hubs_name_would_find_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data/flowers").mkdir(parents=True)
    inside = DataConfig(dataset="flowers", data_dir="data")
    check_outside_data(Path("data/runs/flowers"), inside, "save_dir", "checkpoints")
    check_outside_data(Path("data/flowers2"), inside, "save_dir", "checkpoints")
    with pytest.raises(UserError, match="save_dir leads to data/flowers, in data/flowers"):
        check_outside_data(Path("data/flowers"), inside, "save_dir", "checkpoints")
    with pytest.raises(UserError, match="save_dir leads to cifar10, in cifar10"):  # the next run would read it
        check_outside_data(Path("cifar10"), DataConfig(dataset="cifar10"), "save_dir", "checkpoints")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="Linux only")
def test_check_writable_tries_and_does_not_trust_permissions(snapshot, tmp_path):
    """Root has all permissions for /proc, and nobody can make a folder there."""
    with pytest.raises(UserError, match=r"^/proc/nope/deeper cannot be written: "):
        check_writable(Path("/proc/nope/deeper"))
    (tmp_path / "there").mkdir()
    before = snapshot(tmp_path)
    check_writable(tmp_path / "there")
    assert snapshot(tmp_path) == before


def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    path = tmp_path / "last[1].ckpt"
    abandoned = [tmp_path / f".last[1].ckpt.{pid}" for pid in (dead.pid, 2**31 - 1)]
    kept = [
        tmp_path / name for name in (f".last[1].ckpt.{os.getppid()}", ".last[1].ckpt.bak", ".last[1].ckpt.99999999999")
    ]
    kept += [tmp_path / f".other.ckpt.{dead.pid}", tmp_path / f"last[1].ckpt.{dead.pid}"]
    for left in (*abandoned, *kept):
        left.write_text("half")
    write_atomically(path, lambda unfinished: unfinished.write_text("new"))
    assert set(tmp_path.iterdir()) == {path, *kept}


def test_a_name_that_is_too_long_and_a_link_to_nowhere_are_found_before_work_begins(tmp_path):
    check_writable(tmp_path, "x" * 200)
    with pytest.raises(UserError, match="cannot be written: File name too long"):
        check_writable(tmp_path / "new", "x" * 255)  # unfinished, it is longer yet
    (tmp_path / "link").symlink_to("nowhere")
    for folder in ("link", "link/deeper"):
        with pytest.raises(UserError, match=r"/link is a link to nowhere, which is not there"):
            check_writable(tmp_path / folder)
    assert [path.name for path in tmp_path.iterdir()] == ["link"]
