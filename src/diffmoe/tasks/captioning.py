"""The task of captions and retrieval."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from diffmoe.config import VOCAB_SIZE, GenerationConfig, ModelConfig, RunConfig, UserError
from diffmoe.config.settings import Settings
from diffmoe.data import shapes
from diffmoe.data.batches import PictureBatches
from diffmoe.data.captions import CaptionBatches, CaptionSplit, caption_tokens, used_tokens
from diffmoe.data.loading import Dataset
from diffmoe.data.pictures import LazyImages, PictureSpec
from diffmoe.data.text import detokenize, tokenize
from diffmoe.evaluation.captions import caption_metrics, missing_metrics, normalize_captions
from diffmoe.evaluation.passes import Autocast, Kept, Scores, run_over
from diffmoe.evaluation.retrieval import retrieval_metrics
from diffmoe.files import as_json
from diffmoe.model.captioner import Captioner, text_router
from diffmoe.model.layers import evaluating
from diffmoe.model.outputs import TextFeatures
from diffmoe.tasks.base import Metrics, Runtime, Task, Tested

log = logging.getLogger(__name__)

FILE = "captions.json"
"""The captions that were written, in the folder for pictures."""
SHEET = 12
"""Pictures on the sheet of captions."""
AT_ONCE = 100
"""Pictures whose captions are written together."""


class Captioning(Task):
    """Pictures with captions: a language model that reads the picture, and an embedding of each to find the other."""

    data_kind = "captions"
    head = Captioner
    curve = "Next-token accuracy"
    sections = (
        *("caption_scores", "training_curves", "caption_sheet", "retrieval", "utilization", "load_over_time"),
        *("routing_maps", "favourite_patches", "coactivation", "router_confidence", "attention_maps"),
        *("attention_rollout", "word_maps", "without_experts"),
    )

    def check(self, settings: Settings) -> None:
        """The text must read the picture."""
        super().check(settings)
        config = settings.model
        for name in ("mixup", "cutmix"):
            if (value := getattr(settings.data, name)) > 0:
                raise UserError(f"{name} is {value}: it mixes the labels of pictures, and captions cannot be mixed")
        if (weight := config.router_guidance_weight) > 0:
            raise UserError(f"router_guidance_weight is {weight}: it guides by classes, and captions have none; give 0")
        if (weights := settings.training.class_weights) != "none":
            raise UserError(f"class_weights is {weights!r}: captions have no classes; give none")
        if config.fusion_layers < 1:
            raise UserError("fusion_layers is 0: captions need at least 1, in which the text reads the picture")

    def notes(self, config: ModelConfig) -> list[str]:
        """Also where only the image tower has the router that was asked for."""
        notes = super().notes(config)
        if (used := text_router(config)) != config.router:
            notes.append(
                f"router {config.router!r} is the image tower's alone: it would see a caption's future, so texts and "
                f"the fusion have {used!r}"
            )
        return notes

    def build(self, settings: Settings, data: Dataset) -> Captioner:
        """It can write the tokens of the training captions."""
        tokens, mask, _ = caption_tokens(data.train, settings.model.max_text_len)
        return Captioner(settings.model, used_tokens(tokens, mask))

    def made_up(self, settings: Settings) -> Captioner:
        """It can write every token."""
        return Captioner(settings.model, torch.arange(VOCAB_SIZE))

    def noise(self, model: Any, batch_size: int) -> Sequence[Tensor]:
        """Captions of random words, as long as they may be."""
        config = model.config
        images = torch.randn(batch_size, config.in_channels, config.img_size, config.img_size)
        columns = torch.randint(len(model.output_tokens), (batch_size, config.max_text_len))
        tokens = model.output_tokens.cpu()[columns]
        return images, tokens, torch.ones_like(tokens)

    def batches(
        self, model: ModelConfig, split: CaptionSplit, picture: PictureSpec, batch_size: int, **options: Any
    ) -> CaptionBatches:
        """Each picture with one caption; in evaluation its first."""
        return CaptionBatches(split, batch_size, max_text_len=model.max_text_len, picture=picture, **options)

    def validate(self, model: Any, batches: PictureBatches[CaptionSplit], autocast: Autocast = nullcontext) -> Metrics:
        """Next-token loss and accuracy of each picture's first caption, and retrieval among these."""
        scores, pairs = Scores(model), Kept(lambda _, output: (output.image.embedding, output.text.embedding))
        run_over(model, batches.epoch(), scores.add, pairs.add, autocast=autocast)
        images, texts = pairs.tensors()
        found = retrieval_metrics(images, texts, torch.arange(len(images)))
        return {
            "val_loss": scores.loss,
            "val_accuracy": scores.accuracy,
            "val_i2t_r1": found["i2t_r1"],
            "val_t2i_r1": found["t2i_r1"],
        }

    def test(self, model: Any, data: Dataset, runtime: Runtime, settings: Settings, temperature: float = 1.0) -> Tested:
        """Captions of all pictures, and retrieval both ways over all captions."""
        from diffmoe.visualization import captions as drawn

        split: CaptionSplit = data.test
        written = write_captions(
            model, split.images, data.picture, settings.generation, settings.training.seed, runtime.autocast
        )
        images, texts, image_of_text = embed(model, split, data.picture, runtime)
        scores = self.validate(model, self.in_order(model.config, split, data.picture, runtime), runtime.autocast)
        metrics = {name.replace("val_", "test_"): value for name, value in scores.items() if "_r1" not in name}
        metrics |= score_captions(written, split.captions) | retrieval_metrics(images, texts, image_of_text)
        if split.held_out is not None:
            metrics |= _shapes_metrics(written, split, images, texts, image_of_text)
        shown = self.examples(split, SHEET)
        best = (images @ texts[0]).topk(min(8, len(images)))
        figures = {
            "captions": sheet(split, shown, [written[row] for row in shown.tolist()]),
            "retrieval": drawn.retrieval_grid(
                split.captions[0][0], split.images[best.indices], best.values, best.indices == 0
            ),
        }
        return Tested(metrics, figures, {FILE: captions_as_text(range(len(written)), written, split.captions)})

    def report_lines(self, metrics: Mapping[str, Any], data: Dataset) -> list[str]:
        from diffmoe.visualization.captions import caption_scores

        return [f"  {name:34}{value:>8}" for name, value in caption_scores(metrics).values()]

    def check_test(self, run: RunConfig, folder: Path) -> None:
        """A caption has no mean over views; and `captions.json`."""
        if run.tta != "none":
            raise UserError(f"tta is {run.tta!r}: it averages the probabilities of classes; with captions it is 'none'")
        check_captions_file(folder / FILE, run.overwrite)

    def classify(self, model: Captioner, pictures: Tensor, classes: TextFeatures | None, temperature: float) -> Tensor:
        """It cannot."""
        raise UserError("this model has no classes: it writes captions, and compares pictures with texts")

    def caption(self, model: Captioner, pictures: Tensor, config: GenerationConfig, seed: int) -> list[str]:
        return detokenize(model.generate(pictures, config, seed=seed).cpu())

    def compare(
        self, model: Captioner, pictures: Tensor, text: str, classes: TextFeatures | None, temperature: float
    ) -> list[dict[str, object]]:
        """`log_probability` of the text as a caption."""
        longest = model.config.max_text_len
        tokens, mask = (t.to(pictures.device) for t in tokenize([text], longest))
        if not torch.isin(tokens[0, 1:], model.output_tokens).all():
            # Their probability is 0: left out, they would make the rest look likelier.
            can_write, words = set(model.output_tokens.tolist()), dict.fromkeys(detokenize(tokens)[0].split())
            missing = [word for word in words if not can_write.issuperset(tokenize([word], longest)[0][0, 1:].tolist())]
            return [{"log_probability": None, "cannot_write": missing} for _ in pictures]
        scores = [model.score(batch, model.run(batch)) for batch in ((p[None], tokens, mask) for p in pictures)]
        return [{"log_probability": -float(score.loss)} for score in scores]

    def answered(self, model: Captioner, pictures: Tensor, config: GenerationConfig) -> Sequence[Tensor]:
        """With the captions that the model writes."""
        tokens = model.generate(pictures, config)
        return pictures, tokens, torch.ones_like(tokens)

    def examples(self, split: CaptionSplit, count: int) -> Tensor:
        """Evenly spaced: those of a kind may stand together, as what is held out of shapes does."""
        count = min(count, len(split))
        return torch.arange(count) * len(split) // count


