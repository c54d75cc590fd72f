"""The backward of an objective, and what is said where it fails."""

from __future__ import annotations

from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from hf_ewc.fisher.memory import is_out_of_memory


def run_backward(objective: Tensor, *, keep: bool) -> None:
    """Backpropagate; `keep` the graph for another pass.

    Raises:
        ValueError: the model cannot run backward, in eval mode or at all.
    """
    try:
        objective.backward(retain_graph=keep)
    except CheckpointError:
        raise
    except (AssertionError, NotImplementedError, RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise _failed(error) from error


def _failed(error: Exception) -> ValueError:
    said = f"{type(error).__name__}: {error!s:.300}"
    if _asks_for_train_mode(error):
        return ValueError(
            f"The model's backward fails in eval mode, in which a Fisher is estimated, with {said} "
            "Models that run backward in train mode alone, such as Reformer with its reversible "
            "layers, have no Fisher here."
        )
    return ValueError(
        f"The backward of the log-likelihood fails with {said} Needed is a model whose outputs can "
        "be differentiated in eval mode. See whether those for one example can be, by themselves; "
        "batch_size=1 (fisher_batch_size=1), other parameters (parameters=, ewc_target_modules) or "
        "the operation named here done in another way may help."
    )


def _asks_for_train_mode(error: Exception) -> bool:
    """Whether it says so, as those of Reformer and of cuDNN's recurrent layers do."""
    return any(words in str(error) for words in ("train()", "training mode", "train mode"))
