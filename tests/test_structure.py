"""The layout's rules: imports go one way, and the core needs torch and safetensors alone."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "resect"
# Each room may import itself and what stands before it; rooms on one level never import each other.
LEVELS = [
    ["errors"],
    ["files"],
    ["blocks"],
    ["train", "analyse", "shrink"],
    ["report"],
    ["integrations"],
    ["lab"],
    ["cli"],
]
RANK = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
CORE = {"errors", "files", "blocks", "train", "analyse", "shrink"}


def imports(path: Path) -> list[str]:
    """Return the absolute names of the modules a file imports."""
    package = ["resect", *path.relative_to(ROOT).parent.parts]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            found.append(".".join([*base, *([node.module] if node.module else [])]))
    return found


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "resect" and len(parts) > 1 else None


FILES = sorted(path for path in ROOT.rglob("*.py") if path.name not in ("__init__.py", "__main__.py"))


@pytest.mark.core
@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for module in imports(path):
        other = room_of(module)
        if other is None or other == own:
            continue
        assert RANK[other] < RANK[own], f"{own} must not import {module}"


@pytest.mark.core
@pytest.mark.parametrize(
    "path",
    [path for path in FILES if path.relative_to(ROOT).parts[0].removesuffix(".py") in CORE],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_the_core_needs_torch_and_safetensors_alone(path):
    outside = {module.split(".")[0] for module in imports(path)} - set(sys.stdlib_module_names)
    assert outside <= {"torch", "safetensors", "resect", "__future__"}


def test_no_file_is_longer_than_300_lines():
    long = {str(path): n for path in ROOT.rglob("*.py") if (n := len(path.read_text().splitlines())) > 300}
    assert not long
