"""Bytes a parameter that consolidating takes, at its peak and afterwards.

    python scripts/benchmark_memory.py --out runs/benchmarks/memory.json

Protocol: a Llama of 0.3 billion parameters in bf16, made from its configuration, and a Fisher of
random numbers, each case in a process of its own. "peak" is the largest resident set above the
model and libraries, from where the Fisher is there until the new state is;
"stays" is what the state holds.
"held" keeps the former state and the Fisher, as whoever has them in variables of their own does
(and as every consolidation did before tensors were let go of one by one); "let go" is what
EWCTrainer.consolidate() does. The last columns are peak and model (2 bytes a parameter) for Llamas
of 7 and of 70 billion parameters: upper bounds, since their largest tensor is a smaller share.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_ewc import EWCState, Fisher
from hf_ewc.state.consolidation import Settings

sys.path.insert(0, str(Path(__file__).parent))

from machine import write_json

FORMS = {
    "float32": {},
    "float16": {"dtype": "float16"},
    "float8": {"dtype": "float8"},
}
LARGE = {"7B": 6.74e9, "70B": 69.0e9}


def model() -> nn.Module:
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=21,
        num_attention_heads=16,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        made = LlamaForCausalLM(config).to(torch.bfloat16)
    made = made.to_empty(device="cpu")
    for parameter in made.parameters():
        parameter.data.fill_(0.5)
    made.tie_weights()
    return made


def fisher(of: nn.Module) -> Fisher:
    return Fisher({name: torch.rand(p.shape) for name, p in of.named_parameters()})


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure(form: str, tasks: int, held: bool) -> dict[str, float]:
    """One case: bytes a parameter at the peak and of the state afterwards."""
    torch.set_num_threads(1)
    llama = model()
    size = sum(p.numel() for p in llama.parameters())
    before = resident()
    state, kept = EWCState(), []
    for _ in range(tasks):
        found = fisher(llama)
        finish = state.begin_consolidation(found, llama, Settings(**FORMS[form]))
        if held:
            kept = [found, state]
        del found
        state = EWCState()
        state = finish()
        del finish
    kept.clear()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {
        "parameters": size,
        "peak": peak / size,
        "stays": state.nbytes / size,
    }


def in_new_process(form: str, tasks: int, held: bool) -> dict[str, float]:
    command = [sys.executable, __file__, "--case", json.dumps([form, tasks, held])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures as JSON to this file")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(*json.loads(options.case))))
        return
    results = {}
    print(f"{'':<30}{'peak':>7}{'stays':>7}{'7B':>9}{'70B':>9}")
    for form in FORMS:
        for tasks in (1, 2):
            for held in (True, False):
                figures = in_new_process(form, tasks, held)
                name = f"{form}, task {tasks}, {'held' if held else 'let go'}"
                results[name] = figures
                large = "".join(
                    f"{(2 + figures['peak']) * size / 1e9:6.0f} GB" for size in LARGE.values()
                )
                print(f"{name:<30}{figures['peak']:7.2f}{figures['stays']:7.2f}{large}", flush=True)
    write_json(options.out, {"cases": results})


if __name__ == "__main__":
    main()
