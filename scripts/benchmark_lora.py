"""What EWC costs in one step of LoRA, in the space of the weights and in that of the adapter.

    python scripts/benchmark_lora.py --out benchmarks/lora.json

Protocol: a Llama of 100 million parameters (12 layers, 768 wide), LoRA with r = 8 on all linear
maps, batches of 4 × 128 random tokens, fp32, AdamW. Three trainers take turns, a few steps each, in
one process: the plain Trainer; EWCTrainer with a state of the weights under the adapters; and
EWCTrainer with a state of the adapter's own parameters. Steps are timed and compared as
`benchmark_step.py` does it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from benchmark_step import StepTimer
from machine import write_json
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from hf_ewc import EWCConfig, EWCState, EWCTrainer
from hf_ewc.parameters.adapted_weight import AdaptedWeight
from hf_ewc.parameters.adapters import weights_by_name

VOCABULARY = 16384


class RandomText(Dataset[dict[str, Tensor]]):
    """Sequences of random tokens, each the label of the one before."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return 1 << 16

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(i)
        tokens = torch.randint(VOCABULARY, (self.length,), generator=generator)
        return {"input_ids": tokens, "labels": tokens.clone()}


def make_model() -> PeftModel:
    set_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        intermediate_size=2048,
        tie_word_embeddings=True,
    )
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    return get_peft_model(LlamaForCausalLM(config), lora)


def state_of(model: PeftModel, space: str) -> EWCState:
    """Random importances around the model as it is."""
    if space == "adapter":
        held = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    else:
        weights = weights_by_name(model)
        held = {n: w.base.detach() for n, w in weights.items() if isinstance(w, AdaptedWeight)}
    importance = {name: 1e-4 * torch.rand_like(value) for name, value in held.items()}
    return EWCState(importance, held)


def make_trainer(space: str | None, folder: str, args: argparse.Namespace) -> Trainer:
    model = make_model()
    training = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=args.batch_size,
        max_steps=args.steps,
        logging_steps=1000,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
    )
    options = {"model": model, "args": training, "train_dataset": RandomText(args.length)}
    if space is None:
        return Trainer(**options)
    config = EWCConfig(ewc_lambda=10.0, ewc_space=space)
    return EWCTrainer(**options, ewc_config=config, ewc_state=state_of(model, space))


def measure(args: argparse.Namespace) -> dict[str, list[float]]:
    """Median seconds of a step by method and turn."""
    with tempfile.TemporaryDirectory() as folder:
        spaces = {"plain": None, "weights": "weight", "A and B": "adapter"}
        trainers = {name: make_trainer(space, folder, args) for name, space in spaces.items()}
        timers = {name: StepTimer() for name in spaces}
        for name, trainer in trainers.items():
            trainer.add_callback(timers[name])
        medians: dict[str, list[float]] = {name: [] for name in spaces}
        for turn in range(args.turns + 1):
            for name, trainer in trainers.items():
                timers[name].seconds.clear()
                trainer.train()
                if turn:
                    medians[name].append(statistics.median(timers[name].seconds))
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=5, help="turns of each trainer that count")
    parser.add_argument("--steps", type=int, default=3, help="steps in a turn")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the figures as JSON to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    medians = measure(args)
    ratios = {
        name: statistics.median(a / b for a, b in zip(seconds, medians["plain"], strict=True))
        for name, seconds in medians.items()
    }
    print(f"{'method':<10} {'seconds':>8} {'× plain':>8}")
    for name, ratio in ratios.items():
        print(f"{name:<10} {statistics.median(medians[name]):8.3f} {ratio:8.3f}")
    write_json(args.out, {"ratios": ratios, "seconds": medians, "tokens": args.length})


if __name__ == "__main__":
    main()
