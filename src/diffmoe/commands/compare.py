"""`compare`: what the experts gain over a dense twin and over baselines, over seeds, and whether it is chance."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from diffmoe.commands.parsing import Parser, show, tell
from diffmoe.comparison.arms import ARMS, MATCHES, parse_arms
from diffmoe.config import UserError
from diffmoe.config.settings import parse_settings

PROG = "diffmoe compare"


def main(argv: Sequence[str]) -> int:
    """Compare."""
    parser = Parser("compare", "Train several models over several seeds, and say what is more than chance.")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"arms: {', '.join(ARMS)}; NAME=FILE.yaml; ARM:FIELD=VALUE,FIELD=VALUE\nAlso the flags of train."
    parser.add_argument("--arms", nargs="+", default=["moe", "dense"], metavar="ARM", help="(default: moe dense)")
    parser.add_argument("--seeds", type=int, default=5, help="how many, from --seed on (default: 5)")
    parser.add_argument(
        "--match",
        choices=MATCHES,
        default="flops",
        help="what arms have equal: FLOPs a picture; also training time; or parameters (default: flops)",
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, which share the threads (default: 1)")
    parser.add_argument("--lang", choices=("en", "zh"), default="en", help="language of the page (default: en)")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    args, rest = parser.parse_known_args(argv)
    for name in ("seeds", "jobs"):
        if getattr(args, name) < 1:
            raise UserError(f"{name} is {getattr(args, name)}: it must be at least 1")
    settings = parse_settings(rest, prog=PROG, mode="train_test")
    if settings.run.resume:
        raise UserError("resume is not for compare: the same command goes on where a comparison was stopped")
    arms = parse_arms(args.arms, rest, args.match, PROG)
    from diffmoe.comparison.make import compare
    from diffmoe.runs import silent
    from diffmoe.training.loop import StopRequested

    command = shlex.join(["diffmoe", "compare", *argv])
    options = {"seeds": args.seeds, "match": args.match, "jobs": args.jobs, "lang": args.lang, "command": command}
    try:
        found = compare(arms, **options, tell=silent if args.json else tell)
    except StopRequested as stop:
        print(f"stopped by {stop}: the same command goes on where it was", file=sys.stderr)
        return 128 + stop.signal_number
    return show(found, args.json, _print)


def _print(found: dict[str, Any]) -> None:
    from diffmoe.comparison.page import arm_table, difference_table

    for table in (arm_table(found), difference_table(found)):
        widths = [max(len(str(cell)) for cell in column) for column in zip(*table, strict=True)]
        print()
        for first, *others in table:
            cells = map(str.rjust, map(str, others), widths[1:])
            print(str(first).ljust(widths[0]), *cells, sep="  ")
    print(f"\npage: {found['page']}")
