"""The operations whose per-example squared gradients are computed in one backward.

Operations of your own: see `covers`.
"""

import hf_ewc.fisher.operations.contraction
import hf_ewc.fisher.operations.convolution
import hf_ewc.fisher.operations.experts
import hf_ewc.fisher.operations.lookup
import hf_ewc.fisher.operations.normalization
import hf_ewc.fisher.operations.product  # noqa: F401  (importing registers the handlers)
from hf_ewc.fisher.operations.elementwise import batched
from hf_ewc.fisher.operations.linear import linear
from hf_ewc.fisher.operations.registry import covers, find_handler
from hf_ewc.fisher.uses.call import Call, Uncovered
from hf_ewc.fisher.uses.tracking import Tracker

__all__ = ["Call", "Tracker", "Uncovered", "batched", "covers", "find_handler", "linear"]
