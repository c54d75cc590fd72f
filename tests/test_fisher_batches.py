"""Which rows of a batch belong to which example, and for which batches the fast way is proved."""

from __future__ import annotations

import copy
from argparse import Namespace
from dataclasses import dataclass
from types import SimpleNamespace

import fisher_oracle as oracle
import pytest
import torch
import transformers as t
from models import Examples, Unseen, bert
from torch import nn

from hf_ewc import estimate_fisher
from hf_ewc.fisher import replicas
from hf_ewc.fisher.engine.verification import Sketch
from hf_ewc.fisher.uses.product import Product

PICTURE = 9


class Pictures(nn.Module):
    """Reads texts in which each PICTURE stands for the next of all pictures."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.eye, self.head = nn.Embedding(10, 5), nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, ids, pictures=None, counts=None, labels=None):
        hidden = self.words(ids)
        if pictures is not None:
            seen = torch.tanh(self.eye(pictures))
            hidden = hidden.masked_scatter((ids == PICTURE).unsqueeze(-1), seen)
        return {"logits": self.head(torch.tanh(hidden).mean(1))}


class Heads(nn.Module):
    """A head for each name."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(3, 5)
        self.heads = nn.ModuleDict({name: nn.Linear(5, 2) for name in "ab"})

    def forward(self, x, names, labels=None):
        hidden = torch.tanh(self.body(x))
        logits = torch.zeros(len(x), 2, dtype=x.dtype)
        for name in sorted(set(names)):
            rows = torch.tensor([n for n, other in enumerate(names) if other == name])
            logits = logits.index_put((rows,), self.heads[name](hidden[rows]))
        return {"logits": logits}


