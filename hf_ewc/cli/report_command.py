"""`hf-ewc report`: put the results of one or several runs into tables and pictures."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hf_ewc.report import difference_table, score_table, summary_table, write_report
from hf_ewc.report.outcome import Outcome, Runs, as_runs, matrices
from hf_ewc.report.results import read_outcomes

EXAMPLES = """
FOLDER holds a results.json, or folders that do: a seed each, a method each.

examples:
  hf-ewc report runs/digits
  hf-ewc report runs/plain runs/ewc runs/replay -o runs/report --title "Three ways"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", metavar="FOLDER", nargs="+", help="results of run_tasks")
    parser.add_argument(
        "-o", "--output", metavar="DIR", default="report", help="for the files (default: report)"
    )
    parser.add_argument("--title", default="Continual learning", help="of the report")


def run(given: argparse.Namespace) -> None:
    """Print the tables, and write report.md, results.json and the pictures."""
    found = [file for folder in given.folders for file in results_in(Path(folder))]
    files = [*{file.resolve(): file for file in found}.values()]
    output = Path(given.output)
    if output.is_file():
        raise ValueError(f"-o {output} is a file; give a folder.")
    if (output / "results.json").resolve() in {file.resolve() for file in files}:
        raise ValueError(f"-o {output} holds results that are read; give another folder.")
    if (output / "results.json").is_file():
        _, content = read_outcomes(output / "results.json")
        if content.keys() & {"settings", "methods"}:
            raise ValueError(
                f"-o {output} holds the results of a run, which could not go on without them; "
                "give another folder."
            )
    runs = as_runs(merged((file.absolute().parent.name, runs_in(file)) for file in files))
    write_report(output, runs, title=given.title)
    print(summary_table(runs))
    if table := difference_table(runs):
        print(f"\n{table}")
    for method, repeats in runs.items():
        print(f"\n{method}\n\n{score_table(matrices(repeats))}")
    print(f"\nWritten to {output}: {', '.join(sorted(path.name for path in output.iterdir()))}")


def results_in(folder: Path) -> list[Path]:
    """The folder's results.json, else those of the folders in it."""
    if not folder.exists():
        raise ValueError(f"{folder} does not exist.")
    if folder.is_file():
        return [folder]
    own = folder / "results.json"
    found = [own] if own.exists() else sorted(folder.rglob("results.json"))
    if not found:
        raise ValueError(f"{folder} holds no results.json; give the output_dir of run_tasks.")
    return found


def runs_in(file: Path) -> Runs:
    """The runs of one file; where only its settings tell the seed, by that."""
    runs, content = read_outcomes(file)
    settings = content.get("settings")
    arguments = settings.get("args") if isinstance(settings, dict) else None
    seed = arguments.get("seed") if isinstance(arguments, dict) else None
    if isinstance(seed, int):
        return {
            method: {seed: repeats[0]} if [*repeats] == [0] else repeats
            for method, repeats in runs.items()
        }
    return runs


def merged(found: Iterable[tuple[str, Runs]]) -> dict[str, dict[int, Outcome]]:
    """All runs by method and seed; a method run twice with a seed gets its folder's name, too."""
    together: dict[str, dict[int, Any]] = {}
    for name, runs in found:
        for method, repeats in runs.items():
            known = together.get(method, {})
            key = method if not known.keys() & repeats.keys() else f"{method} ({name})"
            while together.get(key, {}).keys() & repeats.keys():
                key += "'"
            together.setdefault(key, {}).update(repeats)
    return together