def sheet(split: CaptionSplit, rows: Tensor, written: Sequence[str]) -> Figure:
    """The pictures at `rows` over what was written of them, a reference of each, and whether its pair is new."""
    from diffmoe.visualization import captions as drawn

    references = [split.captions[row][0] for row in rows.tolist()]
    new = None if split.held_out is None else split.held_out[rows].tolist()
    return drawn.caption_sheet(split.images[rows], written, references, new)


def write_captions(
    model: Captioner,
    images: Tensor | LazyImages,
    picture: PictureSpec,
    config: GenerationConfig,
    seed: int,
    autocast: Autocast = nullcontext,
) -> list[str]:
    """A caption for each of N pictures, uint8 (N, C, H, W) in memory or decoded on demand."""
    device = next(model.parameters()).device
    captions: list[str] = []
    for rows in tqdm(torch.arange(len(images)).split(AT_ONCE), "writing captions", leave=False, disable=None):
        pictures = picture.normalize(images[rows].to(device))
        with autocast():
            captions += detokenize(model.generate(pictures, config, seed=seed + len(captions)).cpu())
    return captions


def embed(
    model: Captioner, split: CaptionSplit, picture: PictureSpec, runtime: Runtime
) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings of all pictures (I, D) and all captions (T, D) of a split, and each caption's picture (T,)."""
    tokens, mask, image_of_text = caption_tokens(split, model.config.max_text_len)
    batches = Captioning().in_order(model.config, split, picture, runtime)
    size = picture.evaluation_batch
    with evaluating(model), torch.inference_mode(), runtime.autocast():
        images = [model.backbone.encode_image(batch.images).cpu() for batch in batches.epoch()]
        pairs = zip(tokens.split(size), mask.split(size), strict=True)
        texts = [model.backbone.encode_text(t.to(runtime.device), m.to(runtime.device)).cpu() for t, m in pairs]
    return torch.cat(images).float(), torch.cat(texts).float(), image_of_text


