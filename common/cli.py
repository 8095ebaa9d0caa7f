"""The root scripts' shared command-line code: the parser, and groups of flags made from declared settings."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import textwrap
from collections.abc import Callable, Container, Iterator, Sequence, Set
from typing import Any, NoReturn

from checkpoints.frozen import load_frozen
from data import samplers
from data.images import limit_pixels
from data.reading import Images, Reading, Views, default_workers
from evals.monitor import Monitoring
from runtime.agreement import same_on_every_rank
from runtime.device import Process, start_process
from runtime.hardware import Hardware
from runtime.job import JobSettings, RunSettings
from runtime.numbers import number
from runtime.optimizers import Optimization
from runtime.settings import Declared, Used, add_settings, declared, take, values

__all__ = ["Arguments", "Group", "Parser", "default_workers", "number", "take", "values"]
Group = argparse._ArgumentGroup
FEW = 25  # flags, all of which --help shows


class Arguments(argparse.Namespace):
    """A parsed command line. Besides the values it has ``given``, the names of the flags that were typed; ``flags``,
    {name: its flag, for messages}; ``declared``, the settings behind the flags; ``used``, {name: (flag,
    runtime.settings.Used)} for the settings that have one; and ``checks``, {name: (flag, check)} for those that
    :func:`check_files` checks.
    """

    __slots__ = ("checks", "declared", "flags", "given", "used")

    @property
    def resumable(self) -> set[str]:
        """The settings that may differ when a run is resumed."""
        return {name for name, found in self.declared.items() if found.setting.resumable}


class Parser(argparse.ArgumentParser):
    """argparse without abbreviated flags, with one-sentence errors and two levels of help: --help shows the flags to
    start with (those declared ``basic`` in runtime.settings and the script's own), and --help all, or --help GROUP,
    shows the others."""

    def __init__(self, **options: object) -> None:
        super().__init__(allow_abbrev=False, add_help=False, formatter_class=argparse.RawDescriptionHelpFormatter,
                         **options)
        self.add_argument("-h", "--help", action=Help)

    def format_help(self, what: str = "") -> str:
        """What --help prints: the basic flags for ``what`` '', every flag for 'all', else the flags of that group."""
        formatter = self._get_formatter()
        formatter.add_usage(self._usage(), [], [])
        if what in ("", "all"):
            formatter.add_text(self.description)
        more = {}
        for group in self._action_groups:
            shown = [x for x in group._group_actions if what or self._is_shown_at_once(x)]
            if what in ("", "all", _short(group)):
                formatter.start_section(group.title)
                formatter.add_arguments(shown)
                formatter.end_section()
            more[_short(group)] = len(group._group_actions) - len(shown)
        if any(more.values()):
            names = ", ".join(name for name, count in more.items() if count)
            formatter.add_text(textwrap.fill(f"{sum(more.values())} more flags: --help all, or --help and the name of "
                                             f"a group: {names}.", formatter._width))
        return formatter.format_help()

    def groups(self) -> list[Group]:
        """The groups of flags that were given a title."""
        return [x for x in self._action_groups if x not in (self._positionals, self._optionals)]

    def _is_shown_at_once(self, action: argparse.Action) -> bool:
        found = getattr(action, "declared", None)
        return found is None or found.setting.basic or action.required or len(self._actions) <= FEW

    def _usage(self) -> str:
        """One line with the required arguments."""
        words = [self.prog]
        for action in self._actions:
            if action.required or not action.option_strings:
                flag = next((x for x in action.option_strings if x.startswith("--")), "")
                words.append(f"{flag} {action.metavar or action.dest.upper()}".strip())
        words.append("..." if self._subparsers else "[flags]")
        return " ".join(words).replace("%", "%%")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Arguments:  # noqa: ANN401
        """If there is a sub-command, its parser reports unknown flags."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            chosen = next((x.choices[getattr(parsed, x.dest)] for x in self._actions
                           if isinstance(x, argparse._SubParsersAction)), self)
            chosen.error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None,  # noqa: ANN401 - argparse's
                         ) -> tuple[Arguments, list[str]]:
        words = sys.argv[1:] if args is None else list(args)
        parsed, unknown = super().parse_known_args(words, namespace or Arguments())
        actions = list(self._all_actions(parsed))
        parsed.declared = {x.dest: x.declared for x in actions if isinstance(getattr(x, "declared", None), Declared)}
        parsed.used = {name: (found.flag, found.used) for name, found in parsed.declared.items() if found.used}
        parsed.used |= {x.dest: (_typed(x.option_strings, words), x.used) for x in actions if hasattr(x, "used")}
        parsed.checks = {x.dest: (_typed(x.option_strings, words), x.check) for x in actions
                         if getattr(x, "check", None)}
        parsed.flags = {x.dest: next((word for word in x.option_strings if word.startswith("--")), x.option_strings[-1])
                        for x in reversed(actions) if x.option_strings}
        parsed.given = {x.dest for x in actions if any(_is_flag(word, x.option_strings) for word in words)}
        return parsed, unknown

    def _all_actions(self, parsed: argparse.Namespace) -> Iterator[argparse.Action]:
        for action in self._actions:
            yield action
            if isinstance(action, argparse._SubParsersAction):
                yield from action.choices[getattr(parsed, action.dest)]._all_actions(parsed)

    def error(self, message: str) -> NoReturn:
        first = os.environ.get("LOCAL_RANK", "0") == "0"  # one sentence a machine, not one a process
        self.exit(2, f"error: {message}; {self.prog} --help all lists every flag\n" if first else "")


