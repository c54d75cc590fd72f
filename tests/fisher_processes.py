"""The Fisher on several processes; every process of a launch executes this.

``python -m tests.fisher_processes ACTION FOLDER`` under torchrun:

replicas  whole models: every case of CASES, sources of batches, errors of one process
shards    the same models sharded by FSDP2; a state saved and read back
partitions  the same models partitioned by ZeRO-3; a state saved and read back
die       rank 1 kills itself while the others wait for it
full      rank 1 is out of memory within a model in shards, where the others wait for it
ddp, fsdp2, zero1, zero2, zero3
          a trainer that trains, consolidates, trains on and consolidates again
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import MixtralConfig, MixtralForCausalLM, default_data_collator, set_seed

from hf_ewc import EWCConfig, EWCState, EWCTrainer, Fisher, estimate_fisher
from hf_ewc.fisher.sharded import ledger
from hf_ewc.processes import leave
from hf_ewc.training.penalty import Penalty
from tests.many_processes import deepspeed_config
from tests.models import VOCAB, Examples, bert, gpt2, llama
from tests.training import arguments


class Uncovered(nn.Module):
    """A use that one backward does not account for, and a head that is not used."""

    def __init__(self) -> None:
        set_seed(0)
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.scale = nn.Parameter(torch.rand(8) + 0.5)
        self.head, self.other_head = nn.Linear(8, 3), nn.Linear(8, 4)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embedding(input_ids).mean(1)
        for layer in self.layers:
            x = layer(x).tanh()
        return {"logits": self.head(torch.linalg.solve(torch.diag(self.scale), x.T).T)}


def mixtral() -> nn.Module:
    set_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=8,
            num_experts_per_tok=2,
            max_position_embeddings=16,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


# name: model, kind of examples, options of estimate_fisher; none of the numbers divides by 2 and 3
CASES: dict[str, tuple[Callable[[], nn.Module], str, dict[str, Any]]] = {
    "exact": (bert, "bert", {"num_samples": 7, "batch_size": 2}),
    "sampled": (llama, "llama", {"fisher_type": "sampled", "num_samples": 11, "batch_size": 3}),
    "draws": (bert, "bert", {"fisher_type": "sampled", "num_draws": 2, "num_samples": 5}),
    "empirical": (gpt2, "gpt2", {"fisher_type": "empirical", "num_samples": 5, "batch_size": 4}),
    "few": (bert, "bert", {"num_samples": 1}),
    "single": (llama, "llama", {"num_samples": 5, "batch_size": 1}),
    "stratified": (bert, "bert", {"stratified": True, "num_samples": 5, "batch_size": 2}),
    "experts": (mixtral, "llama", {"num_samples": 5, "batch_size": 2}),
    "uncovered": (Uncovered, "bert", {"num_samples": 7, "batch_size": 2}),
}


def fisher_of(case: str, wrap: Callable[[nn.Module], nn.Module] = lambda model: model) -> Fisher:
    make, kind, options = CASES[case]
    with warnings.catch_warnings():
        if case == "uncovered":
            warnings.filterwarnings("ignore", "The one-backward Fisher")
        return estimate_fisher(wrap(make()), Examples(kind, 20), **options)


def whole(fisher: Fisher) -> dict[str, Tensor]:
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in fisher.diagonal.items()
    }


def save(tensors: dict[str, Tensor], path: Path) -> None:
    if dist.get_rank() == 0:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


# ---- Whole models ----


def replicas(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = {"counts": {}, "confidence": {}}
    for case in CASES:
        fisher = fisher_of(case, nn.parallel.DistributedDataParallel if case == "exact" else _same)
        save(whole(fisher), folder / f"{case}.safetensors")
        result["counts"][case] = fisher.num_examples
        result["confidence"][case] = fisher.confidence
    for name, data in sources().items():
        fisher = estimate_fisher(bert(), data, batch_size=3)
        save(whole(fisher), folder / f"source_{name}.safetensors")
    result["prepared"] = said(lambda: estimate_fisher(bert(), prepared_stream()))
    result["broken"] = said(lambda: estimate_fisher(bert(), Broken("bert", 9), batch_size=2))
    result["warned"] = warned()
    for place in ("forward", "backward"):
        fisher = estimate_fisher(short_of_memory(bert(), place, 2), Examples("bert", 11))
        save(whole(fisher), folder / f"source_memory_{place}.safetensors")
    nothing_fits = short_of_memory(bert(), "forward", 0)
    result["memory"] = said(lambda: estimate_fisher(nothing_fits, Examples("bert", 9)))
    return result


def short_of_memory(model: nn.Module, where: str, most: int) -> nn.Module:
    """Memory runs out in rank 1, in the last layer, with more than `most` examples.

    In the backward it does not at first, so that sums are there which must not be added to twice.
    """
    spared = [0 if where == "forward" else 2]

    def check(value: Tensor) -> None:
        if dist.get_rank() == 1 and len(value) > most:
            if spared[0] == 0:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            spared[0] -= 1

    def hook(layer: nn.Module, inputs: Any, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output
        if where == "forward":
            check(value)
        elif value.requires_grad:
            value.register_hook(check)

    model.get_submodule("bert.encoder.layer.1").register_forward_hook(hook)
    return model


def _same(model: nn.Module) -> nn.Module:
    return model


class Broken(Examples):
    """Data of which the second example, rank 1's, cannot be read."""

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        if i == 1:
            raise OSError("the disk is gone")
        return super().__getitem__(i)


