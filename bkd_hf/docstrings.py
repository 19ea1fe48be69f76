"""A text data set that is always available: the docstrings of Python's standard library, by topic of their modules.

They are read from the source files of the running Python (licence: PSF-2.0), so they vary slightly between versions;
the fingerprint in the results shows this.
"""

from __future__ import annotations

import ast
import functools
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from .errors import InputError

#: Modules and packages of each class; the first classes have the most texts.
GROUPS = {
    "mail": "email smtplib poplib imaplib mailbox mimetypes quopri",
    "web": "http urllib xmlrpc wsgiref socketserver html ssl",
    "files": "shutil pathlib tarfile zipfile tempfile glob fnmatch filecmp fileinput gzip bz2 lzma",
    "numbers": "statistics _pydecimal fractions random datetime _pydatetime numbers colorsys calendar",
    "asyncio": "asyncio",
    "imports": "importlib zipimport runpy pkgutil modulefinder zipapp site",
    "processes": "multiprocessing concurrent threading subprocess queue sched",
    "tests": "unittest doctest",
    "xml": "xml",
    "logging": "logging",
}
_LEAST_WORDS = 8
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@functools.cache
def docstrings() -> tuple[list[str], list[int]]:
    """Return distinct texts of eight words or more, each of exactly one class, and their class numbers.

    Raises:
        InputError: If this Python comes without the source files of its library.
    """
    found: dict[str, set[int]] = {}
    for number, modules in enumerate(GROUPS.values()):
        for text in (text for module in modules.split() for text in _docstrings_of(module)):
            found.setdefault(text, set()).add(number)
    alone = {text: numbers.pop() for text, numbers in found.items() if len(numbers) == 1}
    if len(set(alone.values())) < len(GROUPS):
        raise InputError(
            "--dataset_name docstrings: the source files of Python's standard library are not there. Use another "
            "Python, or texts of your own."
        )
    return list(alone), list(alone.values())


def _docstrings_of(module: str) -> Iterator[str]:
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted([*(library / module).rglob("*.py"), *library.glob(f"{module}.py")]):
        if "test" in path.relative_to(library).parts:
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            words = ((isinstance(node, _DOCUMENTED) and ast.get_docstring(node)) or "").split()
            if len(words) >= _LEAST_WORDS:
                yield " ".join(words)
