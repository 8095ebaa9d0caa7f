"""Settings that are declared once, in the signature of the function or class that takes them.

    def __init__(self, disco_weight: Annotated[float, Setting("weight of the squared distance", least=0)] = 32.0)

The name, the type and the default are the signature's own; :class:`Setting` adds what a signature cannot say. The
command-line flag with its help and its limits, the keyword argument, what config.json records and the comparison on
resume all come from this one declaration. It works for functions, classes and dataclasses.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from runtime.numbers import number

REQUIRED = inspect.Parameter.empty  # the default of a setting that has none


@dataclass(frozen=True)
class Setting:
    """What a signature does not say about an argument that users can set.

    ``help``: what it does, with the source of its default; ``{default}`` stands for the default, and ``{source}`` for
    its source, which the script gives. ``flags``: its spellings, separated by spaces, if ``--name-of-the-argument`` is
    not the only one; messages use the first long one. ``least``, ``most``, ``above``, ``below``: limits of a number.
    ``choices``: the allowed words. ``parse``: text to value, if the type does not define it; it raises
    argparse.ArgumentTypeError. ``item``: the type of each of several values. ``nargs``, ``const``: argparse's.
    ``resumable``: a run resumed with another value is still the same run, since the setting only says where files are
    or how the work is done; with ``changes_numbers`` that affects the result slightly. ``shared``: if several owners
    are used at once (a sum of losses), one value for all makes sense although their defaults differ. ``excludes``:
    another setting that contradicts it. ``unset``: the help's text for a default of None. ``basic``: ``--help`` alone
    shows it. ``check``: called with a value and its flag before the work, raises :class:`runtime.errors.UserError`, for
    example for a file that is not there.
    """

    help: str
    flags: str = ""
    least: float = -math.inf
    most: float = math.inf
    above: float | None = None
    below: float | None = None
    choices: Sequence[str] = ()
    metavar: str | None = None
    parse: Callable[[str], Any] | None = None
    item: type | None = None
    nargs: int | str | None = None
    const: Any = None
    resumable: bool = False
    changes_numbers: bool = False
    shared: bool = False
    excludes: str = ""
    unset: str = "none"
    basic: bool = False
    check: Callable[[Any, str], None] | None = None


@dataclass(frozen=True)
class Used:
    """Beside a Setting: it has an effect only if ``when`` is true of what the script knows (the command line, or the
    needs of a loss); ``words`` describe that condition, for the warning about a flag without effect."""

    words: str
    when: Callable[[Any], bool]


@dataclass(frozen=True)
class Declared:
    """A :class:`Setting` with what the signature says: the argument's ``name``, its ``type`` and its ``default``."""

    name: str
    setting: Setting
    type: type
    default: Any
    used: Used | None = None

    @property
    def spellings(self) -> list[str]:
        """All its flags, as they are typed."""
        return self.setting.flags.split() or [f"--{self.name.replace('_', '-')}"]

    @property
    def flag(self) -> str:
        """The flag that messages name."""
        return next(word for word in self.spellings if word.startswith("--"))

    def add_to(self, group: argparse._ArgumentGroup, default: Any = REQUIRED, help: str | None = None,
               source: str = "", flags: str = "") -> None:
        """Add its flag to ``group``; ``default``, ``help`` and ``flags`` replace its own."""
        setting = self.setting
        default = self.default if default is REQUIRED else default  # None is a default as well
        options: dict[str, Any] = {"required": True} if default is REQUIRED else {"default": default}
        if self.type is bool and not setting.parse:
            options |= {"action": "store_const", "const": True}
        else:
            options |= {"type": self.parser(), "metavar": setting.metavar, "nargs": setting.nargs}
            options |= {"choices": setting.choices} if setting.choices else {}
            options |= {"const": setting.const} if setting.nargs == "?" else {}
        text = (help or setting.help).replace("{default}", setting.unset if default is None else said(default))
        action = group.add_argument(*(flags.split() or self.spellings), dest=self.name,
                                    help=text.replace("{source}", source).replace("%", "%%"), **options)
        action.declared, action.check = self, setting.check

    def parser(self) -> Callable[[str], Any]:
        """Text to value, within the limits."""
        setting = self.setting
        kind = setting.item or self.type
        if setting.parse or kind not in (int, float):
            return setting.parse or str
        return number(kind, setting.least, setting.most, above=setting.above, below=setting.below)


