"""Several ways of training over the same tasks: each as run_tasks alone, and one report."""

import json

import numpy as np
import pytest
import torch
from test_tasks import arguments, same_weights, two_tasks, vit
from transformers import TrainerCallback, ViTConfig, ViTForImageClassification

from hf_ewc import EWCConfig, EWCTrainer, SequenceConfig, compare_methods, run_tasks
from hf_ewc.report import read_outcomes
from hf_ewc.tasks.methods import _method

METHODS = {
    "plain": {},
    "EWC, λ = 100": {"ewc_lambda": 100.0, "fisher_samples": 8},
    "replay": SequenceConfig(replay_share=0.25),
    "joint": {"joint_training": True, "learning_rate": 2e-2},
}


def fresh():
    """Weights from the present random state, as a script makes them."""
    config = ViTConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=4,
        patch_size=2,
        num_channels=1,
        num_labels=4,
    )
    return ViTForImageClassification(config)


class StopAt(TrainerCallback):
    """Fails at the n-th optimizer step of the whole comparison."""

    def __init__(self, step):
        self.step, self.steps = step, 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1
        if self.steps == self.step:
            raise RuntimeError("stopped")


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    args = arguments(folder, max_steps=3)
    return compare_methods(fresh, two_tasks(), args, METHODS, seeds=[0, 7])


def test_each_run_is_that_of_run_tasks(compared, tmp_path):
    torch.manual_seed(7)
    args = arguments(tmp_path, max_steps=3, seed=7)
    config = EWCConfig(ewc_lambda=100.0, fisher_samples=8)
    alone = run_tasks(fresh(), two_tasks(), args, config)
    found = compared.runs["EWC, λ = 100"][7].matrix
    assert np.array_equal(found.scores, alone.matrix.scores, equal_nan=True)
    model = ViTForImageClassification.from_pretrained(
        compared.output_dir / "EWC-100" / "seed-7" / "02-2-or-3" / "final"
    )
    assert same_weights(model, alone.model)


def test_one_report_with_all(compared):
    runs, content = read_outcomes(compared.output_dir / "results.json")
    assert list(runs) == list(METHODS)
    assert all(list(repeats) == [0, 7] for repeats in runs.values())
    for outcome in (outcome for repeats in runs.values() for outcome in repeats.values()):
        assert outcome.seconds > 0
    assert runs["EWC, λ = 100"][0].importance
    joint = runs["joint"][7].matrix
    for method in ("plain", "EWC, λ = 100", "replay"):
        assert runs[method][7].matrix.joint.tolist() == joint.scores.diagonal().tolist()
    assert joint.joint is None
    assert set(content["differences"]) == set(METHODS) - {"plain"}
    report = (compared.output_dir / "report.md").read_text()
    for text in ("Ways of not forgetting", "replay_share = 0.25", "λ = 100", "intransigence"):
        assert text in report
    assert (compared.output_dir / "stability_plasticity.png").stat().st_size > 0
    assert "joint" in str(compared)


def test_a_comparison_that_was_stopped_goes_on(compared, tmp_path):
    args = arguments(tmp_path, max_steps=3, save_strategy="steps", save_steps=1)
    for step in (5, 20):
        with pytest.raises(RuntimeError, match="stopped"):
            compare_methods(
                fresh, two_tasks(), args, METHODS, seeds=[0, 7], callbacks=[StopAt(step)]
            )
    counting = StopAt(-1)
    again = compare_methods(fresh, two_tasks(), args, METHODS, seeds=[0, 7], callbacks=[counting])
    for method, repeats in compared.runs.items():
        for seed, outcome in repeats.items():
            assert again.runs[method][seed].matrix == outcome.matrix
    # Of 48 steps the first call took 5 and the second 20 that are not taken again, but for those
    # since the last checkpoint.
    assert counting.steps <= 48 - 4 - 19
    assert json.loads((tmp_path / "results.json").read_text())["runs"].keys() == METHODS.keys()


def test_each_seed_replays_other_examples(compared):
    drawn = {
        seed: json.loads(path.read_text())
        for seed in (0, 7)
        for path in (compared.output_dir / "replay" / f"seed-{seed}").glob("**/replay.json")
    }
    assert drawn[0] != drawn[7]


def test_a_trainer_that_takes_anything_is_given_it(tmp_path):
    class Scaled(EWCTrainer):
        def __init__(self, *args, **kwargs):
            self.scale = kwargs.pop("scale")
            super().__init__(*args, **kwargs)

    class Named(EWCTrainer):
        def __init__(self, model, args, *, scale, **kwargs):
            super().__init__(model, args, **kwargs)

    for kind in (Scaled, Named):
        args = arguments(tmp_path / kind.__name__, max_steps=1)
        run_tasks(fresh(), two_tasks(), args, trainer_class=kind, scale=2.0)


