"""Four kinds of text, one after another: shop reviews, other reviews, articles, news.

    scripts/reproduce four_corpora [--only plain EWC ...] [--seeds N]

All of MiniLM is trained in bf16, each corpus with classes of its own, on 200 texts of 48 tokens at
most; 100 test texts each, five epochs. The learning rate is that of two (2e-4, 5e-4) at which plain
training learns more with `--validation`. EWC is the untouched `EWCConfig()`, LoRA has the learning
rate that `clinc150` has for it, and the other settings were set once.
"""

from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from options import TableOptions, parsed
from sequences import TaskSequence
from sources import texts
from transformers import AutoTokenizer, BertForSequenceClassification, DataCollatorWithPadding
from ways import ONLY_THE_LAST, ways, with_lora

from hf_ewc import Task

CORPORA = ("amazon5", "yelp5", "dbpedia14", "ag_news")
LOWER_HALF = {"frozen_modules": ["embeddings", *(f"encoder.layer.{i}" for i in range(3))]}
EWC = {"ewc_lambda": "state"}


def methods_of(sequence: TaskSequence) -> dict[str, Any]:
    lora = partial(with_lora, sequence.make_model)
    return {
        **ways(EWC),
        "lower half frozen": LOWER_HALF,
        "lower half frozen, EWC": {**EWC, **LOWER_HALF},
        "LoRA": {"make_model": lora, "sequence_config": ONLY_THE_LAST, "learning_rate": 5e-3},
    }


def sequence_of(options: TableOptions) -> TaskSequence:
    tokenizer = AutoTokenizer.from_pretrained(options.minilm)
    frames = {name: texts(name, options.folder) for name in CORPORA}
    heads = [(name, label) for name, (train, _) in frames.items()
             for label in sorted(train.label.unique())]  # fmt: skip

    def examples(name: str, frame: pd.DataFrame, most: int) -> Dataset:
        chosen = frame.sample(n=min(most, len(frame)), random_state=0)
        tokens = tokenizer(list(chosen.text), truncation=True, max_length=48)
        return Dataset.from_dict(
            {**tokens, "labels": [heads.index((name, i)) for i in chosen.label]}
        )

    tasks = [
        Task(
            name,
            examples(name, train, 200),
            examples(name, test, 100),
            classes=[i for i, (corpus, _) in enumerate(heads) if corpus == name],
        )
        for name, (train, test) in frames.items()
    ]
    return TaskSequence(
        "Four corpora, MiniLM",
        tasks,
        partial(BertForSequenceClassification.from_pretrained, options.minilm,
                num_labels=len(heads)),
        {"learning_rate": 2e-4, "num_train_epochs": 5, "per_device_train_batch_size": 16,
         "per_device_eval_batch_size": 100, "lr_scheduler_type": "linear",
         "remove_unused_columns": True, "bf16": True,
         "use_cpu": not torch.cuda.is_available()},
        (),
        {"data_collator": DataCollatorWithPadding(tokenizer)},
    )  # fmt: skip


def main() -> None:
    options: TableOptions = parsed("four_corpora")
    sequence = sequence_of(options)
    methods = methods_of(sequence)
    chosen = {name: methods[name] for name in options.among(methods)}
    print(sequence.compared(chosen, Path(str(options.output_dir)), options))


if __name__ == "__main__":
    main()
