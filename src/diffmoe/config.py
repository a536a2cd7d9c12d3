"""Every setting of the program, once: six frozen dataclasses whose field docstrings are the command line's help.

Layers, each over the one before: the defaults below, the preset (`configs/presets.yaml`), the dataset's recipe
(`configs/<dataset>.yaml`), the user's own YAML (`--config`), the flags.

This file imports nothing heavy, so that `diffmoe --help` answers at once.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

EMBEDDED_DATASETS = ("digits", "shapes")
"""Sets that need no download: scikit-learn's digits, and captioned shapes that the program draws."""

HUB_DATASETS = {
    "cifar10": "uoft-cs/cifar10",
    "fashion_mnist": "zalando-datasets/fashion_mnist",
    "flickr8k": "jxie/flickr8k",
}
"""Sets with a name of their own here, and the hub repository that holds each."""


MAX_SEED = 2**63 - 1
"""The largest whole number that torch takes."""


class UserError(ValueError):
    """A mistake of the user's, in one line: what is wrong and what would be right. The command line exits with 2."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a mistyped name: ` (did you mean 'top_k'?)`, or an empty string when nothing is close."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean '{match[0]}'?)" if match else ""


def _check(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise UserError(f"{name} is {value!r}: it must be {expected}")


def _check_at_least(config: Any, minimum: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _check(value >= minimum, name, value, f"at least {minimum}")


def _check_at_most(config: Any, maximum: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _check(value <= maximum, name, value, f"at most {maximum}")


def _check_fraction(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _check(0 <= value < 1, name, value, "from 0 up to, but not including, 1")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model. The defaults are the preset `base`."""

    img_size: int = 28
    """Height and width of the pictures, in pixels."""
    patch_size: int = 4
    """Height and width of a patch, in pixels; it must divide img_size."""
    in_channels: int = 1
    """Channels of the pictures: 1 grey, 3 colour."""
    patch_embed: Literal["linear", "conv"] = "linear"
    """How a patch becomes a vector: 'linear' is ViT's one projection; 'conv' a stack of 3x3 convolutions (Xiao et al.
    2021), which learns far faster on small data."""
    embed_dim: int = 512
    """Width of every token, D; num_heads must divide it."""
    num_heads: int = 8
    """Attention heads of every block."""
    img_encoder_layers: int = 6
    """Blocks of the image tower."""
    text_encoder_layers: int = 4
    """Blocks of the text tower."""
    fusion_layers: int = 3
    """Layers of the cross-modal fusion; 0 leaves it out."""
    num_general_experts: int = 4
    """Experts in each block's routed pool, E."""
    num_modality_specific_experts: int = 2
    """How many modalities have an expert of their own: 0 none, 1 vision, 2 vision and text."""
    top_k: int = 2
    """Routed experts for each token, K."""
    expansion_factor: float = 4
    """Hidden width of every expert over embed_dim."""
    dense: bool = False
    """Replace each routed pool by one expert that is top_k times as wide: the same active compute, no routing."""
    router_noise: bool = False
    """Learned noise on the router's scores in training (Shazeer et al. 2017, eq. 4)."""
    num_classes: int = 10
    """Classes of the head; taken from the dataset on the command line."""
    classify_with: Literal["image", "descriptions"] = "image"
    """What the class is read from: 'image', the picture alone; 'descriptions', the picture fused with the descriptions
    of all classes, the same for every picture."""
    dropout: float = 0.2
    """Dropout probability in the experts and after attention."""
    activation: Literal["gelu", "relu", "silu"] = "gelu"
    """Activation of every expert."""
    layer_norm_eps: float = 1e-5
    """Epsilon of every LayerNorm."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    position_range: float = 0.02
    """Standard deviation of the initial positions of the patches: a larger one tells a model early where things are."""
    use_gradient_checkpointing: bool = True
    """Recompute each block in the backward pass: less memory, about a third more time."""
    expert_backend: Literal["auto", "sorted", "padded", "grouped", "masked"] = "auto"
    """How tokens get to their routed experts; 'auto' is the fastest by device, number format and number of tokens."""
    attention: Literal["auto", "explicit", "fused"] = "auto"
    """Attention kernel: 'explicit' softmax, torch's 'fused' one, or 'auto', by device and number of queries."""
    vocab_size: int = 50000
    """Rows of the text embedding; the CLIP tokenizer needs 49408."""
    max_text_len: int = 32
    """Longest text in tokens, start and end included."""
    text_embed_dim: int = 128
    """Width of the text embedding before it is projected to embed_dim."""
    router_z_loss_weight: float = 0.001
    """Weight of the router's z-loss, E * mean(p_e^2)."""
    router_balance_loss_weight: float = 0.01
    """Weight of the load-balancing loss, KL(load || uniform)."""
    cross_modal_alignment_weight: float = 0.1
    """Weight of the alignment loss, -cos(picture, text)."""
    contrastive_loss_weight: float = 0.1
    """Weight of the contrastive loss (InfoNCE)."""
    router_logit_z_loss_weight: float = 0.0
    """Weight of ST-MoE's z-loss on the router's logits, mean(logsumexp^2); off by default."""
    switch_loss_weight: float = 0.0
    """Weight of Switch Transformer's balance loss, E * sum(f_e * P_e); off by default."""
    entropy_local_weight: float = 0.0
    """Weight of LIMoE's local entropy loss, one for each modality; off by default."""
    entropy_global_weight: float = 0.0
    """Weight of LIMoE's global entropy loss, one for each modality; off by default."""
    balance_bias_rate: float = 0.0
    """Step of the loss-free balancing bias (DeepSeek-V3); 0 is off."""

    def __post_init__(self) -> None:
        _check_at_least(
            self, 1, "img_size", "patch_size", "in_channels", "embed_dim", "num_heads", "img_encoder_layers"
        )
        _check_at_least(
            self,
            1,
            "text_encoder_layers",
            "num_general_experts",
            "top_k",
            "num_classes",
            "vocab_size",
            "text_embed_dim",
        )
        _check_at_least(self, 0, "fusion_layers", "initializer_range", "position_range", "balance_bias_rate")
        _check_at_least(self, 3, "max_text_len")
        _check_fraction(self, "dropout")
        _check(0 < self.expansion_factor < float("inf"), "expansion_factor", self.expansion_factor, "over 0 and finite")
        hidden = round(self.expansion_factor * self.embed_dim)
        _check(hidden >= 1, "expansion_factor", self.expansion_factor, "at least 1 / embed_dim: one hidden unit")
        _check(self.layer_norm_eps > 0, "layer_norm_eps", self.layer_norm_eps, "over 0")
        _check(
            0 <= self.num_modality_specific_experts <= 2,
            "num_modality_specific_experts",
            self.num_modality_specific_experts,
            "0, 1 or 2",
        )
        _check(
            self.embed_dim % self.num_heads == 0,
            "embed_dim",
            self.embed_dim,
            f"a multiple of num_heads ({self.num_heads})",
        )
        _check(
            self.top_k <= self.num_general_experts,
            "top_k",
            self.top_k,
            f"at most num_general_experts ({self.num_general_experts})",
        )
        _check(
            self.img_size % self.patch_size == 0,
            "img_size",
            self.img_size,
            f"a multiple of patch_size ({self.patch_size})",
        )
        if self.patch_embed == "conv":
            power_of_two = self.patch_size & (self.patch_size - 1) == 0
            _check(power_of_two, "patch_size", self.patch_size, "a power of two with patch_embed 'conv'")
        if self.classify_with == "descriptions":
            _check(
                self.fusion_layers > 0,
                "fusion_layers",
                self.fusion_layers,
                "at least 1 with classify_with 'descriptions'",
            )
        for field in dataclasses.fields(self):
            if field.name.endswith("_weight"):
                _check_at_least(self, 0, field.name)

    @property
    def num_patches(self) -> int:
        """Image tokens of a picture of img_size, N."""
        return (self.img_size // self.patch_size) ** 2


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The pictures: where they come from, how they are split and augmented."""

    dataset: str = "digits"
    """digits, shapes, fashion_mnist, cifar10, flickr8k, a folder DIR/train/<class>/*.jpg or with a captions table,
    or a hub name such as owner/name."""
    data_dir: str | None = None
    """Folder that holds <dataset>/*.parquet, <dataset>/train/<class>/* or a captions table, or is that folder; without
    it the set comes from the hub. A set of your own in it may be called digits or shapes."""
    val_fraction: float = 0.1
    """Share of train held out for validation, by class, where the set has no validation split."""
    test_fraction: float = 0.2
    """Share held out for testing, by class, where the set has no test split."""
    split_seed: int = 0
    """Seed of those splits; apart from `seed`, so that no run trains on what another one tests."""
    crop_padding: int = 0
    """Augmentation: random crop after reflecting this many pixels at each edge; 0 is off."""
    flip: bool = False
    """Augmentation: mirror half of the pictures left to right."""
    erase: float = 0.0
    """Augmentation: probability that a random rectangle of a picture is blanked."""
    max_memory_gb: float = 4.0
    """A set larger than this, as uint8, is read in worker processes instead of being held in memory."""
    num_workers: int = 2
    """Worker processes for a set that is not held in memory."""

    def __post_init__(self) -> None:
        _check_fraction(self, "val_fraction", "test_fraction", "erase")
        _check(self.val_fraction > 0, "val_fraction", self.val_fraction, "over 0")
        _check(self.test_fraction > 0, "test_fraction", self.test_fraction, "over 0")
        _check_at_least(self, 0, "crop_padding", "max_memory_gb", "num_workers", "split_seed")
        _check_at_most(self, MAX_SEED, "split_seed")

    @property
    def built_in(self) -> bool:
        """Whether the program brings the set: what `data_dir` holds is the user's own, whatever it is called."""
        return self.dataset in EMBEDDED_DATASETS and self.data_dir is None


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The training loop: AdamW, warm-up, cosine."""

    epochs: int = 10
    """Passes over the training split."""
    batch_size: int = 64
    """Pictures of one forward pass, over all devices."""
    accumulation_steps: int = 1
    """Batches whose gradients are averaged before one optimizer step."""
    lr: float = 0.0005
    """Peak learning rate."""
    weight_decay: float = 0.01
    """AdamW's weight decay; norms, biases and embeddings get none."""
    warmup_fraction: float = 0.05
    """Share of the steps in which the learning rate rises to its peak."""
    final_lr_fraction: float = 0.01
    """Learning rate at the end of the cosine, over the peak."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 is off."""
    label_smoothing: float = 0.1
    """Probability mass spread evenly over the classes in the targets."""
    patience: int = 0
    """Stop after this many epochs without a better validation accuracy; 0 is off."""
    seed: int = 0
    """Seed of the weights, the data order, augmentation and dropout."""
    compile: bool = False
    """torch.compile the model: pays on a GPU, not on a CPU."""

    def __post_init__(self) -> None:
        _check_at_least(self, 1, "epochs", "batch_size", "accumulation_steps")
        _check_at_least(self, 0, "weight_decay", "clip_norm", "patience", "seed")
        _check_at_most(self, MAX_SEED, "seed", "batch_size")
        _check(0 < self.lr < float("inf"), "lr", self.lr, "over 0 and finite")
        _check_fraction(self, "warmup_fraction", "label_smoothing")
        _check(0 <= self.final_lr_fraction <= 1, "final_lr_fraction", self.final_lr_fraction, "from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run: where it happens and what it writes."""

    preset: str | None = None
    """Model size: tiny, small, base, each also as <size>-dense; None is the dataset's own."""
    init: str | None = None
    """Pretrained start for training: open_clip:<model>/<tag>, or open_clip:<model>/<file of weights>. CLIP's text
    embedding and positions are copied and its feed-forward layers become experts, where the widths fit."""
    checkpoint: str | None = None
    """Model file to test; None is <save_dir>/<dataset>_model.pth."""
    save_dir: str = "checkpoints"
    """Training writes <save_dir>/<dataset>_model.pth and <save_dir>/<dataset>/."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""
    num_devices: int = 1
    """Devices (processes) to train on."""
    strategy: Literal["auto", "ddp"] = "auto"
    """How several devices share the work; 'auto' is ddp where there are several."""
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    """Number format; 'auto' is bf16-mixed on a GPU that has it, else 32-true."""
    resume: bool = False
    """Go on from <save_dir>/<dataset>/last.ckpt."""
    overwrite: bool = False
    """Replace what an earlier run left in save_dir."""

    def __post_init__(self) -> None:
        _check_at_least(self, 1, "num_devices")
        _check(not (self.resume and self.overwrite), "resume", True, "given without overwrite")


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How captions are written."""

    decoding: Literal["greedy", "beam", "sample"] = "beam"
    """'greedy' takes the likeliest token each time, 'beam' keeps the `beams` likeliest captions, 'sample' draws."""
    beams: int = 4
    """Captions that a beam search keeps."""
    length_penalty: float = 1.0
    """A finished beam's log-probability is divided by its length to this power: over 0 favours longer captions."""
    no_repeat_ngram: int = 3
    """No run of so many tokens comes twice in a caption; 0 is off."""
    min_caption_len: int = 0
    """A caption has at least so many tokens between its start and its end."""
    temperature: float = 1.0
    """With 'sample': logits are divided by it, so that under 1 is safer and over 1 more varied."""
    sample_top_k: int = 0
    """With 'sample': only the so many likeliest tokens are drawn; 0 is all."""
    sample_top_p: float = 1.0
    """With 'sample': only the likeliest tokens that have this much probability together are drawn; 1 is all."""

    def __post_init__(self) -> None:
        _check_at_least(self, 1, "beams")
        _check_at_least(self, 0, "no_repeat_ngram", "min_caption_len", "sample_top_k", "length_penalty")
        _check(0 < self.temperature < float("inf"), "temperature", self.temperature, "over 0 and finite")
        _check(0 < self.sample_top_p <= 1, "sample_top_p", self.sample_top_p, "over 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class VisualizationConfig:
    """The pictures that a run draws."""

    output_dir: str = "visualizations"
    """Folder for pictures and reports."""
    figure_format: Literal["png", "svg", "pdf"] = "png"
    """File format of the figures."""
    dpi: int = 150
    """Dots per inch of pictures that are not vector graphics."""
    examples: int = 24
    """Pictures in the grid of predictions, half of them wrong where there are enough."""
    weakest_classes: int = 50
    """The by-class figure shows at most so many classes, the worst ones."""

    def __post_init__(self) -> None:
        _check_at_least(self, 30, "dpi")
        _check_at_least(self, 1, "examples", "weakest_classes")


def dataset_name(dataset: str) -> str:
    """The name that a set's files get: its own, or the last part of a path or hub name."""
    return Path(dataset).name or "data"
