"""What a comparison is shown as: one page with its table and figures, and the figures as files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.ticker import EngFormatter

from diffmoe.config import VisualizationConfig
from diffmoe.report.page import Facts, Section, Table, how_to_read, write_report
from diffmoe.visualization import comparison as drawn
from diffmoe.visualization import figures
from diffmoe.visualization.language import Language, say, speaking

PAGE = "comparison.html"
TTA = "test_accuracy_tta"
SHORT = EngFormatter(places=2, sep="")
"""1230000 is 1.23M."""


def write_page(
    folder: Path,
    found: Mapping[str, Any],
    health: Mapping[str, drawn.Health],
    show: VisualizationConfig,
    lang: Language,
) -> dict[str, Any]:
    """Write the page and the figures into `folder`; returns where they are, as `page` and `figures`.

    `found` is the comparison's JSON; `health` of each arm that of its runs.
    """
    saved: list[str] = []
    with speaking(lang):
        sections = []
        for name, section in _sections(found, health):
            for draw in section.drawings:
                saved.append(str(figures.save(draw(), folder / f"{name}.{show.figure_format}", show.dpi)))
            sections.append(section)
        title = say("What is gained, and what it costs: {dataset}", dataset=found["dataset"])
        page = write_report(folder / PAGE, title, sections, lang, _facts(found))
    return {"page": str(page), "figures": saved}


def _facts(found: Mapping[str, Any]) -> Facts:
    computer, versions = found["machine"], found["versions"]
    summary = [
        (say("Dataset"), found["dataset"]),
        (say("Seeds"), " ".join(map(str, found["seeds"]))),
        (say("Equal are"), found["match"]),
        (say("Machine"), f"{computer['gpu'] or computer['cpu']}, {computer['cores']} cores"),
        (say("Threads of a run"), " ".join(map(str, computer["threads"]))),
        ("torch", versions.get("torch", "")),
        (say("Date"), found["date"]),
    ]
    return Facts(summary, found["notes"], (), found["command"])


def _sections(found: Mapping[str, Any], health: Mapping[str, drawn.Health]) -> Iterator[tuple[str, Section]]:
    arms = found["arms"]
    metrics = list(dict.fromkeys(row["metric"] for row in found["differences"]))
    yield "arms", Section(say("Arms"), (), "", say("Mean and standard deviation over seeds."), arm_table(found))
    note = say("The first less the second, seed by seed: mean, its 95% interval, and p of the paired t-test.")
    yield "differences", Section(say("Differences"), (), "", note, difference_table(found))
    for metric in metrics:
        draw = partial(drawn.score_against_cost, arms, metric)
        title = say("Accuracy and cost") if metric == "test_accuracy" else drawn.metric_name(metric)
        yield f"{metric}_against_cost", Section(title, [draw], how_to_read(drawn.score_against_cost))
    if any(any(runs) for runs in health.values()):
        draw = partial(drawn.routers_over_time, health)
        yield "routers", Section(say("The routers"), [draw], how_to_read(drawn.routers_over_time))
    rows = [(arm, name, str(value)) for arm, of_arm in arms.items() for name, value in of_arm["differs"].items()]
    if rows:
        table = [(say("arm"), say("field"), say("value")), *rows]
        yield "settings", Section(say("What differs from the first arm"), (), "", table=table)


def arm_table(found: Mapping[str, Any]) -> Table:
    """A row for each arm; what not all of them have is not compared, and yet shown where it is there."""
    metrics = list(dict.fromkeys(row["metric"] for row in found["differences"]))
    if TTA not in metrics and any(TTA in of_arm for of_arm in found["arms"].values()):
        metrics.insert(1, TTA)  # beside the accuracy
    heads = (
        *(say("arm"), *map(drawn.metric_name, metrics)),
        *(say("seconds"), say("images/s"), say("FLOPs a picture"), say("parameters"), say("load, least to most")),
        say("flutter"),
    )
    rows = []
    for arm, of_arm in found["arms"].items():
        routing = of_arm["routing"] or {}
        load = f"{routing['min_load']:.2f} … {routing['max_load']:.2f}" if routing else ""
        flutter = f"{routing['flutter']:.1%}" if "flutter" in routing else ""
        cells = [spread(of_arm[name], name) if name in of_arm else "" for name in metrics]
        cells += [spread(of_arm["train_seconds"], "train_seconds"), spread(of_arm["images_per_second"], "speed")]
        cells += [SHORT(of_arm["flops_per_image"]), SHORT(of_arm["parameters_total"]), load, flutter]
        rows.append((arm, *cells))
    return [heads, *rows]


def difference_table(found: Mapping[str, Any]) -> Table:
    """A row for each metric and each arm that the first one is compared with."""
    rows: list[Sequence[str]] = [(say("arms"), say("metric"), say("difference"), say("95% interval"), "p")]
    for row in found["differences"]:
        interval = "" if row["ci95"] is None else " … ".join(signed(end, row["metric"]) for end in row["ci95"])
        p = "" if row["p"] is None else f"{row['p']:.3g}"
        pair = f"{row['a']} − {row['b']}"
        rows.append((pair, row["metric"], signed(row["mean"], row["metric"]), interval, p))
    return rows


def spread(summary: Mapping[str, Any], metric: str) -> str:
    """Mean ± standard deviation."""
    mean, std = summary["mean"], summary["std"]
    scale, form = (100, ".2f") if metric in drawn.SHARES else (1, ".3f" if metric in ("bleu4", "cider") else ",.1f")
    unit = "%" if metric in drawn.SHARES else ""
    return f"{scale * mean:{form}}" + ("" if std is None else f" ± {scale * std:{form}}") + unit


def signed(value: float, metric: str) -> str:
    """In points where the metric is a share."""
    return f"{100 * value:+.2f}" if metric in drawn.SHARES else f"{value:+.4f}"
