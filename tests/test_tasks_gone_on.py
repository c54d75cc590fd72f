"""A run that goes on: after early stopping, beside what another run left, from other weights."""

import copy
import functools
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from test_tasks import CONFIG, arguments, examples, same_weights, two_tasks, vit
from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
    ViTImageProcessor,
    default_data_collator,
)

from hf_ewc import SequenceConfig, compare_methods, run_tasks
from hf_ewc.tasks.fingerprints import of_data, of_weights
from hf_ewc.tasks.folder_lock import LOCK_FILE, only_run_in
from hf_ewc.tasks.runner import planned
from hf_ewc.tasks.same_run import check_same_run, settings_of


class KilledAt(TrainerCallback):
    """Raises in the training of the second task."""

    def __init__(self, event, step=None):
        setattr(self, event, self._raise)
        self._step = step

    def _raise(self, args, state, control, **kwargs):
        if args.seed == 1 and self._step in (None, state.global_step):
            raise RuntimeError("killed")


def never_better(prediction):
    return {"accuracy": 0.5}


@pytest.mark.parametrize("load_best", [False, True])
@pytest.mark.parametrize(("event", "step"), [("on_step_end", 7), ("on_train_end", None)])
def test_early_stopping_ends_where_it_would_have_without_a_kill(event, step, load_best, tmp_path):
    def run(folder, *callbacks):
        args = arguments(
            folder, num_train_epochs=9, per_device_train_batch_size=8, eval_strategy="epoch",
            save_strategy="epoch", load_best_model_at_end=load_best, seed=0,
            metric_for_best_model="accuracy", greater_is_better=True,
        )  # fmt: skip
        tasks = [replace(task, compute_metrics=never_better) for task in two_tasks()]
        return run_tasks(vit(), tasks, args, callbacks=[EarlyStoppingCallback(3), *callbacks])

    whole = run(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "killed", KilledAt(event, step))
    again = run(tmp_path / "killed")
    steps = [
        json.loads((tmp_path / name / "results.json").read_text())["steps"]
        for name in ("whole", "killed")
    ]
    assert steps[0] == steps[1]
    assert steps[0][1] < 9 * len(two_tasks()[1].train_dataset) / 8
    assert same_weights(whole.model, again.model)


def test_a_task_does_not_go_on_from_another_runs_checkpoint(tmp_path):
    def run(tasks, resume=True, **changes):
        args = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1, **changes)
        return run_tasks(vit(), tasks, args, CONFIG, resume=resume)

    run(two_tasks(), learning_rate=0.1)
    run(two_tasks()[:1], resume=False)
    left = sorted((tmp_path / "02-2-or-3").rglob("*"))
    with pytest.raises(ValueError, match=r"02-2-or-3 has \d+ files of an earlier run"):
        run(two_tasks())
    assert sorted((tmp_path / "02-2-or-3").rglob("*")) == left
    # The results of before are still there, and the same without what was left.
    (tmp_path / "02-2-or-3").rename(tmp_path / "elsewhere")
    run(two_tasks())
    assert json.loads((tmp_path / "results.json").read_text())["begun"] == 2


def test_a_run_of_a_version_that_did_not_write_what_was_begun_goes_on(tmp_path):
    def run(*callbacks):
        args = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1, seed=0)
        return run_tasks(vit(), two_tasks(), args, CONFIG, callbacks=list(callbacks))

    from hf_ewc.files import write_atomically
    from hf_ewc.report.results import read_outcomes, write_results

    with pytest.raises(RuntimeError, match="killed"):
        run(KilledAt("on_step_end", 2))
    path = tmp_path / "results.json"
    outcomes, details = read_outcomes(path)
    write_atomically(path, "")
    details = {k: v for k, v in details.items() if k not in ("begun", "checksum", "methods")}
    write_results(path, outcomes, details)
    assert "begun" not in path.read_text()
    assert len(run().metrics) == 2


