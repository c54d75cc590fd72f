"""An adapter that the first task's trainer adds to the model, by TRL's `peft_config`."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers import set_seed

from hf_ewc.parameters.adapters import has_adapters
from hf_ewc.tasks.plan import Plan


def lacks_adapter(model: nn.Module, plan: Plan) -> bool:
    """Whether a trainer has yet to add the adapter that the plan asks for."""
    return plan.trainer_kwargs.get("peft_config") is not None and not has_adapters(model)


def trainer_arguments(model: nn.Module, plan: Plan) -> dict[str, Any]:
    """The plan's arguments for a trainer of `model`, whose one adapter all tasks share.

    `peft_config` is for the first trainer of a run alone: a second would begin another adapter. The
    adapter's first weights depend on the run's seed only, and the configuration, which PEFT fills
    in, stays the user's.
    """
    given = dict(plan.trainer_kwargs)
    if lacks_adapter(model, plan):
        set_seed(plan.args.seed)
        given["peft_config"] = copy.deepcopy(given["peft_config"])
    elif has_adapters(model):
        given.pop("peft_config", None)
    return given
