"""λ found before each task by trials on its training data alone."""

import json
from dataclasses import replace

import pytest
import torch
from test_tasks import arguments, examples, same_weights, vit
from transformers import Trainer, TrainerCallback

from hf_ewc import EWCConfig, EWCState, EWCTrainer, Task, run_tasks
from hf_ewc.tasks import lambda_search
from hf_ewc.tasks.lambda_search import LambdaSearch
from hf_ewc.training.held_out import held_out_rows, number_of_labels
from hf_ewc.training.lambda_curve import LambdaCurve, Trial

LONG = dict(num_train_epochs=12)
AUTO = EWCConfig(ewc_lambda="auto", ewc_give_up=0.1, fisher_samples=8)


def three_tasks():
    """Domains of the same two classes, whose rows lie elsewhere in the image."""
    found = []
    for k in range(3):
        data = [examples((0, 1), 40 if part == 0 else 12, seed=10 * k + part) for part in (0, 1)]
        for part in data:
            for example in part:
                example["pixel_values"] = example["pixel_values"].roll(k, 1)
        found.append(Task(name=f"rows {k}", train_dataset=data[0], eval_dataset=data[1]))
    return found


@pytest.mark.parametrize(("most", "sizes"), [(1000, [8, 8, 8]), (3, [8, 3, 8]), (1, [8, 1, 8])])
def test_the_look_half_way_takes_few_examples(most, sizes, tmp_path, monkeypatch):
    scored, whole = [], lambda_search.evaluate

    def watched(trainer, tasks, *args):
        scored.append([row["labels"] for row in tasks[0].eval_dataset])
        return whole(trainer, tasks, *args)

    monkeypatch.setattr(lambda_search, "HALFWAY", most)
    monkeypatch.setattr(lambda_search, "evaluate", watched)
    tasks = three_tasks()[:2]
    in_order = sorted(tasks[1].train_dataset, key=lambda row: row["labels"])
    tasks[1] = replace(tasks[1], train_dataset=in_order)
    run_tasks(vit(), tasks, arguments(tmp_path, max_steps=6), AUTO)
    assert [len(labels) for labels in scored[:3]] == sizes  # before, half way, in the end
    assert most == 1 or {*scored[1]} == {0, 1}  # drawn from all over the data


# ---- The rule ----


def curve_of(scores, **options):
    """A curve whose trials score what `scores` says of λ, as far as the rule asks for them."""
    curve = LambdaCurve("a", **({"give_up": 0.1} | options))
    while (strength := curve.upcoming()) is not None:
        curve = curve.with_trial(Trial(strength, scores[strength]))
    return curve


@pytest.mark.parametrize(
    ("scores", "chosen", "passed"),
    [
        ({0: 0.9, 1e4: 0.9}, 1e4, True),
        ({0: 1.0, 1e4: 0.9}, 1e4, True),
        ({0: 0.9, 1e4: None, 1e3: 0.85}, 1e3, True),
        ({0: 0.9, 1e4: 0.5, 1e3: 0.82}, 1.1e3, True),  # 3 % of the way: .911 of .9, not .556
        ({0: 0.9, 1e4: 0.5, 1e3: 0.8, 1e2: 0.9}, 790, True),  # log10 is 2 + (1 − .9)/(1 − .889)
        ({0: 0.9, 1e4: 0, 1e3: 0, 1e2: 0, 1e1: 0, 1: 0}, 1.0, False),
        ({0: None, 1e4: 0.3}, 1e4, True),
    ],
)
def test_the_first_that_keeps_enough_is_chosen(scores, chosen, passed):
    curve = curve_of(scores)
    assert (curve.chosen, curve.passed, len(curve.trials)) == (chosen, passed, len(scores))
    assert f"λ = {chosen:g}" in curve.in_words()
    assert LambdaCurve.from_dict(json.loads(json.dumps(curve.to_dict()))) == curve


@pytest.mark.parametrize(("before", "plain", "needed"), [(-2.0, -1.0, -1.1), (-50.0, -10.0, -14.0)])
def test_of_a_loss_it_is_the_improvement_that_counts(before, plain, needed):
    options = dict(before=before, by_improvement=True)
    assert curve_of({0: plain, 1e4: needed}, **options).chosen == 1e4
    scores = {0: plain, 1e4: needed - 0.01, 1e3: plain}
    assert 8e3 < curve_of(scores, **options).chosen < 1e4


