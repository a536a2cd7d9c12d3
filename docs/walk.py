"""The two walks of docs/architecture.md, as a debugger's call stack has them: `python docs/walk.py`.

A picture from its file to the logits, and a flag from the command line to where the model uses it. At each stop the
stack is printed, from the outermost call to the innermost; of torch's own frames nothing is shown.
"""

from __future__ import annotations

import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

import diffmoe
from diffmoe.cli import main
from diffmoe.data.pictures import PictureSpec
from diffmoe.inference import Predictor
from diffmoe.model.dispatch import LocalDispatch
from diffmoe.model.heads import ImageClassifier
from diffmoe.model.moe import GeneralExperts
from diffmoe.model.outputs import ClassifierOutput
from diffmoe.model.patch_embed import PatchEmbed
from diffmoe.model.routers import AttentiveRouter

SOURCES = Path(diffmoe.__file__).parent
TINY = ("--preset", "tiny", "--epochs", "1", "--embed_dim", "16", "--num_heads", "2", "--text_embed_dim", "8")


@contextmanager
def stop_at(owner: Any, name: str, title: str) -> Iterator[None]:
    """Within it, the first call of a function prints where it is called from."""
    function: Callable[..., Any] = getattr(owner, name)
    seen: list[str] = []

    def stopped(*args: Any, **kwargs: Any) -> Any:
        if not seen:
            seen.append(title)
            print(f"\n{title}: {owner.__name__}.{name}")
            for frame in traceback.extract_stack()[:-1]:
                path = Path(frame.filename)
                if path.is_relative_to(SOURCES):
                    print(f"    {path.relative_to(SOURCES).as_posix():28} {frame.name}")
        return function(*args, **kwargs)

    setattr(owner, name, stopped)
    try:
        yield
    finally:
        setattr(owner, name, function)


def walk(folder: Path) -> None:
    """Both, on a model of a second."""
    print("A flag: diffmoe train --top_k 1")
    with (
        stop_at(ImageClassifier, "__init__", "the model is made"),
        stop_at(AttentiveRouter, "__init__", "the router is made"),
        stop_at(AttentiveRouter, "choose", "it chooses"),
        stop_at(GeneralExperts, "run", "and the experts run"),
    ):
        main(["train", *TINY, "--top_k", "1", "--save_dir", str(folder)])
    print("\nA picture: Predictor(...).classify('digit.png')")
    Image.new("L", (20, 20)).save(folder / "digit.png")
    predictor = Predictor(folder / "digits_model.pth", "cpu")
    _ = predictor.classes  # their descriptions are read once, before
    with (
        stop_at(PictureSpec, "decode", "decoded"),
        stop_at(PictureSpec, "normalize", "normalised"),
        stop_at(PatchEmbed, "forward", "cut into patches"),
        stop_at(AttentiveRouter, "choose", "routed"),
        stop_at(LocalDispatch, "__call__", "sent to its experts"),
        stop_at(ClassifierOutput, "__init__", "the logits"),
    ):
        predictor.classify(str(folder / "digit.png"), top=1)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        walk(Path(name))
    sys.stdout.flush()
