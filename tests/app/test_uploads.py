"""No file but an upload is opened, and no picture decoded that is too large, damaged or none."""

from __future__ import annotations

import io
import os
import random
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffmoe.app import uploads
from diffmoe.app.uploads import FORMATS, read_upload
from diffmoe.config import UserError
from diffmoe.data.pictures import PictureSpec

Image.init()
REFUSED = r"^This picture was not uploaded here: drop one or choose a file\.$"


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_header(width: int, height: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))


def png_without_pixels(width: int, height: int) -> bytes:
    """A PNG file that ends where its pixels should begin."""
    return png_header(width, height) + struct.pack(">I", 1000) + b"IDAT"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where uploads lie; `key.png` is beside it."""
    Image.new("RGB", (3, 5), "white").save(tmp_path / "key.png")
    (tmp_path / "uploads").mkdir()
    return (tmp_path / "uploads").resolve()


@pytest.fixture
def read(folder: Path) -> Callable[[str | Path], torch.Tensor]:
    return lambda path: read_upload(str(path), folder, PictureSpec(8, 1))


class TestWhichFiles:
    def test_one_in_the_folder(self, read, folder):
        Image.new("RGB", (3, 5), "white").save(folder / "a.webp")
        assert torch.equal(read(folder / "a.webp"), torch.full((1, 8, 8), 255, dtype=torch.uint8))

    def test_a_link_within_the_folder(self, read, folder):
        Image.new("RGB", (3, 5), "white").save(folder / "a.png")
        (folder / "link").symlink_to("a.png")
        assert read(folder / "link").shape == (1, 8, 8)

    @pytest.mark.parametrize(
        "path",
        [
            *(
                "{folder}/../key.png",
                "{folder}",
                "{folder}/.",
                "{folder}/missing.png",
                "{folder}2/a.png",
                "key.png",
                "",
            ),
            *("{folder}/out", "{folder}/outside/key.png", "{folder}/dangling", "{folder}/loop", "{folder}/within"),
            *("{folder}/pipe", "{folder}/piped", "{folder}/zero", "/dev/zero", "/dev/null", "/etc/passwd", "/", "~"),
            *("{folder}/\0", "\0", "{folder}/\ud800", "\ud800", "{folder}/" + "a" * 300, "a/" * 5000, "x" * 1_000_000),
        ],
    )
    def test_all_others_are_refused_in_the_same_words(self, read, folder, path, monkeypatch):
        monkeypatch.chdir(folder.parent)
        (folder / "inner").mkdir()
        os.mkfifo(folder / "pipe")
        links = {"out": "../key.png", "outside": "..", "dangling": "missing", "loop": "loop", "within": "inner"}
        for name, target in (links | {"piped": "pipe", "zero": "/dev/zero"}).items():
            (folder / name).symlink_to(target)
        with pytest.raises(UserError, match=REFUSED):
            read(path.replace("{folder}", str(folder)))

    def test_of_files_outside_nothing_is_asked(self, read, folder, monkeypatch):
        """Not even whether they are there: how long that takes would tell."""
        for name in ("stat", "lstat", "open", "readlink"):
            monkeypatch.setattr(os, name, lambda *args, name=name, **settings: pytest.fail(f"os.{name}{args}"))
        for path in (folder.parent / "key.png", folder / ".." / "key.png", folder.parent / "missing"):
            with pytest.raises(UserError, match=REFUSED):
                read(path)

    @pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
    def test_what_takes_the_files_place_is_not_opened(self, read, folder, monkeypatch, kind):
        """After the path was resolved and before it is opened."""
        path = folder / "a.png"
        path.write_bytes((folder.parent / "key.png").read_bytes())
        resolve = os.path.realpath

        def swap(given: str, **settings: bool) -> str:
            resolved = resolve(given, **settings)
            path.unlink()
            if kind == "link":
                path.symlink_to(folder.parent / "key.png")
            elif kind == "pipe":
                os.mkfifo(path)
            else:
                path.mkdir()
            return resolved

        monkeypatch.setattr(os.path, "realpath", swap)
        with pytest.raises(UserError, match=REFUSED):
            read(path)

    def test_no_file_is_left_open(self, read, folder):
        os.mkfifo(folder / "pipe")
        (folder / "bad.png").write_bytes(b"no picture")
        before = len(os.listdir("/dev/fd"))
        for path in (folder / "pipe", folder, folder / "bad.png"):
            with pytest.raises(UserError):
                read(path)
        assert len(os.listdir("/dev/fd")) == before


class TestWhichPictures:
    @pytest.mark.parametrize(
        ("width", "height"), [(10000, 5000), (1, 50_000_000), (2**31 - 1, 2**31 - 1), (15000, 9000)]
    )
    def test_many_pixels_are_refused_by_the_header(self, read, folder, width, height):
        """There is nothing to decode in the file: had anybody tried, it would be called damaged."""
        (folder / "many.png").write_bytes(png_without_pixels(width, height))
        with pytest.raises(UserError, match=r"^many\.png has too many pixels: it must have under 50 megapixels\.$"):
            read(folder / "many.png")

    def test_fewer_pixels_are_not(self, read, folder):
        (folder / "few.png").write_bytes(png_without_pixels(9999, 5000))
        with pytest.raises(UserError, match=r"^few\.png cannot be decoded: it must be a whole picture\.$"):
            read(folder / "few.png")

    @pytest.mark.parametrize(
        "content",
        [
            *(
                b"no picture",
                b"",
                b"<svg/>",
                b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
                b"\x89PNG\r\n\x1a\n",
            ),
            png_header(8, 8) + png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**27))) + png_chunk(b"IDAT", b""),
        ],
    )
    def test_what_is_no_picture_is_refused_whatever_it_is_called(self, read, folder, content):
        (folder / "text.png").write_bytes(content)
        with pytest.raises(UserError, match=r"^text\.png is not a picture: it must be a JPEG, PNG, WebP, … file\.$"):
            read(folder / "text.png")

    def test_a_large_file_is_refused(self, read, folder, monkeypatch):
        (folder / "large.png").write_bytes(b"x" * 21)
        monkeypatch.setattr(uploads, "MAX_BYTES", 20)
        with pytest.raises(UserError, match=r"^large\.png is too large"):
            read(folder / "large.png")

    @pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind in Image.SAVE])
    def test_damaged_ones_raise_nothing_else(self, read, folder, kind):
        generator = random.Random(kind)
        whole = io.BytesIO()
        Image.effect_noise((30, 20), 50).convert("RGB").save(whole, kind)
        for _ in range(60):
            damaged = bytearray(whole.getvalue())
            reach = generator.choice([16, 64, len(damaged)])
            for _ in range(generator.choice([1, 3, 20])):
                damaged[generator.randrange(min(reach, len(damaged)))] = generator.choice([0, 255, 7])
            (folder / "f").write_bytes(damaged[: generator.choice([len(damaged), reach])])
            with suppress(UserError):
                read(folder / "f")
