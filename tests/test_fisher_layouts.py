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


class Neighbours(nn.Module):
    """Words of a graph that all examples have."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Embedding(20, 5), nn.Linear(5, 2)

    def forward(self, ids, adjacency, labels=None):
        words = self.words(ids)
        return {"logits": self.head(torch.tanh(adjacency.to(words.dtype) @ words).mean(1))}


class Nearest(nn.Module):
    """Compares each example with a prototype of each class."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(3, 5)

    def forward(self, x, prototypes, labels=None):
        return {"logits": self.inner(x) @ self.inner(prototypes.to(x.dtype)).T}


class MaskedTimeFirst(nn.Module):
    """Takes (time, example)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Embedding(20, 5), nn.Linear(5, 2)

    def forward(self, ids, mask, labels=None):
        words = self.words(ids) * mask.unsqueeze(-1)
        return {"logits": self.head(torch.tanh(words.cumsum(0)).mean(0))}


class Tagger(nn.Module):
    """A label for each word; takes (time, example), and each word what stands before it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Embedding(20, 5), nn.Linear(5, 2)

    def forward(self, ids, labels=None):
        return {"logits": self.head(torch.tanh(self.words(ids).cumsum(0)))}


class Patches(nn.Module):
    """Patches of all pictures in one row, and how many each has."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, patches, counts, labels=None):
        picture = torch.repeat_interleave(torch.arange(len(counts)), counts)
        hidden = torch.tanh(self.inner(patches[0]))[: len(picture)]
        return {"logits": self.head(hidden.new_zeros(len(counts), 5).index_add(0, picture, hidden))}


class ExampleLast(nn.Module):
    """Takes (feature, time, example)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x, labels=None):
        return {"logits": self.head(torch.tanh(self.inner(x.movedim(-1, 0).mT)).mean(1))}


def time_first(rows):
    return {**stacked(rows, "labels"), "x": torch.stack([row["x"] for row in rows], 1)}


def masked_time_first(rows):
    two = {name: torch.stack([row[name] for row in rows], 1) for name in ("ids", "mask")}
    return {**stacked(rows, "labels"), **two}


def example_last(rows):
    return {**stacked(rows, "labels"), "x": torch.stack([row["x"] for row in rows], -1)}


def with_neighbours(rows):
    return {**stacked(rows, "ids", "labels"), "adjacency": randn(4, 4, seed=1)}


def with_prototypes(rows):
    return {**stacked(rows, "x", "labels"), "prototypes": randn(4, 3, seed=1)}


def tags(rows):
    return {name: torch.stack([row[name] for row in rows], 1) for name in ("ids", "labels")}


def with_patches(rows):
    counts = torch.tensor([len(row["patches"]) for row in rows])
    patches = torch.cat([row["patches"] for row in rows]).unsqueeze(0)
    return {**stacked(rows, "labels"), "patches": patches, "counts": counts}


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
    "a matrix for all": (Neighbours, rows_of(ids=lambda n: torch.arange(4) + n), with_neighbours),
    "a row for each class": (Nearest, rows_of(x=lambda n: randn(3, seed=n)), with_prototypes),
    "a mask like its transpose": (
        MaskedTimeFirst,
        rows_of(ids=lambda n: torch.arange(4) * n % 7, mask=lambda n: torch.ones(4)),
        masked_time_first,
    ),
    "patches in a row": (
        Patches,
        rows_of(patches=lambda n: randn(1 + n % 3, 3, seed=n)),
        with_patches,
    ),
    "examples last": (ExampleLast, rows_of(x=lambda n: randn(4, 5, seed=n)), example_last),
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
    "a matrix for all": "example 0, taken by its place, has other outputs alone",
    "a row for each class": "example 0, taken by its place, has other outputs alone",
    "a mask like its transpose": "What belongs to which example is told by the first axis",
    "patches in a row": "example 1, taken by its place, has other outputs alone",
    "examples last": "example 0, taken by its place, fails alone with mat1",
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


