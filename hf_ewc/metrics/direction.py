"""Whether more of a figure is better, by its name."""

from __future__ import annotations

# Errors, as `evaluate` and Trainers name them; besides them all that ends in "loss" or "error".
_ERRORS = {
    *("perplexity", "error_rate", "mse", "rmse", "mae", "mape", "smape", "mase"),
    *("wer", "cer", "ter", "eer", "der", "brier_score"),
}


def less_is_better(metric: str, greater_is_better: bool | None = None) -> bool:
    """Whether less of a metric is better: as it is said, else by its name.

    Args:
        metric: such as "accuracy", "loss", "mse", "val_loss".
        greater_is_better: what is known of it.
    """
    if greater_is_better is not None:
        return not greater_is_better
    name = metric.lower()
    return name in _ERRORS or name.endswith(("loss", "error"))
