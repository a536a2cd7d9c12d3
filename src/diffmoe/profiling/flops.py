"""The hand count: FLOPs of every matrix product and convolution, in closed form from the model's config.

A product (m, k) x (k, n) is 2 m n k, a multiplication and an addition each; a convolution is the product it unrolls
to. Nothing else is counted: norms, activations, softmax, sums and look-ups are a few operations an element, and so are
the products of two vectors. `torch.utils.flop_counter` counts the same by watching the operations run; the tests hold
one against the other.

Shapes: B pictures, N image tokens, U texts, T text tokens, D width, F hidden width, E experts, K chosen, V vocabulary.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import NamedTuple

from diffmoe.config import ModelConfig
from diffmoe.profiling.parts import HEAD, LOSSES, OTHER, Part
from diffmoe.profiling.work import Work


class Flops(NamedTuple):
    """Of one part."""

    forward: int
    backward: int
    """Gradients, and with gradient checkpointing the forward products that are done once more."""
    padding_forward: int = 0
    """Of rows that only fill the experts' products up, over and above `forward`; with a dense model none."""
    padding_backward: int = 0


class _Counter:
    """Adds products up. Backward, each takes as many of its own size as it has operands that need a gradient."""

    def __init__(self, config: ModelConfig, work: Work) -> None:
        self.config, self.work = config, work
        self.found: dict[Part, list[int]] = defaultdict(lambda: [0, 0, 0, 0])

    def add(self, part: Part, flops: int, gradients: int = 2, repeated: bool = False) -> None:
        """`repeated`: in a block, which gradient checkpointing runs once more."""
        again = repeated and self.config.use_gradient_checkpointing
        self.found[part][0] += flops
        self.found[part][1] += (gradients + again) * flops * self.work.training

    def pad(self, part: Part, flops: int) -> None:
        """As a product of a block, of rows that nobody asked for."""
        again = self.config.use_gradient_checkpointing
        self.found[part][2] += flops
        self.found[part][3] += (2 + again) * flops * self.work.training

    def result(self) -> dict[Part, Flops]:
        return {part: Flops(*counts) for part, counts in self.found.items()}


def product(rows: int, inner: int, columns: int) -> int:
    """FLOPs of (rows, inner) x (inner, columns)."""
    return 2 * rows * inner * columns


def count_flops(config: ModelConfig, work: Work) -> dict[Part, Flops]:
    """FLOPs of each part in one step on `work`, all pictures of the batch together."""
    counter = _Counter(config, work)
    width, patches = config.embed_dim, work.pictures * config.num_patches
    _add_patch_embedding(counter)
    for _ in range(config.img_encoder_layers):
        _add_block(counter, "image", work.pictures, config.num_patches, patches)
    if work.texts:
        text_tokens = work.texts * work.text_len
        counter.add(Part("text", "text embedding"), product(text_tokens, config.text_embed_dim, width))
        for _ in range(config.text_encoder_layers):
            _add_block(counter, "text", work.texts, work.text_len, work.real_text_tokens)
        counter.add(HEAD, product(work.texts, width, width))  # the projection to the shared space
    # A picture's projection gets a gradient from the contrastive loss, which needs texts.
    counter.add(HEAD, product(work.pictures, width, width), gradients=2 if work.texts else 0)
    if work.task == "captioner":
        _add_caption_head(counter)
    else:
        _add_class_head(counter)
    if work.texts and (work.training or work.task == "captioner"):
        for _ in range(2):  # the contrastive loss, picture to text and text to picture
            counter.add(LOSSES, product(work.pictures, width, work.texts))
    _add_masked_means(counter)
    hidden = round(config.expansion_factor * width)
    for place, rows in work.padding_rows.items():
        counter.pad(Part(place, "routed experts"), 2 * product(rows, width, hidden))
    return counter.result()


def _add_patch_embedding(counter: _Counter) -> None:
    """No gradient goes to the pictures: the first product needs that of its weights only."""
    config, part = counter.config, Part("image", "patch embedding")
    if config.patch_embed == "linear":
        pixels = config.in_channels * config.patch_size**2
        rows = counter.work.pictures * config.num_patches
        counter.add(part, product(rows, pixels, config.embed_dim), gradients=1)
        return
    for number, (side, width_in, width_out) in enumerate(_stem(config)):
        rows = counter.work.pictures * side**2
        counter.add(part, product(rows, 9 * width_in, width_out), gradients=2 if number else 1)


def _stem(config: ModelConfig) -> list[tuple[int, int, int]]:
    """The 3x3 convolutions of `layers._conv_stem`: side of the picture there, channels in, channels out."""
    halvings = int(math.log2(config.patch_size))
    side, channels, convolutions = config.img_size, config.in_channels, []
    for halving in range(halvings):
        width = max(config.embed_dim >> (halvings - halving), 16)
        convolutions += [(side, channels, width), (side, width, width)]
        side, channels = side // 2, width
    return [*convolutions, (side, channels, config.embed_dim)]