@pytest.mark.filterwarnings("ignore:The (examples|one-backward)")
@pytest.mark.parametrize("number", [1, 2, 5])
def test_a_batch_is_cut_off_only_where_its_examples_are_known(number):
    kind, rows, collate = CASES["a matrix for all"]
    batches = [collate(rows[:4]), collate(rows[4:])]
    with pytest.raises(ValueError, match="example 0, taken by its place, has other outputs alone"):
        estimate_fisher(kind(), iter(batches), num_samples=number, fisher_type="empirical")


@pytest.mark.filterwarnings("ignore:The (examples|one-backward)")
def test_labels_beyond_the_outputs_of_what_is_no_example_are_explained():
    """Of two prototypes the label of the third is none."""
    rows = [{"x": randn(3, seed=n), "labels": 3 - n % 4} for n in range(8)]
    batches = [with_prototypes(rows[:4]), with_prototypes(rows[4:])]
    with pytest.raises(ValueError, match="cannot be told from its sizes"):
        estimate_fisher(Nearest(), iter(batches))
    fisher = estimate_fisher(
        Nearest(), rows, data_collator=with_prototypes, batch_size=4, fisher_type="empirical"
    )
    oracle.assert_close(fisher.diagonal, by_hand(Nearest(), rows, with_prototypes))


def test_parts_of_a_batch_that_memory_has_no_room_for_are_taken_as_it_was_collated():
    """Eight examples share a matrix of four rows; of four it could be theirs."""
    _, rows, collate = CASES["a matrix for all"]
    rows = rows * 2

    class Narrow(Neighbours):
        def forward(self, ids, adjacency, labels=None):
            if len(ids) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().forward(ids, adjacency)

    fisher = estimate_fisher(
        Narrow(), rows, data_collator=collate, batch_size=8, fisher_type="empirical"
    )
    oracle.assert_close(fisher.diagonal, by_hand(Neighbours(), rows, collate))


def words(length):
    return [{"ids": (torch.arange(length) * (n + 1)) % 20, "labels": (torch.arange(length) + n) % 2}
            for n in range(8)]  # fmt: skip


@pytest.mark.filterwarnings("ignore:The (examples|one-backward)")
@pytest.mark.parametrize("fisher_type", ["empirical", "exact"])
@pytest.mark.parametrize("length", [3, 4, 5])
def test_labels_that_stand_time_first_are_refused(length, fisher_type):
    """Which would be as many examples as there are times."""
    rows, options = words(length), {"fisher_type": fisher_type}
    for batches in ([tags(rows[:4]), tags(rows[4:])], iter([tags(rows[:4])])):
        with pytest.raises(ValueError, match="by its place, has other outputs alone"):
            estimate_fisher(Tagger(), batches, **options)
    with pytest.raises(ValueError, match="needed is one row for each example"):
        estimate_fisher(Tagger(), rows, data_collator=tags, batch_size=4, **options)


@pytest.mark.filterwarnings("ignore:The (examples|one-backward)")
@pytest.mark.parametrize("batch_size", [1, 4])
def test_one_example_is_never_counted_as_several(batch_size):
    class Flat(Tagger):
        def forward(self, ids, labels=None):
            return {"logits": super().forward(ids.T)["logits"].flatten(0, 1)}

    with pytest.raises(ValueError, match=rf"of {5 * batch_size} examples on a batch of"):
        estimate_fisher(Flat(), words(5), batch_size=batch_size)


@pytest.mark.filterwarnings("ignore:The (examples|one-backward)")
def test_a_list_of_batches_taken_for_examples_is_said_to_be():
    _, rows, collate = CASES["patches in a row"]
    with pytest.raises(ValueError, match=r"taken for one example; where it is a batch.*iter\("):
        estimate_fisher(Patches(), [collate(rows[:4]), collate(rows[4:])])


