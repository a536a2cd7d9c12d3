"""Any picture becomes the right uint8 tensor, and one that is not whole is named."""

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffmoe.config import UserError
from diffmoe.data.folders import FilePictures
from diffmoe.data.pictures import LazyImages, decode_picture, read_picture


def decode(image: Image.Image, img_size: int, in_channels: int, format: str = "PNG", **options: object) -> Tensor:
    file = io.BytesIO()
    image.save(file, format, **options)
    return decode_picture(file.getvalue(), "here", img_size, in_channels)


def flat(mode: str, colour: object) -> Image.Image:
    return Image.new(mode, (6, 6), colour)  # pyright: ignore[reportArgumentType]


def colour_of(images: Tensor) -> list[int]:
    """The one colour that all pixels have."""
    assert (images == images[:, :1, :1]).all()
    return images[:, 0, 0].tolist()


def test_pixels_are_kept_where_the_size_fits() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    assert np.array_equal(decode(Image.fromarray(pixels), 7, 3).permute(1, 2, 0).numpy(), pixels)


def test_grey_becomes_three_equal_channels_and_colour_its_luma() -> None:
    assert colour_of(decode(flat("L", 90), 6, 3)) == [90, 90, 90]
    assert colour_of(decode(flat("RGB", (255, 0, 0)), 6, 1)) == [76]  # ITU-R 601: 0.299 * 255


def test_transparency_shows_white() -> None:
    assert colour_of(decode(flat("RGBA", (255, 0, 0, 0)), 6, 3)) == [255, 255, 255]
    assert colour_of(decode(flat("RGBA", (0, 0, 0, 51)), 6, 3)) == [204, 204, 204]  # a fifth of black on white
    assert colour_of(decode(flat("LA", (0, 0)), 6, 1)) == [255]
    palette = flat("P", 1)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    assert colour_of(decode(palette, 6, 3)) == [200, 100, 50]
    assert colour_of(decode(palette, 6, 3, transparency=1)) == [255, 255, 255]


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (257, 1), (32896, 128), (65535, 255)])
def test_16_bit_grey_is_scaled_not_clipped(value: int, expected: int) -> None:
    image = Image.fromarray(np.full((6, 6), value, dtype=np.uint16))
    assert colour_of(decode(image, 6, 1)) == [expected]
    assert colour_of(decode(image, 6, 3, "TIFF")) == [expected] * 3


def test_other_modes() -> None:
    assert colour_of(decode(flat("CMYK", (0, 255, 255, 0)), 6, 3, "TIFF")) == [255, 0, 0]
    assert colour_of(decode(flat("1", 1), 6, 1)) == [255]
    assert colour_of(decode(flat("F", 0.5), 6, 1, "TIFF")) == [128]
    assert colour_of(decode(flat("F", 200.0), 6, 1, "TIFF")) == [200]


def test_exif_orientation_is_honoured() -> None:
    pixels = np.arange(36, dtype=np.uint8).reshape(6, 6)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to look at it
    assert np.array_equal(decode(Image.fromarray(pixels), 6, 1, exif=exif)[0].numpy(), np.rot90(pixels, -1))


def test_resizing_squashes_and_does_not_alias() -> None:
    stripes = np.zeros((8, 64), dtype=np.uint8)
    stripes[:, ::2] = 200  # finer than the target: sampling would give 0 or 200, an average 100
    small = decode(Image.fromarray(stripes), 8, 1)
    assert small.shape == (1, 8, 8)
    assert (small.float() - 100).abs().max() <= 15


def test_large_jpeg_decoded_at_a_fraction_looks_the_same() -> None:
    ramp = np.tile(np.linspace(0, 255, 512).astype(np.uint8), (512, 1))
    decoded = decode(Image.fromarray(ramp), 16, 1, "JPEG")[0].float()
    assert (decoded - torch.linspace(8, 247, 16)).abs().max() < 3


def test_bad_pictures_are_named_in_one_line(tmp_path: Path) -> None:
    good = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(good, "JPEG")
    png = io.BytesIO()
    Image.fromarray(noise).save(png, "PNG")
    bad = {
        "truncated.jpg": good.getvalue()[:-900],
        "truncated.png": png.getvalue()[:2000],
        "header_only.png": png.getvalue()[:40],
        "text.jpg": b"not a picture at all",
        "empty.png": b"",
        "missing.jpg": None,
    }
    for name, content in bad.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=name) as caught:
            read_picture(path, img_size=8, in_channels=3)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_truncated_picture_is_refused_or_whole(format: str) -> None:
    """PIL forgives a missing end where no pixel is missing; no picture is filled up with grey."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, format)
    whole = decode_picture(file.getvalue(), "here", 32, 3)
    refused = 0
    for cut in (*range(1, 40), 200, len(file.getvalue()) - 30):
        try:
            assert torch.equal(decode_picture(file.getvalue()[:-cut], "here", 32, 3), whole)
        except UserError as error:
            assert str(error).startswith("here ")  # noqa: PT017
            refused = cut
    assert refused > 39


def test_channels_other_than_grey_and_colour_are_refused() -> None:
    with pytest.raises(UserError, match="in_channels is 2"):
        decode(flat("L", 1), 6, 2)


def write_noise(folder: Path, count: int) -> FilePictures:
    generator = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(generator.integers(0, 256, (9, 9), dtype=np.uint8)).save(folder / f"{number}.png")
    return FilePictures(folder, tuple(f"{number}.png" for number in range(count)))


def test_lazy_images_index_as_the_tensor_they_decode_to(tmp_path: Path) -> None:
    lazy = LazyImages.of(write_noise(tmp_path, 12), 8, 1)
    images = lazy.load(progress=False)
    assert images.shape == lazy.shape == (12, 1, 8, 8)
    indices = torch.tensor([3, 3, 0, 11])
    for index in (2, slice(1, 4), [5, 1], indices, torch.tensor([], dtype=torch.int64)):
        assert torch.equal(lazy[index], images[index])
    assert torch.equal(lazy.subset(indices)[1:], images[indices][1:])
    assert torch.equal(pickle.loads(pickle.dumps(lazy))[indices], images[indices])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_streaming_keeps_the_order_and_leaves_the_global_generator_alone(tmp_path: Path, num_workers: int) -> None:
    lazy = LazyImages.of(write_noise(tmp_path, 12), 8, 1)
    batches = torch.randperm(12, generator=torch.Generator().manual_seed(0)).split(5)
    state = torch.get_rng_state()
    for streamed, indices in zip(lazy.stream(batches, num_workers), batches, strict=True):
        assert torch.equal(streamed, lazy[indices])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_picture_in_a_worker_is_still_one_line(tmp_path: Path, num_workers: int) -> None:
    lazy = LazyImages.of(write_noise(tmp_path, 4), 8, 1)
    (tmp_path / "2.png").write_bytes(b"gone")
    with pytest.raises(UserError, match=r"2\.png") as caught:
        list(lazy.stream(torch.arange(4).split(1), num_workers))
    assert "\n" not in str(caught.value)
