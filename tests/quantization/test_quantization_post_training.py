"""Post-training quantization of this package's models and of a Hugging Face one, as a user would call it."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_opt.forward import map_inputs, predict
from lightning_opt.models import GPT, ConvNet, ResNet, TextEncoder
from lightning_opt.quantization.adaround import AdaRound
from lightning_opt.quantization.bias_correction import BiasCorrection
from lightning_opt.quantization.calibration import CalibrationError
from lightning_opt.quantization.equalize import CrossLayerEqualization
from lightning_opt.quantization.gptq import GPTQ
from lightning_opt.quantization.post_training import quantize, quantize_in_place
from lightning_opt.quantization.smooth import SmoothQuant
from lightning_opt.quantization.state import is_converted, is_quantized
from lightning_opt.surgery import recipe_of, replay


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids(batch=16, length=12, vocabulary=50):
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))


def bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config)


MODELS = {
    "cnn": (lambda: ConvNet(num_outputs=10, widths=(8, 16)), draw(16, 1, 12, 12)),
    "resnet": (lambda: ResNet(num_outputs=10, small_images=True), draw(8, 3, 8, 8)),
    "text_encoder": (lambda: TextEncoder(num_outputs=3, vocab_size=50, max_length=12, dim=32), ids()),
    "gpt": (lambda: GPT(vocab_size=50, context_length=12, dim=32, depth=2), ids()),
    "bert": (bert, {"input_ids": ids(), "attention_mask": torch.ones(16, 12, dtype=torch.int64)}),
}


def model_and_inputs(name):
    torch.manual_seed(0)
    build, inputs = MODELS[name]
    model = build()
    with torch.no_grad():  # batch norms that have seen something
        for _ in range(3):
            predict(model.train(), inputs)
    return model.eval(), inputs


def batches(inputs):
    half = (len(inputs["input_ids"]) if isinstance(inputs, dict) else len(inputs)) // 2
    return [map_inputs(inputs, lambda x: x[:half]), map_inputs(inputs, lambda x: x[half:])]


@pytest.mark.parametrize("name", list(MODELS))
def test_ten_lines_give_an_integer_model(name):
    model, x = model_and_inputs(name)
    before = copy.deepcopy(model.state_dict())
    small = quantize(model, map_inputs(x, lambda tensor: tensor[:1]), "w8a8", calibration=batches(x))
    with torch.no_grad():
        wanted, found = predict(model, x), predict(small, x)
    assert is_converted(small)
    assert (found - wanted).norm() < 0.1 * wanted.norm()
    assert not torch.equal(found, wanted)
    assert not is_quantized(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    # The recipe alone gives the structure back, and the weights fit it.
    fresh = replay(MODELS[name][0](), recipe_of(small)).eval()
    fresh.load_state_dict(small.state_dict())
    with torch.no_grad():
        assert torch.equal(predict(fresh, x), found)


@pytest.mark.parametrize("scheme", ["w8a8_dynamic", "w4g16", "w8", "fp8"])
def test_dynamic_and_weight_only_need_no_calibration(scheme):
    model, x = model_and_inputs("text_encoder")
    arguments = {"calibration": batches(x)} if scheme == "fp8" else {}
    with torch.no_grad():
        wanted, found = model(x), quantize(model, x[:1], scheme, **arguments)(x)
    assert 0 < (found - wanted).norm() < 0.12 * wanted.norm()


def test_before_conversion_the_answers_are_the_same_bits():
    model, x = model_and_inputs("cnn")
    rounding = quantize(model, x[:1], "w4a8", calibration=batches(x), convert=False)
    assert not is_converted(rounding)
    with torch.no_grad():
        assert torch.equal(rounding(x), quantize(model, x[:1], "w4a8", calibration=batches(x))(x))


EVERY = [CrossLayerEqualization(), SmoothQuant(), GPTQ(), BiasCorrection()]


@pytest.mark.parametrize("name", ["cnn", "gpt"])
@pytest.mark.parametrize("improve", [[], EVERY[1:], [AdaRound(steps=20)]], ids=["plain", "several", "adaround"])
def test_the_same_calibration_gives_the_same_bits(name, improve):
    model, x = model_and_inputs(name)
    first, second = (quantize(model, x[:1], "w4a8", calibration=batches(x), improve=improve) for _ in range(2))
    states = first.state_dict(), second.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_float_improvements_come_before_those_that_round():
    model, x = model_and_inputs("cnn")
    there, back = (
        quantize(model, x[:1], "w4a8", calibration=batches(x), improve=improve) for improve in (EVERY, EVERY[::-1])
    )
    assert not torch.equal(there(x), back(x))  # bias correction before and after GPTQ
    last = [EVERY[2], EVERY[3], EVERY[0], EVERY[1]]
    assert torch.equal(there(x), quantize(model, x[:1], "w4a8", calibration=batches(x), improve=last)(x))


def test_a_data_loader_with_labels_and_a_number_of_samples():
    model, x = model_and_inputs("cnn")
    loader = DataLoader(TensorDataset(x, torch.zeros(16)), batch_size=5)
    done = quantize_in_place(copy.deepcopy(model), x[:1], "w8a8", batches=[x[:5], x[5:10]])
    assert done.samples == 10
    first = quantize(model, x[:1], "w8a8", calibration=loader, calibration_samples=10)
    with torch.no_grad():
        assert torch.equal(first(x), quantize(model, x[:1], "w8a8", calibration=[x[:5], x[5:10]])(x))


def test_excluded_layers_stay_in_float():
    model, x = model_and_inputs("cnn")
    small = quantize(model, x[:1], "w8a8", calibration=batches(x), exclude=["head"])
    assert type(small.head) is nn.Linear
    assert small.stages[0][0].conv.state_dict()["weight"].dtype == torch.int8


def test_a_limit_keeps_layers_in_float_until_it_holds():
    model, x = model_and_inputs("cnn")

    def closeness(candidate):
        with torch.no_grad():
            return -float((candidate(x) - wanted).norm() / wanted.norm())

    with torch.no_grad():
        wanted = model(x)
    arguments = {"calibration": batches(x), "evaluate": closeness, "convert": False}
    assert closeness(quantize(model, x[:1], "w2a8", calibration=batches(x))) < -0.1
    assert closeness(quantize(model, x[:1], "w2a8", max_drop=0.1, **arguments)) >= -0.1
    assert is_quantized(quantize(model, x[:1], "w2a8", max_drop=10.0, **arguments))
    for alone in ({"max_drop": 0.1}, {"evaluate": closeness}):
        with pytest.raises(ValueError, match="max_drop and evaluate go together"):
            quantize(model, x[:1], "w2a8", calibration=batches(x), **alone)


class Nan(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(x) / 0.0 * 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "a static scheme needs calibration=batches"),
        ({"calibration": []}, "calibration has no samples"),
        ({"calibration": iter(())}, "calibration has no samples"),
        ({"calibration": [draw(4, 4)], "calibration_samples": 8}, "calibration has 4 samples, 8 were asked for"),
        ({"calibration": [torch.full((4, 4), torch.nan)]}, "calibration batch 0 holds NaN"),
        ({"calibration": [draw(4, 4)], "model": Nan()}, "the model answers calibration batch 0 with NaN"),
        ({"scheme": "w4", "improve": [GPTQ()]}, "GPTQ needs calibration data"),
    ],
)
def test_bad_calibration_is_one_error_and_the_model_stays(arguments, message):
    given = {"model": nn.Sequential(nn.Linear(4, 2)), **arguments}
    model = given.pop("model")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CalibrationError, match=message):
        quantize(model, draw(1, 4), given.pop("scheme", "w8a8"), **given)
    assert not is_quantized(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_other_refusals():
    model, x = nn.Sequential(nn.Linear(4, 2)), draw(4, 4)
    with pytest.raises(ValueError, match="scheme 'w9a9' is not known"):
        quantize(model, x, "w9a9", calibration=[x])
    with pytest.raises(ValueError, match="improve has 'gptq'; give objects such as"):
        quantize(model, x, "w8", calibration=[x], improve=["gptq"])
    with pytest.raises(ValueError, match="is quantized already"):
        quantize(quantize(model, x, "w8"), x, "w8")