def test_other_weights_are_said_where_a_run_begins_from_them(tmp_path, caplog):
    def run(model, *callbacks, **options):
        args = arguments(tmp_path / str(len(options)), max_steps=3, seed=1)
        return run_tasks(model, two_tasks(), args, callbacks=list(callbacks), **options)

    for options in ({}, {"sequence_config": SequenceConfig(joint_training=True)}):
        model = vit()
        with pytest.raises(RuntimeError, match="killed"):
            run(model, KilledAt("on_step_end", 2), **options)
        caplog.clear()
        run(model, **options)
        assert "begun with others than these: the model's weights, the callbacks." in caplog.text
        caplog.clear()
        run(model, **options)  # done: nothing begins from the model
        assert "the model's weights" not in caplog.text


def test_a_fingerprint_of_weights_sees_each_parameter():
    model = vit()
    before = of_weights(model)
    assert of_weights(vit()) == before
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.add_(1e-3)
        assert of_weights(model) != before
        with torch.no_grad():
            parameter.copy_(parameter)
        before = of_weights(model)


def test_examples_may_be_views_with_gaps():
    table = torch.arange(12.0).view(4, 3)
    rows = [{"x": table[:, i], "labels": 0} for i in range(3)]
    assert of_data(rows) == of_data([{"x": r["x"].clone(), "labels": 0} for r in rows])
    assert of_data(rows) != of_data(rows[::-1])


def test_a_seed_that_a_later_task_would_not_have_is_refused_first(tmp_path):
    last = 2**32 - 1
    with pytest.raises(ValueError, match=f"seed is {last}; allowed is 0 to {last - 1}"):
        run_tasks(vit(), two_tasks(), arguments(tmp_path / "run", seed=last))
    with pytest.raises(ValueError, match=f"seed is {last}; allowed is 0 to {last - 1}"):
        compare_methods(
            vit, two_tasks(), arguments(tmp_path / "all"), {"plain": None}, seeds=[0, last]
        )
    assert not list(tmp_path.iterdir())
    run_tasks(vit(), two_tasks(), arguments(tmp_path / "run", seed=last - 1, max_steps=1))


IN_USE = """
import sys
from pathlib import Path
from hf_ewc.tasks.folder_lock import only_run_in
try:
    with only_run_in(Path(sys.argv[1])):
        print("entered")
except ValueError as error:
    print(error)
"""


def test_a_lock_holds_though_its_process_reads_the_file(tmp_path):
    def another():
        command = [sys.executable, "-c", IN_USE, str(tmp_path)]
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()}
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    with only_run_in(tmp_path):
        (tmp_path / LOCK_FILE).read_text()  # as a copy of the folder does
        assert f"in use by another run (process {os.getpid()})" in another()
        with pytest.raises(ValueError, match="in use"), only_run_in(tmp_path):
            pass
        assert "in use" in another()
    assert another() == "entered\n"


@pytest.mark.parametrize("saves_its_own", [False, True])
def test_what_a_user_puts_beside_a_model_stays_where_the_last_is_kept(saves_its_own, tmp_path):
    given = {"processing_class": ViTImageProcessor(size=4)} if saves_its_own else {}
    last = SequenceConfig(keep_models="last")

    def run(tasks):
        run_tasks(vit(), tasks, arguments(tmp_path, max_steps=1), sequence_config=last, **given)

    run(two_tasks()[:1])
    final = tmp_path / "01-0-or-1/final"
    written = {path.name for path in final.iterdir()}
    mine = {"tokenizer.json", "vocab.txt", "preprocessor_config.json"} - written
    assert len(mine) == 3 - saves_its_own
    for name in mine:
        (final / name).write_text("mine")
    run(two_tasks())
    assert {path.name for path in final.iterdir()} == mine


def test_beginning_anew_keeps_what_a_user_put_beside_a_model(tmp_path):
    args = arguments(tmp_path, max_steps=1)
    run_tasks(vit(), two_tasks()[:1], args)
    mine = tmp_path / "01-0-or-1/final/tokenizer.json"
    mine.write_text("mine")
    run_tasks(vit(), two_tasks()[:1], args, resume=False)
    assert mine.read_text() == "mine"
    # What cannot be read says nothing of files, which are then known by their names.
    (tmp_path / "results.json").write_text("{")
    run_tasks(vit(), two_tasks()[:1], args, resume=False)
    assert not mine.exists()


