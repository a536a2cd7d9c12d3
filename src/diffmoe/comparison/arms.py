"""What is compared: named arms, each the settings of a whole run; and whether they are alike but for that.

    moe               the settings as given
    dense             their fair twin, without routing
    cnn, cnn-fast     a three-stage CNN; the same with the tricks of fast training
    vit, timm         a plain ViT of this project's blocks; timm's
    NAME=FILE.yaml    the settings with those of a file (flags win, as everywhere)
    ARM:FIELD=VALUE,FIELD=VALUE     an arm with other fields; any other name before the colon is `moe` so changed

Imports nothing heavy: whatever is wrong here is said before torch is loaded.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, get_args

from diffmoe.config import DataConfig, GenerationConfig, ModelConfig, UserError, nearest
from diffmoe.config.settings import FIELDS, Settings, parse_settings

Match = Literal["flops", "seconds", "parameters"]
MATCHES: tuple[Match, ...] = get_args(Match)

COMPARED_GROUPS = ("data", "model", "training", "generation")
OF_THE_RUN = ("device", "num_devices", "precision", "init")
"""Fields of the run that decide what comes of it."""
ALIKE = {
    *(field.name for group in (DataConfig, GenerationConfig) for field in dataclasses.fields(group)),
    *("img_size", "in_channels", "epochs", "batch_size", "accumulation_steps", "warmup_fraction", "final_lr_fraction"),
    *("patience", "max_seconds", "seed", "device", "num_devices", "precision"),
}
"""Fields that arms must have in common: the data, its order, the steps and their schedule."""
OWN_WITH_SECONDS = {
    *("epochs", "batch_size", "accumulation_steps"),
    *("crop_padding", "flip", "alternate_flip", "erase", "cutout", "mixup", "cutmix"),
}
"""But for these where arms have equal time: each may use it as suits it."""
OF_POOLS = ("dense_fraction", "expert_sharing", "expert_lr_scale")
"""Fields of training that do nothing where a model is dense."""
OF_PICTURES = (
    *("img_size", "patch_size", "in_channels", "stem_width", "embed_dim", "num_heads", "img_encoder_layers"),
    "num_classes",
    *("dropout", "activation", "layer_norm_eps", "initializer_range", "position_range", "use_gradient_checkpointing"),
    *("attention", "vocab_size", "max_text_len", "text_embed_dim", "text_encoder_layers"),
    *("cross_modal_alignment_weight", "contrastive_loss_weight"),
)
"""Fields of a model that a baseline made of it keeps: not those of experts, routers and stems."""
SIZES = {"embed_dim", "img_encoder_layers", "expansion_factor", "dense_units"}
"""Fields that say how large a baseline is: where one is given, it is not brought to the first arm's size."""


@dataclass(frozen=True)
class Arm:
    """A contender."""

    name: str
    """As its folder is called."""
    kind: str
    """The named arm that it is, or is made from."""
    settings: Settings
    is_sized: bool
    """The user said how large it is."""

    def with_model(self, model: ModelConfig) -> Arm:
        """The same of another model."""
        return dataclasses.replace(self, settings=dataclasses.replace(self.settings, model=model))

    def fields(self) -> dict[str, Any]:
        """All that decides what comes of a run, by name."""
        groups = [dataclasses.asdict(getattr(self.settings, group)) for group in COMPARED_GROUPS]
        of_run = {name: getattr(self.settings.run, name) for name in OF_THE_RUN}
        return {name: value for group in (*groups, of_run) for name, value in group.items()}

    def differs_from(self, other: Arm) -> dict[str, tuple[Any, Any]]:
        """Each field in which the two differ: its own value, and the other's.

        Not what is of routed pools' training alone, where one of them has no pools.
        """
        theirs = other.fields()
        passed_over = OF_POOLS if self.settings.model.dense or other.settings.model.dense else ()
        return {
            name: (value, theirs[name])
            for name, value in self.fields().items()
            if value != theirs[name] and name not in passed_over
        }


def _dense(settings: Settings) -> Settings:
    if settings.model.dense:
        raise UserError("the settings are of a dense model already, so it would be the same")
    return dataclasses.replace(settings, model=settings.model.dense_twin())


def _baseline(settings: Settings, **fields: Any) -> Settings:
    kept = {name: getattr(settings.model, name) for name in OF_PICTURES}
    model = ModelConfig(**{**kept, "dense": True, "fusion_layers": 0, **fields})
    return dataclasses.replace(settings, model=model)


