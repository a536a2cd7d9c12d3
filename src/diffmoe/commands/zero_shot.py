"""`zero-shot`: pictures classified by names or sentences of one's own."""

from __future__ import annotations

from collections.abc import Sequence

from diffmoe.commands.parsing import model_parser, print_predictions, show


def main(argv: Sequence[str]) -> int:
    """Classify pictures by names or sentences of one's own."""
    parser = model_parser("zero-shot", "Classify pictures by names or sentences of your own.", images="+")
    parser.add_argument("--labels", nargs="+", required=True, help="class names or whole sentences")
    parser.add_argument(
        "--templates",
        nargs="+",
        help="sentences in which {} stands for a label; their embeddings are averaged",
    )
    args = parser.parse(argv)
    from diffmoe.inference import TEMPLATES, Predictor, check_labels

    templates = args.templates or TEMPLATES
    check_labels(args.labels, templates)
    used = Predictor(args.checkpoint, args.device)
    return show(used.zero_shot(args.images, args.labels, templates), args.json, print_predictions)
