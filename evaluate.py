#!/usr/bin/env python
"""Evaluate a network from any checkpoint; architecture, stem and normalisation are read from the file.

    python evaluate.py linear --data ROOT --weights FILE --cached     # ROOT holds train/ and val/ or test/
    python evaluate.py all --data ROOT --teacher FILE --root DIR --ood NAME=DIR ... --weights FILE
    python evaluate.py all --compare A.json B.json

Each sub-command adds a line to results.jsonl in --output, keeps its features there, and prints a table, or with --json
one JSON object. Each also runs under torchrun. COMMAND --help explains its flags.
"""

from __future__ import annotations

if __name__ == "__main__":
    from runtime.start import begin
    begin(__file__)

import argparse
import contextlib
import json
import sys

from common import cli, cli_original, evaluate_all
from common.evaluations import EVALUATIONS
from evals.results import plain
from runtime.device import UNEVEN_WORK
from runtime.errors import EXIT_BAD_INPUT, run_script

COMMANDS = {**EVALUATIONS, "all": evaluate_all}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line: a sub-command and its flags."""
    parser = cli.Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    for name, module in COMMANDS.items():
        module.add_flags(commands.add_parser(name, help=module.HELP, description=module.run.__doc__))
    return parser.parse_args(cli_original.translate("evaluate.py", argv))


check_flags = cli.check_files


def main() -> None:
    """Parse, join the job, run the sub-command; with --json only its record goes to stdout."""
    args = parse_args()
    with cli.joined(args, patience=UNEVEN_WORK, float64=True) as process:
        cli.say_unused(args, process)
        with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
            record = COMMANDS[args.command].run(args, process)
        if args.json and process.is_main:
            print(json.dumps(plain(record)))
    if record.get("failed"):
        sys.exit(EXIT_BAD_INPUT)


if __name__ == "__main__":
    run_script(main)
