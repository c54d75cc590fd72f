"""The command line: what it prints and writes, and its errors of one line."""

import json
import os
import re
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from models import bert, vit
from peft import LoraConfig, get_peft_model
from transformers import (
    BertForSequenceClassification,
    BertTokenizerFast,
    GPT2Config,
    GPT2LMHeadModel,
    ViTImageProcessorPil,
)

from hf_ewc import AccuracyMatrix, EWCState, Fisher, estimate_fisher
from hf_ewc.cli import main
from hf_ewc.cli.data import _label, _numbering
from hf_ewc.cli.fisher_command import FISHER_TYPES
from hf_ewc.importance import FISHER_TYPES as KNOWN
from hf_ewc.report import read_outcomes, write_report

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "book", "the", "a"]


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    model = bert(id2label={0: "no", 1: "yes", 2: "maybe"}, label2id={"no": 0, "yes": 1, "maybe": 2})
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer():
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    return BertTokenizerFast(vocab=vocabulary)


ROWS = [("the good film", "yes"), ("a bad book", "no"), ("the film", "maybe"), ("bad bad", "no")]


@pytest.fixture
def csv(tmp_path):
    path = tmp_path / "reviews.csv"
    lines = [f"{i},{text},{label}" for i, (text, label) in enumerate(ROWS)]
    path.write_text("\n".join(["id,text,label", *lines]) + "\n")
    return path


def failed(capsys, *arguments):
    """The one line that a command ends with, after the status 2."""
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as ended:
        status = ended.code
    printed = capsys.readouterr()
    assert status == 2, printed.out
    (line,) = printed.err.splitlines()
    assert line.startswith("hf-ewc")
    return line


def test_fisher_of_a_file(tmp_path, text_model, csv, capsys):
    assert main(["fisher", str(text_model), str(csv), "-o", str(tmp_path / "state")]) == 0
    assert "on 4 examples, task 'reviews'" in capsys.readouterr().out
    state = EWCState.from_pretrained(tmp_path / "state")
    assert [(task.name, task.num_examples) for task in state.tasks] == [("reviews", 4)]
    names = {"no": 0, "yes": 1, "maybe": 2}
    rows = [{**tokenizer()(text), "labels": names[label]} for text, label in ROWS]
    expected = estimate_fisher(bert().eval(), rows, batch_size=1, data_collator=collate)
    for name, values in expected.diagonal.items():
        torch.testing.assert_close(state.importance[name], values, rtol=1e-4, atol=1e-9)


def collate(rows):
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet", "tsv", "folder", "disk"])
def test_fisher_of_other_files(tmp_path, text_model, csv, suffix):
    data = datasets.Dataset.from_list([{"text": t, "label": label} for t, label in ROWS])
    path = tmp_path / f"data.{suffix}"
    if suffix in ("json", "jsonl"):
        data.to_json(path)
    elif suffix == "parquet":
        data.to_parquet(path)
    elif suffix == "tsv":
        path.write_text("text\tlabel\n" + "".join(f"{t}\t{label}\n" for t, label in ROWS))
    elif suffix == "folder":
        path.mkdir()
        data.to_csv(path / "train.csv")
    else:
        data.save_to_disk(path)
    out = tmp_path / "state"
    assert main(["fisher", str(text_model), str(path), "-o", str(out), "--name", "x"]) == 0
    assert EWCState.from_pretrained(out).tasks[0].num_examples == 4


def test_a_file_whose_name_looks_like_a_pattern(tmp_path, text_model, csv):
    (tmp_path / "reviews1.csv").write_text("text,label\nbad bad,maybe\n")
    named = tmp_path / "reviews[1].csv"
    named.write_text(csv.read_text())
    assert main(["fisher", str(text_model), str(named), "-o", str(tmp_path / "state")]) == 0
    assert EWCState.from_pretrained(tmp_path / "state").tasks[0].num_examples == 4