class Boxes(nn.Module):
    """Sums over the boxes of each example, of which there are more or fewer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, boxes, labels=None):
        boxes = boxes["boxes"] if isinstance(boxes, dict) else boxes
        boxes = [box["box"] if isinstance(box, dict) else box for box in boxes]
        return {"logits": torch.stack([self.head(torch.tanh(self.inner(b)).sum(0)) for b in boxes])}


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def texts(counts):
    rows = []
    for seed, count in enumerate(counts):
        ids = torch.arange(6).add(seed) % 8
        ids[:count] = PICTURE
        rows.append({"ids": ids, "pictures": randn(count, 3, seed=seed), "labels": seed % 2})
    return rows


def stacked(rows, *names):
    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in names}


def join(rows):
    batch = stacked(rows, "ids", "labels")
    pictures = torch.cat([row["pictures"] for row in rows])
    return {**batch, "pictures": pictures} if len(pictures) else batch


def join_and_count(rows):
    counts = torch.tensor([len(row["pictures"]) for row in rows])
    return {**join(rows), "counts": counts}


def name_each(rows):
    return {**stacked(rows, "x", "labels"), "names": [row["name"] for row in rows]}


def list_boxes(rows):
    return {**stacked(rows, "labels"), "boxes": [row["box"] for row in rows]}


def list_dicts(rows):
    return {**stacked(rows, "labels"), "boxes": [{"box": row["box"]} for row in rows]}


def dict_of_lists(rows):
    return {**stacked(rows, "labels"), "boxes": {"boxes": [row["box"] for row in rows]}}


def names(count=8):
    rows = ({"x": randn(3, seed=n), "name": "ab"[(n // 2 + n) % 2]} for n in range(count))
    return [{**row, "labels": n % 2} for n, row in enumerate(rows)]


def boxes(sizes):
    return [{"box": randn(k, 3, seed=n), "labels": n % 2} for n, k in enumerate(sizes)]


def by_hand(model, rows, collate):
    """(1/N) Σ_n (∂ log p(y_n | x_n))² of batches of one, in float64."""
    twin = copy.deepcopy(model).double()
    parameters = dict(twin.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for row in rows:
        double = {k: v.double() if _floats(v) else v for k, v in row.items()}
        one = collate([double])
        label = int(one.pop("labels"))
        score = twin(**one)["logits"].log_softmax(-1)[0, label]
        gradients = torch.autograd.grad(score, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                total[name] += gradient**2 / len(rows)
    return total


def _floats(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


@dataclass
class Meta:
    """What goes with the examples, in an object."""

    names: list


class Bare:
    """The same in one that cannot be compared."""

    def __init__(self, names):
        self.names = names


class ByMeta(Heads):
    def forward(self, x, meta, labels=None):
        return super().forward(x, meta.names)


def in_object(kind):
    def collate(rows):
        batch = name_each(rows)
        return {"x": batch["x"], "labels": batch["labels"], "meta": kind(batch["names"])}

    return collate


CASES = {
    "names in a dataclass": (ByMeta, names(), in_object(Meta)),
    "names in an object": (ByMeta, names(), in_object(Bare)),
    "one picture each": (Pictures, texts([1] * 8), join),
    "two pictures each": (Pictures, texts([2] * 8), join),
    "as many pictures as texts": (Pictures, texts([1] * 4 + [2, 0, 1, 1]), join),
    "more pictures": (Pictures, texts([1] * 4 + [1, 3, 2, 2]), join),
    "unequal at first": (Pictures, texts([2, 0, 1, 1, 1, 1, 1, 1]), join),
    "no picture in a batch": (Pictures, texts([1, 1, 1, 1, 0, 0, 0, 0]), join),
    "with their counts": (Pictures, texts([1] * 4 + [0, 2, 2, 0]), join_and_count),
    "names": (Heads, names(), name_each),
    "lists of boxes": (Boxes, boxes([2, 1, 3, 2, 4, 4, 4, 4]), list_boxes),
    "as many boxes as examples": (Boxes, boxes([4, 4, 4, 4, 1, 2, 3, 2]), list_boxes),
    "lists of dicts": (Boxes, boxes([1, 1, 2, 2, 3, 3, 1, 2]), list_dicts),
    "dicts of lists": (Boxes, boxes([2, 2, 2, 2, 1, 3, 1, 3]), dict_of_lists),
}


# Where nothing says which picture is whose once they lie in one batch.
UNEQUAL = (
    "as many pictures as texts", "more pictures", "unequal at first", "with their counts",
    "names in a dataclass", "names in an object",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:The (examples|one-backward)")
@pytest.mark.parametrize("loader", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_examples_are_taken_apart_as_they_are_collated(case, loader):
    kind, rows, collate = CASES[case]
    model = kind()
    expected = by_hand(model, rows, collate)
    if loader:
        data = torch.utils.data.DataLoader(rows, batch_size=4, collate_fn=collate)
        fisher = estimate_fisher(model, data, fisher_type="empirical")
    else:
        fisher = estimate_fisher(
            model, rows, data_collator=collate, fisher_type="empirical", batch_size=4
        )
    assert fisher.num_examples == 8
    oracle.assert_close(fisher.diagonal, expected)


@pytest.mark.filterwarnings("ignore:The (examples|one-backward)")
@pytest.mark.parametrize("case", CASES)
def test_batches_that_come_collated_are_right_or_refused(case):
    kind, rows, collate = CASES[case]
    batches = [collate(rows[:4]), collate(rows[4:])]
    if case not in UNEQUAL:
        fisher = estimate_fisher(kind(), iter(batches), fisher_type="empirical")
        oracle.assert_close(fisher.diagonal, by_hand(kind(), rows, collate))
    else:
        with pytest.raises(ValueError, match="batch_size=1"):
            estimate_fisher(kind(), iter(batches), fisher_type="empirical")


@pytest.mark.parametrize("case", ["as many pictures as texts", "lists of boxes"])
def test_what_is_no_row_for_each_example_is_said(case):
    kind, rows, collate = CASES[case]
    options = {"data_collator": collate, "fisher_type": "empirical", "batch_size": 4}
    with pytest.warns(UserWarning, match="are not a row each: (pictures|boxes)"):
        estimate_fisher(kind(), rows, **options)
    with pytest.raises(ValueError, match="fisher_batch_size=1"):
        estimate_fisher(kind(), rows, fallback="error", **options)


def taking_out(collate):
    """`collate`, which takes the columns out of what it is given."""

    def collated(rows):
        own = [{name: row.pop(name) for name in list(row)} for row in rows]
        return collate(own)

    return collated


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("case", ["unequal at first", "lists of boxes"])
def test_a_collator_that_takes_columns_out(case, fresh):
    kind, rows, collate = CASES[case]
    rows = [dict(row) for row in rows]
    data = Fresh(rows) if fresh else rows
    with pytest.warns(UserWarning, match="are not a row each"):
        fisher = estimate_fisher(
            kind(), data, data_collator=taking_out(collate), fisher_type="empirical", batch_size=4
        )
    oracle.assert_close(fisher.diagonal, by_hand(kind(), CASES[case][1], collate))
    assert all(row.keys() == own.keys() for row, own in zip(rows, CASES[case][1], strict=True))


class Fresh(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return dict(self.rows[index])


def without_broken(rows):
    return name_each([row for row in rows if row["x"] is not None])


@pytest.mark.parametrize("broken", [{2}, {0}, {4, 5, 6, 7}])
@pytest.mark.parametrize("size", [4, 1])
def test_a_collator_that_leaves_examples_out(broken, size):
    rows = [{**row, "x": None} if n in broken else row for n, row in enumerate(names())]
    said = r"data_collator leaves out example.*Leave such examples out of the data"
    with pytest.raises(ValueError, match=said):
        estimate_fisher(Heads(), rows, data_collator=without_broken, batch_size=size)


@pytest.mark.parametrize("place", [1, 5])
@pytest.mark.parametrize("size", [4, 1])
def test_an_item_that_is_none(place, size):
    examples = Examples("bert", 6)
    rows = [None if n == place else examples[n] for n in range(6)]
    with pytest.raises(TypeError, match=r"gives None in place of an example.*Leave such items out"):
        estimate_fisher(bert(), rows, batch_size=size)


class Drawing:
    """A collator that draws at random, as one for masked language models does."""

    def __call__(self, rows):
        x = torch.stack([row["x"] for row in rows])
        kept = torch.rand(len(rows), 3) < 0.5
        return {"x": x * kept, "names": ["a"] * len(rows), "labels": torch.zeros(len(rows)).long()}


def test_looking_at_single_examples_draws_nothing_anew():
    """A list makes the collator be asked for single examples; the batch's own draws are used."""
    model, rows, drawn, random = Heads(), names(), [], Drawing()

    def collate(some):
        batch = random(some)
        if len(some) > 1:
            drawn.append(batch)
        return batch

    torch.manual_seed(3)
    actual = estimate_fisher(
        model, rows, data_collator=collate, fisher_type="empirical", batch_size=4
    )
    expected = estimate_fisher(model, iter(drawn), fisher_type="empirical")
    torch.manual_seed(3)
    again = [random(rows[:4]), random(rows[4:])]
    assert torch.equal(drawn[0]["x"], again[0]["x"])
    oracle.assert_close(actual.diagonal, {k: v.double() for k, v in expected.diagonal.items()})


