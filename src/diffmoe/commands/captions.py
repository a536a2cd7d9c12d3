"""The task of captions and retrieval: how its training begins, and its test."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor
from tqdm import tqdm

from diffmoe.checkpoint import DataInfo
from diffmoe.commands.preparation import (
    EVALUATION_BATCH,
    TrainingParts,
    data_info,
    open_for_test,
    parameter_counts,
    training_options,
)
from diffmoe.config import GenerationConfig, ModelConfig, UserError
from diffmoe.data import (
    CaptionBatches,
    CaptionSplit,
    caption_tokens,
    detokenize,
    load_captions,
    normalize,
    shapes,
    used_tokens,
)
from diffmoe.evaluation import (
    caption_metrics,
    evaluating,
    finite_or_told,
    missing_metrics,
    normalize_captions,
    retrieval_metrics,
)
from diffmoe.files import write_atomically
from diffmoe.model.captioner import Captioner
from diffmoe.objectives import CaptionObjective
from diffmoe.settings import Settings
from diffmoe.training import Metrics

FILE = "captions.json"
"""The captions that were written, in the folder for pictures."""
SHEET = 12
"""Pictures on the sheet of captions."""


def prepare(settings: Settings, fabric: Fabric) -> TrainingParts:
    """The data, the model from its seed, and what the loop needs of them."""
    config, max_len = settings.training, settings.model.max_text_len
    check_fusion(settings.model)
    with fabric.rank_zero_first():  # the others find the cache that it made
        size = {"img_size": settings.model.img_size, "in_channels": settings.model.in_channels}
        data = load_captions(settings.data, **size, progress=fabric.is_global_zero)
    info = data_info(data, settings.data)
    batches = CaptionBatches(
        data.train,
        config.batch_size,
        max_text_len=max_len,
        **training_options(settings, fabric, info),
    )
    validation = _in_order(data.validation, info, max_len, fabric.device, settings.data.num_workers)
    torch.manual_seed(config.seed)
    model = Captioner(settings.model, used_tokens(batches.tokens, batches.mask))
    summary = (
        f"{data.name}: {len(data.train):,} training, {len(data.validation):,} validation and {len(data.test):,} test "
        f"pictures, {sum(map(len, data.train.captions)):,} training captions of {len(model.output_tokens):,} tokens"
    )
    objective = CaptionObjective(model, config.label_smoothing)
    return TrainingParts(model, objective, batches, lambda: _validate(model, validation), info, summary)


def check_fusion(config: ModelConfig) -> None:
    """Raises `UserError` where a model of `config` could not write captions."""
    if config.fusion_layers < 1:
        raise UserError("fusion_layers is 0: captions need at least 1, in which the text reads the picture")


def test(settings: Settings) -> None:
    """Caption and retrieve the test split: updates metrics.json, saves captions and pictures, prints the figures."""
    from diffmoe.visualization import captions as drawn
    from diffmoe.visualization import figures

    parts = open_for_test(settings, Captioner, load_captions)
    data, info, model = parts.data, parts.info, parts.model
    split, max_len = data.test, model.config.max_text_len
    written = write_captions(model, split.images, info, settings.generation, settings.training.seed)
    images, texts, image_of_text = embed(model, split, info, settings.data.num_workers)
    scores = _validate(model, _in_order(split, info, max_len, parts.device, settings.data.num_workers))
    metrics = {name.replace("val_", "test_"): value for name, value in scores.items() if "_r1" not in name}
    metrics |= score_captions(written, split.captions) | retrieval_metrics(images, texts, image_of_text)
    if data.known_as == "shapes":
        metrics |= _shapes_metrics(written, split, images, texts, image_of_text)
    parts.files.update_metrics({"dataset": data.name, "mode": settings.mode, **parameter_counts(model), **metrics})
    save_captions(parts.pictures / FILE, range(len(written)), written, split.captions)
    show = settings.visualization
    references = [captions[0] for captions in split.captions[:SHEET]]
    sheet = drawn.caption_sheet(split.images[torch.arange(len(references))], written[:SHEET], references)
    figures.save(sheet, parts.pictures / f"captions.{show.figure_format}", dpi=show.dpi)
    query = split.captions[0][0]
    best = (images @ texts[0]).topk(min(8, len(images)))
    grid = drawn.retrieval_grid(query, split.images[best.indices], best.values, best.indices == 0)
    figures.save(grid, parts.pictures / f"retrieval.{show.figure_format}", dpi=show.dpi)
    if history := parts.files.read_history():
        curves = figures.training_curves(history, accuracy="Next-token accuracy")
        figures.save(curves, parts.pictures / f"training_curves.{show.figure_format}", dpi=show.dpi)
    _print_metrics(metrics, len(split))
    print(f"metrics: {parts.files.metrics}   captions and pictures: {parts.pictures}/")


def write_captions(
    model: Captioner, images: Any, info: DataInfo, config: GenerationConfig, seed: int, batch_size: int = 100
) -> list[str]:
    """A caption for each of N pictures, uint8 (N, C, H, W) in memory or decoded on demand."""
    device = next(model.parameters()).device
    captions: list[str] = []
    for rows in tqdm(torch.arange(len(images)).split(batch_size), "writing captions", leave=False, disable=None):
        pictures = normalize(images[rows].to(device), info.mean, info.std)
        captions += detokenize(model.generate(pictures, config, seed=seed + len(captions)).cpu())
    return captions


def embed(model: Captioner, split: CaptionSplit, info: DataInfo, num_workers: int) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings of all pictures (I, D) and all captions (T, D) of a split, and each caption's picture (T,)."""
    device = next(model.parameters()).device
    max_len = model.config.max_text_len
    tokens, mask, image_of_text = caption_tokens(split, max_len)
    with evaluating(model), torch.inference_mode():
        pictures = _in_order(split, info, max_len, device, num_workers).epoch()
        images = [model.backbone.encode_image(batch.images) for batch in pictures]
        pairs = zip(tokens.split(EVALUATION_BATCH), mask.split(EVALUATION_BATCH), strict=True)
        texts = [model.backbone.encode_text(t.to(device), m.to(device)) for t, m in pairs]
    return torch.cat(images).float().cpu(), torch.cat(texts).float().cpu(), image_of_text


