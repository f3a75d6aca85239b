"""Calls go down: which part of the package may import which."""

import ast
from pathlib import Path

import pytest

import sapt_fast

PACKAGE = Path(sapt_fast.__file__).parent

# From the lowest to the highest; what stands in one row knows the rows above it, and itself.
LAYERS = [
    ("version", "files", "checks", "devices"),
    ("dispatch", "ops", "cpu_kernels", "triton_kernels", "cuda_kernels"),
    ("pools",),
    ("routing",),
    ("sites",),
    ("storage",),
    ("methods",),
    ("patching",),
    ("loading",),
    ("released",),
    ("generation",),
    ("demo",),
    ("continual", "editing"),
    ("commands",),
    ("cli",),
]
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}


def modules():
    """The source file of each module, by its dotted name within the package."""
    names = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


MODULES = modules()


def imported(name):
    """The package's modules that a module imports anywhere, in functions and for types too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sapt_fast"):
            assert node.level == 0, f"{name}: relative import"
            base = node.module.removeprefix("sapt_fast").removeprefix(".")
            for alias in node.names:
                full = f"{base}.{alias.name}".removeprefix(".")
                found.add(full if full in MODULES else base)
        elif isinstance(node, ast.Import):
            found |= {a.name[10:] for a in node.names if a.name.startswith("sapt_fast.")}
    return found - {name, ""}


GRAPH = {name: imported(name) & MODULES.keys() for name in MODULES if name}


def test_every_room_has_its_place():
    assert {name.partition(".")[0] for name in GRAPH} == RANK.keys()


@pytest.mark.parametrize("name", sorted(GRAPH))
def test_imports_go_down(name):
    own = RANK[name.partition(".")[0]]
    up = {other for other in GRAPH[name] if RANK[other.partition(".")[0]] > own}
    assert not up, f"{name} imports {sorted(up)}, which stand above it"


def test_backends_know_nothing_of_each_other():
    for name, others in GRAPH.items():
        room = name.partition(".")[0]
        if room.endswith("_kernels"):
            rooms = {other.partition(".")[0] for other in others}
            assert not {r for r in rooms if r.endswith("_kernels")} - {room}, name


def test_there_is_no_circle():
    done, path = set(), []

    def visit(name):
        if name in path:
            raise AssertionError(" -> ".join([*path[path.index(name) :], name]))
        if name not in done:
            path.append(name)
            for other in sorted(GRAPH[name]):
                visit(other)
            path.pop()
            done.add(name)

    for name in sorted(GRAPH):
        visit(name)