# What a proof holds for


class Sometimes(nn.Module):
    """Works on (time, batch, features) where it is told to, or for what it takes in float64."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = nn.Linear(3, 5), nn.Linear(5, 2)
        self.late = nn.Linear(3, 5)

    def forward(self, x, how=None, mask=None, labels=None):
        time_first = how == "time first" or mask is not None or x.dtype == torch.float64
        x = x.to(self.inner.weight.dtype)
        if time_first:
            hidden = Unseen.apply(torch.tanh(self.inner(x)))
            return {"logits": self.head(hidden).mean(0)}
        hidden = torch.tanh(self.inner(x)).mean(1)
        return {"logits": self.head(hidden)}


def batch_of(count, seed, **more):
    return {"x": randn(count, 8, 3, seed=seed), "labels": torch.arange(count) % 2, **more}


@pytest.mark.filterwarnings("ignore:The one-backward")
@pytest.mark.parametrize(
    "other",
    [
        batch_of(4, 3, how="time first"),
        batch_of(4, 3, mask=torch.ones(4, 8, dtype=torch.bool)),
        {**batch_of(4, 3), "x": randn(4, 8, 3, seed=3).double()},
    ],
    ids=["a value", "a further input", "a dtype"],
)
def test_a_batch_of_another_structure_is_proved_anew(other):
    model = Sometimes()
    batches = [batch_of(4, 1), batch_of(4, 2), other]
    fisher = estimate_fisher(model, iter(batches), fisher_type="empirical")
    rows = [{name: _row(v, n) for name, v in batch.items()} for batch in batches for n in range(4)]
    oracle.assert_close(fisher.diagonal, by_hand(model, rows, lambda rows: rows[0]))


def _row(value, n):
    return value[n : n + 1] if isinstance(value, torch.Tensor) else value


@pytest.fixture
def proofs(monkeypatch):
    """How often an example was compared with itself alone."""
    made = []
    compare = replicas.compare_with_alone
    monkeypatch.setattr(
        replicas, "compare_with_alone", lambda *args: made.append(args[2]) or compare(*args)
    )
    return made


def test_a_proof_holds_for_batches_alike_and_is_remembered(proofs):
    model = Sometimes()
    batches = [batch_of(4, 1), batch_of(4, 2), batch_of(3, 3)]
    estimate_fisher(model, iter(batches), fisher_type="empirical")
    assert [len(batch) for batch in proofs] == [4, 3]
    with torch.no_grad():
        model.head.weight.add_(0.1)
    estimate_fisher(model, iter(batches), fisher_type="exact")
    assert len(proofs) == 2
    estimate_fisher(copy.deepcopy(model), iter(batches))
    assert len(proofs) == 4


@dataclass
class Options:
    time_first: bool = False


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model, "head", nn.Sequential(nn.Linear(5, 2))),
        lambda model: setattr(model, "forward", lambda *a, **k: Sometimes.forward(model, *a, **k)),
        lambda model: model.inner.register_forward_hook(lambda module, args, output: output * 2),
        lambda model: setattr(model, "scale", 2.0),
        lambda model: setattr(model.modes, "time_first", True),
        lambda model: model.axes.append(0),
        lambda model: model.switch.fill_(1),
        lambda model: setattr(model.args, "time_first", True),
        lambda model: setattr(model.options, "time_first", True),
        lambda model: model.flag.fill_(True),
        lambda model: setattr(type(model), "way", "time first"),
        lambda model: model.late.requires_grad_(False),
    ],
    ids=[
        "a head",
        "a forward",
        "a hook",
        "an attribute",
        "a namespace",
        "a list",
        "a tensor",
        "arguments",
        "a dataclass",
        "a buffer",
        "a class attribute",
        "a frozen layer",
    ],
)
def test_a_model_that_has_changed_is_proved_anew(change, proofs, monkeypatch):
    monkeypatch.setattr(Sometimes, "way", "batch first", raising=False)
    model = Sometimes()
    model.args, model.options = Namespace(time_first=False), Options()
    model.register_buffer("flag", torch.tensor(False))
    model.modes, model.axes = SimpleNamespace(time_first=False), []
    model.switch = torch.tensor(0)
    estimate_fisher(model, iter([batch_of(4, 1)]))
    change(model)
    estimate_fisher(model, iter([batch_of(4, 1)]))
    assert len(proofs) == 2


class Trimmed(nn.Module):
    """Takes as many positions as the longest text of a batch has, and the mean over these."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x, attention_mask, labels=None):
        longest = int(attention_mask.sum(1).max())
        return {"logits": self.head(torch.tanh(self.inner(x[:, :longest])).mean(1))}


