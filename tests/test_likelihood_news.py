"""What a loss treats in a way of its own may come in a later batch: it is looked at again there.

The oracle: log p of each example by itself in float64, as the model's loss has it.
"""

from __future__ import annotations

import copy

import fisher_oracle as oracle
import pytest
import torch
import torch.nn.functional as F
import transformers as t
from models import Examples, bert
from torch import nn
from transformers import BertForQuestionAnswering

from hf_ewc import estimate_fisher
from hf_ewc.fisher.examples.batch import ExampleBatch
from hf_ewc.fisher.likelihood.news import News


class Tagger(nn.Module):
    """A class for each position; the loss is that of the labels that `counts`."""

    def __init__(self, counts, classes=5):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(12, 6), nn.Linear(6, classes)
        self.counts = counts

    def forward(self, input_ids, attention_mask, labels=None):
        logits = self.head(torch.tanh(self.embedding(input_ids)))
        if labels is None:
            return {"logits": logits}
        there = self.counts(labels, attention_mask)
        return {"loss": F.cross_entropy(logits[there], labels[there]), "logits": logits}


def texts(lengths, padding):
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in lengths:
        there = torch.arange(6) < length
        ids = torch.randint(1, 12, (6,), generator=generator)
        labels = torch.randint(1, 5, (6,), generator=generator)
        rows.append(
            {
                "input_ids": ids * there,
                "attention_mask": there.long(),
                "labels": labels.masked_fill(~there, padding),
            }
        )
    return rows


def squares(model, rows, log_p):
    """(1/N) Σ_n (∂ log p_n / ∂θ)², each example by itself."""
    twin = copy.deepcopy(model).double()
    total = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    for row in rows:
        twin.zero_grad()
        log_p(twin, {name: value[None] for name, value in row.items()}).backward()
        for name, p in twin.named_parameters():
            total[name] += p.grad.square() / len(rows)
    return total


def of_attended(model, row):
    logits = model(row["input_ids"], row["attention_mask"])["logits"].log_softmax(-1)
    own = logits.gather(-1, row["labels"][..., None])[..., 0]
    return (own * row["attention_mask"]).sum()


@pytest.mark.parametrize("lengths", [(6, 6, 6, 6, 4, 3, 5, 2), (2, 5, 3, 4, 6, 6, 6, 6)])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_padding_that_the_loss_leaves_out_by_the_mask(lengths, size):
    """The longest texts come first, as data sorted by length have them, or last."""
    model, rows = Tagger(lambda labels, mask: mask.bool()), texts(lengths, padding=0)
    fisher = estimate_fisher(model, rows, batch_size=size, fisher_type="empirical")
    oracle.assert_close(fisher.diagonal, squares(model, rows, of_attended))


@pytest.mark.parametrize("size", [2, 4])
def test_labels_that_the_loss_leaves_out_of_a_later_batch(size):
    model = Tagger(lambda labels, mask: labels != 0)
    rows = texts((6, 6, 6, 6, 4, 3, 5, 2), padding=0)
    with pytest.raises(ValueError, match="its ignore_index is 0"):
        estimate_fisher(model, rows, batch_size=size, fisher_type="empirical")


class Scores(nn.Module):
    """One number for each example, and a loss of a choice."""

    def __init__(self, loss):
        super().__init__()
        torch.manual_seed(0)
        self.head, self.loss = nn.Linear(4, 1), loss

    def forward(self, x, labels=None):
        logits = self.head(x)
        found = {"logits": logits}
        return found if labels is None else {"loss": self.loss(logits[:, 0], labels), **found}


def but_for_minus_one(values, labels):
    return F.mse_loss(values[labels != -1], labels[labels != -1])


def linear_from_50(values, labels):
    return F.smooth_l1_loss(values, labels, beta=50.0)


def by_kind(values, labels):
    """Yes or no where all labels are, else a regression, as of two tasks in turn."""
    if bool(((labels == 0) | (labels == 1)).all()):
        return F.binary_cross_entropy_with_logits(values, labels)
    return F.mse_loss(values, labels)


YES_NO, RATINGS = [0.0, 1.0, 1.0, 0.0], [0.2, 0.7, 0.4, 0.9]


