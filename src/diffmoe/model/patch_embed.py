"""Pictures become tokens: the patch embedding and its stems.

Shapes: B batch, N image tokens, D width, C channels, H height, W width, P 2x2 patches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WHITENING_EPSILON = 5e-4
"""Added to the variances: what hardly varies in the pictures, noise above all, is not blown up (Page 2018)."""
STEM_MOMENTUM = 0.4
"""Of the whitened stem's running statistics: its weights move so fast, for so few steps, that torch's 0.1 lags."""
CHUNK = 100
"""Pictures whose patches are taken at a time, in float64."""


class PatchEmbed(nn.Module):
    """Patch embedding: pictures to tokens, (B, C, H, W) -> (B, N, D).

    `linear` is ViT's Conv2d with kernel = stride = patch. `conv` is a convolutional stem (Xiao et al. 2021, "Early
    convolutions help transformers see better"): 3x3 convolutions with BatchNorm, halving the picture log2(patch)
    times; what a small model on a CPU needs to learn in minutes. `whitened` is another one, which learns faster still.

    Args:
        img_size: height and width the position embedding is made for; other sizes that the patch divides work too.
        patch_size: pixels a side; must divide the picture's height and width.
        in_channels: C.
        embed_dim: D.
        kind: linear, conv or whitened.
        stem_width: channels of the whitened stem after its first halving.
    """

    def __init__(
        self,
        img_size: int = 28,
        patch_size: int = 4,
        in_channels: int = 1,
        embed_dim: int = 512,
        kind: str = "linear",
        stem_width: int = 64,
    ) -> None:
        super().__init__()
        _check_divides(patch_size, img_size, img_size)
        self.patch_size = patch_size
        self.grid_size = img_size // patch_size
        self.num_patches = self.grid_size**2
        self.projection: nn.Module
        if kind == "conv":
            self.projection = _conv_stem(patch_size, in_channels, embed_dim)
        elif kind == "whitened":
            self.projection = WhitenedStem(patch_size, in_channels, embed_dim, stem_width)
        else:
            self.projection = nn.Conv2d(in_channels, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) float -> (B, N, D), N = (H / patch) * (W / patch), row by row."""
        _check_divides(self.patch_size, *images.shape[-2:])
        # Channels last: the convolutions run about twice as fast on a CPU, and the tokens come out contiguous.
        features = self.projection(images.contiguous(memory_format=torch.channels_last))
        return features.flatten(2).transpose(1, 2)

    def whiten(self, images: Tensor) -> None:
        """Give the `whitened` stem's first convolution its weights, before training: see `Whitening.fit`.

        Raises `ValueError` where the patch embedding is of another kind.
        """
        if not isinstance(self.projection, WhitenedStem):
            raise ValueError("only patch_embed 'whitened' is whitened")
        self.projection.whitening.fit(images)


def _check_divides(patch_size: int, height: int, width: int) -> None:
    if height % patch_size or width % patch_size:
        raise ValueError(f"a picture of {height}x{width} cannot be cut into patches of {patch_size}x{patch_size}")


def _halvings(patch_size: int) -> int:
    return patch_size.bit_length() - 1


def _conv_stem(patch_size: int, in_channels: int, embed_dim: int) -> nn.Sequential:
    """Two 3x3 convolutions and a halving, until a patch is one pixel; widths double up to D, which a last one makes."""
    halvings = _halvings(patch_size)
    layers: list[nn.Module] = []
    width_in = in_channels
    for halving in range(halvings):
        width = max(embed_dim >> (halvings - halving), 16)
        layers += [ConvNorm(width_in, width), ConvNorm(width, width), nn.MaxPool2d(2)]
        width_in = width
    return nn.Sequential(*layers, ConvNorm(width_in, embed_dim))


