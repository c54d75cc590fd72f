"""The likelihood that is assumed is that of the model's own loss, or is refused."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
import transformers as t
from fisher_oracle import assert_close
from torch import nn
from torch.nn import functional as F

from hf_ewc import estimate_fisher

LABELS = torch.tensor([0, 2, 1, 0, 2, 2])
EXAMPLES = len(LABELS)


class Own(nn.Module):
    """Two layers on 4 features, with a loss of the user's own."""

    def __init__(self, outputs, loss=None, config=None, change=lambda logits: logits):
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.head = nn.Linear(4, 5), nn.Linear(5, outputs)
        self.head.bias.data.uniform_(-2, 2)
        self.loss, self.change = loss, change
        if config is not None:
            self.config = t.PretrainedConfig(problem_type=config, num_labels=outputs)

    def forward(self, x, labels=None):
        logits = self.change(self.head(torch.tanh(self.hidden(x))))
        if labels is None or self.loss is None:
            return {"logits": logits}
        return {"loss": self.loss(logits, labels), "logits": logits}


def features(*shape):
    return torch.randn(*shape, 4, generator=torch.Generator().manual_seed(1))


def loop(model, batch, terms):
    """(1/N) Σ_n Σ weight (∂ value)² in float64, `terms(logits, labels)` of one example."""
    twin = copy.deepcopy(model).double().eval()
    totals = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    counted = 0
    for n, labels in enumerate(batch["labels"]):
        inputs = {k: v[n : n + 1] for k, v in batch.items() if k != "labels"}
        inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        outputs = twin(**inputs)
        found = list(terms(outputs["logits"][0], labels))
        counted += bool(found)
        for weight, value in found:
            gradients = torch.autograd.grad(
                value, list(twin.parameters()), retain_graph=True, allow_unused=True
            )
            for total, gradient in zip(totals.values(), gradients, strict=True):
                if gradient is not None:
                    total += float(weight) * gradient**2
    return {name: total / counted for name, total in totals.items()}


def softmax(logits, label):
    yield 1.0, logits.log_softmax(-1)[label]


def softmax_expected(logits, _):
    log_p = logits.log_softmax(-1)
    return [(value.detach().exp(), value) for value in log_p]


def yes_no(logits, labels):
    logits, labels = logits.flatten(), labels.flatten().double()
    there = (labels != -100) & ~labels.isnan()
    if there.any():
        y, p = labels[there], logits[there].sigmoid()
        yield 1.0, (y * p.log() + (1 - y) * (1 - p).log()).sum()


def yes_no_expected(logits, labels):
    for logit, label in zip(logits.flatten(), labels.flatten().double(), strict=True):
        if label != -100 and not label.isnan():
            p = logit.sigmoid()
            yield p.detach(), p.log()
            yield 1 - p.detach(), (1 - p).log()


def normal(means, labels):
    means, labels = means.flatten(), labels.flatten().double()
    there = (labels != -100) & ~labels.isnan()
    if there.any():
        yield 1.0, -0.5 * (labels[there] - means[there]).square().sum()


def fisher(model, batch, fisher_type):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return estimate_fisher(model, [batch], fisher_type=fisher_type)


def bce(logits, labels):
    return F.binary_cross_entropy_with_logits(logits.reshape(labels.shape), labels.float())


@pytest.mark.parametrize("labels", [LABELS.clamp(max=1), LABELS.clamp(max=1).float()[:, None]])
@pytest.mark.parametrize("factor", [1.0, 7.0])
def test_one_logit_with_a_binary_loss_is_no_regression(labels, factor):
    model = Own(1, lambda logits, y: factor * bce(logits, y))
    batch = {"x": features(EXAMPLES), "labels": labels}
    assert_close(fisher(model, batch, "exact").diagonal, loop(model, batch, yes_no_expected))
    assert_close(fisher(model, batch, "empirical").diagonal, loop(model, batch, yes_no))


def test_one_logit_with_a_square_loss_is_a_regression_for_binary_labels_too():
    model = Own(1, lambda logits, y: F.mse_loss(logits.squeeze(-1), y.float()))
    batch = {"x": features(EXAMPLES), "labels": LABELS.clamp(max=1)}
    assert_close(fisher(model, batch, "empirical").diagonal, loop(model, batch, normal))


