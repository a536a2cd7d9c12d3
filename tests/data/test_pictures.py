"""Any picture becomes the right uint8 tensor, and one that is not whole is named."""

import contextlib
import functools
import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from diffmoe.config import UserError
from diffmoe.data import pictures
from diffmoe.data.folders import FilePictures
from diffmoe.data.pictures import LazyImages, PictureSpec


def decode(image: Image.Image, img_size: int, in_channels: int, format: str = "PNG", **options: object) -> Tensor:
    file = io.BytesIO()
    image.save(file, format, **options)
    return PictureSpec(img_size, in_channels).decode(file.getvalue(), "here")


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


def test_what_a_file_says_besides_the_picture_may_be_long() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (7, 7, 3), dtype=np.uint8))
    expected = decode(image, 7, 3)
    for packed in (True, False):
        texts = PngInfo()
        texts.add_text("workflow", "a word " * 220_000, zip=packed)
        texts.add_itxt("more", "a word " * 220_000, zip=packed)
        assert torch.equal(decode(image, 7, 3, pnginfo=texts), expected)
    assert torch.equal(decode(image, 7, 3, icc_profile=bytes(3_000_000)), expected)


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


@pytest.mark.parametrize("nothing", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("value", "expected"), [(0.5, 128), (200.0, 200)])
def test_a_float_that_is_no_number_is_black_and_changes_no_other(nothing: float, value: float, expected: int) -> None:
    pixels = np.full((6, 6), value, dtype=np.float32)
    pixels[0, 0] = nothing
    decoded = decode(Image.fromarray(pixels), 6, 1, "TIFF").flatten().tolist()
    assert decoded == [0, *[expected] * 35]


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
            PictureSpec(8, 3).read(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)


