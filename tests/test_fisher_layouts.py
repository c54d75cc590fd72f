"""Inputs that do not have a row for each example: time first, places in the batch, its size."""

from __future__ import annotations

import fisher_oracle as oracle
import pytest
import torch
from test_fisher_batches import by_hand, randn, stacked
from torch import nn

from hf_ewc import estimate_fisher


class TimeFirst(nn.Module):
    """Takes (time, example, feature)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x, labels=None):
        return {"logits": self.head(torch.tanh(self.inner(x)).sum(0))}


class Positions(nn.Module):
    """Three positions for each token, (3, example, token): of time, height and width."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Embedding(20, 5), nn.Linear(5, 2)

    def forward(self, ids, position_ids, labels=None):
        angles = position_ids.to(self.head.weight.dtype).sum(0).unsqueeze(-1)
        return {"logits": self.head(torch.tanh(self.words(ids) * angles.cos()).mean(1))}


class Graphs(nn.Module):
    """Nodes of all graphs one behind the other, and of which graph each is."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, nodes, graph, labels=None):
        hidden = torch.tanh(self.inner(nodes))
        summed = hidden.new_zeros(int(graph.max()) + 1, 5).index_add(0, graph, hidden)
        return {"logits": self.head(summed)}


class Bags(nn.Module):
    """Words of all texts one behind the other, and where each text begins."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.EmbeddingBag(10, 5, mode="mean"), nn.Linear(5, 2)

    def forward(self, ids, offsets, labels=None):
        return {"logits": self.head(torch.tanh(self.words(ids, offsets)))}


class Sized(nn.Module):
    """Is told how many examples there are."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x, size, labels=None):
        return {"logits": self.head(torch.tanh(self.inner(x.reshape(size, -1))))}


def time_first(rows):
    return {**stacked(rows, "labels"), "x": torch.stack([row["x"] for row in rows], 1)}


def with_positions(rows):
    positions = torch.stack([torch.arange(5).expand(len(rows), 5) * k for k in (1, 2, 3)])
    return {**stacked(rows, "ids", "labels"), "position_ids": positions}


def with_graphs(rows):
    graph = [torch.full((len(row["nodes"]),), n) for n, row in enumerate(rows)]
    nodes = torch.cat([row["nodes"] for row in rows])
    return {**stacked(rows, "labels"), "nodes": nodes, "graph": torch.cat(graph)}


def with_offsets(rows):
    sizes = torch.tensor([0, *(len(row["ids"]) for row in rows[:-1])])
    ids = torch.cat([row["ids"] for row in rows])
    return {**stacked(rows, "labels"), "ids": ids, "offsets": sizes.cumsum(0)}


def with_size(rows):
    return {**stacked(rows, "x", "labels"), "size": len(rows)}


def rows_of(**made):
    return [{"labels": n % 2, **{name: make(n) for name, make in made.items()}} for n in range(8)]


CASES = {
    "time first": (TimeFirst, rows_of(x=lambda n: randn(5, 3, seed=n)), time_first),
    "as many times as examples": (TimeFirst, rows_of(x=lambda n: randn(4, 3, seed=n)), time_first),
    "positions": (Positions, rows_of(ids=lambda n: torch.arange(5) + n), with_positions),
    "graphs": (Graphs, rows_of(nodes=lambda n: randn(1 + n % 3, 3, seed=n)), with_graphs),
    "graphs alike": (Graphs, rows_of(nodes=lambda n: randn(2, 3, seed=n)), with_graphs),
    "bags": (Bags, rows_of(ids=lambda n: torch.arange(1 + n % 3) + n % 5), with_offsets),
    "bags alike": (Bags, rows_of(ids=lambda n: torch.arange(2) + n % 5), with_offsets),
    "their number": (Sized, rows_of(x=lambda n: randn(3, seed=n)), with_size),
}


# Where a batch does not say how its examples are joined, what is said of it.
REFUSED = {
    "time first": "x has 5 rows for 4 examples",
    "as many times as examples": "What belongs to which example is told by the first axis",
    "positions": "position_ids has 3 rows for 4 examples",
    "graphs": "nodes has 7 rows for 4 examples",
    "graphs alike": "What belongs to which example of a batch cannot be told from its sizes",
    "bags": "ids has 7 rows for 4 examples",
    "bags alike": "What belongs to which example of a batch cannot be told from its sizes",
    "their number": "with the arguments x, labels, size",
}


@pytest.mark.filterwarnings("ignore:The (examples|one-backward)")
@pytest.mark.parametrize("loader", [False, True])
@pytest.mark.parametrize("size", [3, 4])
@pytest.mark.parametrize("case", CASES)
def test_examples_are_taken_apart(case, size, loader):
    kind, rows, collate = CASES[case]
    options = {"data_collator": collate, "batch_size": size}
    data = rows
    if loader:
        data = torch.utils.data.DataLoader(rows, batch_size=size, collate_fn=collate)
        options = {}
    fisher = estimate_fisher(kind(), data, fisher_type="empirical", **options)
    assert fisher.num_examples == 8
    oracle.assert_close(fisher.diagonal, by_hand(kind(), rows, collate))


@pytest.mark.filterwarnings("ignore:The (examples|one-backward)")
@pytest.mark.parametrize("case", CASES)
def test_batches_that_come_collated_are_refused(case):
    kind, rows, collate = CASES[case]
    batches = [collate(rows[:4]), collate(rows[4:])]
    with pytest.raises(ValueError, match=REFUSED[case]):
        estimate_fisher(kind(), iter(batches), fisher_type="empirical")


def test_labels_in_a_list_are_said_to_be():
    rows = rows_of(x=lambda n: randn(3, seed=n))

    def collate(some):
        return {**with_size(some), "labels": [row["labels"] for row in some]}

    with pytest.raises(ValueError, match=r"'labels' is a list in a batch; needed is a tensor"):
        estimate_fisher(Sized(), rows, data_collator=collate)
