"""EWCConfig: validation, the command line, JSON and YAML, no collisions."""

from __future__ import annotations

import json
from dataclasses import fields

import numpy as np
import pytest
import yaml
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, TrainingArguments

from hf_ewc import EWCConfig

EVERY = {
    "ewc_lambda": 50.0,
    "ewc_give_up": 0.2,
    "ewc_mode": "separate",
    "ewc_gamma": 0.9,
    "ewc_lambda_growth": 1.5,
    "ewc_layer_lambdas": {"encoder.layer.0": 10.0, ".*bias": 0.0},
    "ewc_target_modules": ["q_proj", "v_proj"],
    "ewc_exclude_modules": ["lm_head"],
    "ewc_space": "weight",
    "ewc_state_dtype": "bfloat16",
    "ewc_keep_fraction": 0.25,
    "ewc_anchor": "reference",
    "ewc_offload": True,
    "ewc_log_groups": True,
    "fisher_type": "sampled",
    "fisher_data": "held_out",
    "fisher_samples": 64,
    "fisher_draws": 3,
    "fisher_batch_size": 4,
    "fisher_stratified": True,
    "fisher_seed": 7,
}


def parse(*arguments: str) -> EWCConfig:
    parser = HfArgumentParser((TrainingArguments, EWCConfig))
    return parser.parse_args_into_dataclasses(["--output_dir", "out", *arguments])[1]


def test_every_field_is_in_these_tests():
    assert set(EVERY) == {field.name for field in fields(EWCConfig)}
    assert all(EVERY[field.name] != field.default for field in fields(EWCConfig))


def test_every_field_from_the_command_line():
    arguments = []
    for name, value in EVERY.items():
        values = value if isinstance(value, list) else [value]
        arguments.append(f"--{name}")
        arguments += [json.dumps(v) if isinstance(v, dict) else str(v) for v in values]
    assert parse(*arguments) == EWCConfig(**EVERY)


def test_the_empty_command_line_gives_the_defaults():
    assert parse() == EWCConfig()


@pytest.mark.parametrize("kind", ["json", "yaml"])
def test_every_field_from_a_file(tmp_path, kind):
    path = tmp_path / f"run.{kind}"
    content = {"output_dir": str(tmp_path), **EVERY}
    path.write_text(json.dumps(content) if kind == "json" else yaml.safe_dump(content))
    parser = HfArgumentParser((TrainingArguments, EWCConfig))
    read = parser.parse_json_file if kind == "json" else parser.parse_yaml_file
    assert read(str(path))[1] == EWCConfig(**EVERY)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        (["q_proj"], ["q_proj"]),
        (["layer.0.attention"], ["layer.0.attention"]),
        (["all-linear"], "all-linear"),
        ([r".*layer\.[01]\..*"], r".*layer\.[01]\..*"),
        (["q_proj|v_proj"], "q_proj|v_proj"),
    ],
)
def test_modules_on_the_command_line(arguments, expected):
    assert parse("--ewc_target_modules", *arguments).ewc_target_modules == expected
    assert parse("--ewc-exclude-modules", *arguments).ewc_exclude_modules == expected


def test_modules_in_python():
    assert EWCConfig(ewc_target_modules=r".*\.query").ewc_target_modules == r".*\.query"
    assert EWCConfig(ewc_target_modules=("b", "a")).ewc_target_modules == ["b", "a"]
    assert EWCConfig(ewc_target_modules={"b", "a"}).ewc_target_modules == ["a", "b"]
    assert EWCConfig(ewc_target_modules="ALL-LINEAR").ewc_target_modules == "all-linear"


def test_all_examples():
    assert parse("--fisher_samples", "-1").fisher_samples is None
    assert EWCConfig(fisher_samples=None).fisher_samples is None


def test_flags_need_no_value():
    assert parse("--ewc_offload", "--fisher_stratified").fisher_stratified is True


def test_a_setting_that_there_is_not_is_refused():
    config = EWCConfig()
    with pytest.raises(ValueError, match="no setting 'ewc_lamda'; is ewc_lambda meant"):
        config.ewc_lamda = 1e4
    with pytest.raises(ValueError, match="no setting 'colour'"):
        config.colour = "red"
    config.ewc_lambda = 1e4
    assert config == EWCConfig(ewc_lambda=1e4)


def test_every_field_has_help():
    assert all(field.metadata["help"].endswith(".") for field in fields(EWCConfig))
    HfArgumentParser((TrainingArguments, EWCConfig)).format_help()


def test_no_collision_with_other_arguments():
    own = {field.name for field in fields(EWCConfig)}
    for arguments in (TrainingArguments, Seq2SeqTrainingArguments):
        assert not own & {field.name for field in fields(arguments)}