def score_captions(written: Sequence[str], references: Sequence[Sequence[str]]) -> Metrics:
    """BLEU, ROUGE-L, CIDEr-D, and METEOR where Java is there, of normalised texts; says what cannot be computed."""
    try:
        metrics = caption_metrics(normalize_captions(written), [normalize_captions(texts) for texts in references])
    except UserError as error:  # the extra is not installed: retrieval and loss are still worth having
        log.warning("note: %s", error)
        return {}
    for name, reason in missing_metrics().items():
        log.warning("note: %s is left out: %s", name, reason)
    return metrics


def captions_as_text(
    names: Sequence[Any], written: Sequence[str], references: Sequence[Sequence[str]] | None = None
) -> str:
    """A JSON list of {image, caption} and, where there are any, the human captions."""
    rows = [{"image": name, "caption": caption} for name, caption in zip(names, written, strict=True)]
    if references is not None:
        rows = [{**row, "references": list(texts)} for row, texts in zip(rows, references, strict=True)]
    return as_json(rows, indent=1)


def check_captions_file(path: Path, overwrite: bool) -> None:
    """Raises `UserError` where `path` is a file that this program did not write, unless told to `overwrite`."""
    if path.exists() and not overwrite and not is_captions_file(path):
        raise UserError(f"{path} is not one that this program wrote: give another --output_dir or --overwrite")


def is_captions_file(path: Path) -> bool:
    """Whether a file is as `captions_as_text` writes it: rows with its keys and no others, in its very layout."""
    try:
        text = path.read_text(encoding="utf-8")
        rows = json.loads(text)
    except (OSError, ValueError):
        return False
    keys = (["image", "caption"], ["image", "caption", "references"])
    known = isinstance(rows, list) and all(isinstance(row, dict) and list(row) in keys for row in rows)
    return known and text == as_json(rows, indent=1)


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
