import re

import pytest
import torch
from torch import nn

from lightning_opt.models import GPT, BagOfEmbeddings, GRUClassifier, TextEncoder
from lightning_opt.testing.models import check_model

IDS = torch.randint(1, 40, (3, 6), generator=torch.Generator().manual_seed(0))
# What torch.export says of any nn.GRU while it unrolls it; the weights are still the program's parameters.
pytestmark = pytest.mark.filterwarnings("ignore:The tensor attributes self:UserWarning")

MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
TEXTS = {"input_ids": IDS, "attention_mask": MASK}
SIGNALS = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))

TEXT_MODELS = {
    "encoder": lambda: TextEncoder(num_outputs=4, vocab_size=40, dim=16, embedding_dim=8, dropout=0.1),
    "bag": lambda: BagOfEmbeddings(num_outputs=4, vocab_size=40, dim=16, hidden=8),
    "gru": lambda: GRUClassifier(num_outputs=4, vocab_size=40, hidden=8),
    "gru-mean": lambda: GRUClassifier(num_outputs=4, vocab_size=40, hidden=8, pooling="mean"),
}


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_text_models_pass_the_checker_and_export(name):
    report = check_model(TEXT_MODELS[name](), TEXTS, 4)
    assert report.outputs_shape == (3, 4)
    assert report.export_error is None


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_padding_changes_nothing(name):
    torch.manual_seed(0)
    model = TEXT_MODELS[name]().eval()
    with torch.no_grad():
        padded = model(**TEXTS)
        other = model(torch.where(MASK.bool(), IDS, 39), MASK)
        alone = torch.cat([model(IDS[i : i + 1, : MASK[i].sum()]) for i in range(3)])
        unmasked = model(IDS)
    torch.testing.assert_close(other, padded, rtol=0, atol=0)
    torch.testing.assert_close(alone, padded, rtol=0, atol=1e-6)
    assert (unmasked[1] - padded[1]).abs().max() > 1e-5
    assert torch.equal(model(IDS, MASK.bool()), model(IDS, MASK))


@pytest.mark.parametrize("build", [TextEncoder, BagOfEmbeddings])
def test_pad_id_stands_for_a_missing_mask(build):
    torch.manual_seed(0)
    model = build(num_outputs=4, vocab_size=40, dim=16, pad_id=0).eval()
    ids = torch.where(MASK.bool(), IDS, 0)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), model(ids, MASK), rtol=0, atol=0)


def test_a_text_of_padding_alone_gives_finite_logits_and_gradients():
    model = TextEncoder(num_outputs=4, vocab_size=40, dim=16)
    logits = model(IDS, torch.zeros_like(MASK))
    logits.sum().backward()
    assert logits.isfinite().all()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_narrow_table_holds_the_vocabulary():
    wide = TextEncoder(num_outputs=2, vocab_size=1000, dim=64)
    narrow = TextEncoder(num_outputs=2, vocab_size=1000, dim=64, embedding_dim=8)
    size = [sum(p.numel() for p in model.parameters()) for model in (wide, narrow)]
    assert size[0] - size[1] == 1000 * (64 - 8) - 8 * 64


@pytest.mark.parametrize("fused", [False, True])
def test_gpt_passes_the_checker_and_exports(fused):
    model = GPT(vocab_size=40, context_length=8, dim=16, depth=2, fused_qkv=fused, tied_embeddings=fused, dropout=0.1)
    # All positions are used, so that a gradient reaches the whole position table.
    report = check_model(model, torch.randint(0, 40, (3, 8)), 40)
    assert report.outputs_shape == (3, 8, 40)
    assert report.export_error is None


