"""What a LoRA or other PEFT adapter stands on: its kind, and samples of the frozen weights below.

The parameters of an adapter mean something only together with the base model that they were
trained on. Merging them into the base and wrapping it anew gives the same names and shapes with
another meaning; names and shapes alone cannot tell, the base weights can.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from hf_ewc.parameters.names import class_name, parameters_by_name, unwrap
from hf_ewc.state import heads, tied
from hf_ewc.state.records import is_list_of
from hf_ewc.state.sampling import hashes, is_away


def of_model(model: nn.Module, names: Collection[str]) -> dict[str, Any]:
    """The fingerprint of `model` for a state that holds the parameters `names`.

    Returns:
        "model": the class, for people to read; "head": see `heads.of_model`; "tied": where there
        are any, the further names of parameters (see `tied.of_model`). For a model with PEFT
        adapters also "adapters": the PEFT type by adapter name, with the factors that a LoRA is
        scaled by; "free": further parameters that are trained and not part of the base; "base":
        hashes of the base, None where its values are not all in this process (FSDP2, ZeRO-3).
    """
    found: dict[str, Any] = {"model": class_name(model)}
    head = heads.of_model(model, names)
    if head is not None:
        found["head"] = head
    if further := tied.of_model(model, names):
        found["tied"] = further
    present = adapters(model)
    if present:
        parameters = parameters_by_name(model)
        found["adapters"] = {
            adapter: kind
            for adapter, kind in present.items()
            if any(adapter in name.split(".") for name in names)
        }
        trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
        base = set(_base(model, parameters))
        found["free"] = sorted(base & (trained | set(names)))
        found["base"] = _samples(_base(model, parameters, found["free"]))
    return found


def mismatches(recorded: Mapping[str, Any], model: nn.Module) -> list[str]:
    """How `model` differs from the model whose fingerprint was recorded, one phrase each."""
    wanted: Mapping[str, str] = recorded.get("adapters") or {}
    if not wanted:
        return []
    present = adapters(model)
    problems = [
        f"adapter {name!r}: {kind} at consolidation, {present.get(name, 'not there')} now"
        for name, kind in wanted.items()
        if present.get(name) != kind
    ]
    if problems or recorded.get("base") is None:
        return problems
    now = _base(model, parameters_by_name(model), recorded.get("free") or ())
    if any(is_away(parameter) for parameter in now.values()):
        return problems
    if not all(_is_same(sample, now.get(name)) for name, sample in recorded["base"].items()):
        problems.append(
            "the weights under the adapter are not those of the consolidation: the adapter was "
            "merged and the model wrapped anew, or it stands on another base model. Go on with the "
            "same base and adapter, or begin a new state."
        )
    return problems


def refuse_malformed(found: Any) -> None:
    """Refuse what `of_model` does not return: a `ValueError` that names the entry."""
    if found is None:
        return
    kinds: dict[str, Callable[[Any], bool]] = {
        "model": lambda value: isinstance(value, str),
        "head": heads.is_recorded,
        "tied": _are_words,
        "adapters": _are_words,
        "free": is_list_of(str),
        "base": lambda value: (
            value is None or (isinstance(value, Mapping) and all(map(_is_sample, value.values())))
        ),
    }
    if not isinstance(found, Mapping):
        raise ValueError(f"metadata['fingerprint'] is {found!r:.80}; it is an object.")
    for name, is_right in kinds.items():
        if name in found and not is_right(found[name]):
            raise ValueError(
                f"metadata['fingerprint'][{name!r}] is {found[name]!r:.80}, which no model has; "
                "use another copy of the state."
            )


def _are_words(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(word, str) for word in value.values())


def _is_sample(value: Any) -> bool:
    if not isinstance(value, Mapping) or not value.keys() >= {"shape", "hashes"}:
        return False
    return is_list_of(int)(value["shape"]) and is_list_of(str)(value["hashes"])


def _samples(base: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Shape and hashes of each parameter; None where values are not in this process."""
    if any(is_away(parameter) for parameter in base.values()):
        return None
    return {
        name: {"shape": list(parameter.shape), "hashes": _short(parameter)}
        for name, parameter in base.items()
    }


def _is_same(sample: Mapping[str, Any], parameter: Tensor | None) -> bool:
    """Whether a parameter is the one that was sampled; it may have got more rows since.

    As an embedding has that was resized under an adapter, which means the same as before.
    """
    if parameter is None or list(parameter.shape[1:]) != sample["shape"][1:]:
        return False
    if parameter.ndim and parameter.shape[0] < sample["shape"][0]:
        return False
    known = parameter[: sample["shape"][0]] if parameter.ndim else parameter
    return bool(set(_short(known)) & set(sample["hashes"]))


def _short(parameter: Tensor) -> list[str]:
    return [digest[:16] for digest in hashes({"": parameter}) or ()]


def adapters(model: nn.Module) -> dict[str, str]:
    """PEFT type by adapter name, for PEFT's own wrapper and for `model.add_adapter`."""
    inner = unwrap(model)
    configs = getattr(inner, "peft_config", None)
    if not isinstance(configs, Mapping):
        return {}
    kinds = {name: getattr(config, "peft_type", None) for name, config in configs.items()}
    return {name: _described(inner, name, kind) for name, kind in kinds.items()}


def _described(model: nn.Module, adapter: str, kind: object) -> str:
    scalings = {
        float(layer.scaling[adapter])
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer)
        and isinstance(getattr(layer, "scaling", None), Mapping)
        and adapter in layer.scaling
    }
    name = str(getattr(kind, "value", kind))
    return f"{name} scaled by {', '.join(f'{s:g}' for s in sorted(scalings))}" if scalings else name


def _base(
    model: nn.Module, parameters: Mapping[str, Tensor], free: Collection[str] = ()
) -> dict[str, Tensor]:
    """The parameters that belong to no adapter."""
    owned = {"modules_to_save", "prompt_encoder"}
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            owned.update(layer.adapter_layer_names)
    return {
        name: parameter
        for name, parameter in parameters.items()
        if name not in free and owned.isdisjoint(name.split("."))
    }
