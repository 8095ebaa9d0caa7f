"""Numbers from outside have limits, and what is beyond them is one short sentence."""

import argparse

import pytest

from runtime.errors import UserError
from runtime.numbers import from_environment, number


@pytest.mark.parametrize(("kind", "limits", "text", "words"), [
    (int, (1,), "0", "a whole number at least 1"), (int, (1,), "1.5", "a whole number at least 1"),
    (int, (), "9" * 400, "at most 2.14748e+09"), (int, (), "9" * 5000, "a whole number"),
    (int, (), str(2**31), "at most 2.14748e+09"), (int, (), str(-2**31), "at most 2.14748e+09"),
    (int, (0, 2**40), str(2**31), "at most 2.14748e+09"), (int, (), "inf", "a whole number"),
    (float, (), "inf", "its size at most 3.4e+38"), (float, (), "nan", "a number"),
    (float, (0,), "1e400", "at least 0, and its size at most 3.4e+38"), (float, (), "-1e300", "its size"),
    (float, (0, 1), "1.1", "a number at least 0 and at most 1"), (float, (), "", "a number"),
    (float, (), "one", "a number")])
def test_beyond_the_limits(kind, limits, text, words):
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        number(kind, *limits)(text)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 150


def test_within_the_limits():
    assert number(int)("2147483647") == 2**31 - 1
    assert number(float)("-3e38") == -3e38
    assert number(float, above=0)("1e-45") == 1e-45
    with pytest.raises(argparse.ArgumentTypeError, match="'0' is not a number above 0"):
        number(float, above=0)("0")


def test_the_environment(monkeypatch):
    monkeypatch.delenv("COSS_X", raising=False)
    assert from_environment("COSS_X", 7) == 7
    monkeypatch.setenv("COSS_X", "")
    assert from_environment("COSS_X", 7) == 7
    monkeypatch.setenv("COSS_X", "3")
    assert from_environment("COSS_X", 7) == 3
    monkeypatch.setenv("COSS_X", "-1")
    with pytest.raises(UserError, match="COSS_X: '-1' is not a whole number at least 0"):
        from_environment("COSS_X", 7)
