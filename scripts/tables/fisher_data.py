"""The Fisher on training data beside that on unseen data, as the training data are as many.

    scripts/reproduce fisher_data [--only digits clinc150] [--methods plain state 1e3] [--seeds N]

A fifth of each task's training data, drawn by a fixed seed, is kept out of training in both; the
Fisher is estimated on as many examples of what was trained on, or on what was kept out. Each with
each λ of the sequence's grid, or with those of `--methods`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from choosing_lambda import AUTO, accuracies, in_order, methods_of, row
from options import TableOptions, parsed, those_of
from sequences import SEQUENCES, parted
from torch.utils.data import Subset

from hf_ewc import Task
from hf_ewc.report.tables import table


@dataclass
class FisherDataOptions(TableOptions):
    """Those of every table, and which λ."""

    methods: list[str] | None = field(
        default=None, metadata={"help": "Only these: plain, falling, state, or a λ as 1e3."}
    )


def with_fisher_data(task: Task, unseen: bool) -> Task:
    """The task on four fifths of its data, with the Fisher on a fifth: of these, or of the rest."""
    rest, held_out = parted(task.train_dataset)
    seen = Subset(task.train_dataset, rest.indices[: len(held_out)])
    return replace(task, train_dataset=rest, fisher_dataset=held_out if unseen else seen)


def learn(name: str, unseen: bool, options: FisherDataOptions) -> dict[str, list[float]]:
    """ACC by λ, one for each seed."""
    sequence = SEQUENCES[name](options)
    tasks = [with_fisher_data(task, unseen) for task in sequence.tasks]
    folder = Path(str(options.output_dir)) / name / ("unseen" if unseen else "seen")
    methods = {k: v for k, v in methods_of(sequence).items() if k != AUTO}
    methods = {k: methods[k] for k in those_of(methods, options.methods, "methods")}
    if unseen:
        methods.pop("plain", None)  # the same with either Fisher
    found = replace(sequence, tasks=tasks).compared(methods, folder, options)
    return accuracies(found.runs)


def shown(results: Mapping[str, Mapping[str, list[float]]]) -> str:
    methods = in_order(results)
    rows = [row(name, found, methods) for name, found in results.items()]
    return table(["the Fisher's data", *methods], rows)


def main() -> None:
    options = parsed("fisher_data", kind=FisherDataOptions)
    results: dict[str, dict[str, list[float]]] = {}
    for name in options.among(SEQUENCES):
        results[f"{name}, trained on"] = learn(name, False, options)
        results[f"{name}, kept out"] = learn(name, True, options)
        print(shown(results), "\n", flush=True)


if __name__ == "__main__":
    main()