@functools.cache  # a script asks for those of a loss some ten times, and a signature takes a millisecond
def declared(owner: Callable[..., Any]) -> Mapping[str, Declared]:
    """The settings that a function or class takes, by argument name, in the order of its signature; read-only."""
    plain_class = isinstance(owner, type) and not dataclasses.is_dataclass(owner)
    hints = typing.get_type_hints(owner.__init__ if plain_class else owner, include_extras=True)
    found = {}
    for name, parameter in inspect.signature(owner).parameters.items():
        kind, extras = _split(hints.get(name))
        setting = next((x for x in extras if isinstance(x, Setting)), None)
        if setting:
            used = next((x for x in extras if isinstance(x, Used)), None)
            found[name] = Declared(name, setting, kind, parameter.default, used)
    return types.MappingProxyType(found)


def declared_among(owners: Mapping[str, Callable[..., Any]]) -> dict[str, dict[str, Declared]]:
    """The settings that several owners declare: {setting: {owner: its declaration, with the owner's default}}.

    Raises TypeError if two owners declare a setting differently: it would be one flag with two meanings.
    """
    found: dict[str, dict[str, Declared]] = {}
    for owner, takes in owners.items():
        for name, declaration in declared(takes).items():
            found.setdefault(name, {})[owner] = declaration
    for name, declarations in found.items():
        if len({id(x.setting) for x in declarations.values()}) > 1:
            raise TypeError(f"{', '.join(declarations)} declare {name} apart; declare it once, and let them share it")
    return found


def add_settings(group: argparse._ArgumentGroup, owner: Callable[..., Any], *, source: str = "",
                 flags: Mapping[str, str] | None = None, help: Mapping[str, str] | None = None,
                 without: Sequence[str] = (), **defaults: Any) -> None:
    """Add the flags of all settings of ``owner`` to ``group``, except those in ``without``.

    ``defaults``, ``flags`` and ``help``, by setting, replace the declared ones; ``source``: that of the defaults.
    """
    for name, found in declared(owner).items():
        if name not in without:
            found.add_to(group, defaults.get(name, found.default), (help or {}).get(name), source,
                         (flags or {}).get(name, ""))


def take(owner: Callable[..., Any], namespace: argparse.Namespace) -> Any:
    """``owner`` called with the values that a parsed command line holds for it."""
    return owner(**values(owner, namespace))


def values(owner: Callable[..., Any], namespace: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of ``owner`` that a parsed command line holds."""
    return {name: getattr(namespace, name) for name in declared(owner) if name in namespace}


def said(value: Any) -> str:
    """A default as shown in help texts."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(said, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def boolean(text: str) -> bool:
    """``true/1/yes`` or ``false/0/no``; the original's ``--cos False`` was true."""
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
    return words[text.lower()]


def by_default(defaults: Mapping[str, Any]) -> str:
    """``coss, dist 0.1; seed 0.2``: the defaults of several owners, equal ones grouped."""
    owners: dict[str, list[str]] = {}
    for owner, value in defaults.items():
        owners.setdefault(said(value), []).append(owner)
    return "; ".join(f"{', '.join(names)} {value}" for value, names in owners.items())


def _split(hint: Any) -> tuple[Any, Sequence[Any]]:
    """The type of an annotation, without None, and its metadata."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):  # Python 3.10 adds None to what defaults to it
        hint = next((x for x in typing.get_args(hint) if typing.get_origin(x) is Annotated), hint)
    if typing.get_origin(hint) is not Annotated:
        return hint, ()
    kind, *extras = typing.get_args(hint)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next(x for x in typing.get_args(kind) if x is not type(None))
    return kind, extras