def test_labels_that_a_table_has_as_floats(tmp_path, text_model):
    path = tmp_path / "a.csv"
    path.write_text("text,label\nthe good film,1.0\na bad book,0.0\n")
    assert main(["fisher", str(text_model), str(path), "-o", str(tmp_path / "state")]) == 0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (",0\ngood,1", "has nothing in column 'text' of example 1"),
        ("12,0\n13,1", "has 12 in column 'text' of example 1"),
    ],
)
def test_texts_that_are_none(rows, message, tmp_path, text_model, capsys):
    path = tmp_path / "a.csv"
    path.write_text(f"text,label\n{rows}\n")
    command = ["fisher", text_model, path, "--text", "text", "-o", tmp_path / "state"]
    assert message in failed(capsys, *command)


def test_a_folder_without_a_vocabulary(tmp_path, text_model, csv, capsys):
    """Of a configuration alone comes a tokenizer to which every word is the unknown one."""
    bert().save_pretrained(tmp_path / "model")
    line = failed(capsys, "fisher", tmp_path / "model", csv, "-o", tmp_path / "state")
    assert f"{tmp_path / 'model'} has no vocabulary" in line
    assert not (tmp_path / "state").exists()


def test_fisher_goes_on_from_an_earlier_state(tmp_path, text_model, csv):
    options = ["--num_samples", "2", "--fisher_type", "empirical", "--text", "text"]
    command = ["fisher", str(text_model), str(csv), *options]
    assert main([*command, "-o", str(tmp_path / "a"), "--name", "first"]) == 0
    onto = ["--onto", str(tmp_path / "a"), "--mode", "separate", "--seed", "1"]
    assert main([*command, *onto, "-o", str(tmp_path / "b")]) == 0
    tasks = EWCState.from_pretrained(tmp_path / "b").tasks
    assert [(t.name, t.num_examples, t.fisher_type) for t in tasks] == [
        ("first", 2, "empirical"),
        ("reviews", 2, "empirical"),
    ]


def test_fisher_of_a_language_model(tmp_path):
    words = len(WORDS)
    config = GPT2Config(vocab_size=words, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "lines.txt").write_text("the good film\nbad\n")
    command = ["fisher", str(tmp_path / "model"), str(tmp_path / "lines.txt")]
    assert main([*command, "-o", str(tmp_path / "state"), "--max_length", "4"]) == 0
    assert EWCState.from_pretrained(tmp_path / "state").tasks[0].num_examples == 2


def test_the_end_of_a_text_counts_where_it_is_what_pads(tmp_path):
    """As in language models that have no token of their own to pad with."""
    torch.manual_seed(0)
    end = WORDS.index("[SEP]")
    config = GPT2Config(
        vocab_size=len(WORDS), n_embd=8, n_layer=1, n_head=2, n_positions=8, eos_token_id=end
    )
    model = GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "model")
    own = tokenizer()
    own.pad_token, own.eos_token = None, "[SEP]"
    own.save_pretrained(tmp_path / "model")
    (tmp_path / "lines.txt").write_text("the good film\nbad\n")
    command = ["fisher", str(tmp_path / "model"), str(tmp_path / "lines.txt")]
    options = ["-o", str(tmp_path / "state"), "--fisher_type", "empirical"]
    assert main([*command, *options]) == 0
    squares, labels = torch.zeros_like(model.transformer.ln_f.weight), 0
    for text in ("the good film", "bad"):
        tokens = tokenizer()(text, return_tensors="pt")
        ids = tokens["input_ids"]
        assert ids[0, -1] == end
        labels += ids.shape[1] - 1
        log_p = -model(**tokens, labels=ids).loss * (ids.shape[1] - 1)
        (gradient,) = torch.autograd.grad(log_p, model.transformer.ln_f.weight)
        squares += gradient**2
    found = EWCState.from_pretrained(tmp_path / "state").importance["transformer.ln_f.weight"]
    torch.testing.assert_close(found, squares / labels, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("names", "label", "row"),
    [
        (["a: no", "a: yes", "b: maybe"], " yes ", 1),
        (["a: no", "a: yes", "yes"], "yes", 2),
        (["a: no", "b: no", "b: yes"], "no", None),
        (["a: no", "a: yes"], "maybe", None),
    ],
)
def test_labels_of_one_of_a_recipes_tasks(names, label, row):
    model = bert(num_labels=len(names))
    model.config.label2id = {name: k for k, name in enumerate(names)}
    if row is not None:
        assert _label(label, model) == row
        return
    with pytest.raises(ValueError, match=re.escape(f"a label is {label!r}; the model has {names}")):
        _label(label, model)


