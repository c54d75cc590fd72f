"""What `run_tasks` costs beside the training itself, on the handwritten digits.

    python scripts/benchmark_tasks.py --turns 3 --out benchmarks/tasks.json

Five tasks of two digits, the small vision transformer of the digits recipe, no EWC. In each turn
the same training is done by `run_tasks` and by a bare loop that makes a `Trainer` for each task and
calls `train()`; both end with the same weights. Printed are seconds of CPU time, medians over the
turns: of the bare loop, of `run_tasks`, and of its parts. Written as JSON with hardware and commit.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Trainer, TrainingArguments, set_seed

sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))
from digits_vit import digit_tasks, small_vit
from machine import write_json

from hf_ewc import run_tasks
from hf_ewc.tasks import task_run
from hf_ewc.tasks.record import Record

PARTS: dict[str, tuple[Any, str]] = {
    "train": (Trainer, "train"),
    "evaluate": (task_run, "evaluate"),
    "save the model": (Trainer, "save_model"),
    "results and report": (Record, "write"),
}


@contextmanager
def timed(seconds: dict[str, float]) -> Iterator[None]:
    """Add up the time in each of PARTS."""
    originals = {name: getattr(owner, attribute) for name, (owner, attribute) in PARTS.items()}

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            begin = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name] = seconds.get(name, 0.0) + time.process_time() - begin

        return run

    for name, (owner, attribute) in PARTS.items():
        setattr(owner, attribute, watched(name, originals[name]))
    try:
        yield
    finally:
        for name, (owner, attribute) in PARTS.items():
            setattr(owner, attribute, originals[name])


def arguments(folder: Path, epochs: float) -> TrainingArguments:
    return TrainingArguments(
        str(folder),
        learning_rate=1e-3,
        num_train_epochs=epochs,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=256,
        lr_scheduler_type="constant",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
        max_grad_norm=0.0,
    )


def by_loop(folder: Path, epochs: float) -> torch.nn.Module:
    set_seed(0)
    model = small_vit()
    for index, task in enumerate(digit_tasks(validation=False)):
        args = arguments(folder, epochs)
        args.seed += index
        Trainer(model=model, args=args, train_dataset=task.train_dataset).train()
    return model


def by_run_tasks(folder: Path, epochs: float) -> torch.nn.Module:
    set_seed(0)
    tasks = digit_tasks(validation=False)
    return run_tasks(small_vit(), tasks, arguments(folder, epochs), mask_training=False).model


def turn(epochs: float) -> dict[str, float]:
    """Seconds of both, one after the other, and of the parts of `run_tasks`."""
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        begin = time.process_time()
        bare = by_loop(Path(folder) / "loop", epochs)
        seconds["bare loop"] = time.process_time() - begin
        begin = time.process_time()
        with timed(seconds):
            found = by_run_tasks(Path(folder) / "tasks", epochs)
        seconds["run_tasks"] = time.process_time() - begin
    for one, other in zip(bare.parameters(), found.parameters(), strict=True):
        if not torch.equal(one, other):
            raise SystemExit("the two did not train alike")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    turn(0.1)  # imports and first calls
    turns = [turn(options.epochs) for _ in range(options.turns)]
    found = {name: statistics.median(each[name] for each in turns) for name in turns[0]}
    found["everything else"] = found["run_tasks"] - sum(found[name] for name in PARTS)
    found["ratio"] = statistics.median(each["run_tasks"] / each["bare loop"] for each in turns)
    for name, value in found.items():
        print(f"{name:20} {value:8.3f}")
    write_json(options.out, {"epochs": options.epochs, "seconds": found, "turns": turns})


if __name__ == "__main__":
    main()
