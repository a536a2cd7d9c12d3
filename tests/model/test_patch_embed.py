"""The patch embedding against its formula, and the laws of its stems."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from tests.model.pools import randn, randomize
from torch import Tensor, nn

from diffmoe.model.patch_embed import WHITENING_EPSILON, ConvNorm, PatchEmbed, StemConv, Whitening

WIDTH = 8


def smooth(count: int, channels: int, size: int) -> Tensor:
    """Pictures whose neighbouring pixels and channels are alike, of mean 0, as float64."""
    coarse = randn(count, channels, size // 2, size // 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    return coarse + coarse.sum(1, keepdim=True) + 0.3 * randn(count, channels, size, size, seed=1)


def test_linear_patch_embedding_is_a_product_with_each_patch_row_by_row() -> None:
    embed = randomize(PatchEmbed(img_size=8, patch_size=4, in_channels=3, embed_dim=WIDTH))
    images = randn(2, 3, 8, 12, seed=1)  # a grid of 2 x 3
    assert isinstance(embed.projection, nn.Conv2d)
    assert embed.projection.bias is not None
    patches = [images[:, :, 4 * row : 4 * row + 4, 4 * col : 4 * col + 4] for row in range(2) for col in range(3)]
    flat = torch.stack(patches, 1).flatten(2)  # (B, N, C * 4 * 4)
    torch.testing.assert_close(embed(images), flat @ embed.projection.weight.flatten(1).T + embed.projection.bias)


@pytest.mark.parametrize("kind", ["linear", "conv", "whitened"])
def test_a_size_that_the_patch_does_not_divide_is_an_error_naming_both(kind: str) -> None:
    with pytest.raises(ValueError, match=r"30x30.*4x4"):
        PatchEmbed(img_size=30, patch_size=4, kind=kind)
    embed = PatchEmbed(img_size=8, patch_size=4, embed_dim=WIDTH, kind=kind)
    for height, width in ((8, 10), (10, 8)):
        with pytest.raises(ValueError, match=rf"{height}x{width}.*4x4"):
            embed(torch.zeros(1, 1, height, width))


@pytest.mark.parametrize(
    ("kind", "patch_size"), [*(("conv", size) for size in (1, 2, 4)), *(("whitened", size) for size in (2, 4))]
)
def test_a_stem_puts_each_patch_at_its_place_in_the_grid(kind: str, patch_size: int) -> None:
    # A pixel reaches 2 (n - 1) + 2 (n/2 - 1) + ... < 4n pixels through the 3x3 convolutions: under 4 patches.
    rows, cols, row, col = 6, 12, 1, 10
    embed = PatchEmbed(4 * patch_size, patch_size, in_channels=2, embed_dim=WIDTH, kind=kind).double().eval()
    images = randn(1, 2, rows * patch_size, cols * patch_size)
    touched = images.clone()
    touched[:, :, row * patch_size : (row + 1) * patch_size, col * patch_size : (col + 1) * patch_size] += 1
    change = (embed(touched) - embed(images)).abs().sum(-1)
    assert change.shape == (1, rows * cols)
    changed = change.view(rows, cols).nonzero().tolist()
    assert [row, col] in changed
    assert all(abs(r - row) < 4 and abs(c - col) < 4 for r, c in changed)


def test_a_norm_folded_into_its_convolution_changes_nothing() -> None:
    layer = ConvNorm(3, 5).double()
    images = randn(4, 3, 6, 6)
    with torch.no_grad():
        for parameter in layer[1].parameters():
            parameter.normal_()
    for _ in range(3):
        layer(2 * images + 1)  # in training: running mean and variance move
    layer.eval()
    expected = layer[2](layer[1](layer[0](images)))
    assert 0 < (expected == 0).sum() < expected.numel()  # some below 0, for the ReLU
    torch.testing.assert_close(layer(images), expected)


# --- The whitened stem ---


@pytest.mark.parametrize("channels", [1, 3])
def test_whitened_patches_have_the_identity_as_covariance_and_come_with_their_negatives(channels: int) -> None:
    images = smooth(250, channels, 6)  # three chunks
    whitening = Whitening(channels).double()
    whitening.fit(images)
    assert whitening.out_channels == 8 * channels
    whole = whitening(images)
    assert whole.shape == (250, 8 * channels, 6, 6)
    half = 4 * channels
    assert torch.equal(whole[:, half:], -whole[:, :half])
    inner = whole[:, :half, :-1, :-1].transpose(0, 1).flatten(1)  # the last row and column look at what was reflected
    covariance = inner @ inner.T / inner.shape[1]
    # Each component's variance is λ / (λ + ε), and 1 / (its row's squared length) is λ + ε.
    variance = 1 - WHITENING_EPSILON * whitening.weight[:half].flatten(1).square().sum(1)
    torch.testing.assert_close(covariance, variance.diag())
    assert (variance > 0.99).all()
    lengths = whitening.weight[:half].flatten(1).norm(dim=1)
    assert torch.equal(lengths, lengths.sort().values)  # the largest eigenvalue comes first


def test_whitening_looks_at_a_reflected_pixel_on_the_right_and_at_the_bottom() -> None:
    whitening = Whitening(1).double()  # not fitted: its rows are the patch's pixels
    picture = torch.arange(6.0).double().view(1, 1, 2, 3)  # 0 1 2 / 3 4 5
    right, below, across = (whitening(picture)[0, channel].tolist() for channel in (1, 2, 3))
    assert right == [[1, 2, 1], [4, 5, 4]]
    assert below == [[3, 4, 5], [0, 1, 2]]
    assert across == [[4, 5, 4], [1, 2, 1]]


def test_whitening_is_the_same_each_time_and_draws_nothing() -> None:
    images, state = smooth(30, 3, 8).float(), torch.get_rng_state()
    weights = []
    for _ in range(2):
        embed = PatchEmbed(8, 2, 3, WIDTH, "whitened")
        torch.set_rng_state(state)
        embed.whiten(images)
        assert torch.equal(torch.get_rng_state(), state)
        weights.append(next(embed.projection.parameters()))
    assert torch.equal(*weights)
    assert not torch.equal(weights[0], Whitening(3).weight)


def test_only_a_whitened_stem_is_whitened() -> None:
    with pytest.raises(ValueError, match="whitened"):
        PatchEmbed(8, 2, 3, WIDTH, "conv").whiten(smooth(4, 3, 8))


@pytest.mark.parametrize(
    ("patch_size", "width", "widths"),
    [
        (2, 4, [8, 8]),  # the last one is D
        (4, 2, [2, 2, 8, 8]),
        (8, 6, [6, 6, 8, 8, 8, 8]),
        (4, 20, [20, 20, 8, 8]),  # over D, where one asks for it
    ],
)
def test_widths_of_the_whitened_stem(patch_size: int, width: int, widths: list[int]) -> None:
    embed = PatchEmbed(16, patch_size, 3, embed_dim=8, kind="whitened", stem_width=width)
    convolutions = [m for m in embed.modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [24, *widths]
    assert [m.in_channels for m in convolutions] == [3, 24, *widths[:-1]]
    assert embed(torch.randn(2, 3, 16, 16)).shape == (2, (16 // patch_size) ** 2, 8)


@pytest.mark.parametrize(("before", "after"), [(3, 5), (5, 3)])
def test_a_convolution_of_the_whitened_stem_begins_as_the_identity(before: int, after: int) -> None:
    convolution = StemConv(before, after)[0].double()
    images = randn(2, before, 6, 6)
    out = convolution(images)
    shared = min(before, after)
    assert torch.equal(out[:, :shared], images[:, :shared])
    assert (out[:, shared:].abs().amax((0, 2, 3)) > 0).all()


@pytest.mark.parametrize("pool", [False, True])
def test_a_norm_folded_into_a_convolution_before_the_pooling_changes_nothing(pool: bool) -> None:
    layer = StemConv(3, 5, pool).double()
    images = randn(4, 3, 6, 6)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    for _ in range(3):
        layer(2 * images + 1)
    layer.eval()
    expected = images
    for part in layer:
        expected = part(expected)
    torch.testing.assert_close(layer(images), expected)
    assert expected.shape[-1] == (3 if pool else 6)


def test_a_training_step_leaves_what_is_frozen() -> None:
    embed = PatchEmbed(8, 2, 3, WIDTH, "whitened")
    embed.whiten(smooth(30, 3, 8).float())
    before = copy.deepcopy(embed)
    frozen = {name for name, parameter in embed.named_parameters() if not parameter.requires_grad}
    gains = {f"projection.{number}.{place}.weight" for number, place in ((2, 2), (3, 1))}
    assert frozen == {"projection.0.weight", *gains}
    optimizer = torch.optim.SGD(embed.parameters(), lr=1.0)
    embed(smooth(4, 3, 8).float()).square().sum().backward()
    optimizer.step()
    for (name, parameter), former in zip(embed.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(parameter, former) == (name in frozen), name


def test_a_saved_whitened_stem_is_the_same_when_loaded() -> None:
    embed = PatchEmbed(8, 2, 3, WIDTH, "whitened")
    images = smooth(30, 3, 8).float()
    embed.whiten(images)
    embed(images)  # moves the running statistics
    file = io.BytesIO()
    torch.save(embed.state_dict(), file)
    file.seek(0)
    loaded = PatchEmbed(8, 2, 3, WIDTH, "whitened")
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(loaded.eval()(images), embed.eval()(images))
