"""Tied parameters, which a state holds once, on a model in which they are no longer one."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from hf_ewc import EWCConfig, EWCState, EWCTrainer, Fisher
from hf_ewc.parameters.names import parameters_by_name
from tests.training import arguments


def gpt2(tied: bool) -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=8, n_layer=1, n_head=2, vocab_size=20, n_positions=8, tie_word_embeddings=tied
        )
    )


def t5(tied: bool) -> nn.Module:
    torch.manual_seed(0)
    config = T5Config(
        d_model=8,
        d_kv=4,
        d_ff=8,
        num_layers=1,
        num_heads=2,
        vocab_size=20,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config)
    if not tied:
        model.lm_head.weight = nn.Parameter(model.shared.weight.detach().clone())
    return model


def state_of(model: nn.Module) -> EWCState:
    found = parameters_by_name(model)
    return EWCState().consolidate(Fisher({n: torch.ones(p.shape) for n, p in found.items()}), model)


@pytest.mark.parametrize(
    ("make", "first"), [(gpt2, r"transformer\.wte\.weight"), (t5, r"shared\.weight")]
)
def test_a_head_that_is_no_longer_tied_is_not_left_free_silently(tmp_path, make, first):
    state = state_of(make(True))
    state.save_pretrained(tmp_path)
    for each in (state, EWCState.from_pretrained(tmp_path)):
        each.check(make(True))
        each.check(nn.DataParallel(make(True)))
        with pytest.raises(ValueError, match=rf"lm_head\.weight: .* one with {first}.*Tie them"):
            each.check(make(False))
        each.without([first.replace("\\", "")]).check(make(False))


def test_training_and_consolidation_refuse_it_too(tmp_path):
    state, model = state_of(gpt2(True)), gpt2(False)
    with pytest.raises(ValueError, match=r"lm_head\.weight: .*leave free"):
        EWCTrainer(
            model=model, args=arguments(tmp_path), ewc_config=EWCConfig(), ewc_state=state
        ).train()
    found = {n: torch.ones(p.shape) for n, p in parameters_by_name(model).items()}
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        state.consolidate(Fisher(found), model)


def test_a_penalty_of_ones_own_loop_is_refused_too():
    state, model = state_of(gpt2(True)), gpt2(True)
    assert state.penalty(model).item() == state.penalty(model).item() == 0.0
    with pytest.raises(ValueError, match=r"lm_head\.weight: .*leave free"):
        state.penalty(gpt2(False))
    other = state_of(gpt2(True))
    model.lm_head.weight = nn.Parameter(model.transformer.wte.weight.detach().clone())
    with pytest.raises(ValueError, match=r"lm_head\.weight: .*leave free"):
        other.penalty(model)


def test_models_that_were_never_tied_and_states_without_a_record_are_as_before():
    state = state_of(gpt2(False))
    assert "tied" not in state.metadata["fingerprint"]
    state.check(gpt2(False))
    new = state_of(gpt2(True))
    recorded = {k: v for k, v in new.metadata["fingerprint"].items() if k != "tied"}
    dataclasses.replace(new, metadata={"fingerprint": recorded}).check(gpt2(False))