class Stream(torch.utils.data.IterableDataset[dict[str, Tensor]]):
    def __iter__(self) -> Any:
        return iter([Examples("bert", 11)[i] for i in range(11)])


def sources() -> dict[str, Any]:
    """The same 11 examples in different wrappings."""
    data = Examples("bert", 11)
    loader = DataLoader(data, batch_size=3, shuffle=True)
    return {
        "loader": loader,
        "prepared": Accelerator(cpu=True).prepare(DataLoader(data, batch_size=3, shuffle=True)),
        "batches": [
            default_data_collator([data[i] for i in range(a, min(a + 2, 11))])
            for a in range(0, 11, 2)
        ],
        "generator": iter(DataLoader(data, batch_size=4)),
        "stream": Stream(),
    }


def prepared_stream() -> Any:
    return Accelerator(cpu=True).prepare(DataLoader(Stream(), batch_size=2))


def said(action: Callable[[], Any]) -> list[str]:
    """What each process raised."""
    text = "nothing"
    try:
        action()
    except (OSError, RuntimeError, ValueError) as error:
        text = f"{type(error).__name__}: {error}"
    texts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    return texts


def warned() -> list[int]:
    """How many warnings each process gave for a model that one backward does not cover."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        estimate_fisher(Uncovered(), Examples("bert", 7), batch_size=2)
    counts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(counts, sum("one by one" in str(w.message) for w in seen))
    return counts


# ---- FSDP2 ----


def sharded(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        if isinstance(module, nn.ModuleList):
            for layer in module:
                fully_shard(layer)
    return fully_shard(model)


def partitioned(model: nn.Module) -> nn.Module:
    import deepspeed

    config = {**deepspeed_config(3), "gradient_accumulation_steps": 1}
    config["optimizer"] = {"type": "SGD", "params": {"lr": 0.0}}
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def shards_of(folder: Path, wrap: Callable[[nn.Module], nn.Module]) -> dict[str, Any]:
    held = _watch_flushes()
    result: dict[str, Any] = {"counts": {}, "confidence": {}, "held": {}, "shards": {}}
    for case in CASES:
        held.clear()
        model = wrap(CASES[case][0]())
        before = left_behind(model)
        fisher = fisher_of(case, lambda plain, model=model: model)
        assert left_behind(model) == before, case
        save(whole(fisher), folder / f"{case}.safetensors")
        result["counts"][case] = fisher.num_examples
        result["confidence"][case] = fisher.confidence
        size = sum(value.numel() for value in fisher.diagonal.values())
        own = sum(value.to_local().numel() for value in fisher.diagonal.values())
        result["held"][case] = max(held, default=0) / size
        result["shards"][case] = own / size
    result["broken"] = said(lambda: estimate_fisher(wrap(bert()), Broken("bert", 9), batch_size=2))
    result.update(saved_and_read(folder, wrap))
    return result


def left_behind(model: nn.Module) -> list[Any]:
    """What an estimate must not change: the parameter objects, their flags and gradients."""
    return [(id(p), p.requires_grad, id(p.grad), p.shape) for p in model.parameters()]


def _watch_flushes() -> list[int]:
    """Elements of whole sums that are held whenever some are flushed, appended as it happens."""
    held: list[int] = []
    flush = ledger.ShardedLedger._flush

    def watched(ledger: Any, names: Any) -> None:
        totals = [one.total for one in ledger._by_tensor.values()]
        held.append(sum(total.numel() for total in totals if total is not None))
        flush(ledger, names)

    ledger.ShardedLedger._flush = watched  # type: ignore[method-assign]
    return held


def saved_and_read(folder: Path, wrap: Callable[[nn.Module], nn.Module]) -> dict[str, Any]:
    """A state consolidated and saved in shards, then read back onto them and used."""
    model = wrap(bert())
    fisher = fisher_of("exact", lambda plain: model)
    state = EWCState().consolidate(fisher, model, mode="separate")
    move(model)
    state = state.consolidate(fisher, model, mode="separate")
    state.save_pretrained(folder / "state", is_main_process=dist.get_rank() == 0)
    dist.barrier()
    back = EWCState.from_pretrained(folder / "state")
    again = back.consolidate(fisher, model, mode="separate")
    weights = dict.fromkeys(state.importance, 1.0)
    return {
        "penalty": [Penalty(s, model, weights).value() for s in (state, back)],
        "sharded": all(isinstance(again.importance[n], DTensor) for n in again.importance),
    }


def move(model: nn.Module) -> None:
    """Add 0.1 to every parameter."""
    for parameter in model.parameters():
        with torch.no_grad(), whole_in_rank_0(parameter) as mine:
            if mine:
                parameter.add_(0.1)


@contextlib.contextmanager
def whole_in_rank_0(parameter: Tensor) -> Iterator[bool]:
    """Under ZeRO-3 the change that rank 0 makes is the one that counts."""
    if not hasattr(parameter, "ds_id"):
        yield True
        return
    from deepspeed import zero

    with zero.GatheredParameters([parameter], modifier_rank=0):
        yield dist.get_rank() == 0


# ---- The trainer ----


def trainer_of(action: str, folder: Path, state: EWCState | None = None) -> EWCTrainer:
    changes: dict[str, Any] = {}
    if action.startswith("zero"):
        changes = {"deepspeed": deepspeed_config(int(action[-1]))}
        changes["deepspeed"]["gradient_accumulation_steps"] = 1
    return EWCTrainer(
        model=sharded_by_transformers(folder) if action == "fsdp2" else llama(),
        args=arguments(folder, max_steps=1, optim="sgd", learning_rate=0.0, **changes),
        train_dataset=Examples("llama", 9),
        ewc_config=EWCConfig(ewc_lambda=1.0, fisher_batch_size=2),
        ewc_state=state,
    )


def sharded_by_transformers(folder: Path) -> nn.Module:
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    if dist.get_rank() == 0:
        llama().save_pretrained(folder / "model")
    dist.barrier()
    config = DistributedConfig(fsdp_size=dist.get_world_size())
    return LlamaForCausalLM.from_pretrained(folder / "model", distributed_config=config)


def consolidates(action: str, folder: Path) -> dict[str, Any]:
    """The weights stay as they are, so that the Fisher and the anchor are those of `llama()`."""
    first = trainer_of(action, folder)
    first.train()
    trainer = trainer_of(action, folder, first.consolidate())
    trainer.train()
    state = trainer.consolidate()
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    return {
        "processes": trainer.accelerator.num_processes,
        "counts": [task.num_examples for task in state.tasks],
        "penalty": trainer.ewc_penalty(),
    }


def main(action: str, folder: Path) -> None:
    torch.set_num_threads(1)
    if action.endswith("partitions"):
        import deepspeed

        deepspeed.init_distributed("gloo", verbose=False)
    elif not action.startswith("zero"):
        dist.init_process_group("gloo")
    if action == "die":
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        estimate_fisher(bert(), Examples("bert", 5))
    if action == "full":
        model = short_of_memory(sharded(bert()), "forward", 2)
        estimate_fisher(model, Examples("bert", 9), batch_size=4)
    if action == "full_partitions":
        model = short_of_memory(partitioned(bert()).module, "forward", 2)
        estimate_fisher(model, Examples("bert", 9), batch_size=4)
    actions = {
        "replicas": replicas,
        "shards": lambda folder: shards_of(folder, sharded),
        "partitions": lambda folder: shards_of(folder, partitioned),
    }
    result = actions[action](folder) if action in actions else consolidates(action, folder)
    if dist.get_rank() == 0:
        (folder / "result.json").write_text(json.dumps(result))
    dist.barrier()
    leave()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
