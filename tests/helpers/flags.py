"""The command line of every script and sub-command: its parser, and a minimal line that it takes."""

import argparse
import ast
import functools
import importlib

import pytest

from common import cli
from helpers.interpreter import ROOT

SHARED = "common"  # by the root scripts: the package on their side
ROOT_SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))


class Captured(Exception):
    """Carries the parser out of parse_args."""


def parser_of(script):
    def capture(self, *_, **__):
        raise Captured(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli.Parser, "parse_known_args", capture)
        with pytest.raises(Captured) as caught:
            importlib.import_module(script).parse_args([])
    return caught.value.args[0]


def all_parsers(parser):
    """The parser and those of its sub-commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from all_parsers(child)


def minimal(parser):
    """The words that a parser asks for, each with the first value that it takes."""
    for action in parser._actions:
        if action.required or not action.option_strings:
            yield from [word for word in action.option_strings if word.startswith("--")][:1]
            yield next(value for value in (*(action.choices or ()), "1", "1=1") if _takes(action, value))


def _takes(action, value):
    try:
        return bool((action.type or str)(value))
    except (ValueError, argparse.ArgumentTypeError):
        return False


ASKED_LATER = {("train_distill",): ["--distill", "t.pth"], ("pack_dataset",): ["--data", "d", "--output", "o.pack"]}


def minimal_lines():
    """A valid minimal command line of each script and sub-command."""
    for script in ROOT_SCRIPTS:
        if hasattr(importlib.import_module(script), "parse_args"):
            for parser in all_parsers(parser_of(script)):
                if not parser._subparsers:
                    case = (script, *parser.prog.split()[1:])
                    yield case, [*minimal(parser), *ASKED_LATER.get(case, [])]


MINIMAL = dict(minimal_lines())


def parse(case, *more):
    script, *command = case
    return importlib.import_module(script).parse_args([*command, *MINIMAL[case], *more])


@functools.cache
def parsed(path):
    """The syntax tree of a file, which several tests look at."""
    return ast.parse(path.read_text())
