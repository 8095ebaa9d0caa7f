"""Every evaluation that the given folders allow, in one table; and two such tables side by side."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import ModuleType
from typing import Any

from common import cli, evaluation
from common import evaluate_finetune as finetune
from common import evaluate_knn as knn
from common import evaluate_linear as linear
from common import evaluate_overlap as overlap
from common import evaluate_retrieval as retrieval
from common import evaluate_robustness as robustness
from common import evaluate_transfer as transfer
from common import evaluate_video as video
from evals.comparison import compared, differences, load_evaluations, long_table
from evals.results import plain, save_table, table
from evals.sets.landmarks import IMAGES_FROM
from evals.sets.transfer_sets import sets_in
from runtime.device import Process
from runtime.errors import UserError
from runtime.state import save_json

HELP = "everything that the given folders allow, in one table; --compare two of them"
DATA = evaluation.LABELLED.replace("labelled images:",
                                   "for knn, linear, retrieval, overlap and finetune, labelled images:")
SHARE_OF = evaluation.SHARE_OF.replace(";", ", but not of what retrieval, overlap and video take;")
Plan = tuple[str, ModuleType, list[str] | str]  # name, module, its own flags or why it is left out


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    evaluation.add_common_flags(parser, data=DATA, required=False, needs_weights=False, share_of=SHARE_OF)
    group = parser.add_argument_group("what is evaluated")
    group.add_argument("--teacher", default=None, metavar="FILE", help="for overlap: the teacher's checkpoint")
    group.add_argument("--root", default=None, metavar="DIR",
                       help="for transfer and retrieval: folder that holds the transfer sets and revisited Oxford and "
                            "Paris, as docs/EVALUATION.md has them; each that is found is used")
    group.add_argument("--ood", nargs="+", default=None, metavar="NAME=DIR",
                       help="for robustness, with --data: other test images, v2=DIR sketch=DIR r=DIR a=DIR c=DIR ...")
    group.add_argument("--davis", default=None, metavar="DIR",
                       help="for video: DAVIS-2017, in the layout of evaluate.py video")
    group.add_argument("--labels", nargs="+", default=[], metavar="X",
                       help="for finetune: shares of the labels or lists, each trained on (0.01 0.1); default none")
    group.add_argument("--protocol", action="store_true",
                       help="linear by the original's protocol too, which takes days on ImageNet; default: only on "
                            "cached features")
    group.add_argument("--skip", nargs="+", default=[], metavar="NAME",
                       help="evaluations to leave out, by name: knn, linear, finetune, transfer, robustness, "
                            "retrieval, overlap, video")
    group.add_argument("--compare", nargs=2, default=None, metavar=("A.json", "B.json"),
                       help="evaluate nothing: print two results side by side with their differences, each an "
                            "all.json, a results.jsonl (the newest line of each evaluation), or what --json printed")


def run(args: argparse.Namespace, process: Process) -> dict[str, Any]:
    """k-NN, a linear classifier, fine-tuning, transfer, robustness, retrieval, overlap and video, each where its folder
    is given, into all.md and all.json in --output. In one process, one that fails is named at the end (exit code 2) and
    the others are done; with torchrun it ends the run. What is left out is said too. Features are shared, and a run
    after a kill finds what is done in the cache."""
    if args.compare:
        return compare(*args.compare, process)
    if not args.weights:
        raise UserError("evaluate.py all needs --weights FILE, or --compare A.json B.json; give one of the two")
    folder = evaluation.open_output(args)
    done, failed, left_out = {}, {}, {}
    steps = [(name, module, flags if isinstance(flags, str) else arguments(module, name, flags, args))
             for name, module, flags in plan(args)]  # each one's flags are read before the first is run
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
                raise  # the other processes may be anywhere
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
    """The evaluations in their order, each with its own flags, or with the reason why it is left out."""
    data = ["--data", args.data] if args.data else "it needs --data"
    steps: list[Plan] = [("knn", knn, data), ("linear", linear, [*data, "--cached"] if args.data else data)]
    if args.protocol:
        steps.append(("linear, protocol", linear, data))
    steps += [(f"finetune {share}", finetune, [*data, "--labels", share] if args.data else data)
              for share in args.labels]
    if not args.labels:
        steps.append(("finetune", finetune, "it needs --labels"))
    sets, landmarks = found_in(args.root) if args.root else ([], [])
    steps.append(("transfer", transfer, ["--root", args.root, "--datasets", *sets] if sets else
                  f"--root {args.root} holds none of its sets" if args.root else "it needs --root"))
    steps.append(("robustness", robustness, ["--train", args.data, "--ood", *args.ood] if args.data and args.ood else
                  "it needs --data and --ood"))
    steps.append(("retrieval", retrieval, data))
    steps.append(("retrieval, landmarks", retrieval, ["--root", args.root, "--datasets", *landmarks] if landmarks else
                  "it needs --root with roxford5k or rparis6k"))
    steps.append(("overlap", overlap, [*data, "--teacher", args.teacher, "--names", "student"]
                  if args.data and args.teacher else "it needs --data and --teacher"))
    steps.append(("video", video, ["--data", args.davis] if args.davis else "it needs --davis"))
    known = {name.split(",")[0].split(" ")[0] for name, _, _ in steps}
    unknown = sorted(set(args.skip) - known)
    if unknown:
        raise UserError(f"--skip {unknown[0]} is not an evaluation; choose from {', '.join(sorted(known))}")
    return [(name, module, f"--skip {short}" if (short := name.split(",")[0].split(" ")[0]) in args.skip else flags)
            for name, module, flags in steps]


def found_in(root: str) -> tuple[list[str], list[str]]:
    """Names of the transfer sets and of the landmark benchmarks that a folder holds."""
    if not Path(root).is_dir():
        raise UserError(f"--root {root} is not a folder; give the folder that holds the sets")
    landmarks = [name for name in sorted(IMAGES_FROM) if (Path(root) / name / f"gnd_{name}.pkl").is_file()]
    return [name for name in sets_in(root) if name not in IMAGES_FROM], landmarks


def arguments(module: ModuleType, name: str, flags: list[str], args: cli.Arguments) -> cli.Arguments:
    """The command line of one evaluation: its own ``flags``, its defaults, and what is shared from ours."""
    parser = cli.Parser(prog=f"evaluate.py {module.__name__.rpartition('.evaluate_')[2]}")
    module.add_flags(parser)
    own = parser.parse_args([*flags, "--weights", args.weights])
    keep = {"data", *own.given}  # each evaluation is given its own
    keep |= {"subset"} if module in (overlap, retrieval, video) else set()  # theirs are test images, taken whole
    keep |= {"on_bad_image"} if name == "retrieval, landmarks" else set()  # which needs all of them
    for key in (args.declared.keys() & own.declared.keys()) - keep:
        setattr(own, key, getattr(args, key))
    own.command = name
    return own


def compare(first: str, second: str, process: Process) -> dict[str, Any]:
    """Print every number of both, side by side, and the difference of the second to the first."""
    loaded = [load_evaluations(Path(path)) for path in (first, second)]
    rows = compared(*loaded)
    if process.is_main:
        print(f"A: {first}", f"B: {second}", *differences(*loaded), table(rows), sep="\n")
    return {"command": "compare", "a": first, "b": second, "rows": rows}
