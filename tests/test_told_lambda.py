"""λ that the state tells: 0.4 / (g ρ²), g the importance's typical root, ρ its spread."""

import pytest
import torch
from test_lambda_search import by_hand_told, three_tasks
from test_tasks import arguments, same_weights, vit

from hf_ewc import EWCConfig, EWCState, EWCTrainer, SequenceConfig, run_tasks
from hf_ewc.state.ewc_state import TaskRecord
from tests.models import random_quadratic

TOLD = EWCConfig(fisher_samples=8)


def state_of(*values, tasks=1):
    half = len(values) // 2
    parts = {"a": torch.tensor(values[:half]), "b": torch.tensor(values[half:])}
    anchor = {name: torch.zeros_like(value) for name, value in parts.items()}
    record = TaskRecord("a", 1, "exact", 1.0, "2026-01-01")
    return EWCState(parts, anchor, tasks=[record] * tasks)


@pytest.mark.parametrize(
    ("values", "tasks", "expected"),
    [
        ([4.0] * 4, 1, 0.2),
        ([4.0, 0.0, 4.0, 0.0], 1, 0.2),  # what was never used does not count
        ([4.0] * 4, 4, 0.4),  # the sum of four tasks whose typical gradient is 1
        ([1.0, 4.0, 9.0, 16.0], 1, 0.230),
        ([1.0] + [1e-30] * 9, 1, 400.0),
        ([1e-12] * 4, 1, 1e4),  # at most
        ([0.0, 0.0], 1, 1.0),
    ],
)
def test_what_the_importance_tells(values, tasks, expected):
    state = state_of(*values, tasks=tasks)
    assert state.told_lambda() == pytest.approx(expected, rel=1e-6)
    assert EWCConfig().settled(state).strength == state.told_lambda()
    assert EWCConfig(ewc_lambda=3.0).settled(state).strength == 3.0


def test_half_precision_tells_nearly_the_same():
    state = EWCState(*random_quadratic(vit()))
    assert state.told_lambda() == pytest.approx(by_hand_told(state, 1))
    assert state.pack("bfloat16").told_lambda() == pytest.approx(by_hand_told(state, 1), rel=1e-2)


def test_a_trainer_takes_it_from_its_state(tmp_path):
    model = vit()
    state = EWCState(*random_quadratic(model))
    trainer = EWCTrainer(model, arguments(tmp_path), ewc_state=state)
    expected = by_hand_told(state, 1) * state.penalty(model).item()
    assert trainer.ewc_penalty() == pytest.approx(expected, rel=1e-4)
    trainer.ewc_config.ewc_lambda_growth = 2.0  # one task, as far as it is known
    assert trainer.ewc_penalty() == pytest.approx(expected, rel=1e-4)


def test_each_layer_has_what_its_own_importance_tells(tmp_path):
    model = vit()
    state = EWCState(*random_quadratic(model))
    layers: dict[str, list[str]] = {}
    for name in state.importance:
        level = name.split(".")
        number = next((i for i, part in enumerate(level) if part.isdigit()), None)
        layer = level[: number + 1] if number is not None else level[:-1][:2]
        layers.setdefault(".".join(layer), []).append(name)
    assert len(layers) > 3
    expected = 0.0
    for names in layers.values():
        alone = EWCState(*({name: part[name] for name in names} for part in parts_of(state)))
        told = by_hand_told(alone, 1)
        for name in names:
            assert state.told_layer_lambdas()[name] == pytest.approx(told)
        expected += told * sum(quadratic(state, model, name) for name in names)
    config = EWCConfig(ewc_layer_lambdas="state")
    trainer = EWCTrainer(model, arguments(tmp_path), ewc_config=config, ewc_state=state)
    assert trainer.ewc_penalty() == pytest.approx(expected, rel=1e-4)


def parts_of(state):
    return dict(state.importance), dict(state.anchor)


def quadratic(state, model, name):
    distance = model.get_parameter(name) - state.anchor[name]
    return 0.5 * (state.importance[name] * distance**2).sum().item()


def test_a_layer_that_is_no_layers_namesake_keeps_its_own():
    parts = {"a.w": torch.ones(4), "w": torch.full((4,), 4.0), "b.a.w": torch.full((4,), 16.0)}
    record = TaskRecord("a", 1, "exact", 1.0, "2026-01-01")
    state = EWCState(parts, {k: torch.zeros(4) for k in parts}, tasks=[record])
    config = EWCConfig(ewc_layer_lambdas="state").settled(state)
    assert config.lambdas(parts) == pytest.approx({"a.w": 0.4, "w": 0.2, "b.a.w": 0.1})


def test_layers_are_told_only_where_all_is_told():
    with pytest.raises(ValueError, match=r"ewc_lambda is 3\.0; leave that at 'state'"):
        EWCConfig(ewc_lambda=3.0, ewc_layer_lambdas="state")


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """The states after each of three tasks, and the result."""
    found = []

    def keep(trainer, task, results):
        found.append(trainer.ewc_state)

    folder = tmp_path_factory.mktemp("run")
    result = run_tasks(vit(), three_tasks(), arguments(folder), TOLD, after_task=keep)
    return found, result


def test_a_run_takes_it_anew_for_each_task_and_says_which(states):
    found, result = states
    used = [record.ewc_lambda for record in result.state.tasks]
    assert used[0] is None
    told = [by_hand_told(state, k + 1) for k, state in enumerate(found[:2])]
    assert used[1:] == pytest.approx(told, rel=1e-6)


def test_a_run_is_as_with_these_numbers(tmp_path, states):
    _, result = states
    model, state = vit(), EWCState()
    for k, task in enumerate(three_tasks()):
        config = TOLD
        if k:
            config = EWCConfig(ewc_lambda=result.state.tasks[k].ewc_lambda, fisher_samples=8)
        args = arguments(tmp_path, seed=42 + k)
        options = dict(train_dataset=task.train_dataset, ewc_config=config, ewc_state=state)
        trainer = EWCTrainer(model, args, **options)
        trainer.train()
        state = trainer.consolidate(name=task.name)
    assert same_weights(result.model, model)


def test_with_l2_sp_and_with_more_strength_after_the_gate(tmp_path):
    sequence = SequenceConfig(l2sp_lambda=0.1, max_forgetting=1.0, keep_models="last")
    run_tasks(vit(), three_tasks()[:2], arguments(tmp_path), TOLD, sequence_config=sequence)


def test_without_a_state_there_is_no_number():
    with pytest.raises(ValueError, match="none that tells it"):
        _ = EWCConfig().strength
    assert "as the state tells" in EWCConfig().summary()