def test_without_a_loss_one_logit_for_binary_labels_is_not_guessed():
    batch = {"x": features(EXAMPLES), "labels": LABELS.clamp(max=1)}
    with pytest.raises(ValueError, match=r"problem_type.*log_likelihood"):
        estimate_fisher(Own(1), [batch])
    said = Own(1, config="multi_label_classification")
    assert_close(fisher(said, batch, "exact").diagonal, loop(said, batch, yes_no_expected))


def weighted(logits, labels):
    return F.cross_entropy(
        logits.flatten(0, -2), labels.flatten(), weight=torch.tensor([0.2, 1.0, 3.0])
    )


def of_each(logits, labels):
    return F.cross_entropy(logits, labels, reduction="none")


def weighted_each(logits, labels):
    weights = torch.tensor([1.0, 3.0, 2.0], dtype=logits.dtype)
    return F.cross_entropy(logits, labels, weights, reduction="none")


@pytest.mark.parametrize("fisher_type", ["empirical", "exact"])
def test_a_loss_of_each_example(fisher_type):
    batch, model = {"x": features(EXAMPLES), "labels": LABELS}, Own(3, of_each)
    terms = softmax if fisher_type == "empirical" else softmax_expected
    assert_close(fisher(model, batch, fisher_type).diagonal, loop(model, batch, terms))
    with pytest.raises(ValueError, match="not the cross-entropy"):
        fisher(Own(3, weighted_each), batch, fisher_type)


def by_position(logits, labels):
    weights = torch.linspace(0.5, 2.0, labels.numel())
    losses = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
    return (losses * weights).mean()


def smoothed(logits, labels):
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), label_smoothing=0.1)


def tempered(factor):
    def loss(logits, labels):
        return F.cross_entropy(factor * logits.flatten(0, -2), labels.flatten())

    return loss


TEMPERED = [tempered(factor) for factor in (0.5, 2, 3, 4, 8, 16)]


def focal(logits, labels):
    losses = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
    return ((1 - (-losses).exp()) ** 2 * losses).mean()


