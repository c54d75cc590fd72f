"""The backward of an objective, whose errors say that it ran in eval mode."""

from __future__ import annotations

from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from hf_ewc.fisher.memory import is_out_of_memory


def run_backward(objective: Tensor, *, keep: bool) -> None:
    """Backpropagate; `keep` the graph for another pass.

    Raises:
        ValueError: the model cannot run backward in eval mode.
    """
    try:
        objective.backward(retain_graph=keep)
    except CheckpointError:
        raise
    except (AssertionError, NotImplementedError, RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(
            "The model's backward fails in eval mode, in which a Fisher is estimated, with "
            f"{type(error).__name__}: {error!s:.300} Models that run backward in train mode alone, "
            "such as Reformer with its reversible layers, have no Fisher here."
        ) from error
