"""Which examples are taken, by a seed and nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def choose(
    size: int, num_samples: int | None, seed: int, labels: Sequence[int] | None = None
) -> list[int]:
    """Indices drawn without replacement, in a fixed order; all of them where fewer are there.

    Args:
        size: the number of examples.
        num_samples: how many to draw; None: all.
        labels: if given, each label gets its share of the draw (largest remainders).
    """
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    if num_samples is None or num_samples >= size:
        return sorted(order)
    if labels is None:
        return sorted(order[:num_samples])
    groups: dict[int, list[int]] = {}
    for index in order:
        groups.setdefault(labels[index], []).append(index)
    shares = {label: num_samples * len(group) / size for label, group in groups.items()}
    counts = {label: int(share) for label, share in shares.items()}
    by_remainder = sorted(shares, key=lambda label: counts[label] - shares[label])
    for label in by_remainder[: num_samples - sum(counts.values())]:
        counts[label] += 1
    return sorted(index for label, n in counts.items() for index in groups[label][:n])


def uniforms(seed: int, example: int, draw: int, count: int) -> Tensor:
    """`count` uniform numbers in [0, 1) of one example, whatever its batch or process."""
    digest = hashlib.blake2b(f"{seed} {example} {draw}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return torch.rand(count, generator=generator, dtype=torch.float64)


def labels_of(data: Any, indices: Iterable[int]) -> list[int]:
    """The class of each example, for stratified draws.

    Raises:
        ValueError: examples have no single integer label.
    """
    labels = []
    for index in indices:
        example = data[index]
        value = next(
            (example[name] for name in ("labels", "label", "label_ids") if name in example), None
        )
        if value is None or (isinstance(value, Tensor) and value.numel() != 1):
            raise ValueError(
                "Stratified draws need one class per example in 'labels' or 'label'; example "
                f"{index} holds {', '.join(map(str, example))}. Use stratified=False."
            )
        if isinstance(value, (list, tuple)):
            raise ValueError(
                f"Stratified draws need one class per example; example {index} has a list of "
                f"{len(value)}. Use stratified=False."
            )
        labels.append(int(value))
    return labels
