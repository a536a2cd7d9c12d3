"""The benchmarks: that what races is the same function and the same work, and that each says what it promises."""

from __future__ import annotations

import copy
import importlib
import json
import shlex
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffmoe import cli
from diffmoe.config import UserError
from diffmoe.config.settings import parse_settings
from diffmoe.model.encoders import UnifiedModalEncoder
from diffmoe.model.layers import Expert
from diffmoe.model.moe import GeneralExperts

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(FOLDER))  # where `python benchmarks/x.py` finds its neighbours
(
    block,
    caption_baselines,
    classifiers,
    inference,
    memory,
    moe_layer,
    naive,
    peers,
    recipe_results,
    recipes,
    report,
    tables,
    timing,
    train_step,
    vits,
) = (
    importlib.import_module(name)
    for name in (
        *("block", "caption_baselines", "classifiers", "inference", "memory", "moe_layer", "naive", "peers"),
        *("recipe_results", "recipes", "report", "tables", "timing", "train_step", "vits"),
    )
)

MATMUL: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue] - it is there
ONCE = ["--rounds", "1", "--steps", "1", "--warmup", "0"]


def outcome(capsys: pytest.CaptureFixture[str], name: str, *flags: str) -> dict[str, Any]:
    """The JSON object of a benchmark."""
    capsys.readouterr()
    importlib.import_module(name).main([*flags, "--json"])
    return json.loads(capsys.readouterr().out)


