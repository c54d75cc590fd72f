"""How much of a state's importance each layer holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_ewc.precision import wide_sum
from hf_ewc.report.layers import by_layer
from hf_ewc.report.outcome import LayerImportance

if TYPE_CHECKING:
    from hf_ewc.state.ewc_state import EWCState


def importance_by_layer(state: EWCState) -> dict[str, LayerImportance] | None:
    """Σ A over the parameters of each layer, summed in fp64, and their number.

    None where a process holds only its shards of the importances.
    """
    if state.importance.is_sharded:
        return None
    sums = {
        name: LayerImportance(float(wide_sum(values)), values.numel())
        for name, values in state.importance.items()
    }
    return by_layer(sums)