def _add_block(counter: _Counter, place: str, sequences: int, length: int, routed_tokens: int) -> None:
    """`sequences` x `length` tokens, of which the routed pool sees `routed_tokens`, the others being padding."""
    config, tokens = counter.config, sequences * length
    width, hidden = config.embed_dim, round(config.expansion_factor * config.embed_dim)
    _add_attention(counter, Part(place, "attention"), sequences, length, length)
    if config.dense:
        _add_expert(counter, Part(place, "routed experts"), tokens, config.top_k * hidden)
    else:
        _add_router(counter, Part(place, "router"), tokens)
        _add_expert(counter, Part(place, "routed experts"), routed_tokens * config.top_k, hidden)
        _add_dispatch(counter, Part(place, "dispatch"), tokens, hidden)
    last = Part(place, "global expert")
    _add_expert(counter, last, tokens, hidden)
    if config.num_modality_specific_experts > {"image": 0, "text": 1, "fusion": 2}[place]:
        last = Part(place, "modality expert")
        _add_expert(counter, last, tokens, hidden)
    if config.use_gradient_checkpointing and config.dropout == 0:
        # Recomputing stops at the last tensor that the backward pass needs, which is this product's input.
        counter.found[last][1] -= product(tokens, hidden, width) * counter.work.training


def _add_attention(counter: _Counter, part: Part, sequences: int, length: int, context: int) -> None:
    """Query and output on `length` tokens, key and value on `context`, and each query against each key, twice."""
    width = counter.config.embed_dim
    counter.add(part, 2 * product(sequences * length, width, width), repeated=True)
    counter.add(part, product(sequences * context, width, 2 * width), repeated=True)
    scores = product(sequences * length, width, context)
    # A fused kernel keeps no scores: its backward pass computes them once more.
    counter.add(part, scores, gradients=2 + counter.work.fused_attention, repeated=True)
    counter.add(part, scores, repeated=True)


def _add_router(counter: _Counter, part: Part, tokens: int) -> None:
    """Keys times query weights, once; then every token against every expert."""
    config = counter.config
    width, experts = config.embed_dim, config.num_general_experts
    counter.add(part, product(experts, max(min(width, 64), experts), width), repeated=True)
    scores = 1 + (config.router_noise and counter.work.training)
    counter.add(part, scores * product(tokens, width, experts), repeated=True)


def _add_expert(counter: _Counter, part: Part, rows: int, hidden: int) -> None:
    counter.add(part, 2 * product(rows, counter.config.embed_dim, hidden), repeated=True)


def _add_dispatch(counter: _Counter, part: Part, tokens: int, hidden: int) -> None:
    """What the backends `masked` and `grouped` do by products."""
    config, backend = counter.config, counter.work.backends[part.place]
    width, experts, slots = config.embed_dim, config.num_general_experts, config.top_k * tokens
    if backend == "masked":
        counter.add(part, product(tokens * experts, 1, width), repeated=True)
        counter.add(part, product(slots, 1, experts), gradients=1, repeated=True)  # each gate to its expert's column
    if backend == "grouped":
        counter.add(part, product(slots, 1, width), repeated=True)  # a token's experts, weighted and added
        # Each row's own gain, shift and biases.
        counter.add(part, product(slots, experts, 3 * width + hidden), gradients=1, repeated=True)


def _add_masked_means(counter: _Counter) -> None:
    """The means that the routers' losses take over the real tokens are products with a mask, which needs no gradient.

    Of the z-loss and the balance loss, and of what else is switched on; pictures have no padding, and no mask.
    """
    config, work = counter.config, counter.work
    if config.dense:
        return
    experts = config.num_general_experts
    columns = 2 * experts
    for weight, more in (
        (config.router_logit_z_loss_weight, 1),
        (config.switch_loss_weight, experts),
        (config.entropy_local_weight, 1),
        (config.entropy_global_weight, experts),
    ):
        columns += more * (weight > 0)
    blocks = config.text_encoder_layers + (config.fusion_layers if work.task == "captioner" else 0)
    counter.add(LOSSES, blocks * product(1, work.masked_tokens, columns), gradients=1)


def _add_class_head(counter: _Counter) -> None:
    config, work = counter.config, counter.work
    width, length = config.embed_dim, config.num_patches
    if config.classify_with == "descriptions":
        _add_fusion(counter, work.pictures, length, work.classes, work.pictures * length)
    counter.add(HEAD, product(work.pictures, width, config.num_classes))
    # Nothing is learnt from the zero-shot scores.
    counter.add(OTHER, product(work.pictures, width, work.classes), gradients=0)


def _add_caption_head(counter: _Counter) -> None:
    config, work = counter.config, counter.work
    _add_fusion(counter, work.texts, work.text_len, config.num_patches, work.real_text_tokens)
    counter.add(HEAD, product(work.texts * work.text_len, config.embed_dim, config.text_embed_dim))
    counter.add(HEAD, product(work.vocabulary_rows, config.text_embed_dim, work.vocabulary))


def _add_fusion(counter: _Counter, sequences: int, length: int, context: int, routed_tokens: int) -> None:
    for _ in range(counter.config.fusion_layers):
        _add_attention(counter, Part("fusion", "cross-attention"), sequences, length, context)
        _add_block(counter, "fusion", sequences, length, routed_tokens)