def _cnn_fast(settings: Settings) -> Settings:
    fast = _baseline(settings, architecture="cnn", patch_embed="whitened", expansion_factor=1)
    return dataclasses.replace(fast, training=dataclasses.replace(fast.training, optimizer="muon"))


ARMS: dict[str, Callable[[Settings], Settings]] = {
    "moe": lambda settings: settings,
    "dense": _dense,
    "cnn": lambda settings: _baseline(settings, architecture="cnn", patch_embed="conv", expansion_factor=1),
    "cnn-fast": _cnn_fast,
    "vit": lambda settings: _baseline(
        settings, num_general_experts=1, top_k=1, num_modality_specific_experts=0, expansion_factor=2
    ),
    "timm": lambda settings: _baseline(settings, architecture="timm", expansion_factor=4),
}

WITH_TEXT = ("moe", "dense")
"""Those that read texts too; the others are baselines for classes alone."""


def parse_arms(words: Sequence[str], argv: Sequence[str], match: Match, prog: str) -> list[Arm]:
    """The arms that the words name, of the settings that `argv` gives. Raises `UserError` where they are not alike."""
    arms = [_parse_arm(word, argv, prog) for word in words]
    names = [arm.name for arm in arms]
    if len(arms) < 2:
        raise UserError(f"arms are {' '.join(names)}: there must be at least 2 to compare; known are {', '.join(ARMS)}")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"arm {name} occurs twice: give one of them another name, as in other:lr=0.001")
    for a, b in combinations(arms, 2):
        check_alike(a, b, match)
    first = arms[0].settings
    if first.training.patience:
        raise UserError(f"patience is {first.training.patience}: it must be 0 in a comparison, or arms stop unalike")
    if match == "seconds" and first.training.max_seconds:
        raise UserError(
            "max_seconds is given with --match seconds, where the first arm's time is the others': leave one"
        )
    return arms


def _parse_arm(word: str, argv: Sequence[str], prog: str) -> Arm:
    found = re.fullmatch(r"(?P<name>\w[\w.-]*)((?P<kind>[:=])(?P<rest>.+))?", word)
    if found is None:
        raise UserError(f"arm is {word!r}: it must be a name, NAME=FILE.yaml or NAME:FIELD=VALUE,FIELD=VALUE")
    name, rest = found["name"], found["rest"]
    if found["kind"] is None and name not in ARMS:
        raise UserError(f"unknown arm {name!r}{nearest(name, ARMS)}; known are {', '.join(ARMS)}")
    try:
        return _made(name, word, argv, prog) if found["kind"] != "=" else _from_file(name, rest, argv, prog)
    except UserError as error:
        raise UserError(f"arm {name}: {error}") from error


def _from_file(name: str, path: str, argv: Sequence[str], prog: str) -> Arm:
    return Arm(name, "moe", parse_settings([*argv, "--config", path], prog=prog, mode="train_test"), is_sized=True)


def _made(name: str, word: str, argv: Sequence[str], prog: str) -> Arm:
    _, _, rest = word.partition(":")
    changes = dict(_change(part) for part in rest.split(",")) if rest else {}
    flags = [f"--{field}={value}" for field, value in changes.items()]
    settings = parse_settings([*argv, *flags], prog=prog, mode="train_test")
    kind = name if name in ARMS else "moe"
    own_name = re.sub(r"[^\w.-]+", "_", word) if kind == name else name
    of_model = {field: getattr(settings.model, field) for field in changes if hasattr(settings.model, field)}
    arm = Arm(own_name, kind, ARMS[kind](settings), is_sized=bool(SIZES & of_model.keys()))
    return arm.with_model(dataclasses.replace(arm.settings.model, **of_model))


def _change(part: str) -> tuple[str, str]:
    field, equals, value = part.partition("=")
    if not equals or field not in FIELDS:
        hint = nearest(field, FIELDS) if equals else ""
        raise UserError(f"{part!r} must be FIELD=VALUE, of a field that is a flag{hint}")
    return field, value


def check_alike(a: Arm, b: Arm, match: Match) -> None:
    """Raises `UserError` where two arms differ in nothing, or in what must be equal for the rest to be compared."""
    different = a.differs_from(b)
    if not different:
        raise UserError(f"arms {a.name} and {b.name} are the same: there is nothing to compare")
    for name in ALIKE - (OWN_WITH_SECONDS if match == "seconds" else set()):
        if name in different:
            own, other = different[name]
            hint = ", or compare at equal time with --match seconds" if name in OWN_WITH_SECONDS else ""
            raise UserError(
                f"arms {a.name} and {b.name} are not alike: {name} is {own!r} and {other!r}; give both the same{hint}"
            )
