"""Likelihoods of preferences: the data are pairs, and one example is one pair.

Bradley–Terry: p(chosen ≻ rejected) = σ(r_chosen − r_rejected), with r the model's reward (reward
trainers), or DPO's implicit one, r = β log (π(y|x) / π_ref(y|x))  (Rafailov et al. 2023, arXiv
2305.18290, equation 7).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import Trainer

Likelihood = Callable[[nn.Module, dict[str, Any]], Tensor]
Collator = Callable[[list[Any]], Any]
# What is no argument of the model's forward.
_BESIDE = ("completion_mask", "margin", "reference", "ref_chosen_logps", "ref_rejected_logps")


def preferences_of(trainer: Trainer) -> tuple[Likelihood, Callable[[Collator], Collator]] | None:
    """The likelihood of a trainer on pairs, and what makes pairs of its collator's batches.

    None for any other trainer.

    Raises:
        ValueError: its loss is not the negative logarithm of such a probability.
    """
    if _is_one(trainer, "reward_trainer", "RewardTrainer"):
        return _reward_likelihood, pairs
    if _is_one(trainer, "dpo_trainer", "DPOTrainer"):
        _check_dpo(trainer)
        return _dpo_likelihood(trainer), lambda collator: _with_reference(trainer, pairs(collator))
    return None


def _is_one(trainer: Trainer, module: str, name: str) -> bool:
    """Whether this is one of TRL's; looked up, not imported: it is one only if that is loaded."""
    kind = getattr(sys.modules.get(f"trl.trainer.{module}"), name, None)
    return isinstance(kind, type) and isinstance(trainer, kind)


def _check_dpo(trainer: Any) -> None:
    losses = list(getattr(trainer, "loss_types", ["sigmoid"]))
    divergence = getattr(trainer, "f_divergence_type", "reverse_kl")
    if getattr(trainer, "use_weighting", False):
        raise ValueError(
            "DPO with use_weighting=True weighs each pair by its answers' probabilities, which is "
            "no likelihood of preferences that is known here; pass log_likelihood= a function of "
            "(model, batch) that returns the log of each pair's probability."
        )
    if losses != ["sigmoid"] or divergence != "reverse_kl" or getattr(trainer, "ld_alpha", None):
        raise ValueError(
            f"DPO with loss_type={losses}, f_divergence_type={divergence!r}, "
            f"ld_alpha={getattr(trainer, 'ld_alpha', None)} is no likelihood of preferences that "
            "is known here; pass log_likelihood= a function of (model, batch) that returns the log "
            "of each pair's probability."
        )


def pairs(collator: Collator) -> Collator:
    """Of batches (2B, …), all chosen before all rejected, ones (B, 2, …): a row for each pair."""

    def collate(examples: list[Any]) -> Any:
        batch, size = collator(examples), len(examples)

        def paired(value: Any) -> Any:
            if isinstance(value, Tensor) and value.dim() and value.shape[0] == 2 * size:
                return torch.stack([value[:size], value[size:]], dim=1)
            return value

        return {name: paired(value) for name, value in batch.items()}

    return collate


def _rows(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The forward's arguments with a row for each answer, those of a pair together."""
    return {
        name: value.flatten(0, 1) if isinstance(value, Tensor) and value.dim() > 2 else value
        for name, value in batch.items()
        if name not in _BESIDE
    }


def _reward_likelihood(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """log σ(r_chosen − r_rejected − margin) of each pair, (B,)."""
    rewards: Tensor = model(**_rows(batch), use_cache=False).logits.float().view(-1, 2)
    difference = rewards[:, 0] - rewards[:, 1]
    margin = batch.get("margin")
    return logsigmoid(difference if margin is None else difference - margin)


def _dpo_likelihood(trainer: Any) -> Likelihood:
    def likelihood(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """log σ(β [(log π − log π_ref)(chosen) − (log π − log π_ref)(rejected)]), (B,)."""
        ratios = _log_probabilities(model, batch) - batch["reference"]
        return logsigmoid(float(trainer.beta) * (ratios[:, 0] - ratios[:, 1]))

    return likelihood


def _log_probabilities(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """log π(y|x) of both answers, summed over their tokens, (B, 2)."""
    logits = model(**_rows(batch), use_cache=False).logits
    tokens, mask = batch["input_ids"].flatten(0, 1), batch["completion_mask"].flatten(0, 1)
    logits = logits[:, -tokens.shape[1] :][:, :-1].float()  # without virtual tokens of a prompt
    found = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    sums: Tensor = (found * mask[:, 1:]).sum(1).view(-1, 2)
    return sums


def _with_reference(trainer: Any, collator: Collator) -> Collator:
    """Batches with `reference`, log π_ref of both answers, (B, 2)."""

    def collate(examples: list[Any]) -> Any:
        batch = collator(examples)
        if "ref_chosen_logps" in batch:
            names = ("ref_chosen_logps", "ref_rejected_logps")
            return {**batch, "reference": torch.stack([batch[name] for name in names], dim=1)}
        moved = {
            name: value.to(trainer.accelerator.device) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }
        with torch.no_grad(), _adapter_as_it_was(trainer):
            reference = _log_probabilities(trainer.ref_model or trainer.model, moved)
        return {**batch, "reference": reference}

    return collate


def _adapter_as_it_was(trainer: Any) -> AbstractContextManager[Any]:
    """Under PEFT without a model of its own, the reference is the model without its adapter."""
    if trainer.ref_model is not None:
        return nullcontext()
    from trl.trainer.utils import use_adapter

    model = trainer.accelerator.unwrap_model(trainer.model)
    found: AbstractContextManager[Any] = use_adapter(
        model, adapter_name="ref" if "ref" in model.peft_config else None
    )
    return found