def test_scores_below_zero_count_by_improvement_too():
    assert curve_of({0: -0.5, 1e4: -0.54, 1e3: 0.0}, before=-1.0).chosen == 1e4
    assert curve_of({0: -0.5, 1e4: -0.56, 1e3: 0.0}, before=-1.0).chosen == 9.6e3


def test_more_may_be_given_up():
    assert curve_of({0: 1.0, 1e4: 0.6}, give_up=0.4).chosen == 1e4


def test_few_examples_leave_room_for_their_noise():
    """1.645 √(0.8 · 0.2 / N) is 0.1003 where N is 43, 0.0992 where it is 44."""
    scores = {0: 1.0, 1e4: 0.8, 1e3: 0.95}
    assert curve_of(scores, labels=43).chosen == 1e4
    assert curve_of(scores, labels=44).chosen == 2.2e3  # a third of the way from 1e3 to 1e4
    assert curve_of(scores).chosen == 2.2e3
    assert "43 labels" in curve_of(scores, labels=43).in_words()


@pytest.mark.parametrize(
    ("labels", "chosen"),
    [
        (50, 2500),  # log10 is 3.4, a fifth of the way from the 4 of the state to the 1 of trials
        (200, 320),  # half way
        (1800, 20),  # nine tenths: 10^1.3
        (0, 10),  # where not labels are counted, the trials alone count
    ],
)
def test_few_labels_leave_lambda_near_what_the_state_tells(labels, chosen):
    scores = {0: 1.0, 1e4: 0.1, 1e3: 0.1, 1e2: 0.1, 1e1: 1.0}
    monotonous = curve_of(scores, told=1e4, labels=labels, give_up=0.0)
    assert monotonous.chosen == chosen
    assert f"λ = {chosen:g}" in monotonous.in_words()
    assert ("The trials alone would say 10;" in monotonous.in_words()) == (chosen != 10)
    assert curve_of(scores, told=None, labels=labels, give_up=0.0).chosen == 10
    assert curve_of({0: 1.0, 1e4: 1.0}, told=1e4, labels=labels).chosen == 1e4


@pytest.mark.parametrize(
    ("labels", "number"),
    [
        ([3, 1, -100, 2], 3),
        ([torch.tensor([1, 2, -100]), torch.tensor([-100, 4, 5])], 4),  # tokens count each
        ([0.5, 1.5], 2),
        ([None, None], 2),
    ],
)
def test_it_is_labels_that_make_the_noise(labels, number):
    assert number_of_labels([{"labels": each} for each in labels]) == number


def test_the_noise_of_plain_training_counts_as_well():
    """1.645 √((0.75 · 0.25 + 0.9 · 0.1) / N) is 0.0602 where N is 207, 0.0600 where it is 208."""
    scores = {0: 0.9, 1e4: 0.75, 1e3: 0.9}
    assert curve_of(scores, labels=207).chosen == 1e4
    assert curve_of(scores, labels=209).chosen < 1e4


@pytest.mark.parametrize(("left", "trials", "chosen"), [(149, 3, 1e3), (150, 4, 1e2), (None, 6, 1)])
def test_trials_take_no_more_steps_than_there_are(left, trials, chosen):
    """A task of 250 steps has trials of 100, plain training's included: 300 need 50 more, …"""
    scores = {0: 1.0, 1e4: 0.1, 1e3: 0.2, 1e2: 0.3, 1e1: 0.4, 1: 0.5}
    curve = LambdaCurve("a", left=left)
    while (strength := curve.upcoming()) is not None:
        curve = curve.with_trial(Trial(strength, scores[strength], steps=100))
    assert (len(curve.trials), curve.chosen, curve.passed) == (trials, chosen, False)


def test_a_trial_that_lags_far_behind_is_hopeless():
    curve = LambdaCurve("a", give_up=0.1).with_trial(Trial(0.0, 1.0, halfway=0.8))
    assert curve.is_hopeless(0.35)
    assert not curve.is_hopeless(0.37)
    assert curve.is_hopeless(None)
    assert not LambdaCurve("a").is_hopeless(0.0)


# ---- The search, replayed by hand with plain trainers ----


class Seen(TrainerCallback):
    """Which trainings a callback of the user's has seen."""

    def __init__(self):
        self.begun = 0

    def on_train_begin(self, *args, **kwargs):
        self.begun += 1


