"""The recipe of language models: in one and two processes, its texts, and what it refuses."""

import json
import re
import sys

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_ewc import EWCConfig
from hf_ewc.report import read_outcomes
from tests.processes import ROOT
from tests.recipe import run_recipe

sys.path.insert(0, str(ROOT / "recipes"))
import sequential_causal_lm as recipe
from text_domains import Domain, DomainArguments, domains_of, examples_of

NAME = "sequential_causal_lm"
WORDS = ["<pad>", "<eos>", "<unk>", "user", "assistant", "red", "blue", "cat", "dog", "a"]
TEMPLATE = "{% for m in messages %}{{ m.role + ' ' + m.content + ' <eos> ' }}{% endfor %}"


def made_tokenizer(chat_template=TEMPLATE):
    inner = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=chat_template, **special)


TOKENIZER = made_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with its tokenizer, texts and chats of two domains, and a YAML file for each."""
    folder = tmp_path_factory.mktemp("lm")
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), **sizes)).save_pretrained(folder / "model")
    TOKENIZER.save_pretrained(folder / "model")
    for name, word in (("a", "red"), ("b", "cat"), ("general", "a")):
        chat = [{"role": "user", "content": f"{word} {word}"},
                {"role": "assistant", "content": word}]  # fmt: skip
        for part, number in (("train", 8), ("eval", 4)):
            (folder / f"{name}_{part}.txt").write_text(f"{word} a\n" * 4 * number)
            lines = json.dumps({"messages": chat}) + "\n"
            (folder / f"{name}_{part}.jsonl").write_text(lines * number)

    def write(file, ending, more):
        entries = [
            f"  - {{name: {n}, train_file: {folder}/{n}_train.{ending}, "
            f"eval_file: {folder}/{n}_eval.{ending}}}"
            for n in "ab"
        ]
        head = [f"model_name_or_path: {folder}/model", "max_steps: 2", "block_size: 8"]
        (folder / file).write_text("\n".join([*head, "num_seeds: 1", "tasks:", *entries, more]))

    also = f"evaluate_also: [{{name: general, eval_file: {folder}/general_eval.txt}}]"
    write("texts.yaml", "txt", f"""
