"""The weights that a model with adapters has, against what PEFT merges into the base."""

import copy
import warnings

import fisher_oracle
import pytest
import torch
from models import Examples, bert, gpt2, llama, vit
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PromptTuningConfig,
    RandLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from torch import nn

from hf_ewc import estimate_fisher
from hf_ewc.parameters.adapted_weight import AdaptedWeight
from hf_ewc.parameters.adapters import weights_by_name
from hf_ewc.parameters.weight_gradients import gradients_of_weights


def randomized(model):
    """Adapters begin with B = 0, where W is W₀; these do not."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "hada_" in name or "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def adapted(make, **settings):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT sets fan_in_fan_out itself, and says so
        return randomized(get_peft_model(make(), LoraConfig(r=2, **settings)))


MODELS = {
    "llama": (llama, dict(target_modules=["q_proj", "down_proj"])),
    "llama, rank-stabilized": (llama, dict(target_modules=["q_proj"], use_rslora=True)),
    "llama, DoRA": (llama, dict(target_modules=["q_proj", "up_proj"], use_dora=True)),
    "gpt2": (gpt2, dict(target_modules=["c_attn", "c_proj"])),
    "gpt2, DoRA": (gpt2, dict(target_modules=["c_attn"], use_dora=True)),
    "bert, embeddings and head": (
        bert,
        dict(target_modules=["query", "word_embeddings"], modules_to_save=["classifier"]),
    ),
    "bert, DoRA of embeddings": (bert, dict(target_modules=["word_embeddings"], use_dora=True)),
    "bert, trained biases": (bert, dict(target_modules=["query"], bias="all")),
    "vit": (vit, dict(target_modules="all-linear")),
    "vit, convolution": (vit, dict(target_modules=["projection"])),
    "vit, DoRA of a convolution": (vit, dict(target_modules=["projection"], use_dora=True)),
}


def merged(model):
    """The model without adapters, as PEFT makes it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return copy.deepcopy(model).merge_and_unload()


def current(weight):
    return weight.current() if isinstance(weight, AdaptedWeight) else weight


@pytest.mark.parametrize("name", MODELS)
def test_names_and_values_are_those_of_the_merged_model(name):
    make, settings = MODELS[name]
    model = adapted(make, **settings)
    weights = weights_by_name(model)
    expected = dict(merged(model).named_parameters())
    assert weights.keys() == expected.keys()
    assert any(isinstance(weight, AdaptedWeight) for weight in weights.values())
    for key, value in expected.items():
        torch.testing.assert_close(current(weights[key]).detach(), value.detach(), msg=key)