def test_gpt_and_text_encoder_export_with_any_length():
    batch, length = torch.export.Dim("batch", min=2), torch.export.Dim("length", min=2, max=8)
    shape = {0: batch, 1: length}
    gpt = GPT(vocab_size=40, context_length=8, dim=16, depth=1).eval()
    encoder = TextEncoder(num_outputs=4, vocab_size=40, max_length=8, dim=16, depth=1).eval()
    with torch.no_grad():
        program = torch.export.export(gpt, (IDS,), dynamic_shapes=(shape,)).module()
        torch.testing.assert_close(program(IDS[:2, :4]), gpt(IDS[:2, :4]))
        program = torch.export.export(encoder, (IDS, MASK), dynamic_shapes=(shape, shape)).module()
        torch.testing.assert_close(program(IDS[:2, :4], MASK[:2, :4]), encoder(IDS[:2, :4], MASK[:2, :4]))


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "pooling": "mean", "dropout": 0.1}])
def test_gru_on_signals_passes_the_checker_and_exports(options):
    assert check_model(GRUClassifier(num_outputs=5, hidden=8, **options), SIGNALS[:, :3], 5).export_error is None


def test_gru_reads_signals_in_each_form_alike():
    torch.manual_seed(0)
    model = GRUClassifier(num_outputs=5, hidden=8).eval()
    with torch.no_grad():
        expected = model(SIGNALS)
        assert torch.equal(model(SIGNALS[:, None, :]), expected)
        assert torch.equal(model(SIGNALS[:, :, None]), expected)
    wide = GRUClassifier(num_outputs=5, in_features=3, hidden=8)
    assert wide(torch.randn(2, 9, 3)).shape == (2, 5)


def test_gru_equals_the_published_cell_equations():
    """Equations 5 to 8 of arXiv 1406.1078 in the form that torch documents, step by step, in float64."""
    torch.manual_seed(0)
    model = GRUClassifier(num_outputs=2, hidden=3).double().eval()
    weights = {name: value.detach() for name, value in model.gru.named_parameters()}
    signal, state = SIGNALS[:1].double(), torch.zeros(3, dtype=torch.float64)
    for value in signal[0]:
        x = weights["weight_ih_l0"][:, 0] * value + weights["bias_ih_l0"]
        h = weights["weight_hh_l0"] @ state + weights["bias_hh_l0"]
        reset, update = torch.sigmoid(x[:3] + h[:3]), torch.sigmoid(x[3:6] + h[3:6])
        state = (1 - update) * torch.tanh(x[6:] + reset * h[6:]) + update * state
    torch.testing.assert_close(model(signal)[0], model.head.weight @ state + model.head.bias)


def test_gru_refuses_a_mask_that_it_cannot_honour():
    model = GRUClassifier(num_outputs=4, vocab_size=40, bidirectional=True, pooling="mean")
    with pytest.raises(ValueError, match="attention_mask cannot be honoured with bidirectional=True"):
        model(IDS, MASK)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: GRUClassifier(num_outputs=2, pooling="max"), "pooling must be one of 'last', 'mean', got 'max'"),
        (lambda: GRUClassifier(num_outputs=2, bidirectional=True), "pooling must be 'mean'"),
        (lambda: TextEncoder(num_outputs=2, vocab_size=-1), "vocab_size must be a whole number of at least 1, got -1"),
        (
            lambda: BagOfEmbeddings(num_outputs=2, vocab_size=9, dim=0),
            "dim must be a whole number of at least 1, got 0",
        ),
        (lambda: GPT(vocab_size=9, depth=0), "depth must be a whole number of at least 1, got 0"),
        (lambda: GPT(vocab_size=9, dropout=-0.1), "dropout must be in [0, 1), got -0.1"),
    ],
)
def test_wrong_arguments_are_named_with_their_value(build, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        build()


def test_hidden_states_can_be_tapped_by_module_name():
    names = {name for name, _ in TextEncoder(num_outputs=2, vocab_size=9, depth=2).named_modules()}
    assert {"blocks.0", "blocks.1.attention.query", "blocks.1.attention.key", "blocks.1.attention.value"} <= names
    assert not any(isinstance(m, nn.MultiheadAttention) for m in TextEncoder(num_outputs=2, vocab_size=9).modules())
