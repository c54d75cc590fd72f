"""Four kinds of text, one after another: shop reviews, other reviews, articles, news.

    scripts/reproduce four_corpora [--only plain EWC ...] [--seeds N]

All of MiniLM is trained, each corpus with classes of its own, on 400 texts of 64 tokens at most;
300 test texts each. No setting was tuned.
"""

from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset
from options import TableOptions, parsed
from sequences import TaskSequence
from sources import texts
from transformers import AutoTokenizer, BertForSequenceClassification, DataCollatorWithPadding

from hf_ewc import Task

CORPORA = ("amazon5", "yelp5", "dbpedia14", "ag_news")
LOWER_HALF = {"frozen_modules": ["embeddings", *(f"encoder.layer.{i}" for i in range(3))]}
METHODS: dict[str, Any] = {
    "plain": {},
    "EWC": {"ewc_lambda": 1e3},
    "L2-SP": {"l2sp_lambda": 0.1},
    "replay 5 %": {"replay_share": 0.05},
    "EWC + replay 5 %": {"ewc_lambda": 1e3, "replay_share": 0.05},
    "lower half frozen": LOWER_HALF,
    "lower half frozen, EWC": {"ewc_lambda": 1e3, **LOWER_HALF},
    "joint": {"joint_training": True},
}


def sequence_of(options: TableOptions) -> TaskSequence:
    tokenizer = AutoTokenizer.from_pretrained(options.minilm)
    frames = {name: texts(name, options.folder) for name in CORPORA}
    heads = [(name, label) for name, (train, _) in frames.items()
             for label in sorted(train.label.unique())]  # fmt: skip

    def examples(name: str, frame: pd.DataFrame, most: int) -> Dataset:
        chosen = frame.sample(n=min(most, len(frame)), random_state=0)
        tokens = tokenizer(list(chosen.text), truncation=True, max_length=64)
        return Dataset.from_dict(
            {**tokens, "labels": [heads.index((name, i)) for i in chosen.label]}
        )

    tasks = [
        Task(
            name,
            examples(name, train, 400),
            examples(name, test, 300),
            classes=[i for i, (corpus, _) in enumerate(heads) if corpus == name],
        )
        for name, (train, test) in frames.items()
    ]
    return TaskSequence(
        "Four corpora, MiniLM",
        tasks,
        partial(BertForSequenceClassification.from_pretrained, options.minilm,
                num_labels=len(heads)),
        {"learning_rate": 1e-4, "num_train_epochs": 3, "per_device_train_batch_size": 16,
         "per_device_eval_batch_size": 100, "lr_scheduler_type": "linear",
         "remove_unused_columns": True},
        (),
        {"data_collator": DataCollatorWithPadding(tokenizer)},
    )  # fmt: skip


def main() -> None:
    options: TableOptions = parsed("four_corpora")
    chosen = {name: METHODS[name] for name in options.among(METHODS)}
    print(sequence_of(options).compared(chosen, Path(str(options.output_dir)), options))


if __name__ == "__main__":
    main()