def enough(score, plain, examples):
    """Nine tenths of what plain training reaches, but for what chance makes of two shares."""
    variance = (score * (1 - score) + plain * (1 - plain)) / examples
    return score + 1.645 * variance**0.5 >= 0.9 * plain


def between(scores):
    """λ to use: between the last two where the first of them failed and had a score."""
    (_, plain), *_, (high, failed), (low, passed) = [(0, scores[0][1]), *scores]
    if len(scores) < 3 or not failed / plain < 0.9 < passed / plain:
        return low
    share = (passed / plain - 0.9) / (passed / plain - failed / plain)
    return float(f"{low * (high / low) ** share:.2g}")


def near(told, found, examples):
    """λ to use: by 200 labels as far from what the state tells as what trials say, half way."""
    share = examples / (examples + 200)
    return told if found == told else float(f"{told ** (1 - share) * found**share:.2g}")


def score_by_hand(model, data):
    images = torch.stack([example["pixel_values"] for example in data])
    labels = torch.tensor([example["labels"] for example in data])
    model.eval()
    with torch.no_grad():
        return float((model(pixel_values=images).logits.argmax(-1) == labels).float().mean())


def by_hand_told(state, tasks):
    """λ from which the search goes down: 0.4 / (g ρ²), at most 1e4."""
    values = torch.cat([value.flatten() for value in state.importance.values()]).double()
    values = values[values > 0]
    share = values.sqrt().sum() ** 2 / (len(values) * values.sum())
    told = float(0.4 / (values / tasks).sqrt().mean() / share**2)
    return float(f"{min(told, 1e4):.3g}")


def by_hand(folder, tasks, args, config):
    """The weights after all tasks, and (λ, score) of each trial of each task."""
    model, state, found = vit(), EWCState(), []
    for k, task in enumerate(tasks):
        own = replace(args, seed=args.seed + k, output_dir=str(folder))
        data, begin = task.train_dataset, {n: v.clone() for n, v in model.state_dict().items()}
        rows = held_out_rows(len(data), own.seed)
        rest = [data[i] for i in range(len(data)) if i not in rows]
        short = replace(own, num_train_epochs=6)  # 24 steps of 32 examples: 0.4 of 60

        def trained(strength, args, data, begin=begin, state=state):
            model.load_state_dict(begin)
            settings = replace(config, ewc_lambda=strength)
            options = dict(model=model, args=args, train_dataset=data)
            if strength:
                trainer = EWCTrainer(ewc_config=settings, ewc_state=state, **options)
            else:
                trainer = Trainer(**options)
            trainer.train()
            return trainer

        strength = 1e4
        if k:
            held = [data[i] for i in rows]
            trained(0.0, short, rest)
            scores = [(0.0, score_by_hand(model, held))]
            strength = state.told_lambda()
            while True:
                trained(strength, short, rest)
                scores.append((strength, score_by_hand(model, held)))
                if enough(scores[-1][1], scores[0][1], len(held)) or strength <= 1:
                    break
                strength /= 10
            strength = near(state.told_lambda(), between(scores), len(held))
            found.append(scores)
        state = trained(strength, own, data).consolidate(name=task.name)
    return model, found