def test_what_is_trained_and_its_dtypes_are_known(tmp_path, caplog):
    def run(model):
        caplog.clear()
        run_tasks(model, two_tasks(), arguments(tmp_path, max_steps=1))
        return "dtypes or which of its parameters are trained" in caplog.text

    frozen = vit()
    frozen.vit.embeddings.requires_grad_(False)
    assert not run(vit())
    assert not run(vit())
    assert run(frozen)
    assert run(vit().bfloat16())
    other = vit()
    other.config.num_attention_heads = 1
    assert run(other)
    assert not run(vit())


class Gone(TrainerCallback):
    """A tracker whose server is gone once a task is trained."""

    def __init__(self, name):
        self.name = name

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.name in str(logs):
            raise ConnectionError("the server is gone")

    def on_train_end(self, args, state, control, **kwargs):
        raise OSError("no space left")


@pytest.mark.parametrize("when", ["eval_", "task/", "nowhere"])
def test_a_tracker_that_fails_costs_no_task(when, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("hf_ewc.tasks.task_run.reporting", lambda args: [Gone(when)])
    result = run_tasks(vit(), two_tasks(), arguments(tmp_path, max_steps=1))
    assert len(result.metrics) == 2
    assert json.loads((tmp_path / "results.json").read_text())["metrics"] == result.metrics
    assert ("ConnectionError: the server is gone" in caplog.text) == (when != "nowhere")
    assert "OSError: no space left" in caplog.text


def test_a_tracker_that_fails_during_training_ends_it(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_ewc.tasks.task_run.reporting", lambda args: [Gone("'loss'")])
    args = arguments(tmp_path, max_steps=2, logging_strategy="steps", logging_steps=1)
    with pytest.raises(ConnectionError):
        run_tasks(vit(), two_tasks(), args)


def test_a_checkpoint_without_an_optimizer_is_not_gone_on_from(tmp_path, caplog):
    def run(folder, *callbacks):
        args = arguments(
            folder, max_steps=4, seed=0, save_strategy="steps", save_steps=1, save_only_model=True
        )
        return run_tasks(vit(), two_tasks(), args, CONFIG, callbacks=list(callbacks))

    whole = run(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "killed", KilledAt("on_step_end", 3))
    again = run(tmp_path / "killed")
    assert "cannot be gone on from: the task begins anew" in caplog.text
    assert same_weights(whole.model, again.model)


@pytest.mark.parametrize("name", ["results.json", "report.md", "curves.png"])
def test_a_method_is_not_named_after_a_file_of_the_comparison(name, tmp_path):
    with pytest.raises(ValueError, match=f"folder would be {name}"):
        compare_methods(vit, two_tasks(), arguments(tmp_path), {name: None}, seeds=[0])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "costs", ['[{"seconds": null}]', '[{"seconds": "1"}]', "[" * 100_000, '[{"seconds": NaN}]', "{"]
)
def test_damaged_costs_end_no_run(costs, tmp_path):
    def run():
        return run_tasks(vit(), two_tasks(), arguments(tmp_path, max_steps=1))

    run()
    (tmp_path / "costs.json").write_text(costs)
    assert run().cost.seconds == 0.0


@pytest.mark.parametrize("text", ["{", "[]", "null", "[" * 100_000])
def test_a_damaged_list_of_replayed_examples_says_so(text, tmp_path):
    def run(*callbacks, **options):
        args = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1, seed=0)
        config = SequenceConfig(replay_share=0.2)
        return run_tasks(
            vit(), two_tasks(), args, sequence_config=config, callbacks=list(callbacks), **options
        )

    with pytest.raises(RuntimeError, match="killed"):
        run(KilledAt("on_step_end", 2))
    (tmp_path / "replay.json").write_text(text)
    with pytest.raises(ValueError, match=r"replay.json is damaged"):
        run()
    assert len(run(resume=False).metrics) == 2


