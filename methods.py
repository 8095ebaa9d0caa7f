"""The methods on the command line: --loss and its numbers, and what goes with them."""

from __future__ import annotations

import argparse

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import cli
from losses import LOSSES, needs_of, own_values, takes
from runtime.collectives import SCOPES
from runtime.errors import UserError

# Flags of what surrounds a loss, and their defaults
AROUND = {"teacher_bn": "eval", "head_bn": False, "moco_dim": 128, "moco_m": 0.999, "bn_parts": 8}


def add_loss_flags(parser: argparse.ArgumentParser) -> None:
    """--loss and its numbers. Those left out are each method's own; a method takes those that it knows, and in a sum
    every loss that knows one, which is refused where their own values differ."""
    group = parser.add_argument_group("loss")
    group.add_argument("--loss", default="coss", metavar="NAME", type=loss_names,
                       help=f"objective: {', '.join(sorted(LOSSES))}, or a sum of them (coss+seed); default coss. "
                            "coss_centred is coss, with its flags, on features without the batch's mean: not in the "
                            "paper, and ahead of it on small sets (docs/RESULTS.md)")
    group.add_argument("--loss-weights", type=weights, default=None, metavar="W,W",
                       help="a weight for each loss of a sum, with commas; default 1 each")
    group.add_argument("--l_0", type=cli.number(float), default=None, metavar="W",
                       help="coss, dinoss, dist: weight of the row term; default 1, the papers'")
    group.add_argument("--l_1", type=cli.number(float), default=None, metavar="W",
                       help="coss, dinoss, dist: weight of the column (space similarity) term; default 1 for coss as "
                            "in the paper's rows (the original flag's default was 0.5) and for dist, 0.5 for dinoss")
    group.add_argument("--beta", type=cli.number(float), default=1.0, metavar="W",
                       help="factor of the whole loss; default 1")
    group.add_argument("--s-temp", type=cli.number(float, above=0), default=None, metavar="T",
                       help="student temperature; default the method's own: coss (a pure scale), dino, dinoss and dist "
                            "0.1, seed, bingo (whose EfficientNets have 0.12), disco and moco 0.2, compress 0.04. (The "
                            "original code gave dist the student's features as the teacher's and the other way round; "
                            "here each has its own)")
    group.add_argument("--t-temp", type=cli.number(float, above=0), default=None, metavar="T",
                       help="teacher temperature; default the method's own: coss (a pure scale), dino, dinoss and dist "
                            "0.07, seed 1e-4, compress 0.04")
    group.add_argument("--space-batch", choices=SCOPES, default=None,
                       help="the batch over which statistics of a dimension (coss, dinoss, dist: the column terms) are "
                            "taken: local, each process's own, or global, that of all processes, exactly, so that "
                            "the loss and its gradients are those of one process with the whole batch, however many "
                            "there are; default local, as in the original and the paper's rows")
    group.add_argument("--smd-tau", type=cli.number(float, above=0), default=None, metavar="T",
                       help="smd: its temperature; default 0.04, the paper's for ResNets (0.004 for EfficientNets and "
                            "MobileNets)")
    group.add_argument("--smd-batch", choices=("global", "local"), default=None,
                       help="smd: the hardest images are sought in the batch of all processes (global, default) or, as "
                            "in the original, of each process (local), where more GPUs mean easier ones")
    group.add_argument("--rkd-weights", type=weights, default=None, metavar="W,W",
                       help="rkd: weights of its distance and angle terms; default 1,2, the paper's where RKD is the "
                            "only loss")
    group.add_argument("--queue-size", type=cli.number(int, 1), default=None, metavar="K",
                       help="seed, compress, bingo, disco, moco: outputs kept to compare with, over all processes; "
                            "default the method's own: 65536 (33.6 MB at 128 numbers), compress 128000")
    group.add_argument("--bingo-alone", type=cli.number(int, 0), default=None, metavar="N",
                       help="bingo: epochs, from the first, in which an image has its own other view as only positive; "
                            "default 11 of its 200, the original's")
    group.add_argument("--disco-weight", type=cli.number(float, 0), default=None, metavar="W",
                       help="disco: weight of the mean squared distance; default 32, which the original's sum over a "
                            "process's batch comes to at its 256 images on 8 GPUs")
    group.add_argument("--disco-sum", action="store_true",
                       help="disco: the original's sum over a process's batch instead, weaker the more GPUs there are")
    group.add_argument("--teacher-bn", choices=("eval", "train"), default=AROUND["teacher_bn"],
                       help="batch norm of the teacher: by its running statistics (eval, default) or by each batch's "
                            "(train, as in the code of bingo and disco; the running ones stay as they are here)")
    group.add_argument("--head-bn", action="store_true",
                       help="batch norm behind both layers of the student's head, as in SimCLR v2; default none, as in "
                            "all of these papers, but moco and disco hardly start on small sets and networks without")
    group.add_argument("--moco-dim", type=cli.number(int, 1), default=AROUND["moco_dim"], metavar="D",
                       help="losses without a teacher: width of the contrasted features; default 128, MoCo's")
    group.add_argument("--moco-m", type=cli.number(float, 0, 1), default=AROUND["moco_m"], metavar="M",
                       help="losses with a momentum student: its momentum; default 0.999, MoCo's")
    group.add_argument("--bn-parts", type=cli.number(int, 1), default=AROUND["bn_parts"], metavar="N",
                       help="losses with a momentum student: parts over all processes into which its shuffled batch is "
                            "cut for batch norm, so that its statistics do not betray the positive; default 8, as on "
                            "MoCo's 8 GPUs")