def test_a_misspelt_argument_of_run_tasks_is_refused_with_a_likely_one(tmp_path):
    with pytest.raises(TypeError, match="did you mean 'callbacks'"):
        run_tasks(fresh(), two_tasks(), arguments(tmp_path), callback=[StopAt(1)])
    assert not list(tmp_path.iterdir())


def test_settings_by_name():
    args = arguments("x")
    options = {"mask_training": False, "ewc_config": EWCConfig(ewc_lambda=3.0, ewc_gamma=0.5)}
    settings = {"ewc_lambda": 7.0, "replay_size": 5, "optim": "sgd", "make_model": vit}
    method = _method("a", settings, fresh, args, options)
    assert method.make_model is vit
    assert method.args.optim == "sgd"
    assert args.optim != "sgd"
    assert method.options == {
        "mask_training": False,
        "ewc_config": EWCConfig(ewc_lambda=7.0, ewc_gamma=0.5),
        "sequence_config": SequenceConfig(replay_size=5),
    }
    assert _method("a", None, fresh, args, {}).options == {}
    assert _method("a", EWCConfig(), fresh, args, {}).options == {"ewc_config": EWCConfig()}


@pytest.mark.parametrize(
    ("methods", "seeds", "error", "message"),
    [
        ({}, [0], ValueError, "no methods"),
        (["plain"], [0], ValueError, "a dict from names"),
        ({"plain": {}}, [], ValueError, "at least one"),
        ({"plain": {}}, [1, 1], ValueError, "each once"),
        ({"a b": {}, "a-b": {}}, [0], ValueError, "share folders"),
        ({"plain": {}, "b": 3}, [0], TypeError, "method 'b' is a int"),
        ({"plain": {}, "b": {"seed": 3}}, [0], ValueError, "for the whole run"),
        ({"plain": {}, "b": {"ewc_lambda": -1}}, [0], ValueError, "ewc_lambda is -1"),
        ({"plain": {}, "b": {"scenario": "new"}}, [0], ValueError, "scenario is 'new'"),
        ({"plain": {}, "b": {"replay_shar": 0.1}}, [0], TypeError, "did you mean 'replay_share'"),
        ({"plain": {}, "b": {"ewc_lamda": 1.0}}, [0], TypeError, "'b' .* 'ewc_lambda'"),
        ({"plain": {}, "b": {"evaluate_unsen": True}}, [0], TypeError, "'evaluate_unseen'"),
        ({"plain": {}, "b": {"strength": 2}}, [0], TypeError, "no argument of EWCTrainer"),
        ({"plain": {}, "b": {"train_dataset": []}}, [0], TypeError, "comes from each task"),
    ],
)
def test_what_is_wrong_is_said_before_the_first_step(tmp_path, methods, seeds, error, message):
    with pytest.raises(error, match=message):
        compare_methods(
            fresh, two_tasks(), arguments(tmp_path), methods, seeds, callbacks=[StopAt(1)]
        )


def test_every_run_needs_a_model_of_its_own(tmp_path):
    model = vit()
    with pytest.raises(ValueError, match="make_model returned a model that an earlier run"):
        compare_methods(lambda: model, two_tasks(), arguments(tmp_path), {"a": {}, "b": {}}, [0])
    with pytest.raises(TypeError, match="make_model returned a str"):
        compare_methods(lambda: "vit", two_tasks(), arguments(tmp_path / "b"), {"a": {}}, [0])


def test_the_results_of_a_single_run_are_not_written_over(tmp_path):
    run_tasks(vit(), two_tasks()[:1], arguments(tmp_path, max_steps=1))
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(ValueError, match="is of a run by run_tasks"):
        compare_methods(vit, two_tasks(), arguments(tmp_path), {"plain": {}}, [0])
    assert (tmp_path / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    ("methods", "seeds", "message"),
    [
        ({"x" * 300: {}}, [0], "a method's name is"),
        ({3: {}}, [0], "a method's name is 3"),
        ({"plain": {}}, [0, -1], "a seed is -1"),
        ({"plain": {}}, [0, 2**33], "a seed is 8589934592"),
        ({"plain": {}}, ["0"], "a seed is '0'"),
    ],
)
def test_names_and_seeds_are_looked_at_first(methods, seeds, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        compare_methods(vit, two_tasks(), arguments(tmp_path), methods, seeds)
    assert not [*tmp_path.iterdir()]


def test_seeds_may_be_an_array(tmp_path):
    args = arguments(tmp_path, max_steps=1)
    found = compare_methods(vit, two_tasks()[:1], args, {"plain": {}}, np.arange(2))
    assert [*found.runs["plain"]] == [0, 1]
