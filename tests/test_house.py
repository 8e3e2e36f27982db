"""The house: no module imports what imports it, and no name of a module means two things."""

import ast
from pathlib import Path

import pytest

import gptkernels

PACKAGE = Path(gptkernels.__file__).parent


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports_of(name: str) -> set[str]:
    """Modules of ours that it imports anywhere in its text, function bodies included"""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    tree = ast.parse(MODULES[name].read_text())
    # What only a type checker reads imports nothing.
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
            full = ".".join(part for part in (base if node.level else "", node.module or "") if part)
            # Of `from . import x` x is what is imported, where it is a module.
            found |= {f"{full}.{alias.name}" if f"{full}.{alias.name}" in MODULES else full for alias in node.names}
    # A package's __init__ only collects: what matters is which of its modules is meant.
    return {each for each in found if each in MODULES and MODULES[each].name != "__init__.py"}


def circles() -> list[list[str]]:
    graph = {name: imports_of(name) for name in MODULES if MODULES[name].name != "__init__.py"}
    done, path, found = set(), [], []

    def visit(name: str) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
            return
        if name in done:
            return
        path.append(name)
        for other in sorted(graph[name]):
            visit(other)
        path.pop()
        done.add(name)

    for name in sorted(graph):
        visit(name)
    return found


def test_nothing_imports_what_imports_it():
    assert [" -> ".join(circle) for circle in circles()] == []


def test_the_search_sees_a_circle(monkeypatch, tmp_path):
    (tmp_path / "a.py").write_text("def f():\n    from . import b\n")
    (tmp_path / "b.py").write_text("from .a import f\n")
    for name in "ab":
        monkeypatch.setitem(MODULES, f"gptkernels.{name}", tmp_path / f"{name}.py")
    assert ["gptkernels.a", "gptkernels.b", "gptkernels.a"] in circles()


@pytest.mark.parametrize("name", sorted(gptkernels.__all__))
def test_every_public_name_is_there(name):
    assert name in dir(gptkernels)
    assert getattr(gptkernels, name) is getattr(gptkernels, name)


def test_files_stay_readable():
    lengths = {path: len(path.read_text().splitlines()) for path in MODULES.values()}
    assert {str(path): length for path, length in lengths.items() if length > 450} == {}
