"""Modules depend one way: Fisher, state, penalty, trainer, tasks; metrics and report on none."""

import ast
import subprocess
import sys
from pathlib import Path

import hf_ewc

PACKAGE = Path(hf_ewc.__file__).parent

# What a module must not reach, directly or through others.
FORBIDDEN = {
    "fisher": {"state", "penalty", "config", "trainer", "tasks", "metrics", "report"},
    "state": {"penalty", "config", "trainer", "tasks", "metrics", "report"},
    "penalty": {"config", "trainer", "tasks", "metrics", "report"},
    "config": {"fisher", "state", "penalty", "trainer", "tasks", "metrics", "report"},
    "trainer": {"tasks", "metrics", "report"},
}
# All that these may reach: they know nothing of models.
ALLOWED = {"metrics": set(), "report": {"metrics", "files"}, "files": set()}


def dependencies():
    """For each module of the package (a subpackage counts as one), the modules that it imports."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts == ("__init__",):
            continue
        edges = found.setdefault(parts[0], set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            edges |= {name.split(".")[0] for name in imported(node)} - {parts[0]}
    return found


def imported(node):
    """The names below `hf_ewc` that an import statement reads from."""
    if isinstance(node, ast.Import):
        return [a.name.removeprefix("hf_ewc.") for a in node.names if a.name.startswith("hf_ewc.")]
    if not isinstance(node, ast.ImportFrom):
        return []
    assert node.level == 0, "the package imports by absolute names"
    if node.module == "hf_ewc":
        return [alias.name for alias in node.names]
    if (node.module or "").startswith("hf_ewc."):
        return [node.module.removeprefix("hf_ewc.")]
    return []


def reachable(graph, start):
    seen, todo = set(), [start]
    while todo:
        for name in graph[todo.pop()] - seen:
            seen.add(name)
            todo.append(name)
    return seen


def test_there_is_no_circle():
    graph = dependencies()
    assert [name for name in graph if name in reachable(graph, name)] == []


def test_the_direction():
    graph = dependencies()
    for name, forbidden in FORBIDDEN.items():
        assert reachable(graph, name) & forbidden == set(), name
    for name, allowed in ALLOWED.items():
        assert reachable(graph, name) <= allowed, name


def test_metrics_and_report_need_no_torch():
    check = "import sys, hf_ewc.metrics, hf_ewc.report; print('torch' in sys.modules)"
    output = subprocess.run(
        [sys.executable, "-c", check],
        capture_output=True,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
    )
    assert output.stdout.strip() == "False"


def test_every_public_name_is_there():
    assert {name: getattr(hf_ewc, name).__name__ for name in hf_ewc.__all__} == {
        name: name for name in hf_ewc.__all__
    }
    assert set(hf_ewc.__all__) <= set(dir(hf_ewc))
    assert not hasattr(hf_ewc, "something_else")