def disturbed(pool: GeneralExperts, seed: int = 0) -> GeneralExperts:
    """With parameters none of which is as it was made, so that every one of them counts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in pool.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.2)
    return pool


def gradients(layer: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's output, and the gradient at its input."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(grad)
    assert x.grad is not None
    return y.detach(), x.grad


# What races is the same function.


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_the_loop_with_masks_is_the_pool(top_k: int) -> None:
    pool = disturbed(GeneralExperts(8, 5, top_k, 2).double())
    loop = peers.LoopWithMasks(pool)
    x, grad = torch.randn(2, 30, 8, dtype=torch.float64).cumsum(1)
    ours, theirs = gradients(peers.Routed(pool), x, grad), gradients(peers.Routed(loop), x, grad)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(pool.router.keys.grad, loop.router.keys.grad)
    for number, expert in enumerate(loop.experts):
        for weight, stack in ((expert.fc1.weight, pool.fc1_weight), (expert.norm.bias, pool.shift)):
            assert stack.grad is not None
            grad_weight = torch.zeros_like(weight) if weight.grad is None else weight.grad
            torch.testing.assert_close(grad_weight, stack.grad[number])


def test_the_loop_with_masks_leaves_padding_out_as_the_pool_does() -> None:
    pool = disturbed(GeneralExperts(8, 5, 2).double())
    x, mask = torch.randn(2, 6, 8, dtype=torch.float64), torch.arange(6) < torch.tensor([[6], [3]])
    (y, routing), (expected, _) = peers.LoopWithMasks(pool)(x, mask), pool(x, mask)
    torch.testing.assert_close(y, expected)
    assert (y[1, 3:] == 0).all()
    assert int(routing.tokens_per_expert.sum()) == 2 * 9


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_the_experts_of_transformers_are_the_pool(implementation: str) -> None:
    pytest.importorskip("transformers")
    pool = GeneralExperts(16, 4, 2, 2)
    with torch.no_grad():  # theirs have neither biases nor gain and shift: as made, ours have no effect
        pool.fc1_weight.mul_(20)
        pool.fc2_weight.mul_(20)
    x, grad = torch.randn(2, 40, 16)
    layer = peers.HuggingFaceExperts(pool, implementation)
    ours, theirs = gradients(peers.Routed(pool), x, grad), gradients(layer, x, grad)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.experts.up_proj.grad, pool.fc1_weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.router.keys.grad, pool.router.keys.grad, rtol=1e-4, atol=1e-4)


def test_every_peer_that_can_run_here_does_and_the_others_say_why() -> None:
    shape = peers.Shape(embed_dim=16, num_experts=4, top_k=2, expansion_factor=2, tokens=32, seq_len=8)
    pool = GeneralExperts(16, 4, 2, 2)
    x, grad = torch.randn(2, 32, 16)
    for name, peer in peers.PEERS.items():
        reason = peers.why_not(name, shape)
        if reason is not None:
            assert "is not installed" in reason
            continue
        layer = peer.build(pool, shape)
        y, grad_x = gradients(layer, x, grad)
        assert y.shape == x.shape
        assert grad_x.abs().sum() > 0
        assert layer.router_weight.grad is not None, f"{name}: its router learns nothing"


def test_a_peer_that_would_fill_the_memory_does_not_run() -> None:
    pytest.importorskip("transformers")
    shape = peers.Shape(embed_dim=512, num_experts=8, top_k=2, expansion_factor=4, tokens=4096, seq_len=64)
    # 8,192 slots, each with two matrices of 512 x 2,048 float32
    expected = f"it would copy {8192 * 2 * 512 * 2048 * 4 / 1e9:.1f} GB of weights, an expert's for every slot"
    assert peers.why_not("transformers batched_mm", shape) == expected


def test_the_naive_model_is_the_model() -> None:
    config = classifiers.preset_config("tiny", embed_dim=32, num_heads=2, vocab_size=50, text_embed_dim=8)
    model = classifiers.classifier(config)
    for module in model.modules():
        if isinstance(module, GeneralExperts):
            disturbed(module)
    other = naive.naive_classifier(model)
    pools = [m.general_experts for m in other.modules() if isinstance(m, UnifiedModalEncoder)]
    assert len(pools) == 2
    assert all(isinstance(pool, peers.LoopWithMasks) for pool in pools)
    images, labels = classifiers.batch_source(config, 4, "cpu")()
    found = []
    for candidate in (model, other):
        torch.manual_seed(0)  # the sentences that are drawn
        out = candidate(images, labels)
        (out["logits"].square().sum() + out["router_loss"]).backward()
        stem = candidate.backbone.image_position.grad
        found.append((out["logits"].detach(), out["zero_shot_logits"].detach(), out["router_loss"].detach(), stem))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


# What races is the same work.


def test_the_dense_layer_has_the_pools_flops_less_the_routers() -> None:
    tokens, width, num_experts, top_k = 24, 16, 4, 2
    pool = GeneralExperts(width, num_experts, top_k, 3)
    dense = Expert(width, top_k * 3)
    x = torch.randn(tokens, width)
    expected = tokens * 2 * 2 * width * (top_k * 3 * width)  # two products, two FLOPs a multiply-add
    router_dim = peers.Routed(pool).router_weight.shape[1]
    router = 2 * num_experts * router_dim * width + 2 * tokens * width * num_experts
    assert vits.count_flops(dense, x) == expected
    assert vits.count_flops(peers.LoopWithMasks(pool), x) == expected + router


def test_blocks_have_equal_flops_but_for_the_router() -> None:
    args = block.parse_args(["--embed_dim", "32", "--head_dim", "8", "--num_experts", "4", "--expansion_factor", "2"])
    config = block.block_config(32, args)
    x = torch.randn(3, 10, 32)
    moe = block.MoeBlock(config)
    moe.block.general_experts = peers.LoopWithMasks(moe.block.general_experts)  # exactly its rows, no padding
    attention = 2 * 30 * 4 * 32 * 32 + 2 * 2 * 3 * 10 * 10 * 32
    mlp = 30 * 2 * 2 * 32 * (4 * 2 * 32)  # global, vision and two routed experts, each 2 x 32 wide
    router = 2 * 4 * moe.router_weight.shape[1] * 32 + 2 * 30 * 32 * 4
    assert vits.count_flops(vits.VitBlock(config), x) == attention + mlp
    assert vits.count_flops(vits.timm_block(config), x) == attention + mlp
    assert vits.count_flops(moe, x) == attention + mlp + router


@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_the_vit_of_timm_has_the_classifiers_active_flops(preset: str) -> None:
    config = classifiers.preset_config(preset, img_encoder_layers=2)
    target = classifiers.active_flops(config, 128) / 128
    vit = vits.timm_classifier(config, target)
    assert vits.picture_flops(vit, config) == pytest.approx(target, rel=0.01)


def test_a_plain_step_is_the_loops_own() -> None:
    config = classifiers.preset_config("tiny", embed_dim=32, num_heads=2, dense=True, dropout=0.0)
    ours = classifiers.ImageClassifier(config)  # without descriptions and experts it has no losses of its own
    theirs = copy.deepcopy(ours)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = theirs

        def forward(self, images: Tensor) -> Tensor:
            return self.model.classify(images).logits

    draw = classifiers.batch_source(config, 8, "cpu")
    steps = classifiers.TrainingStep(ours, "float32"), classifiers.PlainStep(Logits(), "float32")
    before = copy.deepcopy(ours.state_dict())
    for _ in range(2):
        batch = draw()
        for step in steps:
            step(batch)
    torch.testing.assert_close(theirs.state_dict(), ours.state_dict(), rtol=1e-5, atol=1e-6)
    assert not torch.equal(ours.head.weight, before["head.weight"])


def test_the_naive_step_has_an_optimizer_of_its_own() -> None:
    config = classifiers.preset_config("tiny", embed_dim=32, num_heads=2, vocab_size=50, text_embed_dim=8)
    step = naive.NaiveStep(naive.naive_classifier(classifiers.classifier(config)))
    step(classifiers.batch_source(config, 4, "cpu")())
    optimizer = step.step.trainee.optimizer
    assert optimizer.state
    assert not optimizer.defaults["fused"]


def test_active_flops_are_the_dense_presets_whatever_the_batch() -> None:
    config = classifiers.preset_config("tiny", embed_dim=32, num_heads=2, vocab_size=50, text_embed_dim=8)
    model = classifiers.classifier(classifiers.dataclasses.replace(config, dense=True))
    images, labels = classifiers.batch_source(config, 5, "cpu")()
    assert classifiers.active_flops(config, 5) == vits.count_flops(model, images, labels)


# How it races.


def test_contenders_get_the_same_inputs_and_none_comes_twice() -> None:
    numbers = iter(range(1000))
    seen: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    order: list[str] = []

    def contender(name: str) -> Any:
        return lambda number: (seen[name].append(number), order.append(name))

    args = timing.argparse.Namespace(rounds=2, steps=2, warmup=1, device="cpu")
    times = timing.race({name: contender(name) for name in seen}, lambda: next(numbers), args)
    assert seen["a"] == seen["b"] == seen["c"] == list(range(9))  # three rounds, in each one step untimed and two timed
    assert order == [name for turns in ("abc", "bca", "cab") for name in turns for _ in range(3)]
    assert [len(rounds) for rounds in times.seconds.values()] == [2, 2, 2]


def test_a_slow_step_counts_once_and_an_untimed_one_not_at_all() -> None:
    def contender(seconds: float) -> None:
        timing.time.sleep(seconds)

    inputs = iter([0.2, 0.0, 0.05])  # untimed, timed, timed
    args = timing.argparse.Namespace(rounds=1, steps=2, warmup=0, device="cpu")
    times = timing.race({"a": contender}, lambda: next(inputs), args)
    assert 0.025 <= times.seconds["a"][0] < 0.1


def test_a_ratio_is_the_median_of_the_rounds_own() -> None:
    times = timing.Times({"a": [2.0, 4.0, 100.0], "b": [1.0, 4.0, 10.0]})
    assert times.ratio("a", "b") == 2  # of 2, 1 and 10; the ratio of the medians would be 1
    assert times.ms("a") == 4000
    assert tables.comparison(times, "a", "b")["of_rounds"] == "1.00 to 10.00"


def test_nine_tenths_of_the_rounds_stay_under_the_p90() -> None:
    assert timing.Times({"a": [float(n) for n in range(10, 0, -1)]}).p90_ms("a") == 9000
    assert timing.Times({"a": [3.0]}).p90_ms("a") == 3000


@pytest.mark.parametrize("mode", ["float32", "onednn"])
def test_a_mode_lasts_as_long_as_its_step(mode: str) -> None:
    MATMUL.fp32_precision = "ieee"

    def fail_inside() -> None:
        with timing.float32_products(mode):
            assert MATMUL.fp32_precision == {"float32": "none", "onednn": "bf16"}[mode]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert MATMUL.fp32_precision == "ieee"


def test_bfloat16_is_what_both_sides_of_the_layer_race_compute_in() -> None:
    dtypes = {}
    for name, layer in (("dense", Expert(16, 2)), ("routed", peers.Routed(GeneralExperts(16, 4, 2, 1)))):
        layer.register_forward_hook(lambda _m, _x, y, name=name: dtypes.__setitem__(name, y.dtype))
        x = torch.randn(8, 16)
        moe_layer.LayerStep(layer, "bfloat16", "cpu")((x, x))
    assert dtypes == {"dense": torch.bfloat16, "routed": torch.bfloat16}


def test_the_routing_is_another_one_at_every_step() -> None:
    layer = peers.Routed(GeneralExperts(16, 8, 2, 1))
    step = moe_layer.LayerStep(layer, "float32", "cpu")
    x = torch.randn(512, 16)
    chosen = []
    for _ in range(3):
        chosen.append(layer.pool(x)[1].expert_ids)
        step((x, x))  # even on the same tokens
    assert not torch.equal(chosen[0], chosen[1])
    assert not torch.equal(chosen[1], chosen[2])


@pytest.mark.parametrize("top_k", [1, 2])
def test_skew_gives_one_expert_half_of_the_slots(top_k: int) -> None:
    torch.manual_seed(0)  # of some draws it is 0.44
    pool = GeneralExperts(32, 8, top_k, 1)
    moe_layer.skew(pool, torch.randn(2048, 32))
    share = pool(torch.randn(2048, 32))[1].tokens_per_expert / (2048 * top_k)
    assert float(share[0]) == pytest.approx(0.5, abs=0.05)
    assert float(share[1:].min()) > 0


def test_the_peak_is_what_is_held_at_once() -> None:
    def step(count: int) -> None:
        first = torch.empty(count)
        del first
        _both = torch.empty(count), torch.empty(2 * count)

    assert memory.peak_of_steps(step, [1000, 3000, 2000], "cpu") == 4 * 3 * 3000


# What they say.

LAYER = ["--embed_dim", "16", "--num_experts", "4", "8", "--tokens", "32", "--seq_len", "8", "--skew", "--peers"]
STEP = ["--presets", "tiny", "--embed_dim", "32", "--top_k", "2", "--batch_size", "4", "--memory", "--profile"]
INFERENCE = ["--presets", "tiny", "--batch_size", "1", "3", "--generation", "--generation_batch", "2", "--alone", "1"]
COMPARED = {"contender", "ms", "over", "ratio", "goal", "reached"}


@pytest.mark.parametrize(
    ("name", "flags", "titles", "columns"),
    [
        ("moe_layer", [*LAYER, *ONCE], ["Routed pool"], {"embed_dim", "mode", *COMPARED}),
        ("block", ["--embed_dim", "32", "--batch_size", "2", *ONCE], ["Block"], {"embed_dim", "mode", *COMPARED}),
        (
            "train_step",
            [*STEP, "--baseline", *ONCE, "--peak_tflops", "1"],
            ["Training step", "Against a naive model and timm", "Peak memory of a step", "Where the time goes"],
            {"preset", "embed_dim", "top_k", "images_per_second", "model_flops_utilisation", *COMPARED},
        ),
        (
            "inference",
            [*INFERENCE, "--generation_rounds", "1", "--caption_len", "8", *ONCE],
            ["Classification", "Captions"],
            {"preset", "batch_size", "mode", "p90_ms", *COMPARED},
        ),
        (
            "data",
            ["--pictures", "8", "--batch_size", "4", "--epochs", "1", "--img_size", "8", "--workers", "1"],
            ["Pictures a second"],
            {"pictures", "a_second", "over", "ratio", "goal", "reached"},
        ),
    ],
)
def test_a_benchmark_says_what_it_promises(
    capsys: pytest.CaptureFixture[str], name: str, flags: list[str], titles: list[str], columns: set[str]
) -> None:
    said = outcome(capsys, name, *flags)
    assert said["benchmark"] == name
    assert {"date", "cpu", "cores", "threads", "torch", "python"} <= set(said["environment"])
    assert list(said["tables"]) == titles
    assert columns <= set(said["tables"][titles[0]][0])
    for rows in said["tables"].values():
        assert rows
        for row in rows:
            assert row.get("ratio", 1) > 0
            assert row.get("ms", 1) > 0


def test_a_goal_is_beside_what_it_is_about_only() -> None:
    promised = moe_layer.parse_args(["--num_experts", "8", "64"])
    assert moe_layer.over_dense(512, "bfloat16", promised) == 1.20
    assert moe_layer.over_dense(64, "bfloat16", promised) is None
    for flags in (["--tokens", "64"], ["--num_experts", "64"], ["--top_k", "1"], ["--backends", "padded"]):
        assert moe_layer.over_dense(512, "float32", moe_layer.parse_args(flags)) is None


def test_goals_are_met_from_their_side() -> None:
    assert tables.judged(1.1, at_most=1.1)["reached"] == "yes"
    assert tables.judged(1.11, at_most=1.1)["reached"] == "no"
    assert tables.judged(3.0, at_least=3)["reached"] == "yes"
    assert tables.judged(2.9, at_least=3)["reached"] == "no"
    assert tables.judged(2.9)["reached"] is None


def test_tables_align_and_leave_empty_columns_out() -> None:
    rows = [{"a_b": "x", "none": None, "ms": 1234.5}, {"a_b": "long", "ms": 0.126, "more": 3}]
    assert tables.markdown(rows).splitlines() == [
        "| a b  | ms    | more |",
        "| ---- | ----- | ---- |",
        "| x    | 1,234 |      |",
        "| long | 0.13  | 3    |",
    ]


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("block", ["--rounds", "0"], "rounds is 0, steps 2: both must be at least 1"),
        ("moe_layer", ["--skew", "--top_k", "3"], "skew takes a top_k of at most 2, not 3"),
        ("moe_layer", ["--peers", "--tokens", "100"], "tokens is 100: it must be a multiple of seq_len (64)"),
        ("train_step", ["--device", "cuda"], "device is 'cuda': this machine has cpu"),
    ],
)
def test_a_mistake_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, flags: list[str], message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(name).main(flags)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_captions_are_written_to_their_full_length() -> None:
    args = inference.parse_args(["--caption_len", "12"])
    config = classifiers.preset_config("tiny", max_text_len=12)
    images, _ = classifiers.batch_source(config, 3, "cpu")()
    images, model = images.double(), inference.captioner(config, args).double()  # untrained, two words are near a tie
    with torch.no_grad():
        model.output_bias[-1] = 100  # the end token: without a minimum, every caption would end at once
    (together,) = inference.Generation(model, args)(images)
    assert together.shape == (3, 12)
    assert (together != 0).all()  # no padding: none ended before
    assert torch.equal(torch.cat(inference.Generation(model, args, alone=3)(images)), together)
    assert torch.equal(inference.Generation(model, args, use_cache=False)(images)[0], together)


def test_the_constant_caption_has_the_commonest_words() -> None:
    train = [["a dog runs in the grass ."], ["a dog in the snow", "a cat"], ["two men in the park play"]]
    # Counting captions: a 3, dog 2, in 3, the 3; of those with 4 or 5 words "a dog in the snow" has most on average.
    assert caption_baselines.constant_caption(train, max_words=5) == "a dog in the snow"


def test_the_nearest_picture_is_the_same_one_whatever_its_brightness_or_size() -> None:
    gallery = torch.randint(0, 256, (6, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    asked = (gallery[[4, 0, 2]].float() * 0.5 + 20).to(torch.uint8)
    assert caption_baselines.nearest_pictures(asked, gallery, size=16, chunk=2).tolist() == [4, 0, 2]


def test_word_vectors_compare_words() -> None:
    vectors = caption_baselines.word_vectors(["a dog", "dog a", "cat", "unknown"], ["a dog", "a cat"])
    assert (vectors[0] @ vectors[1]).item() == pytest.approx(1)
    assert (vectors[0] @ vectors[2]).item() == 0
    assert not vectors[3].any()


def test_a_margin_and_its_error_are_those_of_a_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)  # no Java: METEOR's processes would take a minute
    written = ["a dog runs", "a man in a hat", "two men", "a dog on the grass", "the red boat", "a child"]
    baseline = ["a dog", "a dog", "a dog runs on grass", "a dog in a hat", "a dog", "men"]
    references = [
        ["a dog runs on grass", "the dog"],
        ["a man"],
        ["two men run"],
        ["grass"],
        ["a boat"],
        ["a child jumps"],
    ]
    worse = ["zebra"] * 6
    found = caption_baselines.margins(written, [worse, baseline], references, groups=6)
    # ROUGE-L is a mean over pictures, and leaving one of six out each time gives the error of a mean.
    each = [
        caption_baselines.caption_metrics([ours], [texts])["rouge_l"]
        - caption_baselines.caption_metrics([theirs], [texts])["rouge_l"]
        for ours, theirs, texts in zip(written, baseline, references, strict=True)
    ]
    assert found["margin"]["rouge_l"] == pytest.approx(statistics.mean(each))
    assert found["standard_error"]["rouge_l"] == pytest.approx(statistics.stdev(each) / 6**0.5)
    same = caption_baselines.margins(written, [written, worse], references, groups=3)
    assert set(same["margin"].values()) == set(same["standard_error"].values()) == {0.0}


def test_the_suites_commands_are_right() -> None:
    scripts = set()
    for command in report.SUITE:
        script, *flags = shlex.split(command)
        importlib.import_module(script.removesuffix(".py")).parse_args(flags)
        scripts.add(script)
    assert scripts == {"moe_layer.py", "block.py", "train_step.py", "inference.py", "data.py"}


def test_the_report_has_the_figures_of_its_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = shlex.join(["block.py", "--embed_dim", "32", "--batch_size", "1", "--modes", "float32", *ONCE])
    report.main(["--output", str(tmp_path / "RESULTS.md"), "--suite", command])
    text = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    assert f"`python benchmarks/{command}`" in text
    assert f"| torch            | {torch.__version__.split('+')[0]}" in text
    rows = [line for line in text.splitlines() if "MoE block" in line]
    assert len(rows) == 2
    reached = sum(line.split("|")[-2].strip() == "yes" for line in rows)
    assert f"{reached} of 2 goals reached" in text
    assert f"{reached} of 2 goals reached" in capsys.readouterr().out


def test_the_results_are_those_that_are_kept() -> None:
    """`docs/results.md` says what its script makes of `benchmarks/results/`, and nothing else."""
    results = importlib.import_module("results")
    comparisons, recipes_kept = results.kept()
    assert comparisons
    assert results.WRITTEN.read_text(encoding="utf-8") == results.document(comparisons, recipes_kept)
    assert (results.WRITTEN.parent / results.PICTURE).is_file()


def test_a_comparison_is_kept_and_told_with_how_it_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = importlib.import_module("results")
    given = json.loads(sorted(results.KEPT.glob("*.json"))[0].read_text(encoding="utf-8"))
    given["arms"]["moe"]["test_accuracy"] |= {"mean": 0.1235, "std": 0.002}
    (tmp_path / "comparison.json").write_text(json.dumps({**given, "page": "somewhere"}), encoding="utf-8")
    monkeypatch.setattr(results, "KEPT", tmp_path)
    monkeypatch.setattr(results, "WRITTEN", tmp_path / "results.md")
    assert results.main([str(tmp_path / "comparison.json")]) == 0
    (tmp_path / "comparison.json").unlink()
    (kept,) = tmp_path.glob("*.json")
    assert "page" not in json.loads(kept.read_text(encoding="utf-8"))
    told = (tmp_path / "results.md").read_text(encoding="utf-8")
    for shown in (
        given["command"],
        given["machine"]["cpu"],
        given["versions"]["torch"],
        given["date"],
        "12.35 ± 0.20%",
    ):
        assert shown in told
    (tmp_path / "other.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"other\.json is no comparison\.json: it lacks command, "):
        results.read(tmp_path / "other.json")


def test_a_comparison_of_many_arms_is_a_table_and_in_no_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = importlib.import_module("results")
    given = json.loads(sorted(results.KEPT.glob("*.json"))[0].read_text(encoding="utf-8"))
    given["dataset"] = "some"
    given["arms"] |= {f"arm{number}": given["arms"]["moe"] for number in range(results.MANY)}
    (tmp_path / "comparison.json").write_text(json.dumps(given), encoding="utf-8")
    monkeypatch.setattr(results, "KEPT", tmp_path / "kept")
    path = results.keep(tmp_path / "comparison.json")
    more = len(given["arms"]) - 1
    assert path.name == f"some_flops_moe_and_{more}_more.json"
    told = results.document([results.read(path)])
    assert f"## some, equal flops: moe and {more} more\n" in told
    assert "| arm7 |" in told
    assert results.contenders([results.read(path)], []) == {}


@pytest.fixture(scope="module")
def two_seeds(
    tmp_path_factory: pytest.TempPathFactory, isolate: Callable[[Path], Any], tiny_flags: list[str]
) -> list[Path]:
    """The folders of two runs of digits that differ in their seeds."""
    root = tmp_path_factory.mktemp("seeds")
    argv = ["train_test", *tiny_flags, "--epochs", "2", "--tta", "flip", "--output_dir", str(root / "seen")]
    with isolate(root / "cache"):
        for seed in ("1", "0"):
            assert cli.main([*argv, "--seed", seed, "--save_dir", str(root / seed)]) == 0
    return [root / seed / "digits" for seed in ("1", "0")]


def test_the_runs_of_a_recipe_are_kept_and_told_with_how_they_were_made(
    two_seeds: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = importlib.import_module("results")
    monkeypatch.setattr(results, "KEPT", tmp_path)
    monkeypatch.setattr(results, "WRITTEN", tmp_path / "results.md")
    assert results.main(["--run", "plain", *map(str, two_seeds)]) == 0
    found = json.loads((tmp_path / "recipes" / "digits_plain.json").read_text(encoding="utf-8"))
    seed_1, seed_0 = (json.loads((folder / "metrics.json").read_text(encoding="utf-8")) for folder in two_seeds)
    assert found["seeds"] == [0, 1]
    for name in ("test_accuracy", "test_accuracy_tta", "train_seconds", "images_per_second"):
        assert found[name]["values"] == [seed_0[name], seed_1[name]]
        assert found[name]["mean"] == pytest.approx((seed_0[name] + seed_1[name]) / 2)
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert found["machine"]["cpu"] == seed_0["cpu"]
    assert found["date"] == seed_1["date"]
    assert 0 <= found["routing"]["min_load"] <= 1 <= found["routing"]["max_load"]
    told = (tmp_path / "results.md").read_text(encoding="utf-8")
    for shown in (found["command"], found["date"], found["machine"]["cpu"], "| digits | plain |", "mean over views"):
        assert shown in told
    assert told == results.document([], [found])
    assert (tmp_path / "images" / "results.png").is_file()


def test_the_command_of_a_recipe_repeats_its_run(two_seeds: list[Path]) -> None:
    own = recipe_results.recipe("plain", two_seeds)
    _, mode, *flags = shlex.split(own["command"])
    again = parse_settings(flags, mode=mode)
    was = parse_settings(["--config", str(two_seeds[1] / "config.yaml")], mode=mode)
    assert (again.data, again.model, again.training) == (was.data, was.model, was.training)
    assert (again.run.tta, again.run.precision, again.run.device) == ("flip", "32-true", "cpu")
    assert "--lr" not in flags  # it is the set's own


def test_what_is_no_recipe_is_one_line(two_seeds: list[Path], tmp_path: Path) -> None:
    def refused(match: str, *folders: Path, name: str = "plain") -> None:
        with pytest.raises(UserError, match=match):
            recipe_results.recipe(name, folders)

    refused("recipe plain has no runs")
    refused("it must be letters", *two_seeds, name="a/b")
    refused("each must be there once", two_seeds[0], two_seeds[0])
    refused("is no run that was trained and tested", tmp_path)
    other = shutil.copytree(two_seeds[1].parent, tmp_path / "other") / "digits"
    config = (other / "config.yaml").read_text(encoding="utf-8")
    (other / "config.yaml").write_text(config.replace("embed_dim: 16", "embed_dim: 32"), encoding="utf-8")
    refused("not of the first run's recipe: embed_dim is 16, not 32", two_seeds[0], other)
    (other / "config.yaml").write_text(config, encoding="utf-8")
    metrics = json.loads((other / "metrics.json").read_text(encoding="utf-8"))
    old = {
        name: value for name, value in metrics.items() if name not in (*recipe_results.OF_THE_MACHINE, "date", "load")
    }
    (other / "metrics.json").write_text(json.dumps(old), encoding="utf-8")
    refused("does not say on which machine it was made: if on this one, give --here", two_seeds[0], other)
    found = recipe_results.recipe("plain", [two_seeds[0], other], here=True)
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert found["seeds"] == [0, 1]


def test_every_contender_has_a_name_of_its_own_and_captions_have_no_part() -> None:
    results = importlib.import_module("results")
    comparison = {
        "dataset": "digits",
        "match": "flops",
        "arms": {"moe": {"test_accuracy": 1}, "cnn": {"test_accuracy": 2}},
    }
    captions = {"dataset": "shapes", "match": "flops", "arms": {"moe": {"test_accuracy": 3, "i2t_r1": 4}}}
    recipe = {"dataset": "digits", "name": "plain", "test_accuracy": 5}
    assert results.contenders([comparison, comparison, captions], [recipe]) == {
        "digits": {
            **{"plain": recipe, "moe, equal flops": {"test_accuracy": 1}, "cnn, equal flops": {"test_accuracy": 2}},
            **{"moe, equal flops (2)": {"test_accuracy": 1}, "cnn, equal flops (2)": {"test_accuracy": 2}},
        }
    }


HISTORY = """epoch,train_accuracy,val_accuracy,images_per_second,seconds
1,0.5,0.25,100,9
2,0.75,{},200,20
"""


def finished(trial: Any, accuracy: float) -> None:
    (trial.folder / "digits").mkdir(parents=True)
    (trial.folder / "digits" / "history.csv").write_text(HISTORY.format(accuracy), "utf-8")
    (trial.folder / "finished").touch()


def test_a_search_for_a_recipe_repeats_no_run_and_averages_the_last_epoch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plain", "slow:lr=0.1,epochs=2", "--seeds", "2", "--out", str(tmp_path), "--", "--dataset", "no such set"]
    args, flags = recipes.parse_args(words)
    for seed, accuracy in ((0, 0.5), (1, 0.7)):
        for variant in args.variants:
            finished(recipes.trial(variant, seed, flags, args.out), accuracy)
    recipes.main(words)
    told = capsys.readouterr().out.splitlines()
    assert sorted(told[:4])[0] == "plain, seed 0: 25.0 50.0"
    # Mean of 50 and 70; standard deviation sqrt(2 * 10^2 / 1).
    assert told[-2] == "| `plain` | 2 | 60.00 ± 14.14 | 75.00 | 200 | 20 |"
    assert recipes.trial("slow:lr=0.1,epochs=2", 1, flags, tmp_path).flags == [*flags, "--lr=0.1", "--epochs=2"]


def test_a_search_says_why_a_run_failed(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"plain, seed 0: .*no such set"):
        recipes.main(["plain", "--out", str(tmp_path), "--", "--dataset", "no such set"])
