"""The operations whose per-example squared gradients are computed in one backward."""

import hf_ewc.fisher.operations.contraction
import hf_ewc.fisher.operations.convolution
import hf_ewc.fisher.operations.elementwise
import hf_ewc.fisher.operations.experts
import hf_ewc.fisher.operations.linear
import hf_ewc.fisher.operations.lookup
import hf_ewc.fisher.operations.normalization  # noqa: F401  (importing registers the handlers)
from hf_ewc.fisher.operations.registry import find_handler

__all__ = ["find_handler"]
