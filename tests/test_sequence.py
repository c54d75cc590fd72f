"""Ways to go from task to task beside EWC, each held to its definition."""

from dataclasses import fields, replace

import pytest
import torch
from test_tasks import CONFIG, arguments, examples, same_weights, two_tasks, vit
from transformers import (
    HfArgumentParser,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_ewc import EWCConfig, EWCState, Fisher, SequenceConfig, run_tasks
from hf_ewc.tasks.head import head_names
from hf_ewc.tasks.l2_sp import with_l2_sp
from hf_ewc.tasks.mixture import Mixture, joint_places
from hf_ewc.tasks.run_folder import RunFolder

# ---- The settings ----


def test_the_command_line_and_no_collision():
    parser = HfArgumentParser((TrainingArguments, EWCConfig, SequenceConfig))
    line = "--output_dir x --replay_share 0.05 --frozen_modules vit --keep_models last"
    factors = ["--learning_rate_factors", '{"vit": 0.1}']
    _, _, found = parser.parse_args_into_dataclasses([*line.split(), *factors])
    assert found == SequenceConfig(
        replay_share=0.05,
        frozen_modules=["vit"],
        keep_models="last",
        learning_rate_factors={"vit": 0.1},
    )
    own = {field.name for field in fields(SequenceConfig)}
    for others in (TrainingArguments, Seq2SeqTrainingArguments, EWCConfig):
        assert not own & {field.name for field in fields(others)}
    trl = pytest.importorskip("trl")
    HfArgumentParser((trl.SFTConfig, trl.ModelConfig, trl.ScriptArguments, SequenceConfig))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(replay_share=1.5), "replay_share is 1.5"),
        (dict(replay_per_class=-1), "replay_per_class is -1"),
        (dict(replay_share=0.1, replay_size=3), "replay_share is 0.1 and replay_size is 3"),
        (dict(replay_size=3, joint_training=True), "one way"),
        (dict(head_warmup_share="half"), "head_warmup_share is 'half'"),
        (dict(l2sp_lambda=-1.0), "l2sp_lambda"),
        (dict(keep_models="some"), "'all', 'last'"),
        (dict(frozen_modules="(a"), "not a valid regular expression"),
        (dict(learning_rate_factors={"a": -1}), "learning_rate_factors"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        SequenceConfig(**settings)


# ---- Joint training ----


def test_joint_training_begins_each_task_with_the_first_weights(tmp_path):
    config = SequenceConfig(joint_training=True)
    args = arguments(tmp_path / "joint", num_train_epochs=1)
    result = run_tasks(vit(), two_tasks(masked=False), args, sequence_config=config)
    tasks = two_tasks(masked=False)
    sources = [task.train_dataset for task in tasks]
    union = Mixture(sources, joint_places([24, 24], 42), tagged=False)
    model = vit()
    args = arguments(tmp_path / "plain", num_train_epochs=1, seed=43)
    Trainer(model=model, args=args, train_dataset=union).train()
    assert same_weights(result.model, model)
    # Started again after the first task it has the same beginning.
    part = run_tasks(
        vit(),
        two_tasks(masked=False)[:1],
        arguments(tmp_path / "part", num_train_epochs=1),
        sequence_config=config,
    )
    assert part.matrix.num_learnt == 1
    args = arguments(tmp_path / "part", num_train_epochs=1)
    again = run_tasks(vit(), two_tasks(masked=False), args, sequence_config=config)
    assert same_weights(again.model, model)


# ---- A task's own arguments, weight and Fisher data ----


def test_a_task_has_arguments_weight_and_fisher_data_of_its_own(tmp_path):
    first, second = two_tasks()
    own = replace(
        second,
        training_args={"max_steps": 5, "learning_rate": 1e-3, "lr_scheduler_type": "constant"},
        weight=2.5,
        fisher_dataset=examples((2, 3), 5, seed=3),
    )
    args = arguments(tmp_path, max_steps=2, logging_strategy="steps", logging_steps=1)
    result = run_tasks(vit(), [first, own], args, CONFIG)
    assert [len(task) for task in result.history] == [2, 5]
    assert {entry["learning_rate"] for entry in result.history[1]} == {1e-3}
    record = result.state.tasks[1]
    assert (record.weight, record.num_examples) == (2.5, 5)
    assert args.max_steps == 2
    other = replace(own, training_args={**own.training_args, "max_steps": 6})
    with pytest.raises(ValueError, match=r"(?s)other settings.*max_steps: 5 there, 6 now"):
        run_tasks(vit(), [first, other], args, CONFIG)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(training_args={"epochs": 3}), ValueError, "no training argument"),
        (dict(training_args={"output_dir": "x"}), ValueError, "for the whole run"),
        (dict(training_args={"lr_scheduler_type": "zigzag"}), ValueError, "zigzag"),
        (dict(training_args=["max_steps"]), TypeError, "a dict"),
        (dict(weight=-1), ValueError, "is -1; allowed"),
    ],
)
def test_bad_fields_of_a_task(tmp_path, change, error, message):
    first, second = two_tasks()
    with pytest.raises(error, match=message):
        run_tasks(vit(), [first, replace(second, **change)], arguments(tmp_path), CONFIG)


