"""A head in the place of another of the same shape, and the layers that are the head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from hf_ewc import EWCConfig, EWCState, EWCTrainer, Fisher
from hf_ewc.parameters.names import parameters_by_name
from hf_ewc.parameters.selection import select_parameters
from hf_ewc.state import heads
from tests.models import Examples, bert, llama
from tests.training import arguments

MOODS, COLOURS = ["negative", "neutral", "positive"], ["red", "green", "blue"]
SMALL = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)


def named(model: nn.Module, labels: list[str]) -> nn.Module:
    model.config.id2label = dict(enumerate(labels))
    return model


def state_of(model: nn.Module, mode: str = "online") -> EWCState:
    found = parameters_by_name(model, trainable_only=True)
    fisher = Fisher({name: torch.ones(p.shape) for name, p in found.items()})
    return EWCState().consolidate(fisher, model, mode=mode)


def adapted(model: nn.Module) -> nn.Module:
    config = LoraConfig(target_modules=["query"], modules_to_save=["classifier"])
    return get_peft_model(model, config)


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel, adapted])
def test_a_head_for_other_labels_is_refused(tmp_path, wrap):
    state = state_of(wrap(named(bert(), MOODS)))
    state.save_pretrained(tmp_path)
    for each in (state, EWCState.from_pretrained(tmp_path)):
        each.check(wrap(named(bert(), MOODS)))
        for labels in (COLOURS, MOODS[::-1]):
            with pytest.raises(
                ValueError, match=r"labels negative, neutral, positive; this model's are"
            ):
                each.check(wrap(named(bert(), labels)))
        each.without(["classifier"]).check(wrap(named(bert(), COLOURS)))


def test_labels_without_names_tell_nothing():
    plain = bert()
    assert set(plain.config.id2label.values()) == {"LABEL_0", "LABEL_1", "LABEL_2"}
    state_of(plain).check(named(bert(), MOODS))
    state_of(named(bert(), MOODS)).check(bert())


def test_further_labels_are_recorded_with_the_next_task():
    state = state_of(named(bert(), MOODS)).without("classifier.*")
    other = named(bert(), COLOURS)
    found = parameters_by_name(other)
    fisher = Fisher({name: torch.ones(p.shape) for name, p in found.items()})
    state = state.consolidate(fisher, other)
    assert state.metadata["fingerprint"]["head"]["labels"] == COLOURS
    with pytest.raises(ValueError, match="labels red, green, blue"):
        state.check(named(bert(), MOODS))


def test_a_body_and_a_language_model_have_no_labels():
    config = BertConfig(**SMALL, vocab_size=50)
    assert "head" not in state_of(BertModel(config)).metadata["fingerprint"]
    assert "head" not in state_of(nn.Linear(2, 2)).metadata["fingerprint"]
    head = state_of(BertForMaskedLM(config)).metadata["fingerprint"]["head"]
    assert head["labels"] is None


# As training starts


def trainer_with(model: nn.Module, state: EWCState, folder: Path, **config) -> EWCTrainer:
    return EWCTrainer(
        model=model,
        args=arguments(folder, max_steps=1, learning_rate=1e-6),
        train_dataset=Examples("bert", 8),
        ewc_config=EWCConfig(1e-6, **config),
        ewc_state=state,
    )


def fresh_linear(model: nn.Module) -> None:
    torch.manual_seed(99)
    model.classifier = nn.Linear(model.classifier.in_features, 3)


def initialized_again(model: nn.Module) -> None:
    torch.manual_seed(99)
    nn.init.normal_(model.classifier.weight, std=0.02)
    nn.init.zeros_(model.classifier.bias)


@pytest.mark.parametrize("replace_head", [fresh_linear, initialized_again])
@pytest.mark.parametrize("mode", ["online", "separate"])
def test_another_head_of_the_same_shape_is_refused_at_the_first_step(tmp_path, replace_head, mode):
    model = bert()
    state = state_of(model, mode)
    replace_head(model)
    trainer = trainer_with(model, state, tmp_path, ewc_mode=mode)
    with pytest.raises(
        ValueError, match=r"\(classifier.weight\) is not the one .*\['classifier'\]"
    ):
        trainer.train()
    trainer.ewc_state = state.without(["classifier"])
    trainer.train()


def test_a_head_that_was_trained_on_is_not_another(tmp_path):
    model = bert()
    state = state_of(model)
    with torch.no_grad():
        model.classifier.weight.mul_(1.3)
    trainer_with(model, state, tmp_path).train()


@pytest.mark.parametrize("frozen", [False, True])
def test_a_head_that_training_has_taken_far_away_is_the_same(tmp_path, frozen):
    """By a run of this process with the state, or by a likeness that chance would not make."""
    model = bert()
    state = state_of(model)
    trainer = trainer_with(model, state, tmp_path)
    model.bert.requires_grad_(not frozen)
    trainer.train()
    torch.manual_seed(7)
    noise = torch.randn_like(model.classifier.weight)
    with torch.no_grad():
        model.classifier.weight.copy_(5 * noise)  # with no likeness, as of very small heads
    trainer.train()

    wide = named(bert(), MOODS)
    wide.classifier = nn.Linear(16, 3)
    with torch.no_grad():
        wide.classifier.weight.fill_(0.1)
    state = state_of(wide)
    moved = named(bert(), MOODS)
    moved.load_state_dict(wide.state_dict())
    moved.bert.requires_grad_(not frozen)
    with torch.no_grad():
        moved.classifier.weight.add_(0.15 * noise)
    trainer_with(moved, state, tmp_path).train()


def test_with_head_says_that_it_is_the_one_that_was_consolidated(tmp_path):
    model = bert()
    state = state_of(model)
    fresh_linear(model)
    with pytest.raises(ValueError, match=r"state\.with_head\(model\)"):
        trainer_with(model, state, tmp_path).train()
    state.with_head(model).save_pretrained(tmp_path / "state")
    accepted = EWCState.from_pretrained(tmp_path / "state")
    trainer_with(model, accepted, tmp_path).train()
    with pytest.raises(ValueError, match="labels"):
        state_of(named(bert(), MOODS)).with_head(named(bert(), COLOURS))


def test_the_head_that_was_consolidated_far_from_a_mean_anchor_is_right(tmp_path):
    """Separate tasks have a mean for their anchor, from which the newest head may be far."""
    model = bert()
    state = state_of(model, "separate")
    with torch.no_grad():
        model.classifier.weight.mul_(-1)
    found = parameters_by_name(model)
    fisher = Fisher({name: torch.full(p.shape, 1e-6) for name, p in found.items()})
    state = state.consolidate(fisher, model, mode="separate")
    trainer_with(model, state, tmp_path, ewc_mode="separate").train()


def test_a_resumed_run_may_begin_with_any_head(tmp_path):
    """Its weights come from the checkpoint, after the state was given."""
    state = state_of(bert())
    config = EWCConfig(1e-6)
    common = dict(train_dataset=Examples("bert", 8), ewc_config=config, ewc_state=state)
    args = arguments(tmp_path, max_steps=1, learning_rate=1e-6, save_strategy="steps", save_steps=1)
    EWCTrainer(model=bert(), args=args, **common).train()
    model = bert()
    fresh_linear(model)
    args = arguments(tmp_path, max_steps=2, learning_rate=1e-6)
    again = EWCTrainer(model=model, args=args, **common)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2


def test_a_head_in_shards_is_not_compared():
    head = {"parameters": ["classifier.weight"], "labels": None, "hashes": None}
    assert heads.replaced(head, bert(), {"classifier.weight": 5.0}) == []


# What is the head


@pytest.mark.parametrize(
    ("model", "left_out"),
    [
        (BertForSequenceClassification(BertConfig(**SMALL, vocab_size=50)), "classifier"),
        (BertForTokenClassification(BertConfig(**SMALL, vocab_size=50)), "classifier"),
        (BertForQuestionAnswering(BertConfig(**SMALL, vocab_size=50)), "qa_outputs"),
        (RobertaForSequenceClassification(RobertaConfig(**SMALL, vocab_size=50)), "classifier"),
        (llama(), "lm_head"),
    ],
)
def test_all_linear_leaves_the_head_out(model, left_out):
    names = select_parameters(model, "all-linear")
    assert names
    assert not [name for name in names if left_out in name]
    linear = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(left_out)
    }
    assert linear <= set(names)


def test_all_linear_of_adapters_and_plain_modules():
    names = select_parameters(adapted(bert()), "all-linear")
    assert names
    assert not [name for name in names if "classifier" in name]
    plain = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2))
    assert select_parameters(plain, "all-linear") == ["0.weight", "0.bias", "2.weight", "2.bias"]