def loss_names(text: str) -> str:
    """--loss, refused at once if it names what there is not."""
    try:
        needs_of(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--loss ")) from None
    return text


def weights(text: str) -> list[float]:
    """``1,0.5`` as numbers."""
    return [cli.number(float)(word) for word in text.split(",")]


def options(args: argparse.Namespace) -> dict[str, object]:
    """The flags that are constructor arguments of losses; None is the method's own."""
    return {"l_0": args.l_0, "l_1": args.l_1, "s_temp": args.s_temp, "t_temp": args.t_temp,
            "space_batch": args.space_batch, "smd_tau": args.smd_tau, "smd_batch": args.smd_batch,
            "rkd_weights": args.rkd_weights, "queue_size": args.queue_size, "bingo_alone": args.bingo_alone,
            "disco_weight": args.disco_weight, "disco_sum": args.disco_sum}


LOSS_FLAGS = {"l_0", "l_1", "s_temp", "t_temp", "space_batch", "smd_tau", "smd_batch", "rkd_weights", "queue_size",
              "bingo_alone", "disco_weight", "disco_sum"}  # of options: what they come to is under "losses" in a config


def complete(config: dict[str, object]) -> dict[str, object]:
    """An older run's config.json with what the losses then had: the first runs knew CoSS alone, on local batches."""
    if "losses" in config or "l_0" not in config:
        return config
    numbers = {name: config.get(name) for name in ("l_0", "l_1", "s_temp", "t_temp")}
    return {**config, "losses": {"coss": {**numbers, "space_batch": "local"}}}


def unused(args: argparse.Namespace, head: nn.Module) -> list[str]:
    """A sentence for each flag that was given and that no loss in --loss takes. ``head``: the student's."""
    needs = needs_of(args.loss)
    given = [name for name, value in options(args).items()
             if value is not None and value is not False and not takes(args.loss, name)]
    used = {"distill": needs.teacher, "teacher_bn": needs.teacher, "moco_dim": not needs.teacher,
            "moco_m": needs.momentum, "bn_parts": needs.momentum,
            "head_bn": any(isinstance(module, _BatchNorm) for module in head.modules())}
    given += [name for name, is_used in used.items() if not is_used and vars(args)[name] != AROUND.get(name)]
    return [f"{flag(name)} is not used by --loss {args.loss}" for name in given]


def flag(name: str) -> str:
    """The spelling of a flag by its destination."""
    return f"--{name if name in ('l_0', 'l_1') else name.replace('_', '-')}"


def check_loss(args: argparse.Namespace) -> None:
    """What the command line must hold for --loss."""
    needs, count = needs_of(args.loss), args.loss.count("+") + 1
    if args.loss_weights and len(args.loss_weights) != count:
        raise UserError(f"--loss-weights holds {len(args.loss_weights)} numbers and --loss {args.loss} names {count}; "
                        "give one for each, with commas")
    if args.rkd_weights and len(args.rkd_weights) != 2:
        raise UserError(f"--rkd-weights holds {len(args.rkd_weights)} numbers; give two with a comma, of the distances "
                        "and of the angles")
    if args.disco_sum and args.disco_weight is not None:
        raise UserError(f"--disco-sum has no weight, and --disco-weight {args.disco_weight:g} is one; give either")
    for name in ("l_0", "l_1", "s_temp", "t_temp"):
        own = own_values(args.loss, name)
        if vars(args)[name] is not None and len(set(own.values())) > 1:
            raise UserError(f"{flag(name)} {vars(args)[name]:g} would go to all of {', '.join(own)}, whose own "
                            f"values differ ({', '.join(f'{value:g}' for value in own.values())}); leave it out, and "
                            "each keeps its own")
    if needs.teacher and not args.distill:
        raise UserError(f"--loss {args.loss} needs --distill PATH, the teacher's checkpoint; train one with "
                        "train_teacher.py if you have none")
    if args.space_batch == "global" and not takes(args.loss, "space_batch"):
        able = ", ".join(name for name in sorted(LOSSES) if takes(name, "space_batch"))
        raise UserError(f"--space-batch global has no meaning for --loss {args.loss}, which takes no statistics of a "
                        f"dimension; leave it out, or take one of {able}")
    if needs.bag and (args.sampler != "cf" or args.nearest_k != 1 or args.fark_info):
        found = f"--sampler {args.sampler} --nearest-k {args.nearest_k}{' --fark-info' * bool(args.fark_info)}"
        raise UserError(f"--loss {args.loss} needs batches of pairs, each image with one of its nearest, and found "
                        f"{found}; give --sampler cf --nearest-k 1 --total-k 5 (its paper's) and --closek-info")
