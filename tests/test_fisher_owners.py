"""The owners of a tensor's elements, held to tensors whose values are their owners."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hf_ewc.fisher.engine.interception import Interception
from hf_ewc.fisher.uses.call import Uncovered
from hf_ewc.fisher.uses.ledger import Ledger
from hf_ewc.fisher.uses.tracking import Tracker

EXAMPLES = 3


def values(*shape: int) -> Tensor:
    """(B·k, …), each element the number of its example."""
    rows = torch.arange(EXAMPLES).repeat_interleave(shape[0] // EXAMPLES)
    return rows.reshape(-1, *[1] * (len(shape) - 1)).expand(shape).clone()


MASK = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)
COUNTS = torch.tensor([2, 0, 3])

MOVEMENTS = {
    "transposed": lambda x: x.transpose(0, 1),
    "and back": lambda x: x.transpose(0, 1).transpose(0, 1),
    "permuted": lambda x: x.permute(2, 0, 1),
    "moved": lambda x: x.movedim(0, -1),
    "swapped": lambda x: torch.swapaxes(x, 0, 2),
    "flattened time first": lambda x: x.transpose(0, 1).reshape(-1, 6),
    "heads split off": lambda x: x.transpose(0, 1).reshape(4, 3 * 2, 3),
    "heads put back": lambda x: x.transpose(0, 1).reshape(4, 6, 3).transpose(0, 1).reshape(3, 8, 3),
    "across axes": lambda x: x.transpose(0, 1).reshape(2, 2 * 3 * 6),
    "merged unevenly": lambda x: x.permute(2, 0, 1).reshape(2, 9, 4),
    "unflattened": lambda x: x.flatten().unflatten(0, (2, -1)),
    "packed": lambda x: x.reshape(1, -1, 6),
    "packed and squeezed": lambda x: x.reshape(1, -1, 6).squeeze(0),
    "a new axis": lambda x: x.unsqueeze(0),
    "a new axis by index": lambda x: x[None, :, 2],
    "expanded": lambda x: x.unsqueeze(0).expand(5, -1, -1, -1),
    "one example": lambda x: x[1],
    "one number": lambda x: x[2, 0, 0],
    "a part of the examples": lambda x: x[1:],
    "every other": lambda x: x[::2, :, 1:],
    "behind dots": lambda x: x.transpose(0, 1)[..., 2],
    "turned round": lambda x: x.flip(0),
    "rolled": lambda x: x.roll(1, 0),
    "rolled as a whole": lambda x: x.roll(5),
    "masked": lambda x: x[MASK],
    "picked": lambda x: x[torch.tensor([2, 0, 0]), torch.tensor([1, 2, 3])],
    "selected": lambda x: x.index_select(0, torch.tensor([2, 1])),
    "split": lambda x: x.transpose(0, 1).split([1, 2], dim=1)[1],
    "chunks": lambda x: x.chunk(3)[2],
    "unbound": lambda x: x.unbind(0)[1],
    "narrowed": lambda x: x.narrow(0, 1, 2),
    "joined": lambda x: torch.cat([x[2], x[0]]),
    "joined in order": lambda x: torch.cat(list(x)),
    "stacked": lambda x: torch.stack([x[0], x[1], x[2]]),
    "stacked behind": lambda x: torch.stack([x[0], x[0]], dim=-1),
    "repeated": lambda x: x.repeat(2, 1, 1),
    "repeated by counts": lambda x: x.repeat_interleave(COUNTS, dim=0),
    "repeated in place": lambda x: x.transpose(0, 1).repeat_interleave(2, dim=1),
    "of no example zero": lambda x: (x + 1).nonzero()[:, :1] * 0 + (x + 1).flatten()[:, None] - 1,
    "diagonal": lambda x: x[:, :3].diagonal(dim1=0, dim2=1),
}  # fmt: skip
COMBINATIONS = {
    "added": lambda x: (x.transpose(0, 1) + x.transpose(0, 1)) // 2,
    "broadcast": lambda x: (x.transpose(0, 1) + x[:, 0]) // 2,
    "greatest": lambda x: x.transpose(0, 1).amax(0),
    "kept": lambda x: x.transpose(0, 1).max(dim=0, keepdim=True).values,
    "sorted": lambda x: x.transpose(0, 1).sort(dim=0).values,
    "chosen": lambda x: torch.where(MASK.t()[..., None], x.transpose(0, 1), x.transpose(0, 1)),
    "products": lambda x: (x.transpose(0, 1).float() @ torch.eye(6)).round(),
    "letters": lambda x: torch.einsum("tbd,de->bet", x.transpose(0, 1).float(), torch.eye(6)),
    "joined with others": lambda x: torch.cat([x.transpose(0, 1), x.transpose(0, 1)], dim=0),
}


@pytest.fixture
def tracked():
    """Runs a function with owners followed; returns its result and the owners found."""

    def run(function, *tensors):
        tracker = Tracker(Ledger({"p": nn.Parameter(torch.ones(1))}), list(tensors), EXAMPLES)
        with Interception(tracker):
            result = function(*tensors)
        if result.dim() == 0:
            return result, tracker.element_owners(result)
        return result, tracker.all_owners(result).expand(result.shape)

    return run


@pytest.mark.parametrize("name", [*MOVEMENTS, *COMBINATIONS])
def test_owners_go_where_elements_go(name, tracked):
    function = {**MOVEMENTS, **COMBINATIONS}[name]
    result, owners = tracked(function, values(3, 4, 6))
    assert torch.equal(owners, result.long())


@pytest.mark.parametrize("name", ["time first", "in order"])
def test_what_is_written_into_a_blank_tensor(name, tracked):
    """Where some of it stays blank."""
    time_first = name == "time first"

    def gathered(x):
        blank = torch.zeros(4, 3, 6) if time_first else torch.zeros(3, 4, 6)
        examples, places = MASK.nonzero(as_tuple=True)
        index = (places, examples) if time_first else (examples, places)
        blank[index] = x[examples, places].float().requires_grad_()
        return blank

    _, owners = tracked(gathered, values(3, 4, 6))
    expected = values(3, 4, 6)
    assert torch.equal(owners, expected.transpose(0, 1) if time_first else expected)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.transpose(0, 1).sum(1),
        lambda x: x.transpose(0, 1).float().softmax(1),
        lambda x: x.transpose(0, 1) + x.flip(0).transpose(0, 1),
        lambda x: x.permute(2, 1, 0).float() @ torch.ones(3, 2),
        lambda x: torch.einsum("tbd->td", x.transpose(0, 1).float()),
        lambda x: x.transpose(0, 1).reshape(6, 4, 3)[:4] + x.transpose(0, 1)[:, :1, :3],
    ],
)
def test_what_mixes_examples_is_of_none(function, tracked):
    with pytest.raises(Uncovered):
        tracked(function, values(3, 4, 6))


def test_rows_of_several_for_each_example(tracked):
    for function in (MOVEMENTS["transposed"], MOVEMENTS["packed"], MOVEMENTS["permuted"]):
        result, owners = tracked(function, values(6, 4, 6))
        assert torch.equal(owners, result)