def scaled(outputs, labels, num_items_in_batch=None, factor=1.0):
    return factor * torch.nn.functional.cross_entropy(outputs.logits, labels)


class Words:
    """Stands for a tokenizer."""

    def __init__(self, name, size):
        self.name_or_path, self._size = name, size

    def __len__(self):
        return self._size

    def __call__(self, texts):
        return {}

    def save_pretrained(self, folder):
        pass


def test_another_processor_is_said(tmp_path, caplog):
    def run(words):
        caplog.clear()
        run_tasks(vit(), two_tasks(), arguments(tmp_path, max_steps=1), processing_class=words)
        return "with others than these: the processing_class." in caplog.text

    assert not run(Words("small", 9))
    assert not run(Words("small", 9))
    assert run(Words("large", 9))
    assert run(Words("small", 10))


def test_other_numbers_of_processes_are_said(tmp_path, caplog):
    plan = planned(two_tasks(), arguments(tmp_path, max_steps=1))
    wanted = settings_of(plan, vit())
    found = copy.deepcopy(wanted)
    found["looks"]["processes"] = 4
    check_same_run(tmp_path / "results.json", found, wanted)
    assert "with others than these: the number of processes" in caplog.text


def test_other_callbacks_are_said(tmp_path, caplog):
    def run(*callbacks):
        caplog.clear()
        run_tasks(vit(), two_tasks(), arguments(tmp_path, max_steps=1), callbacks=list(callbacks))
        return "with others than these: the callbacks." in caplog.text

    class Anneals(TrainerCallback):
        pass

    assert not run(Anneals)
    assert not run(Anneals())  # the same as a class and as an object
    assert run()
    assert run(Anneals(), TrainerCallback())


def test_other_settings_of_functions_and_collators_are_said(tmp_path, caplog):
    def run(factor):
        caplog.clear()
        loss = functools.partial(scaled, factor=factor)
        args = arguments(tmp_path, max_steps=1)
        run_tasks(vit(), two_tasks(), args, compute_loss_func=loss)
        return "settings of the data collator, loss function or likelihood" in caplog.text

    assert not run(1.0)
    assert not run(1.0)
    assert run(2.0)


def test_a_task_of_the_other_direction_or_collator_is_refused(tmp_path):
    def run(**changes):
        tasks = [replace(task, **changes) for task in two_tasks()]
        return run_tasks(vit(), tasks, arguments(tmp_path, max_steps=1))

    run()
    with pytest.raises(ValueError, match=r"tasks\[0\].lower_is_better: False there, True now"):
        run(greater_is_better=False)
    with pytest.raises(ValueError, match=r"tasks\[0\].data_collator: None there, "):
        run(data_collator=default_data_collator)
    path = tmp_path / "results.json"
    settings = json.loads(path.read_text())["settings"]
    wanted = copy.deepcopy(settings)
    for task in settings["tasks"]:  # as an earlier version wrote them
        del task["lower_is_better"], task["data_collator"]
    check_same_run(path, settings, wanted)


def test_fisher_data_of_other_contents_are_said(tmp_path, caplog):
    def run(seed):
        caplog.clear()
        tasks = [replace(t, fisher_dataset=examples(t.classes, 8, seed)) for t in two_tasks()]
        run_tasks(vit(), tasks, arguments(tmp_path, max_steps=1), CONFIG)
        return "the Fisher's data of task '0 or 1'" in caplog.text

    assert not run(3)
    assert not run(3)
    assert run(4)


def test_methods_that_are_compared_no_more_are_named(tmp_path, caplog):
    def compare(*names):
        caplog.clear()
        methods = dict.fromkeys(names)
        compare_methods(vit, two_tasks(), arguments(tmp_path, max_steps=1), methods, seeds=[0])
        return caplog.text

    assert "compares" not in compare("plain", "once more")
    assert "compares plain too" in compare("once more")
    assert (tmp_path / "plain/seed-0/results.json").exists()
    assert "compares" not in compare("plain", "once more")
