"""Data and models in a few letters, by which a run that goes on tells whether they are others."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_ewc.fisher.untouched import preserved_random_states
from hf_ewc.parameters.sharding import local_part
from hf_ewc.training.held_out import has_rows

_EXAMPLES = 64
_LETTERS = 12
# Of a configuration: what training, a head or a tokenizer sets later, or says where it is from.
_LATER = re.compile("problem_type|label|version|name_or_path|dtype|use_cache|token|architectures")


def of_data(dataset: Any) -> str | None:
    """Of a few examples; None of a stream, and where an example is another each time it is read."""
    if not has_rows(dataset) or not len(dataset):
        return None
    places = np.linspace(0, len(dataset) - 1, min(_EXAMPLES, len(dataset))).astype(int).tolist()
    with preserved_random_states():
        once, again = (_of_values([dataset[i] for i in places]) for _ in range(2))
    return once if once == again else None


def of_model(model: nn.Module) -> str:
    """Of its modules as they are printed, and of its adapters' settings."""
    adapters = getattr(model, "peft_config", None) or {}
    settings = {
        name: {k: v for k, v in vars(config).items() if isinstance(v, (bool, int, float, list))}
        for name, config in adapters.items()
    }
    return _of_values([repr(model), settings])


def of_training(model: nn.Module) -> str:
    """Of which parameters are trained, their dtypes, and what the forward is configured to do."""
    config = getattr(model, "config", None)
    written: dict[str, object] = getattr(config, "to_dict", dict)()
    settings = {name: value for name, value in written.items() if not _LATER.search(name)}
    parameters = {n: [str(p.dtype), p.requires_grad] for n, p in model.named_parameters()}
    return _of_values([json.dumps(settings, sort_keys=True, default=str), parameters])


def of_weights(model: nn.Module) -> str:
    """Of a few numbers of each parameter, as a process has them."""
    parts = [local_part(p).detach().reshape(-1) for p in model.parameters()]
    return _of_values([part[:: max(1, len(part) // _EXAMPLES)] for part in parts])


def _of_values(values: Any) -> str:
    digest = hashlib.sha256()
    _add(digest, values)
    return digest.hexdigest()[:_LETTERS]


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        for name in sorted(value, key=str):
            digest.update(f"{name}:".encode())
            _add(digest, value[name])
    elif isinstance(value, (list, tuple)):
        digest.update(b"[")
        for item in value:
            _add(digest, item)
        digest.update(b"]")
    elif isinstance(value, Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        if value.layout == torch.strided and not value.is_meta:
            flat = value.detach().cpu().reshape(-1).contiguous()
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray) and value.dtype != object:
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(value.tobytes())
    elif isinstance(value, np.ndarray):
        _add(digest, value.tolist())
    elif isinstance(value, (str, bytes, int, float, bool, type(None), np.generic)):
        digest.update(repr(value).encode())
    elif callable(getattr(value, "tobytes", None)):  # an image
        digest.update(value.tobytes())
    else:
        digest.update(type(value).__qualname__.encode())