# ---- What is trained, and how fast ----


@pytest.mark.parametrize(
    "patterns", [dict(frozen_modules=["vit"]), dict(trained_modules=["classifier"])]
)
def test_what_is_frozen_stays_bit_for_bit(tmp_path, patterns):
    before = {name: p.detach().clone() for name, p in vit().named_parameters()}
    config = SequenceConfig(**patterns)
    args = arguments(tmp_path, weight_decay=0.1)
    result = run_tasks(vit(), two_tasks(), args, CONFIG, sequence_config=config)
    for name, parameter in result.model.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("vit"), name
        assert parameter.requires_grad
    assert result.matrix.num_learnt == 2


def test_patterns_that_match_nothing_are_refused(tmp_path):
    for settings in (dict(frozen_modules=["bert"]), dict(learning_rate_factors={"bert": 0.1})):
        with pytest.raises(ValueError, match=f"{next(iter(settings))}.*bert"):
            run_tasks(
                vit(),
                two_tasks(),
                arguments(tmp_path, max_steps=1),
                sequence_config=SequenceConfig(**settings),
            )


def test_the_learning_rate_is_multiplied_by_the_factor(tmp_path):
    options = dict(max_steps=1, optim="sgd", max_grad_norm=0.0, weight_decay=0.0)
    tasks = two_tasks()[:1]
    start = dict(vit().named_parameters())
    plain = run_tasks(vit(), tasks, arguments(tmp_path / "plain", **options)).model
    config = SequenceConfig(learning_rate_factors={"vit": 0.25, "bias": 2.0, "layernorm": 0.0})
    args = arguments(tmp_path / "factors", **options)
    found = dict(run_tasks(vit(), tasks, args, sequence_config=config).model.named_parameters())
    for name, parameter in plain.named_parameters():
        factor = 0.25 if name.startswith("vit") else 1.0
        factor = 2.0 if name.endswith("bias") else factor
        factor = 0.0 if name.startswith("vit.layernorm.") else factor
        expected = start[name] + factor * (parameter - start[name])
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-8)


# ---- Head warm-up ----


class Weights(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.detach().clone() for name, p in model.named_parameters()})


def test_the_first_steps_train_the_head_alone(tmp_path):
    weights = Weights()
    args = arguments(tmp_path, max_steps=10, gradient_accumulation_steps=2, weight_decay=0.1)
    config = SequenceConfig(head_warmup_share=0.28)  # 2.8 of 10 steps: three
    run_tasks(vit(), two_tasks()[:1], args, CONFIG, sequence_config=config, callbacks=[weights])
    start = {name: p.detach() for name, p in vit().named_parameters()}
    assert set(head_names(vit())) == {"classifier.weight", "classifier.bias"}
    for step, now in enumerate(weights.steps):
        moved = {name for name in start if not torch.equal(now[name], start[name])}
        if step < 3:
            assert moved == {"classifier.weight", "classifier.bias"}
        else:
            assert "vit.encoder.layer.0.attention.attention.query.weight" in moved or len(moved) > 9


