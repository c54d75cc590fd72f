"""Peak memory of the Fisher of a language model beside that of a plain training step.

    python scripts/benchmark_lm_memory.py --out runs/benchmarks/lm_memory.json

Protocol: a Llama of two layers and 64 units, vocabulary 49,152 with tied embeddings, fp32, random
texts of T tokens in batches of B, on the CPU in one thread. The plain step is the forward with
labels and the backward, of two batches in a row; beside it stands `estimate_fisher` on the same two
batches. Each runs in a process of its own after a small step that loads everything; what is counted
is the largest resident memory above what the process had then (Linux). A ratio of 1 is the plain
step's memory.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_ewc import estimate_fisher

sys.path.insert(0, str(Path(__file__).parent))

from machine import write_json

CASES = ("plain", "empirical", "sampled", "auto")
VOCABULARY = 49_152
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak() -> float:
    """The largest resident memory so far, in MiB."""
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def step(model: LlamaForCausalLM, texts: torch.Tensor) -> None:
    model(input_ids=texts, labels=texts).loss.backward()


def run(case: str, batch_size: int, length: int) -> None:
    """Print the peak of one case above the start, in MiB."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    texts = torch.randint(VOCABULARY, (2 * batch_size, length))
    step(model, texts[:2, :8])
    start = peak()
    _CLEAR.write_text("5", encoding="ascii")
    if case == "plain":
        for batch in texts.split(batch_size):
            step(model, batch)
    else:
        model.zero_grad(set_to_none=True)
        examples = [{"input_ids": text, "labels": text} for text in texts]
        estimate_fisher(model, examples, fisher_type=case, batch_size=batch_size)
    print(peak() - start)


def measured(case: str, batch_size: int, length: int) -> float:
    sizes = ["--batch-size", str(batch_size), "--length", str(length)]
    found = subprocess.run(
        [sys.executable, __file__, "--case", case, *sizes],
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode:
        raise SystemExit(found.stderr)
    return float(found.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--case", choices=CASES, help="measure this one in this process")
    parser.add_argument("--out", type=Path, help="write the figures as JSON to this file")
    options = parser.parse_args()
    sizes = options.batch_size, options.length
    if options.case:
        run(options.case, *sizes)
        return
    peaks = {case: measured(case, *sizes) for case in CASES}
    for case, value in peaks.items():
        print(f"{case:<10}{value:>8.0f} MiB{value / peaks['plain']:>7.2f}")
    sized = {"batch_size": options.batch_size, "length": options.length}
    write_json(options.out, {"vocabulary": VOCABULARY, **sized, "peaks": peaks})


if __name__ == "__main__":
    main()
