"""The whole model: the contract of its output, padding, positions, embeddings, gradients, saving."""

from __future__ import annotations

import dataclasses
import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.small import SMALL
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from diffmoe import losses
from diffmoe.model.moe import GeneralExperts
from diffmoe.model.multimodal import MultiModalMoE, init_weights
from diffmoe.model.routers import AttentiveRouter
from diffmoe.model.sequence import Context, TokenSequence

CONFIG = dataclasses.replace(SMALL, in_channels=2, img_encoder_layers=2, fusion_layers=2)
B, N, T, D, E, K = 3, 4, 5, 16, 3, 2
TOKENS = torch.tensor([[1, 9, 4, 7, 2], [1, 8, 2, 0, 0], [1, 5, 3, 2, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
PARTS = ("router_z_loss", "router_balance_loss", "cross_modal_loss", "contrastive_loss")


def make(**changes: Any) -> MultiModalMoE:
    torch.manual_seed(0)
    return MultiModalMoE(dataclasses.replace(CONFIG, **changes))


def pictures(count: int = B, height: int = 8, width: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(count, 2, height, width, generator=torch.Generator().manual_seed(seed))


def places(out: dict[str, Any]) -> list[tuple[str, int]]:
    return [(routing.place, routing.layer) for routing in out["routing"]]


# --- The contract ---


def test_output_of_pictures_alone() -> None:
    out = make()(pictures())
    assert out["embedding"].shape == (B, D)
    assert out["image_features"].shape == (B, N, D)
    torch.testing.assert_close(out["embedding"], out["image_features"].mean(1))
    assert out["text_features"] is None
    assert out["fused_features"] is None
    assert places(out) == [("image", 0), ("image", 1)]
    assert out["cross_modal_loss"] == 0
    assert out["contrastive_loss"] == 0
    assert all(out[name].shape == () for name in ("router_loss", *PARTS))


def test_output_of_pictures_with_text() -> None:
    model = make()
    out = model(pictures(), TOKENS, MASK)
    assert out["text_features"].shape == (B, T, D)
    assert out["fused_features"].shape == (B, N, D)
    torch.testing.assert_close(out["embedding"], out["fused_features"].mean(1))
    torch.testing.assert_close(out["image_features"], model(pictures())["image_features"])
    assert places(out) == [("image", 0), ("image", 1), ("text", 0), ("fusion", 0), ("fusion", 1)]
    for routing in out["routing"]:
        tokens = T if routing.place == "text" else N
        assert routing.logits.shape == routing.probs.shape == (B, tokens, E)
        assert routing.gates.shape == routing.expert_ids.shape == (B, tokens, K)
        assert routing.tokens_per_expert.sum() == K * (MASK.sum() if routing.place == "text" else B * N)


def test_a_model_without_fusion_gives_the_picture_alone() -> None:
    model = make(fusion_layers=0)
    out = model(pictures(), TOKENS, MASK)
    assert out["fused_features"] is None
    assert places(out) == [("image", 0), ("image", 1), ("text", 0)]
    torch.testing.assert_close(out["embedding"], out["image_features"].mean(1))
    with pytest.raises(ValueError, match="fusion_layers is 0"):
        model.fuse(TokenSequence(model.image_features(pictures()).features), Context(torch.zeros(B, 1, D)))


def test_a_dense_model_has_no_routing_and_no_router_losses() -> None:
    out = make(dense=True)(pictures(), TOKENS, MASK)
    assert out["routing"] == ()
    assert out["router_z_loss"] == 0
    assert out["router_balance_loss"] == 0


# --- Losses ---


def test_router_loss_is_the_weighted_sum_of_its_four_parts() -> None:
    weights = {
        "router_z_loss_weight": 2.0,
        "router_balance_loss_weight": 3.0,
        "cross_modal_alignment_weight": 5.0,
        "contrastive_loss_weight": 7.0,
    }
    out = make(**weights)(pictures(), TOKENS, MASK)
    parts = [out[name] for name in PARTS]
    assert all(part != 0 for part in parts)
    torch.testing.assert_close(out["router_loss"], 2 * parts[0] + 3 * parts[1] + 5 * parts[2] + 7 * parts[3])


def test_the_parts_are_the_losses_summed_over_blocks() -> None:
    out = make()(pictures(), TOKENS, MASK)
    z_loss, balance = torch.zeros(()), torch.zeros(())
    for routing in out["routing"]:
        mask = MASK if routing.place == "text" else None
        z_loss = z_loss + losses.router_z_loss(routing.probs, mask)
        balance = balance + losses.load_balance_loss(routing.probs, routing.tokens_per_expert, mask)
    torch.testing.assert_close(out["router_z_loss"], z_loss)
    torch.testing.assert_close(out["router_balance_loss"], balance)
    text = (out["text_features"] * MASK[..., None]).sum(1) / MASK.sum(1, keepdim=True)
    expected = losses.cross_modal_alignment_loss(out["image_features"].mean(1), text)
    torch.testing.assert_close(out["cross_modal_loss"], expected)


@pytest.mark.parametrize(
    "name", ["router_logit_z_loss_weight", "switch_loss_weight", "entropy_local_weight", "entropy_global_weight"]
)
def test_the_losses_that_are_off_by_default_come_in_with_their_weight(name: str) -> None:
    loss = {
        "router_logit_z_loss_weight": lambda r: losses.router_logit_z_loss(r.logits, r.mask),
        "switch_loss_weight": lambda r: losses.switch_loss(r.probs, r.tokens_per_expert, r.mask),
        "entropy_local_weight": lambda r: losses.local_entropy_loss(r.probs, r.mask),
        "entropy_global_weight": lambda r: losses.global_entropy_loss(r.probs, r.mask),
    }[name]
    off, on = make()(pictures(), TOKENS, MASK), make(**{name: 0.5})(pictures(), TOKENS, MASK)
    extra = torch.stack([loss(routing) for routing in on["routing"]]).sum()
    torch.testing.assert_close(on["router_loss"], off["router_loss"] + 0.5 * extra)


def test_the_temperature_is_clamped_at_100() -> None:
    model = make()
    assert model.scale.item() == pytest.approx(1 / 0.07)
    with torch.no_grad():
        model.log_scale.fill_(math.log(50))
        assert model.scale.item() == pytest.approx(50)
        model.log_scale.fill_(10)
        assert model.scale.item() == pytest.approx(100)


def test_a_repeated_text_counts_once_in_the_contrastive_loss() -> None:
    model = make()
    images, rows = pictures(4), [0, 1, 0, 2]
    repeated = model(images, TOKENS[rows], MASK[rows])["contrastive_loss"]
    image, text = model.encode_image(images), model.encode_text(TOKENS, MASK)
    torch.testing.assert_close(repeated, losses.contrastive_loss(image, text, torch.tensor(rows), model.scale))


def test_a_text_that_ends_in_token_0_is_not_the_text_without_it() -> None:
    # Token 0 is a real one ("!" in CLIP's table): padding is known from the mask, never from an id.
    tokens, mask = torch.tensor([[1, 5, 0], [1, 5, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert make().text_features(tokens, mask).first.tolist() == [0, 1]


# --- Several processes ---


def gradients(model: MultiModalMoE, images: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """Of the contrastive loss alone."""
    loss = model(images, tokens, mask)["contrastive_loss"]
    return torch.autograd.grad(loss, tuple(model.parameters()), materialize_grads=True)


# Texts 0 and 3 are one, on different processes, which need not pad alike; 3 pictures and 2.
GATHERED_TOKENS, GATHERED_MASK = TOKENS[[0, 1, 2, 0, 1]], MASK[[0, 1, 2, 0, 1]]
SHARES = (slice(0, 3), slice(3, 5))


def one_of_two(rank: int, folder: str) -> None:
    """What one of the two processes does: writes the mean of both gradients, as DDP makes it."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    share = SHARES[rank]
    tokens, mask = GATHERED_TOKENS[share], GATHERED_MASK[share]
    if rank == 0:
        tokens, mask = F.pad(tokens, (0, 2), value=9), F.pad(mask, (0, 2))
    model = make().double()
    images = pictures(5).double()[share]
    found = gradients(model, images, tokens, mask)
    for gradient in found:
        torch.distributed.all_reduce(gradient)
    loss = model(images, tokens, mask)["contrastive_loss"]
    with torch.no_grad():
        alone = model.eval()(images, tokens, mask)["contrastive_loss"]  # in evaluation nobody waits for others
    torch.save((loss, alone, [gradient / 2 for gradient in found]), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_contrastive_loss_and_gradient_of_one_with_the_whole_batch(tmp_path: Path) -> None:
    spawn(one_of_two, (str(tmp_path),), nprocs=2)
    model, images = make().double(), pictures(5).double()
    expected = gradients(model, images, GATHERED_TOKENS, GATHERED_MASK)
    loss = model(images, GATHERED_TOKENS, GATHERED_MASK)["contrastive_loss"]
    for rank, share in enumerate(SHARES):
        found_loss, alone, found = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found_loss, loss)
        torch.testing.assert_close(tuple(found), expected)
        own = model(images[share], GATHERED_TOKENS[share], GATHERED_MASK[share])["contrastive_loss"]
        torch.testing.assert_close(alone, own)
        assert not torch.isclose(own, loss)


# --- Padding ---


def test_padding_changes_no_output_loss_count_or_gradient() -> None:
    model = make().double()
    images = pictures().double()
    garbage = torch.randint(30, (B, 8), generator=torch.Generator().manual_seed(1))
    longer_mask = F.pad(MASK, (0, 3))
    longer = torch.where(longer_mask.bool(), F.pad(TOKENS, (0, 3)), garbage)
    out, padded = model(images, TOKENS, MASK), model(images, longer, longer_mask)
    for name in ("embedding", "image_features", "fused_features", "router_loss", *PARTS):
        torch.testing.assert_close(padded[name], out[name], msg=name)
    real = MASK.bool()
    torch.testing.assert_close(padded["text_features"][:, :T][real], out["text_features"][real])
    for routing, routing_padded in zip(out["routing"], padded["routing"], strict=True):
        assert torch.equal(routing_padded.tokens_per_expert, routing.tokens_per_expert)
    gradients, gradients_padded = (
        torch.autograd.grad(o["router_loss"], tuple(model.parameters()), materialize_grads=True) for o in (out, padded)
    )
    torch.testing.assert_close(gradients_padded, gradients)


def test_no_mask_means_that_every_token_is_real() -> None:
    model = make()
    torch.testing.assert_close(model.encode_text(TOKENS), model.encode_text(TOKENS, torch.ones_like(TOKENS)))


def test_a_text_over_max_text_len_is_an_error_naming_both() -> None:
    with pytest.raises(ValueError, match=r"9 tokens.*max_text_len \(8\)"):
        make().encode_text(torch.ones(1, 9, dtype=torch.int64))


# --- Embeddings ---


def test_embeddings_have_unit_norm_and_are_those_that_forward_contrasts() -> None:
    model = make()
    image, text = model.encode_image(pictures()), model.encode_text(TOKENS, MASK)
    for embedding in (image, text):
        torch.testing.assert_close(embedding.norm(dim=-1), torch.ones(B))
    expected = losses.contrastive_loss(image, text, torch.arange(B), model.scale)
    torch.testing.assert_close(model(pictures(), TOKENS, MASK)["contrastive_loss"], expected)


def test_a_text_is_pooled_where_it_ends() -> None:
    text = make().text_features(TOKENS, MASK)
    for row, end in enumerate((4, 2, 3)):
        assert torch.equal(text.pooled[row], text.features[row, end])


# --- Positions ---


def test_positions_are_as_learned_at_img_size_and_keep_their_axes_at_others() -> None:
    model = make()
    assert torch.equal(model._image_position(pictures()), model.image_position)
    with torch.no_grad():  # the first channel holds the row, the second the column, the third a constant
        grid = torch.stack(torch.meshgrid(torch.arange(2.0), torch.arange(2.0), indexing="ij"), -1)
        model.image_position[..., :2] = grid.view(1, 4, 2)
        model.image_position[..., 2] = 0.7
    wide = model._image_position(pictures(height=12, width=24)).view(3, 6, D)
    torch.testing.assert_close(wide[..., 0], wide[:, :1, 0].expand(3, 6))
    torch.testing.assert_close(wide[..., 1], wide[:1, :, 1].expand(3, 6))
    assert (wide[:, 0, 0].diff() > 0).all()
    assert (wide[0, :, 1].diff() > 0).all()
    torch.testing.assert_close(wide[..., 2], torch.full((3, 6), 0.7))
    assert model(pictures(height=12, width=24))["image_features"].shape == (B, 18, D)


# --- Weights ---


def test_every_parameter_gets_a_gradient_with_text_and_fusion() -> None:
    model = make(router_noise=True)
    out = model(pictures(), TOKENS, MASK)
    generator = torch.Generator().manual_seed(1)
    (out["router_loss"] + (out["embedding"] * torch.randn(B, D, generator=generator)).sum()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_routers_keep_their_own_initialisation_through_the_whole_models_initialisation() -> None:
    model = make()
    init_weights(model, 0.5)
    routers = [m for m in model.modules() if isinstance(m, AttentiveRouter)]
    assert len(routers) == 5
    for router in routers:
        torch.testing.assert_close(router.keys @ router.keys.T, torch.eye(E))  # orthonormal
        # Queries as wide as the token: logits of unit variance where their weights have variance 1.
        assert router.query.weight.std().item() == pytest.approx(1, abs=0.2)
    assert not torch.equal(routers[0].keys, routers[1].keys)


def test_initial_weights_have_the_range_of_the_config() -> None:
    model = make(initializer_range=0.3, position_range=0.7, embed_dim=64)
    pool = next(m for m in model.modules() if isinstance(m, GeneralExperts))
    weights = (model.text_position, model.token_embedding.weight, model.token_projection.weight, pool.fc1_weight)
    for weight in weights:
        assert weight.std().item() == pytest.approx(0.3, rel=0.1)
    assert model.image_position.std().item() == pytest.approx(0.7, rel=0.1)
    assert not model.token_projection.bias.any()


@pytest.mark.parametrize("patch_embed", ["linear", "conv", "whitened"])
def test_saving_and_loading_is_bit_equal(patch_embed: str) -> None:
    model = make(patch_embed=patch_embed, router_noise=True)
    for module in model.modules():
        if isinstance(module, AttentiveRouter):
            module.balance_bias += 0.1 * torch.randn(E)
    model(pictures(), TOKENS, MASK)  # moves the stem's running statistics
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    torch.manual_seed(99)
    loaded = MultiModalMoE(model.config)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    out, again = (m.eval()(pictures(), TOKENS, MASK) for m in (model, loaded))
    for name in ("embedding", "image_features", "text_features", "fused_features", "router_loss", *PARTS):
        assert torch.equal(again[name], out[name])


def test_asking_for_attention_maps_changes_no_output() -> None:
    model = make()
    plain, drawn = model(pictures(), TOKENS, MASK), model(pictures(), TOKENS, MASK, need_weights=True)
    torch.testing.assert_close(drawn["embedding"], plain["embedding"])
    assert plain["attention"] == ()
    assert [m.place for m in drawn["attention"]] == ["image"] * 2 + ["text"] + ["fusion"] * 4
