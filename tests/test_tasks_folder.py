"""The folder of a run: what is removed and what is not, one run at a time, results first."""

import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict
from test_tasks import CONFIG, arguments, examples, same_weights, two_tasks, vit
from torch.utils.data import DataLoader
from transformers import (
    EvalPrediction,
    TrainerCallback,
    TrainingArguments,
    ViTForImageClassification,
)

import hf_ewc.report.writing as writing
from hf_ewc import EWCConfig, EWCTrainer, Task, compare_methods, estimate_fisher, run_tasks
from hf_ewc.tasks.evaluation import accuracy
from hf_ewc.tasks.folder_lock import only_run_in
from hf_ewc.tasks.run_folder import RunFolder
from hf_ewc.tasks.same_run import check_same_run


def run(folder, **options):
    return run_tasks(vit(), two_tasks(), arguments(folder, max_steps=1), CONFIG, **options)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run that is done, with what its user put beside what it wrote."""
    folder = tmp_path_factory.mktemp("done")
    run(folder)
    return folder


@pytest.fixture
def used(done, tmp_path):
    folder = tmp_path / "run"
    subprocess.run(["cp", "-r", done, folder], check=True)
    for place in (folder, folder / "01-0-or-1", folder / "01-0-or-1" / "final"):
        (place / "notes.txt").write_text("mine")
    (folder / "02-2-or-3" / "photos").mkdir()
    (folder / "02-2-or-3" / "photos" / "config.json").write_text("mine, too")
    (folder / "empty").mkdir()
    return folder


def mine(folder):
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.read_bytes().startswith(b"mine")
    )


def test_beginning_anew_removes_what_the_run_wrote_and_nothing_else(used, caplog):
    before = mine(used)
    assert len(before) == 4
    stale = used / "01-0-or-1" / "checkpoint-7"
    stale.mkdir()
    for name in ("model.safetensors", "optimizer.pt", "trainer_state.json"):
        (stale / name).write_text("{}")
    (used / "01-0-or-1" / "final" / "model-00001-of-00002.safetensors").write_text("old")
    result = run(used, resume=False)
    assert mine(used) == before
    assert (used / "empty").is_dir()
    assert not stale.exists()
    assert not (used / "01-0-or-1" / "final" / "model-00001-of-00002.safetensors").exists()
    assert result.matrix.num_learnt == 2
    assert "removes" in caplog.text
    assert "notes.txt" in caplog.text


def test_a_folder_that_is_a_link_is_cleared_where_it_leads_to(used, tmp_path):
    (used / "01-0-or-1").rename(tmp_path / "larger disk")
    (used / "01-0-or-1").symlink_to(tmp_path / "larger disk")
    old = tmp_path / "larger disk" / "checkpoint-1"
    (used / "01-0-or-1" / "final").rename(old)
    (old / "trainer_state.json").write_text('{"global_step": 1}')
    fresh = run(tmp_path / "fresh")
    result = run(used, resume=False)  # would go on from the old weights
    assert same_weights(result.model, fresh.model)
    assert (used / "01-0-or-1").is_symlink()
    assert (tmp_path / "larger disk" / "final" / "model.safetensors").is_file()


def test_a_link_to_nowhere_is_an_error(used, tmp_path):
    (used / "02-2-or-3").rename(tmp_path / "elsewhere")
    (used / "02-2-or-3").symlink_to(tmp_path / "not mounted")
    with pytest.raises(ValueError, match="which is not there"):
        run(used)


def test_tasks_without_results_are_not_removed(used):
    (used / "results.json").unlink()
    before = sorted(used.rglob("*"))
    with pytest.raises(ValueError, match=r"no results\.json .*resume=False"):
        run(used)
    assert sorted(p for p in used.rglob("*") if p.name != ".run_tasks.lock") == [
        p for p in before if p.name != ".run_tasks.lock"
    ]


def test_a_removal_that_fails_is_an_error(used, monkeypatch):
    def fail(self, missing_ok=False):
        raise PermissionError(f"not allowed: {self}")

    monkeypatch.setattr("pathlib.Path.unlink", fail)
    with pytest.raises(PermissionError, match="not allowed"):
        run(used, resume=False)


def test_a_folder_in_use_says_so(tmp_path):
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, pathlib\n"
            "from hf_ewc.tasks.folder_lock import only_run_in\n"
            "with only_run_in(pathlib.Path(sys.argv[1])):\n"
            "    print('held', flush=True); sys.stdin.read()",
            str(tmp_path),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=rf"in use by another run \(process {holder.pid}\)"):
            run(tmp_path)
    finally:
        holder.kill()
        holder.communicate()
    # The lock ended with its process.
    with only_run_in(tmp_path), pytest.raises(ValueError, match="in use"):
        run(tmp_path)


def test_what_killed_writers_left_is_removed(done, tmp_path):
    left = done / ".results.json.ab12cd_3"
    left.write_text("half")
    other = done / ".mine.results.json"
    other.write_text("mine")
    run(done)
    assert not left.exists()
    assert other.exists()
    other.unlink()


def test_results_are_there_though_the_report_fails(tmp_path, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise ValueError("no such glyph")

    monkeypatch.setattr(writing, "markdown", fail)
    result = run(tmp_path)
    assert result.matrix.num_learnt == 2
    assert len(json.loads((tmp_path / "results.json").read_text())["metrics"]) == 2
    assert "no such glyph" in caplog.text


def test_losses_are_shown_and_kept(tmp_path, capfd):
    args = arguments(
        tmp_path, max_steps=2, logging_strategy="steps", logging_steps=1, disable_tqdm=False
    )
    result = run_tasks(vit(), two_tasks(), args, CONFIG)
    kept = json.loads((tmp_path / "results.json").read_text())["history"]
    assert kept == result.history
    assert [[entry["step"] for entry in task] for task in kept] == [[1, 2], [1, 2]]
    assert all({"loss", "learning_rate", "epoch"} <= entry.keys() for entry in kept[0])
    assert "ewc_penalty" in kept[1][0]
    assert f"loss={kept[0][0]['loss']:.4g}" in capfd.readouterr().err
    again = run_tasks(vit(), two_tasks(), args, CONFIG)
    assert again.history == kept


class Never(TrainerCallback):
    def on_step_begin(self, *args, **kwargs):
        raise AssertionError("a step was taken")


def words(count=4):
    return [{"pixel_values": np.zeros((1, 4, 4)), "labels": "a word of 13"} for _ in range(count)]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(name="x" * 300), ValueError, "300 characters"),
        (dict(name="  "), ValueError, "is empty"),
        (dict(name="0 or 1"), ValueError, "name of its own"),
        (dict(name=3), TypeError, "a string, got 3"),
        (dict(train_dataset=None), ValueError, "no train_dataset"),
        (dict(train_dataset=[]), ValueError, "is empty"),
        (dict(train_dataset="data.csv"), TypeError, r"data\.csv"),
        (dict(eval_dataset=pd.DataFrame({"labels": [1]})), TypeError, "from_pandas"),
        (dict(eval_dataset=DataLoader([{"labels": 1}])), TypeError, "give its .dataset"),
        (dict(train_dataset=DataLoader([{"labels": 1}])), TypeError, "give its .dataset"),
        (dict(eval_dataset={1, 2}), TypeError, "no order; give a list"),
        (dict(eval_dataset={"a": examples((2, 3))}), TypeError, "one data set"),
        (dict(train_dataset=DatasetDict()), TypeError, "one data set"),
        (dict(train_dataset=words()), ValueError, "strings, such as 'a word of 13'"),
        (
            dict(eval_dataset=Dataset.from_dict({"label": [["B", "O"]], "x": [1]})),
            ValueError,
            r"strings, such as 'B'.*class_encode_column",
        ),
    ],
)
def test_what_is_wrong_with_a_later_task_is_said_before_the_first_step(
    tmp_path, change, error, message
):
    first, second = two_tasks(masked=False)
    fields = dict(train_dataset=second.train_dataset, eval_dataset=second.eval_dataset)
    later = Task(**(dict(name="later") | fields | change))
    with pytest.raises(error, match=message):
        run_tasks(vit(), [first, later], arguments(tmp_path), CONFIG, callbacks=[Never()])


def test_the_longest_name_that_is_allowed(tmp_path):
    task = two_tasks()[0]
    folder = RunFolder(tmp_path, [Task("ü" * 200, task.train_dataset, task.eval_dataset)])
    folder.model(0).mkdir(parents=True)


class Listening(EWCTrainer):
    given: ClassVar[list] = []

    def consolidate(self, *args, log_likelihood=None, **kwargs):
        self.given.append(log_likelihood)
        return super().consolidate(*args, **kwargs)


def test_a_given_likelihood_reaches_the_fisher(tmp_path):
    run(tmp_path, log_likelihood=vit, trainer_class=Listening)
    assert Listening.given == [vit, vit]


@pytest.mark.parametrize(("now", "goes_on"), [(EWCConfig().ewc_give_up, True), (0.2, False)])
def test_a_run_goes_on_that_began_before_a_setting_was_there(now, goes_on):
    """What it does not tell of EWC was as it is untouched."""
    config = asdict(EWCConfig(ewc_lambda=10.0))
    before = {"tasks": [], "ewc_config": {k: v for k, v in config.items() if k != "ewc_give_up"}}
    wanted = {"tasks": [], "ewc_config": config | {"ewc_give_up": now}}
    with nullcontext() if goes_on else pytest.raises(ValueError, match=r"0\.03 there, 0\.2 now"):
        check_same_run(Path("results.json"), before, wanted)


def test_a_run_goes_on_with_other_batches_of_the_fisher(used):
    other = replace(CONFIG, fisher_batch_size=3)
    assert run_tasks(vit(), two_tasks(), arguments(used, max_steps=1), other).state
    with pytest.raises(ValueError, match=r"ewc_config\.fisher_samples"):
        run_tasks(vit(), two_tasks(), arguments(used), replace(CONFIG, fisher_samples=3))


@pytest.mark.parametrize(
    ("name", "text"), [("results.json", '{"mine": 1}'), ("replay.json", '{"mine": [1]}')]
)
def test_somebodys_file_of_a_runs_name_is_not_removed(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name} is of no run by run_tasks"):
        run(tmp_path, resume=False)
    assert (tmp_path / name).read_text() == text


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("name", ["report.md", "curves.png", "importance.png", "costs.json"])
def test_somebodys_report_is_not_written_over(name, resume, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"has {name} and no results.json"):
        run(tmp_path, resume=resume)
    with pytest.raises(ValueError, match=f"has {name} and no results.json"):
        compare_methods(vit, two_tasks()[:1], arguments(tmp_path, max_steps=1), {"plain": {}}, [0])
    assert mine(tmp_path) == [name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": "1e-3"}, "sets learning_rate to '1e-3'; needed is a number"),
        ({"max_steps": 2.5}, "sets max_steps to 2.5; needed is an integer"),
        ({"max_steps": True}, "sets max_steps to True; needed is an integer"),
        ({"per_device_train_batch_size": 0}, "size to 0; needed is at least 1"),
        ({"gradient_accumulation_steps": 0}, "steps to 0; needed is at least 1"),
        ({"num_train_epochs": 0, "max_steps": -1}, "epochs to 0, by which it would be trained for"),
        ({"optim": "adamw_8bit"}, "an optimizer or a schedule that there is not: .*bitsandbytes"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "that there is not: .*min_lr"),
    ],
)
def test_settings_of_a_later_task_or_method_are_looked_at_first(changes, message, tmp_path):
    first, second = two_tasks()
    with pytest.raises(ValueError, match=f"task '2 or 3' .*{message}"):
        run_tasks(
            vit(), [first, replace(second, training_args=changes)], arguments(tmp_path), CONFIG
        )
    with pytest.raises(ValueError, match=f"method 'other' .*{message}"):
        compare_methods(
            vit, [first], arguments(tmp_path), {"plain": {}, "other": changes}, seeds=[0]
        )
    assert not [*tmp_path.glob("*/*")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": -1.0}, "the run sets learning_rate to -1.0; needed is a number from 0"),
        ({"learning_rate": None}, "the run sets learning_rate to None; needed is a number"),
        ({"learning_rate": float("nan")}, "the run sets learning_rate to nan; needed is a number"),
        ({"per_device_train_batch_size": 0}, "the run sets .*_size to 0; needed is at least 1"),
        ({"lr_scheduler_kwargs": {"a": 1}}, "the run has an optimizer or a schedule that .*'a'"),
        (
            {"num_train_epochs": 0},
            "task '2 or 3' has num_train_epochs 0 and max_steps -1, by which",
        ),
        ({"num_train_epochs": -1}, "task '2 or 3' has num_train_epochs -1 and max_steps -1"),
    ],
)
def test_settings_of_a_run_that_could_not_be_trained(changes, message, tmp_path):
    first, second = two_tasks()
    first = replace(first, training_args={"max_steps": 1})
    with pytest.raises(ValueError, match=message):
        run_tasks(vit(), [first, second], arguments(tmp_path, **changes), CONFIG)
    assert not [*tmp_path.glob("*")]


@dataclass
class OwnArguments(TrainingArguments):
    more: "OfAnotherModule | None" = None  # noqa: F821


def test_arguments_of_a_class_whose_hints_cannot_be_read(tmp_path):
    options = {"max_steps": 1, "report_to": "none", "use_cpu": True, "save_strategy": "no"}
    done = run_tasks(vit(), two_tasks()[:1], OwnArguments(str(tmp_path), **options), CONFIG)
    assert done.matrix.num_learnt == 1


def test_settings_that_are_allowed_in_a_task_stay_so(tmp_path):
    first, second = two_tasks()
    allowed = {"num_train_epochs": 0, "warmup_steps": 0.5, "lr_scheduler_type": "cosine"}
    second = replace(second, training_args={**allowed, "optim": "adafactor", "eval_steps": None})
    done = run_tasks(vit(), [first, second], arguments(tmp_path, max_steps=1), CONFIG)
    assert done.matrix.num_learnt == 2


def test_a_model_is_no_way_to_make_models(tmp_path):
    for wrong in (vit(), "bert-base-uncased"):
        with pytest.raises(TypeError, match=r"make_model is a .*; needed is a function"):
            compare_methods(wrong, two_tasks(), arguments(tmp_path), {"plain": {}})
    with pytest.raises(TypeError, match="seeds is 3; give a list"):
        compare_methods(vit, two_tasks(), arguments(tmp_path), {"plain": {}}, seeds=3)


def test_classes_are_numbers_of_labels_in_a_list_or_an_array():
    data = examples(range(4))
    for classes in (np.array([0, 1]), torch.tensor([0, 1]), range(2), (0, 1)):
        assert list(Task("a", data, data, classes=classes).classes) == [0, 1]
    for wrong in ([False, True], np.array([True]), ["0", "1"], 2, [0.5]):
        with pytest.raises(TypeError, match=r"the classes of task 'a' are .*; needed is a list"):
            Task("a", data, data, classes=wrong)


def test_a_comparison_is_not_removed_for_a_run(tmp_path):
    compare_methods(vit, two_tasks()[:1], arguments(tmp_path, max_steps=1), {"plain": {}}, [0])
    before = (tmp_path / "results.json").read_bytes()
    for resume in (True, False):
        with pytest.raises(ValueError, match="is of no run by run_tasks") as said:
            run(tmp_path, resume=resume)
        assert "\n" not in str(said.value)
    assert (tmp_path / "results.json").read_bytes() == before


def test_files_that_are_only_named_like_a_runs_stay(used):
    final = used / "01-0-or-1" / "final"
    names = ["model-backup.safetensors", "tokenizer_mine.json", "ewc_state_copy.safetensors"]
    for name in names:
        (final / name).write_text("mine")
    run(used, resume=False)
    assert [(final / name).read_text() for name in names] == ["mine"] * 3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"log_likelihood": "x"}, TypeError, "log_likelihood is 'x'; needed is a function"),
        ({"after_task": "x"}, TypeError, "after_task is 'x'; needed is a function"),
        ({"data_collator": 3}, TypeError, "data_collator is 3; needed is a function"),
        ({"optimizers": (object(), object())}, ValueError, "optimizers= are given for 2 tasks"),
    ],
)
def test_what_could_only_fail_later_is_refused_first(options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        run(tmp_path, **options)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"fisher_dataset": pd.DataFrame()}, TypeError, "the fisher_dataset of task '0 or 1' is"),
        ({"fisher_dataset": []}, ValueError, "the fisher_dataset of task '0 or 1' is empty"),
        ({"weight": True}, ValueError, "weight of task '0 or 1' is True"),
        (
            {"train_dataset": iter([1])},
            TypeError,
            "train_dataset of task '0 or 1' is a .*read once",
        ),
    ],
)
def test_all_of_a_task_is_looked_at_first(changes, error, message, tmp_path):
    tasks = [replace(two_tasks()[0], **changes)]
    with pytest.raises(error, match=message):
        run_tasks(vit(), tasks, arguments(tmp_path), CONFIG)


def test_a_run_goes_on_with_the_settings_that_change_its_weights_alone(tmp_path):
    tasks = two_tasks()
    run_tasks(vit(), tasks[:1], arguments(tmp_path, max_steps=1))
    with pytest.raises(ValueError, match=r"args\.adam_beta1: 0\.9 there, 0\.5 now"):
        run_tasks(vit(), tasks, arguments(tmp_path, max_steps=1, adam_beta1=0.5))


def test_a_fisher_of_outputs_that_are_no_numbers_says_so():
    class Broken(ViTForImageClassification):
        def forward(self, *args, **kwargs):
            found = super().forward(*args, **kwargs)
            found["logits"] = found["logits"] * float("nan")
            return found

    model = Broken(vit().config)
    with pytest.raises(ValueError, match="outputs are NaN on these examples"):
        estimate_fisher(model, examples((0, 1)), fisher_type="exact")


def test_a_score_of_outputs_that_are_no_numbers_is_missing():
    predictions = np.array([[np.nan, np.nan], [0.0, 1.0]])
    given = EvalPrediction(predictions=predictions, label_ids=np.array([0, 1]))
    assert np.isnan(accuracy(given)["accuracy"])
    masked = np.array([[-np.inf, 0.0], [0.0, 1.0]])  # as of a class that is another task's
    assert accuracy(EvalPrediction(masked, np.array([1, 1])))["accuracy"] == 1.0


# Weights that are not those that were saved


def flipped(path):
    content = bytearray(path.read_bytes())
    content[-9] ^= 0x40
    path.write_bytes(content)


def emptied(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flipped, emptied, Path.unlink])
def test_a_run_does_not_go_on_from_damaged_weights(damage, tmp_path):
    args = arguments(tmp_path, max_steps=2)
    run_tasks(vit(), two_tasks()[:1], args, CONFIG)
    (weights,) = tmp_path.glob("01-*/final/model.safetensors")
    kept = weights.read_bytes()
    damage(weights)
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(ValueError, match=rf"{re.escape(str(weights))} is (damaged|missing)"):
        run_tasks(vit(), two_tasks(), args, CONFIG)
    assert (tmp_path / "results.json").read_bytes() == before
    weights.write_bytes(kept)
    assert run_tasks(vit(), two_tasks(), args, CONFIG).matrix.num_learnt == 2


def test_weights_of_heads_are_known_too(tmp_path):
    def of_own_head(task):
        rows = [{**row, "labels": row["labels"] % 2} for row in task.train_dataset]
        return Task(task.name, rows, rows, head=2)

    sequence = [of_own_head(task) for task in two_tasks()]
    args = arguments(tmp_path, max_steps=2)
    run_tasks(vit(2), sequence[:1], args)
    (heads,) = tmp_path.glob("01-*/final/heads.safetensors")
    flipped(heads)
    with pytest.raises(ValueError, match=r"heads\.safetensors is damaged"):
        run_tasks(vit(2), sequence, args)


# What has changed since a run was begun, although names and sizes are the same


def with_labels_turned(task):
    turned = [{**row, "labels": 1 - row["labels"]} for row in task.train_dataset]
    return replace(task, train_dataset=turned)


def test_other_data_and_models_are_said_when_a_run_goes_on(tmp_path, caplog):
    args = arguments(tmp_path, max_steps=1)
    first, second = two_tasks()
    run_tasks(vit(), [first], args, CONFIG)
    run_tasks(vit(), [first, second], args, CONFIG)
    assert not [m for m in caplog.messages if "was begun with others" in m]
    other = vit()
    other.vit.layers[0].mlp.activation_fn = torch.nn.ReLU()
    run_tasks(other, [with_labels_turned(first), second], args, CONFIG)
    (said,) = [m for m in caplog.messages if "was begun with others" in m]
    assert "the training data of task '0 or 1', the model's modules." in said
    caplog.clear()
    other = vit()
    other.config._name_or_path = "elsewhere/vit"
    run_tasks(other, [first, second], args, CONFIG)
    assert not [m for m in caplog.messages if "was begun with others" in m]  # it had no name


def test_a_model_of_another_name_and_few_other_examples_are_said(tmp_path, caplog):
    args, models = arguments(tmp_path, max_steps=1), [vit(), vit()]
    for model, name in zip(models, ("here/vit", "there/vit"), strict=True):
        model.config._name_or_path = name
    first, second = two_tasks()
    run_tasks(models[0], [first], args, CONFIG)
    data = list(second.eval_dataset)
    data[5] = {**data[5], "labels": 2 + (data[5]["labels"] + 1) % 2}
    run_tasks(models[0], [first, second], args, CONFIG)
    run_tasks(models[1], [first, replace(second, eval_dataset=data)], args, CONFIG)
    (said,) = [m for m in caplog.messages if "was begun with others" in m]
    assert "the evaluation data of task '2 or 3', the model here/vit (now there/vit)." in said


@pytest.mark.parametrize(("factor", "is_same"), [(1 + 1e-6, True), (1.01, False)])
def test_a_state_is_the_same_up_to_rounding(factor, is_same, tmp_path):
    """A Fisher that is estimated anew for the same call differs in its last digits."""
    trainer = EWCTrainer(
        vit(), arguments(tmp_path / "a"), train_dataset=examples((0, 1)), ewc_config=CONFIG
    )
    state = trainer.consolidate(name="before")
    args, begun = arguments(tmp_path / "run", max_steps=1), two_tasks()[:1]
    run_tasks(vit(), begun, args, CONFIG, ewc_state=state)
    (record,) = state.tasks
    object.__setattr__(record, "fisher_trace", record.fisher_trace * factor)
    with nullcontext() if is_same else pytest.raises(ValueError, match=r"state\[0\]\[1\]: "):
        run_tasks(vit(), two_tasks(), args, CONFIG, ewc_state=state)


def test_data_that_are_others_each_time_are_not_told_apart(tmp_path, caplog):
    class Augmented(list):
        def __getitem__(self, i):
            row = super().__getitem__(i)
            return {**row, "pixel_values": row["pixel_values"] + torch.rand(())}

    task, args = two_tasks()[0], arguments(tmp_path, max_steps=1)
    task = replace(task, train_dataset=Augmented(task.train_dataset))
    for _ in range(2):
        run_tasks(vit(), [task], args, CONFIG)
    assert not [m for m in caplog.messages if "was begun with others" in m]


def test_a_state_that_comes_later_is_refused(tmp_path):
    args = arguments(tmp_path / "run", max_steps=1)
    run_tasks(vit(), two_tasks()[:1], args, CONFIG)
    trainer = EWCTrainer(
        vit(), arguments(tmp_path / "b"), train_dataset=examples((0, 1)), ewc_config=CONFIG
    )
    with pytest.raises(ValueError, match="state: "):
        run_tasks(vit(), two_tasks(), args, CONFIG, ewc_state=trainer.consolidate(name="before"))


def test_a_run_stays_in_its_folder_where_a_users_function_changes_the_directory(
    tmp_path, monkeypatch
):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    result = run("run", after_task=lambda *given: os.chdir(tmp_path / "elsewhere"))
    assert result.output_dir == tmp_path / "run"
    assert not list((tmp_path / "elsewhere").iterdir())
    assert (tmp_path / "run/report.md").exists()
    kept = sorted(path.parent.name for path in (tmp_path / "run").glob("*/final"))
    assert kept == ["01-0-or-1", "02-2-or-3"]


@pytest.mark.parametrize("name", ["report.md", "curves.png", "importance.png"])
def test_a_page_that_a_kill_left_out_is_made_later(name, tmp_path):
    run(tmp_path)
    (tmp_path / name).unlink()
    run(tmp_path)
    assert (tmp_path / name).exists()


@pytest.mark.parametrize("model", ["bert-base-uncased", None, torch.nn.Linear])
def test_what_is_no_model(model, tmp_path):
    with pytest.raises(TypeError, match="needed is a model, such as"):
        run_tasks(model, two_tasks(), arguments(tmp_path, max_steps=1))


def test_a_name_in_place_of_a_processor(tmp_path):
    with pytest.raises(TypeError, match="processing_class is 'bert'"):
        run(tmp_path, processing_class="bert")
