"""A model built again: the same values, ties, buffers and what is trained, in other tensors."""

from __future__ import annotations

import torch
from torch import nn

from hf_ewc.parameters.names import class_name
from hf_ewc.tasks.blueprint import Blueprint
from tests.models import gpt2


def test_a_model_is_built_from_another(tmp_path) -> None:
    model = gpt2()
    model.transformer.h[0].requires_grad_(False)
    blueprint = Blueprint(model)
    assert all(p.is_meta for p in blueprint._empty.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    built = blueprint.built_from(model)
    assert built.lm_head.weight is built.transformer.wte.weight
    for (name, old), (same, new) in zip(
        model.named_parameters(), built.named_parameters(), strict=True
    ):
        assert name == same
        assert torch.equal(old, new)
        assert old.requires_grad == new.requires_grad
        assert old.data_ptr() != new.data_ptr()


def test_buffers_are_those_of_the_model() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    blueprint = Blueprint(model)
    model(torch.randn(8, 3))
    built = blueprint.built_from(model)
    assert torch.equal(built[1].running_mean, model[1].running_mean)
    assert built[1].running_mean.any()


def test_a_sharded_model_is_known_by_its_own_class(tmp_path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    file = f"file://{tmp_path}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=file, rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(3, 3))
        blueprint = Blueprint(model)
        values = model[0].weight.detach().clone()
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        assert class_name(model) == "Sequential"
        built = blueprint.built_from(model)
        assert type(built) is nn.Sequential
        assert torch.equal(built[0].weight, values)
    finally:
        torch.distributed.destroy_process_group()
