"""What a change of a language model costs, and what the diagonal of the Fisher sees of it.

    scripts/reproduce diagonal [--max_steps N]

SmolLM2-135M and the texts of `language_model`. The Fisher is taken on 32 blocks of general text,
before anything is learnt, of the weights and of the A and B of a fresh adapter; on the same blocks
the model's divergence from what it was is measured, in nats a token, beside ½ Σ F δ². The changes:
what LoRA has learnt of Shakespeare, a tenth and three tenths of it, and a random one as long.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from language_model import LanguageModelOptions, sequence_of
from options import parsed, training_arguments
from torch import Tensor, nn
from transformers import Trainer

from hf_ewc import EWCConfig, EWCState, EWCTrainer
from hf_ewc.report.tables import table

SPACES = ("weight", "adapter")
SHARES = (0.1, 0.3, 1.0)
BLOCKS = 32


@torch.no_grad()
def log_probabilities(model: nn.Module, blocks: Any) -> list[Tensor]:
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        every = [model(input_ids=torch.tensor(row["input_ids"])[None]).logits[0] for row in blocks]
    return [logits.float().log_softmax(-1) for logits in every]


def divergence(before: list[Tensor], after: list[Tensor]) -> float:
    """KL(before ‖ after), the mean over all positions."""
    each = [(p.exp() * (p - q)).sum(-1) for p, q in zip(before, after, strict=True)]
    return float(torch.cat(each).mean())


def states_of(model: nn.Module, data: Any, args: Any) -> dict[str, EWCState]:
    found = {}
    for space in SPACES:
        config = EWCConfig(ewc_space=space, fisher_samples=BLOCKS, fisher_type="sampled")
        trainer = EWCTrainer(model=model, args=args, train_dataset=data, ewc_config=config)
        found[space] = trainer.consolidate(name="general text")
    return found


def seen_by(state: EWCState, space: str, model: nn.Module, data: Any, args: Any) -> float:
    """½ Σ F δ², per label."""
    config = EWCConfig(ewc_lambda=1.0, ewc_space=space)
    trainer = EWCTrainer(
        model=model, args=args, train_dataset=data, ewc_config=config, ewc_state=state
    )
    return float(trainer.ewc_penalty())


def held(model: Any, state: EWCState) -> dict[str, nn.Parameter]:
    """The weights under the adapter that the state has an importance of, by its names."""
    found = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): parameter
        for name, parameter in model.named_parameters()
    }
    return {name: found[name] for name in state.importance}


@torch.no_grad()
def add(weights: Mapping[str, nn.Parameter], change: Mapping[str, Tensor], sign: float) -> None:
    for name, weight in weights.items():
        weight.add_(sign * change[name])


def random_change(weights: Mapping[str, nn.Parameter], length: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(w.shape, generator=generator) for name, w in weights.items()}
    whole = sum(float(each.square().sum()) for each in drawn.values()) ** 0.5
    return {name: each * (length / whole) for name, each in drawn.items()}


def learnt_length(model: Any) -> float:
    """√Σ (s B A)² over all layers."""
    layers = [m for m in model.modules() if hasattr(m, "get_delta_weight")]
    return sum(float(m.get_delta_weight("default").detach().square().sum()) for m in layers) ** 0.5


def row(name: str, cost: float, seen: Mapping[str, float]) -> list[str]:
    cells = [f"{seen[s]:.2g} (1/{cost / seen[s]:.3g})" if s in seen else "" for s in SPACES]
    return [name, f"{cost:.2g}", *cells]


def main() -> None:
    options: LanguageModelOptions = parsed("diagonal", kind=LanguageModelOptions)
    sequence = sequence_of(options)
    general, shakespeare = (task.train_dataset for task in sequence.tasks[:2])
    args = training_arguments(Path(str(options.output_dir)), options, **sequence.training)
    torch.manual_seed(0)
    model = sequence.make_model()
    states = states_of(model, general, args)
    blocks = general.select(range(BLOCKS))
    before = log_probabilities(model, blocks)
    Trainer(model=model, args=args, train_dataset=shakespeare).train()
    factors = {n: p for n, p in model.named_parameters() if "lora_B" in n}
    ends = {name: p.detach().clone() for name, p in factors.items()}
    length, rows = learnt_length(model), []
    for share in (0.0, *SHARES):
        with torch.no_grad():
            for name, parameter in factors.items():
                parameter.copy_(share * ends[name])
        if share == 0.0:
            weights = held(model, states["weight"])
            change = random_change(weights, length)
            add(weights, change, 1.0)
            cost = divergence(before, log_probabilities(model, blocks))
            add(weights, change, -1.0)
            importance = states["weight"].importance
            seen = sum(float((importance[n] * change[n].square()).sum()) for n in weights)
            rows.append(row(f"random, of length {length:.1f}", cost, {"weight": 0.5 * seen}))
            continue
        cost = divergence(before, log_probabilities(model, blocks))
        found = {s: seen_by(states[s], s, model, shakespeare, args) for s in SPACES}
        rows.append(row(f"{share:g} of what LoRA learnt", cost, found))
    head = ["change", "divergence", "½ Σ F δ² of the weights", "of A and B"]
    print(table(head, rows))


if __name__ == "__main__":
    main()
