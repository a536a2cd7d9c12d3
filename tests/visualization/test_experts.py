"""What the experts' figures show equals the data, read back from what is drawn, and can be read."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch
from tests.visualization.readable import assert_apart
from torch import Tensor

from diffmoe.evaluation.ablation import Ablation
from diffmoe.evaluation.experts import (
    BlockRouting,
    class_expert_counts,
    coactivation,
    favourites,
    imbalance,
    mutual_information,
    tokens_per_expert,
)
from diffmoe.evaluation.history import routing_metrics
from diffmoe.visualization.colors import BLACK, expert_color, ink_on
from diffmoe.visualization.experts import (
    ablation_map,
    coactivation_map,
    favourite_patches,
    load_over_time,
    router_confidence,
    routing_map,
    specialization,
    utilization,
)
from diffmoe.visualization.marks import block_name
from diffmoe.visualization.patches import LEAST_CORNER, patch_size, routing_picture, routing_sheet, surroundings

PLACES = (("image", 0), ("image", 1), ("text", 0), ("fusion", 0))


def block(place: str = "image", layer: int = 0, num: int = 12, tokens: int = 16, **options: int) -> BlockRouting:
    """Random routing with gates, of distinct experts for each token; texts end in padding."""
    num_experts, top_k = options.get("num_experts", 8), options.get("top_k", 2)
    generator = torch.Generator().manual_seed(10 * layer + len(place))
    probs = (2 * torch.randn(num, tokens, num_experts, generator=generator)).softmax(-1)
    gates, ids = probs.topk(top_k)
    gates = gates / gates.sum(-1, keepdim=True) if top_k > 1 else gates
    confidence, entropy = probs.amax(-1), torch.special.entr(probs).sum(-1)
    if place == "text":
        ids[:, 10:], gates[:, 10:] = -1, 0
        confidence[:, 10:] = entropy[:, 10:] = math.nan
    return BlockRouting(place, layer, num_experts, ids.short(), gates, confidence, entropy)


def blocks(**options: int) -> list[BlockRouting]:
    return [block(place, layer, **options) for place, layer in PLACES]


def picture(side: int = 16, channels: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(side)
    return torch.randint(0, 256, (channels, side, side), generator=generator).byte()


def cielab(rgb: Any) -> np.ndarray:
    """L*, a*, b*, of a D65 white, of sRGB from 0 to 1, (..., 3)."""
    rgb = np.asarray(rgb, dtype=float)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    x, y, z = np.moveaxis(linear @ np.array(to_xyz).T / (0.95047, 1, 1.08883), -1, 0)
    x, y, z = (np.where(v > 216 / 24389, np.cbrt(v), (24389 / 27 * v + 16) / 116) for v in (x, y, z))
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def legend_colors(num_experts: int) -> np.ndarray:
    return cielab([to_rgb(expert_color(expert)) for expert in range(num_experts)])


def nearest_expert(color: Any, num_experts: int = 8) -> Any:
    """The expert whose colour in the legend is the nearest, in CIELAB, to colours (..., 3) uint8."""
    colors = cielab(np.asarray(color) / 255)[..., None, :]
    return np.linalg.norm(colors - legend_colors(num_experts), axis=-1).argmin(-1)


def assert_readable(figure: Figure) -> None:
    """No text overlaps another one or leaves the figure; no panel is empty."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts: list[Any] = [text for legend in figure.legends for text in [*legend.get_texts(), legend.get_title()]]
    for axes in figure.axes:
        assert axes.has_data() or axes.texts
        ticks = [
            tick.label1
            for axis in (axes.xaxis, axes.yaxis)
            for tick in axis.get_major_ticks()
            if min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
        ]
        if axes.axison:
            left_title = axes._left_title  # pyright: ignore[reportAttributeAccessIssue]
            texts += [*ticks, left_title, axes.xaxis.label, axes.yaxis.label]
        texts += axes.texts
    texts = [text for text in texts if text.get_text().strip() and text.get_visible()]
    assert_apart(canvas, texts)


def drawn_image(axes: Axes) -> np.ndarray:
    """The values of a picture or heat map; nan where it has none."""
    values: Any = axes.images[0].get_array()
    return np.ma.filled(values, np.nan) if np.ma.is_masked(values) else np.asarray(values)


