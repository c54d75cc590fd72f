"""What the smaller forms of the state cost: its size, and the error of the penalty.

    python scripts/benchmark_state.py --out runs/benchmarks/state.json

Protocol: the digits recipe's ViT learns 0/1 and is consolidated (exact Fisher, all examples), then
learns 2/3 without protection, which moves it as far as a next task does. For each form of the state
the size on disk and in memory is compared with fp32, and the penalty at the moved weights with the
fp32 state's: its value, and its gradient's direction (cosine) and length.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, set_seed

from hf_ewc import EWCState, estimate_fisher

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from digits_vit import digit_tasks, small_vit
from machine import write_json

FORMS = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "float8": {"dtype": "float8"},
    "keep 50 %": {"keep_fraction": 0.5},
    "keep 10 %": {"keep_fraction": 0.1},
    "keep 10 %, float16": {"keep_fraction": 0.1, "dtype": torch.float16},
}


def learn(model: nn.Module, examples: object, folder: str) -> None:
    args = TrainingArguments(
        folder,
        num_train_epochs=10,
        per_device_train_batch_size=32,
        learning_rate=1e-3,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    Trainer(model=model, args=args, train_dataset=examples).train()


def penalty_and_gradient(state: EWCState, model: nn.Module) -> tuple[float, Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    value = state.penalty(model)
    gradients = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
    return float(value.detach()), torch.cat([gradient.flatten() for gradient in gradients])


def size_on_disk(state: EWCState) -> int:
    with tempfile.TemporaryDirectory() as folder:
        state.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).iterdir())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures as JSON to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    set_seed(0)
    first, second = digit_tasks(validation=False)[:2]
    model = small_vit()
    with tempfile.TemporaryDirectory() as folder:
        learn(model, first.train_dataset, folder)
        fisher = estimate_fisher(model, first.train_dataset, fisher_type="exact", batch_size=32)
        whole = EWCState().consolidate(fisher, model)
        learn(model, second.train_dataset, folder)
    expected, pull = penalty_and_gradient(whole, model)
    disk, memory = size_on_disk(whole), whole.nbytes
    results = {}
    print(f"{'form':<20}{'disk':>7}{'memory':>8}{'penalty':>9}{'cosine':>8}{'length':>8}")
    for name, form in FORMS.items():
        state = whole.pack(**form)
        value, gradient = penalty_and_gradient(state, model)
        figures = {
            "disk": size_on_disk(state) / disk,
            "memory": state.nbytes / memory,
            "penalty": value / expected,
            "cosine": float(nn.functional.cosine_similarity(gradient, pull, dim=0)),
            "length": float(gradient.norm() / pull.norm()),
        }
        results[name] = figures
        print(
            f"{name:<20}{figures['disk']:7.2f}{figures['memory']:8.2f}{figures['penalty']:9.4f}"
            f"{figures['cosine']:8.4f}{figures['length']:8.4f}"
        )
    write_json(options.out, {"forms": results})


if __name__ == "__main__":
    main()
