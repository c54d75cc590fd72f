"""Names of the unwrapped model, selection of parameters, λ by pattern."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from hf_ewc.parameters.names import parameters_by_name, unwrap
from hf_ewc.parameters.selection import layer_lambdas, select_parameters


def bert() -> BertForSequenceClassification:
    sizes = dict(hidden_size=8, num_attention_heads=2, intermediate_size=12, vocab_size=20)
    return BertForSequenceClassification(BertConfig(**sizes, num_hidden_layers=2))


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=20, n_positions=8))


class Wrapped(nn.Module):
    """A model with a part named `module`, which must keep its name."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 3)


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_names_are_those_of_the_plain_model():
    model = bert()
    assert list(parameters_by_name(model)) == [name for name, _ in model.named_parameters()]
    assert parameters_by_name(model)["classifier.bias"] is model.classifier.bias


def test_trainable_only():
    model = bert()
    model.bert.requires_grad_(False)
    assert list(parameters_by_name(model, True)) == ["classifier.weight", "classifier.bias"]


def test_tied_parameters_come_once_under_the_first_name():
    names = parameters_by_name(gpt2())
    assert "transformer.wte.weight" in names
    assert "lm_head.weight" not in names


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_names_pass_through_compile_and_ddp(process_group):
    model = Wrapped()
    names = ["module.weight", "module.bias"]
    ddp = nn.parallel.DistributedDataParallel(model)
    wrappers = [
        torch.compile(model),
        nn.DataParallel(model),
        ddp,
        torch.compile(ddp),
        nn.parallel.DistributedDataParallel(torch.compile(model)),
    ]
    for wrapped in wrappers:
        assert unwrap(wrapped) is model
        assert list(parameters_by_name(wrapped)) == names


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_names_pass_through_regional_compile_and_checkpoint_wrappers():
    from accelerate.utils import compile_regions
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = bert()
    names = list(parameters_by_name(model))
    assert list(parameters_by_name(compile_regions(model))) == names
    model.bert.encoder.layer[0] = torch.compile(model.bert.encoder.layer[0])
    model.bert.encoder.layer[1] = checkpoint_wrapper(model.bert.encoder.layer[1])
    assert any("_orig_mod" in name for name, _ in model.named_parameters())
    assert any("_checkpoint_wrapped_module" in name for name, _ in model.named_parameters())
    assert list(parameters_by_name(model)) == names


def test_unwrap_refuses_what_is_no_module():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got dict"):
        parameters_by_name({})  # type: ignore[arg-type]


def test_selection_of_everything_is_what_is_trainable():
    model = bert()
    model.bert.embeddings.requires_grad_(False)
    names = select_parameters(model)
    assert names == [n for n in parameters_by_name(model) if "embeddings" not in n]


@pytest.mark.parametrize(
    ("target", "exclude", "expected"),
    [
        (["query"], None, lambda n: ".query." in n),
        (["query", "key"], ["layer.0"], lambda n: ".1." in n and (".query" in n or ".key" in n)),
        (["layer.1"], ["bias"], lambda n: ".layer.1." in n and not n.endswith("bias")),
        (r".*layer\.\d+\.attention", None, lambda n: ".attention." in n),
        (r".*\.(query|key)", r".*\.1\..*", lambda n: ".0." in n and (".query" in n or ".key" in n)),
        (["classifier.weight"], None, lambda n: n == "classifier.weight"),
        (None, ["bert"], lambda n: n.startswith("classifier")),
    ],
)  # fmt: skip
def test_selection_follows_peft(target, exclude, expected):
    model = bert()
    names = select_parameters(model, target, exclude)
    assert names == [name for name in parameters_by_name(model) if expected(name)]


@pytest.mark.parametrize("target", [["query", "dense"], r".*\.(query|output\.dense)", "all-linear"])
def test_selection_takes_the_modules_that_peft_adapts(target):
    adapted = get_peft_model(bert(), LoraConfig(target_modules=target, task_type="SEQ_CLS"))
    expected = {
        name.removeprefix("base_model.model.").replace(".base_layer", "")
        for name, _ in adapted.named_parameters()
        if ".base_layer." in name
    }
    assert set(select_parameters(bert(), target)) == expected


def test_all_linear_is_linear_and_conv1d_without_the_output_embedding():
    names = select_parameters(gpt2(), "ALL-linear")
    assert {name.split(".", 3)[3] for name in names} == {
        f"{module}.{kind}"
        for module in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        for kind in ("weight", "bias")
    }


def test_selection_inside_adapters():
    model = get_peft_model(bert(), LoraConfig(target_modules=["query", "value"]))
    names = select_parameters(model, ["query"])
    assert len(names) == 4
    assert all(".query.lora_" in name for name in names)
    assert len(select_parameters(model, "all-linear")) == 8


@pytest.mark.parametrize(
    ("target", "exclude", "message"),
    [
        (["query", "q_proj"], None, "target_modules: the suffix 'q_proj' matches no trainable"),
        ("query", None, "target_modules: the regular expression 'query' matches no trainable"),
        (None, ["nothing"], "exclude_modules: the suffix 'nothing' matches no parameter"),
        ("*query", None, "not a valid regular expression"),
        (["query"], ["bert"], "leave none of the"),
        (["uery"], None, "'uery' matches no"),
    ],
)
def test_selection_refuses_what_matches_nothing(target, exclude, message):
    with pytest.raises(ValueError, match=message):
        select_parameters(bert(), target, exclude)


def test_selection_refuses_a_frozen_target():
    model = bert()
    model.bert.requires_grad_(False)
    with pytest.raises(ValueError, match="'query' matches no trainable parameter"):
        select_parameters(model, ["query"])


NAMES = ["bert.layer.0.query.weight", "bert.layer.0.query.bias", "bert.layer.10.key.weight", "head"]


def test_the_longest_pattern_wins():
    patterns = {"bert": 1.0, "bert.layer.0": 2.0, "query.bias": 3.0, ".*key": 4.0}
    assert list(layer_lambdas(NAMES, patterns, 9.0).values()) == [2.0, 2.0, 4.0, 9.0]
    patterns = {"bert": 1.0, "query.bias": 3.0, r"layer\.\d+\.key": 4.0}
    assert list(layer_lambdas(NAMES, patterns, 9.0).values()) == [1.0, 3.0, 4.0, 9.0]


def test_without_patterns_every_lambda_is_the_default():
    assert set(layer_lambdas(NAMES, None, 5.0).values()) == {5.0}


def test_a_suffix_ends_at_dots():
    assert layer_lambdas(NAMES, {"layer.10": 2.0}, 0.0)[NAMES[2]] == 2.0
    with pytest.raises(ValueError, match=r"'layer\.1' matches none of the 4"):
        layer_lambdas(NAMES, {"layer.1": 1.0}, 0.0)
    with pytest.raises(ValueError, match="not a valid regular expression"):
        layer_lambdas(NAMES, {"(": 1.0}, 0.0)
