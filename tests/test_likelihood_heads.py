"""Heads of `transformers` beside classification: each against its own loss, or refused with why."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
import transformers as t
from architectures import DECODER, SMALL, classes, images, language, tokens, translation
from fisher_oracle import assert_close

from hf_ewc import estimate_fisher

SPEECH = dict(
    SMALL, conv_dim=(8,), conv_stride=(4,), conv_kernel=(4,), num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2, classifier_proj_size=6, tdnn_dim=(8, 12),
    tdnn_kernel=(2, 1), tdnn_dilation=(1, 1), xvector_output_dim=6, pad_token_id=0,
)  # fmt: skip


def made(kind, config):
    """A model of some weight, in eval mode."""
    torch.manual_seed(0)
    model = kind(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn(parameter.shape, generator=generator)
    return model


def by_its_own_loss(model, batch, count):
    """(1/N) Σ_n (∂ count_n · loss_n)² in float64: a loss is a mean over its labels."""
    twin = copy.deepcopy(model).double()
    parameters = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    totals = {name: torch.zeros_like(p) for name, p in parameters.items()}
    examples = len(next(iter(batch.values())))
    for n in range(examples):
        one = {k: v[n : n + 1] for k, v in batch.items()}
        one = {k: v.double() if v.is_floating_point() else v for k, v in one.items()}
        value = twin(**one).loss * count(one)
        gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
        for total, gradient in zip(totals.values(), gradients, strict=True):
            if gradient is not None:
                total += gradient**2 / examples
    return totals


def check(model, batch, count):
    with warnings.catch_warnings():  # some of these models' operations take the slow way
        warnings.filterwarnings("ignore", message=".*run one by one")
        warnings.filterwarnings("ignore", message="Version v4.12.0", category=FutureWarning)
        _check(model, batch, count)


def _check(model, batch, count):
    found = estimate_fisher(model, [batch], fisher_type="empirical")
    assert_close(found.diagonal, by_its_own_loss(model, batch, count))


def labelled(one):
    return int((one["labels"] != -100).sum())


def waves(examples=3, length=32):
    sounds = torch.randn(examples, length, generator=torch.Generator().manual_seed(3))
    mask = torch.arange(length) < torch.tensor([32, 24, 28, 32])[:examples, None]
    return {"input_values": sounds * mask, "attention_mask": mask.long()}


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (t.PegasusForCausalLM, t.PegasusConfig),
        (t.MarianForCausalLM, t.MarianConfig),
        (t.BigBirdPegasusForCausalLM, t.BigBirdPegasusConfig),
    ],
)
@pytest.mark.parametrize("fresh", [True, False])
def test_a_decoder_whose_loss_is_not_shifted(kind, config, fresh):
    """Nearly uniform outputs too: both losses are then within a thousandth of each other."""
    small = dict(
        vocab_size=23, d_model=8, decoder_layers=1, decoder_ffn_dim=12, decoder_attention_heads=2,
        encoder_layers=1, encoder_ffn_dim=12, encoder_attention_heads=2, pad_token_id=0,
        max_position_embeddings=16, decoder_start_token_id=0, forced_eos_token_id=None,
        eos_token_id=1, is_decoder=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = kind(config(**small)).eval() if fresh else made(kind, config(**small))
    check(model, language(3), labelled)


def test_a_loss_of_several_tokens_ahead_is_refused():
    config = t.ProphetNetConfig(
        vocab_size=23, hidden_size=8, num_decoder_layers=1, num_decoder_attention_heads=2,
        decoder_ffn_dim=12, max_position_embeddings=16, is_decoder=True,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"not the cross-entropy.*log_likelihood"):
        estimate_fisher(made(t.ProphetNetForCausalLM, config), [language(3)])


def test_a_margin_on_embeddings_is_refused():
    model = made(t.Wav2Vec2ForXVector, t.Wav2Vec2Config(**SPEECH, num_labels=3))
    with pytest.raises(ValueError, match="margins"):
        estimate_fisher(model, [{**waves(), "labels": classes(3)}])


@pytest.mark.parametrize("dtype", [torch.float32, torch.long])
def test_detection_of_replaced_tokens_leaves_padding_out(dtype):
    model = made(t.ElectraForPreTraining, t.ElectraConfig(**SMALL, embedding_size=6))
    batch = tokens(4)
    batch["labels"] = (batch["input_ids"] % 2).to(dtype)
    found = estimate_fisher(model, [batch], fisher_type="empirical")
    floats = {**batch, "labels": batch["labels"].float()}
    count = lambda one: one["attention_mask"].sum()  # noqa: E731
    assert_close(found.diagonal, by_its_own_loss(model, floats, count))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_ctc(reduction):
    config = t.Wav2Vec2Config(**SPEECH, ctc_loss_reduction=reduction)
    model = made(t.Wav2Vec2ForCTC, config)
    # As many labels as there are frames in the last, and a repeated one.
    labels = torch.tensor([[5, 6, 7], [4, 4, -100], [8, -100, -100]])
    count = labelled if reduction == "mean" else lambda one: 1
    check(model, {**waves(), "labels": labels}, count)
    with pytest.raises(ValueError, match=r"CTC.*'sampled'"):
        estimate_fisher(model, [{**waves(), "labels": labels}], fisher_type="exact")


def test_ctc_draws_label_sequences_from_the_model():
    """Against all 3⁴ paths of four frames, within five standard errors."""
    small = {**SPEECH, "vocab_size": 3}
    model = made(t.Wav2Vec2ForCTC, t.Wav2Vec2Config(**small))
    sound = {"input_values": waves(1, 16)["input_values"]}
    batch = {**sound, "labels": torch.tensor([[1, 2]])}
    weight = model.lm_head.weight
    log_p = model(**sound).logits[0].log_softmax(-1)
    assert log_p.shape[0] == 4
    sequences: dict[tuple[int, ...], torch.Tensor] = {}
    for path in itertools.product(range(3), repeat=4):
        own = tuple(k for k, _ in itertools.groupby(path) if k != 0)
        p = log_p[range(4), list(path)].sum().exp()
        sequences[own] = sequences.get(own, 0) + p
    wanted = sum(
        p.detach() * torch.autograd.grad(p.log(), weight, retain_graph=True)[0] ** 2
        for p in sequences.values()
    )
    draws = torch.stack(
        [
            estimate_fisher(
                model, [batch], fisher_type="sampled", seed=seed, parameters=["lm_head.weight"]
            ).diagonal["lm_head.weight"].sum()
            for seed in range(300)
        ]
    )  # fmt: skip
    assert abs(draws.mean() - wanted.sum()) < 5 * draws.std() / 300**0.5
    assert estimate_fisher(model, [batch]).fisher_type == "sampled"


@pytest.mark.parametrize("zero", [True, False])
def test_ctc_labels_that_cannot_be_aligned(zero):
    """They count in no loss with `ctc_zero_infinity`, and in no draw of labels."""
    model = made(t.Wav2Vec2ForCTC, t.Wav2Vec2Config(**SPEECH, ctc_zero_infinity=zero))
    frames = model(**waves()).logits.shape[1]
    labels = torch.full((3, frames), -100)
    labels[:, 0] = 5
    labels[1] = 4
    batch = {**waves(), "labels": labels}
    if not zero:
        with pytest.raises(ValueError, match=r"inf .*more labels.*ctc_zero_infinity"):
            estimate_fisher(model, [batch], fisher_type="sampled")
        return
    with pytest.raises(ValueError, match=rf"The {frames} labels .* its \d frames.*'sampled'"):
        estimate_fisher(model, [batch], fisher_type="empirical")
    found = estimate_fisher(model, [batch], fisher_type="sampled")
    possible = {**batch, "labels": labels[:1].expand(3, -1)}
    expected = estimate_fisher(model, [possible], fisher_type="sampled")
    assert_close(found.diagonal, {n: v.double() for n, v in expected.diagonal.items()})


def test_classes_of_frames():
    model = made(t.Wav2Vec2ForAudioFrameClassification, t.Wav2Vec2Config(**SPEECH, num_labels=3))
    batch = waves()
    frames = model(**batch).logits.shape[1]
    numbers = torch.arange(3 * frames).view(3, frames) * 5 // 3 % 3
    for labels in (torch.nn.functional.one_hot(numbers, 3), torch.eye(3)[numbers]):
        check(model, {**batch, "labels": labels}, lambda one: frames)


def segformer(**settings):
    config = t.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[1, 1], hidden_sizes=[8, 8],
        patch_sizes=[3, 3], strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[1, 1],
        decoder_hidden_size=8, **settings,
    )  # fmt: skip
    return made(t.SegformerForSemanticSegmentation, config)


def pixels(classes_, ignored=255):
    labels = torch.arange(3 * 16 * 16).view(3, 16, 16) // 5 % classes_
    labels[:, :, 10:] = 1
    labels[1, 3:9] = ignored
    return {"pixel_values": images(3, 16)["pixel_values"], "labels": labels}


def test_classes_of_pixels():
    check(segformer(num_labels=3), pixels(3), lambda one: (one["labels"] != 255).sum())
    check(segformer(num_labels=1), pixels(2), lambda one: one["labels"].numel())


@pytest.mark.parametrize("ignored", [0, -1])
def test_another_label_for_pixels_that_are_left_out(ignored):
    model, batch = segformer(num_labels=3, semantic_loss_ignore_index=ignored), pixels(3, ignored)
    batch["labels"][:, 3:6] = ignored
    said = rf"ignore_index is {ignored}.*model.config.semantic_loss_ignore_index = -100"
    with pytest.raises(ValueError, match=said):
        estimate_fisher(model, [batch])
    model.config.semantic_loss_ignore_index = -100
    labels = batch["labels"].masked_fill(batch["labels"] == ignored, -100)
    check(model, {**batch, "labels": labels}, labelled)


def test_contrasts_are_refused_and_why():
    vision = dict(SMALL, image_size=8, patch_size=4)
    model = made(t.CLIPModel, t.CLIPConfig(vision_config=vision, text_config=dict(SMALL)))
    batch = {**tokens(3), "pixel_values": images(3)["pixel_values"], "return_loss": True}
    with pytest.raises(ValueError, match=r"softmax over the other.*log_likelihood"):
        estimate_fisher(model, [batch])


def test_answers_by_a_beam_are_refused_and_why():
    config = t.XLNetConfig(vocab_size=23, d_model=8, n_layer=1, n_head=2, d_inner=12)
    model = made(t.XLNetForQuestionAnswering, config)
    batch = {**tokens(3), "start_positions": classes(3), "end_positions": classes(3) + 1}
    with pytest.raises(ValueError, match=r"beam.*log_likelihood"):
        estimate_fisher(model, [batch])


def test_answers_in_a_tuple():
    batch = {**tokens(3), "start_positions": classes(3), "end_positions": classes(3) + 1}
    named = made(t.BertForQuestionAnswering, t.BertConfig(**SMALL))
    model = made(t.BertForQuestionAnswering, t.BertConfig(**SMALL))
    model.config.return_dict = False
    assert isinstance(model(**batch), tuple)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = estimate_fisher(model, [batch], fisher_type="empirical")
    assert_close(found.diagonal, by_its_own_loss(named, batch, lambda one: 2))  # a mean of two
    config = t.XLNetConfig(vocab_size=23, d_model=8, n_layer=1, n_head=2, d_inner=12)
    model = made(t.XLNetForQuestionAnswering, config)
    model.config.return_dict = False
    with pytest.raises(ValueError, match="no 'logits'"):
        estimate_fisher(model, [batch])


def bert_to_bert(start):
    config = t.EncoderDecoderConfig.from_encoder_decoder_configs(
        t.BertConfig(**SMALL), t.BertConfig(**SMALL), decoder_start_token_id=start, pad_token_id=0
    )
    return made(t.EncoderDecoderModel, config)


@pytest.mark.parametrize("start", [0, 1])
def test_what_the_decoder_gets_is_what_the_labels_make_of_it(start):
    """Its mask as well: decoder positions that hold the pad token are not attended to."""
    batch = translation(3)
    batch["labels"][0, 1] = -100
    check(bert_to_bert(start), batch, labelled)


@pytest.mark.parametrize("kind", ["TokenClassification", "SequenceClassification"])
def test_decoder_inputs_that_do_not_come_from_labels(kind):
    side = dict(DECODER, num_hidden_layers=1, head_dim=4, layer_types=["full_attention"])
    vision = dict(
        hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        image_size=8, patch_size=4,
    )  # fmt: skip
    config = t.T5Gemma2Config(
        encoder=dict(text_config=side, vision_config=vision, mm_tokens_per_image=4),
        decoder=side, eoi_token_index=20, image_token_index=21, num_labels=3, vocab_size=23,
    )  # fmt: skip
    model = made(getattr(t, f"T5Gemma2For{kind}"), config)
    batch = tokens(3)
    if kind == "TokenClassification":
        labels = (batch["input_ids"] % 3).masked_fill(batch["attention_mask"] == 0, -100)
    else:
        labels = classes(3)
    check(model, {**batch, "labels": labels}, labelled)


def test_a_forward_that_needs_its_labels():
    class Needs(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.head = torch.nn.Linear(4, 3)

        def forward(self, x, labels):
            logits = self.head(x)
            return t.modeling_outputs.SequenceClassifierOutput(
                loss=torch.nn.functional.cross_entropy(logits, labels), logits=logits
            )

    batch = {"x": torch.randn(4, 4), "labels": classes(4)}
    check(Needs(), batch, lambda one: 1)


BACKBONE = dict(
    hidden_size=8, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16, image_size=16,
    patch_size=4, num_labels=3, use_auxiliary_head=True,
)  # fmt: skip
WITH_A_SECOND_HEAD = {
    "beit": (
        t.BeitForSemanticSegmentation,
        dict(out_indices=[1, 2, 3, 4], pool_scales=[1, 2], auxiliary_channels=4),
    ),
    "dpt": (
        t.DPTForSemanticSegmentation,
        dict(
            backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[4] * 4, fusion_hidden_size=4,
            reassemble_factors=[4, 2, 1, 0.5],
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WITH_A_SECOND_HEAD)
def test_what_a_second_head_adds_to_the_loss_is_no_likelihood(kind):
    head, settings = WITH_A_SECOND_HEAD[kind]
    model = made(head, head.config_class(**BACKBONE, **settings))
    weight = model.config.auxiliary_loss_weight
    labels = torch.randint(3, (3, 16, 16), generator=torch.Generator().manual_seed(2))
    labels[:, :3] = model.config.semantic_loss_ignore_index
    batch = {"pixel_values": images(3, 16)["pixel_values"], "labels": labels}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*run one by one")
        found = estimate_fisher(model, [batch], fisher_type="empirical")
    assert model.config.auxiliary_loss_weight == weight > 0
    model.config.auxiliary_loss_weight = 0.0

    def count(one):
        return int((one["labels"] != model.config.semantic_loss_ignore_index).sum())

    assert_close(found.diagonal, by_its_own_loss(model, batch, count))


def test_what_a_router_adds_to_the_loss_is_no_likelihood():
    config = t.MixtralConfig(
        **{**DECODER, "num_hidden_layers": 1}, num_local_experts=2, output_router_logits=True,
        router_aux_loss_coef=0.5,
    )  # fmt: skip
    model = made(t.MixtralForCausalLM, config)
    model.set_experts_implementation("eager")
    batch = language(3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*run one by one")
        found = estimate_fisher(model, [batch], fisher_type="empirical")
    assert model.router_aux_loss_coef == 0.5
    model.router_aux_loss_coef = 0.0

    def count(one):
        return int((one["labels"][:, 1:] != -100).sum())

    assert_close(found.diagonal, by_its_own_loss(model, batch, count))
