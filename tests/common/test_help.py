"""--help in two levels: what a person starts with, and every flag, all of it or a group at a time."""

import re

import pytest

from common.cli import FEW, Parser
from runtime.settings import REQUIRED, Declared, Setting


@pytest.fixture
def parser():
    """Required, positional, 30 declared flags of which one is basic, and a group whose flags are all shown."""
    parser = Parser(prog="prog", description="What it does.")
    parser.add_argument("file", metavar="FILE", help="a file")
    group = parser.add_argument_group("tempo and rhythm")
    for i in range(30):
        Declared(f"flag_{i}", Setting(f"help of {i}", basic=i == 7), int, 3).add_to(group)
    Declared("must", Setting("required", "-m --must", metavar="100%"), str, REQUIRED).add_to(group)
    parser.add_argument_group("own").add_argument("--own", help="the script's own")
    return parser


def flags_of(text):
    return set(re.findall(r"^  (?:-\w [^,]+, )?(--[\w-]+)", text, re.MULTILINE))


def test_help_shows_what_a_person_starts_with(parser):
    text = parser.format_help()
    assert text.splitlines()[0] == "usage: prog FILE --must 100% [flags]"
    assert flags_of(text) == {"--help", "--flag-7", "--must", "--own"}
    assert "What it does." in text
    assert text.endswith("\n29 more flags: --help all, or --help and the name of a group: tempo.\n")


def test_help_all_and_one_group(parser):
    every = {action.option_strings[-1] for action in parser._actions if action.option_strings}
    assert flags_of(parser.format_help("all")) == every
    assert flags_of(parser.format_help("tempo")) == every - {"--help", "--own"}
    assert "more flags" not in parser.format_help("all") + parser.format_help("tempo")


@pytest.mark.parametrize(("words", "shown"), [
    (["--help"], "29 more flags"), (["-h", "all"], "help of 29"), (["--help", "own"], "the script's own")])
def test_the_command_line(parser, capsys, words, shown):
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(words)
    assert not stop.value.code
    assert shown in capsys.readouterr().out


def test_a_group_that_there_is_not(parser, capsys):
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--help", "speed"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == ("error: --help speed is not a group of flags; choose from all, tempo, own; "
                                       "prog --help all lists every flag\n")


def test_few_flags_are_all_shown():
    parser = Parser(prog="prog")
    for i in range(FEW - 1):  # and --help
        Declared(f"flag_{i}", Setting("help"), int, 3).add_to(parser)
    assert parser.format_help() == parser.format_help("all")
