"""The recipe of text classification: in one and two processes, and what it refuses."""

import json
import re
import sys

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from hf_ewc.cli.lora import LoraArguments, with_lora
from hf_ewc.report import read_outcomes
from tests.models import bert
from tests.processes import ROOT
from tests.recipe import run_recipe

sys.path.insert(0, str(ROOT / "recipes"))
import labelled_data
import sequential_text_classification as recipe
from labelled_data import DataArguments, Examples, load, load_all, rows_of_head
from text_tasks import TextTask, tokenized


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with its tokenizer, the csv files of two tasks, and a YAML file for them."""
    folder = tmp_path_factory.mktemp("text")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "blue", "cat", "dog"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "model")
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    BertForSequenceClassification(
        BertConfig(vocab_size=len(words), max_position_embeddings=16, **sizes)
    ).save_pretrained(folder / "model")
    for name, labels in (("a", ["red", "blue"]), ("b", ["cat", "dog", "red"])):
        for part in ("train", "eval"):
            rows = [f"{label} one,{label} two,{label}" for label in labels * 4]
            (folder / f"{name}_{part}.csv").write_text("\n".join(["first,second,kind", *rows]))
    (folder / "two.yaml").write_text(f"""
model_name_or_path: {folder}/model
max_steps: 2
use_cpu: true
num_seeds: 1
tasks:
  - {{name: a, train_file: {folder}/a_train.csv, eval_file: {folder}/a_eval.csv, text: first,
     label: kind}}
  - {{name: b, train_file: {folder}/b_train.csv, eval_file: {folder}/b_eval.csv,
     text: [first, second], label: kind}}
