"""A start from CLIP computes what CLIP does, leaves the rest alone, and says which is which. Nothing is downloaded."""

from __future__ import annotations

import json
import os
import threading
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from diffmoe.config import ModelConfig, UserError
from diffmoe.data import hub
from diffmoe.model.captioner import Captioner
from diffmoe.model.encoders import UnifiedModalEncoder
from diffmoe.model.heads import ImageClassifier
from diffmoe.model.moe import GeneralExperts
from diffmoe.model.sequence import TokenSequence
from diffmoe.pretrained import start_from

VOCABULARY, WIDTH, HIDDEN, CONTEXT = 49408, 8, 24, 10
CONFIG = ModelConfig(
    img_size=4,
    patch_size=2,
    embed_dim=WIDTH,
    text_embed_dim=WIDTH,
    expansion_factor=HIDDEN / WIDTH,
    num_heads=2,
    img_encoder_layers=2,
    text_encoder_layers=2,
    fusion_layers=1,
    vocab_size=VOCABULARY + 2,
    max_text_len=6,
    dropout=0.0,
)
PARTS = ("token_embedding", "text_position", "text_encoder", "image_encoder")
State = dict[str, Tensor]


def resblocks(tower: str, layers: int, width: int, hidden: int) -> State:
    """Dense FFNs by CLIP's names, nothing in them at a default."""
    shapes = {
        "ln_2.weight": (width,),
        "ln_2.bias": (width,),
        "mlp.c_fc.weight": (hidden, width),
        "mlp.c_fc.bias": (hidden,),
        "mlp.c_proj.weight": (width, hidden),
        "mlp.c_proj.bias": (width,),
    }
    blocks = [f"{tower}.resblocks.{layer}." for layer in range(layers)]
    return {block + name: torch.randn(shape) for block in blocks for name, shape in shapes.items()}


def clip_state(layers: int = 2, image_width: int = WIDTH, vocabulary: int = VOCABULARY) -> State:
    """What a CLIP's state dict has for us."""
    return {
        "token_embedding.weight": torch.randn(vocabulary, WIDTH),
        "positional_embedding": torch.randn(CONTEXT, WIDTH),
        **resblocks("transformer", layers, WIDTH, HIDDEN),
        **resblocks("visual.transformer", layers, image_width, image_width * HIDDEN // WIDTH),
    }


def dense_ffn(state: State, block: str, x: Tensor) -> Tensor:
    """CLIP's mlp(ln_2(x)), in the precision of x."""
    weights = {name.removeprefix(block): value.to(x) for name, value in state.items() if name.startswith(block)}
    x = F.layer_norm(x, (x.shape[-1],), weights["ln_2.weight"], weights["ln_2.bias"], 1e-5)
    hidden = F.gelu(F.linear(x, weights["mlp.c_fc.weight"], weights["mlp.c_fc.bias"]))
    return F.linear(hidden, weights["mlp.c_proj.weight"], weights["mlp.c_proj.bias"])


def blocks_of(model: ImageClassifier | Captioner, tower: str) -> list[UnifiedModalEncoder]:
    backbone = model.backbone
    blocks = {"transformer": backbone.text_encoder.blocks, "visual.transformer": backbone.image_encoder.blocks}[tower]
    return [block for block in blocks if isinstance(block, UnifiedModalEncoder)]


def snapshot_of(model: nn.Module) -> State:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before: State, model: nn.Module) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def what_became(lines: list[str]) -> dict[str, str]:
    """Each part: copied or skipped."""
    return {line.split(":")[0]: line.split(": ")[1].split(",")[0] for line in lines}


def save(state: Any, path: Path) -> str:
    torch.save(state, path)
    return str(path)


