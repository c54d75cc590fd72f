"""One model out of many tasks: the weights where the quadratic of a state is least."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_ewc.parameters import sharding
from hf_ewc.parameters.adapted_weight import AdaptedWeight
from hf_ewc.parameters.adapters import weights_named
from hf_ewc.state.packed import PackedTensor, TensorMap
from hf_ewc.state.quadratic import BLOCK, flat_part


def merge_into(model: nn.Module, importance: TensorMap, anchor: TensorMap) -> None:
    """Set θ_i = c_i where A_i > 0, in place, in a model that has all names; see `EWCState.merge`.

    Raises:
        ValueError: a name stands for a weight that adapters have a share in.
    """
    weights = weights_named(importance, model)
    found = {name: weights[name] for name in importance}
    parameters = {n: w for n, w in found.items() if not isinstance(w, AdaptedWeight)}
    for name in found.keys() - parameters.keys():
        raise ValueError(
            f"merge: {name} is made of a base weight and adapters here, which no single tensor "
            "sets. Merge into the model without adapters (merge_and_unload)."
        )
    for name, parameter in parameters.items():
        _set(parameter, importance.packed(name), anchor.packed(name))


@torch.no_grad()
def _set(parameter: Tensor, importance: PackedTensor, anchor: PackedTensor) -> None:
    theta = sharding.local_part(parameter)
    vectors = theta.reshape(-1), *(flat_part(p.dense(), parameter) for p in (importance, anchor))
    blocks = zip(*(vector.split(BLOCK) for vector in vectors), strict=True)
    merged = [torch.where(a > 0, c.to(t.dtype), t) for t, a, c in blocks]
    theta.copy_(torch.cat(merged).view(theta.shape))