class Help(argparse.Action):
    """--help, see :class:`Parser`."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, default=argparse.SUPPRESS, nargs="?", const="", metavar="all",
                         help="this text; --help all: every flag")

    def __call__(self, parser: Parser, namespace: argparse.Namespace, values: str, option_string: str | None = None,
                 ) -> NoReturn:
        names = ["all", *map(_short, parser.groups())]
        if values and values not in names:
            parser.error(f"--help {values} is not a group of flags; choose from {', '.join(names)}")
        print(parser.format_help(values), end="")
        parser.exit()


def _short(group: Group) -> str:
    """The name of a group of flags for --help: the first word of its title."""
    return group.title.split()[0].lower()


def _is_flag(word: str, spellings: Sequence[str]) -> bool:
    return any(word == flag or word.startswith(f"{flag}=") or (len(flag) == 2 and word.startswith(flag))
               for flag in spellings)


def _typed(spellings: Sequence[str], words: Sequence[str]) -> str:
    """The spelling that was typed, otherwise the last one."""
    default = spellings[-1] if spellings else ""  # of a positional argument
    return next((flag for flag in spellings if any(_is_flag(word, [flag]) for word in words)), default)


def only(group: Group, flags: str, words: str, when: Callable[[Arguments], bool]) -> None:
    """:class:`runtime.settings.Used` for ``flags`` that were added to ``group`` one by one."""
    for flag in flags.split():
        group._option_string_actions[flag].used = Used(words, when)


def check_by(group: Group, flags: str, check: Callable[[Any, str], None] | None) -> None:
    """:class:`runtime.settings.Setting`'s ``check`` for ``flags`` that were added to ``group`` one by one."""
    for flag in flags.split():
        group._option_string_actions[flag].check = check


def check_files(args: Arguments) -> None:
    """Raise :class:`UserError` if a file or folder that a flag names is not there, or cannot be what it should be."""
    for name, (flag, check) in args.checks.items():
        value = getattr(args, name)
        for one in value if isinstance(value, list) else [value] * (value is not None):
            check(one, flag)


def unused(args: Arguments, but: Container[str] = ()) -> list[str]:
    """A sentence for each flag that has no effect given the others. ``but``: flags to skip, whose effect depends on
    more than the command line."""
    return [f"{flag} has no effect: it is used {used.words}" for name, (flag, used) in args.used.items()
            if name in args.given and name not in but and not used.when(args)]


def say_unused(args: Arguments, process: Process) -> None:
    """The sentences of :func:`unused` on stderr, for scripts without a log."""
    for sentence in unused(args) if process.is_main else ():
        print(sentence, file=sys.stderr)


def add_data_flags(parser: argparse.ArgumentParser, *names: str, what: str | None = None, required: bool = True,
                   opens_images: bool = True, share_of: str | None = None) -> Group:
    """--data and how its images are read. ``names``: other spellings of --data; ``what``: its help; ``share_of``: the
    end of --subset's help."""
    group = parser.add_argument_group("data")
    images = declared(Images)
    images["data"].add_to(group, **({} if required else {"default": None}), help=what,
                          flags=" ".join(["--data", *names]))
    images["subset"].add_to(group, help=share_of and f"take the first X (0-1] of {share_of}")
    images["max_pixels"].add_to(group)
    if opens_images:
        add_settings(group, Reading, workers=default_workers())
    return group