protect: {{name: general, train_file: {folder}/general_train.txt}}
{also}
methods: {{plain: {{}}, EWC: {{fisher_samples: 4}}, tasks: {{fisher_samples: 4, protect: false}}}}
""")  # fmt: skip
    write("chats.yaml", "jsonl", "text: messages\npacking: true\nfisher_samples: 4\n")
    return folder


def test_pretraining_protected_in_two_processes(folder, tmp_path):
    options = ["--output_dir", tmp_path, "--eval_strategy", "epoch", "--fisher_data", "held_out"]
    code, output = run_recipe(NAME, folder / "texts.yaml", *options, processes=2)
    assert code == 0, output[-6000:]
    runs, _ = read_outcomes(tmp_path / "results.json")
    assert [*runs] == ["plain", "EWC", "tasks"]
    for repeats in runs.values():
        matrix = repeats[42].matrix
        assert matrix.num_learnt == 2
        assert len(matrix.others["general"]) == 3  # before the first task and after each
    states = {
        name: json.loads((tmp_path / name / "seed-42/02-b/final/ewc_state.json").read_text())
        for name in ("EWC", "tasks")
    }
    learnt = {name: [task["name"] for task in state["tasks"]] for name, state in states.items()}
    assert learnt == {"EWC": ["general", "a", "b"], "tasks": ["a", "b"]}
    assert states["EWC"]["tasks"][0]["num_examples"] == 4  # as the method says
    assert output.count("Written to") == 1
    assert "| general ↓ |" in output


def test_the_pretraining_is_known_by_each_methods_own_settings():
    asked, ewc = [], EWCConfig(fisher_samples=7, ewc_lambda="auto", fisher_data="held_out")

    def known(config):
        asked.append(config)
        return f"state {len(asked)}"

    methods = {
        "plain": {"max_steps": 3},
        "a": {"ewc_config": ewc, "ewc_lambda": 3.0},
        "b": {"ewc_config": ewc, "ewc_exclude_modules": ["lm_head"], "protect": True},
        "c": {"ewc_config": ewc, "ewc_lambda": 4.0},
        "d": {"ewc_config": ewc, "protect": False},
    }
    found = recipe.with_pretraining(methods, known)
    assert {name: own.get("ewc_state") for name, own in found.items()} == {
        "plain": None, "a": "state 1", "b": "state 2", "c": "state 1", "d": None,
    }  # fmt: skip
    assert not any("protect" in own for own in found.values())
    assert [c.ewc_exclude_modules for c in asked] == [None, ["lm_head"]]
    assert {(c.fisher_samples, c.fisher_data, c.ewc_lambda) for c in asked} == {(7, "train", 1.0)}
    without = recipe.with_pretraining(methods, None)
    assert not any("ewc_state" in own or "protect" in own for own in without.values())


@pytest.mark.filterwarnings("ignore")
def test_chats_packed_with_lora(folder, tmp_path):
    options = ["--use_peft", "--ewc_space", "weight", "--replay_share", "0.5"]
    command = [NAME, folder / "chats.yaml", *options, "--output_dir", tmp_path]
    code, output = run_recipe(*command)
    assert code == 0, output[-6000:]
    runs, content = read_outcomes(tmp_path / "results.json")
    assert runs["EWC"][42].matrix.num_learnt == 2
    assert content["settings"]["trainer"] == "EWCSFTTrainer"
    assert [task["metric"] for task in content["settings"]["tasks"]] == ["perplexity"] * 2
    assert (tmp_path / "02-b/final/tokenizer.json").exists()
    # Eight chats of seven tokens are seven examples of eight.
    state = json.loads((tmp_path / "02-b/final/ewc_state.json").read_text())
    assert state["tasks"][0]["num_examples"] == 4


def test_packing_without_trl(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ValueError, match="packing is done by TRL, which is missing"):
        recipe.packing_trainer()


# ---- Texts ----


def domain(path, text="text"):
    entry = {"name": "t", "train_file": str(path), "text": text}
    return Domain.from_entry(entry, "task 1", DomainArguments(), ("train",))


def ids(words):
    return [WORDS.index(word) for word in words.split()]


def test_texts_are_joined_and_cut(tmp_path):
    (tmp_path / "x.csv").write_text("text\nred red red\nblue\ncat\n")
    found = examples_of(domain(tmp_path / "x.csv"), "train", TOKENIZER, 3, None)
    assert found["input_ids"][:] == [
        ids("red red red"), ids("<eos> blue <eos>"), ids("cat <eos>")
    ]  # fmt: skip
    assert found["labels"][:] == found["input_ids"][:]
    assert len(examples_of(domain(tmp_path / "x.csv"), "train", TOKENIZER, 3, 2)) == 2


def test_a_text_file_is_one_text(tmp_path):
    (tmp_path / "x.txt").write_text("red\n\nblue cat\n")
    found = examples_of(domain(tmp_path / "x.txt"), "train", TOKENIZER, 9, None)
    assert found["input_ids"][:] == [ids("red blue cat <eos>")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", " \n\n\t\n", "x.txt has no text."),
        ("x.jsonl", '{"text": " "}\n', "x.jsonl has no text in column 'text'."),
    ],
)
def test_blank_texts_are_no_examples(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        examples_of(domain(tmp_path / name), "train", TOKENIZER, 9, None)


def test_general_texts_are_read_before_the_model(folder, tmp_path, capsys, monkeypatch):
    config = tmp_path / "texts.yaml"
    lines = (folder / "texts.yaml").read_text().replace("general_train", "nowhere")
    config.write_text(lines)
    monkeypatch.setattr(sys, "argv", ["recipe", str(config), "--output_dir", str(tmp_path / "x")])
    monkeypatch.setattr(recipe.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: 1 / 0)
    with pytest.raises(SystemExit):
        recipe.main()
    assert "nowhere.txt does not exist" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_chat_is_an_example(tmp_path):
    chat = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue"}]
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    whole = ids("user red <eos> assistant blue <eos>")
    for size, is_whole, expected in ((9, False, whole), (4, False, whole[:4]), (4, True, whole)):
        found = examples_of(
            domain(tmp_path / "x.jsonl", "messages"), "train", TOKENIZER, size, None, is_whole
        )
        assert found["input_ids"][:] == [expected]


def test_a_chat_as_json_in_a_text(tmp_path):
    chat = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue"}]
    rows = [json.dumps(chat), "[red cat] [", "[" * 100_000]
    (tmp_path / "x.csv").write_text(
        "text\n" + "".join('"' + row.replace('"', '""') + '"\n' for row in rows[:2])
    )
    found = examples_of(domain(tmp_path / "x.csv"), "train", TOKENIZER, 20, None)["input_ids"][:]
    assert found == [ids("user red <eos> assistant blue <eos>"), ids("<unk> <unk> <unk> <eos>")]
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": rows[2]}) + "\n")
    deep = examples_of(domain(tmp_path / "x.jsonl"), "train", TOKENIZER, 20, None)
    assert deep["input_ids"][:] == [ids("<unk> <eos>")]


CALLING = (
    "{% for tool in tools or [] %}{{ tool.function.keys() | join(' ') + ' ' }}{% endfor %}"
    "{% for m in messages %}{{ m.role + ' ' + (m.content or m.keys() | join(' ')) + ' ' }}"
    "{% endfor %}"
)


@pytest.mark.parametrize("as_text", [False, True])
def test_a_chat_with_tools(as_text, tmp_path):
    """As they were written: neither left out nor with what other rows of the table have."""
    asked = {"role": "user", "content": "red"}
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "cat", "arguments": "a"}}]}
    tools = [
        [{"type": "function", "function": {"red": "x", "blue": "y"}}],
        [{"type": "function", "function": {"dog": "z"}}],
        None,
    ]
    (tmp_path / "x.jsonl").write_text(
        "".join(
            json.dumps({"text": [asked, call], "tools": json.dumps(own) if as_text else own}) + "\n"
            for own in tools
        )
    )
    tokenizer = made_tokenizer(CALLING)
    found = examples_of(domain(tmp_path / "x.jsonl"), "train", tokenizer, 20, None)
    written = ids("user red assistant <unk> <unk>")  # role, tool_calls; no content of the table
    heads = [ids("red blue"), ids("dog"), []]
    assert found["input_ids"][:] == [[*head, *written] for head in heads]


# ---- What is refused, in one line ----


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", "body\nred\n", "x.csv has no column 'text'; it has body."),
        ("x.csv", "text\n5\n", "x.csv has 5 in column 'text' of example 1; needed is text, or a"),
        ("x.csv", "", "x.csv is empty."),
        ("x.csv", "text\n", "x.csv has no examples."),
        ("x.txt", " \n", "x.txt has no text."),
        ("x.doc", "red", "x.doc is none of"),
        ("x.jsonl", '{"text": [{"role": "user"}]}\n', "needed is text, or a list of messages"),
    ],
)
def test_texts_that_cannot_be_learnt_from(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError) as refused:
        examples_of(domain(tmp_path / name), "train", TOKENIZER, 8, None)
    assert message in str(refused.value)


def test_chats_without_a_template(tmp_path):
    chat = json.dumps({"text": [{"role": "user", "content": "red"}]})
    (tmp_path / "x.jsonl").write_text(chat + "\n")
    with pytest.raises(ValueError, match="example 1 is a chat, and the model's tokenizer"):
        examples_of(domain(tmp_path / "x.jsonl"), "train", made_tokenizer(None), 8, None)


REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('no systems') }}{% endif %}"


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"role": "system", "content": "red"}, "no systems"),
        ({"role": "user", "content": None}, "'content': None"),
        ({"role": "user", "content": [{"type": "text", "text": "red"}]}, "list"),
    ],
)
def test_chats_that_the_template_cannot_write(turn, reason, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"text": [turn]}))
    with pytest.raises(ValueError) as refused:
        examples_of(
            domain(tmp_path / "x.json"), "train", made_tokenizer(REFUSING + TEMPLATE), 8, None
        )
    assert "x.json, example 1 is a chat that the template of" in str(refused.value)
    assert reason in str(refused.value)


def test_a_tokenizer_without_an_end_of_text(tmp_path):
    tokenizer = made_tokenizer()
    tokenizer.eos_token = None
    (tmp_path / "x.csv").write_text("text\nred blue\ncat dog a\n")
    found = examples_of(domain(tmp_path / "x.csv"), "train", tokenizer, 3, None)
    assert [tokenizer.decode(ids) for ids in found["input_ids"]] == ["red blue cat", "dog a"]


def test_a_tokenizer_that_cannot_pad(folder, tmp_path):
    bare = made_tokenizer()
    bare.eos_token = bare.pad_token = None
    LlamaForCausalLM.from_pretrained(folder / "model").save_pretrained(tmp_path / "model")
    bare.save_pretrained(tmp_path / "model")
    code, output = run_recipe(
        NAME, folder / "texts.yaml", "--output_dir", tmp_path / "runs",
        "--model_name_or_path", tmp_path / "model",
    )  # fmt: skip
    assert code == 2
    assert "has neither a pad_token nor an eos_token" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "tasks are missing"),
        ({"tasks": ["a.txt"]}, "task 1 is 'a.txt'"),
        ({"tasks": [{"name": "a", "train_file": "x"}]}, "task 1 needs either train_file and eval"),
        (
            {"tasks": [{"name": "a", "eval_file": "x", "dataset_name": "y"}]},
            "task 1 needs either train_file and eval",
        ),
        ({"evaluate_also": {"name": "x"}}, "evaluate_also is {'name': 'x'}; needed is a list."),
        ({"evaluate_also": [{"name": "x"}]}, "evaluate_also 1 needs either eval_file, or dataset"),
        (
            {"protect": {"train_fiel": "x"}},
            "protect has the unknown key 'train_fiel'; did",
        ),
        ({"protect": {"name": "x"}}, "protect needs either train_file, or dataset_name."),
    ],
)
def test_entries_that_are_no_domains(given, message):
    tasks = [{"name": "a", "train_file": "x", "eval_file": "y"}]
    with pytest.raises(ValueError) as refused:
        domains_of(DomainArguments(**({"tasks": tasks} | given if given else {})))
    assert message in str(refused.value)


def test_what_is_protected_stands_outside_of_the_methods(folder, tmp_path, capsys):
    lines = (folder / "texts.yaml").read_text().replace("protect: false", "protect: 'no'")
    (tmp_path / "texts.yaml").write_text(lines)
    with pytest.raises(SystemExit):
        recipe.parsed([str(tmp_path / "texts.yaml")])
    assert "method 'tasks' has protect: 'no'; needed is true or false." in capsys.readouterr().err


def test_a_new_adapter_that_knows_nothing_of_the_pretraining(folder, capsys):
    with pytest.raises(SystemExit):
        recipe.parsed([str(folder / "texts.yaml"), "--use_peft"])
    assert "protect with use_peft needs ewc_space: weight" in capsys.readouterr().err
