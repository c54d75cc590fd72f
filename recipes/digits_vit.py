"""Five tasks of two handwritten digits each, learnt one after another, in six ways.

    accelerate launch recipes/digits_vit.py

A small vision transformer learns 0/1, then 2/3, up to 8/9, from the 1,797 images inside
scikit-learn. After each task it is tested on all tasks so far, told which task an image is from
(task-incremental). Every option of TrainingArguments and EWCConfig can be given, as in
`--ewc_lambda 1e3 --num_train_epochs 5`; started again after a kill, it goes on where it was.
"""

from dataclasses import dataclass, field

import torch
import transformers
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import (
    HfArgumentParser,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from hf_ewc import EWCConfig, Task, compare_methods
from hf_ewc.processes import leave
from hf_ewc.report import difference_table


@dataclass
class DigitsArguments:
    num_seeds: int = field(default=3, metadata={"help": "Repetitions, of each method."})
    l2sp_lambda: float = field(default=1e-2, metadata={"help": "λ of the method L2-SP."})
    replay_share: float = field(
        default=0.05, metadata={"help": "Share of replayed examples, where a method replays."}
    )
    validation: bool = field(
        default=False,
        metadata={
            "help": "Leave the test images alone and score on a quarter of the training images, "
            "which are then not trained on: to choose settings by."
        },
    )


def digit_tasks(validation: bool) -> list[Task]:
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    train, test = split(range(len(labels)), labels)
    if validation:
        train, test = split(train, labels)

    def examples(indices, classes):
        return [
            {"pixel_values": images[i], "labels": int(labels[i])}
            for i in indices
            if labels[i] in classes
        ]

    return [
        Task(
            name=f"{classes[0]}-{classes[1]}",
            train_dataset=examples(train, classes),
            eval_dataset=examples(test, classes),
            classes=classes,
        )
        for classes in [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    ]


def split(indices, labels):
    return train_test_split(
        indices, test_size=0.25, random_state=0, stratify=[labels[i] for i in indices]
    )


def small_vit() -> ViTForImageClassification:
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        num_labels=10,
    )
    return ViTForImageClassification(config)


def main() -> None:
    parser = HfArgumentParser((DigitsArguments, TrainingArguments, EWCConfig))
    parser.set_defaults(
        output_dir="runs/digits",
        learning_rate=1e-3,
        num_train_epochs=12,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=256,
        lr_scheduler_type="constant",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
        max_grad_norm=0.0,  # clipping would shrink the task's gradient along with the penalty's
        ewc_lambda=1e4,
        ewc_mode="separate",
        fisher_type="exact",
    )
    own, args, ewc = parser.parse_args_into_dataclasses()
    transformers.logging.disable_progress_bar()  # those of saving; the tasks' own stay

    replay = {"replay_share": own.replay_share}
    comparison = compare_methods(
        small_vit,
        digit_tasks(own.validation),
        args,
        methods={
            "plain": {},
            "L2-SP": {"l2sp_lambda": own.l2sp_lambda},
            "replay": replay,
            "EWC": ewc,
            "EWC + replay": {"ewc_config": ewc, **replay},
            "joint": {"joint_training": True},
        },
        seeds=range(args.seed, args.seed + own.num_seeds),
        title="Handwritten digits, five tasks of two",
    )
    if args.should_save:
        report(comparison)
    leave()


def report(comparison) -> None:
    print(f"\nMean ± standard error, seeds {', '.join(map(str, comparison.runs['EWC']))}\n")
    print(f"{comparison}\n\n{difference_table(comparison.runs)}\n")
    print(f"Written to {comparison.output_dir}: report.md with its pictures, results.json\n")
    print("Next: one anchor for all tasks in place of one each, or ten times weaker protection")
    print("  scripts/quickstart --ewc_mode online --output_dir runs/online")
    print("  scripts/quickstart --ewc_lambda 1000 --output_dir runs/weak")


if __name__ == "__main__":
    main()
