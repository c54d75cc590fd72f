"""A head that grows: class-incremental learning on one softmax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_ewc.parameters.adapters import base_model
from hf_ewc.parameters.names import class_name, parameters_by_name
from hf_ewc.parameters.sharding import is_sharded
from hf_ewc.tasks.class_mask import classification_heads
from hf_ewc.tasks.replay import labels_by_example
from hf_ewc.tasks.task import Task


def classes_so_far(tasks: Sequence[Task]) -> list[int]:
    """How many classes there are after each task: the largest label so far, plus one.

    Raises:
        ValueError: a task has examples without one integer label.
    """
    found, largest = [], -1
    for task in tasks:
        labels = labels_by_example(task.train_dataset)
        if not labels or any(label is None for label in labels):
            raise ValueError(
                f"task {task.name!r} has examples without one integer label; a head that grows "
                "counts classes."
            )
        largest = max([largest, *(label for label in labels if label is not None)])
        found.append(largest + 1)
    return found


def resize(model: nn.Module, rows: int, seed: int) -> None:
    """Let the classification head have this many outputs: rows are kept, new ones initialized.

    Raises:
        ValueError: the model is in shards, or its head is inside an adapter.
    """
    inner: Any = base_model(model)
    for head in classification_heads(model):
        if head.out_features == rows:
            continue
        if is_sharded(head.weight) or inner is not model:
            raise ValueError(
                f"the head of {class_name(model)} cannot grow under an adapter or in shards."
            )
        _replace(inner, head, _resized(inner, head, rows, seed))
    config = getattr(inner, "config", None)
    if config is not None:
        names = dict(config.id2label or {})
        config.id2label = {i: names.get(i, f"LABEL_{i}") for i in range(rows)}
        config.label2id = {name: i for i, name in config.id2label.items()}
        inner.num_labels = rows


def _resized(inner: Any, head: nn.Linear, rows: int, seed: int) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        new = nn.Linear(head.in_features, rows, bias=head.bias is not None)
        if hasattr(inner, "_init_weights"):
            inner._init_weights(new)
    new.to(head.weight.device, head.weight.dtype)
    kept = min(rows, head.out_features)
    with torch.no_grad():
        new.weight[:kept] = head.weight[:kept]
        if head.bias is not None:
            new.bias[:kept] = head.bias[:kept]
    return new.train(head.training)


def _replace(inner: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for module in inner.modules():
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new


def head_parameters(model: nn.Module) -> list[str]:
    """The names of the parameters that grow."""
    own = {id(p) for head in classification_heads(model) for p in head.parameters()}
    return [name for name, p in parameters_by_name(model).items() if id(p) in own]


@torch.no_grad()
def align_weights(model: nn.Module, old: int) -> None:
    """W_new ← W_new · mean‖w_old‖ / mean‖w_new‖ (Zhao et al. 2020, arXiv 1911.07053, equation 4).

    New classes have had all examples and so the longer rows; aligned, they win no more often.

    Args:
        old: how many rows there were before the task.
    """
    for head in classification_heads(model):
        norms = head.weight.norm(dim=1)
        head.weight[old:] *= norms[:old].mean() / norms[old:].mean()


def fitted_bias(logits: Tensor, labels: Tensor, old: int) -> tuple[float, float]:
    """α > 0 and β for which softmax(z_old, α z_new + β) fits the labels best.

    Bias correction (Wu et al. 2019, arXiv 1905.13260, equation 4), by Newton-like steps in fp64:
    the least Σ −log p + ½ (log α)² + ½ β², a sum over examples. The last two terms, one example's
    worth, keep both finite where old and new classes are told apart without an error.

    Args:
        logits: [N, classes], of examples that the model was not trained on.
        labels: [N].
        old: how many classes are old.
    """
    logits, labels = logits.detach().cpu().double(), labels.cpu()
    log_alpha = torch.zeros((), dtype=torch.float64, requires_grad=True)
    beta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_alpha, beta], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        corrected = torch.cat([logits[:, :old], log_alpha.exp() * logits[:, old:] + beta], 1)
        value = F.cross_entropy(corrected, labels, reduction="sum")
        value = value + 0.5 * (log_alpha.square() + beta.square())
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return log_alpha.exp().item(), beta.item()


@torch.no_grad()
def correct_bias(model: nn.Module, old: int, alpha: float, beta: float) -> None:
    """Put z_new ← α z_new + β into the head: α W_new, α b_new + β."""
    for head in classification_heads(model):
        head.weight[old:] *= alpha
        if head.bias is not None:
            head.bias[old:] = alpha * head.bias[old:] + beta