def score_captions(written: Sequence[str], references: Sequence[Sequence[str]]) -> Metrics:
    """BLEU, ROUGE-L, CIDEr-D, and METEOR where Java is there, of normalised texts; says what cannot be computed."""
    try:
        metrics = caption_metrics(normalize_captions(written), [normalize_captions(texts) for texts in references])
    except UserError as error:  # the extra is not installed: retrieval and loss are still worth having
        print(f"note: {error}")
        return {}
    for name, reason in missing_metrics().items():
        print(f"note: {name} is left out: {reason}")
    return metrics


def save_captions(
    path: Path, names: Sequence[Any], written: Sequence[str], references: Sequence[Sequence[str]] | None = None
) -> None:
    """As a JSON list of {image, caption} and, where there are any, the human captions."""
    rows: list[dict[str, Any]] = [{"image": name, "caption": c} for name, c in zip(names, written, strict=True)]
    for row, texts in zip(rows, references or (), strict=references is not None):
        row["references"] = list(texts)
    write_atomically(path, lambda unfinished: unfinished.write_text(_as_text(rows), encoding="utf-8"))


def check_captions_file(path: Path, overwrite: bool) -> None:
    """Raises `UserError` where `path` is a file that `save_captions` did not write, unless told to `overwrite`."""
    if path.exists() and not overwrite and not is_captions_file(path):
        raise UserError(f"{path} is not one that this program wrote: give another --output_dir or --overwrite")


