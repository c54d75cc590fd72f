"""Whether a model's loss really is divided by the number of items it is given.

The Trainer passes `num_items_in_batch` to every model whose forward takes `**kwargs`, and then
neither divides the loss by the accumulation steps nor averages it over processes itself. Several
heads take the number and ignore it (transformers issue 47688), so their task gradient is too large
by accumulation steps × processes, and λ would change its meaning with both.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from hf_ewc.parameters.names import unwrap
from hf_ewc.parameters.sharding import is_sharded
from hf_ewc.precision import widened
from hf_ewc.training.repeatable import as_if_not_run, copied, same_random_numbers

logger = logging.getLogger("hf_ewc")
# What is found out, the answer of several processes being the largest of theirs.
INCONCLUSIVE, IGNORES, USES, UNKNOWN = 0, 1, 2, 3
# (model, inputs, num_items_in_batch=n) → the loss, as `Trainer.compute_loss` is called.
ComputeLoss = Callable[..., Any]


def correct_loss_scaling(
    trainer: Trainer,
    model: nn.Module,
    inputs: Mapping[str, Any],
    num_items: Tensor | int | None,
    compute_loss: ComputeLoss | None = None,
) -> bool:
    """Let `trainer` scale the loss itself if the number of items is ignored; a collective.

    Looks only where it matters: with several accumulation steps or processes. Says in the log what
    was changed, or could not be found out.

    Args:
        compute_loss: the trainer's own way to a loss, which is then looked at; None: the model's.

    Returns:
        Whether the question is settled; if not, this batch did not tell.
    """
    args = trainer.args
    matters = args.gradient_accumulation_steps * args.world_size * max(args.n_gpu, 1) > 1
    if num_items is None or not matters or not _expects_scaled_loss(trainer):
        return True
    plain, problem = unwrap(model), None
    try:
        use = _item_count_use(trainer, plain, inputs, num_items, compute_loss or _models_loss)
    except Exception as error:
        use, problem = UNKNOWN, error
    # The ranks have to agree: the number of items is summed over them.
    use = int(trainer.accelerator.gather(torch.tensor([use], device=trainer.args.device)).max())
    owner = type(plain if compute_loss is None else trainer).__name__
    if use == UNKNOWN and trainer.is_world_process_zero():
        logger.warning(
            "It could not be found out whether the loss of %s is divided by num_items_in_batch%s. "
            "It is taken to be; where it is a mean over the batch, set loss_is_scaled_for_ga = "
            "False on the trainer, or the task weighs too much against the EWC penalty.",
            owner,
            f" ({type(problem).__name__}: {problem})" if problem else "",
        )
    if use != IGNORES:
        return use in (USES, UNKNOWN)
    trainer.model_accepts_loss_kwargs = False
    if trainer.is_world_process_zero():
        logger.warning(
            "%s takes num_items_in_batch and ignores it (transformers issue 47688); the loss is "
            "now divided by the accumulation steps, so that ewc_lambda keeps its meaning.",
            owner,
        )
    return True


def _item_count_use(
    trainer: Trainer,
    model: nn.Module,
    inputs: Mapping[str, Any],
    num_items: Tensor | int,
    compute_loss: ComputeLoss,
) -> int:
    """Compare losses of one batch under the conditions of training, and leave all as it was.

    Each begins with the same random numbers, on inputs of its own, with gradients; but where
    parameters are in shards, a forward that no backward follows is left without a graph.
    """
    owners = [trainer, *model.modules()]
    with_graph = not any(map(is_sharded, model.parameters()))
    with as_if_not_run(trainer, model), torch.set_grad_enabled(with_graph):
        prepared = trainer._prepare_inputs(copied(inputs))

        def loss(factor: int) -> float:
            with same_random_numbers(owners):
                found = compute_loss(model, copied(prepared), num_items_in_batch=num_items * factor)
            return float(widened(found.detach()).mean()) if isinstance(found, Tensor) else 0.0

        return judged(loss(1), loss(1), loss(2))


def judged(once: float, again: float, doubled: float) -> int:
    """What the losses for n, again n, and 2n items say: IGNORES, USES, INCONCLUSIVE or UNKNOWN.

    INCONCLUSIVE if they are not finite or zero: any divisor leaves those alone. A loss that differs
    for the same n is compared roughly: it is halved, or it is not.
    """
    if not all(map(math.isfinite, (once, again, doubled))) or once == 0.0:
        return INCONCLUSIVE
    if abs(once - again) <= 1e-5 * abs(once):
        return IGNORES if abs(once - doubled) <= 1e-3 * abs(once) else USES
    share = 2 * doubled / (once + again)
    return USES if abs(share - 0.5) < 0.1 else IGNORES if abs(share - 1) < 0.2 else UNKNOWN


def _models_loss(model: nn.Module, inputs: Mapping[str, Any], **items: Any) -> Any:
    outputs = model(**inputs, **items)
    return outputs.get("loss") if isinstance(outputs, dict) else outputs[0]


def has_own_loss(trainer: Trainer, mixin: type) -> bool:
    """Whether the trainer, or a class between `mixin` and the Trainer, computes its own loss."""
    if "compute_loss" in vars(trainer):
        return True
    kinds = type(trainer).mro()
    return any("compute_loss" in vars(c) and c not in (mixin, Trainer) for c in kinds)


def has_users_loss(trainer: Trainer) -> bool:
    """Whether a trainer's loss is written outside of this package and the Trainer."""
    own = (c for c in type(trainer).mro() if "compute_loss" in vars(c) and c is not Trainer)
    outside = any(not c.__module__.startswith("hf_ewc.") for c in own)
    return outside or "compute_loss" in vars(trainer) or trainer.compute_loss_func is not None


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
