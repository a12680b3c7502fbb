"""Imports go down only. The order of the layers is ARCHITECTURE's; anything else fails here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "porcelet"
LAYERS = (
    {"__main__", "__init__"},
    {"cli"},
    {"cluster"},
    {"server", "train"},
    {"engine", "plan", "doctor"},
    {"memory"},
    {"weights", "hub", "chat"},
    {"models", "tokenizer", "flash_mla"},
    {"parallel"},
    {"kernels"},
    {"config", "metrics", "page"},
    {"types", "extras"},
    {"errors"},
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
FILES = sorted(PACKAGE.rglob("*.py"))


def component(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(file: Path) -> Iterator[str]:
    """Components of porcelet that a file imports, wherever in the file; `from porcelet import x` counts as x."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("porcelet."))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            parts = (node.module or "").split(".")
            if parts[0] == "porcelet":
                names = [parts[1]] if len(parts) > 1 else [a.name for a in node.names if a.name in RANK]
                yield from names


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_go_down_only(file: Path) -> None:
    """A file imports its own component and lower layers, never its own level's others nor upwards."""
    own = component(file)
    for name in imported(file):
        assert name == own or RANK[name] > RANK[own], f"{own} imports {name}"


@pytest.mark.parametrize("name", ["types", "errors", "config", "tokenizer", "chat", "hub", "server", "plan", "memory"])
def test_stays_free_of_torch(name: str) -> None:
    """The parts that the HTTP process is made of name no torch."""
    for file in FILES:
        if component(file) == name:
            for node in ast.walk(ast.parse(file.read_text())):
                modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not any(m.split(".")[0] == "torch" for m in modules), file