@pytest.mark.parametrize(
    ("names", "label", "row"),
    [
        (["1", "2", "3"], 3, 2),
        (["1", "2", "3"], 1.0, 0),
        (["1", "2", "3"], 0, None),
        (["a: 7", "b: 8"], 8, 1),
        (["a: 7", "b: 7"], 7, None),
        (["no", "yes"], 1, 1),
    ],
)
@pytest.mark.parametrize("inverted", [True, False])
def test_labels_by_names_that_are_numbers(names, label, row, inverted):
    """Stars from 1 on are no rows from 0 on; and a configuration may have names by row alone."""
    model = bert(num_labels=len(names))
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = None if inverted else {name: k for k, name in enumerate(names)}
    number_of = _numbering(datasets.Dataset.from_dict({"label": [label]}), "label", model)
    if row is not None:
        assert number_of(label) == row
        return
    with pytest.raises(ValueError, match=re.escape(f"a label is '{label}'; the model has {names}")):
        number_of(label)


def test_numbers_of_classes_are_no_names():
    """A column of classes counts them from 0 on, whatever the model calls its rows."""
    model = bert(num_labels=2)
    model.config.label2id = {"1": 0, "2": 1}
    for classes, rows in ((["1 star", "2 stars"], [0, 1]), (["2", "1"], [1, 0])):
        kinds = datasets.Features(label=datasets.ClassLabel(names=classes))
        data = datasets.Dataset.from_dict({"label": [0, 1]}, kinds)
        number_of = _numbering(data, "label", model)
        assert [number_of(0), number_of(1)] == rows


@pytest.mark.parametrize("knows", [True, False], ids=["by name", "by number"])
def test_classes_of_a_data_set_are_the_models_by_name_where_it_knows_them(knows, tmp_path):
    """The data counts them in another order."""
    order = ["yes", "maybe", "no"] if knows else ["good", "so-so", "bad"]
    names = {"no": 0, "yes": 1, "maybe": 2}
    model = bert(id2label={i: n for n, i in names.items()}, label2id=names).eval()
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    kinds = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=order))
    numbers = [0, 2, 1, 2]
    rows = {"text": [text for text, _ in ROWS], "label": numbers}
    datasets.Dataset.from_dict(rows, kinds).save_to_disk(tmp_path / "data")
    command = ["fisher", str(tmp_path / "model"), str(tmp_path / "data"), "-o"]
    assert main([*command, str(tmp_path / "state"), "--fisher_type", "empirical"]) == 0
    labels = [names[order[number]] if knows else number for number in numbers]
    rows = [{**tokenizer()(text), "labels": y} for (text, _), y in zip(ROWS, labels, strict=True)]
    expected = estimate_fisher(
        model, rows, batch_size=1, data_collator=collate, fisher_type="empirical"
    )
    state = EWCState.from_pretrained(tmp_path / "state")
    for name, values in expected.diagonal.items():
        torch.testing.assert_close(state.importance[name], values, rtol=1e-4, atol=1e-9)


