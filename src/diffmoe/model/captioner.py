"""The captioning head: a language model over the text tower, whose tokens read the picture.

Shapes: B pictures, T text tokens, N image tokens, D width, P width of the text embedding, V tokens that can be written,
R captions being written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmoe.config import END_ID, START_ID, GenerationConfig, ModelConfig, UserError, nearest
from diffmoe.model.generation import Generated, check_generation, search
from diffmoe.model.heads import Head, Score
from diffmoe.model.layers import evaluating
from diffmoe.model.multimodal import MultiModalMoE
from diffmoe.model.outputs import CaptionerOutput, TextFeatures
from diffmoe.model.routers import router_kind
from diffmoe.model.sequence import CaptionCache, Context, TokenSequence

PADDING_ID = 0
ROWS_MULTIPLE = 64
"""Products over the vocabulary get a multiple of so many rows: oneDNN builds a kernel for every new shape."""


def text_router(config: ModelConfig) -> str:
    """The router of a captioner's text tower and fusion: the config's, or the attentive one where that would look at
    tokens that are not written yet. Raises `UserError` where there is no router so called.
    """
    return config.router if config.dense or router_kind(config.router).causal else "attentive"


class Captioner(Head):
    """Image captioner: the causal text tower, fused with the picture, to a language-model head tied to the embedding.

    A token never sees the future: the fusion's context is the image tower's output, which never reads the text, and a
    router that looks at all tokens at once is the image tower's alone (`text_router`).

        model = Captioner(ModelConfig(img_size=64, in_channels=3))
        model.generate(images, decoding="beam", beams=4)   # (B, T) int64: start, words, end, zeros

    Args:
        config: the model's; fusion_layers >= 1.
        output_tokens: (V,) int64, rising: the ids that can be written, such as those that occur in the training
            captions; other targets have no part in the loss. None: the whole vocabulary.

    Raises:
        ValueError: without a fusion, or where output_tokens are not what they must be.
        UserError: where there is no router so called.
    """

    kind = "captioner"
    decides_in = frozenset({"image", "text", "fusion"})

    output_tokens: Tensor
    _column: Tensor

    def __init__(self, config: ModelConfig, output_tokens: Tensor | None = None) -> None:
        super().__init__()
        if config.fusion_layers < 1:
            raise ValueError("fusion_layers is 0: a captioner needs at least 1, in which the text reads the picture")
        if output_tokens is None:
            output_tokens = torch.arange(config.vocab_size)
        _check_output_tokens(output_tokens, config.vocab_size)
        self.config = config
        self.backbone = MultiModalMoE(config, text_router(config))
        self.output_projection = nn.Linear(config.embed_dim, config.text_embed_dim)
        # Features of unit variance, so that the tied embedding alone sets the scale of the logits.
        nn.init.normal_(self.output_projection.weight, std=config.embed_dim**-0.5)
        nn.init.zeros_(self.output_projection.bias)
        self.output_bias = nn.Parameter(torch.zeros(len(output_tokens)))
        self.register_buffer("output_tokens", output_tokens.clone())
        column = torch.full((config.vocab_size,), -1).index_copy_(0, output_tokens, torch.arange(len(output_tokens)))
        self.register_buffer("_column", column, persistent=False)  # (vocab_size,) of each id in the logits; -1: none

    def forward(
        self,
        images: Tensor,
        text_tokens: Tensor,
        attention_mask: Tensor | None = None,
        need_weights: bool = False,
        need_logits: bool = True,
    ) -> dict[str, Any]:
        """As `read` with its losses, as a dict: what `MultiModalMoE` returns, with embedding (B, D) the picture's
        pooled features (no text in them), fused_features (B, T, D) the caption's tokens after reading the picture,
        caption_features (B, T, P) and logits (B, T, V), at t those of token t + 1; column v is for output_tokens[v].
        """
        return self.read(images, text_tokens, attention_mask, need_weights, need_logits, need_losses=True).as_dict()

    def read(
        self,
        images: Tensor,
        text_tokens: Tensor,
        attention_mask: Tensor | None = None,
        need_weights: bool = False,
        need_logits: bool = False,
        need_losses: bool = False,
    ) -> CaptionerOutput:
        """Pictures, each with its own text.

        Args:
            images: (B, C, H, W) float, normalised.
            text_tokens: (B, T) int64, row b the caption of picture b, start and end included.
            attention_mask: (B, T), 1 at real tokens; None when all are.
            need_weights: also return the attention maps.
            need_logits: also compute the logits; `caption_loss` needs none, and computes fewer.
            need_losses: also compute the model's own losses.
        """
        image = self.backbone.image_features(images, need_weights)
        text = self.backbone.text_features(text_tokens, attention_mask, need_weights)
        query = TokenSequence(text.features, text.mask, causal=True)
        fused = self.backbone.fuse(query, Context(image.features), need_weights)
        features = self.output_projection(fused.features)
        out = CaptionerOutput(
            embedding=image.pooled,
            image=image,
            text=text,
            fused=fused,
            caption_features=features,
            logits=self.logits(features) if need_logits else None,
        )
        if not need_losses:
            return out
        return dataclasses.replace(out, losses=self.backbone.losses(out.routing, image, text, paired=True))

    def output_embedding(self) -> Tensor:
        """(V, P), the rows of the text embedding that captions are written with."""
        embedding = self.backbone.token_embedding.weight
        if len(self.output_tokens) < len(embedding):
            return embedding.index_select(0, self.output_tokens)
        return embedding

    def logits(self, caption_features: Tensor, output_embedding: Tensor | None = None) -> Tensor:
        """(..., P) -> (..., V); the embedding of all tokens to write may be handed in, to gather it once only."""
        embedding = self.output_embedding() if output_embedding is None else output_embedding
        # Added in place: F.linear would begin with a copy of the bias for every row, V columns wide.
        return F.linear(caption_features.to(embedding.dtype), embedding).add_(self.output_bias)

    @classmethod
    def restore(cls, config: ModelConfig, state: Mapping[str, Tensor]) -> Self:
        return cls(config, state["output_tokens"])

    def like(self, config: ModelConfig) -> Self:
        return type(self)(config, self.output_tokens.cpu())

    def run(
        self,
        batch: Sequence[Tensor],
        *,
        classes: TextFeatures | None = None,
        need_weights: bool = False,
        need_losses: bool = False,
    ) -> CaptionerOutput:
        """Pictures (B, C, H, W), their captions (B, T) int64 and the captions' mask (B, T)."""
        images, tokens, mask = batch
        return self.read(images, tokens, mask, need_weights=need_weights, need_losses=need_losses)

    def answer(self, batch: Sequence[Tensor], *, classes: TextFeatures | None = None) -> CaptionerOutput:
        """As `Head` says: with the logits of all tokens."""
        images, tokens, mask = batch
        return self.read(images, tokens, mask, need_logits=True)

    def num_targets(self, batch: Sequence[Tensor]) -> Tensor:
        """Tokens that come next and can be written, the captions' ends among them: int64 scalar."""
        _, tokens, mask = batch
        return (self._targets(tokens, mask) >= 0).sum()

    def score(self, batch: Sequence[Tensor], output: CaptionerOutput, label_smoothing: float = 0.0) -> Score:
        """Of the next token; as `caption_loss`."""
        _, tokens, mask = batch
        return self.caption_loss(output.caption_features, tokens, mask, label_smoothing)

    def _targets(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """(B, T - 1) columns of the tokens that come next; -1 where there is none, or none that can be written."""
        targets = self._column[tokens[:, 1:]]
        return targets if mask is None else targets.masked_fill(~mask[:, 1:].bool(), -1)

    def caption_loss(
        self, features: Tensor, tokens: Tensor, mask: Tensor | None = None, label_smoothing: float = 0.0
    ) -> Score:
        """Cross-entropy of the next token, and its accuracy: means over real targets, the end included.

        Args:
            features: (B, T, P), `forward`'s caption_features.
            tokens: (B, T) int64.
            mask: (B, T), 1 at real tokens; None when all are.
            label_smoothing: probability mass spread evenly over the V tokens.
        """
        targets = self._targets(tokens, mask).flatten()
        # The product with V rows is half of all the work: only where there is a target.
        rows = (targets >= 0).nonzero().squeeze(1)
        padding = -len(rows) % ROWS_MULTIPLE
        targets = F.pad(targets[rows], (0, padding), value=-1)
        logits = self.logits(features[:, :-1].flatten(0, 1)[F.pad(rows, (0, padding))]).float()
        count = max(len(rows), 1)
        loss = F.cross_entropy(logits, targets, ignore_index=-1, label_smoothing=label_smoothing, reduction="sum")
        return Score(loss / count, (logits.argmax(-1) == targets).sum() / count, len(rows))

    def generate(
        self,
        images: Tensor,
        config: GenerationConfig | None = None,
        *,
        seed: int = 0,
        use_cache: bool = True,
        **fields: Any,
    ) -> Tensor:
        """Write a caption for each picture.

        Args:
            images: (B, C, H, W) float, normalised.
            config: how; None is `GenerationConfig()`.
            seed: with decoding 'sample': picture b draws from a generator of its own, seeded with seed + b.
            use_cache: keep keys and values from token to token; without, the same captions, slower.
            fields: fields of `GenerationConfig` to change, as in `generate(images, decoding="beam", beams=4)`.

        Returns:
            (B, T) int64, T <= max_text_len: START_ID, the caption, END_ID, then zeros. A picture's caption does not
            depend on its batch-mates, rounding apart.

        Raises:
            UserError: where a setting is unknown or impossible, or the model cannot write the tokenizer's end token.
        """
        return self.generate_scored(images, config, seed=seed, use_cache=use_cache, **fields).tokens

    def generate_scored(
        self,
        images: Tensor,
        config: GenerationConfig | None = None,
        *,
        seed: int = 0,
        use_cache: bool = True,
        **fields: Any,
    ) -> Generated:
        """As `generate`, with the captions' log-probabilities."""
        config = _with_fields(config or GenerationConfig(), fields)
        check_generation(config, self.config.max_text_len)
        end = self._end_column()
        with evaluating(self), torch.inference_mode():
            decoder = _Decoder(self, self.backbone.image_features(images).features, use_cache)
            found = search(decoder, len(images), end, self.config.max_text_len - 1, config, seed, images.device)
            words = self.output_tokens[found.tokens.clamp_min(0)].masked_fill(found.tokens < 0, PADDING_ID)
            tokens = F.pad(words, (1, 0), value=START_ID)
        # Ordinary tensors: those of inference mode may not be changed outside of it.
        return Generated(tokens.clone(), found.log_probs.clone(), found.scores.clone())

    def _end_column(self) -> int:
        end = int(self._column[END_ID]) if len(self._column) > END_ID else -1
        if end < 0:
            raise UserError(
                f"this model cannot end a caption: the end token {END_ID} is not among its {len(self.output_tokens)} "
                f"output_tokens (vocab_size {self.config.vocab_size})"
            )
        return end

    def next_log_probs(
        self,
        tokens: Tensor,
        context: Context,
        cache: CaptionCache | None = None,
        output_embedding: Tensor | None = None,
    ) -> Tensor:
        """Log-probabilities (R, V) of the token after (R, T) tokens; with a cache, tokens are those after its own."""
        text = self.backbone.read_tokens(tokens, cache=cache)
        query = TokenSequence(text.features, causal=True, past=None if cache is None else cache.fusion)
        fused = self.backbone.fuse(query, context)
        features = self.output_projection(fused.features[:, -1])
        return self.logits(features, output_embedding).float().log_softmax(-1)


class _Decoder:
    """What `search` asks for the next token of captions being written: with a cache, or by reading all of them anew."""

    def __init__(self, model: Captioner, image_features: Tensor, use_cache: bool) -> None:
        self.model = model
        self.image_features = image_features  # (B, N, D)
        self.cache = model.backbone.caption_cache(image_features) if use_cache else None
        self.output_embedding = model.output_embedding()
        # Ids that no caption may have between its start and its end; the table's rows after the end are no tokens.
        unwritable = (model.output_tokens == START_ID) | (model.output_tokens > END_ID)
        self.unwritable = unwritable.nonzero().squeeze(1)

    def step(self, columns: Tensor) -> Tensor:
        """Columns (R, t) of the t tokens after the start -> log-probabilities of the next one (R, V)."""
        tokens = F.pad(self.model.output_tokens[columns], (1, 0), value=START_ID)
        context = Context(self.image_features)
        if self.cache is not None:
            tokens, context = tokens[:, self.cache.length :], self.cache.pictures
        log_probs = self.model.next_log_probs(tokens, context, self.cache, self.output_embedding)
        return log_probs.index_fill_(1, self.unwritable, float("-inf"))

    def select(self, rows: Tensor) -> None:
        """Caption r goes on from what caption `rows[r]` was, of the same picture."""
        if self.cache is not None:
            self.cache.select(rows)

    def keep(self, rows: Tensor, pictures: Tensor) -> None:
        """Go on with these captions and these pictures only, the captions' own."""
        self.image_features = self.image_features[pictures]
        if self.cache is not None:
            self.cache.keep(rows, pictures)


def _check_output_tokens(tokens: Tensor, vocab_size: int) -> None:
    if tokens.dim() != 1 or tokens.dtype != torch.int64 or not len(tokens):
        raise ValueError(f"output_tokens are {tokens.dtype} of shape {tuple(tokens.shape)}: they must be int64 (V,)")
    if int(tokens[0]) < 0 or int(tokens[-1]) >= vocab_size or not (tokens.diff() > 0).all():
        raise ValueError(f"output_tokens must rise, each once, from 0 to under vocab_size ({vocab_size})")


def _with_fields(config: GenerationConfig, fields: Mapping[str, Any]) -> GenerationConfig:
    known = [field.name for field in dataclasses.fields(GenerationConfig)]
    for name in fields:
        if name not in known:
            raise UserError(f"{name} is no setting of generation{nearest(name, known)}: {', '.join(known)}")
    return dataclasses.replace(config, **fields)
