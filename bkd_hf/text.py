"""Escaping of external text (names of classes, data, models, methods and files; options) wherever it is shown.

Whatever it contains, it is never interpreted as markup and does not break the layout: one function for each output
format. YAML metadata only needs [`one_line`], as its writer quotes.
"""

from __future__ import annotations

import difflib
import functools
import html
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

# Control characters (including terminal escapes, but not tabs and line feeds), bidirectional marks, and lone
# surrogates, which UTF-8 does not allow.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_REPLACEMENT = "\ufffd"


def normal(name: str) -> str:
    """Return the normal form of a name: é may be one character, or an e and an accent."""
    return unicodedata.normalize("NFC", name)


def printable(text: Any) -> str:
    """Return text that a terminal or a code block shows unchanged, with the same lines."""
    return _UNPRINTABLE.sub(_REPLACEMENT, str(text))


def one_line(text: Any, length: int | None = None) -> str:
    """Return printable text in one line, cut to a length."""
    line = printable(" ".join(str(text).split()))
    return line if length is None or len(line) <= length else f"{line[: length - 1]}…"


def markdown(text: Any) -> str:
    """Return text for Markdown, in a sentence or a table cell."""
    escaped = re.sub(r"[\\`*_\[\]|~#$@]|:(?=//)|(?<=www)\.", r"\\\g<0>", html.escape(one_line(text), quote=False))
    return escaped or "(no name)"


def code(text: Any) -> str:
    """Return text as Markdown code, in a sentence or a table cell."""
    line = one_line(text)
    return f"`{line}`" if line and not {"`", "|"} & set(line) else f"<code>{markdown(line)}</code>"


def code_block(text: Any, language: str = "") -> str:
    """Return text as a Markdown code block."""
    block = printable(text).rstrip("\n")
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", block))])
    return f"{fence}{language}\n{block}\n{fence}"


def spreadsheet(value: Any) -> Any:
    """Return a value for a CSV table, in which text is never a formula."""
    if not isinstance(value, str):
        return value
    line = one_line(value)
    return f"'{line}" if line.startswith(("=", "+", "-", "@")) else line


def figure(text: Any, length: int = 24) -> str:
    """Return text for a figure: short, without formulas, only with characters of its fonts."""
    line = "".join(c if ord(c) in _drawable() else _REPLACEMENT for c in one_line(text, length))
    return line.replace("$", r"\$")


@functools.cache
def _drawable() -> frozenset[int]:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    fonts = (get_font(findfont(FontProperties(weight=weight))) for weight in ("normal", "bold"))
    return frozenset.intersection(*(frozenset(font.get_charmap()) for font in fonts))


def duration(seconds: float) -> str:
    """E.g. "3 h 5 min", "12 min", "40 s"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def difference(first: float, second: float) -> float:
    """Difference of two fractions in percentage points, consistent with the values shown with one digit."""
    return round(round(100 * second, 1) - round(100 * first, 1), 1)


def names_of(numbers: Sequence[int], class_names: Mapping[int, str], most: int = 5) -> str:
    """Name the first few of some classes, in quotes; a class without a name is called by its number."""
    return quoted([class_names.get(number, number) for number in numbers], most)


def quoted(names: Sequence[str | int], most: int = 5) -> str:
    """List the first few of some names, in quotes, as they may contain commas; numbers are not quoted."""
    return one_line(", ".join(map(repr, names[:most])), 200) + (", …" if len(names) > most else "")


def have(number: int) -> str:
    """The form of "have" after a number of things."""
    return "has" if number == 1 else "have"


def suggestion(name: str, known: Sequence[str]) -> str:
    """Return a sentence, after a blank, with the known name most similar to an unknown one; empty without any."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]}?" if close else ""
