"""Settings that are declared once, in the signature of what takes them.

    def __init__(self, disco_weight: Annotated[float, Setting("weight of the squared distance", least=0)] = 32.0)

The name, the type and the default are the signature's own; :class:`Setting` adds what a signature cannot say. The
command-line flag with its help and its limits, the keyword argument, what config.json records and the comparison on
resume all come from this one declaration. Functions, classes and dataclasses declare alike.
"""

from __future__ import annotations

import argparse
import dataclasses
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
    """What a signature does not say of an argument that a person may set.

    ``help``: what it does, with the source of its default; ``{default}`` stands for the default, and ``{source}`` for
    whose it is, which the script says. ``flags``: its spellings, separated by spaces, where ``--name-of-the-argument``
    is not the only one; messages use the first long one. ``least``, ``most``, ``above``: limits of a number.
    ``choices``: the words allowed. ``parse``: text to value, where the type does not say how; it raises
    argparse.ArgumentTypeError. ``nargs``, ``const``: argparse's. ``resumable``: a run may be resumed with another
    value and is still the same run, since it only says where things lie or how the work is done. ``shared``: where
    several owners are used at once (a sum of losses), one value for all makes sense although their defaults differ.
    ``excludes``: another setting that says the opposite. ``used``: whether the setting has an effect, given what the
    script knows (for what surrounds a loss, the loss's needs); None: always.
    """

    help: str
    flags: str = ""
    least: float = -math.inf
    most: float = math.inf
    above: float | None = None
    choices: Sequence[str] = ()
    metavar: str | None = None
    parse: Callable[[str], Any] | None = None
    nargs: int | str | None = None
    const: Any = None
    resumable: bool = False
    shared: bool = False
    excludes: str = ""
    used: Callable[[Any], bool] | None = None


@dataclass(frozen=True)
class Declared:
    """A :class:`Setting` with what the signature says: the argument's ``name``, its ``type`` and its ``default``."""

    name: str
    setting: Setting
    type: type
    default: Any

    @property
    def spellings(self) -> list[str]:
        """All flags of it, as they are typed."""
        return self.setting.flags.split() or [f"--{self.name.replace('_', '-')}"]

    @property
    def flag(self) -> str:
        """The flag that messages name."""
        return next(word for word in self.spellings if word.startswith("--"))

    def add_to(self, group: argparse._ArgumentGroup, default: Any = REQUIRED, help: str | None = None,
               source: str = "") -> None:
        """Add its flag to ``group``; ``default`` and ``help`` replace its own."""
        setting = self.setting
        default = self.default if default is REQUIRED else default
        options: dict[str, Any] = {"required": True} if default is REQUIRED else {"default": default}
        if self.type is bool and not setting.parse:
            options |= {"action": "store_const", "const": True}
        else:
            options |= {"type": self.parser(), "metavar": setting.metavar, "nargs": setting.nargs}
            options |= {"choices": setting.choices} if setting.choices else {}
            options |= {"const": setting.const} if setting.nargs == "?" else {}
        text = (help or setting.help).replace("{default}", said(default)).replace("{source}", source)
        group.add_argument(*self.spellings, dest=self.name, help=text.replace("%", "%%"), **options)

    def parser(self) -> Callable[[str], Any]:
        """Text to value, within the limits."""
        setting = self.setting
        if setting.parse or self.type not in (int, float):
            return setting.parse or str
        return number(self.type, setting.least, setting.most, above=setting.above)


def declared(owner: Callable[..., Any]) -> dict[str, Declared]:
    """The settings that a function or class takes, by argument name, in the order of its signature."""
    plain_class = isinstance(owner, type) and not dataclasses.is_dataclass(owner)
    hints = typing.get_type_hints(owner.__init__ if plain_class else owner, include_extras=True)
    found = {}
    for name, parameter in inspect.signature(owner).parameters.items():
        kind, setting = _split(hints.get(name))
        if setting:
            found[name] = Declared(name, setting, kind, parameter.default)
    return found


def values(owner: Callable[..., Any], namespace: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of ``owner`` that a parsed command line holds."""
    return {name: getattr(namespace, name) for name in declared(owner)}


def resumable(*owners: Callable[..., Any]) -> set[str]:
    """The settings of ``owners`` that may differ when a run is resumed."""
    return {name for owner in owners for name, found in declared(owner).items() if found.setting.resumable}


def said(value: Any) -> str:
    """A default as help texts say it."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(said, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def by_default(defaults: Mapping[str, Any]) -> str:
    """``coss, dist 0.1; seed 0.2``: the defaults of several owners, those alike together."""
    owners: dict[str, list[str]] = {}
    for owner, value in defaults.items():
        owners.setdefault(said(value), []).append(owner)
    return "; ".join(f"{', '.join(names)} {value}" for value, names in owners.items())


def _split(hint: Any) -> tuple[Any, Setting | None]:
    """The type, without None, and the setting of an annotation."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):  # Python 3.10 adds None to what defaults to it
        hint = next((x for x in typing.get_args(hint) if typing.get_origin(x) is Annotated), hint)
    if typing.get_origin(hint) is not Annotated:
        return hint, None
    kind, *extras = typing.get_args(hint)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next(x for x in typing.get_args(kind) if x is not type(None))
    return kind, next((x for x in extras if isinstance(x, Setting)), None)
