"""Split MNIST with each kind of Fisher, as van de Ven (2025), arXiv 2502.11756, has it.

    scripts/reproduce split_mnist [--only none exact ...] [--one_optimizer] [--seeds 5]

Five tasks of two digits, shuffled over the tasks by the seed; a head for each task; MLP 400-400,
Adam 1e-3, 2000 steps of 128 a task; online EWC, γ = 1. λ was chosen for each kind of Fisher on
data kept out of the training data and with another seed, of the grid that `--validation` has: after
2000 steps the model is so sure of its training examples that a label drawn from it is the true one,
whose squared gradients are next to nothing, and so are those of whole batches.

A Trainer begins each task with a new Adam. With `--one_optimizer` one goes through all tasks, with
its moments and its count of steps, as in the published code.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mlp import mlp
from options import TableOptions, parsed, training_arguments
from sequences import validated
from sources import Images, images

from hf_ewc import EWCTrainer, SequenceConfig, Task, compare_methods
from hf_ewc.report import Outcome, summary_table

ALL = {"fisher_samples": -1, "fisher_batch_size": 256}
KINDS = {
    "exact": {**ALL, "fisher_type": "exact"},
    "exact, n = 500": {**ALL, "fisher_type": "exact", "fisher_samples": 500},
    "sampled": {**ALL, "fisher_type": "sampled"},
    "empirical": {**ALL, "fisher_type": "empirical"},
    "batched": {**ALL, "fisher_type": "batched", "fisher_batch_size": 128},
}
LAMBDAS = (1e4, 1e5, 1e6, 1e7, 1e8)
GRID = {
    f"{name}, λ = {λ:g}": {**kind, "ewc_lambda": λ} for name, kind in KINDS.items() for λ in LAMBDAS
}
CHOSEN = {"exact": 1e4, "exact, n = 500": 1e4, "sampled": 1e8, "empirical": 1e8, "batched": 1e8}
METHODS = {"none": {}} | {
    name: {**kind, "ewc_lambda": CHOSEN[name]} for name, kind in KINDS.items()
}
PUBLISHED = "none 85.41 ± .88, exact 99.12 ± .16, n = 500 98.93 ± .15, others 99.11 to 99.12 (%)"


@dataclass
class SplitMNISTOptions(TableOptions):
    """Those of every table, and whether the optimizer goes on from task to task."""

    one_optimizer: bool = field(
        default=False, metadata={"help": "One Adam for all tasks, as in the published code."}
    )


class GoesOn(EWCTrainer):
    """Takes up the optimizer that the model was last trained with."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        if self.optimizer is None:
            self.optimizer = vars(self.model).get("last_optimizer")
        self.model.last_optimizer = super().create_optimizer(*args, **kwargs)
        return self.model.last_optimizer


def shuffled_tasks(train: Images, test: Images, seed: int) -> list[Task]:
    """Two digits each, in an order of the seed's."""
    digits = torch.randperm(10, generator=torch.Generator().manual_seed(seed)).tolist()
    pairs = [tuple(digits[i : i + 2]) for i in range(0, 10, 2)]
    return [
        Task(f"task {number}", train.of(pair), test.of(pair), classes=pair)
        for number, pair in enumerate(pairs, 1)
    ]


def main() -> None:
    options: SplitMNISTOptions = parsed("split_mnist", kind=SplitMNISTOptions, seeds=5)
    folder = Path(str(options.output_dir)) / ("one-optimizer" if options.one_optimizer else "")
    train, test = images("mnist", options.folder)
    methods = GRID if options.validation else METHODS
    chosen = {name: methods[name] for name in options.among(methods)}
    runs: dict[str, dict[int, Outcome]] = {name: {} for name in chosen}
    for number, seed in enumerate(options.repetitions, 1):
        tasks = shuffled_tasks(train, test, seed)
        own = {"learning_rate": 1e-3, "max_steps": 2000, "per_device_train_batch_size": 128}
        found = compare_methods(
            partial(mlp, 784, 400, 400),
            [validated(task) for task in tasks] if options.validation else tasks,
            training_arguments(folder / f"order-{seed}", options, **own),
            chosen,
            seeds=[seed],
            title=f"Split MNIST, order {seed}",
            sequence_config=SequenceConfig(keep_models="last"),
            trainer_class=GoesOn if options.one_optimizer else EWCTrainer,
        )
        for name, repeats in found.runs.items():
            runs[name].update(repeats)
        print(f"After {number} seeds:\n\n{summary_table(runs)}\n", flush=True)
    print(f"Published ACC: {PUBLISHED}")


if __name__ == "__main__":
    main()