def test_fisher_of_images(tmp_path):
    vit().save_pretrained(tmp_path / "model")
    size = {"height": 8, "width": 8}
    ViTImageProcessorPil(size=size, image_mean=[0.5], image_std=[0.5]).save_pretrained(
        tmp_path / "model"
    )
    chance = np.random.default_rng(0)
    pictures = [chance.integers(0, 255, (8, 8), dtype=np.uint8) for _ in range(4)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": pictures, "label": [0, 1, 2, 0]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "data")
    command = ["fisher", str(tmp_path / "model"), str(tmp_path / "data")]
    assert main([*command, "-o", str(tmp_path / "state")]) == 0
    assert EWCState.from_pretrained(tmp_path / "state").tasks[0].num_examples == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["no/such/model", "CSV"], "no/such/model"),
        (["MODEL", "/no/such.csv"], "/no/such.csv does not exist"),
        (["MODEL", "CSV", "--label", "gold"], "no column 'gold'"),
        (["MODEL", "CSV", "--text", "body"], "no column 'body'"),
        (["MODEL", "CSV", "--num_samples", "-3"], "--num_samples is -3"),
        (["MODEL", "CSV", "--batch_size", "0"], "--batch_size is 0"),
        (["MODEL", "CSV", "--batch_size", "x"], "invalid int value: 'x'"),
        (["MODEL", "CSV", "--fisher_type", "best"], "invalid choice: 'best'"),
        (["MODEL", "CSV", "--onto", "/no/such/state"], "/no/such/state"),
        (["MODEL", "EMPTY"], "empty.csv is empty"),
        (["MODEL", "HEADER"], "header.csv has no examples"),
        (["MODEL", "BINARY"], "binary.parquet cannot be read"),
        (["MODEL", "TWICE"], "twice.csv cannot be read: its first line names the column 'text' tw"),
        (["MODEL", "ODD"], "a label is 'perhaps'; the model has"),
        (["MODEL", "OTHER"], "is none of .csv"),
        (["MODEL"], "the following arguments are required: DATA"),
    ],
)
def test_errors_of_fisher(tmp_path, text_model, csv, capsys, changes, message):
    files = {
        "EMPTY": ("empty.csv", ""),
        "HEADER": ("header.csv", "text,label\n"),
        "TWICE": ("twice.csv", "text;label;text\nthe film;good;was good\n"),
        "ODD": ("odd.csv", "text,label\nthe film,perhaps\n"),
        "BINARY": ("binary.parquet", "\0\1"),
        "OTHER": ("other.xyz", "the film"),
    }
    for name, content in files.values():
        (tmp_path / name).write_text(content)
    known = {"MODEL": text_model, "CSV": csv, **{k: tmp_path / n for k, (n, _) in files.items()}}
    given = [known.get(argument, argument) for argument in changes]
    assert message in failed(capsys, "fisher", *given, "-o", tmp_path / "state")
    assert not (tmp_path / "state").exists()


def state_of(values):
    parameters = {name: torch.zeros_like(value) for name, value in values.items()}
    return EWCState().consolidate(Fisher(values, 7, "exact"), parameters, name="first | task")


def test_inspect_shows_tasks_sizes_and_layers(tmp_path, capsys):
    state = state_of({
        "bert.encoder.layer.0.a.weight": torch.full((2, 3), 0.5),
        "bert.encoder.layer.0.b.bias": torch.ones(3),
        "classifier.weight": torch.full((4,), 0.5),
    })  # fmt: skip
    state.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("1 tasks, 13 parameters in 3 tensors")
    layer = next(line for line in lines if "bert.encoder.layer.0" in line)
    assert [cell.strip() for cell in layer.split("|")[2:-1]] == ["9", "6", "75.0 %", "0.667"]
    assert "first \\| task" in "\n".join(lines)
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layers"]["classifier"]["share"] == 0.25
    assert found["tasks"][0]["num_examples"] == 7


