"""Short runs for the tests of launches; every process of a launch executes this.

``python -m tests.launched ACTION FOLDER`` under torchrun or ``accelerate launch``:

begin    build an EWCTrainer and write the number of its processes to FOLDER/processes
alone    the same without use_cpu, so that processes on a machine without GPU are not connected
die      train, and let rank 1 kill itself in the second step
resume   train with checkpoints; train in part and resume; compare and write FOLDER/result.json
sharded  train a model that transformers has sharded (DistributedConfig), saving only the model
tasks    learn two tasks in one call, and in two calls of which the second goes on from the files
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_ewc.config import EWCConfig
from hf_ewc.parameters.sharding import is_sharded
from hf_ewc.processes import leave
from hf_ewc.state.ewc_state import EWCState
from hf_ewc.tasks import Task, TaskResults, run_tasks
from hf_ewc.tasks.divergence import _examples
from hf_ewc.tasks.sequence_config import SequenceConfig
from hf_ewc.training.trainer import EWCTrainer
from tests.many_processes import make_model, whole
from tests.models import Examples, bert, random_quadratic, vit
from tests.training import arguments

STEPS, CUT = 6, 3


class StopAt(TrainerCallback):
    """Save at step CUT and stop, as a run whose time is up."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == CUT:
            control.should_save = control.should_training_stop = True