def test_a_picture_of_too_many_pixels_is_told_how_many_it_may_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    Image.new("L", (10, 10)).save(tmp_path / "at_limit.png")
    Image.new("L", (10, 11)).save(tmp_path / "over.png")
    with pytest.warns(Image.DecompressionBombWarning):
        PictureSpec(8, 1).read(tmp_path / "at_limit.png")
    with pytest.raises(UserError, match=r"over\.png is too large: it must have 100 pixels or fewer, scale it down"):
        PictureSpec(8, 1).read(tmp_path / "over.png")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_truncated_picture_is_refused_or_whole(format: str) -> None:
    """PIL forgives a missing end where no pixel is missing; no picture is filled up with grey."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, format)
    picture = PictureSpec(32, 3)
    whole = picture.decode(file.getvalue(), "here")
    refused = 0
    for cut in (*range(1, 40), 200, len(file.getvalue()) - 30):
        try:
            assert torch.equal(picture.decode(file.getvalue()[:-cut], "here"), whole)
        except UserError as error:
            assert str(error).startswith("here ")  # noqa: PT017
            refused = cut
    assert refused > 39


def test_channels_other_than_grey_and_colour_are_refused() -> None:
    for channels in (0, 2, 4):
        with pytest.raises(UserError, match=rf"in_channels is {channels}: it must be 1 \(grey\) or 3 \(colour\)"):
            PictureSpec(6, channels)


def test_a_path_a_pil_picture_and_its_bytes_are_one_picture(tmp_path: Path) -> None:
    picture = PictureSpec(8, 3)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    before = image.tobytes(), image.size
    for read in (
        picture.read(tmp_path / "a.png"),
        picture.read(str(tmp_path / "a.png")),
        picture.read(image),
        picture.decode(tmp_path / "a.png", "here"),
        picture.decode((tmp_path / "a.png").read_bytes(), "here"),
    ):
        assert torch.equal(read, picture.fit(image.copy()))
    assert (image.tobytes(), image.size) == before  # the caller's own picture is left alone


# --- Statistics ---


def test_normalised_pictures_have_mean_0_and_deviation_1() -> None:
    images = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scaled = images.double() / 255
    mean, std = scaled.mean((0, 2, 3)).tolist(), scaled.std((0, 2, 3), correction=0).tolist()
    out = PictureSpec(8, 3, tuple(mean), tuple(std)).normalize(images)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)


@given(
    mean=st.tuples(*[st.floats(0, 1)] * 3),
    std=st.tuples(*[st.floats(1 / 255, 0.5)] * 3),  # what `channel_statistics` gives: of values in [0, 1], one level up
)
def test_restoring_undoes_normalising_exactly(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """All 256 levels of each channel, whatever the statistics; one picture or many."""
    picture = PictureSpec(16, 3, mean, std)
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    back = picture.restore(picture.normalize(images))
    assert back.dtype == torch.uint8
    assert torch.equal(back, images)
    assert torch.equal(picture.restore(picture.normalize(images[0])), images[0])


def test_restoring_keeps_to_what_a_picture_can_show() -> None:
    picture = PictureSpec(1, 1, (0.5,), (0.25,))
    assert picture.restore(torch.tensor([-9.0, 0.0, 9.0]).view(3, 1, 1, 1)).flatten().tolist() == [0, 128, 255]


def test_the_larger_the_pictures_the_fewer_at_a_time_in_evaluation() -> None:
    """500 of up to 3x64x64, which is where memory was measured; beyond that as many pixels, not as many pictures."""
    assert [PictureSpec(size, 3).evaluation_batch for size in (8, 32, 64, 128, 224)] == [500, 500, 500, 125, 40]
    assert PictureSpec(128, 1).evaluation_batch == 375  # a third of the channels, three times as many
    assert PictureSpec(100_000, 3).evaluation_batch == 1  # never none
    for size in (65, 100, 256, 1000):
        batch = PictureSpec(size, 3).evaluation_batch
        assert batch * 3 * size**2 <= 500 * 3 * 64**2 < (batch + 1) * 3 * size**2


# --- On demand ---


def write_noise(folder: Path, count: int) -> FilePictures:
    generator = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(generator.integers(0, 256, (9, 9), dtype=np.uint8)).save(folder / f"{number}.png")
    return FilePictures(folder, tuple(f"{number}.png" for number in range(count)))


def test_lazy_images_index_as_the_tensor_they_decode_to(tmp_path: Path) -> None:
    lazy = LazyImages.of(write_noise(tmp_path, 12), PictureSpec(8, 1))
    images = lazy.load(progress=False)
    assert images.shape == lazy.shape == (12, 1, 8, 8)
    indices = torch.tensor([3, 3, 0, 11])
    for index in (2, slice(1, 4), [5, 1], indices, torch.tensor([], dtype=torch.int64)):
        assert torch.equal(lazy[index], images[index])
    assert torch.equal(lazy.subset(indices)[1:], images[indices][1:])
    assert torch.equal(pickle.loads(pickle.dumps(lazy))[indices], images[indices])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_streaming_keeps_the_order_and_leaves_the_global_generator_alone(tmp_path: Path, num_workers: int) -> None:
    lazy = LazyImages.of(write_noise(tmp_path, 12), PictureSpec(8, 1))
    batches = torch.randperm(12, generator=torch.Generator().manual_seed(0)).split(5)
    state = torch.get_rng_state()
    for streamed, indices in zip(lazy.stream(batches, num_workers), batches, strict=True):
        assert torch.equal(streamed, lazy[indices])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_picture_in_a_worker_is_still_one_line(tmp_path: Path, num_workers: int) -> None:
    lazy = LazyImages.of(write_noise(tmp_path, 4), PictureSpec(8, 1))
    (tmp_path / "2.png").write_bytes(b"gone")
    with pytest.raises(UserError, match=r"2\.png") as caught:
        list(lazy.stream(torch.arange(4).split(1), num_workers))
    assert "\n" not in str(caught.value)


def test_workers_need_no_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A default container has 64 MB of it, and a tensor that finds no room is never handed over."""

    def no_room(*_: object) -> None:
        raise AssertionError("a tensor is put into shared memory")

    for share in ("_share_fd_cpu_", "_share_filename_cpu_"):
        monkeypatch.setattr(torch.UntypedStorage, share, no_room)
    monkeypatch.setattr(pictures, "DataLoader", functools.partial(pictures.DataLoader, timeout=30))  # not for ever
    lazy = LazyImages.of(write_noise(tmp_path, 12), PictureSpec(8, 1))
    assert torch.equal(torch.cat(list(lazy.stream(torch.arange(12).split(5), num_workers=2))), lazy[:])


def test_only_a_regular_file_is_read(tmp_path: Path) -> None:
    """A device or a pipe has no end."""
    os.mkfifo(tmp_path / "pipe.png")
    for path in ("/dev/zero", tmp_path / "pipe.png"):
        with pytest.raises(UserError, match=f"{path}: Not a regular file: it must be a picture that can be read"):
            PictureSpec(8, 1).read(path)


def test_decoders_print_nothing_beside_the_refusal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for compression in ("tiff_deflate", "tiff_lzw", "jpeg", "packbits"):
        file = io.BytesIO()
        noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(file, "TIFF", compression=compression)
        whole = file.getvalue()
        middle = len(whole) // 2
        (tmp_path / "a.tif").write_bytes(whole[: middle - 200] + bytes(400) + whole[middle + 200 :])
        with contextlib.suppress(UserError):
            PictureSpec(8, 3).read(tmp_path / "a.tif")
    assert capfd.readouterr() == ("", "")
