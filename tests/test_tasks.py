"""The runner over tasks: scores, scenarios, and going on after a kill as if there was none."""

import json
import re
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    default_data_collator,
    set_seed,
)

from hf_ewc import EWCConfig, EWCState, EWCTrainer, Task, run_tasks
from hf_ewc.tasks.evaluation import accuracy
from hf_ewc.tasks.scenario import guess_scenario, labels_in_rows_of, labels_of
from tests.processes import FORKS
from tests.test_results import sealed

SIZES = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)


def vit(num_labels=4):
    set_seed(0)
    images = dict(image_size=4, patch_size=2, num_channels=1, num_labels=num_labels)
    return ViTForImageClassification(ViTConfig(**SIZES, **images))


def examples(classes, count=24, seed=0):
    """Images of noise with one bright row, which tells the class."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        label = classes[i % len(classes)]
        image = 0.3 * torch.randn(1, 4, 4, generator=generator)
        image[0, label % 4] += 2
        found.append({"pixel_values": image, "labels": label})
    return found


def two_tasks(masked=True):
    return [
        Task(
            name=f"{classes[0]} or {classes[1]}",
            train_dataset=examples(classes, seed=0),
            eval_dataset=examples(classes, 16, seed=1),
            classes=classes if masked else None,
        )
        for classes in [(0, 1), (2, 3)]
    ]


def arguments(folder, **options):
    defaults = dict(
        output_dir=str(folder),
        num_train_epochs=3,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    return TrainingArguments(**{**defaults, **options})


CONFIG = EWCConfig(ewc_lambda=100.0, fisher_samples=8)


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_run_saves_everything_and_protects(tmp_path):
    model = vit()
    result = run_tasks(model, two_tasks(), arguments(tmp_path), CONFIG, joint=[1.0, 1.0])
    assert result.matrix.num_learnt == 2
    assert np.isnan(result.matrix[0, 1])
    assert result.matrix[0, 0] > 0.7
    assert set(result.matrix.summary()) == {
        "average_accuracy",
        "backward_transfer",
        "forgetting",
        "learning_accuracy",
        "intransigence",
    }
    assert result.metrics[1]["0 or 1"]["accuracy"] == result.matrix[1, 0]
    assert set(result.metrics[0]["0 or 1"]) == {"accuracy", "loss"}
    assert result.state.num_tasks == 2
    assert [record.name for record in result.state.tasks] == ["0 or 1", "2 or 3"]
    for name in ("results.json", "report.md", "accuracy_matrix.png", "curves.png"):
        assert (tmp_path / name).stat().st_size > 0
    final = tmp_path / "02-2-or-3" / "final"
    assert same_weights(ViTForImageClassification.from_pretrained(final), model)
    saved = EWCState.from_pretrained(final)
    assert all(torch.equal(saved.anchor[n], a) for n, a in result.state.anchor.items())
    assert "class-incremental" not in (tmp_path / "report.md").read_text()


def test_without_ewc_it_is_the_plain_trainer(tmp_path):
    result = run_tasks(
        vit(), two_tasks(masked=False), arguments(tmp_path / "run"), scenario="domain"
    )
    assert result.state is None
    model = vit()
    for index, task in enumerate(two_tasks()):
        args = arguments(tmp_path / "plain", seed=42 + index)
        Trainer(model=model, args=args, train_dataset=task.train_dataset).train()
    assert same_weights(result.model, model)


def test_scores_count_only_the_tasks_classes(tmp_path):
    """The score of a masked task is the argmax among its own classes, found here by hand."""
    tasks = two_tasks()
    result = run_tasks(vit(), tasks, arguments(tmp_path), mask_training=False)
    images = torch.stack([e["pixel_values"] for e in tasks[0].eval_dataset])
    labels = torch.tensor([e["labels"] for e in tasks[0].eval_dataset])
    with torch.no_grad():
        logits = result.model(pixel_values=images).logits
    own = logits[:, :2].argmax(-1)
    assert result.matrix[1, 0] == pytest.approx((own == labels).float().mean().item())
    # Trained on 2 or 3 last, without a mask: over all classes it would score far less.
    assert (logits.argmax(-1) >= 2).float().mean() > 0.5


def test_masked_training_leaves_the_other_rows_of_the_head_alone(tmp_path):
    before = vit().classifier.weight.detach().clone()
    result = run_tasks(vit(), two_tasks()[:1], arguments(tmp_path), CONFIG)
    after = result.model.classifier.weight.detach()
    assert torch.equal(after[2:], before[2:])
    assert not torch.equal(after[:2], before[:2])
    assert (result.state.importance["classifier.weight"][2:] == 0).all()
    assert (result.state.importance["classifier.weight"][:2] > 0).any()


def test_unseen_tasks_and_the_untrained_model(tmp_path):
    result = run_tasks(vit(), two_tasks(), arguments(tmp_path), CONFIG, evaluate_unseen=True)
    assert not np.isnan(result.matrix.scores).any()
    expected = result.matrix[0, 1] - result.matrix.baseline[1]
    assert result.matrix.forward_transfer() == pytest.approx(expected)
    again = run_tasks(vit(), two_tasks(), arguments(tmp_path), CONFIG, evaluate_unseen=True)
    assert again.matrix == result.matrix


def test_class_incremental_is_named_in_log_and_report(tmp_path, caplog):
    run_tasks(vit(), two_tasks(masked=False), arguments(tmp_path, max_steps=1), CONFIG)
    assert "cannot do class-incremental" in caplog.text
    assert "cannot do class-incremental" in (tmp_path / "report.md").read_text()


def test_scenarios():
    def data(labels):
        return [{"labels": label} for label in labels]

    assert guess_scenario([(data([0, 1]), (0, 1)), (data([2, 3]), (2, 3))]) == "task"
    assert guess_scenario([(data([0, 1]), None), (data([2, 3]), None)]) == "class"
    assert guess_scenario([(data([0, 1]), None), (data([0, 1]), None)]) == "domain"
    assert guess_scenario([(data([[0, 1]]), None), (data([[2, 3]]), None)]) == "domain"


def test_labels_of():
    assert labels_of(Dataset.from_dict({"label": [3, 1, 3, -100], "x": [0] * 4})) == {1, 3}
    assert labels_of(Dataset.from_dict({"labels": [[1, 2]]})) == set()
    assert labels_of([{"labels": torch.tensor(2)}, {"labels": 5}]) == {2, 5}
    assert labels_of([{"labels": 0.5}]) == set()
    assert labels_of([(1, 2)]) == set()
    assert labels_of(iter([])) == set()


def test_accuracy():
    logits = np.array([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
    labels = np.array([1, 1, -100])
    assert accuracy(EvalPrediction(logits, labels)) == {"accuracy": 0.5}
    assert accuracy(EvalPrediction((logits, None), labels)) == {"accuracy": 0.5}
    with pytest.raises(ValueError, match="no labels"):
        accuracy(EvalPrediction(logits, np.array([-100, -100, -100])))


def test_a_tasks_own_collator_metrics_and_score(tmp_path):
    calls = []

    def collate(batch):
        calls.append(len(batch))
        return {
            "input_ids": torch.tensor([e["ids"] for e in batch]),
            "labels": torch.tensor([e["labels"] for e in batch]),
        }

    data = [{"ids": [1, 2, i % 3], "labels": i % 2} for i in range(8)]
    tasks = [
        Task("a", data, data, data_collator=collate, metric="loss"),
        Task("b", data, data, compute_metrics=lambda p: {"half": 0.5}, metric="half"),
    ]
    set_seed(0)
    model = BertForSequenceClassification(BertConfig(**SIZES, vocab_size=9, num_labels=2))
    args = arguments(tmp_path, max_steps=1, remove_unused_columns=False)
    result = run_tasks(model, tasks, args, CONFIG, data_collator=collate)
    assert result.matrix[1, 1] == 0.5
    assert result.matrix[0, 0] == -result.metrics[0]["a"]["loss"] < 0
    assert calls


def test_it_goes_on_after_a_failure_and_does_nothing_when_done(tmp_path):
    class Stop(TrainerCallback):
        steps = 0

        def on_step_end(self, args, state, control, **kwargs):
            Stop.steps += 1
            if Stop.steps == 14:  # 9 steps a task: within the second
                raise RuntimeError("stopped")

    whole = run_tasks(vit(), two_tasks(), arguments(tmp_path / "whole"), CONFIG)
    with pytest.raises(RuntimeError, match="stopped"):
        run_tasks(vit(), two_tasks(), arguments(tmp_path / "cut"), CONFIG, callbacks=[Stop()])
    part = run_tasks(vit(), two_tasks(), arguments(tmp_path / "cut"), CONFIG)
    assert same_weights(part.model, whole.model)
    assert part.matrix == whole.matrix
    assert Stop.steps == 14

    modified = (tmp_path / "cut" / "results.json").stat().st_mtime_ns
    again = run_tasks(vit(), two_tasks(), arguments(tmp_path / "cut"), CONFIG)
    assert same_weights(again.model, whole.model)
    assert again.matrix == whole.matrix
    assert again.state.num_tasks == 2
    assert (tmp_path / "cut" / "results.json").stat().st_mtime_ns == modified


def plain_loss(outputs, labels, num_items_in_batch=None):
    return torch.nn.functional.cross_entropy(outputs["logits"], labels)


def other_loss(outputs, labels, num_items_in_batch=None):
    return 2 * plain_loss(outputs, labels)


def collate(rows):
    return default_data_collator(rows)


SLOW, FAST = ((torch.optim.SGD, {"lr": rate}) for rate in (1e-3, 1e-1))


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("optimizer_cls_and_kwargs", SLOW, FAST),
        ("optimizer_cls_and_kwargs", SLOW, (torch.optim.Adam, {"lr": 1e-3})),
        ("optimizer_cls_and_kwargs", None, SLOW),
        ("compute_loss_func", plain_loss, other_loss),
        ("data_collator", default_data_collator, collate),
    ],
)
def test_other_arguments_of_the_trainer_make_another_run(name, first, second, tmp_path):
    def run(value, tasks):
        args = arguments(tmp_path, max_steps=1)
        return run_tasks(vit(), tasks, args, **({} if value is None else {name: value}))

    run(first, two_tasks()[:1])
    with pytest.raises(ValueError, match=rf"(?s)other settings.*given\.{name}"):
        run(second, two_tasks())
    assert run(first, two_tasks()).matrix.num_learnt == 2


def test_a_run_of_a_version_that_recorded_less_goes_on(tmp_path):
    args = arguments(tmp_path, max_steps=1)
    run_tasks(vit(), two_tasks()[:1], args, optimizer_cls_and_kwargs=SLOW)
    path = tmp_path / "results.json"
    content = json.loads(path.read_text())
    del content["checksum"], content["settings"]["given"], content["settings"]["own_args"]
    sealed(path, content)
    again = run_tasks(vit(), two_tasks(), args, optimizer_cls_and_kwargs=SLOW)
    assert again.matrix.num_learnt == 2


def test_another_run_in_the_same_folder(tmp_path):
    args = arguments(tmp_path, max_steps=1)
    run_tasks(vit(), two_tasks(), args, CONFIG)
    with pytest.raises(ValueError, match=r"(?s)other settings.*ewc_config.*resume=False"):
        run_tasks(vit(), two_tasks(), args, EWCConfig(ewc_lambda=1.0))
    with pytest.raises(ValueError, match=r"(?s)other settings.*tasks"):
        run_tasks(vit(), two_tasks()[:1], args, CONFIG)
    with pytest.raises(ValueError, match=r"(?s)other settings.*args"):
        run_tasks(vit(), two_tasks(), arguments(tmp_path, max_steps=2), CONFIG)
    result = run_tasks(vit(), two_tasks()[:1], args, None, resume=False)
    assert len(result.matrix) == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(tasks=[]), ValueError, "no tasks"),
        (dict(tasks=two_tasks()[:1] * 2), ValueError, "name of its own"),
        (dict(scenario="other"), ValueError, "scenario is 'other'"),
        (dict(trainer_class=Trainer), TypeError, "Trainer cannot consolidate"),
        (dict(ewc_config=None, ewc_state=EWCState()), ValueError, "without ewc_config"),
        (
            dict(tasks=[Task("a", examples((0, 1)), examples((0, 1)), classes=(0, 2))]),
            ValueError,
            r"labels \[1\]",
        ),
        (
            dict(tasks=[Task("a", examples((0, 1)), examples((0, 1)), classes=(0, 1, 7))]),
            ValueError,
            "numbered from 0",
        ),
        (
            dict(tasks=[Task("a", examples((0, 1)), examples((0, 1)), metric="f1")]),
            ValueError,
            "scored by 'f1'; without compute_metrics",
        ),
    ],
)
def test_bad_input(tmp_path, change, error, message):
    given = dict(tasks=two_tasks(), ewc_config=CONFIG) | change
    with pytest.raises(error, match=message):
        run_tasks(vit(), args=arguments(tmp_path, max_steps=1), **given)


def test_label_smoothing_is_refused_with_classes(tmp_path):
    with pytest.raises(ValueError, match="label_smoothing_factor is"):
        run_tasks(vit(), two_tasks(), arguments(tmp_path, label_smoothing_factor=0.1), CONFIG)


# ---- Kill and go on, with real processes ----


def killable_run(folder):
    """What the child process does."""
    args = arguments(folder, save_strategy="steps", save_steps=4, save_total_limit=2)
    result = run_tasks(vit(), two_tasks(), args, CONFIG)
    torch.save([p.detach() for p in result.model.parameters()], folder / "weights.pt")


def start(folder):
    process = FORKS.Process(target=killable_run, args=(folder,))
    process.start()
    return process


def finish(process):
    process.join(300)
    assert process.exitcode == 0


def kill_when(process, path, delay=0.0):
    """kill -9 once `path` is there (some time later), unless the process ends before."""
    for _ in range(30000):
        if process.exitcode is not None or path.exists():
            break
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    process.join()


def test_killed_at_several_moments_it_ends_with_the_same_result(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finish(start(whole))
    first, second = cut / "01-0-or-1", cut / "02-2-or-3"
    moments = [
        (first / "checkpoint-4", 0.0),  # while a checkpoint of the first task is written
        (first / "final", 0.0),  # while the first task's model is written
        (second / "checkpoint-8" / "trainer_state.json", 0.02),
    ]
    for path, delay in moments:
        kill_when(start(cut), path, delay)
        if (cut / "results.json").exists():
            json.loads((cut / "results.json").read_text())
    finish(start(cut))

    for one, other in zip(
        torch.load(whole / "weights.pt"), torch.load(cut / "weights.pt"), strict=True
    ):
        assert torch.equal(one, other)
    results = [json.loads((f / "results.json").read_text()) for f in (whole, cut)]
    for content in results:
        content.pop("checksum")
        content.pop("environment")  # the commit changes with whoever edits meanwhile
    assert results[0] == results[1]


class EndedAtSave(TrainerCallback):
    """Ends the process, as far as a run can tell, when its checkpoint of a step is whole."""

    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("kind", [Trainer, EWCTrainer])
@pytest.mark.parametrize(("steps", "per_epoch"), [(5, 3), (6, 3), (2, 3), (1, 1)])
def test_a_run_ended_after_its_last_step_takes_no_further_one(kind, steps, per_epoch, tmp_path):
    """Nor does a trainer by itself, with EWC; the last step may lie in the middle of an epoch."""
    config = CONFIG if kind is EWCTrainer else None

    def run(folder, *callbacks):
        model = vit()
        options = dict(max_steps=steps, save_strategy="steps", save_steps=steps)
        size = dict(per_device_train_batch_size=24 // per_epoch)
        args = arguments(tmp_path / folder, **options, **size)
        run_tasks(model, two_tasks(), args, config, trainer_class=kind, callbacks=list(callbacks))
        return model, json.loads((tmp_path / folder / "results.json").read_text())

    whole, expected = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("cut", EndedAtSave(steps))
    resumed, found = run("cut")
    assert found["steps"] == expected["steps"] == [steps, steps]
    assert same_weights(resumed, whole)


def test_a_trainer_that_goes_on_from_its_last_step_takes_none(tmp_path):
    def trainer():
        options = dict(max_steps=5, save_strategy="steps", save_steps=5)
        return EWCTrainer(
            vit(),
            arguments(tmp_path, **options),
            train_dataset=examples((0, 1)),
            ewc_config=CONFIG,
        )

    whole, again = trainer(), trainer()
    whole.train()
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 5
    assert same_weights(again.model, whole.model)


def test_further_tasks_go_behind_those_that_are_done(tmp_path):
    first, second = two_tasks()
    run_tasks(vit(), [first], arguments(tmp_path / "grown"), CONFIG)
    grown = vit()
    result = run_tasks(grown, [first, second], arguments(tmp_path / "grown"), CONFIG)
    model = vit()
    whole = run_tasks(model, [first, second], arguments(tmp_path / "whole"), CONFIG)
    assert result.matrix == whole.matrix
    assert same_weights(grown, model)
    other = replace(first, train_dataset=examples((0, 1), 8))
    with pytest.raises(ValueError, match=r"tasks\[0\].examples\[0\]: 24 there, 8 now"):
        run_tasks(vit(), [other, second], arguments(tmp_path / "grown"), CONFIG)


def test_only_what_differs_is_named(tmp_path):
    run_tasks(vit(), two_tasks()[:1], arguments(tmp_path), CONFIG)
    with pytest.raises(ValueError, match=r"ewc_lambda: 100.0 there, 3.0 now") as error:
        run_tasks(vit(), two_tasks()[:1], arguments(tmp_path), EWCConfig(3.0, fisher_samples=8))
    assert "ewc_gamma" not in str(error.value)


def test_a_score_that_cannot_be_is_refused_before_training(tmp_path):
    first, _ = two_tasks()
    for task, message in [
        (replace(first, metric="acuracy"), "'accuracy' and 'loss'"),
        (replace(first, eval_dataset=None), "has no eval_dataset"),
        (replace(first, eval_dataset=examples((0, 3), 8)), "in its evaluation data"),
    ]:
        with pytest.raises(ValueError, match=message):
            run_tasks(vit(), [task], arguments(tmp_path), CONFIG)
    for wrong in ([{"name": "a"}], first):
        with pytest.raises(TypeError, match=r"a list of hf_ewc\.Task"):
            run_tasks(vit(), wrong, arguments(tmp_path), CONFIG)
    with pytest.raises(TypeError, match="args must be TrainingArguments"):
        run_tasks(vit(), [first], CONFIG, arguments(tmp_path))
    for name in ("mask_training", "evaluate_unseen", "resume"):
        with pytest.raises(ValueError, match=f"{name} is 'no'; allowed is True or False"):
            run_tasks(vit(), [first], arguments(tmp_path), CONFIG, **{name: "no"})


@pytest.mark.parametrize(
    ("rows", "outside"),
    [
        ([[2, 0, -100], [3, 2, 2]], "[0]"),  # tokens
        ([[0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0]], "[1]"),  # several classes at once
    ],
)
def test_labels_of_rows_outside_the_classes_are_refused(rows, outside, tmp_path):
    data = [{"pixel_values": torch.zeros(1, 4, 4), "labels": torch.tensor(row)} for row in rows]
    task = Task("some", data, data, classes=(2, 3), metric="loss")
    with pytest.raises(ValueError, match=re.escape(f"has the labels {outside} in its training")):
        run_tasks(vit(), [task], arguments(tmp_path), CONFIG)


def test_labels_of_several_lengths_say_no_classes():
    rows = [[[1, 2], [3]], {"boxes": [1.0]}, [4, 5]]
    for labels in ([rows[0], rows[2]], [rows[1]], [rows[2], rows[0]]):
        data = [{"labels": label} for label in labels]
        assert labels_of(data) == set()
        assert labels_in_rows_of(data) == set()


def test_the_accuracy_of_a_language_model_is_that_of_the_next_token():
    labels = np.array([[0, 1, 2, -100]])
    logits = np.eye(3)[[[1, 2, 0, 0]]]
    prediction = EvalPrediction(predictions=logits, label_ids=labels)
    assert accuracy(prediction, shifted=True) == {"accuracy": 1.0}
    assert accuracy(prediction) == {"accuracy": 0.0}


def test_regression_has_no_accuracy():
    for outputs, labels in [(np.ones((4, 1)), np.ones(4)), (np.ones((4, 1)), np.ones(4, int))]:
        with pytest.raises(ValueError, match="metric='loss'"):
            accuracy(EvalPrediction(predictions=outputs, label_ids=labels))


def test_metrics_that_are_no_numbers_are_left_out(tmp_path):
    def metrics(prediction):
        return {"accuracy": 1.0, "by_class": [1.0, 0.5], "table": np.eye(2), "f1": np.float32(0.5)}

    first, _ = two_tasks()
    task = replace(first, compute_metrics=metrics)
    found = run_tasks(vit(), [task], arguments(tmp_path)).metrics[0][first.name]
    assert set(found) == {"accuracy", "f1", "loss"}
