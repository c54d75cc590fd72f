"""Five short sequences of tasks that say how a setting does over data and models of several kinds.

Images that are told apart, images that are not, texts with a pretrained encoder, and a language
model: what is right on one is often wrong on another. All learn with the untouched `EWCConfig`.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from mlp import mlp
from options import TableOptions, training_arguments
from sources import Images, images, shakespeare, texts
from torch import nn
from torch.utils.data import Subset, random_split
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    GPT2Config,
    GPT2LMHeadModel,
)

from hf_ewc import SequenceConfig, Task, compare_methods
from hf_ewc.tasks.methods import Comparison

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
sys.path.insert(0, str(RECIPES))
from digits_vit import digit_tasks, small_vit  # noqa: E402


@dataclass(frozen=True)
class TaskSequence:
    """Tasks, a model, and how they are learnt.

    Args:
        lambdas: a grid of two values a decade around the best.
        training: settings of `TrainingArguments`.
        options: further arguments of `run_tasks`.
        sequence: what is trained, and kept on disk.
    """

    title: str
    tasks: list[Task]
    make_model: Callable[[], nn.Module]
    training: dict[str, Any]
    lambdas: tuple[float, ...]
    options: dict[str, Any] = field(default_factory=dict)
    sequence: SequenceConfig = field(default_factory=lambda: SequenceConfig(keep_models="last"))

    def compared(
        self, methods: Mapping[str, Any], folder: Path, options: TableOptions, **others: Any
    ) -> Comparison:
        """The tasks learnt by each of these methods; `others` go to `compare_methods`."""
        tasks = [validated(task) for task in self.tasks] if options.validation else self.tasks
        return compare_methods(
            self.make_model,
            tasks,
            training_arguments(folder, options, **self.training),
            methods,
            seeds=options.repetitions,
            **{"title": self.title, "sequence_config": self.sequence, **self.options, **others},
        )


def parted(data: Any, share: float = 0.2) -> list[Subset[Any]]:
    """The data without a share of it, drawn by a fixed seed, and that share."""
    return random_split(data, [1 - share, share], torch.Generator().manual_seed(0))


def validated(task: Task) -> Task:
    """The task scored on a fifth of its training data, which it does not learn."""
    learnt, held_out = parted(task.train_dataset)
    return replace(task, train_dataset=learnt, eval_dataset=held_out)


def digits(options: TableOptions) -> TaskSequence:
    return TaskSequence(
        "Digits of 8 × 8 pixels, five tasks of two; ViT",
        digit_tasks(validation=False),
        small_vit,
        {"learning_rate": 1e-3, "num_train_epochs": 12, "per_device_train_batch_size": 32},
        (3e2, 1e3, 3e3, 1e4, 3e4, 1e5),
    )


IN_PAIRS = ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))


def split_mnist(options: TableOptions) -> TaskSequence:
    train, test = images("mnist", options.folder)
    tasks = [Task(f"{a}-{b}", train.of((a, b)), test.of((a, b)), (a, b)) for a, b in IN_PAIRS]
    return TaskSequence(
        "Split MNIST, five tasks of two; MLP 400-400, 300 steps a task",
        tasks,
        partial(mlp, 784, 400, 400),
        SHORT_MNIST,
        (3e2, 1e3, 3e3, 1e4, 3e4, 1e5, 3e5),
    )


SHORT_MNIST = {"learning_rate": 1e-3, "max_steps": 300, "per_device_train_batch_size": 128}


def permuted_mnist(options: TableOptions) -> TaskSequence:
    train, test = images("mnist", options.folder)
    return TaskSequence(
        "Permuted MNIST, ten tasks; MLP 400-400, 300 steps a task",
        [permuted(train, test, number) for number in range(10)],
        partial(mlp, 784, 400, 400),
        SHORT_MNIST,
        (1e1, 3e1, 1e2, 3e2, 1e3, 3e3),
    )


def permuted(train: Images, test: Images, number: int, most: int = 2000) -> Task:
    """The pixels in another order, the same in all images; `most` test images."""
    order = torch.randperm(784, generator=torch.Generator().manual_seed(number))
    return Task(
        f"order {number + 1}",
        Images(train.pixels[:, order], train.labels),
        Images(test.pixels[:most, order], test.labels[:most]),
    )


def clinc150(options: TableOptions, domains: int = 5) -> TaskSequence:
    """Few examples, learnt by heart: 15 a class for training, 10 for the score."""
    train, test = texts("clinc150", options.folder)
    recipe = RECIPES / "configs" / "sequential_text_classification" / "clinc150.yaml"
    entries = yaml.safe_load(recipe.read_text(encoding="utf-8"))["tasks"][:domains]
    labels = [label for entry in entries for label in entry["labels"]]
    tokenizer = AutoTokenizer.from_pretrained(options.minilm)

    def examples(frame: Any, own: list[str], most: int) -> Dataset:
        chosen = frame[frame.label.isin(own)].groupby("label").head(most)
        chosen = chosen.sample(frac=1, random_state=0)
        tokens = tokenizer(list(chosen.text), truncation=True, max_length=24)
        return Dataset.from_dict({**tokens, "labels": [labels.index(i) for i in chosen.label]})

    tasks = [
        Task(
            entry["name"],
            examples(train, entry["labels"], 15),
            examples(test, entry["labels"], 10),
            classes=[labels.index(label) for label in entry["labels"]],
        )
        for entry in entries
    ]
    return TaskSequence(
        f"Intents, {domains} domains of fifteen (clinc150); the upper two layers of MiniLM",
        tasks,
        partial(BertForSequenceClassification.from_pretrained, options.minilm,
                num_labels=len(labels)),
        {
            "learning_rate": 5e-4,
            "num_train_epochs": 6,
            "per_device_train_batch_size": 32,
            "per_device_eval_batch_size": 150,
            "lr_scheduler_type": "linear",
            "warmup_steps": 4,
            "remove_unused_columns": True,
        },
        (3e2, 1e3, 3e3, 1e4),
        {"data_collator": DataCollatorWithPadding(tokenizer)},
        SequenceConfig(
            trained_modules=["encoder.layer.4", "encoder.layer.5", "pooler", "classifier"],
            keep_models="last",
        ),
    )  # fmt: skip


def language_model(options: TableOptions) -> TaskSequence:
    """Bytes of news, then of plays, then of reviews; the score is how many are foretold."""
    sources = {
        "news": "\n".join(texts("ag_news", options.folder)[0].text),
        "Shakespeare": shakespeare(options.folder),
        "reviews": "\n".join(texts("yelp5", options.folder)[0].text),
    }
    return TaskSequence(
        "Bytes of three kinds of text; GPT-2 of 3 layers from scratch, 200 steps a task",
        [byte_task(name, text) for name, text in sources.items()],
        tiny_gpt2,
        {"learning_rate": 2e-3, "max_steps": 200, "per_device_train_batch_size": 16,
         "per_device_eval_batch_size": 64},
        (1e0, 3e0, 1e1, 3e1),
    )  # fmt: skip


def byte_task(name: str, text: str, length: int = 128, train: int = 3200, test: int = 128) -> Task:
    """Consecutive pieces of so many bytes, the last of them for the score."""
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    rows = data[: len(data) // length * length].view(-1, length)
    pieces = [{"input_ids": row, "labels": row} for row in rows]
    return Task(name, pieces[:-test][:train], pieces[-test:])


def tiny_gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=256, n_positions=128, n_embd=96, n_layer=3, n_head=4,
                   bos_token_id=0, eos_token_id=0, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    )  # fmt: skip


SEQUENCES: dict[str, Callable[[TableOptions], TaskSequence]] = {
    "digits": digits,
    "split_mnist": split_mnist,
    "permuted_mnist": permuted_mnist,
    "clinc150": clinc150,
    "language_model": language_model,
}
