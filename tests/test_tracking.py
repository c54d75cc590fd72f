"""Trackers: one run for all tasks, whose steps go on from task to task."""

import copy

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_tasks import CONFIG, arguments, examples, two_tasks, vit
from transformers import TrainerCallback, TrainerControl, TrainerState

from hf_ewc import AccuracyMatrix, Task, run_tasks
from hf_ewc.tasks import tracking
from hf_ewc.tasks.tracking import SequenceTracker, figures_after

NAN = float("nan")


def options(**changes):
    return dict(report_to="tensorboard", max_steps=3, logging_strategy="steps", logging_steps=1,
                **changes)  # fmt: skip


def scalars(folder):
    """The one TensorBoard run below a folder: (step, value) by tag."""
    files = sorted(folder.rglob("events.out.tfevents*"))
    (place,) = {file.parent for file in files}
    events = EventAccumulator(str(place))
    events.Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def three_tasks():
    return [*two_tasks(), Task("$x$/y z", examples((0, 3)), examples((0, 3), 16), classes=(0, 3))]


def test_tensorboard_shows_one_run(tmp_path):
    result = run_tasks(vit(), three_tasks(), arguments(tmp_path, **options()), CONFIG)
    found = scalars(tmp_path)
    assert [step for step, _ in found["train/loss"]] == list(range(1, 10))
    assert [value for _, value in found["train/task"]][:3] == [1, 1, 1]
    assert dict(found["train/task"])[9] == 3
    for name, at in (("0 or 1", [3, 6, 9]), ("2 or 3", [6, 9]), ("$x$/y z", [9])):
        points = found[f"task/{name}/accuracy"]
        assert [step for step, _ in points] == at
        column = result.matrix.scores[3 - len(at) :, result.matrix.tasks.index(name)]
        assert [value for _, value in points] == pytest.approx(list(column))
        assert f"task/{name}/loss" in found
    for measure in ("forgetting", "backward_transfer"):
        assert [step for step, _ in found[measure]] == [6, 9]
        assert found[measure][1][1] == pytest.approx(getattr(result.matrix, measure)(), abs=1e-6)
    assert [step for step, _ in found["average_accuracy"]] == [3, 6, 9]
    assert found["average_accuracy"][2][1] == pytest.approx(result.matrix.average_accuracy())


def test_a_run_that_goes_on_is_the_same_run(tmp_path):
    run_tasks(vit(), two_tasks()[:1], arguments(tmp_path, **options()), CONFIG)
    run_tasks(vit(), two_tasks(), arguments(tmp_path, **options()), CONFIG)
    found = scalars(tmp_path)
    assert [step for step, _ in found["train/loss"]] == list(range(1, 7))
    assert [step for step, _ in found["task/0 or 1/accuracy"]] == [3, 6]
    run_tasks(vit(), two_tasks(), arguments(tmp_path, **options()), CONFIG)
    assert scalars(tmp_path) == found  # nothing was left to do


def test_a_run_begun_anew_is_another_run(tmp_path):
    for _ in range(2):
        run_tasks(vit(), two_tasks()[:1], arguments(tmp_path, **options()), resume=False)
    assert len({file.parent for file in tmp_path.rglob("events.out.tfevents*")}) == 2


def test_what_is_evaluated_before_the_first_task_is_in_the_run(tmp_path):
    run_tasks(vit(), two_tasks(), arguments(tmp_path, **options()), evaluate_unseen=True)
    found = scalars(tmp_path)
    assert [step for step, _ in found["eval/2 or 3_accuracy"]] == [0, 3, 6]
    assert [step for step, _ in found["task/2 or 3/accuracy"]] == [3, 6]
    assert "forward_transfer" in found


def test_without_report_to_nothing_is_reported(tmp_path):
    run_tasks(vit(), two_tasks()[:1], arguments(tmp_path, max_steps=1))
    assert not list(tmp_path.rglob("events.out*"))
    assert not (tmp_path / "tracking.json").exists()


@pytest.mark.parametrize("where", [["nothing_known"], ["absent"]])
def test_a_tracker_that_is_not_there_is_said_before_anything_is_done(where, tmp_path, monkeypatch):
    def absent():
        raise RuntimeError("AbsentCallback requires absent to be installed. Run `pip install it`.")

    found = tracking.get_reporting_integration_callbacks
    monkeypatch.setattr(
        tracking,
        "get_reporting_integration_callbacks",
        lambda names: [absent] if "absent" in names else found(names),
    )
    args = arguments(tmp_path, max_steps=1)
    args.report_to = where
    with pytest.raises(ValueError, match=r"report_to is .*(is not supported|pip install it)"):
        run_tasks(vit(), two_tasks(), args, CONFIG)
    assert not (tmp_path / "results.json").exists()


class Library:
    """What wandb and Trackio have in common, as far as the callbacks of transformers use it."""

    def __init__(self):
        self.run, self.calls = None, []

    def init(self, **given):
        self.run = given
        self.calls.append(("init", given))

    def log(self, figures):
        self.calls.append(("log", figures))

    def finish(self):
        self.run = None
        self.calls.append(("finish", None))


class LikeWandb(TrainerCallback):
    """`WandbCallback`: starts a run where none is active, logs with a prefix, finishes none."""

    def __init__(self, library):
        self._wandb = library

    def on_train_begin(self, args, state, control, **_):
        if self._wandb.run is None:
            self._wandb.init(name=args.run_name)

    def on_log(self, args, state, control, logs=None, **_):
        named = {f"train/{key}": value for key, value in logs.items()}
        self._wandb.log({**named, "train/global_step": state.global_step})


