"""Other labels in place of a batch's own, of the same kind, to see what a loss makes of them."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_ewc.fisher.labels import IGNORED, are_there
from hf_ewc.fisher.likelihood.slices import slices
from hf_ewc.precision import widened, widest

# A class counts as possible above this probability; that of a masked class is 0.
_POSSIBLE = 1e-6
# With more classes than this, labels of a sequence are those that the batch has, before this turn.
_FEW, _TURN_OF_ALL = 64, 2
# How often labels are drawn again that would tell nothing.
_TRIES = 20
# The share of a sequence's labels that is taken out.
_HOLES = 0.2
# How far numbers are drawn, in their own spreads, and in this turn: a loss that is linear for large
# errors, such as Huber's, is quadratic near the labels.
_NEAR, _FAR, _TURN_OF_FAR = 1.0, 20.0, 1


def made_up(labels: Tensor, classes: Tensor | None, turn: int, *, holes: bool) -> Tensor:
    """Labels of the same shape, dtype and kind, drawn by `turn`.

    Args:
        classes: what integer labels may be; None: what they are, or the values next to it. A loss
            over some of them, beside a softmax over all, differs by a term without labels: it is
            the other classes that tell the two apart.
        holes: take out some labels of a sequence, as −100.
    """
    generator = torch.Generator().manual_seed(turn)
    own = labels.detach().cpu()
    classes = None if classes is None else classes.cpu()
    if classes is not None and own.dim() > 1 and len(classes) > _FEW and turn < _TURN_OF_ALL:
        classes = several if len(several := _classes_in(own)) > 1 else classes
    reach = _FAR if turn == _TURN_OF_FAR else _NEAR
    drawn = _drawn(own, classes, generator, reach)
    for _ in range(_TRIES):
        if _tells(drawn, own):
            break
        drawn = _drawn(own, classes, generator, reach)
    if holes and own.dim() > 1 and not own.is_floating_point():
        out = torch.rand(own.shape, generator=generator) < _HOLES
        drawn = drawn.masked_fill(out, IGNORED)
    return drawn.to(labels.device)


def _drawn(own: Tensor, classes: Tensor | None, generator: torch.Generator, reach: float) -> Tensor:
    if own.is_floating_point():
        return _like_floats(own, generator, reach)
    if classes is None and sums_to_one(own):
        return _like_floats(own.float(), generator, reach).to(own.dtype)
    return _like_integers(own, classes, generator)


def _tells(drawn: Tensor, own: Tensor) -> bool:
    """Whether labels are others than the batch's own, and not all of one value.

    A mean that is weighted by class is no other than a plain one where there is one class.
    """
    values = drawn[are_there(drawn) & (drawn >= 0)]
    return not torch.equal(drawn, own) and (values.numel() < 2 or len(values.unique()) > 1)


def possible_classes(logits: Tensor, axis: int) -> Tensor | None:
    """The classes that have a probability somewhere, along `axis` of the logits, if any has."""
    flat = logits.detach().movedim(axis, -1).flatten(0, -2)
    largest = torch.zeros(flat.shape[-1], dtype=widest(flat.device), device=flat.device)
    for (part,) in slices(flat):
        p = widened(part).softmax(-1).reshape(-1, flat.shape[-1])
        largest = torch.maximum(largest, p.amax(0))
    found = (largest > _POSSIBLE).nonzero().flatten()
    return found if len(found) else None


def filled(labels: Tensor) -> Tensor:
    """Without missing labels: 0 in their place, since not every loss knows of them."""
    return labels.masked_fill(~are_there(labels), 0)


def _like_integers(labels: Tensor, classes: Tensor | None, generator: torch.Generator) -> Tensor:
    there = (labels != IGNORED) & (labels >= 0)
    if classes is not None:
        there = there & (labels <= int(classes.max()))
    else:
        own = _classes_in(labels)
        classes = own if len(own) != 1 else torch.cat([own, (own - 1).abs()])
    count = int(there.sum())
    drawn = labels.clone()
    if count:
        chosen = classes[torch.randint(len(classes), (count,), generator=generator)]
        drawn[there] = chosen.to(labels.dtype)
    return drawn


def _classes_in(labels: Tensor) -> Tensor:
    """The classes that are among the labels, in order."""
    found: Tensor = labels[(labels != IGNORED) & (labels >= 0)].unique()
    return found


def _like_floats(labels: Tensor, generator: torch.Generator, reach: float) -> Tensor:
    """Yes or no, one of several, shares of one, shares, or numbers, whichever the labels are."""
    labels = filled(labels)
    draws = torch.rand(labels.shape, generator=generator, dtype=labels.dtype)
    binary = bool(((labels == 0) | (labels == 1)).all())
    if sums_to_one(labels):
        shares = (4 * draws).softmax(-1)
        one = torch.nn.functional.one_hot(draws.argmax(-1), labels.shape[-1])
        return one.to(labels.dtype) if binary else shares
    if binary:
        return (draws < 0.5).to(labels.dtype)
    if bool(((labels >= 0) & (labels <= 1)).all()):
        return draws
    spread = float(labels.std()) if labels.numel() > 1 else 0.0
    return labels.mean() + (draws - 0.5) * 2 * reach * (spread or 1.0)


def sums_to_one(values: Tensor) -> bool:
    """Whether the last axis holds probabilities."""
    if values.dim() < 2 or values.shape[-1] < 2 or not values.numel():
        return False
    sums = widened(values.detach()).sum(-1)
    return bool((values >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3)