class ConvNorm(nn.Sequential):
    """3x3 convolution, BatchNorm, activation (ReLU); in evaluation the norm is folded into the convolution.

    There it is a fixed scale and shift of each channel, which on their own would cost a pass over all pictures.

    Args:
        in_channels, out_channels: of the convolution.
        pool: halve the picture before the norm, where the rest has a quarter of the work. The norm's gains must then
            stay over 0: only such a scale may be folded, as the largest of some values stays the largest under it.
        activation: None is ReLU.
        momentum: of the running statistics.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        pool: bool = False,
        activation: nn.Module | None = None,
        momentum: float = 0.1,
    ) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
            *([nn.MaxPool2d(2)] if pool else []),
            nn.BatchNorm2d(out_channels, momentum=momentum),
            activation or nn.ReLU(inplace=True),
        )

    def forward(self, input: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H, W), or H / 2 and W / 2 with `pool`."""
        if self.training:
            return super().forward(input)
        convolution, *pool, norm, activation = self
        assert isinstance(convolution, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        weight = convolution.weight * scale[:, None, None, None]
        features = F.conv2d(input, weight, norm.bias - norm.running_mean * scale, padding=1)
        for layer in (*pool, activation):
            features = layer(features)
        return features


class WhitenedStem(nn.Sequential):
    """A convolutional stem that begins with whitened pictures, for training in minutes (Jordan 2024, "94% on CIFAR-10
    in 3.29 seconds on a single GPU").

    A frozen `Whitening` and GELU; then, for each of log2(patch) halvings, a 3x3 convolution, max-pooling, BatchNorm,
    GELU, and a 3x3 convolution, BatchNorm, GELU. Both have `width` channels in the first of several halvings, then D.

    Args:
        patch_size: a power of two, at least 2.
        in_channels: C.
        embed_dim: D.
        width: as `PatchEmbed`'s stem_width.
    """

    def __init__(self, patch_size: int, in_channels: int, embed_dim: int, width: int) -> None:
        layers: list[nn.Module] = [whitening := Whitening(in_channels), nn.GELU()]
        channels, halvings = whitening.out_channels, _halvings(patch_size)
        for halving in range(halvings):
            wider = width if halving == 0 and halvings > 1 else embed_dim
            layers += [StemConv(channels, wider, pool=True), StemConv(wider, wider)]
            channels = wider
        super().__init__(*layers)

    @property
    def whitening(self) -> Whitening:
        """The first layer."""
        first = self[0]
        assert isinstance(first, Whitening)
        return first


class StemConv(ConvNorm):
    """A convolution of `WhitenedStem`: begins as the identity, as far as it has channels for it.

    The first min(in, out) channels are handed on as they are (Dirac), the rest is random as usual. The norm has no
    gains to learn, only biases: the next convolution could undo them.
    """

    def __init__(self, in_channels: int, out_channels: int, pool: bool = False) -> None:
        super().__init__(in_channels, out_channels, pool, nn.GELU(), STEM_MOMENTUM)
        for layer in self:
            if isinstance(layer, nn.Conv2d):
                nn.init.dirac_(layer.weight.detach()[: min(in_channels, out_channels)])
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.requires_grad_(False)


class Whitening(nn.Conv2d):
    """2x2 convolution to 8 * C channels: a 2x2 patch's principal components, each of variance 1, and their negatives.

    The negatives, because what follows lets only one side through. Frozen: its weights come from pictures (`fit`), not
    from gradients; until then they are the patch's pixels. The picture keeps its size: it is reflected by a pixel on
    the right and at the bottom.
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__(in_channels, 8 * in_channels, kernel_size=2, bias=False)
        self.weight.requires_grad_(False)
        self._set(torch.eye(4 * in_channels))

    @torch.no_grad()
    def fit(self, images: Tensor) -> None:
        """Whiten the 2x2 patches of normalised pictures (B, C, H, W), whose mean is 0.

        A row is v / sqrt(λ + 5e-4) for each eigenvector v and eigenvalue λ of the patches' covariance, the largest λ
        first; then the rows negated. It draws nothing: the same pictures give the same weights.
        """
        size = self.weight[0].numel()
        covariance, count = torch.zeros(size, size, dtype=torch.float64, device=images.device), 0
        for chunk in images.split(CHUNK):
            patches_PX = F.unfold(chunk.double(), 2).transpose(1, 2).reshape(-1, size)
            covariance += patches_PX.T @ patches_PX
            count += len(patches_PX)
        values, vectors = torch.linalg.eigh(covariance / count)
        self._set((vectors / (values + WHITENING_EPSILON).sqrt()).T.flip(0))

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 8 * C, H, W); H and W are at least 2."""
        return super().forward(F.pad(input, (0, 1, 0, 1), mode="reflect"))

    @torch.no_grad()
    def _set(self, rows: Tensor) -> None:
        self.weight.copy_(torch.cat([rows, -rows]).view_as(self.weight))
