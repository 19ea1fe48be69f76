"""Text from outside (names of classes, data, models, methods and files; options) as text, wherever it is shown.

Whatever it holds, no reader takes it for markup, and it stays in its place: one function for each kind of reader.
Metadata in YAML needs [`one_line`] alone, as its writer quotes.
"""

from __future__ import annotations

import difflib
import functools
import html
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

# Control characters (with those that begin a terminal's commands), marks that turn the direction of the text around
# them, and halves of characters, which cannot be written as UTF-8. Not tabs and line feeds.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_REPLACEMENT = "\ufffd"


def normal(name: str) -> str:
    """Return the one spelling of a name: é may be one character, or an e and an accent."""
    return unicodedata.normalize("NFC", name)


def printable(text: Any) -> str:
    """Return text that a terminal or a code block shows as it is, in as many lines."""
    return _UNPRINTABLE.sub(_REPLACEMENT, str(text))


def one_line(text: Any, length: int | None = None) -> str:
    """Return printable text in one line, cut to a length."""
    line = printable(" ".join(str(text).split()))
    return line if length is None or len(line) <= length else f"{line[: length - 1]}…"


def markdown(text: Any) -> str:
    """Return text for Markdown, in a sentence or a table's cell."""
    escaped = re.sub(r"[\\`*_\[\]|~#$@]|:(?=//)|(?<=www)\.", r"\\\g<0>", html.escape(one_line(text), quote=False))
    return escaped or "(no name)"


def code(text: Any) -> str:
    """Return text as code for Markdown, in a sentence or a table's cell."""
    line = one_line(text)
    return f"`{line}`" if line and not {"`", "|"} & set(line) else f"<code>{markdown(line)}</code>"


def code_block(text: Any, language: str = "") -> str:
    """Return text as a block of code for Markdown."""
    block = printable(text).rstrip("\n")
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", block))])
    return f"{fence}{language}\n{block}\n{fence}"


def spreadsheet(value: Any) -> Any:
    """Return a value for a table of comma-separated values: text that is no formula."""
    if not isinstance(value, str):
        return value
    line = one_line(value)
    return f"'{line}" if line.startswith(("=", "+", "-", "@")) else line


def figure(text: Any, length: int = 24) -> str:
    """Return text for a figure: short, no formula, of characters that its fonts have."""
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
    """Percentage points from one fraction to another: the difference of the numbers that are shown, with one digit."""
    return round(round(100 * second, 1) - round(100 * first, 1), 1)


def names_of(numbers: Sequence[int], class_names: Mapping[int, str], most: int = 5) -> str:
    """Name the first few of some classes, in quotes; one without a name is called by its number."""
    return quoted([class_names.get(number, number) for number in numbers], most)


def quoted(names: Sequence[str | int], most: int = 5) -> str:
    """List the first few of some names, in quotes, for they may hold commas; numbers are bare."""
    return one_line(", ".join(map(repr, names[:most])), 200) + (", …" if len(names) > most else "")


def have(number: int) -> str:
    """The verb after so many things."""
    return "has" if number == 1 else "have"


def suggestion(name: str, known: Sequence[str]) -> str:
    """Return a sentence, after a blank, that names the known name most like one that is not known; else nothing."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]}?" if close else ""