def margin(logits, labels):
    return F.multi_margin_loss(logits.flatten(0, -2), labels.flatten())


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("loss", [weighted, by_position, smoothed, *TEMPERED, focal, margin])
def test_another_loss_is_refused(loss, sequence):
    shape = (EXAMPLES, 4) if sequence else (EXAMPLES,)
    labels = (torch.arange(math.prod(shape)) * 7 // 2 % 3).view(shape)
    batch = {"x": features(*shape), "labels": labels}
    with pytest.raises(ValueError, match=r"not the cross-entropy.*\. Pass log_likelihood"):
        estimate_fisher(Own(3, loss), [batch])
    with pytest.raises(ValueError, match=r"not the cross-entropy.*problem_type.*log_likelihood"):
        estimate_fisher(Own(3, loss, config="single_label_classification"), [batch])


@pytest.mark.parametrize("classes", [4, 100, 1000])
@pytest.mark.parametrize("sequence", [False, True])
def test_a_loss_over_some_of_the_classes_is_refused(sequence, classes):
    """From a softmax over all it differs by a term that does not depend on the labels."""

    def loss(logits, labels):
        return F.cross_entropy(logits[..., :3].flatten(0, -2), labels.flatten())

    shape = (EXAMPLES, 4) if sequence else (EXAMPLES,)
    labels = (torch.arange(math.prod(shape)) * 7 // 2 % 3).view(shape)
    with pytest.raises(ValueError, match="not the cross-entropy"):
        estimate_fisher(Own(classes, loss), [{"x": features(*shape), "labels": labels}])


@pytest.mark.parametrize("first", [1, 0])
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("ignored", [-1, 2])
def test_another_ignore_index_is_named(ignored, sequence, first):
    """Also where the first examples have nothing else."""

    def loss(logits, labels):
        logits, labels = logits.flatten(0, -2), labels.flatten()
        return F.cross_entropy(logits, labels, ignore_index=ignored)

    shape = (EXAMPLES, 4) if sequence else (EXAMPLES,)
    labels = (torch.arange(math.prod(shape)) * 7 // 2 % 3).view(shape)
    labels.view(-1)[0] = first
    labels = torch.where(labels == 0, ignored, labels)
    said = rf"ignore_index is {ignored}.*Put -100.*ignore_index=-100 in the loss; or pass"
    with pytest.raises(ValueError, match=said):
        estimate_fisher(Own(3, loss), [{"x": features(*shape), "labels": labels}])


@pytest.mark.parametrize("fresh", [False, True])
def test_class_weights_are_seen_where_the_pair_has_one_class(fresh):
    model = Own(3, weighted)
    if fresh:
        model.head.weight.data.mul_(0.05)
        model.head.bias.data.zero_()
    labels = torch.zeros(EXAMPLES, dtype=torch.long)
    with pytest.raises(ValueError, match="not the cross-entropy"):
        estimate_fisher(model, [{"x": features(EXAMPLES), "labels": labels}])


def summed(logits, labels):
    return F.cross_entropy(logits, labels, reduction="sum")


def halved(logits, labels):
    return 0.3 * F.cross_entropy(logits, labels)


def with_a_term_of_its_own(logits, labels):
    return F.cross_entropy(logits, labels) + 0.01 * logits.square().sum()


@pytest.mark.parametrize("loss", [summed, halved, with_a_term_of_its_own])
def test_factors_and_terms_without_labels_change_nothing(loss):
    model = Own(3, loss)
    batch = {"x": features(EXAMPLES), "labels": LABELS}
    assert_close(fisher(model, batch, "exact").diagonal, loop(model, batch, softmax_expected))


@pytest.mark.parametrize("loss", [None, lambda p, y: F.nll_loss(p.log(), y)])
def test_probabilities_under_the_name_of_logits_are_refused(loss):
    model = Own(3, loss, change=lambda logits: logits.softmax(-1))
    with pytest.raises(ValueError, match=r"probabilities|softmax inside"):
        estimate_fisher(model, [{"x": features(EXAMPLES), "labels": LABELS}])


class InARow(Own):
    """Returns scores and what they are made of as a tuple, in either order."""

    first = "features"

    def forward(self, x):
        features = torch.tanh(self.hidden(x))
        if self.first == "features":
            return features, self.head(features)
        rows = features[:, None].expand(-1, 3, -1)
        return self.head(features), rows if self.first == "scores, then rows" else features


@pytest.mark.parametrize("first", ["scores", "features"])
def test_of_several_outputs_without_names_and_a_loss_none_is_taken_for_the_logits(first):
    model = InARow(3)
    model.first = first
    batch = {"x": features(EXAMPLES), "labels": LABELS}
    with pytest.raises(ValueError, match=r"no loss; 2 of these may be the logits.*Return a dict"):
        estimate_fisher(model, [batch])


def test_outputs_that_do_not_fit_the_labels_leave_no_doubt():
    model = InARow(3)
    model.first = "scores, then rows"
    batch = {"x": features(EXAMPLES, 2).mean(1), "labels": LABELS}
    found = estimate_fisher(model, [batch], fisher_type="empirical").diagonal
    assert_close(found, loop(Own(3), batch, softmax))


def test_log_probabilities_are_logits():
    model = Own(3, F.nll_loss, change=lambda logits: logits.log_softmax(-1))
    batch = {"x": features(EXAMPLES), "labels": LABELS}
    assert_close(fisher(model, batch, "exact").diagonal, loop(model, batch, softmax_expected))


HOLES = torch.tensor(
    [[1.0, 0, -100], [-100, -100, -100], [0, 1, 1], [1, -100, 0], [-100, 0, 1], [1, 1, 1]]
)
SEVERAL = {"multi_label_classification": (bce, yes_no), "regression": (F.mse_loss, normal)}


@pytest.mark.parametrize("own_loss", [False, True])
@pytest.mark.parametrize("missing", [-100.0, math.nan])
@pytest.mark.parametrize("kind", SEVERAL)
def test_missing_labels_count_nothing(kind, missing, own_loss):
    loss, terms = SEVERAL[kind]
    model = Own(3, loss if own_loss else None, config=None if own_loss else kind)
    labels = HOLES.masked_fill(HOLES == -100, missing)
    batch = {"x": features(EXAMPLES), "labels": labels}
    found = fisher(model, batch, "empirical")
    assert found.num_examples == EXAMPLES - 1
    assert_close(found.diagonal, loop(model, batch, terms))
    if kind != "regression":
        assert_close(fisher(model, batch, "exact").diagonal, loop(model, batch, yes_no_expected))
    one = {"x": batch["x"][:1], "labels": labels[:1]}
    drawn = estimate_fisher(model, [one], fisher_type="sampled").diagonal["head.bias"]
    assert (drawn[:2] > 0).all()
    assert drawn[2] == 0


def test_integer_labels_of_several_classes_at_once():
    labels = torch.tensor([[1, 0, 1], [0, 0, 1], [1, 1, 1], [0, 1, 0], [0, 0, 0], [1, -100, 0]])
    batch = {"x": features(EXAMPLES), "labels": labels}
    for model in (Own(3, bce), Own(3, config="multi_label_classification")):
        assert_close(fisher(model, batch, "exact").diagonal, loop(model, batch, yes_no_expected))
        assert_close(fisher(model, batch, "empirical").diagonal, loop(model, batch, yes_no))
    with pytest.raises(ValueError, match="problem_type"):
        estimate_fisher(Own(3), [batch])


def vit(**settings):
    torch.manual_seed(0)
    config = t.ViTConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        image_size=8, patch_size=4, num_labels=3, **settings,
    )  # fmt: skip
    return t.ViTForImageClassification(config).eval()


def mixed(logits, shares):
    yield 1.0, (shares.double() * logits.log_softmax(-1)).sum()


def test_mixed_labels():
    shares = torch.rand(4, 3, generator=torch.Generator().manual_seed(2)).softmax(-1)
    own = Own(3, F.cross_entropy)
    batch = {"x": features(4), "labels": shares}
    assert_close(fisher(own, batch, "empirical").diagonal, loop(own, batch, mixed))
    assert_close(fisher(own, batch, "exact").diagonal, loop(own, batch, softmax_expected))
    images = {"pixel_values": torch.randn(4, 3, 8, 8), "labels": shares}
    with pytest.raises(ValueError, match=r"mixed.*problem_type"):
        estimate_fisher(vit(), [images])
    said = vit(problem_type="single_label_classification")
    assert_close(fisher(said, images, "empirical").diagonal, loop(said, images, mixed))
    said = vit(problem_type="multi_label_classification")
    assert_close(fisher(said, images, "empirical").diagonal, loop(said, images, yes_no))


@pytest.mark.parametrize("value", [-1e4, -math.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("kinds", [(softmax, softmax_expected), (yes_no, yes_no_expected)])
def test_classes_without_probability_count_and_cost_nothing(value, kinds):
    """A head of 14 outputs with all but two masked is exact under `auto`, in one or two passes."""
    masked = torch.ones(14, dtype=torch.bool)
    masked[[3, 12]] = False
    categorical = kinds[0] is softmax
    loss = F.cross_entropy if categorical else None
    model = Own(
        14, loss, config="single_label_classification" if categorical else
        "multi_label_classification", change=lambda logits: logits.masked_fill(masked, value),
    )  # fmt: skip
    small = Own(2)
    small.hidden.load_state_dict(model.hidden.state_dict())
    small.head.weight.data, small.head.bias.data = (
        p.data[[3, 12]].clone() for p in (model.head.weight, model.head.bias)
    )
    labels = torch.tensor([3, 12, 3, 3])
    own = torch.tensor([0, 1, 0, 0])
    if not categorical:
        labels, own = F.one_hot(labels, 14).float(), F.one_hot(own, 2).float()
    passes = []
    model.head.weight.register_hook(lambda gradient: passes.append(1))
    found = estimate_fisher(model, [{"x": features(4), "labels": labels}])
    assert found.fisher_type == "exact"
    wanted = loop(small, {"x": features(4), "labels": own}, kinds[1])
    for name, value_ in wanted.items():
        actual = found.diagonal[name]
        if name.startswith("head"):
            assert actual[masked].abs().sum() == 0
            actual = actual[~masked]
        assert torch.allclose(actual.double(), value_, rtol=1e-4)


def test_auto_does_not_depend_on_what_else_the_head_has():
    for outputs in (3, 10, 30):
        masked = torch.arange(outputs) > 2
        model = Own(outputs, change=lambda logits, m=masked: logits.masked_fill(m, -1e4))
        found = estimate_fisher(model, [{"x": features(EXAMPLES), "labels": LABELS}])
        assert found.fisher_type == "exact"
    whole = estimate_fisher(Own(30), [{"x": features(EXAMPLES), "labels": LABELS}])
    assert whole.fisher_type == "sampled"


@pytest.mark.parametrize("examples", [1, 2])
@pytest.mark.parametrize("label", [0, 1, 2])
def test_class_weights_are_seen_in_the_smallest_batches(examples, label):
    """Of one class alone the weighted mean is the plain one; made-up labels are of several."""
    batch = {"x": features(examples), "labels": torch.full((examples,), label)}
    with pytest.raises(ValueError, match="not the cross-entropy"):
        estimate_fisher(Own(3, weighted), [batch])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_too(dtype):
    x, labels = features(EXAMPLES).to(dtype), LABELS.clamp(max=1)
    one = Own(1, bce).to(dtype)
    found = estimate_fisher(one, [{"x": x, "labels": labels}], fisher_type="exact").diagonal
    expected = loop(one, {"x": x, "labels": labels}, yes_no_expected)
    assert torch.allclose(found["head.bias"].double(), expected["head.bias"], rtol=0.05)
    with pytest.raises(ValueError, match="not the cross-entropy"):
        estimate_fisher(Own(3, lambda z, y: weighted(z.float(), y)).to(dtype),
                        [{"x": x, "labels": LABELS}])  # fmt: skip


COUNTS = torch.tensor([0.0, 1, 2, 3, 1, 0])
OTHERS = {
    "poisson": (lambda f, y: F.poisson_nll_loss(f, y), COUNTS),
    "poisson on yes or no": (lambda f, y: F.poisson_nll_loss(f, y), COUNTS.clamp(max=1)),
    "absolute": (lambda f, y: F.l1_loss(f, y), 3 * COUNTS - 4),
    "huber": (lambda f, y: F.smooth_l1_loss(f, y), 3 * COUNTS - 4),
    "weighted yes": (
        lambda f, y: F.binary_cross_entropy_with_logits(f, y, pos_weight=torch.tensor(3.0)),
        COUNTS.clamp(max=1),
    ),
    "a sigmoid before": (
        lambda f, y: F.binary_cross_entropy_with_logits(f.sigmoid(), y), COUNTS.clamp(max=1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_other_losses_of_one_output_are_refused(name, flat):
    loss, labels = OTHERS[name]
    model = Own(
        1, lambda f, y: loss(f.reshape(y.shape), y), change=lambda f: f.squeeze(-1) if flat else f
    )
    with pytest.raises(ValueError, match=r"nor −log p.*log_likelihood"):
        estimate_fisher(model, [{"x": features(EXAMPLES), "labels": labels}])


@pytest.mark.parametrize("loss", [bce, F.mse_loss])
def test_outputs_without_an_axis_of_their_own(loss):
    model = Own(1, loss, change=lambda f: f.squeeze(-1))
    batch = {"x": features(EXAMPLES), "labels": COUNTS.clamp(max=1)}
    terms = yes_no if loss is bce else normal
    assert_close(fisher(model, batch, "empirical").diagonal, loop(model, batch, terms))


@pytest.mark.parametrize("length", [5, 3])
def test_classes_on_the_second_axis(length):
    """As `cross_entropy` has them; also where there are as many positions as classes."""
    model = Own(3, F.cross_entropy, change=lambda logits: logits.transpose(1, 2))
    batch = {"x": features(4, length), "labels": torch.arange(4 * length).view(4, -1) // 2 % 3}
    expected = loop(
        model, batch, lambda z, y: [(1.0, z.log_softmax(0).gather(0, y[None]).sum())]
    )  # fmt: skip
    assert_close(fisher(model, batch, "empirical").diagonal, expected)


def test_where_every_label_is_missing_no_example_counts():
    batch = {"x": features(3), "labels": torch.full((3,), math.nan)}
    for model in (Own(1), Own(1, bce), Own(1, F.mse_loss)):
        with pytest.raises(ValueError, match="No usable examples"):
            estimate_fisher(model, [batch])


@pytest.mark.parametrize("shift", [0, 1])
def test_outputs_that_begin_with_those_of_an_image(shift):
    """They have no labels; which is which is known by the loss alone."""

    def loss(logits, labels):
        logits = logits[:, 2 - shift : logits.shape[1] - shift]
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    model = Own(3, loss)
    labels = torch.tensor([[0, 1, 2, 2], [1, -100, 0, -100], [2, 2, -100, 1]])
    batch = {"x": features(3, 6), "labels": labels}

    def terms(logits, y):
        log_p = logits.log_softmax(-1)[2 - shift : len(logits) - shift]
        yield 1.0, sum(row[c] for row, c in zip(log_p, y, strict=True) if c >= 0)

    assert_close(fisher(model, batch, "empirical").diagonal, loop(model, batch, terms))
    with pytest.raises(ValueError, match="no head that is known"):
        estimate_fisher(Own(3), [batch])


def test_an_estimate_that_goes_over_to_single_examples_after_the_loss_was_asked():
    class OnlyAlone(Own):
        def forward(self, x, labels=None):
            if torch.is_grad_enabled() and len(x) > 1:
                raise RuntimeError("view size is not compatible with input tensor's size")
            return super().forward(x, labels)

    batch = {"x": features(4), "labels": torch.tensor([0, 1, 2, 0])}
    model = OnlyAlone(3, F.cross_entropy)
    with pytest.warns(UserWarning, match="one by one"):
        found = estimate_fisher(model, [batch], fisher_type="empirical").diagonal
    assert_close(found, loop(Own(3), batch, softmax))


@pytest.mark.parametrize("classes", [50, 200])
@pytest.mark.parametrize("order", [1, -1])
def test_labels_that_a_loss_leaves_out_are_seen_wherever_they_stand(order, classes):
    """The texts with padding are last, or first."""

    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embedding, self.head = nn.Embedding(classes, 6), nn.Linear(6, classes)

        def forward(self, input_ids, labels=None):
            logits = self.head(torch.tanh(self.embedding(input_ids)))
            if labels is None:
                return {"logits": logits}
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=0)
            return {"loss": loss, "logits": logits}

    rows = []
    for i in range(6):
        ids = torch.randint(1, classes, (4,), generator=torch.Generator().manual_seed(i))
        ids[4 if i < 2 else 1 :] = 0
        rows.append({"input_ids": ids, "labels": ids.clone()})
    with pytest.raises(ValueError, match=r"cross-entropy of its logits but .* ignore_index is 0"):
        estimate_fisher(Tagger(), rows[::order], fisher_type="empirical")


def raw_score(logits, labels):
    return (logits.mean(-1) - logits.gather(-1, labels[:, None])[:, 0]).mean()


@pytest.mark.parametrize("loss", [F.multi_margin_loss, raw_score])
@pytest.mark.parametrize("seed", range(4))
def test_margins_that_are_all_active_are_no_regularizer_beside_a_softmax(seed, loss):
    """They differ from cross-entropy by log Σ exp of the logits, which no label changes either."""
    model = Own(3, loss)
    torch.manual_seed(seed)
    nn.init.normal_(model.head.weight, std=0.05)
    nn.init.zeros_(model.head.bias)
    batch = {"x": features(EXAMPLES), "labels": LABELS}
    with pytest.raises(ValueError, match="is not the cross-entropy of its logits"):
        estimate_fisher(model, [batch])


class Changing(Own):
    """Dropout that stays on, or a mean that each forward moves."""

    def __init__(self, moves):
        super().__init__(3, F.cross_entropy)
        self.moves = moves
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x, labels=None):
        if self.moves:
            self.mean.mul_(0.9).add_(0.1 * x.mean(0))
            return super().forward(x - self.mean, labels)
        return super().forward(F.dropout(x, 0.5, training=True), labels)


@pytest.mark.parametrize("moves", [False, True])
def test_outputs_that_change_from_call_to_call_are_not_called_margins(moves):
    batch = {"x": features(EXAMPLES), "labels": LABELS}
    with pytest.raises(ValueError, match="other logits when it is called again"):
        estimate_fisher(Changing(moves), [batch])


class TwoHeads(nn.Module):
    """Trained by the labels of both heads, of which the second's have a name of their own."""

    def __init__(self, weight=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 2)
        self.weight = weight

    def forward(self, x, labels=None, sentiment=None):
        hidden = torch.tanh(self.body(x))
        found = {"logits": self.first(hidden), "second": self.second(hidden)}
        if labels is not None:
            further = F.cross_entropy(found["second"], sentiment)
            loss = F.cross_entropy(found["logits"], labels) + self.weight * further
            found = {"loss": loss, **found}
        return found


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("weight", [1.0, 0.1])
def test_a_second_head_that_only_the_loss_shows(weight, batch_size):
    rows = [
        {"x": row, "labels": label, "sentiment": torch.tensor(n // 2 % 2)}
        for n, (row, label) in enumerate(zip(features(EXAMPLES), LABELS, strict=True))
    ]
    with pytest.raises(ValueError, match="holds sentiment besides its labels"):
        estimate_fisher(TwoHeads(weight), rows, batch_size=batch_size)


class Regularized(Own):
    """Its loss has a term that is none of labels, such as a router's."""

    def forward(self, x, labels=None):
        found = super().forward(x, labels)
        if "loss" in found:
            found["loss"] = found["loss"] + torch.tanh(self.hidden(x)).square().mean()
        return found


def test_a_term_of_the_inputs_is_none_of_labels():
    model = Regularized(3, F.cross_entropy)
    batch = {"x": features(EXAMPLES), "labels": LABELS}
    found = estimate_fisher(model, [batch], fisher_type="empirical")
    expected = loop(model, batch, lambda z, y: [(1.0, z.log_softmax(-1)[y])])
    assert_close(found.diagonal, expected, relative=1e-4)


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("loss", [F.smooth_l1_loss, F.huber_loss])
def test_a_loss_that_is_quadratic_near_the_labels_alone(loss, spread):
    model = Own(1, lambda z, y: loss(z.view(-1), y))
    with torch.no_grad():
        near = model(features(EXAMPLES))["logits"].view(-1)
    labels = near + spread * torch.tensor([0.5, -0.4, 0.3, -0.5, 0.2, 0.4])
    with pytest.raises(ValueError, match="is not the"):
        estimate_fisher(model, [{"x": features(EXAMPLES), "labels": labels}])
    estimate_fisher(
        Own(1, lambda z, y: F.mse_loss(z.view(-1), y)),
        [{"x": features(EXAMPLES), "labels": labels}],
    )


@pytest.mark.parametrize("values", [[1, 0, 1], [0, 0, 0], [1, 1, 1]])
def test_numbers_of_classes_that_are_no_shares(values):
    """Where the model has no loss, or none that takes them."""
    labels = torch.tensor([values] * EXAMPLES)
    for model in (Own(3, config="single_label_classification"), Own(3, F.nll_loss)):
        if model.loss is not None:
            model.config = t.PretrainedConfig(problem_type="single_label_classification")
        with pytest.raises(ValueError, match="do not sum to 1 in each row"):
            estimate_fisher(model, [{"x": features(EXAMPLES), "labels": labels}])


def test_logits_of_several_heads_in_a_tuple():
    model = Own(3, change=lambda logits: (logits, logits))
    with pytest.raises(ValueError, match="'logits' are a tuple"):
        estimate_fisher(model, [{"x": features(EXAMPLES), "labels": LABELS}])
