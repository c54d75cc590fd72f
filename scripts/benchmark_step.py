"""What EWC costs in one training step, against the plain Trainer and against per-task autograd.

    python scripts/benchmark_step.py --out benchmarks/step.json
    python scripts/benchmark_step.py --small

Protocol: a BERT of 22.7 million parameters (6 layers, 384 wide), batches of 32 × 64 random tokens,
fp32, AdamW as the Trainer takes it by default. Three trainers take turns, a few steps each, in one
process: the plain Trainer; EWCTrainer with a state of ten tasks in "separate" mode; and a Trainer
that keeps ten tasks apart and adds ten penalties to its loss, as other libraries do. A step is
timed from the Trainer's on_step_begin to its on_step_end; on a CPU in seconds of CPU time, which
other programs on the machine disturb less (with one thread it is the wall time of an idle machine).
The first turn of each is left out; the
ratio is the median over turns of (median step of one) / (median step of the plain Trainer).

The second ratio is of whole trainings: their seconds, with the data loaded and the steps logged, by
the number of steps.

With --small an MLP of 0.5 million parameters (784-400-400-10) on batches of 128, where the penalty
weighs most: EWCTrainer with a state of one task against EWCTrainer without a state.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from benchmark_model import VOCABULARY, make_model
from machine import write_json
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_ewc import EWCConfig, EWCState, EWCTrainer, Fisher

BATCH, LENGTH = 32, 64


class RandomTokens(Dataset[dict[str, Tensor]]):
    """Examples of random tokens with one of two labels."""

    def __len__(self) -> int:
        return 1 << 16

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(i)
        tokens = torch.randint(1000, VOCABULARY, (LENGTH,), generator=generator)
        return {"input_ids": tokens, "labels": torch.tensor(i % 2)}


class MLP(nn.Module):
    """784-400-400-10, as for flattened digits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        inner = (nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU())
        self.layers = nn.Sequential(*inner, nn.Linear(400, 10))

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.layers(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class RandomPixels(Dataset[dict[str, Tensor]]):
    """Random images of one of ten classes."""

    def __init__(self) -> None:
        self.pixels = torch.randn(1280, 784, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"pixel_values": self.pixels[i], "labels": torch.tensor(i % 10)}


class StepTimer(TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._begin = now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(now() - self._begin)


def now() -> float:
    """Seconds: of CPU time, on a GPU by the clock, when it has done what it was given."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class AutogradTrainer(Trainer):
    """λ/2 Σ_k Σ F_k (θ − θ*_k)², task by task, in the loss."""

    ewc_tasks: list[tuple[dict[str, Tensor], dict[str, Tensor]]]
    ewc_lambda: float

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, *args, **kwargs)
        for fisher, anchor in self.ewc_tasks:
            for name, parameter in model.named_parameters():
                pull = fisher[name] * (parameter - anchor[name]) ** 2
                loss = loss + self.ewc_lambda / 2 * pull.sum()
        return loss


def random_tasks(
    model: nn.Module, number: int
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Importance and anchor of tasks as they would come one after another."""
    for _ in range(number):
        yield (
            {name: 1e-4 * torch.rand_like(p) for name, p in model.named_parameters()},
            {name: p.detach() + 1e-3 * torch.randn_like(p) for name, p in model.named_parameters()},
        )


def make_trainer(
    method: str, folder: str, steps: int, number: int, small: bool
) -> tuple[Trainer, StepTimer]:
    timer, model = StepTimer(), MLP() if small else make_model()
    options: dict[str, Any] = {
        "model": model,
        "args": TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=128 if small else BATCH,
            max_steps=steps,
            logging_steps=1000,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
        ),
        "train_dataset": RandomPixels() if small else RandomTokens(),
        "callbacks": [timer],
    }
    if method == "plain":
        return Trainer(**options), timer
    if method == "no state":
        return EWCTrainer(**options, ewc_config=EWCConfig(ewc_lambda=10.0)), timer
    if method == "EWC":
        state = EWCState()
        for fisher, anchor in random_tasks(model, number):
            state = state.consolidate(Fisher(fisher), anchor, mode="separate")
        return EWCTrainer(**options, ewc_config=EWCConfig(ewc_lambda=10.0), ewc_state=state), timer
    trainer = AutogradTrainer(**options)
    trainer.ewc_lambda = 10.0
    trainer.ewc_tasks = [
        tuple({n: t.to(trainer.args.device) for n, t in half.items()} for half in task)
        for task in random_tasks(model.cpu(), number)
    ]  # type: ignore[misc]
    model.to(trainer.args.device)
    return trainer, timer


Seconds = dict[str, list[float]]


def measure(turns: int, steps: int, number: int, small: bool) -> tuple[Seconds, Seconds]:
    """Median seconds of a step, and those of a training by its steps, by method and turn."""
    with tempfile.TemporaryDirectory() as folder:
        methods = ("no state", "EWC") if small else ("plain", "EWC", "autograd")
        trainers = {m: make_trainer(m, folder, steps, number, small) for m in methods}
        medians: Seconds = {method: [] for method in methods}
        trainings: Seconds = {method: [] for method in methods}
        for turn in range(turns + 1):
            for method, (trainer, timer) in trainers.items():
                timer.seconds.clear()
                begin = now()
                trainer.train()
                if turn:
                    trainings[method].append((now() - begin) / steps)
                    medians[method].append(statistics.median(timer.seconds))
    return medians, trainings


def ratios_to(base: str, seconds: Seconds) -> dict[str, float]:
    """Each method's seconds by those of `base` in the same turn, the median over turns."""
    return {
        method: statistics.median(one / two for one, two in zip(own, seconds[base], strict=True))
        for method, own in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=7, help="turns of each trainer that count")
    parser.add_argument("--steps", type=int, help="steps in a turn; 5, with --small 60")
    parser.add_argument("--tasks", type=int, help="consolidated tasks; 10, with --small 1")
    parser.add_argument("--small", action="store_true", help="an MLP in place of BERT")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the figures as JSON to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    steps, tasks = options.steps or (60 if options.small else 5), options.tasks
    tasks = tasks or (1 if options.small else 10)
    medians, trainings = measure(options.turns, steps, tasks, options.small)
    base = next(iter(medians))
    ratios, whole = ratios_to(base, medians), ratios_to(base, trainings)
    print(f"{'method':<10} {'seconds':>8} {'× ' + base:>10} {'training':>10}   ({tasks} tasks)")
    for method, ratio in ratios.items():
        seconds = statistics.median(medians[method])
        print(f"{method:<10} {seconds:8.4f} {ratio:10.3f} {whole[method]:10.3f}")
    figures = {"ratios": ratios, "training_ratios": whole, "seconds": medians, "tasks": tasks}
    write_json(options.out, figures)


if __name__ == "__main__":
    main()
