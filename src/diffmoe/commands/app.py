"""`app`: the web page."""

from __future__ import annotations

from collections.abc import Sequence

from diffmoe.commands.parsing import DEVICES, Parser
from diffmoe.config import expanded


def main(argv: Sequence[str]) -> int:
    """Serve the page until it is interrupted."""
    parser = Parser("app", "Serve a web page on this machine: a picture in, what the experts do out.")
    parser.add_argument(
        "--checkpoint", nargs="+", default=[], type=expanded, metavar="FILE", help="model files to choose from"
    )
    parser.add_argument(
        "--checkpoints_dir",
        default="checkpoints",
        type=expanded,
        help="without --checkpoint: all model files in this folder",
    )
    parser.add_argument(
        "--gallery", type=expanded, metavar="DIR", help="the folder of pictures that may be searched; default: none"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )
    parser.add_argument("--port", type=int, default=7860, help="default: 7860")
    parser.add_argument("--lang", choices=("en", "zh"), default="en", help="language of the page when it opens")
    parser.add_argument("--device", choices=DEVICES, default="auto")
    args = vars(parser.parse(argv))
    from diffmoe.app import serve

    serve(args.pop("checkpoint"), language=args.pop("lang"), **args)
    return 0
