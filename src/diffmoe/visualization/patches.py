"""Pictures in the colours of their patches' experts, and patches cut out of pictures: arrays, for figures to show.

Shapes: N pictures, T tokens, K chosen experts, E experts, P patch size; R rows and Q columns of patches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import to_rgb
from numpy.typing import NDArray
from torch import Tensor

from diffmoe.evaluation.experts import BlockRouting, favourites
from diffmoe.visualization.colors import LUMA, expert_color, theme

SUBPIXELS = 32
"""Pixels a side that a patch is drawn with, at least."""
LEAST_CORNER = 0.04
"""Part of a patch that the second expert's corner takes at least, or nobody would see its colour."""
TINT = 0.4
"""How far the light of a picture moves a colour to white or to black: further, it would be taken for another one."""


def patch_size(image: Tensor, block: BlockRouting) -> int:
    """Pixels a side of the T patches of a picture (C, H, W). Raises `ValueError` where there is no such size."""
    height, width = image.shape[-2:]
    num_tokens = block.expert_ids.shape[1]
    patch = max(1, round(math.sqrt(height * width / num_tokens)))
    if height % patch or width % patch or (height // patch) * (width // patch) != num_tokens:
        raise ValueError(f"{num_tokens} tokens are not the patches of a picture of {height}x{width}")
    return patch


def on_grid(image: Tensor, block: BlockRouting) -> tuple[NDArray[Any], NDArray[Any]]:
    """The chosen experts and their gates, (R, Q, K) each, of a picture's own routing (N = 1).

    Raises `ValueError` where the routing is of other than one picture, or its tokens are not the picture's patches.
    """
    patch = patch_size(image, block)
    if len(block.expert_ids) != 1:
        raise ValueError(f"the routing is of {len(block.expert_ids)} pictures: it must be of one")
    grid = (image.shape[1] // patch, image.shape[2] // patch, block.top_k)
    return block.expert_ids[0].numpy().reshape(grid), block.gates[0].numpy().reshape(grid)


def routing_picture(image: Tensor, block: BlockRouting) -> NDArray[np.uint8]:
    """A picture in the colours of its patches' experts, uint8 (R·S, Q·S, 3), S >= `SUBPIXELS` a multiple of P.

    Bright pixels become a tint of the first expert's colour, dark ones a shade, none of them one of another's. A
    triangle in a patch's lower right corner has the second expert's colour; its area is the second one's part of the
    first two gates: at most half of the patch, and no less than `LEAST_CORNER`.
    `image` (C, H, W) uint8, `block` its own routing (N = 1). Raises as `on_grid`.
    """
    patch = patch_size(image, block)
    ids_RQK, gates_RQK = on_grid(image, block)
    scale = math.ceil(SUBPIXELS / patch)
    side = patch * scale
    chosen = enlarge(ids_RQK[..., 0], side)
    if block.top_k > 1:
        part_RQ = np.maximum(gates_RQK[..., 1] / gates_RQK[..., :2].sum(-1), LEAST_CORNER)
        from_corner = side - 0.5 - np.arange(side)
        is_second = np.add.outer(from_corner, from_corner) < side * np.sqrt(2 * part_RQ)[:, :, None, None]
        chosen = np.where(is_second.swapaxes(1, 2).reshape(chosen.shape), enlarge(ids_RQK[..., 1], side), chosen)
    colors = np.array([to_rgb(expert_color(expert)) for expert in range(block.num_experts)])
    light = image.float().mean(0).numpy()
    light = enlarge((light - light.min()) / max(light.max() - light.min(), 1), scale)[..., None]
    return (255 * _tinted(colors[chosen], light)).round().astype(np.uint8)


def _tinted(color: NDArray[Any], light: NDArray[Any]) -> NDArray[Any]:
    """A colour (..., 3) moved by `light` (..., 1), 0 to 1: darker below 0.5, lighter above.

    A light colour is moved more to white than to black, a dark one less: yellow would be olive, and blue another blue.
    """
    own = color @ np.array(LUMA)[:, None]
    up, down = np.maximum(2 * light - 1, 0) * own, np.maximum(1 - 2 * light, 0) * (1 - own)
    return color * (1 - TINT * down) + (1 - color) * TINT * up


def routing_sheet(images: Tensor, blocks: Sequence[BlockRouting]) -> NDArray[np.uint8]:
    """A row for each picture: itself, then its `routing_picture` of each block of the image tower; (height, width, 3).

    `images` (N, C, H, W) uint8; `blocks` their routing, at least one of the image tower.
    """
    rows = []
    for number, image in enumerate(images):
        maps = [routing_picture(image, block[number : number + 1]) for block in blocks if block.place == "image"]
        scale = maps[0].shape[0] // image.shape[1]
        picture = image.expand(3, -1, -1).permute(1, 2, 0).numpy()
        rows.append(np.hstack([enlarge(picture, scale), *maps]))
    return np.vstack(rows)


def enlarge(values: NDArray[Any], times: int) -> NDArray[Any]:
    """Each value of (rows, columns, ...) as a square of `times` x `times`."""
    return values.repeat(times, axis=0).repeat(times, axis=1)


def favourite_sheet(images: Any, block: BlockRouting, patch: int, count: int) -> tuple[NDArray[np.uint8], Tensor]:
    """The patches that each expert has the highest gates for, cut out with those around them, side by side.

    A row for each expert, `count` tiles of 3P x 3P with a gap of `tile_step(patch)` - 3P between them; the
    ground is seen where there is nothing. And where they come from, int64 (M, 4): expert, column, picture, token.
    `images` uint8 (N, C, H, W), or what gives such a picture for its row.
    """
    span, step = 3 * patch, tile_step(patch)
    sheet = _filled((block.num_experts - 1) * step + span, (count - 1) * step + span, theme().ground)
    places: list[list[int]] = []
    for expert in range(block.num_experts):
        for column, (row, token) in enumerate(favourites(block, expert, count).tolist()):
            top, left = expert * step, column * step
            sheet[top : top + span, left : left + span] = surroundings(images[row], token, patch)
            places.append([expert, column, row, token])
    return sheet, Tensor(places).long().view(-1, 4)


def _filled(height: int, width: int, color: str) -> NDArray[np.uint8]:
    """(height, width, 3), all of one colour."""
    return np.full((height, width, 3), np.multiply(255, to_rgb(color)).round(), dtype=np.uint8)


def tile_step(patch: int) -> int:
    """Pixels from one tile of `favourite_sheet` to the next."""
    return 3 * patch + max(1, patch // 2)


def surroundings(image: Tensor, token: int, patch: int) -> NDArray[np.uint8]:
    """A patch of a picture (C, H, W) uint8 with those around it, (3P, 3P, 3); grey beyond the edge."""
    rows, columns = image.shape[1:]
    padded = _filled(rows + 2 * patch, columns + 2 * patch, theme().grid)
    padded[patch:-patch, patch:-patch] = image.permute(1, 2, 0).expand(-1, -1, 3).numpy()
    row, column = divmod(token, image.shape[2] // patch)
    return padded[row * patch : (row + 3) * patch, column * patch : (column + 3) * patch]