def test_warm_up_is_refused_where_an_engine_steps_by_itself(tmp_path):
    class ByItself(Trainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.is_deepspeed_enabled = True

    config = SequenceConfig(head_warmup_share=0.5)
    with pytest.raises(ValueError, match="does not go with DeepSpeed"):
        run_tasks(
            vit(),
            two_tasks(),
            arguments(tmp_path),
            trainer_class=ByItself,
            sequence_config=config,
        )


# ---- L2-SP ----


def test_the_penalty_is_ewcs_plus_half_mu_times_the_square_distance():
    torch.manual_seed(0)
    model = vit()
    names = [name for name, _ in model.named_parameters()]
    importance = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    state = EWCState().consolidate(Fisher(importance), model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = EWCConfig(
        ewc_lambda=3.0, ewc_lambda_growth=2.0, ewc_layer_lambdas={"bias": 0.0, "vit.layernorm": 7.0}
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    newer = {name: p.detach().clone() for name, p in model.named_parameters()}
    both, settings = with_l2_sp(state, config, model, 0.7, {"classifier.weight": None})
    only, _ = with_l2_sp(EWCState(), None, model, 0.7, {})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    ewc = l2 = ours = 0.0
    lambdas = config.lambdas(names, 1)
    for name, p in model.named_parameters():
        square = (p.detach().double() - newer[name].double()).square().sum()
        l2 += 0.35 * square
        ours += 0.0 if name == "classifier.weight" else 0.35 * square
        distance = p.detach().double() - start[name].double()
        ewc += lambdas[name] / 2 * (importance[name].double() * distance**2).sum()
    assert settings.ewc_lambda == 1.0
    assert both.penalty(model).item() == pytest.approx((ewc + ours).item(), rel=1e-5)
    assert only.penalty(model).item() == pytest.approx(l2.item(), rel=1e-5)


def test_a_run_with_l2_sp_is_held_and_keeps_only_ewcs_state(tmp_path):
    def distance(one, other):
        pairs = zip(one.parameters(), other.parameters(), strict=True)
        return sum((a - b).square().sum() for a, b in pairs).item()

    args = arguments(tmp_path / "first", max_steps=3)
    first = run_tasks(vit(), two_tasks()[:1], args).model
    found = {}
    for strength in (0.0, 1.0, 100.0):
        args = arguments(tmp_path / str(strength), max_steps=3, optim="sgd", max_grad_norm=0.0)
        config = SequenceConfig(l2sp_lambda=strength)
        tasks = [replace(two_tasks()[0], training_args={"optim": "adamw_torch"}), two_tasks()[1]]
        found[strength] = run_tasks(vit(), tasks, args, sequence_config=config)
    by_strength = [distance(result.model, first) for result in found.values()]
    assert by_strength[0] > by_strength[1] > by_strength[2] > 0
    assert all(result.state is None for result in found.values())
    args = arguments(tmp_path / "both", max_steps=1)
    both = run_tasks(
        vit(), two_tasks(), args, CONFIG, sequence_config=SequenceConfig(l2sp_lambda=1)
    )
    assert [record.name for record in both.state.tasks] == ["0 or 1", "2 or 3"]
    assert max(float(A.max()) for A in both.state.importance.values()) < 1.0
    with pytest.raises(TypeError, match="has no penalty"):
        run_tasks(
            vit(),
            two_tasks(),
            arguments(tmp_path / "plain"),
            trainer_class=Trainer,
            sequence_config=SequenceConfig(l2sp_lambda=1.0),
        )


# ---- What stays on disk ----


def test_only_the_last_model_stays(tmp_path):
    config = SequenceConfig(keep_models="last")
    args = arguments(tmp_path, max_steps=1)
    result = run_tasks(vit(), two_tasks(), args, CONFIG, sequence_config=config)
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("model.safetensors")] == [
        "02-2-or-3/final/model.safetensors"
    ]
    again = run_tasks(vit(), two_tasks(), args, CONFIG, sequence_config=config)
    assert same_weights(again.model, result.model)


def test_only_the_last_model_stays_after_a_kill_before_the_others_were_removed(
    tmp_path, monkeypatch
):
    def killed(*_):
        raise KeyboardInterrupt

    config = SequenceConfig(keep_models="last")
    args = arguments(tmp_path, max_steps=1)
    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "remove_model", killed)
        with pytest.raises(KeyboardInterrupt):
            run_tasks(vit(), two_tasks(), args, CONFIG, sequence_config=config)
    run_tasks(vit(), two_tasks(), args, CONFIG, sequence_config=config)
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("model.safetensors")] == [
        "02-2-or-3/final/model.safetensors"
    ]
