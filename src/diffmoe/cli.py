"""The command line: parses, composes, and turns a user's mistake into one line and exit code 2.

    diffmoe train|test|train_test|predict|zero-shot|retrieve|caption [flags]
    python main.py --dataset cifar10 --mode train_test --epochs 10        (the flat form)

Whatever is heavy (torch above all) is imported by the command that needs it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from diffmoe.config import UserError, nearest
from diffmoe.settings import MODES, parse_given, parse_group, parse_settings

COMMANDS = {
    "train": "train a model",
    "test": "score a trained model on the test split",
    "train_test": "both, one after the other",
    "predict": "classify pictures with a trained model",
    "zero-shot": "classify pictures by names or sentences of your own",
    "retrieve": "find pictures by a text, or texts by a picture",
    "caption": "write a sentence for each picture",
    "visualize": "see what the experts do: figures and one page with all of them",
    "profile": "what a model costs: parameters, FLOPs, time and memory by part, speed beside the dense model",
    "app": "serve a web page that does all of this with a picture",
}

HELP = f"""usage: diffmoe <command> [flags]      (or: python main.py --mode {{{",".join(MODES)}}} [flags])

A multimodal Mixture-of-Experts Transformer: train it, test it, use it.

commands:
{chr(10).join(f"  {name:12}{text}" for name, text in COMMANDS.items())}

examples:
  diffmoe train_test                                         handwritten digits, in a minute, no download
  diffmoe train_test --dataset cifar10 --preset tiny         CIFAR-10 on a laptop
  diffmoe predict --checkpoint checkpoints/cifar10_model.pth cat.jpg
  diffmoe train_test --dataset shapes                        learn to caption drawn shapes, in minutes, no download
  diffmoe caption --checkpoint checkpoints/shapes_model.pth picture.png