class DieAtStep(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2 and int(os.environ["RANK"]) == 1:
            os.kill(os.getpid(), signal.SIGKILL)


class FinalWeights(TrainerCallback):
    """The whole weights at the end of training, while an engine is still there."""

    def on_train_end(self, *args: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        self.weights = {
            name.removeprefix("module."): whole(parameter)
            for name, parameter in model.named_parameters()
        }


class OnCPU(EWCTrainer):
    """FSDP2 as `accelerate launch --use_fsdp` sets it up on GPUs; on CPUs it would be plain DDP."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if os.environ.get("ACCELERATE_USE_FSDP") != "true":
            return
        from accelerate import PartialState
        from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

        self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        self.accelerator.state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.is_fsdp_enabled = True


def make_trainer(
    folder: Path, *callbacks: TrainerCallback, use_cpu: bool = True, **more: Any
) -> OnCPU:
    return OnCPU(
        model=bert(hidden_dropout_prob=0.1),
        args=arguments(
            folder,
            learning_rate=1e-2,
            lr_scheduler_type="linear",
            max_steps=STEPS,
            save_strategy="steps",
            save_steps=2,
            save_total_limit=2,
            use_cpu=use_cpu,
        ),
        train_dataset=Examples("bert", 16),
        ewc_config=EWCConfig(ewc_lambda=30.0),
        callbacks=list(callbacks),
        **more,
    )


def compare(folder: Path) -> dict[str, Any]:
    """Resumed and undisturbed runs, and what their folders hold."""
    start = {name: p.detach().double() for name, p in bert().named_parameters()}
    state = EWCState(*random_quadratic(bert()))
    state.save_pretrained(folder / "state")  # by every process, and read by every one at once
    one, two = FinalWeights(), FinalWeights()
    undisturbed = make_trainer(folder / "whole", one, ewc_state=folder / "state")
    undisturbed.train()
    make_trainer(folder / "cut", StopAt(), ewc_state=state).train()
    resumed = make_trainer(folder / "cut", two)
    resumed.train(resume_from_checkpoint=True)
    resumed.save_model()
    resumed.accelerator.wait_for_everyone()
    return {
        "processes": resumed.accelerator.num_processes,
        "kind": resumed.accelerator.distributed_type.value,
        "sharded": any(is_sharded(p) for p in resumed.model.parameters()),
        "same": all(torch.equal(one.weights[name], two.weights[name]) for name in one.weights),
        "moved": any(not torch.equal(one.weights[n], p) for n, p in start.items()),
        "state_is_back": resumed.ewc_state == state,
        "steps": [undisturbed.state.global_step, resumed.state.global_step],
        "penalties": [t.state.log_history[-2]["ewc_penalty"] for t in (undisturbed, resumed)],
        "saved_is_trained": saved_is_trained(folder / "cut", two.weights),
    }


def saved_is_trained(folder: Path, weights: dict[str, torch.Tensor]) -> bool | None:
    """Whether ``from_pretrained`` reads the trained weights; None where none were written whole."""
    if not (folder / "model.safetensors").is_file():
        return None
    saved = load_file(folder / "model.safetensors")
    return all(torch.equal(saved[name].double(), weights[name].cpu()) for name in weights)


def main(action: str, folder: Path) -> None:
    torch.set_num_threads(1)
    if action in ("begin", "alone"):
        trainer = make_trainer(folder, use_cpu=action == "begin")
        (folder / "processes").write_text(str(trainer.accelerator.num_processes))
    elif action == "die":
        make_trainer(folder, DieAtStep()).train()
    else:
        result = {"resume": compare, "sharded": sharded_by_transformers, "tasks": in_a_row}[action](
            folder
        )
        if int(os.environ["RANK"]) == 0:
            (folder / "result.json").write_text(json.dumps(result))
    if dist.is_initialized():
        dist.barrier()
    leave()


def in_a_row(folder: Path) -> dict[str, Any]:
    """Two tasks with a part of the head each, at once and after another start."""
    tasks = [
        Task(name, of_classes(classes, 12), of_classes(classes, 8), classes=classes)
        for name, classes in [("a", (0, 1)), ("b", (1, 2))]
    ]

    def learn(where: str, tasks: list[Task]) -> TaskResults:
        args = arguments(folder / where, learning_rate=1e-2, max_steps=3)
        config = EWCConfig(ewc_lambda=30.0, fisher_batch_size=2)
        kinds = (os.environ.get(f"ACCELERATE_USE_{kind}") for kind in ("FSDP", "DEEPSPEED"))
        # An odd number for two processes.
        sequence = SequenceConfig(kl_examples=0 if "true" in kinds else 7)
        return run_tasks(vit(), tasks, args, config, sequence_config=sequence, trainer_class=OnCPU)

    at_once = learn("whole", tasks)
    learn("cut", tasks[:1])
    grown = learn("cut", tasks)
    dist.barrier()
    one, two = (load_file(folder / w / "02-b/final/model.safetensors") for w in ("whole", "cut"))
    measured = json.loads((folder / "whole/results.json").read_text()).get("divergences")
    return {
        "processes": dist.get_world_size(),
        "kind": AcceleratorState().distributed_type.value,
        "same": all(torch.equal(one[name], two[name]) for name in one),
        "same_scores": at_once.matrix == grown.matrix,
        "tasks": [task.name for task in at_once.state.tasks],
        "losses": [score["loss"] for scores in at_once.metrics for score in scores.values()],
        "divergences": measured,
        "by_hand": [
            by_hand(folder / "whole", k, _examples(task, 7, 1), task.classes)
            for k, task in enumerate(tasks if measured else [])
        ],
    }


def by_hand(folder: Path, k: int, examples: Any, classes: Any) -> float:
    """KL(before ‖ after) of task k on these examples, from the models that were saved."""
    images = torch.stack([example["pixel_values"] for example in examples])
    logits = []
    for name in ["", "01-a", "02-b"][k : k + 2]:
        model = type(vit()).from_pretrained(folder / name / "final") if name else vit()
        with torch.no_grad():
            logits.append(model.eval()(images).logits[:, list(classes)].double())
    p, q = (torch.distributions.Categorical(logits=z) for z in logits)
    return float(torch.distributions.kl_divergence(p, q).mean())


def of_classes(classes: tuple[int, ...], size: int) -> list[dict[str, torch.Tensor]]:
    return [x for x in Examples("vit", 3 * size) if int(x["labels"]) in classes][:size]


def sharded_by_transformers(folder: Path) -> dict[str, Any]:
    dist.init_process_group("gloo")
    model = make_model("fsdp2", folder)
    names = {name: p.full_tensor() for name, p in model.named_parameters()}
    state = EWCState(
        {name: torch.ones_like(p) for name, p in names.items()},
        {name: p + 0.1 for name, p in names.items()},
    )
    final = FinalWeights()
    trainer = EWCTrainer(
        model=model,
        args=arguments(
            folder,
            learning_rate=1e-2,
            max_steps=2,
            save_strategy="steps",
            save_steps=1,
            save_only_model=True,
        ),
        train_dataset=Examples("llama", 8),
        ewc_config=EWCConfig(ewc_lambda=30.0),
        ewc_state=state,
        callbacks=[final],
    )
    trainer.train()
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    return {
        "processes": trainer.accelerator.num_processes,
        "state_is_back": EWCState.from_pretrained(folder / "checkpoint-2") == state,
        "saved_is_trained": saved_is_trained(folder, final.weights),
    }


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
