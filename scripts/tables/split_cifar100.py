"""Split CIFAR-100, ten tasks of ten classes, a small ViT from scratch.

    scripts/reproduce split_cifar100 [--only plain EWC ...] [--seeds N]

60 images a class for training and 30 for the score, 15 epochs a task, Adam 5e-4, batches of 32; a
head for each task. No setting was tuned.
"""

from pathlib import Path

import torch
from options import TableOptions, parsed
from sequences import TaskSequence
from sources import Images, images
from transformers import ViTConfig, ViTForImageClassification
from ways import ways

from hf_ewc import Task

METHODS = ways({"ewc_lambda": 1e3}, l2sp_lambda=0.01)


def vit() -> ViTForImageClassification:
    return ViTForImageClassification(
        ViTConfig(
            image_size=32, patch_size=8, hidden_size=96, num_hidden_layers=4,
            num_attention_heads=4, intermediate_size=192, num_labels=100,
        )
    )  # fmt: skip


def at_most(data: Images, count: int) -> Images:
    """The first so many images of each class."""
    kept = [torch.nonzero(data.labels == c).flatten()[:count] for c in data.labels.unique()]
    rows = torch.cat(kept).sort().values
    return Images(data.pixels[rows], data.labels[rows])


def main() -> None:
    options: TableOptions = parsed("split_cifar100")
    train, test = images("cifar100", options.folder)
    train, test = at_most(train, 60), at_most(test, 30)
    groups = [tuple(range(i, i + 10)) for i in range(0, 100, 10)]
    tasks = [
        Task(f"{own[0]}-{own[-1]}", train.of(own), test.of(own), classes=own) for own in groups
    ]
    training = {"learning_rate": 5e-4, "num_train_epochs": 15, "per_device_train_batch_size": 32}
    sequence = TaskSequence("Split CIFAR-100, ten tasks of ten", tasks, vit, training, ())
    chosen = {name: METHODS[name] for name in options.among(METHODS)}
    print(sequence.compared(chosen, Path(str(options.output_dir)), options))


if __name__ == "__main__":
    main()
