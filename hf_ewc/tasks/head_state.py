"""The EWC state of a backbone, and of each head over it."""

from __future__ import annotations

from collections.abc import Collection

from hf_ewc.state.ewc_state import EWCState


def split(state: EWCState, head: Collection[str]) -> tuple[EWCState, EWCState]:
    """The state without the parameters of the head, and of them alone.

    With `joined`, Σ over all = Σ over the backbone + Σ over the head: the quadratic has no terms
    between parameters.
    """
    inside = [name for name in state.importance if name in set(head)]
    outside = [name for name in state.importance if name not in set(head)]
    return (
        state.without(inside) if inside else state,
        state.without(outside) if outside else state,
    )


def joined(backbone: EWCState, head: EWCState | None) -> EWCState:
    """One state of both, with the records of the backbone's if there is any of it."""
    if not head or not backbone:
        return head or backbone
    return EWCState(
        {**dict(backbone.importance.items()), **dict(head.importance.items())},
        {**dict(backbone.anchor.items()), **dict(head.anchor.items())},
        {**backbone.offsets, **head.offsets},
        backbone.tasks,
        backbone.metadata,
    )
