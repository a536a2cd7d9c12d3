"""The settings of the training loop, and of a run as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diffmoe.config.errors import MAX_SEED, check, check_at_least, check_fraction, check_limits, expand


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The training loop: AdamW or Muon, warm-up, cosine."""

    epochs: int = 10
    """Passes over the training split."""
    batch_size: int = 64
    """Pictures of one forward pass, over all devices."""
    accumulation_steps: int = 1
    """Batches whose gradients are averaged before one optimizer step."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """'muon' moves the layers' weights by orthogonalised momentum (Jordan et al. 2024), which learns in fewer epochs,
    and leaves embeddings, heads, norms and biases to AdamW."""
    lr: float = 0.0005
    """Peak learning rate of AdamW."""
    muon_lr: float = 0.02
    """Peak learning rate of Muon."""
    expert_lr_scale: float = 1.0
    """Learning rate of the routed experts, over that of the rest."""
    expert_sharing: float = 0.0
    """How much of what the other experts of its pool are taught each routed expert learns too: its gradient is its own
    times 1 less this, and this times the sum of all. They start as copies of one, which at 1 they stay; what is their
    own they learn the slower. No effect where a model is dense. 0 is off."""
    weight_decay: float = 0.01
    """Weight decay of matrices; norms, biases and embeddings get none."""
    warmup_fraction: float = 0.05
    """Share of the steps in which the learning rate rises to its peak."""
    final_lr_fraction: float = 0.01
    """Learning rate at the end of the cosine, over the peak."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 is off."""
    ema_decay: float = 0.0
    """Validate and keep a moving average of the weights, of which so much stays with each step, as 0.999; 0 is off."""
    dense_fraction: float = 0.0
    """Share of training, from its start, in which each routed pool is one FFN of one expert's size and cost; then it is
    split into experts that are copies of it, which the router lets become unlike. No effect where a model is dense. 0
    is off."""
    start_size: float = 1.0
    """Size of the pictures in the first half of training, over img_size, to the nearest whole number of patches; 1 is
    off."""
    class_weights: Literal["none", "balanced"] = "none"
    """How much a picture's loss counts: 'none', all the same; 'balanced', by the inverse of how many pictures its class
    has in training, 1 on average, so that rare classes are learned as well as frequent ones. For classes only."""
    label_smoothing: float = 0.1
    """Probability mass spread evenly over the classes in the targets."""
    max_seconds: float = 0.0
    """Stop after this much training time, validation apart, if `epochs` is not over before; the learning rate follows
    whichever of the two is nearer its end. What is learned then depends on the machine's speed, and no run is repeated
    bit for bit. 0 is off."""
    patience: int = 0
    """Stop after this many epochs without a better validation accuracy; 0 is off."""
    seed: int = 0
    """Seed of the weights, the data order, augmentation and dropout."""
    compile: bool = False
    """torch.compile the model: pays on a GPU, not on a CPU."""

    def __post_init__(self) -> None:
        check_limits(self, seed=MAX_SEED, lr=1e30)
        check_at_least(self, 1, "epochs", "batch_size", "accumulation_steps")
        check_at_least(self, 0, "weight_decay", "clip_norm", "patience", "seed", "max_seconds")
        for name in ("lr", "muon_lr", "expert_lr_scale"):
            check(getattr(self, name) > 0, name, getattr(self, name), "over 0")
        check_fraction(self, "warmup_fraction", "ema_decay", "dense_fraction", "label_smoothing")
        check(0 < self.start_size <= 1, "start_size", self.start_size, "over 0 and at most 1")
        for name in ("final_lr_fraction", "expert_sharing"):
            check(0 <= getattr(self, name) <= 1, name, getattr(self, name), "from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run: where it happens and what it writes."""

    preset: str | None = None
    """Model size: tiny, small, base, each also as <size>-dense; None is the dataset's own."""
    init: str | None = None
    """Start for training: a model file of this program, of which all that fits is copied, while the feed-forward layers
    of a dense model become experts; or a CLIP, open_clip:<model>/<tag> or open_clip:<model>/<file of weights>, whose
    text embedding and positions are copied and whose feed-forward layers become experts, where the widths fit."""
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
    """Number format; 'auto' is bf16-mixed on a GPU or processor (AMX) that has it in hardware, else 32-true."""
    tta: Literal["none", "flip", "flip_shift"] = "none"
    """Test-time augmentation, beside the accuracy without: probabilities are averaged over each picture and its mirror,
    and with 'flip_shift' over both shifted by a pixel too. Not where left and right matter, as with digits."""
    resume: bool = False
    """Go on from <save_dir>/<dataset>/last.ckpt."""
    overwrite: bool = False
    """Replace what an earlier run left in save_dir."""

    def __post_init__(self) -> None:
        expand(self, "init", "checkpoint", "save_dir")
        check_limits(self, num_devices=1024)
        check_at_least(self, 1, "num_devices")
        check(not (self.resume and self.overwrite), "resume", True, "given without overwrite")