""")
    return folder


METHODS = """{plain: {}, EWC: {ewc_lambda: 1e2, fisher_samples: 4}, replay: {replay_share: 0.25},
 found: {ewc_lambda: auto, fisher_samples: 4}}"""


def test_methods_side_by_side_in_two_processes(folder, tmp_path):
    config = tmp_path / "methods.yaml"
    config.write_text((folder / "two.yaml").read_text() + f"methods: {METHODS}\n")
    options = ["--output_dir", tmp_path / "run"]
    code, output = run_recipe("sequential_text_classification", config, *options, processes=2)
    assert code == 0, output[-6000:]
    runs, content = read_outcomes(tmp_path / "run" / "results.json")
    assert {name: [*repeats] for name, repeats in runs.items()} == {
        name: [42] for name in ("plain", "EWC", "replay", "found")
    }
    assert all(outcome.matrix.num_learnt == 2 for r in runs.values() for outcome in r.values())
    assert content["differences"].keys() == {"EWC", "replay", "found"}
    assert [len(outcomes[42].searches) for outcomes in runs.values()] == [0, 0, 0, 1]
    assert (tmp_path / "run" / "lambda_search.png").exists()
    assert output.count("Written to") == 1
    assert (tmp_path / "run" / "stability_plasticity.png").exists()


def test_a_mistake_is_said_once_by_two_processes(folder, tmp_path):
    config = tmp_path / "wrong.yaml"
    config.write_text((folder / "two.yaml").read_text().replace("text: first", "text: frist"))
    code, output = run_recipe("sequential_text_classification", config, processes=2)
    assert code != 0
    assert output.count("error: ") == 1, output[-3000:]
    assert "a_train.csv has no column 'frist'" in output


def test_once_with_lora_and_what_the_command_line_says(folder, tmp_path):
    options = ["--use_peft", "--lora_r", "2", "--ewc_space", "weight", "--max_train_samples", "6"]
    command = [folder / "two.yaml", *options, "--output_dir", tmp_path]
    code, output = run_recipe("sequential_text_classification", *command)
    assert code == 0, output[-6000:]
    runs, content = read_outcomes(tmp_path / "results.json")
    assert list(runs) == ["EWC"]
    settings = content["settings"]
    assert [task["examples"] for task in settings["tasks"]] == [[6, 8], [6, 12]]
    assert [task["classes"] for task in settings["tasks"]] == [[0, 1], [2, 3, 4]]
    assert settings["ewc_config"]["ewc_space"] == "weight"
    adapter = json.loads((tmp_path / "02-b" / "final" / "adapter_config.json").read_text())
    assert adapter["r"] == 2
    assert (tmp_path / "02-b" / "final" / "tokenizer.json").exists()

    code, output = run_recipe("sequential_text_classification", *command)  # started again
    assert code == 0, output[-6000:]
    assert "2 of 2 tasks were done before" in output
    code, output = run_recipe("sequential_text_classification", *command, "--ewc_lambda", "3")
    assert code == 2
    assert output.splitlines()[-1].startswith("sequential_text_classification.py: error: ")
    assert "ewc_lambda: state there, 3.0 now" in output
    anew = [*command, "--ewc_lambda", "3", "--resume", "false"]
    code, output = run_recipe("sequential_text_classification", *anew)
    assert code == 0, output[-6000:]
    assert "Begins anew" in output


# ---- The configuration to copy from, and methods ----


def test_the_csv_files_to_copy_from(monkeypatch):
    monkeypatch.chdir(ROOT)
    data, *_ = recipe.parsed(["recipes/configs/sequential_text_classification/my_csv.yaml"])
    found = [load(task, None, None) for task in data.tasks]
    assert [examples.labels for examples in found] == [["bad", "good"], ["cooking", "travel"]]


def test_settings_of_ewc_in_the_file_hold_for_the_methods_with_ewc():
    ewc = recipe.EWCConfig(ewc_mode="separate")
    methods = recipe.checked_methods({"plain": None, "EWC": {"ewc_lambda": 3.0}}, ewc)
    assert methods == {"plain": {}, "EWC": {"ewc_lambda": 3.0, "ewc_config": ewc}}


@pytest.mark.parametrize(
    ("own", "why"),
    [
        ({"plain": {}, "EWC": {"ewc_lambda": 3.0}, "two": {"ewc_lambda": 1.0}}, "'EWC' and 'two'"),
        ({"plain": {}, "replay": {"replay_share": 0.2}}, "none has EWC"),
    ],
)
def test_a_setting_of_ewc_that_no_method_takes_is_refused(own, why):
    with pytest.raises(ValueError, match=f"ewc_lambda is 7.0, which changes none .*{why}"):
        recipe.checked_methods(own, recipe.EWCConfig(ewc_lambda=7))
    own["other"] = {"ewc_gamma": 0.9}  # takes it
    assert recipe.checked_methods(own, recipe.EWCConfig(ewc_lambda=7))["other"]["ewc_config"]


# ---- Labels ----


def named(name, labels):
    return Examples(TextTask(name), None, None, labels)


def test_rows_of_the_head():
    tasks = [named("a", ["no", "yes"]), named("b", ["yes", "maybe"])]
    assert rows_of_head(tasks, shared=True) == (
        ["no", "yes", "maybe"],
        [{"no": 0, "yes": 1}, {"yes": 1, "maybe": 2}],
    )
    assert rows_of_head(tasks, shared=False) == (
        ["a: no", "a: yes", "b: yes", "b: maybe"],
        [{"no": 0, "yes": 1}, {"yes": 2, "maybe": 3}],
    )


def files(folder, train, evaluation):
    (folder / "train.csv").write_text(train)
    (folder / "eval.csv").write_text(evaluation)
    return dict(train_file=str(folder / "train.csv"), eval_file=str(folder / "eval.csv"))


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (["b", "a"], ["a", "b"]),
        ([10, 9], ["9", "10"]),
        (["True", "False"], ["False", "True"]),
        (["2.0", "1.0"], ["1", "2"]),
        (["true", "false"], ["false", "true"]),
        (["true", "unknown", "false"], ["false", "true", "unknown"]),
        (["01", "1"], ["01", "1"]),
        (["10", "--9", "²"], ["--9", "10", "²"]),
        (["x", "1e3"], ["1e3", "x"]),
        (["12345678901234567890", "12345678901234567891"],) * 2,
        (["2"] * 12_000 + ["none"], ["2", "none"]),
    ],
)
def test_names_of_labels_are_read_from_the_data(values, labels, tmp_path):
    rows = "text,label\n" + "".join(f"some words,{value}\n" for value in values)
    assert load(TextTask("t", **files(tmp_path, rows, rows)), None, None).labels == labels


def test_classes_of_a_data_set_keep_their_order(tmp_path, monkeypatch):
    kinds = Features(text=Value("string"), label=ClassLabel(names=["z", "m", "a"]))
    data = Dataset.from_dict({"text": ["one", "two", "three"], "label": [2, 0, 1]}, kinds)
    monkeypatch.setattr(labelled_data, "from_hub", lambda *_: data)
    some = load(TextTask("t", dataset_name="hub/some", labels=["a", "z"]), None, None)
    assert some.labels == ["z", "a"]
    assert [*some.train.column("text")] == ["one", "two"]


def test_fewer_examples_are_drawn_alike_each_time(tmp_path):
    rows = "text,label\n" + "".join(f"word {i},{i % 2}\n" for i in range(40))
    task = TextTask("t", **files(tmp_path, rows, rows))
    first, again = (load(task, 7, None) for _ in range(2))
    assert len(first.train.rows) == 7
    assert len(first.eval.rows) == 40
    assert first.train.rows == again.train.rows
    assert first.train.labels == [str(row % 2) for row in first.train.rows]


@pytest.mark.parametrize("most", [4, 5, 9])
def test_fewer_examples_leave_no_class_out(most, tmp_path):
    """Of four, three of which have one example each among forty."""
    labels = ["often"] * 37 + ["a", "b", "c"]
    rows = "text,label\n" + "".join(f"word {i},{label}\n" for i, label in enumerate(labels))
    found = load(TextTask("t", **files(tmp_path, rows, rows)), most, most)
    for part in (found.train, found.eval):
        assert len(part.rows) == most
        assert {*part.labels} == {*labels}


# ---- Tables as programs write them ----


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        ("text;label\nred, or not;a\nblau;b\n", "utf-8"),
        ("text\tlabel\nred, or not\ta\nblau\tb\n", "utf-8"),
        ("text|label\nred, or not|a\nblau|b\n", "utf-8"),
        ("sep=;\ntext;label\nred, or not;a\nblau;b\n", "utf-8"),
        ('text, label\n"red, or not", a\nblau,b \n\n\n', "utf-8"),
        ('text,label\n"red, or not",a,\nblau,b,\n', "utf-8"),
        ("text;label\r\nred, or not;a\r\nblau;b\r\n", "utf-8-sig"),
        ("text;label\nred, or not;a\nblau;b\n", "utf-16"),
    ],
)
def test_a_table_is_read_as_it_is_written(content, encoding, tmp_path):
    (tmp_path / "x.csv").write_text(content, encoding=encoding, newline="")
    task = TextTask("t", train_file=str(tmp_path / "x.csv"), eval_file=str(tmp_path / "x.csv"))
    examples = load(task, None, None)
    assert [*examples.train.column("text")] == ["red, or not", "blau"]
    assert (examples.labels, examples.train.labels) == (["a", "b"], ["a", "b"])


def test_a_table_of_an_old_code_page_is_read_and_said(tmp_path, caplog):
    (tmp_path / "x.csv").write_text("text,label\n“Café” für 5 €,a\n", encoding="cp1252")
    task = TextTask("t", train_file=str(tmp_path / "x.csv"), eval_file=str(tmp_path / "x.csv"))
    assert [*load(task, None, None).train.column("text")] == ["“Café” für 5 €"]
    assert "x.csv is no UTF-8; it is read as Windows-1252" in caplog.text


@pytest.mark.parametrize("values", [["true", "false"], ["01", "02"], ["1", "2"], ["1.0", "2.0"]])
def test_a_label_is_the_same_in_both_files_whatever_else_they_hold(values, tmp_path):
    rows = "text,label\n" + "".join(f"some words,{value}\n" for value in values)
    task = TextTask("t", **files(tmp_path, rows + "others,neither\n", rows))
    examples = load(task, None, None)
    assert examples.train.labels == [*examples.eval.labels, "neither"]
    assert examples.eval.labels in (values, ["1", "2"])


@pytest.mark.parametrize("empty", [",", ", ", ' , ""'])
def test_rows_of_empty_cells_are_no_examples(empty, tmp_path):
    rows = f"text,label\n{empty}\none,a\n{empty}\ntwo,b\n{empty}\n"
    examples = load(TextTask("t", **files(tmp_path, rows, rows)), None, None)
    assert [*examples.train.column("text")] == ["one", "two"]
    with pytest.raises(ValueError, match=r"train\.csv has no examples"):
        load(TextTask("t", **files(tmp_path, f"text,label\n{empty}\n", rows)), None, None)


def test_words_that_look_missing_are_words(tmp_path):
    rows = "text,label\nNA,None\nnull,NA\n"
    examples = load(TextTask("t", **files(tmp_path, rows, rows)), None, None)
    assert [*examples.train.column("text")] == ["NA", "null"]
    assert examples.labels == ["NA", "None"]


# ---- What is refused, in one line ----

GOOD = "text,label\nsome words,a\n"


@pytest.mark.parametrize(
    ("train", "evaluation", "settings", "message"),
    [
        (GOOD, GOOD, {"text": "txet"}, "train.csv has no column 'txet'; it has text, label."),
        (GOOD, GOOD, {"label": "kind"}, "train.csv has no column 'kind'; it has text, label."),
        (GOOD, "text,kind\nx,a\n", {}, "eval.csv has no column 'label'"),
        (GOOD, "text,label\nx,b\n", {}, "eval.csv has the label 'b', which"),
        (GOOD, GOOD, {"labels": ["c"]}, "train.csv has no examples with the labels of task 't'."),
        (GOOD, GOOD, {"labels": ["a", "c"]}, "train.csv has no example with the label 'c'."),
        ("", GOOD, {}, "train.csv is empty."),
        (GOOD, "text,label\n", {}, "eval.csv has no examples."),
        ("text,label\n,a\n", GOOD, {}, "train.csv has nothing in column 'text' of example 1"),
        ("text,label\n5,a\n", GOOD, {}, "train.csv has 5 in column 'text' of example 1"),
        ("text,label\n  ,a\n", GOOD, {}, "train.csv has nothing in column 'text' of example 1"),
        ("text,label\nx,0.5\n", GOOD, {}, "train.csv has the label 0.5"),
        ("some words,a\nothers,b\n", GOOD, {}, "The first line of such a file names its columns."),
        (GOOD + "a, b,c\n", GOOD, {}, "line 3, saw 3. What has the separator in it has to"),
        ("text,label\nred, or not,a\nblue, too,b\n", GOOD, {}, "What has the separator in it has"),
        (GOOD + '"a,b\n', GOOD, {}, "A quotation mark that is opened there is not closed."),
        ("text,label\nx,1\ny,\n", GOOD, {}, "train.csv has 1 examples without a label, the "
         "first is number 2"),
        ('text,label\nx,a\ny," "\n', GOOD, {}, "train.csv has 1 examples without a label, the "),
        (GOOD, GOOD, {"train_file": "nowhere.csv"}, "nowhere.csv does not exist"),
        (GOOD, GOOD, {"train_file": "{}/some.doc"}, "some.doc is none of .csv"),
    ],
)  # fmt: skip
def test_data_that_cannot_be_learnt_from(train, evaluation, settings, message, tmp_path):
    (tmp_path / "some.doc").write_text("words")
    entry = {"name": "t", **files(tmp_path, train, evaluation), **settings}
    task = TextTask.from_entry(
        {k: v.format(tmp_path) if isinstance(v, str) else v for k, v in entry.items()}, 1
    )
    with pytest.raises(ValueError) as refused:
        read(task)
    assert message in str(refused.value)


def read(task):
    found = load(task, None, None)
    tokenized(found.train, task.columns, {"a": 0}, lambda texts: {"input_ids": [[0]] * len(texts)})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("a.csv", "task 1 is 'a.csv'; needed are lines of `key: value`."),
        ({"name": "a", "trian_file": "x"}, "task 1 has the unknown key 'trian_file'; did you mean "
         "'train_file'?"),
        ({"train_file": "x"}, "task 1 has no name"),
        ({"name": "a", "train_file": "x"}, "needs either train_file and eval_file, or"),
        ({"name": "a", "train_file": "x", "dataset_name": "y"}, "needs either train_file and eval"),
        ({"name": "a", "dataset_name": "x", "text": ["a", "b", "c"]}, "or of two."),
        ({"name": "a", "dataset_name": "x", "text": ["a", "a"]}, "a column of its own"),
        ({"name": "a", "dataset_name": "x", "text": "label"}, "a column of its own"),
        ({"name": "a", "dataset_name": "x", "labels": [True]}, "put them in quotes"),
        ({"name": "a", "dataset_name": "x", "labels": 3}, "has labels: 3; needed is a list."),
        ({"name": "a", "dataset_name": "x", "labels": "red"}, "labels: 'red'; needed is a list."),
        ({"name": "a", "dataset_name": "x", "text": 3}, "task 1 has text: 3; needed is one word or "
         "path (a number in quotes) or a list."),
        ({"name": "a", "dataset_name": "x", "text": [3]}, "give the name of one column, or of two"),
        ({"name": "a", "dataset_name": "x", "label": ["b"]}, "has label: ['b']; needed is one"),
        ({"name": "a", "train_file": ["x", "y"], "eval_file": "z"}, "has train_file: ['x', 'y']; "
         "needed is one word or path"),
        ({"name": "a", "dataset_name": "x", "eval_split": None}, "has eval_split: None; needed is"),
    ],
)  # fmt: skip
def test_entries_that_are_no_tasks(entry, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TextTask.from_entry(entry, 1)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ("methods: {EWC: {ewc_lamda: 3}}", "method 'EWC' has the unknown key 'ewc_lamda'; did you "
         "mean 'ewc_lambda'?"),
        ("max_stesp: 3", "two.yaml has the unknown key 'max_stesp'"),
        ("lora_r: [1, 2]", "two.yaml has lora_r: [1, 2]; needed is a whole number."),
        ("lora_r: 1.5", "two.yaml has lora_r: 1.5; needed is a whole number."),
        ("weight_decay: {a: 1}", "two.yaml has weight_decay: {'a': 1}; needed is a number."),
        ("max_train_samples: 0", "max_train_samples is 0; needed is at least 1."),
        ("num_seeds: 0", "num_seeds is 0; needed is at least 1."),
        ("seed: -1", "seed is -1; needed is a whole number from 0 to 4294967295."),
        ("seed: 99999999999", "seed is 99999999999; needed is a whole number from 0 to"),
        ("use_peft: 3", "two.yaml has use_peft: 3; needed is true or false."),
        ("num_seeds: 2", "num_seeds is 2, and without `methods:` there is one run."),
    ],
)  # fmt: skip
def test_a_fault_in_the_file_is_one_line(added, message, folder, tmp_path, capsys):
    config = tmp_path / "two.yaml"
    own = (folder / "two.yaml").read_text().replace("num_seeds: 1\n", "")
    config.write_text(f"{own}{added}\n")
    with pytest.raises(SystemExit) as left:
        recipe.parsed([str(config)])
    assert left.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize("empty", ["", " ", None])
def test_an_empty_label_is_none(empty, tmp_path):
    rows = [{"text": "red", "label": "a"}, {"text": "blue", "label": empty}]
    content = "\n".join(map(json.dumps, rows)).encode()
    with pytest.raises(ValueError, match="has 1 examples without a label, the first is number 2"):
        load(entry(tmp_path, content, "jsonl"), None, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_r": 0}, "lora_r is 0; allowed is an integer of at least 1"),
        ({"lora_alpha": -1.0}, "lora_alpha is -1.0; allowed is a finite number above 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan; allowed"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0; allowed is a number of at least 0 and below"),
        ({"lora_dropout": float("nan")}, "lora_dropout is nan; allowed"),
        ({"lora_target_modules": ["nowhere"]}, "lora_target_modules is ['nowhere']: "),
    ],
)
def test_numbers_of_lora_that_cannot_be_meant(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        with_lora(bert(), LoraArguments(use_peft=True, **settings), "SEQ_CLS")


def entry(folder, content, suffix, **columns):
    (folder / f"x.{suffix}").write_bytes(content)
    file = str(folder / f"x.{suffix}")
    return TextTask.from_entry({"name": "t", "train_file": file, "eval_file": file, **columns}, 1)


def test_a_task_of_one_class(tmp_path):
    tasks = [entry(tmp_path, b"text,label\nred,a\nblue,a\n", "csv")]
    with pytest.raises(ValueError, match="task 't' has the class 'a' alone, so that there is noth"):
        load_all(tasks, DataArguments())
    with pytest.raises(ValueError, match="has the class 'a' alone"):
        load_all(tasks, DataArguments(shared_labels=True))  # of all tasks there is only that one
    found = load_all(2 * tasks, DataArguments(shared_labels=True))
    assert [each.labels for each in found] == [["a"], ["a"]]


def test_words_that_look_like_dates(tmp_path):
    rows = [{"text": "2020-01-01", "label": "2021-02-03"}, {"text": "2020-01-02", "label": "2021"}]
    days = [{**row, "label": f"2021-02-0{k}"} for k, row in enumerate(rows, 1)]
    for content in ("\n".join(map(json.dumps, days)), json.dumps(days), json.dumps(days, indent=1)):
        found = load(entry(tmp_path, content.encode(), "json"), None, None)
        assert found.labels == ["2021-02-01", "2021-02-02"]
        assert list(found.train.column("text")) == ["2020-01-01", "2020-01-02"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"])
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json"])
def test_files_in_other_encodings(encoding, suffix, tmp_path):
    rows = [{"text": "röd häst", "label": "å"}, {"text": "blå häst", "label": "ö"}]
    content = {
        "csv": "text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in rows),
        "jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        "json": json.dumps(rows, ensure_ascii=False),
    }[suffix]
    found = load(entry(tmp_path, content.encode(encoding), suffix), None, None)
    assert found.labels == ["å", "ö"]
    assert list(found.train.column("text")) == ["röd häst", "blå häst"]


def test_a_column_of_texts_may_be_named_labels(tmp_path):
    content = b"labels,kind\nred,a\nblue,b\n"
    task = entry(tmp_path, content, "csv", text="labels", label="kind")
    found = load(task, None, None)
    data = tokenized(found.train, task.columns, {"a": 4, "b": 5}, lambda words: {"words": words})
    assert data[:] == {"labels": [4, 5], "words": ["red", "blue"]}