@pytest.mark.filterwarnings("ignore")
def test_no_collision_with_trl():
    trl = pytest.importorskip("trl")
    HfArgumentParser((trl.SFTConfig, EWCConfig))
    HfArgumentParser((trl.DPOConfig, EWCConfig))
    HfArgumentParser((trl.SFTConfig, trl.ModelConfig, trl.ScriptArguments, EWCConfig))
    HfArgumentParser((Seq2SeqTrainingArguments, EWCConfig))


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("ewc_lambda", -1.0, "at least 0"),
        ("ewc_lambda", float("nan"), "finite"),
        ("ewc_lambda", float("inf"), "finite"),
        ("ewc_lambda", 10**400, "finite"),
        ("ewc_gamma", 10**400, "finite"),
        ("ewc_lambda", "strong", "finite number"),
        ("ewc_lambda", None, "finite number"),
        ("ewc_lambda", True, "finite number"),
        ("ewc_lambda", "strong", "or 'auto'"),
        ("ewc_give_up", 0.0, "above 0"),
        ("ewc_give_up", 1.0, "below 1"),
        ("ewc_mode", "both", "'online', 'separate'"),
        ("ewc_space", "lora", "'adapter', 'weight'"),
        ("ewc_gamma", 1.1, "at most 1"),
        ("ewc_gamma", -0.1, "at least 0"),
        ("ewc_lambda_growth", 0.0, "above 0"),
        ("ewc_layer_lambdas", {"head": -1}, "at least 0"),
        ("ewc_layer_lambdas", {1: 1.0}, "dict from pattern"),
        ("ewc_layer_lambdas", "[1]", "dict from pattern"),
        ("ewc_layer_lambdas", "{head: 1}", "JSON"),
        ("ewc_layer_lambdas", {"(head": 1.0}, "not a valid regular expression"),
        ("ewc_target_modules", [], "a list of module-name suffixes"),
        ("ewc_target_modules", "", "a list of module-name suffixes"),
        ("ewc_target_modules", [""], "a list of module-name suffixes"),
        ("ewc_target_modules", 3, "a list of module-name suffixes"),
        ("ewc_target_modules", "*attention", "not a valid regular expression"),
        ("ewc_exclude_modules", [1], "a list of module-name suffixes"),
        ("ewc_state_dtype", "int8", "'float32', 'bfloat16', 'float16'"),
        ("ewc_anchor", "link", "'copy', 'reference'"),
        ("ewc_keep_fraction", 0.0, "above 0"),
        ("ewc_keep_fraction", 1.5, "at most 1"),
        ("ewc_offload", "yes", "True or False"),
        ("ewc_log_groups", 1, "True or False"),
        ("fisher_type", "diagonal", "'exact'"),
        ("fisher_samples", 0, "at least 1"),
        ("fisher_samples", -2, "at least 1"),
        ("fisher_samples", 1.5, "an integer"),
        ("fisher_draws", 0, "at least 1"),
        ("fisher_batch_size", 0, "at least 1"),
        ("fisher_stratified", None, "True or False"),
        ("fisher_seed", -1, "at least 0"),
    ],
)
def test_bad_values_are_refused_by_name(field, value, allowed):
    with pytest.raises(ValueError, match=rf"(?s){field}.*{allowed.replace('(', '.')}"):
        EWCConfig(**{field: value})


def test_the_message_shows_the_value():
    with pytest.raises(ValueError, match=r"ewc_gamma is 1\.5; allowed is a finite number"):
        EWCConfig(ewc_gamma=1.5)


def test_lambdas():
    config = EWCConfig(ewc_lambda=10.0, ewc_lambda_growth=2.0, ewc_layer_lambdas={"head": 3})
    names = ["body.weight", "head.weight"]
    assert config.lambdas(names) == {"body.weight": 10.0, "head.weight": 3.0}
    assert config.lambdas(names, 0) == config.lambdas(names, 1)
    assert config.lambdas(names, 3) == {"body.weight": 40.0, "head.weight": 12.0}


def test_numbers_as_yaml_and_numpy_give_them() -> None:
    config = EWCConfig(
        ewc_lambda="1e4",  # type: ignore[arg-type]
        ewc_gamma=np.float32(0.5),  # type: ignore[arg-type]
        fisher_samples=np.int64(7),  # type: ignore[arg-type]
    )
    assert (config.ewc_lambda, config.ewc_gamma, config.fisher_samples) == (1e4, 0.5, 7)
    assert type(config.fisher_samples) is int
    with pytest.raises(ValueError, match="ewc_lambda is 'much'"):
        EWCConfig(ewc_lambda="much")  # type: ignore[arg-type]


@pytest.mark.parametrize("growth", [1e300, 1e20])
def test_a_lambda_that_grows_out_of_range_is_refused(growth: float) -> None:
    with pytest.raises(ValueError, match="fp32 holds up to"):
        EWCConfig(ewc_lambda=1e3, ewc_lambda_growth=growth).lambdas(["a"], 4)


def test_lambda_may_be_found():
    assert parse("--ewc_lambda", "auto") == EWCConfig(ewc_lambda="auto")
    assert parse("--ewc_lambda", "1e4").ewc_lambda == 1e4
    config = EWCConfig(ewc_lambda="auto", ewc_give_up=0.05)
    assert "auto (gives up at most 5 %" in config.summary()
    with pytest.raises(ValueError, match="find_lambda"):
        config.lambdas(["a"])