@pytest.fixture(scope="module", autouse=True)
def _from_1e4_on():
    """Begin where these tasks do not pass."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EWCState, "told_lambda", lambda self: 1e4)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    seen = Seen()
    result = run_tasks(vit(), three_tasks(), arguments(folder, **LONG), AUTO, callbacks=[seen])
    assert seen.begun == 3  # a callback sees the trainings alone
    return result


def tried(result):
    return [[(t.ewc_lambda, t.score) for t in curve.trials] for curve in result.searches]


def test_a_run_is_as_with_plain_trainers_by_hand(tmp_path, whole):
    args = arguments(tmp_path, **LONG)
    model, expected = by_hand(tmp_path, three_tasks(), args, AUTO)
    assert same_weights(whole.model, model)
    assert max(map(len, expected)) > 2  # something was tried twice
    for found, trials in zip(tried(whole), expected, strict=True):
        assert [strength for strength, _ in found] == [strength for strength, _ in trials]
        for (_, score), (_, by_hand_score) in zip(found, trials, strict=True):
            # What was stopped half-way would not have passed in the end.
            if score is None:
                assert not enough(by_hand_score, trials[0][1], 8)
            else:
                assert score == by_hand_score


def test_every_trial_is_written_down(whole):
    content = json.loads((whole.output_dir / "results.json").read_text())
    (run,) = content["runs"]["EWC"]
    assert [search["task"] for search in run["lambda_search"]] == ["rows 1", "rows 2"]
    for search, curve in zip(run["lambda_search"], whole.searches, strict=True):
        assert search["chosen"] == curve.chosen
        assert [trial["score"] for trial in search["trials"]] == [t.score for t in curve.trials]
        assert all(trial["seconds"] > 0 for trial in search["trials"])
        assert search["trials"][0]["steps"] == 24  # 0.4 of 60, as many for fewer examples


@pytest.mark.parametrize("at", [1, 3])
def test_killed_inside_a_search_it_goes_on_without_the_trials_that_were_made(
    tmp_path, whole, monkeypatch, at
):
    made, trial = [], LambdaSearch._with_trial

    def dies(self, curve, task, strength):
        if len(made) == at:
            raise RuntimeError("killed")
        made.append(strength)
        return trial(self, curve, task, strength)

    monkeypatch.setattr(LambdaSearch, "_with_trial", dies)
    with pytest.raises(RuntimeError, match="killed"):
        run_tasks(vit(), three_tasks(), arguments(tmp_path, **LONG), AUTO)
    at = 100
    part = run_tasks(vit(), three_tasks(), arguments(tmp_path, **LONG), AUTO)
    assert same_weights(part.model, whole.model)
    assert part.matrix == whole.matrix
    assert tried(part) == tried(whole)
    assert made == [strength for trials in tried(whole) for strength, _ in trials]


# ---- What the trials see ----


def test_the_part_that_scores_is_not_trained_on_and_no_evaluation_data_is_seen(
    tmp_path, monkeypatch
):
    """Examples are numbered by a pixel, and what each trainer was given is looked at."""
    tasks, given = three_tasks()[:2], []
    for task in tasks:
        for i, example in enumerate(task.train_dataset):
            example["pixel_values"][0, 0, 0] = i

    train, scored = EWCTrainer.train, EWCTrainer.evaluate

    def numbers(data):
        return [int(example["pixel_values"][0, 0, 0]) for example in data]

    def watched(self, *args, **kwargs):
        given.append(numbers(self.train_dataset))
        return train(self, *args, **kwargs)

    def evaluated(self, data, **kwargs):
        if data is not tasks[0].eval_dataset and data is not tasks[1].eval_dataset:
            assert sorted(numbers(data)) == held_out_rows(40, 43)
            assert not set(numbers(data)) & set(given[-1] if len(given) > 1 else [])
        else:
            assert len(given) in (1, 4)  # after a task, not in a trial
        return scored(self, data, **kwargs)

    monkeypatch.setattr(EWCTrainer, "train", watched)
    monkeypatch.setattr(EWCTrainer, "evaluate", evaluated)
    monkeypatch.setattr(LambdaCurve, "passed", property(lambda self: len(self.trials) > 1))
    run_tasks(vit(), tasks, arguments(tmp_path, max_steps=4), AUTO)
    assert [len(data) for data in given] == [40, 32, 32, 40]
    assert len(held_out_rows(40, 43)) == 8
    assert held_out_rows(40, 43) != held_out_rows(40, 44)


# ---- Refusals ----


def test_a_trainer_by_itself_is_told_of_find_lambda():
    with pytest.raises(ValueError, match="find_lambda"):
        EWCTrainer(vit(), ewc_config=AUTO)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(examples((0, 1)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(train_dataset=Stream()), "stream"),
        (dict(train_dataset=examples((0, 1), 1)), "1 examples"),
    ],
)
def test_what_cannot_be_held_out_is_refused_before_the_first_step(tmp_path, change, message):
    tasks = three_tasks()
    tasks[1] = replace(tasks[1], **change)
    with pytest.raises(ValueError, match=message):
        run_tasks(vit(), tasks, arguments(tmp_path, max_steps=1), AUTO)
    assert not list(tmp_path.iterdir())


def test_optimizers_that_are_given_are_refused(tmp_path):
    model = vit()
    optimizers = (torch.optim.SGD(model.parameters()), None)
    with pytest.raises(ValueError, match="optimizers"):
        run_tasks(model, three_tasks(), arguments(tmp_path), AUTO, optimizers=optimizers)


def test_growth_is_refused():
    with pytest.raises(ValueError, match="leave that at 1"):
        EWCConfig(ewc_lambda="auto", ewc_lambda_growth=2.0)
