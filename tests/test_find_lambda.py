"""find_lambda: λ for a trainer by itself, which is left as it was."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from test_lambda_search import Seen, between, enough, three_tasks
from test_tasks import arguments, same_weights, vit
from transformers import EarlyStoppingCallback, Trainer, default_data_collator

from hf_ewc import EWCConfig, EWCTrainer, find_lambda
from hf_ewc.tasks.evaluation import accuracy
from hf_ewc.training.held_out import held_out_rows, other_rows

CONFIG = EWCConfig(ewc_lambda=50.0, fisher_samples=8)


def trainer_of(folder, state=None, task=1, seen=None, **options):
    return EWCTrainer(
        vit() if state is None else state[0],
        arguments(folder, num_train_epochs=12, **options),
        train_dataset=three_tasks()[task].train_dataset,
        compute_metrics=accuracy,
        ewc_config=CONFIG,
        ewc_state=None if state is None else state[1],
        callbacks=[seen] if seen else None,
    )


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    trainer = trainer_of(tmp_path_factory.mktemp("first"), task=0)
    trainer.train()
    return trainer.model, trainer.consolidate()


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_the_curve_is_that_of_trainings_by_hand_and_all_is_as_before(tmp_path, learnt):
    seen, begin = Seen(), weights_of(learnt[0])
    trainer = trainer_of(tmp_path, learnt, seen=seen)
    data, args, random = trainer.train_dataset, trainer.args, torch.get_rng_state()
    found = find_lambda(trainer, metric="accuracy")
    assert all(torch.equal(begin[n], v) for n, v in learnt[0].state_dict().items())
    assert trainer.train_dataset is data
    assert trainer.args is args
    assert trainer.ewc_config.ewc_lambda == 50.0
    assert trainer.optimizer is None
    assert trainer.ewc_state is learnt[1]
    assert torch.equal(random, torch.get_rng_state())
    assert seen.begun == 0
    rows = held_out_rows(40, args.seed)
    rest = [data[i] for i in other_rows(40, rows)]
    held = [data[i] for i in rows]
    for trial in found.curve.trials:
        by_hand = EWCTrainer if trial.ewc_lambda else Trainer
        options = {}
        if trial.ewc_lambda:
            options = dict(ewc_config=EWCConfig(ewc_lambda=trial.ewc_lambda), ewc_state=learnt[1])
        learnt[0].load_state_dict(begin)
        short = arguments(tmp_path, num_train_epochs=6)
        own = by_hand(learnt[0], short, train_dataset=rest, compute_metrics=accuracy, **options)
        own.train()
        assert own.state.global_step == trial.steps
        assert own.evaluate(held)["eval_accuracy"] == trial.score
    learnt[0].load_state_dict(begin)
    plain = found.curve.plain.score
    *failing, last = found.curve.trials[1:]
    assert not any(enough(t.score, plain, 8) for t in failing)
    assert enough(last.score, plain, 8)
    assert found.ewc_lambda == between([(t.ewc_lambda, t.score) for t in found.curve.trials])


def test_callbacks_that_need_evaluation_between_do_not_see_the_trials(tmp_path, learnt):
    """Early stopping is on every trainer of some people."""
    trainer = trainer_of(tmp_path, learnt)
    stopping = EarlyStoppingCallback(1)
    trainer.add_callback(stopping)
    found = find_lambda(trainer, metric="accuracy")
    expected = find_lambda(trainer_of(tmp_path, learnt), metric="accuracy")
    assert found.ewc_lambda == expected.ewc_lambda
    assert stopping in trainer.callback_handler.callbacks


def test_the_smallest_that_is_tried_is_the_lowest(tmp_path, learnt):
    options = dict(metric="accuracy", give_up=0.0, first=3e9, lowest=7e8)
    found = find_lambda(trainer_of(tmp_path, learnt), **options)
    assert [t.ewc_lambda for t in found.curve.trials] == [0.0, 3e9, 7e8]
    old = [three_tasks()[0].eval_dataset]
    found = find_lambda(trainer_of(tmp_path, learnt), **options, old_validation=old)
    assert [t.ewc_lambda for t in found.curve.trials] == [0.0, 3e9, 7e8]
    options |= dict(first=5e8, lowest=7e8)  # what is tried first is tried
    found = find_lambda(trainer_of(tmp_path, learnt), **options)
    assert [t.ewc_lambda for t in found.curve.trials] == [0.0, 5e8]


def test_evaluations_around_it_see_the_same_weights(tmp_path, learnt, caplog):
    trainer = trainer_of(tmp_path, learnt)
    data = trainer.train_dataset
    before = trainer.evaluate(data)
    for _ in range(2):
        find_lambda(trainer, first=1e2, lowest=1e2)
        assert trainer.evaluate(data)["eval_loss"] == before["eval_loss"]
    assert "other weights" not in caplog.text
    with torch.no_grad():
        trainer.model.vit.embeddings.cls_token.add_(1.0)
    trainer.evaluate(data)
    assert "other weights" in caplog.text  # the earlier evaluation is remembered beyond it
    with torch.no_grad():
        trainer.model.vit.embeddings.cls_token.sub_(1.0)


def test_of_errors_less_is_better(tmp_path, learnt):
    def with_an_error(predictions):
        return {"error_rate": 1 - accuracy(predictions)["accuracy"]}

    trainer = trainer_of(tmp_path, learnt)
    trainer.compute_metrics = with_an_error
    found = find_lambda(trainer, metric="error_rate", first=1e2, lowest=1e2)
    assert found.curve.by_improvement
    assert all(trial.score <= 0 for trial in found.curve.trials)
    found = find_lambda(trainer, metric="error_rate", greater_is_better=True, first=1e2, lowest=1e2)
    assert all(trial.score >= 0 for trial in found.curve.trials)


class Noisy:
    """A collator with random numbers of its own, some of them made when they are first needed."""

    def __init__(self):
        self.numpy, self.torch, self.calls = np.random.default_rng(0), None, []

    def __call__(self, rows):
        self.torch = self.torch or torch.Generator().manual_seed(0)
        self.calls.append(len(rows))
        batch = default_data_collator(rows)
        noise = torch.randn(batch["pixel_values"].shape, generator=self.torch)
        batch["pixel_values"] += noise + self.numpy.normal()
        return batch


class Annealed(EWCTrainer):
    """A trainer that counts its steps, and weighs its loss by them."""

    number = 0

    def compute_loss(self, *args, **kwargs):
        found = super().compute_loss(*args, **kwargs)
        if isinstance(found, tuple):  # of an evaluation
            return found
        self.number += 1
        return found * 0.9**self.number


@pytest.mark.parametrize("kind", ["collator", "trainer"])
def test_what_is_the_users_is_as_without_it(kind, tmp_path, learnt):
    begin, ends = weights_of(learnt[0]), []
    for searched in (False, True):
        trainer = trainer_of(tmp_path, learnt)
        if kind == "collator":
            trainer.data_collator = Noisy()
        else:
            trainer.__class__ = Annealed
        if searched:
            find_lambda(trainer, first=1e2, lowest=1e2)
        trainer.train()
        ends.append(weights_of(learnt[0]))
        learnt[0].load_state_dict(begin)
    assert all(torch.equal(ends[0][name], value) for name, value in ends[1].items())
    assert not all(torch.equal(begin[name], value) for name, value in ends[1].items())


def test_training_after_it_is_as_without_it(tmp_path, learnt):
    begin = weights_of(learnt[0])
    trainer = trainer_of(tmp_path, learnt)
    trainer.train()
    plain = weights_of(learnt[0])
    learnt[0].load_state_dict(begin)
    trainer = trainer_of(tmp_path, learnt)
    find_lambda(trainer, first=1e2, lowest=1e2)
    trainer.train()
    assert all(torch.equal(plain[n], v) for n, v in learnt[0].state_dict().items())
    learnt[0].load_state_dict(begin)


def test_with_validation_sets_of_old_tasks_it_is_the_least_sum(tmp_path, learnt):
    trainer = trainer_of(tmp_path, learnt)
    old = [three_tasks()[0].eval_dataset]
    results = [
        find_lambda(trainer, first=1e4, lowest=1e2, old_validation=old, alpha=alpha)
        for alpha in (0.0, 1e3)
    ]
    for found, alpha in zip(results, (0.0, 1e3), strict=True):
        trials = found.curve.trials[1:]
        assert [t.ewc_lambda for t in trials] == [1e4, 1e3, 1e2]
        totals = {t.ewc_lambda: -t.score + alpha * found.old_losses[t.ewc_lambda] for t in trials}
        assert found.ewc_lambda == min(totals, key=totals.get)
    assert results[0].old_losses == results[1].old_losses


def test_what_it_cannot_be_found_for(tmp_path, learnt):
    with pytest.raises(TypeError, match="got a Trainer"):
        find_lambda(Trainer(vit(), arguments(tmp_path)))
    with pytest.raises(ValueError, match="no EWC state"):
        find_lambda(trainer_of(tmp_path))
    trainer = trainer_of(tmp_path, learnt)
    trainer.ewc_config = EWCConfig(ewc_layer_lambdas="state")
    with pytest.raises(ValueError, match="tells a λ for each layer; find_lambda looks for one"):
        find_lambda(trainer)
    trainer = trainer_of(tmp_path, learnt)
    with pytest.raises(ValueError, match="metric is 'f1'"):
        find_lambda(trainer, metric="f1")
    trainer.create_optimizer()
    with pytest.raises(ValueError, match="an optimizer already"):
        find_lambda(trainer)
    assert same_weights(trainer.model, learnt[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"give_up": 2}, "give_up is 2; allowed is a finite number of at least 0 and at most 1"),
        ({"first": 0}, "first is 0; allowed is a finite number above 0"),
        ({"lowest": -1.0}, "lowest is -1.0; allowed is a finite number above 0"),
        ({"alpha": float("nan")}, "alpha is nan; allowed is"),
        ({"old_validation": [[]]}, "a data set of old_validation is empty"),
    ],
)
def test_settings_without_a_meaning_are_refused(options, message, tmp_path, learnt):
    with pytest.raises(ValueError, match=message):
        find_lambda(trainer_of(tmp_path, learnt), **options)


def test_one_data_set_is_no_list_of_them(tmp_path, learnt):
    data = Dataset.from_dict({"labels": [0, 1]})
    with pytest.raises(TypeError, match="old_validation is a Dataset; needed is a list"):
        find_lambda(trainer_of(tmp_path, learnt), old_validation=data)


def test_a_strength_with_which_the_loss_is_no_number_is_not_chosen(tmp_path, learnt, monkeypatch):
    class Diverging(EWCTrainer):
        def evaluate(self, *args, **kwargs):
            found = super().evaluate(*args, **kwargs)
            too_large = self.ewc_state is not None and self.ewc_config.ewc_lambda > 50
            return {**found, "eval_loss": float("nan")} if too_large else found

    trainer = trainer_of(tmp_path, learnt)
    trainer.__class__ = Diverging
    options = {"old_validation": [three_tasks()[0].eval_dataset], "first": 1e3, "lowest": 1.0}
    found = find_lambda(trainer, **options)
    assert found.ewc_lambda in (10.0, 1.0)
    with pytest.raises(ValueError, match="finite with none of 2 λ"):
        find_lambda(trainer, **{**options, "lowest": 100.0})
