"""The diagonal Fisher information of a model on a data set."""

from hf_ewc.fisher.estimate import estimate_fisher

__all__ = ["estimate_fisher"]
