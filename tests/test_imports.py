"""Modules depend one way, file by file; metrics and report on nothing that knows of torch."""

import ast
import subprocess
import sys
from pathlib import Path

import hf_ewc

PACKAGE = Path(hf_ewc.__file__).parent

# Each wing may use those before it. Fisher and state do not know each other.
WINGS = ("parameters", "importance", "fisher", "state", "training", "tasks", "cli")
STRANGERS = [("fisher", "state"), ("state", "fisher")]
# The ground floor: what every wing may use, and what it may use itself.
GROUND_FLOOR = {
    "config": {"parameters"},
    "files": set(),
    "metrics": set(),
    "precision": set(),
    "processes": set(),
    "report": {"metrics", "files"},
}


def module_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in PACKAGE.rglob("*.py")}


def imports(path):
    """The modules of the package that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: the package imports by absolute names"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if is_module(name) else node.module for name in inside]
        else:
            continue
        found |= {name.removeprefix("hf_ewc.") for name in names if name.startswith("hf_ewc.")}
    return found


def is_module(name):
    return name.removeprefix("hf_ewc.") in MODULES


def graph():
    return {name: imports(path) for name, path in MODULES.items() if name}


def reachable(edges, start):
    seen, todo = set(), [start]
    while todo:
        for name in edges[todo.pop()] - seen:
            seen.add(name)
            todo.append(name)
    return seen


def wing(name):
    return name.split(".")[0]


def test_every_import_is_of_a_module_that_is_there():
    for name, imported in graph().items():
        assert imported <= MODULES.keys(), name


def test_there_is_no_circle_of_files():
    edges = graph()
    assert [name for name in edges if name in reachable(edges, name)] == []


def test_every_module_is_in_a_wing_or_on_the_ground_floor():
    assert {wing(name) for name in graph()} <= {*WINGS, *GROUND_FLOOR}


def test_wings_use_those_before_them():
    for name, imported in graph().items():
        own = wing(name)
        if own not in WINGS:
            continue
        for other in {wing(one) for one in imported} - {own, *GROUND_FLOOR}:
            assert WINGS.index(other) < WINGS.index(own), f"{name} imports from {other}"
            assert (own, other) not in STRANGERS, f"{name} imports from {other}"


def test_the_ground_floor_stands_on_itself():
    edges = graph()
    for name, allowed in GROUND_FLOOR.items():
        files = [one for one in edges if wing(one) == name]
        used = set().union(*(reachable(edges, one) for one in files))
        assert {wing(one) for one in used} <= {name, *allowed}, name


def test_metrics_and_report_need_no_torch():
    check = "import sys, hf_ewc.metrics, hf_ewc.report; print('torch' in sys.modules)"
    assert printed_by(check) == "False"


def test_a_state_loads_no_estimator():
    check = "import sys, hf_ewc.state; print(any('hf_ewc.fisher' in name for name in sys.modules))"
    assert printed_by(check) == "False"


def printed_by(code):
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    return run.stdout.strip()


def test_every_public_name_is_there():
    assert {name: getattr(hf_ewc, name).__name__ for name in hf_ewc.__all__} == {
        name: name for name in hf_ewc.__all__
    }
    assert set(hf_ewc.__all__) <= set(dir(hf_ewc))
    assert not hasattr(hf_ewc, "something_else")
