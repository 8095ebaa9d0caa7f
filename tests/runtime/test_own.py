"""runtime/own.py: a person's own file is run once, known by its hash, and blamed in one sentence."""

import pytest

from runtime.errors import UserError
from runtime.own import is_own, load_own


@pytest.mark.parametrize(("text", "own"), [
    ("my.py:build", True), ("/a/b c/my.py:Build", True), ("timm:resnet18", False), ("hf:a/b", False), ("my.py", False),
    ("my.py:", False), ("my.py:a b", False), ("a=b.py:c", True), (None, False), (7, False)])
def test_is_own(text, own):
    assert is_own(text) == own


def write(folder, text):
    path = folder / "mine.py"
    path.write_text(text)
    return path


def test_a_file_is_run_once_and_again_when_it_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "beside.py").write_text("number = 3\n")
    write(tmp_path, "import beside, pathlib\npathlib.Path('log').open('a').write('x')\n"
                    "def build():\n    return beside.number\n")
    one, two = load_own("mine.py:build", "--data"), load_own(str(tmp_path / "mine.py:build"), "-a")
    assert one.value is two.value and one.value() == 3
    assert str(one) == str(tmp_path / "mine.py:build") and one.short == "mine.py:build"
    assert (tmp_path / "log").read_text() == "x"
    write(tmp_path, "def build():\n    return 4\n")
    three = load_own("mine.py:build", "--data")
    assert three.value() == 4 and three.sha256 != one.sha256


@pytest.mark.parametrize(("text", "words"), [
    (None, ["mine.py cannot be read (No such file or directory)", "give FILE.py:NAME"]),
    ("def build(:\n", ["mine.py:build fails while the file is run (line 1: SyntaxError: invalid syntax); correct it"]),
    ("\n\nimport nothing_of_this_name\n", ["line 3: ModuleNotFoundError: No module named 'nothing_of_this_name'"]),
    ("import sys\nsys.exit(1)\n", ["line 2: SystemExit"]),
    ("build = 3\nclass Other: pass\n", ["defines no function or class build; it defines Other"]),
    ("", ["it defines none"]),
])
def test_what_is_wrong_is_said_in_one_sentence(text, words, tmp_path):
    path = write(tmp_path, text) if text is not None else tmp_path / "mine.py"
    with pytest.raises(UserError) as error:
        load_own(f"{path}:build", "--data")
    assert str(error.value).startswith("--data ")
    for word in words:
        assert word in str(error.value)


def test_code_that_fails_when_it_is_called_is_blamed_with_its_line(tmp_path):
    own = load_own(f"{write(tmp_path, 'def build():' + chr(10) * 2 + '    return 1 / 0' + chr(10))}:build", "-a")
    with pytest.raises(UserError, match="-a mine.py:build fails while it builds .line 3: ZeroDivisionError"), \
            own.blamed("while it builds"):
        own.value()