def step_data(band: Any) -> tuple[np.ndarray, np.ndarray, Any]:
    """Values, edges and baseline."""
    return band.get_data()


def tick_colors(labels: Any) -> list[str]:
    return [to_hex(label.get_bbox_patch().get_facecolor()).upper() for label in labels]


def expert_colors(num_experts: int = 8) -> list[str]:
    return [expert_color(expert).upper() for expert in range(num_experts)]


class TestRoutingMap:
    @pytest.mark.parametrize(("side", "tokens"), [(28, 49), (64, 64), (8, 16)])
    def test_each_patch_has_the_colours_of_its_experts(self, side: int, tokens: int):
        """On a black picture: the first in the upper left corner of each patch, the second in the lower right one."""
        image = torch.zeros(3, side, side, dtype=torch.uint8)
        shown = [block("image", layer, num=1, tokens=tokens) for layer in (0, 1)]
        first, *maps = routing_map(image, shown).axes
        assert first.get_title(loc="left") == "picture"
        for axes, routing in zip(maps, shown, strict=True):
            assert axes.get_title(loc="left") == block_name("image", routing.layer)
            drawn = drawn_image(axes)
            rows = round(math.sqrt(tokens))
            step = drawn.shape[0] // rows
            assert drawn.shape == (rows * step, rows * step, 3)
            for token, (best, second) in enumerate(routing.expert_ids[0].tolist()):
                top, left = (step * place for place in divmod(token, rows))
                assert nearest_expert(drawn[top, left]) == best
                assert nearest_expert(drawn[top + step - 1, left + step - 1]) == second

    def test_the_corner_is_as_large_as_the_second_gate(self):
        gates = torch.tensor([[[0.5, 0.5], [0.7, 0.3], [0.9, 0.1], [1.0, 0.0]]])
        ids = torch.tensor([[[0, 1]] * 4]).short()
        routing = BlockRouting("image", 0, 8, ids, gates, gates[..., 0], gates[..., 1])
        drawn = routing_picture(torch.zeros(1, 256, 256, dtype=torch.uint8), routing)
        quarters = [drawn[:128, :128], drawn[:128, 128:], drawn[128:, :128], drawn[128:, 128:]]
        parts = [float((nearest_expert(quarter) == 1).mean()) for quarter in quarters]
        assert parts == pytest.approx([0.5, 0.3, 0.1, LEAST_CORNER], abs=0.01)

    def test_one_expert_a_token_has_no_corner(self):
        routing = block(num=1, top_k=1)
        drawn = routing_picture(torch.zeros(1, 16, 16, dtype=torch.uint8), routing)
        for token, (expert,) in enumerate(routing.expert_ids[0].tolist()):
            row, column = divmod(token, 4)
            patch = drawn[row * 32 : row * 32 + 32, column * 32 : column * 32 + 32].reshape(-1, 3)
            assert len(np.unique(patch, axis=0)) == 1
            assert nearest_expert(patch[0]) == expert
        title = routing_map(picture(), [routing]).legends[0].get_title().get_text()
        assert title == "expert"

    @pytest.mark.parametrize("num_experts", [8, 16])
    def test_whatever_the_picture_a_patch_has_the_colour_and_hue_of_its_expert_in_the_legend(self, num_experts: int):
        """To the eye: in CIELAB the nearest colour of the legend, and its hue where it is not grey."""
        image, gates = torch.arange(256).byte().view(1, 16, 16), torch.ones(1, 1, 1)
        for expert, (_, a, b) in enumerate(legend_colors(num_experts)):
            ids = torch.full((1, 1, 1), expert).short()
            drawn = routing_picture(image, BlockRouting("image", 0, num_experts, ids, gates, gates[0], gates[0]))
            assert (nearest_expert(drawn, num_experts) == expert).all()
            if np.hypot(a, b) > 10:
                hues = np.arctan2(*np.moveaxis(cielab(drawn / 255)[..., :0:-1], -1, 0)) - np.arctan2(b, a)
                assert np.abs(np.angle(np.exp(1j * hues), deg=True)).max() < 10

    def test_the_picture_can_still_be_seen(self):
        """Within a patch of one colour, what is brighter in the picture is brighter in the map."""
        image = picture(8)
        routing = block(num=1, tokens=4, top_k=1)
        drawn = routing_picture(image, routing).astype(float).sum(-1)[::8, ::8]
        for row, column in np.ndindex(2, 2):
            here = (slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4))
            order = image[0].numpy()[here].ravel().argsort(kind="stable")
            assert (np.diff(drawn[here].ravel()[order]) >= 0).all()
            assert np.ptp(drawn[here]) > 100

    def test_one_block_has_its_numbers(self):
        shown = [block("image", layer, num=1) for layer in (0, 1)]
        figure = routing_map(picture(), shown, layer=1)
        assert [axes.get_title(loc="left") for axes in figure.axes] == ["picture", "image block 2"]
        numbers = [int(text.get_text()) - 1 for text in figure.axes[1].texts]
        assert numbers == shown[1].expert_ids[0, :, 0].tolist()
        places = [text.get_position() for text in figure.axes[1].texts]
        assert [(int(y // 4), int(x // 4)) for x, y in places] == [divmod(token, 4) for token in range(16)]

    def test_the_legend_has_every_expert_in_its_colour(self):
        legend = routing_map(picture(), [block(num=1)]).legends[0]
        assert [text.get_text() for text in legend.get_texts()] == [str(number) for number in range(1, 9)]
        found = [to_hex(handle.get_facecolor()).upper() for handle in legend.get_patches()]
        assert found == expert_colors()

    def test_only_the_image_tower_is_drawn(self):
        figure = routing_map(picture(), [b[0:1] for b in blocks()])
        titles = [axes.get_title(loc="left") for axes in figure.axes]
        assert titles == ["picture", "image block 1", "image block 2"]

    @pytest.mark.parametrize(("layers", "side", "num_experts"), [(1, 28, 8), (6, 64, 4), (4, 32, 16)])
    @pytest.mark.parametrize("layer", [None, 0])
    def test_readable(self, layers: int, side: int, num_experts: int, layer: int | None):
        tokens = (side // 4) ** 2 if side < 64 else 64
        shown = [block("image", n, num=1, tokens=tokens, num_experts=num_experts) for n in range(layers)]
        figure = routing_map(picture(side, 3), shown, layer)
        assert_readable(figure)

    def test_nothing_to_draw(self):
        with pytest.raises(ValueError, match="no routing of the image tower"):
            routing_map(picture(), [])
        with pytest.raises(ValueError, match="no routing of the image tower in block 3"):
            routing_map(picture(), [block(num=1)], layer=3)
        with pytest.raises(ValueError, match="16 tokens are not the patches of a picture of 30x30"):
            routing_map(picture(30), [block(num=1)])
        with pytest.raises(ValueError, match="of 12 pictures"):
            routing_map(picture(), [block()])


class TestPatches:
    def test_the_size_of_a_patch(self):
        assert patch_size(picture(28), block(tokens=49)) == 4
        assert patch_size(torch.zeros(1, 8, 16), block(tokens=32)) == 2

    def test_a_sheet_has_each_picture_beside_its_maps(self):
        images = torch.stack([picture(16), 255 - picture(16)])
        shown = blocks(num=2)
        sheet = routing_sheet(images, shown)
        assert sheet.shape == (2 * 128, 3 * 128, 3)
        for row in (0, 1):
            strip = sheet[row * 128 : row * 128 + 128]
            assert np.array_equal(strip[::8, :128:8, 0], images[row, 0])
            for column in (0, 1):
                expected = routing_picture(images[row], shown[column][row : row + 1])
                assert np.array_equal(strip[:, 128 + 128 * column : 256 + 128 * column], expected)

    def test_surroundings_are_cut_where_the_patch_is(self):
        image = picture(16, 3)
        inner = surroundings(image, 5, 4)  # row 1, column 1
        assert np.array_equal(inner, image.permute(1, 2, 0)[0:12, 0:12])
        edge = surroundings(image, 3, 4)  # row 0, column 3: nothing above and nothing on the right
        assert np.array_equal(edge[4:, :8], image.permute(1, 2, 0)[0:8, 8:16])
        assert len(np.unique(edge[:4])) == len(np.unique(edge[:, 8:])) == 1


class TestUtilization:
    def test_bars_are_the_shares_and_the_columns_the_imbalance(self):
        shown = blocks()
        axes, table = utilization(shown).axes
        patches: list[Any] = list(axes.patches)
        bars = [(round(b.get_y() + b.get_height() / 2), b.get_x(), b.get_width(), b.get_facecolor()) for b in patches]
        for row, routing in enumerate([None, *shown], -1):
            found = [bar for bar in bars if bar[0] == row]
            counts = torch.ones(8) if routing is None else tokens_per_expert(routing)
            shares = (counts / counts.sum()).tolist()
            assert [width for _, _, width, _ in found] == pytest.approx(shares)
            assert [left for _, left, _, _ in found] == pytest.approx(np.cumsum([0, *shares[:-1]]))
            assert [to_hex(color).upper() for _, _, _, color in found] == expert_colors()
        for row, routing in enumerate(shown):
            values = imbalance(tokens_per_expert(routing)).values()
            written = [float(text.get_text()) for text in table.texts if text.get_position()[1] == row]
            assert written == pytest.approx(list(values), abs=0.0051)

    def test_blocks_are_named_by_their_place(self):
        axes, _ = utilization(blocks()).axes
        names = [label.get_text() for label in axes.get_yticklabels()]
        assert names[1:] == ["image block 1", "image block 2", "text block 1", "fusion block 1"]

    def test_a_dead_expert_is_counted_and_has_no_bar(self):
        routing = BlockRouting("image", 0, 3, torch.tensor([[[0], [1]]]), *[torch.ones(1, 2)] * 3)
        axes, table = utilization([routing]).axes
        patches: list[Any] = list(axes.patches)
        widths = [bar.get_width() for bar in patches][3:]
        assert widths == [0.5, 0.5, 0]
        assert [text.get_text() for text in table.texts][6] == "1"

    @pytest.mark.parametrize("num_experts", [2, 4, 8, 16])
    def test_readable(self, num_experts: int):
        assert_readable(utilization(blocks(num_experts=num_experts)))


class TestLoadOverTime:
    @pytest.mark.parametrize("epochs", [1, 2, 40])
    def test_bands_are_the_loads(self, epochs: int):
        names = ("num", "tokens")
        rows = [
            {"epoch": float(epoch), **routing_metrics(blocks(**{names[epoch % 2]: 12 + epoch % 5}))}
            for epoch in range(1, epochs + 1)
        ]
        figure = load_over_time(rows)
        for axes, (place, layer) in zip(figure.axes, PLACES, strict=True):
            assert axes.get_title(loc="left") == block_name(place, layer)
            assert len(axes.patches) == 8
            top = np.zeros(epochs)
            for expert, band in enumerate(axes.patches):
                assert isinstance(band, StepPatch)
                top, edges, bottom = step_data(band)
                expected = [row[f"expert_load/{place}_{layer}/{expert}"] for row in rows]
                assert list(top - bottom) == pytest.approx(expected, abs=1e-6)
                assert list(edges) == [epoch + 0.5 for epoch in range(epochs + 1)]
                assert to_hex(band.get_facecolor()).upper() == expert_colors()[expert]
            assert list(top) == pytest.approx([1] * epochs)
        assert_readable(figure)

    def test_epochs_without_load_are_left_out(self):
        (axes, *_) = load_over_time([{"epoch": 1.0}, {"epoch": 2.0, **routing_metrics(blocks())}]).axes
        assert axes.get_xlim() == (1.5, 2.5)

    def test_nothing_to_draw(self):
        with pytest.raises(ValueError, match="no expert load"):
            load_over_time([{"epoch": 1, "train_loss": 0.5}])


class TestFavouritePatches:
    def test_the_tiles_are_the_patches_framed_in_the_experts_colour(self):
        images = torch.stack([picture(16, 3).roll(n, 2) for n in range(12)])
        routing = block()
        figure = favourite_patches(images, routing, patch_size=4, count=5)
        (axes,) = figure.axes
        frames: Any = axes.collections[0]
        sheet = drawn_image(axes)
        corners = [path.vertices.min(0) + 0.5 for path in frames.get_paths()]
        colors = [to_hex(color).upper() for color in frames.get_edgecolor()]
        number = 0
        for expert in range(8):
            for row, token in favourites(routing, expert, 5).tolist():
                left, top = corners[number].round().astype(int)
                y, x = (4 * place for place in divmod(token, 4))
                patch = images[row, :, y : y + 4, x : x + 4].permute(1, 2, 0)
                assert np.array_equal(sheet[top : top + 4, left : left + 4], patch)
                assert colors[number] == expert_colors()[expert]
                center = (axes.get_yticks()[expert], top + 1.5)
                assert center[0] == pytest.approx(center[1])
                number += 1
        assert number == len(corners)

    def test_a_dead_experts_row_is_blank(self):
        routing = BlockRouting(
            "image", 0, 2, torch.zeros(3, 4, 1).short(), torch.rand(3, 4, 1), *[torch.ones(3, 4)] * 2
        )
        (axes,) = favourite_patches(torch.zeros(3, 1, 4, 4).byte(), routing, patch_size=2, count=3).axes
        assert (drawn_image(axes)[7:] == 255).all()
        assert len(axes.collections[0].get_paths()) == 3

    def test_readable(self):
        images = torch.stack([picture(16, 3)] * 12)
        assert_readable(favourite_patches(images, block(), patch_size=4))


class TestSpecialization:
    COUNTS = class_expert_counts(block(), torch.arange(12) % 3, 3)

    def test_cells_are_the_shares_of_the_class(self):
        (axes, _) = specialization(self.COUNTS, ["a", "b", "c"]).axes
        shares = self.COUNTS / self.COUNTS.sum(1, keepdim=True)
        assert np.allclose(drawn_image(axes), shares)
        written = {text.get_position(): text.get_text() for text in axes.texts}
        assert written == {(e, c): f"{100 * shares[c, e]:.0f}" for c in range(3) for e in range(8)}
        assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]
        assert tick_colors(axes.get_xticklabels()) == expert_colors()

    def test_the_title_has_the_mutual_information(self):
        title = specialization(5 * torch.eye(4).long(), list("abcd")).axes[0].get_title(loc="left")
        assert title == "image block 1\nI = 2.00 bits (100%)"
        bits, part = mutual_information(self.COUNTS)
        assert (
            specialization(self.COUNTS, list("abc"))
            .axes[0]
            .get_title(loc="left")
            .endswith(f"{bits:.2f} bits ({part:.0%})")
        )

    def test_a_panel_for_each_block(self):
        counts = torch.stack([self.COUNTS, self.COUNTS.flip(1), self.COUNTS.flip(0)])
        figure = specialization(counts, list("abc"))
        for axes, of_block in zip(figure.axes, counts, strict=False):
            assert np.allclose(drawn_image(axes), of_block / of_block.sum(1, keepdim=True))
        assert len(figure.axes) == 4  # and the bar

    def test_a_class_without_pictures_is_blank(self):
        (axes, _) = specialization(torch.tensor([[2, 2], [0, 0]]), ["a", "b"]).axes
        assert drawn_image(axes).tolist() == [[0.5, 0.5], [0, 0]]

    @pytest.mark.parametrize(
        ("layers", "num_classes", "num_experts"), [(1, 10, 8), (6, 10, 4), (3, 100, 16), (1, 2, 2)]
    )
    def test_readable(self, layers: int, num_classes: int, num_experts: int):
        generator = torch.Generator().manual_seed(0)
        counts = torch.randint(1, 99, (layers, num_classes, num_experts), generator=generator)
        assert_readable(specialization(counts, [f"class name {n}" for n in range(num_classes)]))

    def test_names_must_be_those_of_the_classes(self):
        with pytest.raises(ValueError, match="2 class names for 3 classes"):
            specialization(self.COUNTS, ["a", "b"])


class TestCoactivation:
    def test_cells_are_the_shares_of_the_rows_tokens(self):
        shown = blocks()
        figure = coactivation_map(shown)
        for axes, routing in zip(figure.axes, shown, strict=False):
            counts = coactivation(routing).double()
            drawn = drawn_image(axes)
            for row, column in np.ndindex(8, 8):
                if row != column:
                    assert drawn[row, column] == pytest.approx(float(counts[row, column] / counts[row, row]))
            assert np.isnan(drawn.diagonal()).all()
        corner = figure.axes[2]  # the lower left one of two rows, which has the labels of both axes
        assert tick_colors(corner.get_yticklabels()) == tick_colors(corner.get_xticklabels()) == expert_colors()
        assert_readable(figure)

    def test_many_blocks_are_readable(self):
        assert_readable(coactivation_map([block("image", layer) for layer in range(7)]))

    def test_one_expert_a_token_has_none(self):
        with pytest.raises(ValueError, match="sent to one expert"):
            coactivation_map(blocks(top_k=1))
        mixed = [block(top_k=1), block("image", 1)]
        assert [axes.get_title(loc="left") for axes in coactivation_map(mixed).axes][:1] == ["image block 2"]


class TestConfidence:
    def test_hills_are_histograms_of_real_tokens(self):
        shown = blocks()
        for axes, name, top in zip(
            router_confidence(shown).axes, ("confidence", "entropy"), (1.0, math.log(8)), strict=True
        ):
            for row, (hill, line, routing) in enumerate(zip(axes.patches, axes.get_lines(), shown, strict=False)):
                assert isinstance(hill, StepPatch)
                heights, edges, _ = step_data(hill)
                values = getattr(routing, name)[routing.real].numpy()
                counts, between = np.histogram(values, bins=len(heights), range=(0, top))
                assert counts.sum() == len(values)
                assert row - heights == pytest.approx(0.8 * counts / counts.max())
                assert edges == pytest.approx(between)
                assert np.asarray(line.get_xdata())[0] == pytest.approx(float(torch.as_tensor(values).median()))
            dotted = np.asarray(axes.get_lines()[-1].get_xdata())
            assert dotted[0] == pytest.approx(1 / 8 if name == "confidence" else top)

    @pytest.mark.parametrize("num_experts", [2, 16])
    def test_readable(self, num_experts: int):
        assert_readable(router_confidence(blocks(num_experts=num_experts)))


class TestAblation:
    FOUND = Ablation(
        PLACES[:2], torch.tensor([[0.90, 0.85, 0.91], [0.9004, 0.50, 0.8999]], dtype=torch.float64), 0.90, 1500
    )

    def test_cells_are_the_points_lost(self):
        (axes,) = ablation_map(self.FOUND).axes
        assert np.allclose(drawn_image(axes), [[0, -5, 1], [0.04, -40, -0.01]])
        assert [text.get_text() for text in axes.texts] == ["0", "−5.0", "+1.0", "0", "−40.0", "0"]
        assert axes.get_title(loc="left") == "Points of accuracy, from 90.0% on 1,500 pictures"
        assert [label.get_text() for label in axes.get_yticklabels()] == ["image block 1", "image block 2"]
        assert tick_colors(axes.get_xticklabels()) == expert_colors(3)

    def test_no_change_has_no_colour(self):
        image = ablation_map(self.FOUND).axes[0].images[0]
        low, high = image.get_clim()
        assert low == -high < 0

    @pytest.mark.parametrize(("num_blocks", "num_experts"), [(1, 8), (13, 4), (2, 16)])
    def test_readable(self, num_blocks: int, num_experts: int):
        accuracy = 0.5 - 0.4 * torch.rand(num_blocks, num_experts, generator=torch.Generator().manual_seed(0))
        places = tuple(("fusion", number) for number in range(num_blocks))
        assert_readable(ablation_map(Ablation(places, accuracy, 0.5, 10_000)))


@pytest.mark.parametrize("draw", [utilization, coactivation_map, router_confidence])
def test_a_dense_model_has_nothing_to_draw(draw: Any):
    with pytest.raises(ValueError, match="dense"):
        draw([])


def test_what_stands_on_a_colour_can_be_read():
    """WCAG 2.1: at least 4.5 to 1 would be text of any size; numbers on experts' colours reach the 3 of large text."""

    def luminance(color: str) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for expert in range(16):
        dark, light = sorted((luminance(expert_color(expert)), luminance(ink_on(expert_color(expert)))))
        assert (light + 0.05) / (dark + 0.05) > 3, expert
    assert ink_on("#FFFFFF") == BLACK
