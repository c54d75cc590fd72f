"""One model out of many tasks: the weights where the quadratic of a state is least."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_ewc.parameters import sharding
from hf_ewc.state.packed import PackedTensor
from hf_ewc.state.quadratic import BLOCK, flat_part


@torch.no_grad()
def merge_into(parameter: Tensor, importance: PackedTensor, anchor: PackedTensor) -> None:
    """Set θ_i = c_i where A_i > 0, in place; see `EWCState.merge`."""
    theta = sharding.local_part(parameter)
    strength, center = (flat_part(packed.dense(), parameter) for packed in (importance, anchor))
    present = theta.reshape(-1)
    merged = [
        torch.where(a > 0, c.to(t.dtype), t)
        for t, a, c in zip(
            present.split(BLOCK), strength.split(BLOCK), center.split(BLOCK), strict=True
        )
    ]
    theta.copy_(torch.cat(merged).view(theta.shape))
