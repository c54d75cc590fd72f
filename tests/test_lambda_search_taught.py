"""Where trials teach nothing, λ means nothing: that is said once, with the cause and the cure."""

import logging

import pytest
import torch
from datasets import Dataset
from test_find_lambda import trainer_of
from test_lambda_search import AUTO, LONG, curve_of, three_tasks
from test_tasks import arguments, examples, vit

from hf_ewc import find_lambda, run_tasks
from hf_ewc.tasks.scenario import commonest_share


@pytest.mark.parametrize(
    ("plain", "options", "nothing"),
    [
        (0.50, dict(before=0.5), True),
        (0.52, dict(before=0.5), False),
        # 1.645 √(0.5 · 0.5 / 100) is 0.082
        (0.58, dict(before=0.5, labels=100), True),
        (0.59, dict(before=0.5, labels=100), False),
        (0.58, dict(before=0.0, chance=0.5, labels=100), True),
        (0.59, dict(before=0.0, chance=0.5, labels=100), False),
        (0.59, dict(before=0.6, chance=0.5, labels=100), True),
        (0.10, dict(), False),  # nothing is known to compare with
        (-2.3, dict(before=-2.302, by_improvement=True), True),  # less than a thousandth better
        (-2.2, dict(before=-2.302, by_improvement=True), False),
        (-2.4, dict(before=-2.302, by_improvement=True), True),
        (None, dict(before=0.5), True),
    ],
)
def test_when_plain_training_has_taught_nothing(plain, options, nothing):
    curve = curve_of({0: plain, 1e4: plain or 0.5}, **options)
    assert curve.taught_nothing == nothing
    assert ("taught nothing" in curve.in_words()) == nothing
    said = curve.warning(1e-6)
    assert (said is None) != nothing
    if said:
        assert "\n" not in said
        assert ("is too small" in said) == (plain is not None)
        assert ("is too large" in said) == (plain is None)
        assert "1e-06" in said


def test_scores_are_told_as_people_read_them():
    said = curve_of({0: -2.4, 1e4: -2.4}, before=-2.3, by_improvement=True).warning(1e-6)
    assert "it scores 2.4 on held-out examples, 2.3 before." in said
    said = curve_of({0: 0.5, 1e4: 0.5}, before=0.25, chance=0.5, labels=8).warning(1e-6)
    assert "it scores 0.5 on 8 held-out labels, 0.25 before and 0.5 by the most" in said


def test_before_any_trial_there_is_nothing_to_say():
    curve = curve_of({0: 1.0, 1e4: 1.0})
    assert type(curve)("a").warning(1e-6) is None


def warnings_of(caplog):
    return [r.message for r in caplog.records if r.message.startswith("Plain training for")]


def test_a_run_says_it_once(tmp_path, caplog):
    args = arguments(tmp_path, learning_rate=1e-7)
    with caplog.at_level(logging.WARNING, "hf_ewc"):
        result = run_tasks(vit(), three_tasks(), args, AUTO)
    (said,) = warnings_of(caplog)
    assert "of task 'rows 1'" in said
    assert "(1e-07) is too small" in said
    assert "raise learning_rate, or num_train_epochs or max_steps" in said
    assert [curve.taught_nothing for curve in result.searches] == [True, True]
    assert result.searches[0].chance == pytest.approx(0.5, abs=0.3)
    told = [r.message for r in caplog.records if r.message.startswith("λ = ")]
    assert ["Plain training had taught nothing." in line for line in told] == [True, True]


def test_a_run_that_learns_says_nothing(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "hf_ewc"):
        run_tasks(vit(), three_tasks(), arguments(tmp_path, **LONG), AUTO)
    assert not warnings_of(caplog)


def test_so_does_find_lambda(tmp_path, caplog):
    first = trainer_of(tmp_path, task=0)
    trainer = trainer_of(tmp_path, (first.model, first.consolidate()), learning_rate=1e-9)
    with caplog.at_level(logging.WARNING, "hf_ewc"):
        find_lambda(trainer)
    (said,) = warnings_of(caplog)
    assert "(1e-09) is too small" in said


def test_the_share_of_the_most_frequent_label():
    assert commonest_share(examples((0, 1, 1), 30)) == pytest.approx(2 / 3)
    rows = Dataset.from_dict({"label": [3, 1, 3, -100], "x": [0] * 4})
    assert commonest_share(rows) == pytest.approx(2 / 3)
    assert commonest_share([{"labels": torch.tensor([1, 2])}]) is None
    assert commonest_share([{"labels": 0.5}]) is None
    assert commonest_share([]) is None
    assert commonest_share(iter([])) is None
