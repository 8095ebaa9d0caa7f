"""Sentences on a terminal: lines of at most 100 characters that keep paths, flags and commands whole."""

from __future__ import annotations

import itertools
import re
import shutil
import textwrap

LINE = 100  # characters
CODE = "    "  # begins a line to be copied
FLAG = re.compile(r"--?[A-Za-z]")
GAP = re.compile(r"(?<=\S) {2,}(?=\S)")  # between columns
GLUE = "\0"


def folded(text: str, columns: int | None = None) -> str:
    """``text`` with its longer lines broken between words, at ``columns`` or where the terminal ends.

    No word is broken, and so no path; a flag stays beside its value, a script beside its flags. Lines of code, which
    begin with four spaces, JSON, tables (gaps between columns) and progress bars stay as they are.
    """
    columns = columns or min(LINE, shutil.get_terminal_size().columns)
    if len(text) <= columns or "\r" in text:
        return text
    return "\n".join(_fold(line, columns) for line in text.split("\n"))


def _fold(line: str, columns: int) -> str:
    gaps = list(GAP.finditer(line))
    if len(line) <= columns or line.startswith((CODE, "{", "[")) or len(gaps) > 1 or not line.strip():
        return line
    start = gaps[0].end() if gaps else len(line) - len(line.lstrip())  # of the text, behind its name if there is one
    words = line[start:].split()
    glued = words[0]
    for before, word in itertools.pairwise(words):
        together = before == "python" or before.endswith(".py") or FLAG.match(word) or (
            FLAG.match(before) and before[-1] not in ",;:.")
        glued += (GLUE if together else " ") + word
    return "\n".join(textwrap.wrap(glued, columns, initial_indent=line[:start],
                                   subsequent_indent=" " * (start if gaps else start + 2), break_long_words=False,
                                   break_on_hyphens=False)).replace(GLUE, " ")
