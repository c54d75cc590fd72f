"""What a language model keeps of general text while it learns Shakespeare, then requests, by LoRA.

    scripts/reproduce language_model [--only plain "replay 5 %" ...] [--seeds N] [--validation]

SmolLM2-135M, r = 8 on all linear maps, blocks of 128 tokens. The first task, general text
(news, encyclopedia, reviews), is not trained on: its learning rate is 0, and what the model knows
of it is protected before the adapter has taken a step. Then come Shakespeare and what people ask
an assistant for. Perplexity on texts that had no part in training; steps and learning rate were
chosen on other texts (`--validation`), with one seed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from options import TableOptions, parsed
from peft import LoraConfig, get_peft_model
from sequences import TaskSequence
from sources import shakespeare_parts, texts
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_ewc import Task
from hf_ewc.report.statistics import estimate
from hf_ewc.report.tables import table
from hf_ewc.tasks.methods import Comparison

GENERAL = ("ag_news", "dbpedia14", "yelp5")
BLOCK = 128


@dataclass
class LanguageModelOptions(TableOptions):
    smollm2: str = field(
        default="HuggingFaceTB/SmolLM2-135M",
        metadata={"help": "Name or folder of the language model."},
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "Of AdamW."})
    bf16: bool = field(
        default=True, metadata={"help": "False for fp32, on processors that have no bf16."}
    )


def methods() -> dict[str, Any]:
    """Those of the other tables, as far as they go with a model whose head is its vocabulary."""
    factors = {"ewc_space": "adapter", "fisher_samples": 32}
    return {
        "plain": {"evaluate_unseen": True},
        "EWC of A and B": factors,
        "EWC of A and B, λ found": {**factors, "ewc_lambda": "auto"},
        "EWC of the weights": {**factors, "ewc_space": "weight"},
        "L2-SP": {"l2sp_lambda": 0.1},
        "replay 5 %": {"replay_share": 0.05},
        "EWC of A and B + replay 5 %": {**factors, "replay_share": 0.05},
        "averaging": {"weight_average": "mean"},
        "distillation": {"distillation_weight": 1.0},
        "joint": {"joint_training": True},
    }


def sequence_of(options: LanguageModelOptions) -> TaskSequence:
    tokenizer = AutoTokenizer.from_pretrained(options.smollm2)
    frames = [texts(name, options.folder) for name in GENERAL]

    def general(split: int, most: int, skipped: int = 0) -> list[list[int]]:
        return [
            block
            for frame in frames
            for block in blocks(frame[split].text.iloc[skipped:], tokenizer, most)
        ]

    plays = shakespeare_parts(options.folder)
    asked, unseen = (
        frame.text.sample(frac=1, random_state=0) for frame in texts("clinc150", options.folder)
    )
    asked, others = asked.iloc[:-3000], asked.iloc[-3000:]
    scored = plays["validation" if options.validation else "test"]
    play = partial(blocks, tokenizer=tokenizer)
    last = examples(play(asked, most=200))
    tasks = [
        Task(
            "general text",
            examples(general(0, 30)),
            examples(general(0, 8, skipped=2000) if options.validation else general(1, 8)),
            metric="perplexity",
            training_args={"learning_rate": 0.0, "max_steps": 1},
        ),
        Task(
            "Shakespeare",
            examples(play([plays["train"]], most=200)),
            examples(play([scored], most=24)),
            metric="perplexity",
        ),
        Task(
            "requests",
            last,
            examples(play(others if options.validation else unseen, most=24)),
            metric="perplexity",
            fisher_dataset=last.select(range(4)),  # nothing comes after it
        ),
    ]
    return TaskSequence(
        "General text, then Shakespeare, then requests; SmolLM2-135M by LoRA",
        tasks,
        partial(adapted, options.smollm2),
        {"learning_rate": options.learning_rate, "max_steps": 30, "bf16": options.bf16,
         "use_cpu": not torch.cuda.is_available(),
         "per_device_train_batch_size": 2, "per_device_eval_batch_size": 6,
         "lr_scheduler_type": "linear", "remove_unused_columns": True},
        (),
    )  # fmt: skip


def adapted(name: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(name, dtype="float32")
    model.config.use_cache = False
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    return get_peft_model(model, lora)


def blocks(several: Any, tokenizer: Any, most: int) -> list[list[int]]:
    """The texts joined and cut, an end-of-text token behind each; `most` blocks, the first."""

    def whole() -> Iterator[list[int]]:
        rest: list[int] = []
        for text in several:
            rest += [*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id]
            while len(rest) >= BLOCK:
                yield rest[:BLOCK]
                rest = rest[BLOCK:]

    return list(islice(whole(), most))


def examples(found: list[list[int]]) -> Dataset:
    return Dataset.from_dict({"input_ids": found, "labels": found})


COLUMNS = {
    "general text": (-1, 0),
    "Shakespeare": (-1, 1),
    "requests": (-1, 2),
    "general text before the requests": (-2, 0),
    "Shakespeare before them": (-2, 1),
}


def shown(found: Comparison) -> str:
    """Perplexities in the end and one task before it, mean ± standard error over seeds."""
    rows = []
    for outcome in list(found.runs.get("plain", {}).values())[:1]:  # the same with all seeds
        rows.append(["not trained", *(f"{-float(s):.2f}" for s in outcome.matrix.baseline), "", ""])
    for name, runs in found.runs.items():
        scores = [outcome.matrix.scores for outcome in runs.values()]
        rows.append([
            name,
            *(_level([-float(s[after][task]) for s in scores]) for after, task in COLUMNS.values()),
        ])  # fmt: skip
    return table(["", *COLUMNS], rows)


def _level(values: list[float]) -> str:
    found = estimate(values)
    return f"{found.mean:.2f} ± {found.error:.2f}"


def main() -> None:
    options: LanguageModelOptions = parsed("language_model", kind=LanguageModelOptions)
    every = methods()
    chosen = {name: every[name] for name in options.among(every)}
    sequence = sequence_of(options)
    options = replace(options, validation=False)  # the tasks have texts of their own for it
    print(shown(sequence.compared(chosen, Path(str(options.output_dir)), options)))


if __name__ == "__main__":
    main()