class LikeTrackio(TrainerCallback):
    """`TrackioCallback`: starts a run by its name, and finishes it when training ends."""

    def __init__(self, library):
        self._trackio = library

    def on_train_begin(self, args, state, control, **_):
        self._trackio.init(name=args.run_name, resume="allow")

    def on_log(self, args, state, control, logs=None, **_):
        self._trackio.log({"train/global_step": state.global_step, **logs})

    def on_train_end(self, *_, **__):
        self._trackio.finish()


class Other(TrainerCallback):
    """An integration that has nothing but the events."""

    def __init__(self, library):
        self.library = library

    def on_log(self, args, state, control, logs=None, **_):
        self.library.log({"train/global_step": state.global_step, **logs})


def sequence(tracker, steps=3, tasks=2):
    """What the trainers of some tasks tell a tracker."""
    matrix = AccuracyMatrix(["a", "b"])
    for index in range(tasks):
        state, control = TrainerState(is_world_process_zero=True), TrainerControl()
        tracker.begin(index, index * steps)
        tracker.on_train_begin(None, state, control)
        for step in range(1, steps + 1):
            state.global_step = step
            tracker.on_step_end(None, state, control)
            tracker.on_log(None, state, control, logs={"loss": 0.5})
        tracker.on_train_end(None, state, control)
        for j in range(index + 1):
            matrix[index, j] = 0.9 - 0.1 * (index - j)
        scores = {matrix.tasks[j]: {"accuracy": matrix[index, j]} for j in range(index + 1)}
        tracker.after_task(scores, matrix)


@pytest.mark.parametrize("kind", [LikeWandb, LikeTrackio, Other])
def test_other_trackers_see_one_run(tmp_path, kind):
    library = Library()
    tracker = SequenceTracker(arguments(tmp_path / "run"), integrations=[kind(library)])
    sequence(tracker)
    tracker.close()
    calls = [name for name, _ in library.calls]
    logs = [figures for name, figures in library.calls if name == "log"]
    assert [figures["train/global_step"] for figures in logs] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert logs[3]["task/a/accuracy"] == 0.9
    assert logs[-1]["forgetting"] == pytest.approx(0.1)
    assert logs[-1]["average_accuracy"] == pytest.approx(0.85)
    if kind is not Other:
        assert calls.count("init") == calls.count("finish") == 1
        assert library.calls[0][1]["name"].startswith("run-")
    tracker.close()
    assert calls == [name for name, _ in library.calls]


@pytest.mark.parametrize("kind", [LikeWandb, LikeTrackio])
def test_a_run_is_found_again_by_its_name(tmp_path, kind):
    names = []
    for is_resumed in (False, True, False):
        library = Library()
        integrations = [kind(library)]
        tracker = SequenceTracker(arguments(tmp_path / "run"), is_resumed, integrations)
        sequence(tracker, tasks=1)
        tracker.close()
        names.append(library.calls[0][1]["name"])
    assert names[0] == names[1] != names[2]


def test_a_run_of_the_users_own_is_left_open(tmp_path):
    library = Library()
    library.init(name="mine")
    tracker = SequenceTracker(arguments(tmp_path), integrations=[LikeWandb(library)])
    sequence(tracker)
    tracker.close()
    assert [name for name, _ in library.calls].count("init") == 1
    assert library.run == {"name": "mine"}


def test_a_name_of_the_users_own_is_kept(tmp_path):
    library, args = Library(), arguments(tmp_path, run_name="mine")
    tracker = SequenceTracker(args, integrations=[LikeTrackio(library)])
    sequence(tracker)
    assert library.run["name"] == "mine"
    assert args.run_name == "mine"


def test_processes_other_than_the_first_report_nothing(tmp_path):
    library = Library()
    tracker = SequenceTracker(arguments(tmp_path / "run"), integrations=[Other(library)])
    state = TrainerState(is_world_process_zero=False)
    tracker.on_train_begin(None, state, TrainerControl())
    tracker.after_task({"a": {"accuracy": 0.5}}, AccuracyMatrix(["a"], [[0.5]]))
    tracker.close()
    assert library.calls == []
    assert not (tmp_path / "run").exists()


def test_where_lower_is_better_averages_have_the_figures_name():
    scores = [[-3.0, NAN], [-5.0, -2.0]]
    matrix = AccuracyMatrix(["a", "b"], scores, lower_is_better={"a": "loss", "b": "loss"})
    found = figures_after({"a": {"loss": 5.0, "perplexity": None}}, matrix)
    assert found["task/a/loss"] == 5.0
    assert "task/a/perplexity" not in found
    assert found["average_loss"] == 3.5
    assert found["forgetting"] == 2.0
    assert "average_accuracy" not in found
    mixed = AccuracyMatrix(["a", "b"], [[-3.0, NAN], [-5.0, 0.5]], lower_is_better={"a": "loss"})
    assert not any("average" in name for name in figures_after({}, mixed))


def test_checkpoints_are_told_of_by_the_tasks_own_arguments(tmp_path):
    class Saves(TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_save(self, args, state, control, **_):
            self.seen.append((args.output_dir, state.global_step))

    tracker = SequenceTracker(arguments(tmp_path), integrations=[saves := Saves()])
    task = copy.copy(arguments(tmp_path / "01-a"))
    tracker.begin(1, 10)
    tracker.on_save(task, TrainerState(global_step=4), TrainerControl())
    assert saves.seen == [(str(tmp_path / "01-a"), 4)]
