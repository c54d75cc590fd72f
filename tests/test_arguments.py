"""The arguments of a script: a YAML file, the command line over it, and errors of one line."""

import json
from dataclasses import dataclass, field

import pytest
from transformers import TrainingArguments

from hf_ewc import EWCConfig
from hf_ewc.cli.arguments import one_line_errors, parse_arguments


@dataclass
class Own:
    model: str
    tasks: dict | str | None = None
    sizes: list[int] = field(default_factory=lambda: [1])


@pytest.fixture
def parse(tmp_path):
    def parse_with(text, *options):
        path = tmp_path / "some.yaml"
        path.write_text(text, encoding="utf-8")
        types = (Own, TrainingArguments, EWCConfig)
        defaults = {"learning_rate": 0.5, "use_cpu": True, "report_to": "none"}
        return parse_arguments(*types, defaults=defaults, arguments=[str(path), *options])

    return parse_with


def test_the_command_line_wins_over_the_file_and_that_over_defaults(parse):
    text = "model: m\nlearning_rate: 1e-3\newc_lambda: 1e4\nmax_steps: 7\ntasks: [{name: a}]\n"
    own, args, ewc = parse(text, "--max_steps", "9", "--ewc_mode=separate")
    assert (own.model, own.tasks) == ("m", [{"name": "a"}])
    assert (args.learning_rate, args.max_steps, args.use_cpu) == (1e-3, 9, True)
    assert (ewc.ewc_lambda, ewc.ewc_mode) == (1e4, "separate")


@pytest.mark.parametrize(
    ("written", "value"), [("1e3", 1000), ("8.0", 8), ("'7'", 7), ("123456789", 123456789)]
)
def test_whole_numbers_are_whole(written, value, parse):
    _, args, _ = parse(f"model: m\nmax_steps: {written}\n")
    assert args.max_steps == value
    assert isinstance(args.max_steps, int)


@pytest.mark.parametrize("written", ["auto", "state", "30", "1e4"])
def test_a_number_or_a_word(written, parse):
    *_, ewc = parse(f"model: m\newc_lambda: {written}\n")
    assert str(ewc.ewc_lambda) in (written, "30.0", "10000.0")


@pytest.mark.parametrize(
    ("written", "value"),
    [("1e-3", 1e-3), ("1E4", 1e4), ("2.5e+1", 25.0), (".5e1", 5.0), ("3", 3), ("'1e-3'", "1e-3")],
)
def test_numbers_inside_of_lists_and_dicts(written, value, parse):
    own, *_ = parse(f"model: m\ntasks: [{{rate: {written}}}]\nsizes: [2, 3]\n")
    assert own.tasks == [{"rate": value}]
    assert own.sizes == [2, 3]


def test_keys_that_are_merged_stand_behind_those_of_the_entry_itself(parse):
    own, *_ = parse(
        "model: m\ntasks:\n"
        "  - &first {name: a, rate: 1}\n"
        "  - &second {<<: *first, name: b}\n"
        "  - {<<: [*second, {rate: 2, more: 3}], rate: 4}\n"
    )
    assert own.tasks == [
        {"name": "a", "rate": 1},
        {"name": "b", "rate": 1},
        {"name": "b", "rate": 4, "more": 3},
    ]


def test_nothing_where_nothing_is_the_default_and_words_for_yes_and_no(parse):
    _, args, _ = parse("model: m\ntf32: null\nuse_cpu: 'yes'\nbf16: no\neval_steps: null")
    assert args.use_cpu is True
    assert args.eval_steps is None


def test_without_a_file():
    (own,) = parse_arguments(Own, arguments=["--model", "x", "--sizes", "4", "5"])
    assert (own.model, own.sizes) == ("x", [4, 5])


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("model: m\newc_lamda: 3", [], "some.yaml has the unknown key 'ewc_lamda'; did you mean "
         "'ewc_lambda'?"),
        ("model: m", ["--ewc_lamda", "3"], "the command line has the unknown key '--ewc_lamda'; "
         "did you mean '--ewc_lambda'?"),
        ("model: m", ["--ewc_lamb=3"], "unknown key '--ewc_lamb'"),
        ("model: m", ["stray"], "unknown key 'stray'."),
        ("max_steps: 3", [], "required: --model"),
        ("model: m\newc_lambda: -1", [], "ewc_lambda is -1"),
        ("model: m\nmax_steps: many", [], "has max_steps: 'many'; needed is a whole number."),
        ("model: m\nlearning_rate: null", [], "has learning_rate: None; needed is a number."),
        ("model: m\nmax_steps: null", [], "has max_steps: None; needed is a whole number."),
        ("model: m\nbf16: 3", [], "has bf16: 3; needed is true or false."),
        ("model: m\nbf16: perhaps", [], "has bf16: 'perhaps'; needed is true or false."),
        ("model: m\ntf32: [1]", [], "has tf32: [1]; needed is true or false."),
        ("model: m\nmodel: n", [], "the key 'model' is there twice"),
        ("model: m\ntasks: [&a {x: 1}, {<<: *a, y: 1, y: 2}]", [], "the key 'y' is there twice"),
        ("model: [", [], "is no YAML"),
        ("- model", [], "needed are lines of `key: value`"),
        ("", [], "needed are lines of `key: value`"),
    ],
)  # fmt: skip
def test_an_error_is_one_line(text, options, message, parse, capsys):
    with pytest.raises(SystemExit) as left:
        parse(text, *options)
    assert left.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_a_file_that_is_not_there(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(Own, arguments=["nowhere.yaml"])
    assert "nowhere.yaml cannot be read: No such file" in capsys.readouterr().err


def test_help_tells_the_fields(capsys):
    with pytest.raises(SystemExit) as left:
        parse_arguments(Own, EWCConfig, arguments=["--help"], description="What it does.")
    assert left.value.code == 0
    printed = capsys.readouterr().out
    assert "What it does." in printed
    assert "(default: state)" in " ".join(printed.split())


def test_only_errors_that_a_user_can_mend_lose_their_traceback(capsys):
    with pytest.raises(SystemExit), one_line_errors():
        raise ValueError("two\nlines")
    assert "two lines" in capsys.readouterr().err
    with pytest.raises(KeyError), one_line_errors():
        raise KeyError("a fault")


def test_in_training_only_own_errors_lose_their_traceback(capsys):
    with pytest.raises(SystemExit), one_line_errors(only_own=True):
        EWCConfig(ewc_lambda=-1)
    assert "ewc_lambda is -1" in capsys.readouterr().err
    with pytest.raises(ValueError, match="invalid literal"), one_line_errors(only_own=True):
        int("a fault of anyone's")


@pytest.mark.parametrize("rank", [0, 1])
def test_of_several_processes_one_says_the_error_and_all_tell_their_launcher(
    rank, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit) as left, one_line_errors():
        raise ValueError("no such file")
    assert left.value.code == 2
    assert capsys.readouterr().err.count("no such file") == (1 if rank == 0 else 0)
    told = json.loads((tmp_path / "error.json").read_text())["message"]["message"]
    assert told == "ValueError: no such file"
