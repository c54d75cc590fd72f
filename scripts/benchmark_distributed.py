"""How much faster the Fisher gets with a second process, of one thread each.

    python scripts/benchmark_distributed.py --out benchmarks/distributed.json

Protocol: a BERT of 22.7 million parameters (6 layers, 384 wide), 128 examples of 64 random tokens,
fp32, exact Fisher of two classes, batches of 8, on the CPU. Two processes are started once and
connected by gloo, each with one thread. In each turn rank 0 estimates the Fisher alone while rank 1
waits at a barrier; then both estimate it together. Each is timed by the wall clock, from one
barrier to the next, so that the slower process counts; start-up and the first turn are left out.
The ratio is the median over turns of (seconds on two processes) / (seconds on one). It needs two
idle cores: what else runs on them slows two processes more than one. On a busy machine look at the
same ratio in CPU time, of the process that used more of it: all that a process computes and sends
counts there, waiting for the other does not. The largest relative difference of a tensor between
both Fishers is printed as well.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from benchmark_model import VOCABULARY, make_model
from machine import write_json
from transformers.utils import logging

from hf_ewc import Fisher, estimate_fisher
from hf_ewc.processes import leave

LENGTH, BATCH = 64, 8
GOAL = 0.6

# In the place of an accelerator: this process alone, although others are connected.
ALONE: Any = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"))


def make_examples(number: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1000, VOCABULARY, (number, LENGTH), generator=generator)
    return [{"input_ids": row, "labels": i % 2} for i, row in enumerate(tokens)]


def seconds_of(action: Callable[[], object]) -> tuple[float, float]:
    """Wall time from a barrier of all processes to the next, and the most CPU time of a process."""
    dist.barrier()
    begin, used = time.perf_counter(), time.process_time()
    action()
    used = time.process_time() - used
    dist.barrier()
    wall, most = time.perf_counter() - begin, torch.tensor(used)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return wall, most.item()


def measure(rank: int, folder: str, turns: int, number: int) -> None:
    """One process: take part in all turns; rank 0 leaves the figures in `folder`."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model, examples = make_model(), make_examples(number)
    found: dict[str, Fisher] = {}

    def estimate(key: str, accelerator: Any) -> None:
        found[key] = estimate_fisher(
            model, examples, fisher_type="exact", batch_size=BATCH, accelerator=accelerator
        )

    def alone() -> None:
        if rank == 0:
            estimate("alone", ALONE)

    figures: dict[str, Any] = {f"{c}_{n}": [] for c in ("wall", "cpu") for n in ("one", "two")}
    for turn in range(turns + 1):
        one, two = seconds_of(alone), seconds_of(lambda: estimate("together", None))
        if turn:
            for key, value in zip(figures, (one[0], two[0], one[1], two[1]), strict=True):
                figures[key].append(value)
    if rank == 0:
        figures["difference"] = largest_difference(found["together"], found["alone"])
        torch.save(figures, f"{folder}/figures")
    leave()


def largest_difference(one: Fisher, two: Fisher) -> float:
    """The largest ‖F − F'‖ / ‖F'‖ of a tensor."""
    return max(
        float((one.diagonal[name] - tensor).norm() / tensor.norm())
        for name, tensor in two.diagonal.items()
        if tensor.any()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=7, help="turns that count")
    parser.add_argument("--examples", type=int, default=128)
    parser.add_argument("--out", type=Path, help="write the figures as JSON to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, args=(folder, options.turns, options.examples), nprocs=2)
        figures = torch.load(f"{folder}/figures")
    print(f"{'':<10} {'one':>8} {'two':>8} {'ratio':>8}   (goal {GOAL})")
    for clock in ("wall", "cpu"):
        one, two = figures[f"{clock}_one"], figures[f"{clock}_two"]
        ratio = statistics.median(t / o for o, t in zip(one, two, strict=True))
        figures[f"{clock}_ratio"] = ratio
        medians = statistics.median(one), statistics.median(two)
        print(f"{clock:<10} {medians[0]:8.2f} {medians[1]:8.2f} {ratio:8.3f}")
    print(f"largest relative difference of a tensor: {figures['difference']:.1e}")
    write_json(options.out, {"goal": GOAL, **figures})


if __name__ == "__main__":
    main()