def stirred(config, make=llama):
    """With an adapter whose every parameter is another than at its beginning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(make(), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


ADDED = {
    "LoHa": LoHaConfig(r=2, target_modules=["q_proj"]),
    "LoKr": LoKrConfig(r=2, target_modules=["q_proj", "up_proj"]),
    "AdaLoRA": AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["up_proj"]),
    "VeRA": VeraConfig(r=2, target_modules=["up_proj"]),
    "VB-LoRA": VBLoRAConfig(r=2, num_vectors=8, vector_length=4, target_modules=["up_proj"]),
    "RandLoRA": RandLoraConfig(r=2, target_modules=["q_proj"]),
    "FourierFT": FourierFTConfig(n_frequency=10, target_modules=["up_proj"]),
}


@pytest.mark.parametrize("kind", ADDED)
def test_another_kind_of_adapter_that_changes_the_weight(kind):
    model = stirred(ADDED[kind])
    expected = dict(merged(model).named_parameters())
    for key, weight in weights_by_name(model).items():
        torch.testing.assert_close(current(weight).detach(), expected[key].detach(), msg=key)


def test_two_active_adapters_add_up():
    model = adapted(llama, target_modules=["q_proj"])
    model.add_adapter("other", LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"]))
    model.base_model.set_adapter(["default", "other"])
    randomized(model)
    expected = dict(merged(model).named_parameters())
    for key, weight in weights_by_name(model).items():
        torch.testing.assert_close(current(weight).detach(), expected[key].detach(), msg=key)


def test_merged_and_disabled_adapters_change_nothing_more():
    model = adapted(llama, target_modules=["q_proj"])
    name = "model.layers.0.self_attn.q_proj.weight"
    value = weights_by_name(model)[name].current().detach()
    with model.disable_adapter():
        assert weights_by_name(model)[name] is not None
        assert isinstance(weights_by_name(model)[name], nn.Parameter)
    model.merge_adapter()
    there = weights_by_name(model)[name]
    assert isinstance(there, nn.Parameter)
    torch.testing.assert_close(there.detach(), value)


def test_an_adapter_that_transformers_put_in():
    model = llama()
    names = [name for name, _ in model.named_parameters()]
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    weights = weights_by_name(model)
    assert list(weights) == names
    assert isinstance(weights["model.layers.1.self_attn.q_proj.weight"], AdaptedWeight)


def test_a_model_without_adapters_is_its_parameters():
    model = bert()
    assert {k: id(v) for k, v in weights_by_name(model).items()} == {
        k: id(v) for k, v in model.named_parameters()
    }


def grouped_convolution():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT cannot merge it, and says so
        model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
        return get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))


REFUSED = {
    "IA3": lambda: get_peft_model(
        llama(), IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    ),
    "bias": lambda: get_peft_model(
        bert(), LoraConfig(r=2, target_modules=["query"], lora_bias=True)
    ),
    "OFT, which turns": lambda: stirred(
        OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj"])
    ),
    "HRA, which reflects": lambda: stirred(HRAConfig(r=2, target_modules=["q_proj"])),
    "BOFT": lambda: stirred(BOFTConfig(boft_block_size=4, target_modules=["q_proj"])),
    "FourierFT of a transposed weight": lambda: stirred(
        FourierFTConfig(n_frequency=10, target_modules=["c_proj"]), gpt2
    ),
    "prompts": lambda: get_peft_model(
        llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    ),
    "convolution in groups": grouped_convolution,
    "single tokens": lambda: get_peft_model(
        llama(), LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2])
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_change_of_a_weight_is_refused(name):
    with pytest.raises(ValueError, match="ewc_space='adapter'"):
        weights_by_name(REFUSED[name]())


def test_an_adapter_on_one_use_of_a_tied_weight_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns, too
        model = get_peft_model(gpt2(), LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="ties"):
        weights_by_name(model)


TIED = {
    "the first place, gpt2": (gpt2, dict(target_modules=["wte"])),
    "the second place, gpt2": (gpt2, dict(target_modules=["lm_head"])),
    "the first place, llama": (lambda: tied(llama()), dict(target_modules=["embed_tokens"])),
    "both, each by itself": (gpt2, dict(target_modules=["wte", "lm_head"])),
}


def tied(model):
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.get_input_embeddings().weight
    return model


@pytest.mark.parametrize("name", TIED)
def test_an_adapter_on_a_tied_weight_is_refused_wherever_it_is(name):
    """W₀ + s B A in one place is no weight of the model without an adapter."""
    make, config = TIED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns, too
        model = get_peft_model(make(), LoraConfig(r=2, **config))
    with pytest.raises(ValueError, match="ties"):
        weights_by_name(model)


# ---- The Fisher of the weights ----


def rows(kind, count=3):
    batch = [Examples(kind, count)[i] for i in range(count)]
    return {key: torch.stack([row[key] for row in batch]) for key in batch[0]}


FISHER_MODELS = {
    "llama": (llama, "llama", dict(target_modules=["q_proj", "down_proj"])),
    "llama, DoRA": (llama, "llama", dict(target_modules=["q_proj"], use_dora=True)),
    "gpt2": (gpt2, "gpt2", dict(target_modules=["c_attn"])),
    "bert": (bert, "bert", dict(target_modules=["query", "word_embeddings"])),
    "vit": (vit, "vit", dict(target_modules=["q_proj", "projection"])),
}


@pytest.mark.parametrize("name", FISHER_MODELS)
def test_the_fisher_is_that_of_the_merged_model(name):
    make, kind, settings = FISHER_MODELS[name]
    model = adapted(make, **settings)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    frozen = {key: p.requires_grad for key, p in model.named_parameters()}
    weights = {k: w for k, w in weights_by_name(model).items() if isinstance(w, AdaptedWeight)}
    with gradients_of_weights(weights) as own:
        inner = {id(parameter): key for key, parameter in own.items()}
        names = {n: inner[id(p)] for n, p in model.named_parameters() if id(p) in inner}
        fisher = estimate_fisher(
            model, [rows(kind)], fisher_type="empirical", parameters=list(names), fallback="error"
        )
    whole = merged(model).requires_grad_(False)
    for key, parameter in whole.named_parameters():
        parameter.requires_grad_(key in weights)
    expected = fisher_oracle.empirical(whole, rows(kind), shift=kind in ("llama", "gpt2"))
    found = {names[key]: value for key, value in fisher.diagonal.items()}
    fisher_oracle.assert_close(found, expected)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert frozen == {key: p.requires_grad for key, p in model.named_parameters()}
