"""The experts' load in a training run's history: flat numbers, as its rows are, and back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from diffmoe.evaluation.experts import BlockRouting, tokens_per_expert


def routing_metrics(blocks: Iterable[BlockRouting]) -> dict[str, float]:
    """A block's `expert_load/<place>_<layer>/<expert>` and `router_entropy/<place>_<layer>`, for a row of the history.

    The first is the expert's share of the block's routed slots; the second the mean over tokens, in nats.
    """
    metrics: dict[str, float] = {}
    for block in blocks:
        name = f"{block.place}_{block.layer}"
        counts = tokens_per_expert(block)
        shares = (counts / counts.sum()).tolist()
        metrics |= {f"expert_load/{name}/{expert}": share for expert, share in enumerate(shares)}
        metrics[f"router_entropy/{name}"] = block.entropy.nanmean().item()
    return metrics


def first_experts(blocks: Iterable[BlockRouting]) -> dict[str, Tensor]:
    """Of each block, by `<place>_<layer>`, the first expert of each token: int16 (N, T), -1 at padding."""
    return {f"{block.place}_{block.layer}": block.expert_ids[..., 0].clone() for block in blocks}


def flutter(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> dict[str, float]:
    """A block's `flutter/<place>_<layer>`: the share of a sample's tokens whose first expert is another one by now.

    Of the same sample, as `first_experts` has it; a block that was not looked at before has none.
    """
    metrics: dict[str, float] = {}
    for name in before.keys() & now.keys():
        real = now[name] >= 0
        metrics[f"flutter/{name}"] = (before[name] != now[name])[real].double().mean().item()
    return dict(sorted(metrics.items()))


def load_history(history: Iterable[Mapping[str, float]]) -> dict[tuple[str, int], tuple[list[float], Tensor]]:
    """Back from a history with `routing_metrics`: of each block (place, layer), its epochs and their loads (epochs, E).

    Empty where the history has none.
    """
    found: dict[tuple[str, int], tuple[list[float], list[list[float]]]] = {}
    for row in history:
        loads: dict[tuple[str, int], list[float]] = {}
        for key, value in row.items():
            if key.startswith("expert_load/"):
                place, _, layer = key.split("/")[1].rpartition("_")
                loads.setdefault((place, int(layer)), []).append(value)
        for block, load in loads.items():
            epochs, of_epochs = found.setdefault(block, ([], []))
            epochs.append(row["epoch"])
            of_epochs.append(load)
    return {block: (epochs, torch.tensor(loads)) for block, (epochs, loads) in found.items()}


def router_health(history: Iterable[Mapping[str, float]], places: Iterable[str]) -> list[dict[str, float]]:
    """A row for each epoch of a history that has load: how the routers of the blocks in `places` stood.

    `epoch`; `min_load` and `max_load`, an expert's load over its fair share, the least and the most of all blocks; and
    `flutter`, the mean over blocks, where it is known.
    """
    rows = []
    for row in history:
        loads = {block: load_SE[0] for block, (_, load_SE) in load_history([row]).items() if block[0] in set(places)}
        if not loads:
            continue
        shares = torch.cat([load * len(load) for load in loads.values()])
        health = {"epoch": row["epoch"], "min_load": shares.min().item(), "max_load": shares.max().item()}
        known = [row.get(f"flutter/{place}_{layer}", math.nan) for place, layer in loads]
        changed = [value for value in known if math.isfinite(value)]  # a history.csv has nan where there was none
        rows.append(health | ({"flutter": sum(changed) / len(changed)} if changed else {}))
    return rows
