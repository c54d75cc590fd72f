"""What EWC adds to the weights in training on several processes, against the formula.

``torchrun --nproc_per_node 2 -m tests.many_processes CASE FOLDER``: one SGD step of size RATE with
EWC and one without, on the same examples; the weights then differ by RATE · λ F (θ − θ*). Rank 0
writes the relative error and the logs to FOLDER/result.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM, Trainer, TrainerCallback

from hf_ewc.config import EWCConfig
from hf_ewc.processes import leave
from hf_ewc.state.ewc_state import EWCState
from hf_ewc.training.trainer import EWCTrainer
from tests.models import MODELS, Examples, random_quadratic
from tests.training import LAMBDA, arguments, in_order

RATE = 0.125
ACCUMULATION = 2


def deepspeed_config(stage: int) -> dict[str, Any]:
    # Without a threshold ZeRO-3 would leave parameters as small as these whole.
    whole = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, **whole},
    }


def changes_of(case: str) -> dict[str, Any]:
    """The arguments that make a case."""
    if case.startswith("zero"):
        return {"deepspeed": deepspeed_config(int(case[-1])), "ddp_find_unused_parameters": None}
    if case == "ddp_static":  # torch's static graph takes no accumulation, plainly either
        return {"ddp_static_graph": True, "gradient_accumulation_steps": 1}
    if case.startswith("ddp_checkpoint"):
        kind = {"use_reentrant": case == "ddp_checkpoint_reentrant"}
        return {"activation_checkpointing": True, "activation_checkpointing_kwargs": kind}
    return {}


def make_model(case: str, folder: Path) -> nn.Module:
    kind = "unused" if case == "ddp_unused" else "llama"
    if case != "fsdp2":
        return MODELS[kind]()
    from transformers.distributed import DistributedConfig

    if dist.get_rank() == 0:
        MODELS[kind]().save_pretrained(folder / "model")
    dist.barrier()
    config = DistributedConfig(fsdp_size=dist.get_world_size())
    return LlamaForCausalLM.from_pretrained(folder / "model", distributed_config=config)


def whole(parameter: Tensor) -> Tensor:
    if hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_get_full_fp32_param

        parameter = safe_get_full_fp32_param(parameter)
    if isinstance(parameter, DTensor):
        parameter = parameter.full_tensor()
    return parameter.detach().double().clone()


class FinalWeights(TrainerCallback):
    """The weights at the end of training, whole, while the engine is still there."""

    weights: dict[str, Tensor]

    def on_train_end(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self.weights = {
            name.removeprefix("module."): whole(parameter)
            for name, parameter in model.named_parameters()
        }


def train(case: str, folder: Path, **options: Any) -> tuple[dict[str, Tensor], Trainer]:
    args = arguments(
        folder,
        **{
            "learning_rate": RATE,
            "lr_scheduler_type": "constant",
            "optim": "sgd",
            "max_steps": 1,
            "eval_on_start": case == "fsdp2",
            "gradient_accumulation_steps": ACCUMULATION,
            "ddp_find_unused_parameters": case == "ddp_unused",
            **changes_of(case),
        },
    )
    final = FinalWeights()
    kind = "unused" if case == "ddp_unused" else "llama"
    trainer_type = EWCTrainer if options else Trainer
    trainer = trainer_type(
        model=make_model(case, folder),
        args=args,
        train_dataset=Examples(kind, 32),
        eval_dataset=Examples(kind, 4),
        callbacks=[final],
        **options,
    )
    in_order(trainer).train()
    if trainer.accelerator.num_processes != int(os.environ["WORLD_SIZE"]):
        raise RuntimeError(f"Only {trainer.accelerator.num_processes} processes take part.")
    return final.weights, trainer


def main(case: str, folder: Path) -> None:
    torch.set_num_threads(1)
    if case == "fsdp2":
        dist.init_process_group("gloo")
    plain = MODELS["unused" if case == "ddp_unused" else "llama"]()
    importance, anchor = random_quadratic(plain)
    start = {name: p.detach().double() for name, p in plain.named_parameters()}
    without, _ = train(case, folder)
    config = EWCConfig(ewc_lambda=LAMBDA, ewc_log_groups=True)
    state = EWCState(importance, anchor)
    with_ewc, trainer = train(case, folder, ewc_config=config, ewc_state=state)
    wrong = size = 0.0
    for name, theta in start.items():
        expected = RATE * LAMBDA * importance[name].double() * (theta - anchor[name].double())
        wrong += (without[name] - with_ewc[name] - expected).square().sum().item()
        size += expected.square().sum().item()
    penalty = sum(
        LAMBDA / 2 * (importance[n].double() * (theta - anchor[n]) ** 2).sum().item()
        for n, theta in start.items()
    )
    after = trainer.ewc_penalty()
    if dist.get_rank() == 0:
        logged = next(entry for entry in trainer.state.log_history if "ewc_penalty" in entry)
        result = {"error": (wrong / size) ** 0.5, "penalty": penalty, "after": after, **logged}
        (folder / "result.json").write_text(json.dumps(result))
    dist.barrier()  # no process takes the group down while another still uses it
    leave()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
