"""A setting that is declared once: flags, limits, help and keyword arguments from a signature."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import pytest

from runtime.settings import Setting, Used, add_settings, boolean, by_default, declared, take, values

Shared = Annotated[float, Setting("a temperature", "-T --temp --temperature", above=0)]


class Loss:
    def __init__(self, dim: int = 3, temp: Shared = 0.1,
                 size: Annotated[int, Setting("a size; default {default}, {source}", least=1, most=9)] = 4) -> None:
        self.got = (dim, temp, size)


class Derived(Loss):
    pass


@dataclass(frozen=True)
class Options:
    name: Annotated[str, Setting("required", metavar="NAME", resumable=True)]
    flag: Annotated[bool, Setting("a switch of 100%")] = False
    cos: Annotated[bool, Setting("a switch with a value", parse=boolean, nargs="?", const=True)] = True
    width: Annotated[int | None, Setting("default: {default}", unset="found")] = None
    kind: Annotated[str, Setting("a word", choices=("a", "b")), Used("with --flag", lambda args: args.flag)] = "a"
    epochs: Annotated[Sequence[int], Setting("several; default {default}", nargs="*", item=int, least=0)] = (1, 2)


def parser_of(*owners, **options):
    parser = argparse.ArgumentParser(prog="prog")
    for owner in owners:
        add_settings(parser, owner, **options)
    return parser


def test_only_arguments_with_a_setting_are_declared():
    assert list(declared(Loss)) == ["temp", "size"]
    assert list(declared(Derived)) == ["temp", "size"]
    assert list(declared(Options)) == ["name", "flag", "cos", "width", "kind", "epochs"]
    assert {name: found.type for name, found in declared(Options).items() if name in ("width", "cos")} == {
        "width": int, "cos": bool}


def test_spellings():
    found = declared(Loss)
    assert (found["temp"].spellings, found["temp"].flag) == (["-T", "--temp", "--temperature"], "--temp")
    assert (found["size"].spellings, found["size"].flag) == (["--size"], "--size")


def test_what_is_parsed_is_what_the_owner_is_given():
    args = parser_of(Loss).parse_args(["-T", "0.5", "--size", "9"])
    assert values(Loss, args) == {"temp": 0.5, "size": 9}
    assert take(Loss, args).got == (3, 0.5, 9)
    assert take(Derived, parser_of(Loss).parse_args([])).got == (3, 0.1, 4)


def test_every_kind():
    found = take(Options, parser_of(Options).parse_args(["--name", "x"]))
    assert found == Options("x", False, True, None, "a", (1, 2))
    found = take(Options, parser_of(Options).parse_args(
        ["--name", "x", "--flag", "--cos", "no", "--width", "3", "--kind", "b", "--epochs", "5", "6"]))
    assert found == Options("x", True, False, 3, "b", [5, 6])
    assert take(Options, parser_of(Options).parse_args(["--name", "x", "--cos"])).cos is True


@pytest.mark.parametrize("words", [["--size", "0"], ["--size", "10"], ["--size", "2.5"], ["--temp", "0"],
                                   ["--temp", "nan"], ["--temp", "inf"], ["--size", "9" * 400]])
def test_limits(words):
    with pytest.raises(SystemExit):
        parser_of(Loss).parse_args(words)


@pytest.mark.parametrize("words", [[], ["--name", "x", "--kind", "c"], ["--name", "x", "--epochs", "-1"],
                                   ["--name", "x", "--cos", "maybe"]])
def test_refused(words):
    with pytest.raises(SystemExit):
        parser_of(Options).parse_args(words)


def test_help_says_the_default_and_whose_it_is():
    text = parser_of(Loss, Options, source="the paper's", size=7).format_help()
    for words in ("default 7, the paper's", "default: found", "several; default 1 2", "a switch of 100%"):
        assert words in " ".join(text.split())


def test_defaults_spellings_and_help_of_a_script():
    parser = parser_of(Loss, size=5, flags={"temp": "--tau"}, help={"temp": "tau, 100%"}, without=[])
    assert vars(parser.parse_args(["--tau", "2"])) == {"temp": 2.0, "size": 5}
    assert "tau, 100%" in parser.format_help()
    assert "temp" not in vars(parser_of(Loss, without=["temp"]).parse_args([]))


def test_conditions_and_resumption_are_known():
    found = declared(Options)
    assert [name for name, x in found.items() if x.setting.resumable] == ["name"]
    assert [name for name, x in found.items() if x.used] == ["kind"]
    assert not found["kind"].used.when(argparse.Namespace(flag=False))


def test_alike_defaults_stand_together():
    assert by_default({"a": 0.1, "b": 0.2, "c": 0.1}) == "a, c 0.1; b 0.2"
