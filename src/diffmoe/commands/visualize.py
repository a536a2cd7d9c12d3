"""`visualize`: see what the experts of a trained model do."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from diffmoe.commands.parsing import model_parser, show
from diffmoe.config import VisualizationConfig


def main(argv: Sequence[str]) -> int:
    """Make the report."""
    parser = model_parser(
        "visualize", "See what the experts of a trained model do: figures, and a page that holds them."
    )
    parser.add_fields(VisualizationConfig)
    parser.add_argument("--dataset", help="the one that it was trained on; default: by the name in the model file")
    parser.add_argument("--data_dir", help="folder that holds the dataset")
    parser.add_argument("--split", choices=("train", "validation", "test"), default="test", help="(default: test)")
    parser.add_argument("--lang", choices=("en", "zh"), default="en", help="language of the page (default: en)")
    args = parser.parse(argv)
    from diffmoe.report.make import make_report

    written = make_report(
        args.checkpoint,
        **{name: getattr(args, name) for name in ("dataset", "data_dir", "split", "lang", "device")},
        show=VisualizationConfig(**args.fields),
        command=shlex.join(["diffmoe", "visualize", *argv]),
    )
    return show(written, args.json, lambda paths: print(f"report: {paths['report']}"))