`diffmoe <command> --help` lists the flags of one command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for a user's mistake, 128 + the signal's number when stopped."""
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="diffmoe: %(message)s", level=logging.WARNING)
    try:
        return dispatch(argv)
    except UserError as error:
        print(f"diffmoe: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("diffmoe: stopped", file=sys.stderr)
        return 128 + signal.SIGINT


def dispatch(argv: list[str]) -> int:
    """Find the command and run it. Raises `UserError`."""
    if not argv or argv[0] == "help" or (argv[0] in ("-h", "--help") and len(argv) == 1):
        print(HELP)
        return 0
    command = argv[0]
    if command in USES:
        return USES[command](argv[1:])
    if command.startswith("-"):
        settings = parse_settings(argv)
    elif command in COMMANDS:
        settings = parse_settings(argv[1:], prog=f"diffmoe {command}", mode=command)
    else:
        raise UserError(f"unknown command {command!r}{nearest(command, COMMANDS)}; diffmoe --help lists all")
    from diffmoe import commands

    return commands.run(settings)


def predict(argv: list[str]) -> int:
    """Parse and run `diffmoe predict`."""
    parser = _parser("predict", "Classify pictures.", images="+")
    parser.add_argument("--top", type=int, default=5, help="classes to show for each picture (default: 5)")
    parser.add_argument("--text", help="what is said of the pictures, to be weighed with them")
    args = parser.parse_args(argv)
    if args.top < 1:
        raise UserError(f"top is {args.top}: it must be at least 1")
    from diffmoe.commands.predict import predict as run

    results = run(args.images, args.checkpoint, args.top, args.device, args.text)
    return _print(results, args.json, _print_predictions)


def zero_shot(argv: list[str]) -> int:
    """Parse and run `diffmoe zero-shot`."""
    parser = _parser("zero-shot", "Classify pictures by names or sentences of your own.", images="+")
    parser.add_argument("--labels", nargs="+", required=True, help="class names or whole sentences")
    parser.add_argument(
        "--templates",
        nargs="+",
        help="sentences in which {} stands for a label; their embeddings are averaged",
    )
    args = parser.parse_args(argv)
    from diffmoe.commands.predict import TEMPLATES
    from diffmoe.commands.predict import zero_shot as run

    results = run(args.images, args.labels, args.templates or TEMPLATES, args.checkpoint, args.device)
    return _print(results, args.json, _print_predictions)


def retrieve(argv: list[str]) -> int:
    """Parse and run `diffmoe retrieve`."""
    parser = _parser("retrieve", "Find pictures by a text, or texts by a picture.")
    parser.add_argument("gallery", help="a folder of pictures, or a dataset")
    parser.add_argument("--text", help="asks for pictures of the gallery")
    parser.add_argument("--image", help="a picture file; asks for texts")
    parser.add_argument("--sentences", help="file of texts, one a line; default: the gallery's captions")
    parser.add_argument("--data_dir", help="folder that holds the dataset")
    parser.add_argument("--split", default="test", help="split of a dataset (default: test)")
    parser.add_argument("--index", help="file that keeps the embeddings; default: in output_dir")
    parser.add_argument("--overwrite", action="store_true", help="make the index again where it does not fit")
    parser.add_argument("--top", type=int, default=8, help="how many to find (default: 8)")
    parser.add_argument("--output_dir", default="visualizations", help="for the index and the picture")
    args = vars(parser.parse_args(argv))
    as_json = args.pop("json")
    if args["top"] < 1:
        raise UserError(f"top is {args['top']}: it must be at least 1")
    from diffmoe.commands.retrieve import retrieve as run

    return _print(run(args.pop("checkpoint"), args.pop("gallery"), **args), as_json, _print_found)


def caption(argv: list[str]) -> int:
    """Parse and run `diffmoe caption`."""
    parser = _parser("caption", "Write a caption for each picture.", images="+")
    parser.add_argument("--seed", type=int, default=0, help="of --decoding sample (default: 0)")
    parser.add_argument("--output_dir", default="visualizations/captions", help="for captions.json and captions.png")
    parser.add_argument("--overwrite", action="store_true", help="replace files of these names that are not its own")
    args, rest = parser.parse_known_args(argv)
    given = parse_given("generation", rest, prog="diffmoe caption")
    from diffmoe.commands.caption import caption as run

    options = {name: getattr(args, name) for name in ("seed", "output_dir", "overwrite", "device")}
    written = run(args.images, args.checkpoint, given, **options)
    results = [{"image": path, "caption": text} for path, text in zip(args.images, written, strict=True)]
    return _print(results, args.json, lambda rows: [print(f"{row['image']}: {row['caption']}") for row in rows])


def app(argv: list[str]) -> int:
    """Parse and run `diffmoe app`."""
    parser = _bare_parser("app", "Serve a web page on this machine: a picture in, what the experts do out.")
    parser.add_argument("--checkpoint", nargs="+", default=[], metavar="FILE", help="model files to choose from")
    parser.add_argument(
        "--checkpoints_dir", default="checkpoints", help="without --checkpoint: all model files in this folder"
    )
    parser.add_argument("--gallery", metavar="DIR", help="the folder of pictures that may be searched; default: none")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )
    parser.add_argument("--port", type=int, default=7860, help="default: 7860")
    parser.add_argument("--lang", choices=("en", "zh"), default="en", help="language of the page when it opens")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    args = vars(parser.parse_args(argv))
    from diffmoe.app import serve

    serve(args.pop("checkpoint"), language=args.pop("lang"), **args)
    return 0


def visualize(argv: list[str]) -> int:
    """Parse and run `diffmoe visualize`."""
    parser = _parser("visualize", "See what the experts of a trained model do: figures, and a page that holds them.")
    parser.epilog = "Also --output_dir, --figure_format, --dpi, --examples and --weakest_classes, as in training."
    parser.add_argument("--dataset", help="the one that it was trained on; default: by the name in the model file")
    parser.add_argument("--data_dir", help="folder that holds the dataset")
    parser.add_argument("--split", choices=("train", "validation", "test"), default="test", help="(default: test)")
    parser.add_argument("--lang", choices=("en", "zh"), default="en", help="language of the page (default: en)")
    args, rest = parser.parse_known_args(argv)
    show = parse_group("visualization", rest, prog="diffmoe visualize")
    from diffmoe.commands.visualize import visualize as run

    written = run(
        args.checkpoint,
        **{name: getattr(args, name) for name in ("dataset", "data_dir", "split", "lang", "device")},
        show=show,
        command=shlex.join(["diffmoe", "visualize", *argv]),
    )
    return _print(written, args.json, lambda paths: print(f"report: {paths['report']}"))


def profile(argv: list[str]) -> int:
    """Parse and run `diffmoe profile`."""
    parser = _bare_parser("profile", "What a model costs, by part: a trained one, or a fresh one of any settings.")
    parser.epilog = (
        "Also the flags of `diffmoe train`: --checkpoint, --dataset, --data_dir, --preset, --batch_size (of the step "
        "that is taken apart), --seed, --device, --output_dir, and every field of the model."
    )
    parser.add_argument(
        "--batch_sizes", nargs="+", type=int, default=[1, 8, 64, 256], metavar="N", help="of the throughput's curve"
    )
    parser.add_argument("--steps", type=int, default=10, help="measured steps and rounds; medians count (default: 10)")
    parser.add_argument(
        "--trace", action=argparse.BooleanOptionalAction, default=True, help="write a trace that Perfetto opens"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    args, rest = parser.parse_known_args(argv)
    if min(args.batch_sizes) < 1:
        raise UserError(f"batch_sizes are {' '.join(map(str, args.batch_sizes))}: each must be at least 1")
    if args.steps < 1:
        raise UserError(f"steps is {args.steps}: it must be at least 1")
    settings = parse_settings(rest, prog="diffmoe profile", mode="profile")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own chatter; read when torch is imported
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from diffmoe.commands.profile import profile as run
    from diffmoe.commands.profile_tables import print_profile

    result = run(settings, sorted(set(args.batch_sizes)), args.steps, args.trace)
    return _print(result, args.json, print_profile)


USES = {
    "predict": predict,
    "zero-shot": zero_shot,
    "retrieve": retrieve,
    "caption": caption,
    "app": app,
    "visualize": visualize,
    "profile": profile,
}
"""The commands that use a trained model."""


def _bare_parser(command: str, description: str) -> argparse.ArgumentParser:
    """A parser without flags, whose errors are one line."""
    parser = argparse.ArgumentParser(prog=f"diffmoe {command}", description=description, allow_abbrev=False)

    def error(message: str) -> NoReturn:
        raise UserError(f"{message}; {parser.prog} --help lists all flags")  # argparse's own is two lines and an exit

    parser.error = error
    return parser


def _parser(command: str, description: str, images: str | None = None) -> argparse.ArgumentParser:
    """A parser with the flags that all uses of a model share."""
    parser = _bare_parser(command, description)
    if images:
        parser.add_argument("images", nargs=images, metavar="IMAGE", help="picture files of any size and kind")
    parser.add_argument("--checkpoint", required=True, help="model file, such as checkpoints/cifar10_model.pth")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _print(results: Any, as_json: bool, table: Callable[[Any], object]) -> int:
    if as_json:
        print(json.dumps(results, ensure_ascii=False, indent=2))
    else:
        table(results)
    return 0


def _print_predictions(results: list[dict[str, Any]]) -> None:
    for result in results:
        print(result["image"])
        for name, title in (("predictions", ""), ("with_text", "  with the text:")):
            if title and name in result:
                print(title)
            for row in result.get(name, ()):
                bar = "█" * round(row["probability"] * 30)
                print(f"  {row['probability']:6.1%}  {row['class']:20} {bar}")
        for name, title in (("similarity", "similarity to the text"), ("log_probability", "log-probability a token")):
            if name in result:
                print(f"  {title}: {result[name]:.3f}")


def _print_found(found: dict[str, Any]) -> None:
    for row in found["results"]:
        print(f"  {row['similarity']:6.3f}  {row['item']}")
    print(f"picture: {found['picture']}   index: {found['index']}")
