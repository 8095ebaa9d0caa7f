#!/usr/bin/env python
"""Evaluate a network from any checkpoint; architecture, stem and normalisation are found in the file.

    python evaluate.py linear --data ROOT --weights FILE [--cached]     # ROOT holds train/ and val/ or test/
    python evaluate.py finetune --labels 0.01 --data ROOT --weights FILE
    python evaluate.py transfer --data ROOT | --datasets cifar10 pets … --root DIR  --weights FILE [--few-shot]
    python evaluate.py robustness --train ROOT --ood v2=DIR sketch=DIR … --weights FILE
    python evaluate.py overlap --data DIR --teacher FILE --weights FILE [FILE ...]
    python evaluate.py map --data DIR --teacher FILE --weights FILE [FILE ...] [--method umap]
    python evaluate.py retrieval --data DIR | --root DIR --datasets roxford5k rparis6k --weights FILE
    python evaluate.py video --data DAVIS --weights FILE
    python evaluate.py all --data ROOT --teacher FILE --root DIR --ood NAME=DIR ... --weights FILE
    python evaluate.py all --compare A.json B.json

Each sub-command adds a line to results.jsonl in --output, keeps the features that it extracts there, and prints one
table, or with --json one JSON object. Each may be started by torchrun too. COMMAND --help explains its flags.
"""

from __future__ import annotations

if __name__ == "__main__":
    from runtime.start import begin
    begin()

import argparse
import contextlib
import json
import sys

from common import cli, cli_original
from common import evaluate_all as everything
from common import evaluate_finetune as finetune
from common import evaluate_knn as knn
from common import evaluate_linear as linear
from common import evaluate_map as plane_map
from common import evaluate_overlap as overlap
from common import evaluate_retrieval as retrieval
from common import evaluate_robustness as robustness
from common import evaluate_transfer as transfer
from common import evaluate_video as video
from data.images import limit_pixels
from evals.results import plain
from runtime.device import UNEVEN_WORK, start_process
from runtime.errors import EXIT_BAD_INPUT, run_script

COMMANDS = {
    "knn": knn,
    "linear": linear,
    "finetune": finetune,
    "transfer": transfer,
    "robustness": robustness,
    "retrieval": retrieval,
    "overlap": overlap,
    "map": plane_map,
    "video": video,
    "all": everything,
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line: a sub-command and its flags."""
    parser = cli.Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    for name, module in COMMANDS.items():
        module.add_flags(commands.add_parser(name, help=module.HELP, description=module.run.__doc__))
    args, unknown = parser.parse_known_args(cli_original.translate("evaluate.py", argv))
    if unknown:
        commands.choices[args.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def main() -> None:
    """Parse, join the job, run the sub-command; with --json its record alone goes to stdout."""
    args = parse_args()
    limit_pixels(args.max_pixels)
    with start_process(args.device, UNEVEN_WORK) as process:
        cli.same_flags(args, process)
        cli.say_unused(args, process)
        with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
            record = COMMANDS[args.command].run(args, process)
        if args.json and process.is_main:
            print(json.dumps(plain(record)))
    if record.get("failed"):
        sys.exit(EXIT_BAD_INPUT)


if __name__ == "__main__":
    run_script(main)
