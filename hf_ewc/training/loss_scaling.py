"""Whether a model's loss really is divided by the number of items it is given.

The Trainer passes `num_items_in_batch` to every model whose forward takes `**kwargs`, and then
neither divides the loss by the accumulation steps nor averages it over processes itself. Several
heads take the number and ignore it (transformers issue 47688), so their task gradient is too large
by accumulation steps × processes, and λ would change its meaning with both.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from hf_ewc.parameters.names import unwrap

logger = logging.getLogger("hf_ewc")
INCONCLUSIVE, IGNORES, USES = 0, 1, 2
# (model, inputs, num_items_in_batch=n) → the loss, as `Trainer.compute_loss` is called.
ComputeLoss = Callable[..., Any]


def item_count_use(
    model: nn.Module,
    inputs: Mapping[str, Any],
    num_items: Tensor | int,
    compute_loss: ComputeLoss | None = None,
) -> int:
    """Compare the loss of one batch for n and for 2n items: IGNORES, USES or INCONCLUSIVE.

    Runs in eval mode without gradients, and leaves mode and random numbers as they were.
    INCONCLUSIVE where the batch has no finite loss, or one of zero: any divisor leaves those alone.
    """
    compute_loss = compute_loss or _models_loss
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(_devices(inputs)):
            once, twice = (
                compute_loss(model, dict(inputs), num_items_in_batch=num_items * factor)
                for factor in (1, 2)
            )
    finally:
        for module in training:
            module.training = True
    if not isinstance(once, Tensor) or not isinstance(twice, Tensor):
        return INCONCLUSIVE
    if not torch.isfinite(once).all() or not once.any():
        return INCONCLUSIVE
    return IGNORES if torch.allclose(once, twice, rtol=1e-3, atol=0.0) else USES


def _models_loss(model: nn.Module, inputs: Mapping[str, Any], **items: Any) -> Any:
    outputs = model(**inputs, **items)
    return outputs.get("loss") if isinstance(outputs, dict) else outputs[0]


def _devices(inputs: Mapping[str, Any]) -> list[torch.device]:
    """The CUDA devices of the inputs; the CPU's generator is always kept by `fork_rng`."""
    found = {value.device for value in inputs.values() if isinstance(value, Tensor)}
    return [device for device in found if device.type == "cuda"]


def correct_loss_scaling(
    trainer: Trainer,
    model: nn.Module,
    inputs: Mapping[str, Any],
    num_items: Tensor | int | None,
    compute_loss: ComputeLoss | None = None,
) -> bool:
    """Let `trainer` scale the loss itself if the number of items is ignored; a collective.

    Says so in the log.

    Args:
        compute_loss: the trainer's own way to a loss, which is then looked at; None: the model's.

    Returns:
        Whether the question is settled; if not, this batch did not tell.
    """
    if num_items is None or not _expects_scaled_loss(trainer):
        return True
    plain = unwrap(model)
    use = item_count_use(plain, trainer._prepare_inputs(dict(inputs)), num_items, compute_loss)
    # The ranks have to agree: the number of items is summed over them.
    use = int(trainer.accelerator.gather(torch.tensor([use], device=trainer.args.device)).max())
    if use != IGNORES:
        return use == USES
    trainer.model_accepts_loss_kwargs = False
    if trainer.is_world_process_zero():
        matters = trainer.args.gradient_accumulation_steps * trainer.args.world_size > 1
        logger.log(
            logging.WARNING if matters else logging.INFO,
            "%s takes num_items_in_batch and ignores it (transformers issue 47688); the loss is "
            "now divided by the accumulation steps, so that ewc_lambda keeps its meaning.",
            type(plain if compute_loss is None else trainer).__name__,
        )
    return True


def has_own_loss(trainer_type: type, mixin: type) -> bool:
    """Whether a class between `mixin` and the Trainer computes the loss in its own way."""
    return any("compute_loss" in vars(c) and c not in (mixin, Trainer) for c in trainer_type.mro())


def answers_for_itself(trainer_type: type) -> bool:
    """Whether a trainer's own class says if its loss is scaled, as TRL's trainers do."""
    return any("loss_is_scaled_for_ga" in vars(c) and c is not Trainer for c in trainer_type.mro())


def _expects_scaled_loss(trainer: Trainer) -> bool:
    """Whether the Trainer takes the loss to be scaled already because the model is to do so."""
    return (
        trainer.model_accepts_loss_kwargs
        and trainer.compute_loss_func is None
        and trainer.label_smoother is None
        and getattr(trainer, "loss_is_scaled_for_ga", None) is None
    )