def add_view_flags(group: Group) -> None:
    """How training's augmented views are made."""
    add_settings(group, Views)


def add_opening_flags(group: Group, workers: bool = True) -> None:
    """--max-pixels, and optionally --workers, for scripts that find images in their own way."""
    if workers:
        declared(Reading)["workers"].add_to(group, default_workers())
    declared(Images)["max_pixels"].add_to(group)


def add_device_flags(parser: argparse.ArgumentParser) -> Group:
    """--device, --seed, and the flags of the original's launcher."""
    group = parser.add_argument_group("device and seed")
    add_settings(group, JobSettings)
    return group


def add_run_flags(parser: argparse.ArgumentParser, what: str | None = None) -> Group:
    """The run's folder (``what`` is the help of --output), and how often the run logs and saves."""
    group = parser.add_argument_group("run")
    add_settings(group, RunSettings, help={"output": what} if what else {})
    return group


def add_optimization_flags(parser: argparse.ArgumentParser, source: str, rate: str, **defaults: object) -> Group:
    """Optimizer and schedule; ``source`` says where the defaults come from, ``rate`` the learning rate. Returns the
    group."""
    group = parser.add_argument_group("optimisation")
    rate = f"base learning rate; default: in proportion to the images of a step, {rate}"
    add_settings(group, Optimization, source=source, help={"lr": rate}, **defaults)
    return group


def add_speed_flags(parser: argparse.ArgumentParser) -> Group:
    """Precision, and how a GPU is used."""
    group = parser.add_argument_group("precision and speed")
    add_settings(group, Hardware)
    return group


def add_knn_flags(group: Group) -> None:
    """The k-NN score during training."""
    add_settings(group, Monitoring)


def add_network_flags(group: Group, prefix: str = "--", stem: bool = True) -> None:
    """How a checkpoint is read, apart from its path and architecture. ``prefix`` is ``--teacher-`` for --distill.
    ``stem``: add --stem too."""
    if stem:
        stem_flag(group, f"{prefix}stem", whose="the network")
    flags = {name: f"{prefix}{name}" for name in ("feature", "branch", "mean", "std")}
    add_settings(group, load_frozen, without=["stem"], flags=flags)


def checkpoint_options(args: argparse.Namespace) -> dict[str, object]:
    """The flags of :func:`add_network_flags` without the stem, as keywords of checkpoints.frozen.load_frozen."""
    return {name: value for name, value in values(load_frozen, args).items() if name != "stem"}


def stem_flag(group: Group, name: str, whose: str, unset: str | None = None) -> None:
    """--stem of ``whose`` network. ``name``: the flag, or several separated by spaces. ``unset``: what leaving it out
    means, for a network that no file describes."""
    stem = declared(load_frozen)["stem"]
    setting = dataclasses.replace(stem.setting, unset=unset or stem.setting.unset, basic=bool(unset))
    dataclasses.replace(stem, name=name.split()[0].lstrip("-").replace("-", "_"), setting=setting).add_to(
        group, source=whose, flags=name)


# Flags that may differ between the machines of a job: paths (the content is compared when the files are opened)
OWN = {"data", "knn_data", "weights", "distill", "student_weights", "workers", "local_rank", *samplers.tables()}


@contextlib.contextmanager
def joined(args: Arguments, own: Set[str] = frozenset(), **options: Any) -> Iterator[Process]:  # noqa: ANN401
    """This process of the job, with --device and --max-pixels in effect. ``options``: those of
    :func:`runtime.device.start_process`. Refuses, on every rank, a job whose processes were given different flags,
    except the paths of ``OWN`` and ``own``."""
    limit_pixels(args.max_pixels)
    with start_process(args.device, **options) as process:
        same_on_every_rank({args.flags.get(name, name): value for name, value in vars(args).items()
                            if name not in OWN | own}, process)
        yield process


def ignored_flags_note(args: argparse.Namespace) -> str | None:
    """Warn that the flags of the original's launcher do nothing."""
    return take(JobSettings, args).ignored()
