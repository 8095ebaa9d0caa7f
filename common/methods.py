"""The methods on the command line: --loss, its settings, and related flags."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import losses
from common import cli
from losses import LOSSES, needs_of
from losses.combine import Objective
from models.heads import HEADS, HeadNorm
from models.momentum import BatchNormParts, ContrastedWidth, Momentum
from runtime import settings
from runtime.errors import UserError
from runtime.own import OWN_HELP, is_own, load_own
from runtime.settings import Declared, Setting, Used, by_default, said


@dataclass(frozen=True)
class Surroundings:
    """Settings around a loss, used if its needs (losses.base.CombinedNeeds) ask for them."""

    teacher_bn: Annotated[str, Setting(
        "batch norm of the teacher: its running statistics (eval, default) or those of each batch (train, as in the "
        "code of bingo and disco; the running statistics do not change)", choices=("eval", "train")),
        Used("by losses with a teacher", lambda needs: bool(needs.teacher))] = "eval"
    head_bn: Annotated[HeadNorm, Used("where the student's head has two layers",
                                      lambda needs: bool(needs.heads))] = False
    head_init: Annotated[str, Setting(
        "start of the student's head: random, as in the methods' papers, or teacher: its last layer scaled and shifted "
        "so that the outputs have the mean and the spread of the teacher's; default auto: teacher for losses of the "
        "directions of rows (coss, cosine), else random", choices=("auto", "random", "teacher")),
        Used("by losses with a teacher and a head on the student", lambda needs: any(
            to and name != "none" for name, to in needs.heads))] = "auto"
    moco_dim: Annotated[ContrastedWidth, Used("by losses without a teacher", lambda needs: not needs.teacher)] = 128
    moco_m: Annotated[Momentum, Used("by losses with a momentum student", lambda needs: needs.momentum)] = 0.999
    bn_parts: Annotated[BatchNormParts, Used("by losses with a momentum student", lambda needs: needs.momentum)] = 8


GROUP = "loss"
SURROUNDINGS = settings.declared(Surroundings)


def add_loss_flags(parser: argparse.ArgumentParser) -> None:
    """--loss and the settings of the losses. A setting that is not given keeps each loss's own default. In a sum, a
    given setting goes to every loss that has it, and is refused if their defaults differ."""
    group = parser.add_argument_group(GROUP)
    group.add_argument("--loss", default="coss", metavar="NAME", type=loss_names,
                       help=f"objective: {', '.join(sorted(LOSSES))}, {OWN_HELP}, or a sum (coss+seed); default "
                            "coss. coss_centred is coss, with the same flags, on features minus the batch's mean: not "
                            "in the paper (docs/RESULTS.md)")
    settings.add_settings(group, Objective)
    for owners in losses.settings().values():
        _add_setting(group, owners)
    settings.add_settings(group, Surroundings)


def add_own_flags(parser: cli.Parser, words: Sequence[str]) -> None:
    """Last, when all others are there: the settings of one's own losses that the command line ``words`` names. Raises
    :class:`UserError` if one would be another flag."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--loss", nargs="?", default="")
    group = next(x for x in parser.groups() if x.title == GROUP)
    known = losses.settings()
    for name, owners in losses.settings(_known(early.parse_known_args(words)[0].loss or "")).items():
        one = next(iter(owners.values()))
        there = {action.dest for action in parser._actions} | parser._option_string_actions.keys()
        if name not in known and there & {name, *one.spellings}:
            raise UserError(f"--loss: the setting {name} of {', '.join(owners)} would be a second flag {one.flag}; "
                            "give it another name")
        if name not in known:
            _add_setting(group, owners)


def _add_setting(group: cli.Group, owners: Mapping[str, Declared]) -> None:
    """The flag of a setting, which ``owners`` share, each with its own default."""
    declared = next(iter(owners.values()))
    text = declared.setting.help.replace("{default}", said(declared.default))
    own = "" if "default" in text else f"; default: {by_default({name: x.default for name, x in owners.items()})}"
    declared.add_to(group, default=None, help=f"{', '.join(owners)}: {text}{own}")


