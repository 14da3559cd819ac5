"""The house: a file imports only from its own folder and from folders before it, and no imports go in a circle."""

import ast
from functools import cache

import pytest

from configs.config import ROOT

# from the ground up; inference is imported by nobody
ROOMS = (
    "configs", "runtime", "models.fast", "models", "data", "train", "rlhf", "inference", "report", "proof", "benchmarks"
)  # fmt: skip


def room_of(module):
    """The folder of a module: models.fast.head is in models.fast; None for a module that is not the project's."""
    return next((room for room in sorted(ROOMS, key=len, reverse=True) if module.startswith(room + ".")), None)


def imported(source, modules):
    """The project's modules that a Python source imports anywhere in it, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & modules


@cache
def imports():
    """{module: the project's modules that it imports}."""
    files = {}
    for room in ROOMS:
        for path in sorted((ROOT / room.replace(".", "/")).rglob("*.py")):  # report/measures/ is in the room of report/
            files[".".join(path.relative_to(ROOT).with_suffix("").parts)] = path.read_text(encoding="utf-8")
    return {module: imported(source, files.keys()) for module, source in files.items()}


def upward(graph):
    """(module, what it imports from a room above its own) for each such import."""
    return [
        (module, other)
        for module, others in graph.items()
        for other in others
        if ROOMS.index(room_of(other)) > ROOMS.index(room_of(module))
    ]


def circle(graph):
    """Modules that import each other in a circle, as a list; None if there is no circle."""
    done, path = set(), []

    def visit(module):
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return None
        path.append(module)
        for other in sorted(graph[module]):
            found = visit(other)
            if found:
                return found
        done.add(path.pop())
        return None

    return next((found for module in sorted(graph) for found in [visit(module)] if found), None)


def test_all_rooms_are_read():
    rooms = {room_of(module) for module in imports()}
    assert rooms == set(ROOMS) and len(imports()) > 80
    assert "runtime.run" in imports()["rlhf.stage"] and "configs.config" in imports()["runtime.files"]


def test_no_file_imports_from_a_room_above_its_own():
    assert upward(imports()) == []


def test_no_imports_go_in_a_circle():
    assert circle(imports()) is None


def test_the_loader_of_configurations_imports_nothing_of_the_project():
    assert imports()["configs.config"] == set()
    assert [module for module in imports() if module.startswith("configs.")] == ["configs.config"]


def test_inference_and_scripts_of_other_stages_are_imported_by_nobody_below():
    assert not [(m, o) for m, others in imports().items() for o in others if o.startswith("inference.")]


@pytest.mark.parametrize(
    "module, source, seen",
    [
        ("models.loader", "from rlhf.policy import Policy", [("models.loader", "rlhf.policy")]),
        ("runtime.run", "def late():\n    import train.common", [("runtime.run", "train.common")]),
        ("models.fast.head", "from models import loader", [("models.fast.head", "models.loader")]),
        ("rlhf.policy", "from models.loader import load_model", []),
    ],
)
def test_an_import_from_above_is_seen(module, source, seen):
    graph = imports() | {module: imported(source, imports().keys())}
    assert upward(graph) == seen


def test_a_circle_is_seen():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}
    assert circle(graph) == ["a", "b", "c"] and circle({"a": {"b"}, "b": set()}) is None
