"""Plain training on Split MNIST with a new Adam for each task, and with one for all tasks.

    scripts/reproduce one_optimizer [--seeds 5] [--max_steps 2000]

The tasks, the network and the steps of `split_mnist`, in a bare loop. A Trainer begins each task
with moments of zero; other code keeps those of the task before.
"""

import torch
from mlp import mlp
from options import TableOptions, parsed
from sources import Images, images
from split_mnist import shuffled_tasks
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam

from hf_ewc import Task
from hf_ewc.report.statistics import estimate

BATCH = 128
WAYS = {"a new one for each task": False, "one for all tasks": True}


def accuracy(tasks: list[Task], seed: int, steps: int, one_for_all: bool) -> float:
    """The mean over all tasks in the end, in %, each among its own two digits."""
    torch.manual_seed(seed)
    model = mlp(784, 400, 400)
    optimizer = Adam(model.parameters(), 1e-3)
    for task in tasks:
        if not one_for_all:
            optimizer = Adam(model.parameters(), 1e-3)
        for step in range(steps):
            rows = rows_of_batch(len(task.train_dataset), step, seed)
            logits, labels = outputs(model, task, task.train_dataset, rows)
            optimizer.zero_grad()
            cross_entropy(logits, labels).backward()
            optimizer.step()
    with torch.no_grad():
        pairs = [outputs(model, task, task.eval_dataset, slice(None)) for task in tasks]
    right = [(logits.argmax(-1) == labels).float().mean() for logits, labels in pairs]
    return 100 * float(torch.stack(right).mean())


def rows_of_batch(size: int, step: int, seed: int) -> Tensor:
    """The step's batch; each epoch has an order of its own and leaves the last few out."""
    epoch, place = divmod(step, size // BATCH)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(1000 * seed + epoch))
    return order[BATCH * place : BATCH * (place + 1)]


def outputs(model: nn.Module, task: Task, data: Images, rows: Tensor | slice) -> tuple[Tensor, ...]:
    """Logits of the task's own two digits, and which of them each image is."""
    first, second = task.classes
    logits = model(data.pixels[rows]).logits[:, [first, second]]
    return logits, (data.labels[rows] == second).long()


def main() -> None:
    options: TableOptions = parsed("one_optimizer", seeds=5)
    train, test = images("mnist", options.folder)
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    for seed in options.repetitions:
        tasks = shuffled_tasks(train, test, seed)
        for name, one_for_all in WAYS.items():
            found[name].append(accuracy(tasks, seed, options.max_steps or 2000, one_for_all))
        print(seed, {name: round(values[-1], 1) for name, values in found.items()}, flush=True)
    for name, values in found.items():
        print(f"{name}: {estimate(values).mean:.2f} ± {estimate(values).error:.2f}")


if __name__ == "__main__":
    main()