def loss_names(text: str) -> str:
    """--loss, with absolute paths; raises argparse.ArgumentTypeError for an unknown name or an impossible sum."""
    try:
        needs_of(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--loss ")) from None
    return "+".join(str(load_own(name, "--loss")) if is_own(name) else name for name in text.split("+"))


def _known(names: str) -> list[str]:
    """Every loss of the project, and one's own among ``names``, which are joined by +."""
    return [*LOSSES, *filter(is_own, names.split("+"))]


def options(args: argparse.Namespace) -> dict[str, object]:
    """The flags that are constructor arguments of losses; None keeps the loss's default."""
    return {name: vars(args)[name] for name in losses.settings(_known(args.loss))}


def code_of(args: argparse.Namespace) -> dict[str, object]:
    """For config.json: the SHA-256 of the files of one's own losses, by the losses' names."""
    hashes = {losses.called(x): load_own(x, "--loss").sha256 for x in args.loss.split("+") if is_own(x)}
    return {"loss_code_sha256": hashes} if hashes else {}


def unused(args: cli.Arguments, head: nn.Module) -> list[str]:
    """A sentence for each flag that was given and that no loss in --loss takes. ``head``: the student's."""
    needs = needs_of(args.loss)
    taken = losses.settings(args.loss.split("+"))
    given = [owner for name, owners in losses.settings(_known(args.loss)).items() for owner in list(owners.values())[:1]
             if vars(args)[name] is not None and name not in taken]
    has_norm = any(isinstance(module, _BatchNorm) for module in head.modules())  # the head has none if the widths agree
    given += [found for name, found in SURROUNDINGS.items() if name in args.given
              and not (found.used.when(needs) and (has_norm or name != "head_bn"))]
    flags = ["--distill"] * bool(args.distill and not needs.teacher) + [found.flag for found in given]
    return [f"{flag} is not used by --loss {args.loss}" for flag in flags]


def check_loss(args: argparse.Namespace) -> None:
    """Refuse a command line that does not fit --loss."""
    needs, count = needs_of(args.loss), args.loss.count("+") + 1
    if args.loss_weights and len(args.loss_weights) != count:
        raise UserError(f"--loss-weights holds {len(args.loss_weights)} numbers and --loss {args.loss} names {count}; "
                        "give one for each, with commas")
    taken = losses.settings(args.loss.split("+"))
    for name, owners in taken.items():
        own, given, one = [said(x.default) for x in owners.values()], vars(args)[name], next(iter(owners.values()))
        if given is None:
            continue
        if one.setting.excludes and vars(args)[one.setting.excludes] is not None:
            other = next(iter(taken[one.setting.excludes].values())).flag
            raise UserError(f"{one.flag} leaves nothing for {other} {said(vars(args)[one.setting.excludes])} to do; "
                            "give either")
        if len(set(own)) > 1 and not one.setting.shared:
            raise UserError(f"{one.flag} {said(given)} would go to all of {', '.join(owners)}, whose own values "
                            f"differ ({', '.join(own)}); leave it out, and each keeps its own")
    for name in args.loss.split("+"):
        own = losses.settings([name])
        weights = [own[key][losses.called(name)] for key in ("l_0", "l_1") if {"l_0", "l_1"} <= own.keys()]
        if weights and not any(x.default if vars(args)[x.name] is None else vars(args)[x.name] for x in weights):
            zero = " and ".join(f"{x.flag} 0" for x in weights)
            raise UserError(f"{zero} leave --loss {losses.called(name)} nothing to train on; "
                            "give one of them a weight")
    unknown = [head for head, _ in needs.heads if head not in HEADS]
    if unknown:
        raise UserError(f"--loss {args.loss} needs the student's head {unknown[0]!r}, which does not exist; choose "
                        f"from {', '.join(HEADS)}")
    if needs.teacher and not args.distill:
        raise UserError(f"--loss {args.loss} needs --distill PATH, the teacher's checkpoint; train one with "
                        "train_teacher.py if you have none")
    if args.space_batch == "global" and "space_batch" not in taken:
        able = ", ".join(sorted(losses.settings()["space_batch"]))
        raise UserError(f"--space-batch global has no meaning for --loss {args.loss}, which uses no statistics of a "
                        f"dimension; leave it out, or use one of {able}")
    if needs.pairs and (args.sampler != "cf" or args.nearest_k != 1 or args.fark_info):
        found = f"--sampler {args.sampler} --nearest-k {args.nearest_k}{' --fark-info' * bool(args.fark_info)}"
        raise UserError(f"--loss {args.loss} needs batches of pairs, each image with one of its nearest, and found "
                        f"{found}; give --sampler cf --nearest-k 1 --total-k 5 (its paper's) and --closek-info")
