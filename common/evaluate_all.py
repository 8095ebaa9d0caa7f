"""All evaluations for which a folder is given, in one table; also compares two such tables."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import ModuleType
from typing import Any

from checkpoints.by_name import look_at_weights
from common import cli, evaluation
from common.evaluations import EVALUATIONS
from evals.comparison import compared, differences, load_evaluations, long_table
from evals.results import plain, save_table, table
from evals.sets.davis import check_davis
from runtime.device import Process
from runtime.errors import UserError
from runtime.state import save_json

HELP = "all evaluations for which a folder is given, in one table; --compare shows two tables side by side"
DATA = evaluation.LABELLED.replace("labelled images:", "labelled images, for evaluations without their own folder:")
SHARE_OF = evaluation.SHARE_OF.replace(";", ", but test images are taken whole;")
NAMES = [name for name, module in EVALUATIONS.items() if hasattr(module, "in_all")]
Plan = tuple[str, ModuleType, list[str] | str]  # name, module, its own flags or why it is left out


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    evaluation.add_common_flags(parser, data=DATA, required=False, needs_weights=False, share_of=SHARE_OF)
    group = parser.add_argument_group("what is evaluated")
    group.add_argument("--teacher", default=None, metavar="FILE", help="for overlap: the teacher's checkpoint")
    cli.check_by(group, "--teacher", look_at_weights)
    group.add_argument("--root", default=None, metavar="DIR",
                       help="for transfer and retrieval: folder with the transfer sets and revisited Oxford and "
                            "Paris, as docs/EVALUATION.md has them; each that is found is used")
    group.add_argument("--ood", nargs="+", default=None, metavar="NAME=DIR",
                       help="for robustness, with --data: other test images, v2=DIR sketch=DIR r=DIR a=DIR c=DIR ...")
    group.add_argument("--davis", default=None, metavar="DIR",
                       help="for video: DAVIS-2017, in the layout of evaluate.py video")
    cli.check_by(group, "--davis", check_davis)
    group.add_argument("--labels", nargs="+", default=[], metavar="X",
                       help="for finetune: shares of the labels or lists, each trained on (0.01 0.1); default none")
    group.add_argument("--protocol", action="store_true",
                       help="also run linear by the original's protocol, which takes days on ImageNet; default: only "
                            "on cached features")
    group.add_argument("--skip", nargs="+", default=[], metavar="NAME",
                       help=f"evaluations to leave out, by name: {', '.join(NAMES)}")
    group.add_argument("--compare", nargs=2, default=None, metavar=("A.json", "B.json"),
                       help="evaluate nothing: print two results side by side with their differences, each an "
                            "all.json, a results.jsonl (the newest line of each evaluation), or what --json printed")


def run(args: argparse.Namespace, process: Process) -> dict[str, Any]:
    """Run every evaluation whose folder is given and write all.md and all.json to --output. Skipped evaluations are
    listed. In one process, the others still run if one fails, and the failed ones are listed at the end (exit code 2);
    with torchrun a failure ends the run. The evaluations share cached features, so an interrupted run resumes."""
    if args.compare:
        return compare(*args.compare, process)
    if not args.weights:
        raise UserError("evaluate.py all needs --weights FILE, or --compare A.json B.json; give one of the two")
    folder = evaluation.open_output(args)
    done, failed, left_out = {}, {}, {}
    steps = [(name, module, flags if isinstance(flags, str) else arguments(module, name, flags, args))
             for name, module, flags in plan(args)]  # check the flags of all of them before running any
    for name, module, own in steps:
        if isinstance(own, str):
            left_out[name] = own
            continue
        if process.is_main:
            print(f"\n{name}", flush=True)
        try:
            done[name] = module.run(own, process)
        except UserError as error:
            if process.world_size > 1:
                raise  # the other processes may be waiting in a collective
            failed[name] = str(error)
    record = {"command": "all", "weights": args.weights, "evaluations": done, "failed": failed, "left_out": left_out}
    if process.is_main:
        rows = long_table(done)
        save_table(folder / "all.md", rows)
        save_json(plain(record), folder / "all.json")
        print(f"\nall: {args.weights}", table(rows) if rows else "nothing was evaluated",
              *(f"{name}: left out, {reason}" for name, reason in left_out.items()),
              *(f"{name}: failed, {reason}" for name, reason in failed.items()),
              f"{folder / 'all.md'} and all.json", sep="\n")
    return record


def plan(args: argparse.Namespace) -> list[Plan]:
    """The evaluations in order, each with its flags or the reason why it is left out."""
    unknown = sorted(set(args.skip) - set(NAMES))
    if unknown:
        raise UserError(f"--skip {unknown[0]} is not an evaluation; choose from {', '.join(sorted(NAMES))}")
    return [(title, EVALUATIONS[name], f"--skip {name}" if name in args.skip else flags)
            for name in NAMES for title, flags in EVALUATIONS[name].in_all(args)]


def arguments(module: ModuleType, name: str, flags: list[str], args: cli.Arguments) -> cli.Arguments:
    """The command line of one evaluation: its own ``flags``, its defaults, and the flags shared with ``all``."""
    parser = cli.Parser(prog=f"evaluate.py {module.__name__.rpartition('.evaluate_')[2]}")
    module.add_flags(parser)
    own = parser.parse_args([*flags, "--weights", args.weights])
    keep = {"data", *own.given}  # each evaluation sets its own
    for key in (args.declared.keys() & own.declared.keys()) - keep:
        setattr(own, key, getattr(args, key))
    own.command = name
    return own


def compare(first: str, second: str, process: Process) -> dict[str, Any]:
    """Print all numbers of both side by side, and the second minus the first."""
    loaded = [load_evaluations(Path(path)) for path in (first, second)]
    rows = compared(*loaded)
    if process.is_main:
        print(f"A: {first}", f"B: {second}", *differences(*loaded), table(rows), sep="\n")
    return {"command": "compare", "a": first, "b": second, "rows": rows}
