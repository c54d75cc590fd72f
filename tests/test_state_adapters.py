"""States of adapters: renamed and missing ones, vocabularies that grow, tied weights that do."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_ewc import EWCState, Fisher
from hf_ewc.parameters.names import first_names, parameters_by_name
from tests.models import bert, gpt2, llama


def adapted(model: nn.Module, name: str = "default", **options) -> nn.Module:
    torch.manual_seed(5)
    modules = {"BertForSequenceClassification": "query", "LlamaForCausalLM": "q_proj"}
    options = {"target_modules": [modules.get(type(model).__name__, "c_attn")], **options}
    options["fan_in_fan_out"] = options["target_modules"] == ["c_attn"]
    config = LoraConfig(init_lora_weights=False, **options)
    return get_peft_model(model, config, adapter_name=name)


def state_of(model: nn.Module, trainable_only: bool = True) -> EWCState:
    found = parameters_by_name(model, trainable_only)
    fisher = Fisher({name: torch.ones(p.shape) for name, p in found.items()})
    return EWCState().consolidate(fisher, model)


# Names


@pytest.mark.parametrize("make", [llama, bert])
def test_the_message_names_the_adapter_and_offers_the_renaming(make):
    options = {"modules_to_save": ["classifier"]} if make is bert else {}
    state, now = state_of(adapted(make(), **options)), adapted(make(), "german", **options)
    kind = type(make()).__name__
    with pytest.raises(ValueError, match=f"of {kind} with the adapter 'default' does not") as error:
        state.check(now)
    assert f"does not fit {kind} with the adapter 'german'" in str(error.value)
    assert "adapter_name='default', is_trainable=True" in str(error.value)
    assert "state.rename_adapter('default', 'german')" in str(error.value)
    renamed = state.rename_adapter("default", "german")
    renamed.check(now)
    assert renamed.tasks == state.tasks
    assert set(renamed.importance) == set(parameters_by_name(now, trainable_only=True))
    again = renamed.consolidate(Fisher(dict(renamed.importance)), now)
    again.check(now)
    with pytest.raises(ValueError, match="the adapter 'german' does not fit"):
        again.check(adapted(make(), **options))


def test_the_message_where_there_is_no_adapter():
    state = state_of(adapted(llama()))
    with pytest.raises(ValueError, match="does not fit LlamaForCausalLM with no adapter") as error:
        state.check(llama())
    assert "Load that adapter" in str(error.value)
    assert "rename_adapter" not in str(error.value)


def test_one_of_two_adapters_is_renamed():
    model = adapted(llama())
    model.add_adapter("second", LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    state = state_of(model, trainable_only=False).without([r"embed_tokens", "base_layer"])
    renamed = state.rename_adapter("second", "third")
    assert len(renamed.importance) == len(state.importance)
    assert any(".default." in name for name in renamed.importance)
    assert not any(".second." in name for name in renamed.importance)
    assert set(renamed.metadata["fingerprint"]["adapters"]) == {"default", "third"}


def test_an_adapter_that_a_state_does_not_have_is_not_renamed():
    with pytest.raises(ValueError, match="no parameter of an adapter 'haus'"):
        state_of(adapted(llama())).rename_adapter("haus", "house")
    with pytest.raises(ValueError, match="no parameter of an adapter 'default'"):
        state_of(llama()).rename_adapter("default", "other")


# Rows


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("more", [1, 7])
def test_an_adapter_goes_on_when_the_vocabulary_has_grown(make, more):
    model = adapted(make())
    state = state_of(model)
    model.resize_token_embeddings(model.config.vocab_size + more)
    state.check(model)
    state.consolidate(Fisher(dict(state.importance)), model).check(model)
    # A merged one is told apart still.
    other = adapted(model.merge_and_unload())
    with pytest.raises(ValueError, match="the weights under the adapter"):
        state.check(other)


def test_an_embedding_that_is_another_or_smaller_is_refused():
    model = adapted(llama())
    state = state_of(model)
    model.resize_token_embeddings(model.config.vocab_size - 1)
    with pytest.raises(ValueError, match="the weights under the adapter"):
        state.check(model)
    model = adapted(llama())
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1.0)
    model.resize_token_embeddings(model.config.vocab_size + 3)
    with pytest.raises(ValueError, match="the weights under the adapter"):
        state.check(model)


@pytest.mark.parametrize("given", ["lm_head.weight", "transformer.wte.weight"])
def test_tied_rows_grow_under_any_of_their_names(given):
    model = gpt2()
    assert first_names(model)["lm_head.weight"] == "transformer.wte.weight"
    state = state_of(model)
    rows = model.config.vocab_size
    model.resize_token_embeddings(rows + 4)
    with pytest.raises(ValueError, match="grow_rows"):
        state.check(model)
    grown = state.grow_rows(model, [given])
    grown.check(model)
    assert list(grown.importance) == list(state.importance)
    assert bool((grown.importance["transformer.wte.weight"][rows:] == 0).all())
    assert grown.penalty(model).item() == pytest.approx(0.0, abs=1e-9)


def test_tied_rows_of_the_weights_under_an_adapter_grow_too():
    plain = gpt2()
    state = state_of(plain)
    model = adapted(plain)
    model.resize_token_embeddings(plain.config.vocab_size + 2)
    grown = state.grow_rows(model, ["lm_head.weight"])
    assert grown.importance["transformer.wte.weight"].shape[0] == plain.config.vocab_size
    grown.check(model)


def test_names_that_are_nowhere_are_named_as_they_were_given():
    model = gpt2()
    with pytest.raises(ValueError, match=r"grow_rows: 'lm_haed.weight' is not"):
        state_of(model).grow_rows(model, ["lm_haed.weight"])