class TestEmbeddings:
    def test_tokens_and_positions_are_clips(self, tmp_path: Path) -> None:
        state, model = clip_state(), Captioner(CONFIG)
        before = snapshot_of(model)
        lines = start_from(model, save(state, tmp_path / "clip.pt"))
        assert what_became(lines) == dict.fromkeys(PARTS, "copied")
        backbone = model.backbone
        assert torch.equal(backbone.token_embedding.weight[:VOCABULARY], state["token_embedding.weight"])
        assert torch.equal(
            backbone.token_embedding.weight[VOCABULARY:], before["backbone.token_embedding.weight"][VOCABULARY:]
        )
        assert torch.equal(backbone.text_position, state["positional_embedding"][:6])
        tokens = torch.tensor([[49406, 0, 777, 49407]])
        expected = F.embedding(tokens, state["token_embedding.weight"])
        assert torch.equal(backbone.token_projection(backbone.token_embedding(tokens)), expected)

    def test_a_text_longer_than_clips_keeps_its_last_positions(self, tmp_path: Path) -> None:
        state, model = clip_state(), ImageClassifier(replace(CONFIG, max_text_len=12))
        before = model.backbone.text_position.detach().clone()
        lines = start_from(model, save(state, tmp_path / "clip.pt"))
        assert "text_position: copied, 10 of 12 rows" in lines
        after = model.backbone.text_position
        assert torch.equal(after[:CONTEXT], state["positional_embedding"])
        assert torch.equal(after[CONTEXT:], before[CONTEXT:])

    def test_alone_where_the_model_is_wider(self, tmp_path: Path) -> None:
        model = ImageClassifier(replace(CONFIG, embed_dim=2 * WIDTH))
        before = snapshot_of(model)
        lines = start_from(model, save(clip_state(), tmp_path / "clip.pt"))
        assert what_became(lines) == dict.fromkeys(PARTS, "skipped") | {"token_embedding": "copied"}
        assert "text_position: skipped, embed_dim is 16: it must be 8" in lines
        assert changed(before, model) == {"backbone.token_embedding.weight"}

    @pytest.mark.parametrize(
        ("state", "config", "reason"),
        [
            ({"vocabulary": 32000}, CONFIG, "it has 32000 rows: it must be CLIP's vocabulary, 49408"),
            ({}, replace(CONFIG, vocab_size=100), "vocab_size is 100: it must be at least 49408"),
            ({}, replace(CONFIG, text_embed_dim=4), "text_embed_dim is 4: it must be 8"),
        ],
    )
    def test_skipped_tokens_are_untouched(
        self, tmp_path: Path, state: dict[str, int], config: ModelConfig, reason: str
    ) -> None:
        model = ImageClassifier(config)
        before = snapshot_of(model)
        lines = start_from(model, save(clip_state(**state), tmp_path / "clip.pt"))
        assert f"token_embedding: skipped, {reason}" in lines
        assert what_became(lines)["text_position"] == "copied"
        assert not any(name.startswith("backbone.token_") for name in changed(before, model))


