"""A model as it was before the first task, for training that begins there again."""

from __future__ import annotations

from torch import nn

from hf_ewc.parameters.names import unwrap
from hf_ewc.parameters.sharding import is_sharded


class Beginning:
    """Parameters and buffers of a model as it is now, in host memory.

    Args:
        model: before the first task.
    """

    def __init__(self, model: nn.Module) -> None:
        state = unwrap(model).state_dict()
        self._values = {name: value.detach().to("cpu", copy=True) for name, value in state.items()}

    def restore(self, model: nn.Module) -> None:
        """Put the model back to it.

        Raises:
            ValueError: the model is in shards.
        """
        if any(map(is_sharded, model.parameters())):
            raise ValueError("joint_training does not go with models in shards (FSDP, ZeRO-3).")
        unwrap(model).load_state_dict(self._values)