def test_inspect_says_which_lambda_the_default_takes(tmp_path, capsys):
    """0.4 / (g ρ²): g is 2 and ρ is 1 where all importances are 4; with an empty state no λ."""
    state_of({"a.weight": torch.full((6,), 4.0)}).save_pretrained(tmp_path / "state")
    assert main(["inspect", str(tmp_path / "state")]) == 0
    assert "EWCConfig() takes with it (ewc_lambda='state'): 0.2\n" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "state"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["told_lambda"] == pytest.approx(0.2)
    EWCState().save_pretrained(tmp_path / "empty")
    assert main(["inspect", str(tmp_path / "empty")]) == 0
    assert "λ that" not in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["no folder", "empty folder", "no json", "cut tensors", "file"])
def test_errors_of_inspect(tmp_path, capsys, damage):
    folder = tmp_path / "state"
    if damage == "empty folder":
        folder.mkdir()
    elif damage == "file":
        folder.write_text("x")
    elif damage != "no folder":
        state_of({"a.weight": torch.ones(3)}).save_pretrained(folder)
        if damage == "no json":
            (folder / "ewc_state.json").write_text("{")
        else:
            (tensors,) = folder.glob("*.safetensors")
            tensors.write_bytes(tensors.read_bytes()[:-1])
    assert "state" in failed(capsys, "inspect", folder)


def matrix(last, names=("a", "b")):
    return AccuracyMatrix(names, [[0.9, None], [last, 0.8]])


def test_report_on_several_folders(tmp_path, capsys):
    write_report(tmp_path / "plain", {"plain": {1: matrix(0.5), 2: matrix(0.4)}})
    write_report(tmp_path / "ewc" / "seed-1", {"EWC": {1: matrix(0.9)}})
    write_report(tmp_path / "ewc" / "seed-2", {"EWC": {2: matrix(0.8)}})
    out = tmp_path / "report"
    arguments = ["report", str(tmp_path / "plain"), str(tmp_path / "ewc"), "-o", str(out)]
    assert main([*arguments, "--title", "Two ways"]) == 0
    printed = capsys.readouterr().out
    assert "minus plain" in printed
    assert "stability_plasticity.png" in printed
    runs, _ = read_outcomes(out / "results.json")
    assert {method: [*repeats] for method, repeats in runs.items()} == {
        "plain": [1, 2],
        "EWC": [1, 2],
    }
    assert (out / "report.md").read_text().startswith("# Two ways")


@pytest.mark.parametrize("name", ["report.md", "curves.png"])
def test_report_leaves_somebodys_files(tmp_path, name, capsys):
    write_report(tmp_path / "plain", {"plain": {1: matrix(0.5)}})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("mine")
    assert main(["report", str(tmp_path / "plain"), "-o", str(tmp_path / "mine")]) != 0
    assert f"has {name} and no results.json" in capsys.readouterr().err
    assert (tmp_path / "mine" / name).read_text() == "mine"


def test_report_tells_runs_of_one_method_and_seed_apart(tmp_path):
    for name, last in (("weak", 0.5), ("strong", 0.9)):
        details = {"settings": {"args": {"seed": 4}}}
        write_report(tmp_path / name, {"EWC": [matrix(last)]}, details=details)
    folders = [str(tmp_path / "weak"), str(tmp_path / "strong")]
    assert main(["report", *folders, "-o", str(tmp_path / "out")]) == 0
    runs, _ = read_outcomes(tmp_path / "out" / "results.json")
    assert {method: [*repeats] for method, repeats in runs.items()} == {
        "EWC": [4],
        "EWC (strong)": [4],
    }


def test_report_takes_runs_of_other_settings_for_other_methods(tmp_path):
    """Whatever their seeds; those that differ in the seed alone are repetitions."""
    for name, seed, strength in (("weak", 0, 1.0), ("strong", 1, 1e6), ("again", 2, 1.0)):
        settings = {"args": {"seed": seed}, "ewc_config": {"ewc_lambda": strength}}
        write_report(tmp_path / name, {"EWC": [matrix(0.5)]}, details={"settings": settings})
    folders = [str(tmp_path / name) for name in ("weak", "strong", "again")]
    assert main(["report", *folders, "-o", str(tmp_path / "out")]) == 0
    runs, _ = read_outcomes(tmp_path / "out" / "results.json")
    assert {method: [*repeats] for method, repeats in runs.items()} == {
        "EWC": [0, 2],
        "EWC (strong)": [1],
    }


