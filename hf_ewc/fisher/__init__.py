"""The Fisher information: exact per example, in about one backward pass."""

from hf_ewc.fisher.diagonal import Fisher
from hf_ewc.fisher.estimate import estimate_fisher

__all__ = ["Fisher", "estimate_fisher"]
