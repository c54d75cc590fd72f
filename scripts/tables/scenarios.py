"""Split MNIST in the three scenarios, as Hsu et al. (2018), arXiv 1810.12488, table 2.

    scripts/reproduce scenarios [--only task domain class] [--seeds 5] [--as_published]

Five tasks of two digits; MLP of two hidden layers of 400, Adam 1e-3, 4 epochs of batches of 128.
Task: a head for each task. Domain: one head of two, is the digit the first or the second of its
pair. Class: one head of ten. λ = 1e4, as `choosing_lambda` has it best for the first of these; for
EWC kept apart by task and for online EWC alike. `--as_published` does further things as the code of
that paper: images with a frame of zeros, 32 × 32, of mean 0 and deviation 1; importances from the
squares of batches' gradients, with that code's λ for the second scenario (there without the ½).
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
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
BATCHES = {"fisher_type": "batched", "fisher_samples": -1, "fisher_batch_size": 128}
AS_PUBLISHED = {
    "plain": {},
    "EWC": {"ewc_lambda": 2 * 100, "ewc_mode": "separate", **BATCHES},
    "online EWC": {"ewc_lambda": 2 * 700, **BATCHES},
    "EWC, exact": METHODS["EWC"],
}
PUBLISHED = {  # of plain, EWC and online EWC, in %
    "task": "93.46, 97.70, 98.04",
    "domain": "55.16, 58.85, 57.33",
    "class": "19.71, 19.80, 19.77",
}


@dataclass
class ScenarioOptions(TableOptions):
    as_published: bool = field(
        default=False, metadata={"help": "Pixels, importances and λ as the paper's code has them."}
    )


def framed(data: Images) -> Images:
    """32 × 32 pixels, of about mean 0 and deviation 1."""
    pixels = torch.nn.functional.pad(data.pixels.view(-1, 28, 28), (2, 2, 2, 2))
    return Images(((pixels - 0.1) / 0.2752).flatten(1), data.labels)


def sequence_of(scenario: str, train: Images, test: Images) -> TaskSequence:
    tasks = []
    for pair in IN_PAIRS:
        data = [part.of(pair) for part in (train, test)]
        if scenario == "domain":
            data = [Images(part.pixels, part.labels % 2) for part in data]
        own = pair if scenario == "task" else None
        tasks.append(Task(f"{pair[0]}-{pair[1]}", *data, classes=own))
    outputs = 2 if scenario == "domain" else 10
    model: Any = partial(mlp, train.pixels.shape[1], 400, 400, num_labels=outputs)
    title = f"Split MNIST, {scenario}-incremental"
    return TaskSequence(title, tasks, model, TRAINING, ())


def main() -> None:
    options: ScenarioOptions = parsed("scenarios", kind=ScenarioOptions, seeds=5)
    train, test = images("mnist", options.folder)
    methods: dict[str, Any] = METHODS
    if options.as_published:
        train, test, methods = framed(train), framed(test), AS_PUBLISHED
    for scenario in options.among(PUBLISHED):
        name = f"{scenario}-as-published" if options.as_published else scenario
        folder = Path(str(options.output_dir)) / name
        found = sequence_of(scenario, train, test).compared(methods, folder, options)
        print(f"{scenario}-incremental:\n\n{found}\n\nPublished: {PUBLISHED[scenario]}", flush=True)


if __name__ == "__main__":
    main()
