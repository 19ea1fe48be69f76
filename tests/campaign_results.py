"""Randomly changed results files, passed through everything that reads them: for the campaign and the test suite.

Each file must give one clear error line, or the output of its unchanged numbers.
"""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bkd_hf.card import build
from bkd_hf.compare import save_comparison
from bkd_hf.comparison import load_comparison
from bkd_hf.errors import InputError
from bkd_hf.hub import folders_of_run
from bkd_hf.plots import save_plots
from bkd_hf.verdict import judge

CARDS = Path(__file__).parents[1] / "model_cards"
FILES = ("digits", "aligned_teacher/aligned", "cifar100_lt_200_epochs/ce/seed0", "cifar100_lt_40_epochs_two_threads")
VALUES = [
    None, True, False, 0, -1, 1, 2, 10**30, -0.5, 1.5, 1e308, math.nan, math.inf, -math.inf, "", "0.5", "x" * 200_000,
    "[x](http://evil)", "\x1b[31m=cmd|' /C calc'!A0", "$\\frac{1}{0}$", "\ud800", "a\nb\n---\n", [], {}, [[[]]],
    [1, "a", None], {"a": {"b": []}}, [0.5] * 3,
]  # fmt: skip


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """All keys and indices in a JSON value, of long lists the first and the last."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        if not isinstance(content, list) or key in (0, 1, len(content) - 1):
            yield (*path, key)
            yield from places(value, (*path, key))


def _at(content: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        content = content[key]
    return content


def _change(results: dict[str, Any], rng: random.Random) -> str:
    """Change something at one place; return what."""
    found = list(places(results))
    # A level first, so that the many numbers in lists do not get all the changes.
    depth = rng.choice(sorted({len(path) for path in found}))
    path = rng.choice([path for path in found if len(path) == depth])
    parent, key = _at(results, path[:-1]), path[-1]
    value = parent[key]
    kinds = ["delete", "value", "value", "value"]
    kinds += ["rename", "nest"] if isinstance(parent, dict) else []
    kinds += ["longer", "shorter", "shuffle"] if isinstance(value, list) and value else []
    kinds += ["scale", "text"] if isinstance(value, (int, float)) and not isinstance(value, bool) else []
    kind = rng.choice(kinds)
    if kind == "delete":
        del parent[key]
    elif kind == "rename":
        parent[str(key).upper() + "_"] = parent.pop(key)
    elif kind == "nest":
        parent[key] = nested(value, rng.choice([1, 50, 900]))
    elif kind == "longer":
        value.append(copy.deepcopy(value[0]))
    elif kind == "shorter":
        value.pop()
    elif kind == "shuffle":
        rng.shuffle(value)
    elif kind == "scale":
        parent[key] = value * rng.choice([-1, 0.5, 2, 1e6, 1e300])
    elif kind == "text":
        parent[key] = str(value)
    else:
        parent[key] = copy.deepcopy(rng.choice(VALUES))
    return f"{kind} {'.'.join(map(str, path))}"


def nested(value: Any, depth: int) -> Any:
    """A value in so many lists."""
    for _ in range(depth):
        value = [value]
    return value


def _of_bytes(text: str, rng: random.Random) -> tuple[str, bytes]:
    content, place = text.encode(), rng.randrange(len(text))
    line = text.find("\n", place)
    changes: dict[str, Callable[[], bytes]] = {
        "truncated": lambda: content[:place],
        "empty": lambda: b"",
        "binary": lambda: rng.randbytes(1000),
        "bit": lambda: content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :],
        "utf-16": lambda: text.encode("utf-16"),
        "utf-16-le": lambda: text.encode("utf-16-le"),
        "utf-32": lambda: text.encode("utf-32"),
        "latin-1": lambda: text.replace('"name": "', '"name": "é').encode("latin-1", "replace"),
        "bom": lambda: b"\xef\xbb\xbf" + content,
        "duplicated": lambda: content.replace(b'"seed":', b'"seed": 7,\n "seed":'),
        "line twice": lambda: (text[:line] + text[text.rfind("\n", 0, line) : line] + text[line:]).encode(),
        "deep": lambda: b"[" * rng.choice([1_000, 100_000]),
        "long number": lambda: content.replace(b'"seed":', b'"seed": ' + b"9" * 10_000 + b', "x":'),
        "trailing": lambda: content + b"{}",
    }  # fmt: skip
    kind = rng.choice(list(changes))
    return kind, changes[kind]()


def mutations(seed: int, n: int) -> Iterator[tuple[str, bytes]]:
    """Yield n changed versions of committed `results.json` files, each with the name of what was changed."""
    rng = random.Random(seed)
    texts = [(CARDS / name / "results.json").read_text(encoding="utf-8") for name in FILES]
    for number in range(n):
        text = rng.choice(texts)
        if rng.random() < 0.2:
            name, content = _of_bytes(text, rng)
        else:
            results = json.loads(text)
            name = ", ".join(_change(results, rng) for _ in range(rng.choice([1, 1, 1, 2])))
            content = json.dumps(results).encode()
        yield f"{seed}/{number}: {name}", content


def read_by_all(content: bytes, folder: Path) -> str:
    """Read a file as `compare.py --from`, the card and `publish.py` do; return the line it is refused by, or ""."""
    (folder / "results.json").write_bytes(content)
    lines: list[str] = []
    readers: tuple[Callable[[], Any], ...] = (
        lambda: save_comparison(load_comparison([folder]), folder / "compared"),
        lambda: judge_and_draw(folder),
        lambda: folders_of_run(folder, "user/name", with_teacher=True),
    )
    for read in readers:
        try:
            read()
        except InputError as error:
            lines.append(str(error))
    allowed = ("does not tell its method", "no teacher was trained")
    for line in lines:
        assert len(line) < 1000, line
        assert "\n" not in line, line
        assert line.isprintable(), line
    refused = [line for line in lines if not any(part in line for part in allowed)]
    assert len(refused) in (0, 3), f"read by some, refused by others: {refused}"
    return refused[0] if refused else ""


def judge_and_draw(folder: Path) -> None:
    """What is made of a run's results."""
    card = build(folder, "user/name")
    (folder / "README.md").write_text(str(card), encoding="utf-8")
    results = json.loads((folder / "results.json").read_text(encoding="utf-8-sig"))
    judge(results)
    save_plots(results, folder / "figures")