class TestUpcycling:
    @pytest.mark.parametrize("top_k", [1, 2, 3])
    @pytest.mark.parametrize("tower", ["transformer", "visual.transformer"])
    def test_a_block_computes_clips_ffn(self, tmp_path: Path, top_k: int, tower: str) -> None:
        state, model = clip_state(), ImageClassifier(replace(CONFIG, top_k=top_k))
        start_from(model, save(state, tmp_path / "clip.pt"))
        x = torch.randn(3, 7, WIDTH, dtype=torch.float64)
        for layer, block in enumerate(blocks_of(model.double().eval(), tower)):
            assert isinstance(block.general_experts, GeneralExperts)
            expected = dense_ffn(state, f"{tower}.resblocks.{layer}.", x)
            y, routing = block.general_experts(x)
            assert len(routing.expert_ids.unique()) > 1  # the law would be empty if one expert had all the tokens
            if top_k == 1:  # the gate is the probability itself
                expected = routing.probs.amax(-1, keepdim=True) * expected
            torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
            after_attention = x + block.attention(TokenSequence(block.attention_norm(x)))[0]
            out, routing, _ = block(TokenSequence(x))
            expected = dense_ffn(state, f"{tower}.resblocks.{layer}.", after_attention)
            if top_k == 1:
                expected = routing.probs.amax(-1, keepdim=True) * expected
            torch.testing.assert_close(out, after_attention + expected, rtol=0, atol=1e-10)

    def test_a_dense_block_does_too(self, tmp_path: Path) -> None:
        state, model = clip_state(), ImageClassifier(replace(CONFIG, dense=True))
        start_from(model, save(state, tmp_path / "clip.pt"))
        block = blocks_of(model.double().eval(), "transformer")[1]
        x = torch.randn(5, 7, WIDTH, dtype=torch.float64)
        x_attended = x + block.attention(TokenSequence(block.attention_norm(x)))[0]
        expected = x_attended + dense_ffn(state, "transformer.resblocks.1.", x_attended)
        torch.testing.assert_close(block(TokenSequence(x))[0], expected, rtol=0, atol=1e-10)

    def test_what_starts_at_zero_learns_from_the_first_step(self, tmp_path: Path) -> None:
        model = ImageClassifier(CONFIG)
        start_from(model, save(clip_state(), tmp_path / "clip.pt"))
        block = blocks_of(model, "visual.transformer")[0]
        block(TokenSequence(torch.randn(3, 7, WIDTH)))[0].pow(2).sum().backward()
        for expert in (block.global_expert, block.modality_expert):
            assert expert is not None
            assert not expert.fc2.weight.any()
            assert expert.fc2.weight.grad is not None
            assert expert.fc2.weight.grad.any()

    def test_only_experts_and_embeddings_change(self, tmp_path: Path) -> None:
        model = Captioner(CONFIG)
        before = snapshot_of(model)
        start_from(model, save(clip_state(), tmp_path / "clip.pt"))
        embeddings = ("token_embedding.", "token_projection.", "text_position")
        experts = (".general_experts.", ".global_expert.fc2.", ".modality_expert.fc2.")
        for name in changed(before, model):
            assert any(part in name for part in embeddings + experts)
            assert ".router." not in name
            assert ".fusion." not in name

    def test_blocks_that_clip_has_not_keep_their_start(self, tmp_path: Path) -> None:
        model = ImageClassifier(replace(CONFIG, text_encoder_layers=3))
        before = snapshot_of(model)
        lines = start_from(model, save(clip_state(layers=1), tmp_path / "clip.pt"))
        assert lines[2:] == [
            "text_encoder: copied, the FFNs of 1 of 3 blocks",
            "image_encoder: copied, the FFNs of 1 of 2 blocks",
        ]
        assert not any(f"blocks.{layer}." in name for name in changed(before, model) for layer in (1, 2))

    def test_a_tower_of_another_width_is_untouched(self, tmp_path: Path) -> None:
        model = ImageClassifier(CONFIG)
        before = snapshot_of(model)
        lines = start_from(model, save(clip_state(image_width=16), tmp_path / "clip.pt"))
        assert lines[3] == "image_encoder: skipped, embed_dim 8 and hidden 24: they must be 16 and 48"
        assert not any("image" in name for name in changed(before, model))

    @pytest.mark.parametrize("extra", ["mlp.ln.weight", "ls_2.gamma"])
    def test_an_ffn_that_an_expert_cannot_be_is_skipped(self, tmp_path: Path, extra: str) -> None:
        state = clip_state() | {f"transformer.resblocks.0.{extra}": torch.ones(WIDTH)}
        lines = start_from(ImageClassifier(CONFIG), save(state, tmp_path / "clip.pt"))
        assert what_became(lines) == dict.fromkeys(PARTS, "copied") | {"text_encoder": "skipped"}

    def test_another_activation_is_skipped(self, tmp_path: Path) -> None:
        lines = start_from(ImageClassifier(replace(CONFIG, activation="relu")), save(clip_state(), tmp_path / "c.pt"))
        assert "text_encoder: skipped, activation must be gelu, as CLIP's" in lines