@pytest.mark.parametrize(
    ("loss", "labels", "news"),
    [
        (but_for_minus_one, [0.3, 0.1, 0.9, 0.4, -1.0, 0.2, -1.0, 0.8], "labels below 0"),
        (linear_from_50, [0.1, -0.1, 0.2, -0.2, 600.0, -800.0, 500.0, 900.0], "labels beyond"),
        (by_kind, YES_NO + RATINGS, "labels that are not 0 or 1"),
        (by_kind, RATINGS + YES_NO, "labels of 0 or 1"),
    ],
    ids=[
        "a code for missing",
        "large errors",
        "yes or no, then ratings",
        "ratings, then yes or no",
    ],
)
def test_numbers_that_the_loss_takes_otherwise(loss, labels, news):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(2)) * 0.1
    rows = [{"x": one, "labels": torch.tensor(label)} for one, label in zip(x, labels, strict=True)]
    with pytest.raises(ValueError, match=f"of one with .*{news}"):
        estimate_fisher(Scores(loss), rows, batch_size=4, fisher_type="empirical")


def test_classes_and_then_numbers():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.classes, self.number = nn.Linear(4, 3), nn.Linear(4, 1)

        def forward(self, x, labels=None):
            numbers = labels is not None and labels.is_floating_point()
            logits = (self.number if numbers else self.classes)(x)
            if labels is None:
                return {"logits": logits}
            loss = F.mse_loss(logits[:, 0], labels) if numbers else F.cross_entropy(logits, labels)
            return {"loss": loss, "logits": logits}

    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(2))
    batches = [
        {"x": x, "labels": torch.tensor([0, 1, 2, 0])},
        {"x": x, "labels": torch.tensor(RATINGS)},
    ]
    with pytest.raises(ValueError, match="labels that are not 0 or 1"):
        estimate_fisher(Both(), iter(batches), fisher_type="empirical")


def test_answers_that_are_counted_otherwise_later():
    """`transformers` counts a position below 0 as position 0, and here it would be left out."""
    model, rows = BertForQuestionAnswering(bert(num_labels=2).config), []
    for n in range(8):
        place = torch.tensor(n % 4 if n < 4 else -1)
        ids = Examples("bert", 8)[n]["input_ids"]
        rows.append({"input_ids": ids, "start_positions": place, "end_positions": place})
    with pytest.raises(ValueError, match="labels below 0"):
        estimate_fisher(model, rows, batch_size=4, fisher_type="empirical")


class Margin(nn.Module):
    """Takes a margin from the cosine of the true class, where it is told which that is."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.classes = nn.Linear(4, 6), nn.Parameter(torch.randn(3, 6))

    def forward(self, x, labels=None):
        directions = F.normalize(self.classes, dim=1)
        logits = 4 * F.normalize(self.inner(x), dim=1) @ directions.T
        if labels is None:
            return {"logits": logits}
        logits = logits - 2 * F.one_hot(labels, 3)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("fisher_type", ["exact", "empirical"])
def test_logits_that_know_the_true_class_are_refused(fisher_type):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(2))
    rows = [{"x": one, "labels": torch.tensor(n % 3)} for n, one in enumerate(x)]
    with pytest.raises(ValueError, match="depend on the labels"):
        estimate_fisher(Margin(), rows, batch_size=4, fisher_type=fisher_type)


class Silent(nn.Module):
    """Has no loss."""

    def __init__(self, outputs):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(4, outputs)

    def forward(self, x):
        return {"logits": self.head(x)}


def test_as_many_classes_as_positions_without_a_loss_are_refused():
    batch = {"x": torch.randn(3, 5, 4), "labels": torch.randint(5, (3, 5))}
    with pytest.raises(ValueError, match="as many classes as positions"):
        estimate_fisher(Silent(5), iter([batch]))
    assert estimate_fisher(Silent(6), iter([batch])).num_examples == 3


def test_signs_as_labels_without_a_loss_are_refused():
    batch = {"x": torch.randn(4, 4), "labels": torch.tensor([-1.0, 1.0, 1.0, -1.0])}
    with pytest.raises(ValueError, match="may mean regression"):
        estimate_fisher(Silent(1), iter([batch]))


class Pixels(nn.Module):
    """A class for each pixel; 255 is left out, as of borders."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Conv2d(2, 3, 1)

    def forward(self, x, labels=None):
        logits = self.head(x)
        found = {"logits": logits}
        if labels is None:
            return found
        return {"loss": F.cross_entropy(logits, labels, ignore_index=255), **found}


@pytest.mark.parametrize("turned", [False, True])
def test_borders_may_come_in_a_later_batch(turned):
    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "x": torch.randn(2, 4, 4, generator=generator),
            "labels": torch.randint(3, (4, 4), generator=generator),
        }
        for _ in range(8)
    ]
    for row in rows[4:]:
        row["labels"][0] = 255
    rows = rows[::-1] if turned else rows
    model = Pixels()

    def log_p(model, row):
        logits = model(row["x"].double())["logits"]
        return -F.cross_entropy(logits, row["labels"], ignore_index=255, reduction="sum")

    fisher = estimate_fisher(model, rows, batch_size=4, fisher_type="empirical")
    oracle.assert_close(fisher.diagonal, squares(model, rows, log_p))


