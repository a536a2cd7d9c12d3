"""The captioner: it never sees the future, padding is nothing, a cache changes nothing, and it learns to speak."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.small import SMALL
from torch import Tensor

from diffmoe.config import GenerationConfig, UserError
from diffmoe.data import text
from diffmoe.model import captioner, dispatch
from diffmoe.model.captioner import END_ID, START_ID, Captioner
from diffmoe.model.multimodal import init_weights
from diffmoe.model.routers import ROUTERS
from diffmoe.model.sequence import Context

CONFIG = dataclasses.replace(SMALL, text_encoder_layers=2, fusion_layers=2, vocab_size=text.VOCAB_SIZE, max_text_len=10)
WORDS = torch.tensor([3, 320, 400, 539, 1000, 2000, 40000])
OUTPUT = torch.cat([WORDS, torch.tensor([END_ID])])
V = len(OUTPUT)
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]])
TOKENS = torch.tensor(
    [
        [START_ID, 320, 400, 3, 539, END_ID],
        [START_ID, 2000, 1000, END_ID, 0, 0],
        [START_ID, 40000, END_ID, 0, 0, 0],
    ]
)
B, T = TOKENS.shape
ROUTER_PARTS = ("router_z_loss", "router_balance_loss", "cross_modal_loss", "contrastive_loss", "router_loss")


def make(output: Tensor | None = OUTPUT, std: float | None = None, **changes: Any) -> Captioner:
    torch.manual_seed(0)
    model = Captioner(dataclasses.replace(CONFIG, **changes), output)
    if std is not None:
        init_weights(model, std)
        torch.nn.init.normal_(model.output_bias)
    return model


def pictures(count: int = B, seed: int = 0) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def speaker() -> Captioner:
    """Weights so large that its captions differ by picture and by all that was said."""
    return make(std=0.4)


def test_the_special_tokens_are_the_tokenizers() -> None:
    assert (captioner.START_ID, captioner.END_ID) == (text.START_ID, text.END_ID)
    assert text.END_ID == text.VOCAB_SIZE - 1


# --- The contract ---


def test_output() -> None:
    model = make()
    out = model(pictures(), TOKENS, MASK)
    assert out["logits"].shape == (B, T, V)
    assert out["caption_features"].shape == (B, T, 8)
    assert out["fused_features"].shape == out["text_features"].shape == (B, T, 16)
    torch.testing.assert_close(out["embedding"], out["image_features"].mean(1))
    assert [(r.place, r.layer) for r in out["routing"]] == [
        *(("image", 0), ("text", 0), ("text", 1)),
        *(("fusion", 0), ("fusion", 1)),
    ]
    for routing in out["routing"]:
        expected = B * 4 if routing.place == "image" else MASK.sum()
        assert routing.tokens_per_expert.sum() == CONFIG.top_k * expected
    assert "logits" not in model(pictures(), TOKENS, MASK, need_logits=False)


def test_its_losses_are_the_dual_encoders() -> None:
    model = make()
    out, plain = model(pictures(), TOKENS, MASK), model.backbone(pictures(), TOKENS, MASK)
    for name in ("cross_modal_loss", "contrastive_loss"):
        torch.testing.assert_close(out[name], plain[name])


def test_logits_are_products_with_the_text_embedding_and_a_bias() -> None:
    model = speaker()
    out = model(pictures(), TOKENS, MASK)
    weight = model.backbone.token_embedding.weight[OUTPUT]
    torch.testing.assert_close(out["logits"], out["caption_features"] @ weight.T + model.output_bias)
    features = out["fused_features"] @ model.output_projection.weight.T + model.output_projection.bias
    torch.testing.assert_close(out["caption_features"], features)


def test_without_output_tokens_it_has_the_whole_vocabulary() -> None:
    model = make(None, vocab_size=30)
    assert torch.equal(model.output_tokens, torch.arange(30))
    assert model(pictures(), torch.ones(B, 3, dtype=torch.int64))["logits"].shape == (B, 3, 30)


def test_read_is_forward_without_its_losses() -> None:
    model = make()
    out = model(pictures(), TOKENS, MASK)
    read = model.read(pictures(), TOKENS, MASK)
    assert read.losses is None
    assert read.logits is None
    assert torch.equal(read.caption_features, out["caption_features"])
    assert torch.equal(read.image.features, out["image_features"])
    assert read.text is not None
    assert torch.equal(read.text.features, out["text_features"])


def test_without_a_fusion_there_is_no_captioner() -> None:
    with pytest.raises(ValueError, match="fusion_layers is 0"):
        make(fusion_layers=0)


@pytest.mark.parametrize(
    "tokens", [[3, 2], [3, 3], [-1, 3], [3, 30], [], [[1, 2]], [1.0, 2.0]], ids=lambda value: str(value)
)
def test_output_tokens_that_cannot_be_are_an_error(tokens: list[Any]) -> None:
    with pytest.raises(ValueError, match="output_tokens"):
        make(torch.tensor(tokens), vocab_size=30)


def test_every_parameter_gets_a_gradient() -> None:
    model = make()
    out = model(pictures(), TOKENS, MASK, need_logits=False)
    (model.caption_loss(out["caption_features"], TOKENS, MASK)[0] + out["router_loss"]).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


# --- The future, the picture ---


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("few_slots", [-1, 10**9], ids=["sorted", "padded"])
def test_a_future_token_never_changes_an_earlier_logit(
    few_slots: int, top_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "FEW_SLOTS", few_slots)
    model = make(std=0.2, embed_dim=64, top_k=top_k)
    tokens = OUTPUT[torch.randint(V, (2, 8), generator=torch.Generator().manual_seed(0))]
    logits = model(pictures(2), tokens)["logits"]
    for t in range(1, 8):
        changed = tokens.clone()
        changed[0, t:] = OUTPUT[(torch.searchsorted(OUTPUT, tokens[0, t:]) + 1) % V]
        again = model(pictures(2), changed)["logits"]
        assert torch.equal(again[:, :t], logits[:, :t]), f"position {t}"
        assert torch.equal(again[1], logits[1])
        assert not torch.equal(again[0, t], logits[0, t])


@pytest.mark.parametrize("router", ROUTERS)
def test_no_router_lets_a_token_see_the_future(router: str) -> None:
    model = make(std=0.4, router=router).eval()
    kind = ROUTERS[router]
    by_place = {name.split("_")[0]: type(made) for name, made in model.backbone.routers().items()}
    attentive = ROUTERS["attentive"]
    assert by_place == {"image": kind, "text": attentive, "fusion": attentive}
    tokens = OUTPUT[torch.randint(V, (2, 8), generator=torch.Generator().manual_seed(0))]
    logits = model(pictures(2), tokens)["logits"]
    for t in range(1, 8):
        changed = tokens.clone()
        changed[0, t] = OUTPUT[(torch.searchsorted(OUTPUT, tokens[0, t]) + 1) % V]
        again = model(pictures(2), changed)["logits"]
        assert torch.equal(again[:, :t], logits[:, :t]), f"position {t}"
        assert not torch.equal(again[0, t], logits[0, t])
    written = model.generate(pictures(2), decoding="greedy")
    assert torch.equal(written, model.generate(pictures(2), decoding="greedy", use_cache=False))
    again = Captioner.restore(model.config, model.state_dict())
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(pictures(2), tokens)["logits"], logits)


def test_no_gradient_comes_from_the_future_and_every_one_from_the_past_and_the_picture() -> None:
    model = speaker()
    rows = torch.zeros(1, T, 8, requires_grad=True)  # added to what the embedding gives
    images = pictures(1).requires_grad_()

    def add_rows(module: torch.nn.Module, args: Any, out: Tensor) -> Tensor:
        return out + rows

    model.backbone.token_embedding.register_forward_hook(add_rows)
    for t in range(T):
        logits = model(images, TOKENS[:1])["logits"][0, t]
        gradient, of_image = torch.autograd.grad(logits.square().sum(), (rows, images))
        assert gradient[0].any(-1).tolist() == [position <= t for position in range(T)]
        assert of_image.unfold(2, 4, 4).unfold(3, 4, 4).flatten(-2).any(-1).all()  # each patch


# --- Padding ---


def test_padding_changes_no_logit_loss_count_or_gradient() -> None:
    model = speaker().double()
    garbage = OUTPUT[torch.randint(V, (B, 10), generator=torch.Generator().manual_seed(1))]  # they could be targets
    longer_mask = F.pad(MASK, (0, 4))
    longer = torch.where(longer_mask.bool(), F.pad(TOKENS, (0, 4)), garbage)
    results = []
    for tokens, mask in ((TOKENS, MASK), (longer, longer_mask)):
        out = model(pictures().double(), tokens, mask)
        caption, accuracy, count = model.caption_loss(out["caption_features"], tokens, mask, label_smoothing=0.1)
        gradients = torch.autograd.grad(caption + out["router_loss"], tuple(model.parameters()), retain_graph=True)
        results.append((out, (caption, accuracy, count), gradients))
    (out, scores, gradients), (out_padded, scores_padded, gradients_padded) = results
    real = MASK.bool()
    torch.testing.assert_close(out_padded["logits"][:, :T][real], out["logits"][real])
    torch.testing.assert_close(scores_padded, scores)
    for name in ROUTER_PARTS:
        torch.testing.assert_close(out_padded[name], out[name], msg=name)
    for routing, padded in zip(out["routing"], out_padded["routing"], strict=True):
        assert torch.equal(padded.tokens_per_expert, routing.tokens_per_expert)
    torch.testing.assert_close(gradients_padded, gradients)


# --- Loss ---


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_the_mean_over_real_targets_that_can_be_written(smoothing: float) -> None:
    output = OUTPUT[OUTPUT != 539]  # one target of the first caption can not
    model = make(output, std=0.4)
    tokens = TOKENS.where(MASK.bool(), 320)  # padding that could be a target
    out = model(pictures(), tokens, MASK)
    loss, accuracy, count = model.caption_loss(out["caption_features"], tokens, MASK, smoothing)
    terms, right = [], []
    for row, length in enumerate((6, 4, 3)):
        for t in range(1, length):
            if TOKENS[row, t] == 539:
                continue
            log_probs = out["logits"][row, t - 1].log_softmax(0)
            column = output.tolist().index(int(TOKENS[row, t]))
            terms.append(-(1 - smoothing) * log_probs[column] - smoothing * log_probs.mean())
            right.append(float(log_probs.argmax() == column))
    # Each caption's end is a target, its start is none.
    assert len(terms) == count == model.num_targets((pictures(), tokens, MASK)) == 5 + 3 + 2 - 1
    torch.testing.assert_close(loss, torch.stack(terms).mean())
    assert accuracy.item() == pytest.approx(sum(right) / len(right))


def test_without_a_target_the_loss_is_zero_and_has_a_gradient() -> None:
    model = make(WORDS)
    tokens = torch.tensor([[START_ID, END_ID]])
    out = model(pictures(1), tokens)
    loss, accuracy, count = model.caption_loss(out["caption_features"], tokens)
    loss.backward()
    assert loss == accuracy == count == 0


# --- Writing ---

FIELDS = [
    {"decoding": "greedy"},
    {"decoding": "beam", "beams": 3},
    {"decoding": "beam", "beams": 4, "min_caption_len": 4},
    {"decoding": "sample", "sample_top_k": 5},
]
GENERATION = pytest.mark.parametrize("fields", FIELDS, ids=lambda f: f"{f['decoding']}{len(f)}")


@GENERATION
def test_captions_begin_and_end_and_can_be_read(fields: dict[str, Any]) -> None:
    tokens = speaker().generate(pictures(9), **fields)
    assert tokens.dtype == torch.int64
    assert tokens.shape[1] <= CONFIG.max_text_len
    assert (tokens[:, 0] == START_ID).all()
    for row in tokens.tolist():
        end = row.index(END_ID)
        assert set(row[1:end]) <= set(WORDS.tolist())
        assert set(row[end + 1 :]) <= {0}
    assert len({tuple(row) for row in tokens.tolist()}) > 2  # they say something of the picture
    assert all(isinstance(caption, str) for caption in text.detokenize(tokens))


@GENERATION
def test_a_cache_changes_nothing(fields: dict[str, Any]) -> None:
    model, images = speaker().double(), pictures(9).double()  # rounding decides no tie
    cached, plain = (model.generate_scored(images, use_cache=use, **fields) for use in (True, False))
    assert torch.equal(cached.tokens, plain.tokens)
    torch.testing.assert_close(cached.log_probs, plain.log_probs, atol=1e-5, rtol=1e-5)


@GENERATION
def test_log_probs_are_those_of_a_forward_pass(fields: dict[str, Any]) -> None:
    model = speaker().eval()
    found = model.generate_scored(pictures(9), length_penalty=0.7, **fields)
    ends = (found.tokens == END_ID).long()
    mask = 1 - (ends.cumsum(1) - ends)
    log_probs = model(pictures(9), found.tokens, mask)["logits"].log_softmax(-1)[:, :-1]
    targets = torch.searchsorted(OUTPUT, found.tokens[:, 1:].contiguous()).clamp_max(V - 1)
    expected = (log_probs.gather(2, targets[..., None]).squeeze(2) * mask[:, 1:]).sum(1)
    torch.testing.assert_close(found.log_probs, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.scores, found.log_probs / mask[:, 1:].sum(1) ** 0.7)


@GENERATION
def test_a_caption_does_not_depend_on_its_batch_mates(fields: dict[str, Any]) -> None:
    model, images = speaker().double(), pictures(9).double()  # rounding, which does depend on them, decides no tie
    together = model.generate(images, seed=2, **fields)
    for row in range(9):
        alone = model.generate(images[row : row + 1], seed=2 + row, **fields)[0]
        assert torch.equal(alone, together[row, : len(alone)])
        assert not together[row, len(alone) :].any()


def test_one_beam_is_greedy() -> None:
    model = speaker()
    greedy = model.generate(pictures(9), decoding="greedy")
    assert torch.equal(model.generate(pictures(9), decoding="beam", beams=1), greedy)
    assert torch.equal(model.generate(pictures(9), GenerationConfig(decoding="greedy")), greedy)


def test_next_log_probs_step_by_step_are_those_of_the_whole() -> None:
    model = speaker().eval()
    with torch.no_grad():
        features = model.backbone.image_features(pictures()).features
        whole = model(pictures(), TOKENS)["logits"].log_softmax(-1)
        cache = model.backbone.caption_cache(features)
        for start, end in pairwise((0, 1, 2, 4, 6)):  # one token at a time, then two
            found = model.next_log_probs(TOKENS[:, start:end], cache.pictures, cache)
            assert cache.length == end
            torch.testing.assert_close(found, whole[:, end - 1], atol=1e-5, rtol=1e-5)


def test_a_cache_goes_on_from_the_rows_that_it_is_told() -> None:
    model = speaker().eval()
    with torch.no_grad():
        features = model.backbone.image_features(pictures()).features
        cache = model.backbone.caption_cache(features)
        model.next_log_probs(TOKENS.repeat_interleave(2, 0)[:, :1], cache.pictures, cache)
        two_of_each = torch.stack([TOKENS[:, 1], WORDS[:3]], 1).flatten()[:, None]
        model.next_log_probs(two_of_each, cache.pictures, cache)
        cache.select(torch.tensor([1, 1, 3, 2, 5, 4]))
        cache.keep(torch.tensor([0, 1, 4, 5]), torch.tensor([0, 2]))  # without picture 1
        found = model.next_log_probs(torch.full((4, 1), 320), cache.pictures, cache)
        words = [WORDS[0], WORDS[0], WORDS[2], TOKENS[2, 1]]
        for row, (picture, word) in enumerate(zip((0, 0, 2, 2), words, strict=True)):
            tokens = torch.tensor([[START_ID, int(word), 320]])
            expected = model.next_log_probs(tokens, Context(features[picture : picture + 1]))[0]
            torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_generation_leaves_the_model_as_it_was(training: bool) -> None:
    model = make(dropout=0.5).train(training)
    model.backbone.text_encoder.eval()
    modes = [module.training for module in model.modules()]
    first = model.generate(pictures(), decoding="sample", seed=1)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model.generate(pictures(), decoding="sample", seed=1), first)  # no dropout inside
    assert not first.is_inference()
    assert all(p.grad is None for p in model.parameters())


def test_what_no_caption_may_hold_is_never_written() -> None:
    # The start, and rows of the embedding beyond the tokenizer's table, even where they are by far the likeliest.
    output = torch.tensor([320, 400, START_ID, END_ID, END_ID + 1])
    model = make(output, vocab_size=text.VOCAB_SIZE + 5)
    with torch.no_grad():
        model.output_bias.copy_(torch.tensor([0.0, 0.0, 50.0, 0.0, 50.0]))
    for fields in FIELDS:
        asked: dict[str, Any] = {**fields, "min_caption_len": 4}
        written = set(model.generate(pictures(9), **asked)[:, 1:].flatten().tolist())
        assert written <= {320, 400, END_ID, 0}


def test_no_pictures_no_captions() -> None:
    for fields in FIELDS:
        assert make().generate(pictures(0), **fields).shape[0] == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beam": 3}, r"beam is no setting of generation \(did you mean 'beams'\?\)"),
        ({"beams": 0}, "beams is 0"),
        ({"decoding": "best"}, "decoding is 'best'"),
        ({"min_caption_len": 9}, "min_caption_len is 9: it must be at most 8"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_that_cannot_be_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make().generate(pictures(), **fields)


def test_a_model_that_cannot_end_a_caption_says_so() -> None:
    for model in (make(WORDS), make(None, vocab_size=30)):
        with pytest.raises(UserError, match=f"end token {END_ID} is not among"):
            model.generate(pictures())


# --- Learning ---


def test_a_tiny_batch_is_captioned_back_word_for_word() -> None:
    words = ["a red square", "a small blue circle above it", "two green stars", "nothing"]
    tokens, mask = text.tokenize(words, CONFIG.max_text_len)
    model = make(torch.tensor(sorted(set(tokens[mask.bool()].tolist()))), embed_dim=32, text_embed_dim=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.005, weight_decay=0.0)
    images, accuracy = pictures(4), torch.zeros(())
    for _ in range(100):
        out = model(images, tokens, mask, need_logits=False)
        loss, accuracy, _ = model.caption_loss(out["caption_features"], tokens, mask)
        (loss + out["router_loss"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert accuracy == 1
    for decoding in ("greedy", "beam"):
        written = model.generate(images.flip(0), GenerationConfig(decoding=decoding))
        assert text.detokenize(written) == words[::-1]
