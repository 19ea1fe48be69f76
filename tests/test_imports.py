"""There are no circular imports, including those in functions and under TYPE_CHECKING."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "bkd_hf"


def imported(path: Path) -> set[str]:
    """Names of this package's modules that a module imports by relative imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parents[node.level - 1]
            names = [node.module.replace(".", "/")] if node.module else [alias.name for alias in node.names]
            found |= {(folder / name).relative_to(PACKAGE).as_posix() for name in names}
    return found


def test_no_import_circles():
    modules = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in PACKAGE.rglob("*.py")}
    graph = {name: imported(path) & set(modules) for name, path in modules.items()}
    while graph:  # remove modules that import no remaining module
        free = {name for name, needed in graph.items() if not needed & set(graph)}
        assert free, f"in circles, or above them: {sorted(graph)}"
        graph = {name: needed for name, needed in graph.items() if name not in free}