def test_a_proof_on_texts_of_one_length_is_none_for_texts_of_several():
    def texts(*lengths):
        masks = (torch.arange(8) < torch.tensor(lengths)[:, None]).float()
        batch = batch_of(4, 2, attention_mask=masks)
        return [{name: value[n] for name, value in batch.items()} for n in range(4)]

    model, options = Trimmed(), dict(fisher_type="empirical", batch_size=4)
    estimate_fisher(model, texts(8, 8, 8, 8), **options)
    rows = texts(8, 3, 2, 5)
    with pytest.warns(UserWarning, match="differs from single examples"):
        fisher = estimate_fisher(model, rows, **options)
    expected = by_hand(model, rows, lambda rows: {k: v[None] for k, v in rows[0].items()})
    oracle.assert_close(fisher.diagonal, expected)


class Mixing(nn.Module):
    """Adds a little of the batch's mean to each example."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x, labels=None):
        hidden = torch.tanh(self.inner(x))
        return {"logits": self.head(hidden + 0.5 * hidden.mean(0, keepdim=True))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_little_of_the_others_is_seen_in_half_precision_too(dtype):
    batch = {"x": randn(8, 6, seed=1).to(dtype), "labels": torch.arange(8) % 3}
    with pytest.warns(UserWarning, match="differs from single examples"):
        estimate_fisher(Mixing().to(dtype), iter([batch]), fisher_type="empirical")


class Normalized(nn.Module):
    """Divides its inputs by the largest of the batch, with all features or with each by itself."""

    def __init__(self, over=(0, 1)):
        super().__init__()
        torch.manual_seed(0)
        self.over, self.inner, self.head = over, nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x, labels=None):
        x = 2 * x / x.abs().amax(self.over, keepdim=True)
        return {"logits": self.head(torch.tanh(self.inner(x)))}


@pytest.mark.parametrize("own", [False, True], ids=["labels", "log_likelihood"])
@pytest.mark.parametrize("over", [(0, 1), 0], ids=["of all features", "of each"])
@pytest.mark.parametrize("holder", range(4))
def test_an_example_that_makes_the_others_what_they_are_proves_nothing_alone(holder, over, own):
    """It is the same among others, which are not what they are alone."""
    model, x = Normalized(over), randn(4, 6, seed=1)
    x[holder] = 4 + randn(6, seed=2).abs()
    batch = {"x": x, "labels": torch.arange(4) % 3}

    def likelihood(model, batch):
        logits = model(batch["x"])["logits"]
        return -nn.functional.cross_entropy(logits, batch["labels"], reduction="none")

    with pytest.warns(UserWarning, match="differs from single examples in"):
        fisher = estimate_fisher(
            model,
            iter([batch]),
            fisher_type="empirical",
            log_likelihood=likelihood if own else None,
        )
    rows = [{name: value[n : n + 1] for name, value in batch.items()} for n in range(4)]
    oracle.assert_close(fisher.diagonal, by_hand(model, rows, lambda rows: rows[0]))


# Forwards that fail


def test_a_model_that_takes_one_example_at_a_time():
    """Without a pad token a decoder cannot tell where several texts end."""
    torch.manual_seed(0)
    config = t.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8, num_labels=2)
    model = t.GPT2ForSequenceClassification(config)
    rows = [{"input_ids": torch.arange(5).add(n) % 20, "labels": n % 2} for n in range(5)]
    expected = estimate_fisher(model, rows, batch_size=1)
    with pytest.warns(UserWarning, match="fails on several examples at once .*padding token"):
        fisher = estimate_fisher(model, rows)
    assert fisher == expected
    with pytest.raises(ValueError, match="padding token"):
        estimate_fisher(model, rows, fallback="error")


def test_texts_of_unequal_lengths_without_a_collator_that_pads():
    torch.manual_seed(0)
    config = t.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8, num_labels=2)
    model = t.GPT2ForSequenceClassification(config)
    rows = [{"input_ids": torch.arange(3 + n) % 20, "labels": n % 2} for n in range(5)]
    expected = estimate_fisher(model, rows, batch_size=1)
    with pytest.warns(UserWarning, match="data_collator fails on several .*fisher_batch_size=1"):
        fisher = estimate_fisher(model, rows)
    assert fisher == expected


class Strict(Sometimes):
    def forward(self, x, labels=None):
        if x.shape[-1] != 3:
            raise IndexError("three features")
        return super().forward(x)


@pytest.mark.filterwarnings("ignore:The one-backward")
@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_forward_that_fails_is_explained(batch_size):
    rows = [{"x": randn(8, 4, seed=n), "labels": n % 2} for n in range(4)]
    with pytest.raises(ValueError, match=r"IndexError: three .*fisher_batch_size=1") as seen:
        estimate_fisher(Strict(), rows, batch_size=batch_size)
    assert isinstance(seen.value.__cause__, IndexError)
    extra = [{"x": randn(8, 3, seed=n), "weight": 1.0, "labels": n % 2} for n in range(4)]
    with pytest.raises(ValueError, match=r"weight.*without further columns"):
        estimate_fisher(Strict(), extra, fallback="error", batch_size=1)


def test_a_model_that_cannot_run_backward_in_eval_mode_is_refused():
    torch.manual_seed(0)
    config = t.ReformerConfig(
        vocab_size=20, hidden_size=8, attention_head_size=4, num_attention_heads=2,
        feed_forward_size=8, attn_layers=["local"], local_attn_chunk_length=4,
        axial_pos_shape=[2, 4], axial_pos_embds_dim=[4, 4], max_position_embeddings=8,
        num_labels=2, is_decoder=False,
    )  # fmt: skip
    model = t.ReformerForSequenceClassification(config)
    rows = [{"input_ids": torch.arange(8).add(n) % 20, "labels": n % 2} for n in range(4)]
    for size in (1, 4):
        with pytest.raises(ValueError, match=r"backward fails in eval mode.*Reformer"):
            estimate_fisher(model, rows, batch_size=size)


@pytest.mark.parametrize("shape", [(5, 7), (80, 70)])
def test_a_sketch_of_factors_is_that_of_their_product(shape):
    """Matrices of few entries are kept, of more the sums: a difference shows in both."""
    g, x = randn(6, shape[0], seed=1), randn(6, shape[1], seed=2)
    factors, product, other = Sketch(), Sketch(), Sketch()
    factors.see("w", Product(g, x, shape[0]))
    product.see("w", g.T @ x)
    changed = g.T @ x
    changed[3, 4] += 1.0
    other.see("w", changed)
    size = float((g.T @ x).square().sum())
    assert factors.differences(product, ["w"])["w"] < 1e-9 * size
    assert factors.differences(other, ["w"])["w"] == pytest.approx(1.0, rel=1e-3)
    assert factors.sizes(["w"])["w"] == pytest.approx(size, rel=0.5)
    factors.see("w", Product(g, x, shape[0]))
    assert factors.sizes(["w"])["w"] == pytest.approx(4 * product.sizes(["w"])["w"], rel=1e-4)


@pytest.mark.parametrize("shape", [(5, 7), (80, 70)])
def test_a_sketch_of_a_tied_matrix_adds_up_that_of_its_uses(shape):
    sizes = (6, shape[0]), (6, shape[1]), (4, shape[1])
    g, x, rows = (randn(*size, seed=k) for k, size in enumerate(sizes))
    places = torch.tensor([1, 4, 1, 0])
    uses, written_out = Sketch(), Sketch()
    uses.see("w", Product(g, x, shape[0]))
    uses.see("w", Product(places, rows, shape[0]))
    gradient = g.T @ x
    for place, row in zip(places, rows, strict=True):
        gradient[place] += row
    written_out.see("w", gradient)
    size = float(gradient.square().sum())
    assert uses.differences(written_out, ["w"])["w"] < 1e-9 * size
    uses.see("w", Product(places[:1], rows[:1], shape[0]))
    expected = pytest.approx(float(rows[0].square().sum()), rel=0.5)
    assert uses.differences(written_out, ["w"])["w"] == expected


class Card:
    """Notes in itself what is printed of it."""

    def __init__(self):
        self.line = Line(self)


class Line:
    def __init__(self, card):
        self.card = card

    def __str__(self):
        vars(self.card)[f"printed {len(vars(self.card))}"] = True
        return "line"


def test_objects_that_a_model_holds_are_not_looked_into():
    model = bert()
    model.card = Card()
    estimate_fisher(model, Examples("bert", 4))
    assert list(vars(model.card)) == ["line"]


class OfTheBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.norm = nn.BatchNorm1d(4, track_running_stats=False)

    def forward(self, x, labels=None):
        return {"logits": self.head(self.norm(self.inner(x)))}


@pytest.mark.filterwarnings("ignore:The one-backward")
@pytest.mark.parametrize("batch_size", [1, 4])
def test_batch_norms_of_the_batch_alone(batch_size):
    rows = [{"x": randn(3, seed=n), "labels": n % 2} for n in range(4)]
    with pytest.raises(ValueError, match=r"The batch norms norm have no running statistics.*Layer"):
        estimate_fisher(OfTheBatch(), rows, batch_size=batch_size)
