"""Ways of writing a model down that the one-backward Fisher must not take for another."""

from __future__ import annotations

import copy
import doctest

import fisher_oracle as oracle
import pytest
import torch
from torch import Tensor, nn

from hf_ewc import estimate_fisher
from hf_ewc.fisher.operations import covers


class Model(nn.Module):
    """Embeds (B, T) token ids and classifies them; `forward` is what each test is about."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(9, 4)
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.table = nn.Parameter(torch.randn(2, 4, 3))
        self.token = nn.Parameter(torch.randn(1, 1, 4))

    def forward(self, ids: Tensor, labels: Tensor | None = None):
        return {"logits": self.head(self.encode(ids).flatten(1, -2).mean(1))}

    def encode(self, ids: Tensor) -> Tensor:
        raise NotImplementedError


def batch_of(lengths: tuple[int, ...]) -> dict[str, Tensor]:
    """Ids (B, 4), zero after each length."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 9, (len(lengths), 4), generator=generator)
    for n, length in enumerate(lengths):
        ids[n, length:] = 0
    return {"ids": ids, "labels": torch.arange(len(lengths)) % 3}


def loop(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """(1/N) Σ_n (∂ log p(y_n | x_n))², one example at a time in float64."""
    twin = copy.deepcopy(model).double()
    parameters = dict(twin.named_parameters())
    totals = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for n, label in enumerate(batch["labels"]):
        value = twin(batch["ids"][n : n + 1])["logits"][0].log_softmax(0)[label]
        gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                totals[name] += gradient**2 / len(batch["labels"])
    return totals


class WrittenInPlace(Model):
    def encode(self, ids):
        hidden = self.inner(self.embedding(ids))
        hidden[ids == 0] = 0
        looked_up = self.embedding(ids)
        looked_up *= 2
        return hidden + looked_up


class SelectedColumns(Model):
    """Rows of another axis than the first, chosen by indices."""

    def encode(self, ids):
        hidden = self.embedding(ids)
        order = torch.arange(3, -1, -1)
        return self.inner(torch.index_select(hidden, 1, order)) * self.inner(hidden[:, order])


class Repeated(Model):
    """A learnt token for each example, copied and then flattened."""

    def encode(self, ids):
        token = self.token.repeat(ids.shape[0], 2, 1).view(2 * ids.shape[0], 4)
        positions = torch.arange(2).repeat(ids.shape[0], 1).view(-1)
        token = token * positions[:, None]
        return self.inner(self.embedding(ids)) + token.view(-1, 2, 4).sum(1, keepdim=True)


class Routed(Model):
    """As in mixtures of experts: rows picked by the data."""

    experts = 2

    def encode(self, ids):
        hidden = self.embedding(ids).flatten(0, 1)
        output = torch.zeros_like(hidden)
        choice = ids.flatten().clamp(max=1)
        for expert in range(self.experts):
            (rows,) = torch.where(choice == expert)
            picked = hidden[None, rows].reshape(-1, 4)
            output.index_add_(0, rows, self.inner(picked) * (1 + expert))
        return output.view(*ids.shape, 4)


class RoutedToNone(Routed):
    """An expert without any row."""

    experts = 3


class Masked(Model):
    """Positions picked by a mask; of two examples as many each, of others not."""

    def encode(self, ids):
        hidden = self.embedding(ids)
        positions = torch.nonzero(ids)[:, 1]
        output = torch.zeros_like(hidden)
        output[ids > 0] = self.inner(hidden[ids > 0]) * self.table[0, :, 0] + positions[:, None]
        return output


class Blocks(Model):
    """Rows sorted by expert, split, multiplied block by block and put back."""

    def encode(self, ids):
        hidden = self.embedding(ids).flatten(0, 1)
        order = ids.flatten().argsort(stable=True)
        sizes = [(ids == 0).sum().item(), (ids > 0).sum().item()]
        first, second = hidden[order].split(sizes, dim=0)
        joined = torch.cat([self.inner(first), self.inner(second) * 2])
        return torch.zeros_like(hidden).index_add(0, order, joined).view(*ids.shape, 4)


class Indexed(Model):
    """Rows (example, position) picked with two index tensors that broadcast."""

    def encode(self, ids):
        hidden = self.embedding(ids)
        examples = torch.arange(ids.shape[0])[:, None]
        return self.inner(hidden[examples, ids.argsort(1)[:, :2]])


class Einsum(Model):
    def encode(self, ids):
        hidden = self.embedding(ids)
        heads = torch.einsum("btd,hdk->bhtk", hidden, self.table)
        paired = torch.einsum("bhtk,hdk->bthd", heads, self.table)
        tokens = torch.einsum("brd,btd->btr", self.token.expand(ids.shape[0], -1, -1), hidden)
        return torch.einsum("btd,nd->btn", paired.sum(2), self.inner.weight) * tokens


class LearntQueries(Model):
    def encode(self, ids):
        hidden = self.embedding(ids).unsqueeze(1)
        query = self.inner(self.token.repeat(ids.shape[0], 1, 1)).unsqueeze(1)
        return nn.functional.scaled_dot_product_attention(query, hidden, hidden).squeeze(1)


class OffGraph(Model):
    """A use of a weight that the objective does not depend on."""

    def encode(self, ids):
        hidden = self.embedding(ids)
        return self.inner(hidden.tanh()) + self.inner(hidden).detach()


@pytest.mark.parametrize(
    "kind",
    [
        WrittenInPlace, SelectedColumns, Repeated, Routed, RoutedToNone, Masked, Blocks, Indexed,
        Einsum, LearntQueries, OffGraph,
    ],
)  # fmt: skip
@pytest.mark.parametrize("lengths", [(2, 2, 3, 1), (4, 2, 3, 1, 2), (1, 3)])
def test_is_exact(kind, lengths):
    """Also where the first two examples alone would not show a mistake."""
    model, batch = kind(), batch_of(lengths)
    fisher = estimate_fisher(model, [batch], fisher_type="empirical", fallback="error")
    oracle.assert_close(fisher.diagonal, loop(model, batch))


class Assembled(Model):
    """A weight written into zeros, and one that is made a parameter anew."""

    def encode(self, ids):
        weight = torch.zeros(4, 4, dtype=self.inner.bias.dtype)
        weight[torch.arange(4), torch.arange(4).flip(0)] = self.inner.bias
        frozen = nn.Parameter(self.embedding.weight.detach()[:4] + 1)
        scale = self.token / (frozen + self.inner.weight).norm(dim=1).detach()
        return nn.functional.linear(self.embedding(ids), weight) * scale


class AnyLeadingAxes(Model):
    def encode(self, ids):
        return torch.einsum("...d,kd->...k", self.embedding(ids), self.inner.weight)


@pytest.mark.parametrize("kind", [Assembled, AnyLeadingAxes])
@pytest.mark.parametrize("examples", [2, 4, 5])
def test_weights_in_other_clothes(kind, examples):
    model, batch = kind(), batch_of((4, 2, 3, 1, 2)[:examples])
    fisher = estimate_fisher(model, [batch], fisher_type="empirical", fallback="error")
    oracle.assert_close(fisher.diagonal, loop(model, batch))


@torch.library.custom_op("hf_ewc_test::gate", mutates_args=())
def gate(x: Tensor, scale: Tensor) -> Tensor:
    return x * scale


@torch.library.custom_op("hf_ewc_test::linear", mutates_args=())
def linear(x: Tensor, scale: Tensor) -> Tensor:
    """No linear map in spite of its name."""
    return x * scale


def gradients_of_product(ctx, gradient):
    x, scale = ctx.saved_tensors
    return gradient * scale, (gradient * x).sum_to_size(scale.shape)


for operation in (gate, linear):
    operation.register_autograd(
        gradients_of_product,
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )


class OwnOperation(Model):
    operation = torch.ops.hf_ewc_test.gate

    def encode(self, ids):
        return self.operation(self.embedding(ids), self.inner.bias)


def test_a_handler_of_ones_own():
    """The example of the documentation, run as it stands for another operation's name."""
    model, batch = OwnOperation(), batch_of((2, 4, 3))
    with pytest.raises(ValueError, match=r"inner.bias \(in gate\)"):
        estimate_fisher(model, [batch], fisher_type="empirical", fallback="error")
    text = covers.__doc__.replace("mylib", "hf_ewc_test")
    (example,) = [doctest.DocTestParser().get_doctest(text, {"torch": torch}, "covers", None, 0)]
    assert doctest.DocTestRunner().run(example, clear_globs=False) == (0, 2)
    fisher = estimate_fisher(model, [batch], fisher_type="empirical", fallback="error")
    oracle.assert_close(fisher.diagonal, loop(model, batch))


def test_an_operation_of_ones_own_is_not_taken_for_torchs_by_its_name():
    model, batch = OwnOperation(), batch_of((2, 4, 3))
    model.operation = torch.ops.hf_ewc_test.linear
    with pytest.raises(ValueError, match=r"inner.bias \(in linear\)"):
        estimate_fisher(model, [batch], fisher_type="empirical", fallback="error")