class TestFiles:
    def test_every_form_of_a_state_dict_gives_the_same_model(self, tmp_path: Path) -> None:
        state = clip_state()
        apart = {name if name.startswith("visual.") else f"text.{name}": value for name, value in state.items()}
        save_file(state, tmp_path / "clip.safetensors")
        sources = [
            save(state, tmp_path / "bare.pt"),
            save({"epoch": 3, "state_dict": {f"module.{name}": v for name, v in state.items()}}, tmp_path / "run.pt"),
            save(apart, tmp_path / "apart.pt"),
            str(tmp_path / "clip.safetensors"),
        ]
        first = ImageClassifier(CONFIG)
        start = snapshot_of(first)
        start_from(first, sources[0])
        for source in sources[1:]:
            model = ImageClassifier(CONFIG)
            model.load_state_dict(start)
            start_from(model, source)
            assert changed(snapshot_of(first), model) == set()

    def test_nothing_that_fits_names_the_widths(self, tmp_path: Path) -> None:
        model = ImageClassifier(replace(CONFIG, embed_dim=4, text_embed_dim=4, activation="silu"))
        before = snapshot_of(model)
        with pytest.raises(
            UserError, match=r"--embed_dim 8 --text_embed_dim 8 --expansion_factor 3 --activation gelu$"
        ):
            start_from(model, save(clip_state(), tmp_path / "clip.pt"))
        assert changed(before, model) == set()

    def test_bad_files_are_one_line(self, tmp_path: Path) -> None:
        (tmp_path / "noise.pt").write_bytes(b"noise")
        (tmp_path / "noise.safetensors").write_bytes(b"noise")
        (tmp_path / "empty.pt").write_bytes(b"")
        whole = Path(save(clip_state(vocabulary=5), tmp_path / "whole.pt")).read_bytes()
        (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
        save([torch.ones(2)], tmp_path / "list.pt")
        save({}, tmp_path / "nothing.pt")
        save({"head.weight": torch.ones(2, 2)}, tmp_path / "other.pt")
        paths = [*sorted(tmp_path.iterdir()), tmp_path / "missing.pt", tmp_path]
        model = ImageClassifier(replace(CONFIG, vocab_size=5, embed_dim=4))
        for path in paths:
            with pytest.raises(UserError) as caught:
                start_from(model, str(path))
            assert str(path) in str(caught.value)
            assert "\n" not in str(caught.value)

    def test_code_in_a_file_is_not_run(self, tmp_path: Path) -> None:
        class Payload:
            def __reduce__(self) -> tuple[Any, ...]:
                return os.mkdir, (str(tmp_path / "ran"),)

        with pytest.raises(UserError, match="holds more than tensors"):
            start_from(ImageClassifier(CONFIG), save({**clip_state(), "more": Payload()}, tmp_path / "code.pt"))
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("source", ["", "open_clip:", "open_clip:ViT-B-32", "open_clip:/openai", "openclip:a/b"])
    def test_a_malformed_source_shows_the_form(self, source: str) -> None:
        with pytest.raises(UserError, match="it must be open_clip:<model>/<tag>, such as"):
            start_from(ImageClassifier(CONFIG), source)


class TestOpenClip:
    """Through open_clip itself, with a model that these tests register."""

    @pytest.fixture
    def open_clip(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of open_clip's and timm's imports
            import open_clip
        towers = {"width": WIDTH, "layers": 2, "mlp_ratio": HIDDEN / WIDTH}
        vision = {**towers, "head_width": 4, "image_size": 4, "patch_size": 2}
        text = {**towers, "heads": 2, "context_length": CONTEXT}
        config = {"embed_dim": WIDTH, "vision_cfg": vision, "text_cfg": text}
        (tmp_path / "ViT-tiny.json").write_text(json.dumps(config))
        monkeypatch.setattr("open_clip.factory._MODEL_CONFIG_PATHS", [tmp_path / "ViT-tiny.json"])
        monkeypatch.setattr("open_clip.factory._MODEL_CONFIGS", {})
        open_clip.factory._rescan_model_configs()
        return open_clip

    def test_a_block_computes_what_open_clips_does(self, open_clip: Any, tmp_path: Path) -> None:
        clip = open_clip.create_model("ViT-tiny")
        for parameter in clip.parameters():
            nn.init.normal_(parameter)
        path = save(clip.state_dict(), tmp_path / "clip.pt")
        model = ImageClassifier(CONFIG)
        lines = start_from(model, f"open_clip:ViT-tiny/{path}")
        assert what_became(lines) == dict.fromkeys(PARTS, "copied")
        x = torch.randn(3, 7, WIDTH, dtype=torch.float64)
        model, clip = model.double().eval(), clip.double().eval()
        for tower, theirs in (("transformer", clip.transformer), ("visual.transformer", clip.visual.transformer)):
            for ours, block in zip(blocks_of(model, tower), theirs.resblocks, strict=True):
                torch.testing.assert_close(ours.general_experts(x)[0], block.mlp(block.ln_2(x)), rtol=0, atol=1e-10)

    def test_a_tag_trained_with_quick_gelu_says_so(
        self, open_clip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = save(open_clip.create_model("ViT-tiny").state_dict(), tmp_path / "clip.pt")
        tags = {"ours": {"file": path, "quick_gelu": True}}
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "ViT-tiny", tags)
        lines = start_from(ImageClassifier(CONFIG), "open_clip:ViT-tiny/ours")
        assert lines[2] == "text_encoder: copied, the FFNs of 2 of 2 blocks (trained with QuickGELU: close, not equal)"

    def test_mistakes_are_one_line(self, open_clip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_network(*_: object, **__: object) -> None:
            raise ConnectionError("Name or service\nnot known")

        monkeypatch.setattr("huggingface_hub.HfApi.model_info", no_network)
        tags = {"far": {"hf_hub": "somebody/clip/"}}
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "ViT-tiny", tags)
        other = save(clip_state(vocabulary=5), tmp_path / "other.pt")
        expected = {
            "open_clip:ViT-tyni/far": "no model 'ViT-tyni' (did you mean 'ViT-tiny'?)",
            "open_clip:ViT-tiny/near": "no tag 'near', nor is that a file: it must be a file, or one of far",
            "open_clip:ViT-tiny/far": "there must be a network, or open_clip:ViT-tiny/<file>",
            f"open_clip:ViT-tiny/{other}": "cannot be read as ViT-tiny",
        }
        for source, message in expected.items():
            with pytest.raises(UserError) as caught:
                start_from(ImageClassifier(CONFIG), source)
            assert message in str(caught.value)
            assert "\n" not in str(caught.value)

    def test_a_cached_tag_needs_no_network(
        self, open_clip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = save(open_clip.create_model("ViT-tiny").state_dict(), tmp_path / "clip.pt")
        kept = {("somebody/clip", "open_clip_pytorch_model.bin"): path}
        monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *asked: kept.get(asked))
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "ViT-tiny", {"far": {"hf_hub": "somebody/clip/"}})
        lines = start_from(ImageClassifier(CONFIG), "open_clip:ViT-tiny/far")
        assert what_became(lines) == dict.fromkeys(PARTS, "copied")

    def test_a_hub_that_never_answers_is_not_waited_for(self, open_clip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        released = threading.Event()
        monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: released.wait(30))
        monkeypatch.setattr(hub, "PATIENCE_SECONDS", 0.1)
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "ViT-tiny", {"far": {"hf_hub": "somebody/clip/"}})
        with pytest.raises(UserError, match="no answer in"):
            start_from(ImageClassifier(CONFIG), "open_clip:ViT-tiny/far")
        released.set()
