"""The auxiliary losses, as pure functions of tensors.

Shapes: B pictures, U texts, D width, E experts, K experts chosen for a token; `...` any leading token axes.
`mask` is True (or 1) at real tokens; padding has no part in any loss.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

COMPARED_BYTES = 2**24
"""How much memory a comparison of all texts with all may take, besides a byte for each pair."""


def mean_probs(probs: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean probability of each expert over the real tokens: (..., E) -> (E,)."""
    probs_TE = probs.flatten(0, -2)
    if mask is None:
        return probs_TE.mean(0)
    weight_T = mask.flatten().to(probs_TE)
    return weight_T @ probs_TE / weight_T.sum().clamp_min(1)


def router_z_loss(probs: Tensor, mask: Tensor | None = None) -> Tensor:
    """Concentration of the mean routing: E * mean_e(mean_tokens(p_e)^2), from 1/E (balanced) to 1 (collapsed).

    Args:
        probs: the router's probabilities, (..., E).
        mask: (...), True at real tokens.
    """
    return mean_probs(probs, mask).square().sum()


def load_balance_loss(probs: Tensor, tokens_per_expert: Tensor, mask: Tensor | None = None) -> Tensor:
    """KL(f || uniform), f_e being the share of the routed slots that expert e received.

    Counts carry no gradient, so the value is that of the counts and the gradient goes through the mean
    probabilities in their place (straight-through): d loss / d P_e = log(E f_e).

    Args:
        probs: the router's probabilities, (..., E).
        tokens_per_expert: (E,) counts over the same tokens.
        mask: (...), True at real tokens.
    """
    num_experts = probs.shape[-1]
    load_E = tokens_per_expert.to(probs.dtype)
    load_E = load_E / load_E.sum().clamp_min(1)
    # An expert that got nothing has a slope of -inf; the floor keeps the pull towards it strong but finite.
    slope_E = (num_experts * load_E.clamp_min(1e-4)).log()
    value = torch.xlogy(load_E, num_experts * load_E).sum()
    mean_E = mean_probs(probs, mask)
    return value + slope_E @ (mean_E - mean_E.detach())


def cross_modal_alignment_loss(image: Tensor, text: Tensor) -> Tensor:
    """`-mean_b(cos(image_b, text_b))`, from -1 (aligned) to 1. Both (B, D)."""
    return -F.cosine_similarity(image, text, dim=-1).mean()


def first_occurrence(tokens: Tensor) -> Tensor:
    """For each row of (U, T) the index of the first row equal to it: (U,) int64. Needs no host synchronisation."""
    num_texts = len(tokens)
    same_UU = tokens.new_ones(num_texts, num_texts, dtype=torch.bool)
    # A few columns at a time: all T of them together would take U * U * T bytes.
    for columns in tokens.split(max(1, COMPARED_BYTES // max(1, num_texts**2)), dim=1):
        same_UU &= (columns[:, None] == columns[None]).all(-1)
    return same_UU.to(torch.uint8).argmax(-1)


def contrastive_loss(
    image: Tensor, text: Tensor, text_of_image: Tensor, scale: Tensor | float, candidates: Tensor | None = None
) -> Tensor:
    """Symmetric InfoNCE (CLIP) where several pictures may share one text.

    Picture to text: cross-entropy against its one text. Text to picture: cross-entropy against the uniform
    distribution over its pictures; a text with no picture in the batch is only a negative.

    Args:
        image: (B, D) unit-norm embeddings.
        text: (U, D) unit-norm embeddings.
        text_of_image: (B,) int64, the row of `text` that describes each picture.
        scale: inverse temperature.
        candidates: (U,) bool, False at rows of `text` that repeat another row and must not count twice.
    """
    logits_BU = scale * image @ text.T
    if candidates is not None:
        logits_BU = logits_BU.masked_fill(~candidates, float("-inf"))
    image_to_text = F.cross_entropy(logits_BU, text_of_image)

    positive_UB = F.one_hot(text_of_image, text.shape[0]).T.to(logits_BU)
    count_U = positive_UB.sum(-1)
    log_probs_UB = (scale * text @ image.T).log_softmax(-1)
    loss_U = -(positive_UB * log_probs_UB).sum(-1) / count_U.clamp_min(1)
    text_to_image = loss_U.sum() / (count_U > 0).sum()
    return (image_to_text + text_to_image) / 2


def router_guidance_loss(probs: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of a picture's routing with its super-class's expert (Daxberger et al. 2023, "Mobile V-MoEs").

    A picture's routing is the mean of its tokens' probabilities.

    Args:
        probs: the router's probabilities, (B, N, E).
        target: (B, E), the share that each expert is to have of each picture.
    """
    picture_BE = probs.mean(1)
    return -(target * picture_BE.clamp_min(torch.finfo(probs.dtype).tiny).log()).sum(-1).mean()


def router_logit_z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """mean(logsumexp(logits)^2): keeps the router's logits small (ST-MoE, Zoph et al. 2022, eq. 5)."""
    return mean_probs(logits.logsumexp(-1, keepdim=True).square(), mask).squeeze()


def switch_loss(probs: Tensor, tokens_per_expert: Tensor, mask: Tensor | None = None) -> Tensor:
    """E * sum_e f_e P_e: 1 when balanced, E when collapsed (Switch Transformer, Fedus et al. 2021, eq. 4)."""
    load_E = tokens_per_expert.to(probs.dtype)
    return probs.shape[-1] * (load_E / load_E.sum().clamp_min(1)) @ mean_probs(probs, mask)


def local_entropy_loss(probs: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean entropy of one modality's tokens, in nats: low when each token is sure (LIMoE, Mustafa et al. 2022)."""
    return mean_probs(torch.special.entr(probs).sum(-1, keepdim=True), mask).squeeze()


def global_entropy_loss(probs: Tensor, mask: Tensor | None = None) -> Tensor:
    """Minus the entropy of one modality's mean routing, in nats: low when its experts are many (LIMoE)."""
    return -torch.special.entr(mean_probs(probs, mask)).sum()
