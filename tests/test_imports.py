"""No modules import each other in a circle, and a package imports only from those below it."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from clips import ROOT

PACKAGES = ("omnimem", "train", "data_prep")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for package in PACKAGES for path in (ROOT / package).rglob("*.py")}


def imported(name: str) -> set[str]:
    """Modules that a module imports anywhere in its file: also inside functions and for type checking."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, node.module] if node.module else base)
            # `from package import module` depends on the module, not on the package's own names.
            found |= {f"{source}.{a.name}" if f"{source}.{a.name}" in FILES else source for a in node.names}
    return {module for module in found if module in FILES and module != name}


GRAPH = {name: imported(name) for name in FILES}


def test_no_modules_import_each_other_in_a_circle():
    try:
        list(TopologicalSorter(GRAPH).static_order())
    except CycleError as error:
        raise AssertionError(" → ".join(error.args[1])) from None


def test_a_circle_is_found():
    assert "omnimem.memory.undo" in GRAPH["omnimem.memory.cache"]
    broken = {**GRAPH, "omnimem.memory.undo": GRAPH["omnimem.memory.undo"] | {"omnimem.memory.cache"}}
    try:
        list(TopologicalSorter(broken).static_order())
    except CycleError:
        return
    raise AssertionError("a circle was not found")


def test_the_library_needs_neither_training_nor_data_preparation():
    """Only the command line calls them."""
    for name, found in GRAPH.items():
        if name.startswith("omnimem") and not name.startswith(("omnimem.cli", "omnimem.__main__")):
            assert not any(module.split(".")[0] in ("train", "data_prep") for module in found), (name, found)


def test_data_preparation_does_not_need_training():
    for name, found in GRAPH.items():
        if name.startswith("data_prep"):
            assert not any(module.startswith("train") for module in found), (name, found)