def is_captions_file(path: Path) -> bool:
    """Whether a file is as `save_captions` writes it: rows with its keys and no others, in its very layout."""
    try:
        text = path.read_text(encoding="utf-8")
        rows = json.loads(text)
    except (OSError, ValueError):
        return False
    keys = (["image", "caption"], ["image", "caption", "references"])
    known = isinstance(rows, list) and all(isinstance(row, dict) and list(row) in keys for row in rows)
    return known and text == _as_text(rows)


def _as_text(rows: list[dict[str, Any]]) -> str:
    return json.dumps(rows, ensure_ascii=False, indent=1) + "\n"


def _in_order(
    split: CaptionSplit, info: DataInfo, max_len: int, device: torch.device, num_workers: int
) -> CaptionBatches:
    """A split as it is, for evaluation: each picture with its first caption."""
    return CaptionBatches(
        split,
        EVALUATION_BATCH,
        max_text_len=max_len,
        mean=info.mean,
        std=info.std,
        device=device,
        num_workers=num_workers,
    )


def _validate(model: Captioner, batches: CaptionBatches) -> Metrics:
    """Next-token loss and accuracy of each picture's first caption, and retrieval among these."""
    sums = torch.zeros(3)
    images: list[Tensor] = []
    texts: list[Tensor] = []
    with evaluating(model), finite_or_told(), torch.inference_mode():
        for pictures, tokens, mask in batches.epoch():
            image, text, features = model.read(pictures, tokens, mask)
            loss, accuracy = model.caption_loss(features, tokens, mask)
            count = float(mask[:, 1:].sum())
            sums += torch.tensor([float(loss) * count, float(accuracy) * count, count])
            images.append(image.embedding.float().cpu())
            texts.append(text.embedding.float().cpu())
    found = retrieval_metrics(torch.cat(images), torch.cat(texts), torch.arange(sum(map(len, images))))
    return {
        "val_loss": float(sums[0] / sums[2]),
        "val_accuracy": float(sums[1] / sums[2]),
        "val_i2t_r1": found["i2t_r1"],
        "val_t2i_r1": found["t2i_r1"],
    }


def _shapes_metrics(
    written: Sequence[str], split: CaptionSplit, images: Tensor, texts: Tensor, image_of_text: Tensor
) -> Metrics:
    """What only drawn scenes can tell: whether each caption is true, and what retrieval could reach at best."""
    scenes = shapes.scenes("test")
    judged = [shapes.is_true(caption, scene) for caption, scene in zip(written, scenes, strict=True)]
    right = torch.tensor([all(told[part] for part in ("colour", "shape", "place")) for told in judged]).float()
    assert split.held_out is not None
    metrics: Metrics = {}
    for suffix, rows in (("", ~split.held_out), ("_held_out", split.held_out)):
        metrics[f"captions_right{suffix}"] = right[rows].mean().item()
        kept = rows[image_of_text]
        captions = [text for texts in split.captions for text in texts]
        gallery = [scene for scene, keep in zip(scenes, rows.tolist(), strict=True) if keep]
        asked = [text for text, keep in zip(captions, kept.tolist(), strict=True) if keep]
        place = rows.cumsum(0) - 1
        found = retrieval_metrics(images[rows], texts[kept], place[image_of_text[kept]])
        metrics[f"t2i_r1_seen{suffix}" if not suffix else f"t2i_r1{suffix}"] = found["t2i_r1"]
        achievable = (1 / shapes.num_true(asked, gallery).float()).mean().item()
        metrics[f"t2i_r1_achievable{suffix}"] = achievable
    return metrics


def _print_metrics(metrics: Metrics, num_pictures: int) -> None:
    print(f"test, {num_pictures:,} pictures")
    for name, value in metrics.items():
        is_share = name.startswith(("i2t_r", "t2i_r", "captions_right")) or name.endswith("accuracy")
        print(f"  {name:28}" + (f"{value:8.1%}" if is_share else f"{value:8.3f}"))