@pytest.mark.filterwarnings("ignore:The one-backward")
def test_a_list_of_examples_taken_for_batches_is_said_to_be():
    """As tagged texts are, whose tensors all have a row for each word."""

    class Boxed(Tagger):
        def forward(self, ids, boxes, labels=None):
            return super().forward(ids + boxes[:, :, 0])

    rows = [{**row, "boxes": torch.zeros(len(row["ids"]), 4, dtype=torch.long)} for row in words(5)]
    with pytest.raises(ValueError, match=r"taken for a batch.*where it is one example, give a dat"):
        estimate_fisher(Boxed(), rows)


def test_labels_in_a_list_are_said_to_be():
    rows = rows_of(x=lambda n: randn(3, seed=n))

    def collate(some):
        return {**with_size(some), "labels": [row["labels"] for row in some]}

    with pytest.raises(ValueError, match=r"'labels' is a list in a batch; needed is a tensor"):
        estimate_fisher(Sized(), rows, data_collator=collate)


# Examples with several rows each, in another order than one after another


class Pairs(nn.Module):
    """Compares the first half of what it gets with the second."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, views, labels=None):
        views = torch.stack(views) if isinstance(views, list) else views
        first, second = torch.tanh(self.inner(views)).chunk(2)
        return {"logits": self.head((first - second).abs())}


def pairs_of(kind):
    def collate(rows):
        views = [row["first"] for row in rows] + [row["second"] for row in rows]
        views = views if kind == "list" else torch.stack(views)
        return {"views": views, "labels": torch.tensor([row["labels"] for row in rows])}

    return collate


@pytest.mark.filterwarnings("ignore:The one-backward", "ignore:The examples of a batch")
@pytest.mark.parametrize("kind", ["tensor", "list"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_pairs_that_lie_view_by_view(kind, size):
    model, rows = Pairs(), []
    for n in range(8):
        first, second = torch.randn(2, 4, generator=torch.Generator().manual_seed(n))
        rows.append({"first": first, "second": second, "labels": n % 3})
    options = dict(data_collator=pairs_of(kind), batch_size=size, fisher_type="empirical")
    fisher = estimate_fisher(model, rows, **options)
    expected = by_hand(model, rows, pairs_of("tensor"))
    oracle.assert_close(fisher.diagonal, expected)


class Contrast(nn.Module):
    """Scores each first against all seconds of the batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.other = nn.Linear(4, 5), nn.Linear(4, 5)

    def forward(self, first, second, labels=None):
        return {"logits": self.one(first) @ self.other(second).T}


def test_labels_that_are_places_in_the_batch_are_refused():
    def collate(rows):
        found = {name: torch.stack([row[name] for row in rows]) for name in ("first", "second")}
        return {**found, "labels": torch.arange(len(rows))}

    rows = [{"first": torch.randn(4), "second": torch.randn(4)} for _ in range(8)]
    with pytest.raises(ValueError, match="their places in the batch"):
        estimate_fisher(Contrast(), rows, data_collator=collate, batch_size=4)


def test_a_collator_that_writes_into_the_examples_arrays_does_so_once():
    """Here it scales them, and its rows cannot be told apart, so that each is collated anew."""

    def collate(rows):
        for row in rows:
            row["first"].mul_(3)
        return pairs_of("tensor")(rows)

    def made():
        rows = []
        for n in range(4):
            first, second = torch.randn(2, 4, generator=torch.Generator().manual_seed(n))
            rows.append({"first": first, "second": second, "labels": n % 3})
        return rows

    options = dict(data_collator=collate, fisher_type="empirical")
    with pytest.warns(UserWarning, match="The examples of a batch"):
        found = estimate_fisher(Pairs(), made(), batch_size=4, **options)
    expected = by_hand(
        Pairs(), [{**row, "first": row["first"] * 3} for row in made()], pairs_of("tensor")
    )
    oracle.assert_close(found.diagonal, expected)
