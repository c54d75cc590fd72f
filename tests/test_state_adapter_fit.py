"""Whether a state of an adapter fits the model: its base, its scaling, its kind."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models import bert
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_ewc import EWCState, Fisher
from hf_ewc.parameters.names import parameters_by_name

# Adapters


def lora(model: nn.Module) -> nn.Module:
    torch.manual_seed(5)
    config = LoraConfig(target_modules=["query", "value"], init_lora_weights=False)
    return get_peft_model(model, config)  # type: ignore[arg-type]


def trainable(model: nn.Module) -> Fisher:
    named = parameters_by_name(model, trainable_only=True)
    return Fisher({name: torch.ones(p.shape) for name, p in named.items()})


def test_an_adapter_goes_on_in_any_precision_of_its_base():
    model = lora(bert())
    state = EWCState().consolidate(trainable(model), model)
    recorded = state.metadata["fingerprint"]
    assert recorded["adapters"] == {"default": "LORA scaled by 1"}
    assert recorded["model"] == "BertForSequenceClassification"
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    state.check(model)
    state.consolidate(trainable(model), model).check(model.to(torch.bfloat16))


def test_an_adapter_goes_on_on_a_base_in_fp16():
    model = lora(bert())
    state = EWCState().consolidate(trainable(model), model)
    state.check(lora(bert()).to(torch.float16))


def test_another_scaling_of_an_adapter_is_refused():
    model = lora(bert())
    state = EWCState().consolidate(trainable(model), model)
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= 2
    with pytest.raises(ValueError, match=r"LORA scaled by \S+ at consolidation, LORA scaled by"):
        state.check(model)


def test_an_adapter_named_like_a_module_hides_no_base():
    from peft import LoraConfig, get_peft_model

    def adapted():
        return get_peft_model(bert(), LoraConfig(target_modules=["query"]), adapter_name="encoder")

    model = adapted()
    state = EWCState().consolidate(trainable(model), model)
    state.check(adapted())
    with torch.no_grad():
        model.get_parameter("base_model.model.bert.encoder.layer.0.output.dense.bias").add_(1.0)
    with pytest.raises(ValueError, match="the weights under the adapter"):
        state.check(model)


def test_a_merged_and_wrapped_adapter_is_refused():
    model = lora(bert())
    state = EWCState().consolidate(trainable(model), model)
    wrapped = lora(model.merge_and_unload())
    assert trainable(wrapped).diagonal.keys() == state.importance.keys()
    with pytest.raises(ValueError, match="merged and the model wrapped anew"):
        state.check(wrapped)
    with pytest.raises(ValueError, match="merged and the model wrapped anew"):
        state.consolidate(trainable(wrapped), wrapped)


def test_another_kind_of_adapter_is_refused():
    model = lora(bert())
    state = EWCState().consolidate(trainable(model), model)
    print_ = {**state.metadata["fingerprint"], "adapters": {"default": "LOHA"}}
    with pytest.raises(ValueError, match="'default': LOHA at consolidation, LORA scaled by 1 now"):
        replace(state, metadata={"fingerprint": print_}).check(model)


def test_base_parameters_that_are_trained_are_not_compared():
    model = lora(bert())
    names = ["base_model.model.classifier.bias"]
    model.get_parameter(names[0]).requires_grad_(True)
    fisher = trainable(model)
    adapter = Fisher({n: v for n, v in fisher.diagonal.items() if n not in names})
    state = EWCState().consolidate(adapter, model)
    assert state.metadata["fingerprint"]["free"] == names
    with torch.no_grad():
        model.get_parameter(names[0]).add_(1.0)
    state.check(model)
    with torch.no_grad():
        model.get_parameter("base_model.model.classifier.weight").add_(1.0)
    with pytest.raises(ValueError, match="the weights under the adapter"):
        state.check(model)


def test_a_base_that_is_not_here_is_not_compared():
    model = lora(bert())
    state = EWCState().consolidate(trainable(model), model)
    weight = model.get_parameter("base_model.model.classifier.weight")
    shape, weight.data = weight.shape, torch.empty(0)
    weight.ds_shape = shape  # as DeepSpeed ZeRO-3 leaves it
    state.check(model)
    assert EWCState().consolidate(trainable(model), model).metadata["fingerprint"]["base"] is None
