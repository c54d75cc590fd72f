"""EWC on the weights under an adapter, where each process holds a part of them.

`torchrun --nproc_per_node 2 -m tests.weight_space_processes CASE FOLDER`: the penalty's value and
gradients, the Fisher and the anchor under FSDP2 or ZeRO-3, against one process that holds all.
Rank 0 writes the largest relative errors to FOLDER/result.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from hf_ewc import EWCState, estimate_fisher
from hf_ewc.parameters.adapters import weights_by_name
from hf_ewc.parameters.names import parameters_by_name
from hf_ewc.parameters.weight_gradients import gradients_of_weights
from hf_ewc.processes import leave
from hf_ewc.training import deepspeed as engine_gradients
from hf_ewc.training.penalty import Penalty
from tests.fisher_processes import partitioned, sharded
from tests.models import Examples, llama

LAMBDA = 3.0


def model_with_adapter() -> nn.Module:
    torch.manual_seed(0)
    targets = ["q_proj", "down_proj", "embed_tokens"]
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=targets, bias="none"))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def whole(tensor: Tensor) -> Tensor:
    full = getattr(tensor, "full_tensor", None)
    return (tensor if full is None else full()).detach().double()


def random_state(model: nn.Module) -> EWCState:
    torch.manual_seed(2)
    shapes = {name: weight.shape for name, weight in weights_by_name(model).items()}
    importance = {name: torch.rand(shape) for name, shape in shapes.items()}
    return EWCState(importance, {name: 0.1 * torch.randn(s) for name, s in shapes.items()})


def fisher_of(model: nn.Module) -> dict[str, Tensor]:
    weights = {n: w for n, w in weights_by_name(model).items() if w.requires_grad}
    with gradients_of_weights(weights) as own:
        names = {id(parameter): name for name, parameter in own.items()}
        found = {n: names[id(p)] for n, p in parameters_by_name(model).items() if id(p) in names}
        fisher = estimate_fisher(
            model,
            Examples("llama", 6),
            fisher_type="empirical",
            batch_size=2,
            parameters=list(found),
            fallback="error",
        )
    return {found[name]: value for name, value in fisher.diagonal.items()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    trained = {n: p for n, p in parameters_by_name(model).items() if p.requires_grad}
    return {n: whole(p.grad) for n, p in trained.items()}


def in_parts(case: str, state: EWCState) -> dict[str, Any]:
    """What the processes together have."""
    model: Any = (sharded if case == "fsdp2" else partitioned)(model_with_adapter())
    inner = model.module if case == "zero3" else model
    fisher = fisher_of(inner)
    consolidated = EWCState().consolidate(_as_fisher(fisher), inner)
    penalty = Penalty(state, inner, dict.fromkeys(state.importance, LAMBDA))
    value = penalty.value()
    if case == "fsdp2":
        penalty.add_gradients()
        pulled = gradients(inner)
    else:
        pulled = _engines(model, penalty)
    return {
        "fisher": {name: whole(value) for name, value in fisher.items()},
        "anchor": {name: whole(value) for name, value in consolidated.anchor.items()},
        "value": {"": torch.tensor(value, dtype=torch.float64)},
        "gradient": pulled,
    }


def _engines(engine: Any, penalty: Penalty) -> dict[str, Tensor]:
    """What the penalty adds to the gradients that DeepSpeed's engine keeps, after one backward."""
    from deepspeed import utils

    batch = {k: v[None] for k, v in Examples("llama", 1)[0].items()}
    engine.backward(engine(**batch).loss)
    trained = {n: p for n, p in parameters_by_name(engine).items() if p.requires_grad}
    before = {n: utils.safe_get_full_grad(p).double() for n, p in trained.items()}
    engine_gradients.add_gradients(penalty, engine)
    return {n: utils.safe_get_full_grad(p).double() - before[n] for n, p in trained.items()}


def alone(state: EWCState) -> dict[str, Any]:
    """The same by one process, the gradients by autograd."""
    model = model_with_adapter()
    total = LAMBDA * state.penalty(model.double())
    total.backward()
    pulled = gradients(model)
    model = model_with_adapter()
    weights = {n: w for n, w in weights_by_name(model).items() if w.requires_grad}
    anchor = {name: whole(weight.current()) for name, weight in weights.items()}
    return {
        "fisher": reference_fisher(model),  # which merges the adapter
        "anchor": anchor,
        "value": {"": total.detach().double()},
        "gradient": pulled,
    }


def reference_fisher(model: nn.Module) -> dict[str, Tensor]:
    """Squared gradients of single examples on the merged model, in float64."""
    adapted = [name for name, w in weights_by_name(model).items() if w.requires_grad]
    plain = model.merge_and_unload().double().eval()
    parameters = dict(plain.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    totals = {name: torch.zeros_like(parameters[name]) for name in adapted}
    for example in (Examples("llama", 6)[i] for i in range(6)):
        batch = {key: value[None] for key, value in example.items()}
        count = (batch["labels"][:, 1:] != -100).sum()
        loss = plain(**batch).loss * count
        found = torch.autograd.grad(loss, [parameters[name] for name in adapted])
        for name, gradient in zip(adapted, found, strict=True):
            totals[name] += gradient**2 / 6
    return {name: value.detach() for name, value in totals.items()}


def _as_fisher(diagonal: dict[str, Tensor]) -> Any:
    from hf_ewc import Fisher

    return Fisher(diagonal, 6, "empirical")


def main(case: str, folder: Path) -> None:
    torch.set_num_threads(1)
    if case == "zero3":
        import deepspeed

        deepspeed.init_distributed("gloo", verbose=False)
    else:
        dist.init_process_group("gloo")
    state = random_state(model_with_adapter())
    found, expected = in_parts(case, state), alone(state)
    errors = {}
    for kind, values in expected.items():
        assert found[kind].keys() == values.keys(), (kind, list(found[kind]), list(values))
        errors[kind] = max(
            float((found[kind][name] - value).abs().max() / value.abs().max())
            for name, value in values.items()
        )
    if dist.get_rank() == 0:
        (folder / "result.json").write_text(json.dumps(errors))
    dist.barrier()
    leave()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
