"""Split MNIST in the three scenarios, as Hsu et al. (2018), arXiv 1810.12488, table 2.

    scripts/reproduce scenarios [--only task domain class] [--seeds 5]

Five tasks of two digits; MLP of two hidden layers of 400, Adam 1e-3, 4 epochs of batches of 128.
Task: a head for each task. Domain: one head of two, is the digit the first or the second of its
pair. Class: one head of ten. λ = 1e4, as `choosing_lambda` has it best for the first of these; for
EWC kept apart by task and for online EWC alike.
"""

from functools import partial
from pathlib import Path

from mlp import mlp
from options import TableOptions, parsed
from sequences import IN_PAIRS, TaskSequence
from sources import Images, images

from hf_ewc import Task

TRAINING = {"learning_rate": 1e-3, "num_train_epochs": 4, "per_device_train_batch_size": 128}
METHODS = {
    "plain": {},
    "EWC": {"ewc_lambda": 1e4, "ewc_mode": "separate"},
    "online EWC": {"ewc_lambda": 1e4},
}
PUBLISHED = {  # of plain, EWC and online EWC, in %
    "task": "93.46, 97.70, 98.04",
    "domain": "55.16, 58.85, 57.33",
    "class": "19.71, 19.80, 19.77",
}


def sequence_of(scenario: str, train: Images, test: Images) -> TaskSequence:
    tasks = []
    for pair in IN_PAIRS:
        data = [part.of(pair) for part in (train, test)]
        if scenario == "domain":
            data = [Images(part.pixels, part.labels % 2) for part in data]
        own = pair if scenario == "task" else None
        tasks.append(Task(f"{pair[0]}-{pair[1]}", *data, classes=own))
    outputs = 2 if scenario == "domain" else 10
    title = f"Split MNIST, {scenario}-incremental"
    return TaskSequence(title, tasks, partial(mlp, 784, 400, 400, num_labels=outputs), TRAINING, ())


def main() -> None:
    options: TableOptions = parsed("scenarios", seeds=5)
    train, test = images("mnist", options.folder)
    for scenario in options.among(PUBLISHED):
        folder = Path(str(options.output_dir)) / scenario
        found = sequence_of(scenario, train, test).compared(METHODS, folder, options)
        print(f"{scenario}-incremental:\n\n{found}\n\nPublished: {PUBLISHED[scenario]}", flush=True)


if __name__ == "__main__":
    main()
