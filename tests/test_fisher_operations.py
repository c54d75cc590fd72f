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


class MakesALayer(Model):
    """Changes a layer for another with the same weights, as BigBird does for short texts."""

    def encode(self, ids):
        other = nn.Linear(4, 4)
        other.weight, other.bias = self.inner.weight, self.inner.bias
        self.inner = other
        return self.inner(self.embedding(ids))


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
        WrittenInPlace, MakesALayer, SelectedColumns, Repeated, Routed, RoutedToNone, Masked,
        Blocks, Indexed, Einsum, LearntQueries, OffGraph,
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


class TimeFirst(Model):
    """Transposed to (T, B, D), mapped, and transposed back."""

    def encode(self, ids):
        hidden = self.embedding(ids.transpose(0, 1))
        hidden = self.inner(hidden) * self.token + self.inner.bias
        hidden = nn.functional.layer_norm(hidden, (4,), self.inner.bias)
        rows = self.inner(hidden.contiguous().view(-1, 4)).view(*hidden.shape)
        return torch.einsum("tbd,nd->tbn", rows, self.inner.weight).transpose(0, 1)


class MultiheadAttention(Model):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)

    def encode(self, ids):
        hidden = self.embedding(ids).transpose(0, 1)
        padding = ids == 0
        return self.attention(hidden, hidden, hidden, key_padding_mask=padding)[0].permute(1, 0, 2)


class BatchFirstAttention(MultiheadAttention):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, add_bias_kv=True)

    def encode(self, ids):
        hidden = self.embedding(ids)
        return self.attention(hidden, hidden, hidden, need_weights=False)[0]


class RelativePositions(Model):
    """As in XLNet: what is shared takes part with an axis of examples of its own."""

    def encode(self, ids):
        hidden = self.embedding(ids.t())
        places = torch.arange(4, dtype=hidden.dtype)[:, None, None] * self.token[0, 0].detach()
        places = places.expand(-1, ids.shape[0], -1)
        keys = torch.einsum("ibh,hnd->ibnd", places, self.table.permute(1, 0, 2))
        queries = torch.einsum("ibh,hnd->ibnd", hidden, self.table.permute(1, 0, 2))
        scores = torch.einsum("ibnd,jbnd->bnij", queries + self.head.bias, keys)
        return self.inner(hidden.permute(1, 0, 2)) + scores.softmax(-1).mean(1)


class Packed(Model):
    """All examples in a leading axis of one."""

    def encode(self, ids):
        hidden = self.inner(self.embedding(ids).reshape(1, -1, 4))
        hidden = hidden * self.token + self.inner.bias
        heads = self.inner(hidden).view(1, -1, 2, 2).transpose(1, 2)
        parts = torch.split(heads, [ids.shape[1]] * ids.shape[0], dim=2)
        mixed = [nn.functional.scaled_dot_product_attention(x, x, x) for x in parts]
        joined = torch.cat(mixed, dim=2).transpose(1, 2).reshape(-1, 4)
        return self.inner(joined).view(*ids.shape, 4)


class Counted(Model):
    """Repeated as often as the example says."""

    def encode(self, ids):
        counts = (ids > 0).sum(1)
        examples = torch.arange(ids.shape[0]).repeat_interleave(counts)
        rows = self.inner(self.embedding(ids[:, 0]).repeat_interleave(counts, dim=0))
        rows = rows * self.token[0] + self.embedding(ids[:, 1].repeat_interleave(counts))
        sums = torch.zeros(ids.shape[0], 4, dtype=rows.dtype).index_add(0, examples, rows)
        return self.inner(sums)[:, None]


class EachByItself(Model):
    """Taken apart, each with a learnt row put in, and stacked again."""

    def encode(self, ids):
        hidden = self.embedding(ids)
        rows = []
        for n in range(ids.shape[0]):
            own = self.inner(hidden[n])
            own = torch.cat([own, self.token[0]], dim=0) * self.inner.bias
            rows.append(torch.cat([own, self.token[0].expand(5, -1)], dim=-1)[:, 1:5])
        return self.inner(torch.stack(rows, dim=0))


class Padded(Model):
    """Examples of their own lengths, one after another."""

    def encode(self, ids):
        hidden = self.embedding(ids)
        lengths = (ids > 0).sum(1).tolist()
        own = [torch.cat([x[:n], self.token[0]]) for x, n in zip(hidden, lengths, strict=True)]
        rows = self.inner(torch.cat(own, dim=0))
        means = [x.mean(0) for x in rows.split([n + 1 for n in lengths])]
        return self.inner(torch.stack(means))[:, None]


class WrittenInto(Model):
    def encode(self, ids):
        hidden = self.embedding(ids) * 1
        hidden[ids == 0] = self.token[0, 0]
        hidden[:, 1] = self.inner.bias
        places = torch.zeros(*ids.shape, 4, dtype=hidden.dtype)
        places[ids > 3] = self.inner.bias
        return self.inner(hidden) + places


class Sampled(Model):
    """A learnt map, read at places of the examples, in rows of their own and packed."""

    def encode(self, ids):
        grid = torch.stack([ids, ids.flip(1)], -1).to(self.token.dtype) / 9 - 0.5
        learnt = self.inner.weight.view(1, 4, 2, 2)
        own = nn.functional.grid_sample(learnt, grid[:, :, None], align_corners=False)
        packed = nn.functional.grid_sample(
            learnt, grid.view(1, -1, 1, 2), mode="bicubic", align_corners=False
        )
        packed = packed.squeeze(0).squeeze(-1).permute(1, 0)
        return own.squeeze(-1).transpose(1, 2) + self.inner(packed).view(*ids.shape, 4)


class AddedProduct(Model):
    def encode(self, ids):
        hidden = self.embedding(ids)
        scores = torch.baddbmm(
            self.inner.weight.expand(ids.shape[0], -1, -1), hidden, hidden.transpose(1, 2), alpha=2
        )
        weight = self.inner.weight[None].expand(ids.shape[0], -1, -1)
        return torch.baddbmm(hidden, scores, weight, beta=0.5)


class EvenKernel(Model):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv1d(4, 4, 2, padding="same")
        self.dilated = nn.Conv2d(1, 1, (4, 2), padding="same", dilation=(1, 3))

    def encode(self, ids):
        hidden = self.convolution(self.embedding(ids).transpose(1, 2)).transpose(1, 2)
        return self.dilated(hidden[:, None])[:, 0]


@pytest.mark.parametrize(
    "kind",
    [
        TimeFirst, MultiheadAttention, BatchFirstAttention, RelativePositions, Packed, Counted,
        EachByItself, Padded, WrittenInto, Sampled, AddedProduct, EvenKernel,
    ],
)  # fmt: skip
@pytest.mark.parametrize("lengths", [(2, 2, 3, 1), (4, 2, 3, 1, 2), (1, 3)])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_examples_on_any_axis(kind, lengths):
    model, batch = kind(), batch_of(lengths)
    fisher = estimate_fisher(model, [batch], fisher_type="empirical", fallback="error")
    oracle.assert_close(fisher.diagonal, loop(model, batch))
