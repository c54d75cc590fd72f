"""What the process that `tests.processes` forks has imported before it is asked for the first."""

import gc
import importlib
import os

from tests.processes import SETTINGS

MODULES = [
    "accelerate.commands.launch",
    "datasets",
    "deepspeed",
    "hf_ewc.fisher.estimate",
    "hf_ewc.tasks.runner",
    "matplotlib.pyplot",
    "tests.training",
    "torch.distributed.fsdp",
    "torch.distributed.run",
    "torch.distributed.tensor",
    "torch.utils.cpp_extension",
    "transformers.distributed",
]

os.environ.update(SETTINGS)  # some are read on import
for name in MODULES:
    importlib.import_module(name)
gc.collect()
gc.freeze()  # a fork then shares the memory of what is here, instead of copying it when it collects
