"""Five tasks of two handwritten digits each, learnt one after another, plainly and with EWC.

    accelerate launch recipes/digits_vit.py

A small vision transformer learns 0/1, then 2/3, up to 8/9, from the 1,797 images inside
scikit-learn. After each task it is tested on all tasks so far, told which task an image is from
(task-incremental). Every option of TrainingArguments and EWCConfig can be given, as in
`--ewc_lambda 1e4 --num_train_epochs 5`; started again after a kill, it goes on where it was.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import (
    HfArgumentParser,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from hf_ewc import EWCConfig, Task, run_tasks
from hf_ewc.processes import leave
from hf_ewc.report import score_table, summary_table, write_report


@dataclass
class DigitsArguments:
    num_seeds: int = field(default=3, metadata={"help": "Repetitions, of each method."})


def digit_tasks() -> list[Task]:
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    split = train_test_split(range(len(labels)), test_size=0.25, random_state=0, stratify=labels)

    def examples(indices, classes):
        return [
            {"pixel_values": images[i], "labels": int(labels[i])}
            for i in indices
            if labels[i] in classes
        ]

    return [
        Task(
            name=f"{classes[0]}-{classes[1]}",
            train_dataset=examples(split[0], classes),
            eval_dataset=examples(split[1], classes),
            classes=classes,
        )
        for classes in [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    ]


def small_vit() -> ViTForImageClassification:
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        num_labels=10,
    )
    return ViTForImageClassification(config)


def report(folder, runs) -> None:
    write_report(folder, runs, title="Handwritten digits, five tasks of two")
    print(f"\nAccuracy on each task, {len(runs['EWC'])} seeds (mean ± standard error)\n")
    for method, matrices in runs.items():
        print(f"{method}\n\n{score_table(matrices)}\n")
    print(f"{summary_table(runs)}\n")
    print(f"Written to {folder}: results.json, report.md, accuracy_matrix.png, curves.png\n")
    print("Next: one anchor for all tasks in place of one each, or ten times weaker protection")
    print("  scripts/quickstart --ewc_mode online --output_dir runs/online")
    print("  scripts/quickstart --ewc_lambda 3000 --output_dir runs/weak")


def main() -> None:
    parser = HfArgumentParser((DigitsArguments, TrainingArguments, EWCConfig))
    parser.set_defaults(
        output_dir="runs/digits",
        learning_rate=1e-3,
        num_train_epochs=20,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=256,
        lr_scheduler_type="constant",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
        max_grad_norm=0.0,  # clipping would shrink the task's gradient along with the penalty's
        ewc_lambda=3e4,
        ewc_mode="separate",
        fisher_type="exact",
    )
    transformers.logging.disable_progress_bar()  # those of saving; the tasks' own stay
    own, args, ewc = parser.parse_args_into_dataclasses()
    folder, first_seed = Path(args.output_dir), args.seed

    tasks = digit_tasks()
    runs = {"plain fine-tuning": [], "EWC": []}
    methods = dict(zip(runs, (None, ewc), strict=True))
    for seed in range(first_seed, first_seed + own.num_seeds):
        for method, config in methods.items():
            set_seed(seed)
            args.seed = seed
            args.output_dir = str(folder / method.replace(" ", "-") / f"seed-{seed}")
            runs[method].append(run_tasks(small_vit(), tasks, args, config).matrix)

    if args.should_save:
        report(folder, runs)
    leave()


if __name__ == "__main__":
    main()
