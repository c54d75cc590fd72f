"""DeepSpeed, whose engine takes the optimizer's step inside `backward`, on ZeRO's gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_ewc.parameters import sharding
from hf_ewc.training import adapted_term
from hf_ewc.training.adapted_term import AdaptedTerm
from hf_ewc.training.fused import Piece, value_and_gradient
from hf_ewc.training.gradients import Access
from hf_ewc.training.penalty import AnyTerm, Penalty, piece


def around_each_step(engine: Any, before: Callable[[], None], after: Callable[[], None]) -> None:
    """Call `before` and `after` each optimizer step of `engine`, when gradients are reduced.

    Called by Accelerate at the end of an accumulation window only. What was given earlier is
    replaced.
    """
    step = getattr(engine.step, "without_ewc", engine.step)

    @functools.wraps(step)
    def with_action(*args: Any, **kwargs: Any) -> Any:
        before()
        result = step(*args, **kwargs)
        after()
        return result

    with_action.without_ewc = step  # type: ignore[attr-defined]
    engine.step = with_action


@torch.no_grad()
def add_gradients(penalty: Penalty, engine: Any) -> Tensor:
    """As `penalty.add_gradients`, on the fp32 weights and reduced gradients that ZeRO keeps.

    With ZeRO-3 each process works on its own partitions; with ZeRO-1 and 2 one parameter at a time
    is gathered. Gradients still carry the loss scale of fp16, which the engine's step removes.
    """
    loss_scale = float(getattr(engine.optimizer, "loss_scale", 1.0))
    if not any(map(_is_partitioned, _parameters_of(penalty))):
        return penalty.add_gradients(loss_scale)
    values = torch.stack([_add(term, loss_scale) for term in penalty.terms])
    # ZeRO-3 owns all parameters or none.
    return sharding.summed_over_parts(values, penalty.terms[0].parameter)


@torch.no_grad()
def clear_gradients(penalty: Penalty) -> None:
    """After a step, take off the gradients that ZeRO-3 would keep.

    It overwrites what a parameter had in the next backward that reaches it; of one that is not
    reached, such as another task's head, it would keep the penalty's gradient and add to it.
    """
    from deepspeed import utils

    for parameter in (p for term in penalty.terms for p in term.trained):
        if sharding.is_zero3(parameter):
            gradient = utils.safe_get_local_grad(parameter)
            if gradient is not None:
                utils.safe_set_local_grad(parameter, torch.zeros_like(gradient))


def _is_partitioned(parameter: Any) -> bool:
    """Whether ZeRO holds this parameter's gradient itself, in place of `.grad`.

    The same in every process: ZeRO-1 and 2 give the mapping to all, and fill it for the owners.
    """
    return sharding.is_zero3(parameter) or hasattr(parameter, "_hp_mapping")


def _parameters_of(penalty: Penalty) -> list[Tensor]:
    return [p for term in penalty.terms for p in (term.parameter, *term.trained)]


def _add(term: AnyTerm, loss_scale: float) -> Tensor:
    """Add one term's gradient; its value over what this process holds of it."""
    from deepspeed import utils

    if isinstance(term, AdaptedTerm):
        access = Access(_whole_fp32, _add_whole, _refuse_base)
        return adapted_term.value_and_gradient(term, loss_scale, access).float()
    if not term.is_pulled:
        device = sharding.local_part(term.parameter).device
        frozen = [piece(term, with_gradient=False)] if term.strength > 0 else []
        return value_and_gradient(frozen).sum().to(device, torch.float32)

    zero3 = sharding.is_zero3(term.parameter)
    weights = utils.safe_get_local_fp32_param if zero3 else utils.safe_get_full_fp32_param
    read = utils.safe_get_local_grad if zero3 else utils.safe_get_full_grad
    write = utils.safe_set_local_grad if zero3 else utils.safe_set_full_grad
    theta, gradient = weights(term.parameter), read(term.parameter)
    total = gradient.detach().float().clone()
    own = Piece(
        theta.detach().reshape(-1),
        term.importance.to(theta.device),
        term.anchor.to(theta.device),
        total.view(-1),
        term.strength,
        term.scale,
        term.index,
    )
    value = value_and_gradient([own], loss_scale)[0]
    write(term.parameter, total.to(gradient.dtype))
    return value.float()


def _whole_fp32(parameter: nn.Parameter) -> Tensor:
    """A factor of an adapter as the optimizer holds it; as it is, where that has none."""
    from deepspeed import utils

    found = utils.safe_get_full_fp32_param(parameter) if _is_partitioned(parameter) else None
    return sharding.whole_values(parameter) if found is None else found.detach()


def _add_whole(parameter: nn.Parameter, gradient: Tensor) -> None:
    from deepspeed import utils

    held = utils.safe_get_full_grad(parameter)
    total = held.float() + gradient.reshape(held.shape).to(held.device)
    utils.safe_set_full_grad(parameter, total.to(held.dtype))


def _refuse_base(parameter: nn.Parameter, gradient: Tensor) -> None:
    raise ValueError(
        "A weight is trained together with the adapter on it, which is not supported under "
        "DeepSpeed. Freeze the weights under adapters."
    )
