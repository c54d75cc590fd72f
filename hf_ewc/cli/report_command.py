"""`hf-ewc report`: put the results of one or several runs into tables and pictures."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_ewc.report import difference_table, score_table, summary_table, write_report
from hf_ewc.report.outcome import Outcome, as_runs, matrices
from hf_ewc.report.results import read_outcomes
from hf_ewc.tasks.run_folder import refuse_somebodys_report

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
    named = [file for folder in given.folders for file in results_in(Path(folder))]
    files = [*{file.resolve(): file for file in named}.values()]
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
    refuse_somebodys_report(output)
    runs = as_runs(merged(found for file in files for found in runs_in(file)))
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


@dataclass(frozen=True)
class Found:
    """A method's runs by seed in the results of one folder; what they were set to, as JSON."""

    folder: str
    method: str
    repeats: Mapping[int, Outcome]
    settings: str


def runs_in(file: Path) -> Iterator[Found]:
    """The runs of one file; where only its settings tell the seed, by that."""
    runs, content = read_outcomes(file)
    settings = content.get("settings")
    arguments = settings.get("args") if isinstance(settings, dict) else None
    seed = arguments.get("seed") if isinstance(arguments, dict) else None
    own = content.get("methods")
    for method, repeats in runs.items():
        if isinstance(seed, int) and [*repeats] == [0]:
            repeats = {seed: repeats[0]}
        given = own.get(method) if isinstance(own, dict) else settings
        yield Found(file.absolute().parent.name, method, repeats, _without_seed(given))


def _without_seed(settings: Any) -> str:
    """What may not differ between repetitions of one method."""
    if isinstance(settings, dict) and isinstance(settings.get("args"), dict):
        arguments = {k: v for k, v in settings["args"].items() if k not in ("seed", "data_seed")}
        settings = {**settings, "args": arguments}
    return json.dumps(settings, sort_keys=True)


def merged(found: Iterable[Found]) -> dict[str, dict[int, Outcome]]:
    """All runs by method and seed.

    A method that was run with other settings, or twice with a seed, gets its folder's name, too.
    """
    together: dict[str, dict[int, Any]] = {}
    settings: dict[str, str] = {}
    for each in found:
        key, named = each.method, False
        while key in together and (
            settings[key] != each.settings or together[key].keys() & each.repeats.keys()
        ):
            key, named = f"{key}'" if named else f"{each.method} ({each.folder})", True
        settings[key] = each.settings
        together.setdefault(key, {}).update(each.repeats)
    return together