def test_report_counts_a_run_once_however_it_is_named(tmp_path):
    write_report(tmp_path / "run", {"EWC": [matrix(0.5)]})
    (tmp_path / "link").symlink_to(tmp_path / "run")
    named = ["run", "run/", "run/results.json", "link", "."]
    folders = [str(tmp_path / name) for name in named]
    assert main(["report", *folders, "-o", str(tmp_path / "out")]) == 0
    runs, _ = read_outcomes(tmp_path / "out" / "results.json")
    assert {method: [*repeats] for method, repeats in runs.items()} == {"EWC": [0]}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "does not exist"),
        ("empty", "holds no results.json"),
        ("damaged", "is not a results file of hf_ewc"),
        ("other tasks", "different tasks"),
        ("onto itself", "holds results that are read"),
    ],
)
def test_errors_of_report(tmp_path, capsys, kind, message):
    folder, other, out = tmp_path / "run", tmp_path / "other", tmp_path / "out"
    write_report(other, {"EWC": [matrix(0.5)]})
    if kind != "missing":
        folder.mkdir()
    if kind == "damaged":
        (folder / "results.json").write_text("{}")
    elif kind == "other tasks":
        write_report(folder, {"EWC": [matrix(0.5, ("a", "c"))]})
    elif kind == "onto itself":
        folder, out = other, other
    before = sorted(os.listdir(other))
    assert message in failed(capsys, "report", folder, other, "-o", out)
    assert sorted(os.listdir(other)) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [[], ["fisher"], ["inspect"], ["report"]])
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "examples:\n  hf-ewc" in printed


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["inspect"], ["report", "--x"]])
def test_errors_of_the_command_line(arguments, capsys):
    assert "--help" in failed(capsys, *arguments)


def test_a_traceback_is_there_for_who_asks(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        main(["--traceback", "report", str(tmp_path / "no")])


def test_fisher_types_are_the_known_ones():
    assert ("auto", *KNOWN) == FISHER_TYPES


def test_as_a_process(tmp_path):
    write_report(tmp_path / "run", {"EWC": [matrix(0.5)]})
    command = [sys.executable, "-m", "hf_ewc.cli", "report", "run", "no"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={
        **os.environ, "PYTHONPATH": os.pathsep.join(sys.path)
    })  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "hf-ewc: error: no does not exist.\n"


def test_fisher_of_an_adapter_is_that_of_its_matrices(tmp_path, text_model, csv):
    base = BertForSequenceClassification.from_pretrained(text_model)
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    tokenizer().save_pretrained(tmp_path / "adapter")
    command = ["fisher", str(tmp_path / "adapter"), str(csv), "-o", str(tmp_path / "state")]
    assert main(command) == 0
    names = list(EWCState.from_pretrained(tmp_path / "state").importance)
    assert any("lora_B" in name for name in names)
    assert not any("key" in name for name in names)


def test_report_does_not_write_over_a_run(tmp_path, capsys):
    write_report(tmp_path / "plain", {"plain": {1: matrix(0.5)}})
    write_report(tmp_path / "run", {"EWC": [matrix(0.5)]}, details={"settings": {}})
    before = (tmp_path / "run" / "results.json").read_bytes()
    said = failed(capsys, "report", tmp_path / "plain", "-o", tmp_path / "run")
    assert "holds the results of a run" in said
    assert (tmp_path / "run" / "results.json").read_bytes() == before


def test_a_terminal_that_has_no_lambda(tmp_path):
    """As one of Windows, or of a job without a locale."""
    model = bert()
    zeros = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    EWCState().consolidate(Fisher(zeros), model).save_pretrained(tmp_path)
    command = [sys.executable, "-m", "hf_ewc.cli", "inspect", str(tmp_path)]
    found = subprocess.run(
        command, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert "?" in found.stdout