def test_news_are_what_was_not_there_before():
    news = News(special=(7,))

    def batch(*labels, **more):
        rows = torch.tensor(labels)
        return ExampleBatch({"labels": rows, **more}, list(range(len(rows))))

    news.note(batch([1, 2], [2, 3]).inputs)
    assert news.of(batch([3, 1], [2, 2])) is None
    assert news.of(batch([3, 1], [2, 7])) == ("a label of 7", 1)
    assert news.of(batch([-2, 0], [2, 2])) == ("labels below 0 and a label of 0", 0)
    assert news.of(batch([-100, 1], [2, 2])) is None  # missing, as is known
    mask = torch.tensor([[1, 1], [1, 0]])
    assert news.of(batch([1, 1], [2, 2], attention_mask=mask)) == ("a 0 in attention_mask", 1)


class OfColumn(nn.Module):
    """A class for each position; the loss has a column for itself, which says what counts."""

    def __init__(self, name):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.name = nn.Linear(4, 6), nn.Linear(6, 3), name

    def forward(self, x, labels=None, **columns):
        logits = self.head(torch.tanh(self.body(x)))
        if labels is None:
            return {"logits": logits}
        column = columns[self.name]
        place = torch.arange(x.shape[1])
        counts = {
            "lengths": place < column.view(len(x), -1)[:, :1],
            "prompt": place >= column.view(len(x), -1)[:, :1],
            "valid": column.bool() if column.dim() > 1 else place >= 0,
        }[self.name]
        return {"loss": F.cross_entropy(logits[counts], labels[counts]), "logits": logits}


class Rows(torch.utils.data.Dataset):
    """Examples; a plain list of these would look like a list of batches."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, n):
        return self.rows[n]


def with_column(name, number=12, whole=8):
    """Examples of which all labels count, then some of which fewer do."""
    generator = torch.Generator().manual_seed(2)
    rows = []
    for n in range(number):
        count = 5 if n < whole else 2 + n % 2
        values = {
            "lengths": torch.tensor(count),
            "prompt": torch.tensor(5 - count),
            "valid": torch.arange(5) < count,
        }
        x = torch.randn(5, 4, generator=generator)
        labels = torch.randint(0, 3, (5,), generator=generator)
        rows.append({"x": x, "labels": labels, name: values[name]})
    return rows


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["lengths", "prompt", "valid"])
def test_a_column_of_the_losss_own(name, size):
    model, rows = OfColumn(name), with_column(name)
    whole = estimate_fisher(model, Rows(rows[:8]), fisher_type="empirical", batch_size=size)
    twin = copy.deepcopy(model).double()

    def log_p(row):
        logits = twin(row["x"][None].double())["logits"][0]
        return -F.cross_entropy(logits, row["labels"], reduction="sum")

    total = {n: torch.zeros_like(p) for n, p in twin.named_parameters()}
    for row in rows[:8]:
        twin.zero_grad()
        log_p(row).backward()
        for n, p in twin.named_parameters():
            total[n] += p.grad**2 / 8
    oracle.assert_close(whole.diagonal, total, relative=1e-4)
    with pytest.raises(ValueError, match=f"batches were read .* in {name}"):
        estimate_fisher(model, Rows(rows), fisher_type="empirical", batch_size=size)


class LeavesOut(t.LlamaForCausalLM):
    """A language model whose own loss leaves out one token."""

    def forward(self, input_ids, labels=None, **options):
        found = super().forward(input_ids, **options)
        if labels is not None:
            labels = labels.masked_fill(labels == 35, -100)
            scores = found.logits[:, :-1].flatten(0, 1)
            found.loss = F.cross_entropy(scores, labels[:, 1:].flatten())
        return found


@pytest.mark.parametrize("size", [1, 4])
def test_a_token_that_a_users_language_model_leaves_out(size):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = LeavesOut(t.LlamaConfig(**sizes, vocab_size=40, intermediate_size=12)).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 20, (12, 8), generator=generator)
    ids[9, 4] = 35
    rows = [{"input_ids": row, "labels": row} for row in ids]
    estimate_fisher(model, rows[:8], batch_size=size)
    with pytest.raises(ValueError, match="a label of 35"):
        estimate_fisher(model, rows, batch_size=size)
