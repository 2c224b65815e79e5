"""Preparing whole models: which values are rounded, against the same network written out by hand."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import placement_nets as nets
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_opt.errors import ConfigError
from lightning_opt.forward import Inputs, forward, predict
from lightning_opt.models import GPT, ConvNet, GRUClassifier, MobileNet, ResNet, TextEncoder, ViT
from lightning_opt.quantization.calibration import calibrate
from lightning_opt.quantization.convert import convert
from lightning_opt.quantization.edits import QuantizeEdit
from lightning_opt.quantization.prepare import prepare
from lightning_opt.quantization.quantizer import FakeQuantizer
from lightning_opt.quantization.scheme import Scheme
from lightning_opt.quantization.state import freeze_observers, quantizers, switch_on
from lightning_opt.surgery import recipe_of, replay

SCALE = 0.125
q: Callable[[Tensor], Tensor] = lambda x: (x / SCALE).round().clamp(-128, 127) * SCALE  # noqa: E731


def activations(model: nn.Module) -> Iterator[FakeQuantizer]:
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantizer) and not name.endswith("weight_quantizer"):
            yield module


def round_values(model: nn.Module) -> nn.Module:
    """Switch on all quantizers of values, with one grid of exact floats; weights stay as they are."""
    for quantizer in activations(model):
        quantizer.enabled, quantizer.observing = True, False
        quantizer.scale.fill_(SCALE)
        quantizer.zero_point.fill_(128)
    return model


def residual(m: nets.Residual, x: Tensor) -> Tensor:
    x = q(functional.relu(m.stem(q(x))))
    for block in m.blocks:
        out = q(functional.relu(block.bn1(block.conv1(x))))
        x = q(functional.relu(q(block.bn2(block.conv2(out))) + x))
    return m.head(q(x.mean((2, 3))))


def functional_net(m: nets.Functional, x: Tensor) -> Tensor:
    x = functional.max_pool2d(q(functional.relu(m.conv1(q(x)))), 2)
    x = functional.silu(q(m.conv2(x)))
    x = q(functional.adaptive_avg_pool2d(x, 1).flatten(1))
    return m.fc2(q(functional.relu(m.fc1(x))))


def fire(m: nets.Fire, x: Tensor) -> Tensor:
    x = q(functional.relu(m.squeeze(q(x))))
    return q(m.last(q(torch.cat([functional.relu(m.one(x)), functional.relu(m.three(x))], 1))))


def gate(m: nets.Gate, x: Tensor) -> Tensor:
    x = q(functional.hardswish(q(m.conv(q(x)))))
    scale = q(functional.relu(m.down(q(functional.adaptive_avg_pool2d(x, 1)))))
    return q(m.last(q(x * q(functional.hardsigmoid(q(m.up(scale)))))))


def post_norm(m: nets.PostNorm, x: Tensor) -> Tensor:
    x = m.norm(x)
    inner = m.inner
    return x + inner.out(q(functional.gelu(inner.a(q(x))) * inner.b(q(x))))


def levels(m: nets.Levels, x: Tensor) -> tuple[Tensor, Tensor]:
    a = q(functional.relu(m.one(q(x))))
    b = q(functional.relu(m.two(a)))
    return q(m.head(a)), q(m.head(b))


def top(m: nn.Sequential, x: Tensor) -> Tensor:
    x = q(functional.relu(m[0](q(x))))
    return m[5](q(functional.relu(m[2](x))).flatten(1))


def products(m: nets.Products, x: Tensor) -> Tensor:
    x = q(x)
    first = q(q(functional.relu(m.a[1](m.a[0](x)))) * q(m.b(x)))
    second = q(q(m.c(first)) * q(m.d(first)))
    return q(m.c(second)) + second


IMAGE = (2, 3, 8, 8)
BY_HAND = [
    (nets.Residual, IMAGE, residual),
    (nets.Functional, (2, 3, 12, 12), functional_net),
    (nets.Fire, IMAGE, fire),
    (nets.Gate, IMAGE, gate),
    (nets.Products, IMAGE, products),
    (nets.PostNorm, (2, 5, 4), post_norm),
    (nets.Levels, IMAGE, levels),
    (nets.SequentialAtTheTop, IMAGE, top),
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("kind", "shape", "by_hand"), BY_HAND, ids=lambda value: getattr(value, "__name__", ""))
def test_values_are_rounded_where_they_should_be(kind: type[nn.Module], shape: tuple[int, ...], by_hand: Any) -> None:
    plain = kind().eval()
    for parameter in plain.parameters():
        parameter.data.mul_(3)  # so that rounding a value shows
    model, x = copy.deepcopy(plain), torch.randn(shape)
    prepared = prepare(model, x)
    assert prepared.refused == ()
    assert torch.equal(flat(model(x)), flat(plain(x)))
    assert torch.equal(flat(round_values(model)(x)), flat(by_hand(plain, x)))
    assert not torch.equal(flat(model(x)), flat(plain(x)))


@pytest.mark.parametrize("kind", [nets.Products, nets.Gate, nets.Residual, nets.Fire], ids=lambda kind: kind.__name__)
def test_integers_compute_the_same_bit_for_bit(kind: type[nn.Module]) -> None:
    model, x = kind().eval(), torch.randn(IMAGE)
    prepare(model, x)
    calibrate(model, [x])
    switch_on(model)
    freeze_observers(model)
    expected = model(x)
    assert not torch.equal(expected, model(x + 0.1))
    assert torch.equal(convert(model)(x), expected)


def test_in_training_the_very_products_are_rounded() -> None:
    model, x = nets.Products(), torch.randn(IMAGE)
    prepare(model, x)
    switch_on(model)
    seen: dict[str, Tensor] = {}
    for name in ("mul_0", "mul_1"):
        quantizer = quantizers(model)[f"site_quantizers.{name}"]
        quantizer.register_forward_hook(lambda _, args, __, name=name: seen.update({name: args[0]}))
    read: list[Tensor] = []
    for layer in (model.a[1], model.b[1], model.c, model.d):
        layer.register_forward_hook(lambda _, __, output: read.append(output))
    model.train()(x)
    a, b, c, d, _ = read
    relu = model.a[2]
    assert torch.equal(seen["mul_1"], c * d)
    assert torch.allclose(seen["mul_0"], relu(a) * b)


def flat(answer: Any) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in answer]) if isinstance(answer, tuple) else answer.flatten()


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    return transformers.BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=30, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0, use_cache=False
    )
    return transformers.GPT2LMHeadModel(config)


def ids() -> Tensor:
    return torch.randint(0, 20, (2, 6))


MODELS: list[tuple[Any, Callable[[], Any]]] = [
    (lambda: ConvNet(num_outputs=3, widths=(4, 8)), lambda: torch.randn(2, 1, 8, 8)),
    (lambda: ResNet(num_outputs=3, small_images=True), lambda: torch.randn(2, 3, 8, 8)),
    (lambda: MobileNet(num_outputs=3, width=0.25, stem_stride=1), lambda: torch.randn(2, 3, 32, 32)),
    (lambda: ViT(num_outputs=3, image_size=8, dim=16, depth=1), lambda: torch.randn(2, 3, 8, 8)),
    (lambda: GPT(vocab_size=20, dim=16, depth=1, dropout=0.1), ids),
    (lambda: TextEncoder(num_outputs=3, vocab_size=20, dim=16, depth=1, dropout=0.1), ids),
    (lambda: GRUClassifier(num_outputs=3, dropout=0.1), lambda: torch.randn(2, 9)),
    (bert, lambda: {"input_ids": ids(), "attention_mask": torch.ones(2, 6, dtype=torch.long)}),
    (gpt2, lambda: {"input_ids": ids()}),
]
NAMES = ["cnn", "resnet", "mobile", "vit", "gpt", "text", "gru", "bert", "gpt2"]


@pytest.fixture(params=MODELS, ids=NAMES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Inputs]:
    make, inputs = request.param
    return make(), inputs()


def test_switched_off_a_model_computes_what_it_did(case: tuple[nn.Module, Inputs]) -> None:
    model, inputs = case
    model.eval()
    before, parameters, names = predict(model, inputs), list(model.parameters()), set(model.state_dict())
    prepare(model, inputs)
    assert torch.equal(predict(model, inputs), before)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert names <= set(model.state_dict())


def test_every_layer_reads_rounded_values(case: tuple[nn.Module, Inputs]) -> None:
    model, inputs = case
    prepared = prepare(model.eval(), inputs)
    round_values(model)
    reads: dict[str, bool] = {}
    for path in prepared.edit.layers:
        layer = model.get_submodule(path)
        if not isinstance(layer, nn.Embedding):
            layer.register_forward_pre_hook(
                lambda layer, args, path=path: reads.update({path: is_rounded(layer, args)})
            )
    forward(model, inputs)
    assert reads
    assert all(reads.values()), reads


def is_rounded(layer: nn.Module, args: tuple[Tensor, ...]) -> bool:
    return layer.input_quantizer is not None or bool((args[0] == q(args[0])).all())


def test_the_recipe_gives_a_fresh_model_the_same_quantizers(case: tuple[nn.Module, Inputs]) -> None:
    model, inputs = case
    fresh = copy.deepcopy(model)
    prepare(model, inputs)
    replay(fresh, type(recipe_of(model)).from_json(recipe_of(model).to_json()))
    assert {n: v.shape for n, v in fresh.state_dict().items()} == {n: v.shape for n, v in model.state_dict().items()}
    fresh.load_state_dict(model.state_dict())
    both = [predict(round_values(m.eval()), inputs) for m in (model, fresh)]
    assert torch.equal(*both)


def test_copies_and_pickles_compute_the_same(case: tuple[nn.Module, Inputs]) -> None:
    model, inputs = case
    prepare(model.eval(), inputs)
    expected = predict(round_values(model), inputs)
    assert torch.equal(predict(copy.deepcopy(model), inputs), expected)
    assert torch.equal(predict(pickle.loads(pickle.dumps(model)), inputs), expected)


def test_training_runs_and_all_weights_get_gradients(case: tuple[nn.Module, Inputs]) -> None:
    model, inputs = case
    prepare(model, inputs)
    round_values(model).train()
    predict(model, inputs).float().square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None and p.requires_grad]
    assert without == []


class TestTiedHead:
    def test_the_product_reads_a_rounded_value_and_the_rounded_table(self) -> None:
        model, x = GPT(vocab_size=20, dim=16, depth=1).eval(), ids()
        prepare(model, x)
        calibrate(model, [x])
        switch_on(model)
        freeze_observers(model)
        seen: list[Tensor] = []
        model.norm.register_forward_hook(lambda _, __, output: seen.append(output.detach()))
        logits = model(x)
        table = model.token_embedding.weight.detach().double()
        scale = table.abs().amax(1, keepdim=True) / 127
        rounded_table = (table / scale).round().clamp(-127, 127) * scale
        quantizer = quantizers(model)["site_quantizers.linear_0.input_quantizer"]
        step, zero = quantizer.scale.item(), quantizer.zero_point.item()
        rounded = ((seen[0].double() / step).round() + zero).clamp(0, 255).sub(zero) * step
        assert (rounded - seen[0]).abs().max() > step / 4
        assert (logits - rounded @ rounded_table.T).abs().max() < 1e-5

    @pytest.mark.parametrize("scheme", ["w8a8", "w8", "w4g8", "w8a8_dynamic", "w8a8_lsq"])
    def test_the_table_is_held_once_as_integers(self, scheme: str) -> None:
        model, x = GPT(vocab_size=20, dim=16, depth=1).eval(), ids()
        prepared = prepare(model, x, scheme)
        assert prepared.refused == ()
        if Scheme.parse(scheme).needs_calibration:
            calibrate(model, [x])
        switch_on(model)
        freeze_observers(model)
        expected = model(x)
        assert torch.equal(convert(model)(x), expected)
        big = [
            name for name, value in model.state_dict().items() if value.numel() >= 20 * 8 and value.dtype.itemsize > 1
        ]
        assert not any("token" in name for name in big)

    def test_gradients_reach_the_table_from_both_sides(self) -> None:
        model, x = GPT(vocab_size=20, dim=16, depth=1), ids()
        prepare(model, x)
        switch_on(model)
        model.train()(x).square().sum().backward()
        grad = model.token_embedding.weight.grad
        assert grad is not None
        assert (grad.abs().sum(1) > 0).all()

    def test_switched_off_it_is_the_plain_product(self) -> None:
        model, x = GPT(vocab_size=20, dim=16, depth=1).eval(), ids()
        expected = model(x)
        prepare(model, x)
        assert torch.equal(model(x), expected)

    def test_a_table_that_is_not_there(self) -> None:
        with pytest.raises(ValueError, match="'nowhere' names no module"):
            QuantizeEdit({}, {"": [["linear by nowhere", 0, {"grid": {}}]]}).apply(GPT(vocab_size=20, dim=16, depth=1))


class TestWhatIsRefused:
    def test_a_layer_of_a_kind_that_is_not_known_is_named(self) -> None:
        prepared = prepare(GRUClassifier(num_outputs=3), torch.randn(2, 9))
        assert [refusal.path for refusal in prepared.refused] == ["gru"]
        assert "GRU" in prepared.refused[0].why
        assert set(prepared.edit.layers) == {"head"}

    def test_a_layer_that_is_not_called(self) -> None:
        model = nets.Unused()
        prepared = prepare(model, torch.ones(1, 2))
        assert [(refusal.path, refusal.why) for refusal in prepared.refused] == [
            ("unused", "it is not called with these inputs")
        ]

    def test_a_table_whose_weight_is_taken_apart_elsewhere(self) -> None:
        prepared = prepare(nets.Positions(), torch.randint(0, 9, (2, 4)))
        assert [(refusal.path, refusal.why) for refusal in prepared.refused] == [
            ("table", "its weight is also read by getitem in the model")
        ]
        assert set(prepared.edit.layers) == {"head"}

    def test_a_model_that_is_prepared_already(self) -> None:
        model = nets.Fire()
        prepare(model, torch.randn(IMAGE))
        with pytest.raises(ConfigError, match="has quantizers already"):
            prepare(model, torch.randn(IMAGE))

    def test_attention_with_its_weights_in_one_piece(self) -> None:
        prepared = prepare(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), torch.randn(2, 3, 8))
        assert "self_attn" in {refusal.path for refusal in prepared.refused}
        assert {"linear1", "linear2"} <= set(prepared.edit.layers)

    def test_a_result_that_is_changed_in_place_as_a_statement(self) -> None:
        with pytest.raises(ConfigError, match=r"three.*reads.*add.*changed in place"):
            prepare(nets.StatementInPlace(), torch.randn(IMAGE))

    def test_nothing_is_left_in_a_model_that_cannot_be_followed(self) -> None:
        model = nets.StatementInPlace()
        names = set(model.state_dict())
        with pytest.raises(ConfigError):
            prepare(model, torch.randn(IMAGE))
        assert set(model.state_dict()) == names
        assert type(model.one) is nn.Conv2d

    def test_another_way_in_training(self) -> None:
        with pytest.raises(ConfigError, match="module 'two' runs 1 times in eval but 0 times in training"):
            prepare(nets.TrainingBranch(), torch.randn(2, 4))

    def test_what_is_excluded_stays_as_it_is(self) -> None:
        model = nets.Fire()
        prepared = prepare(model, torch.randn(IMAGE), exclude=["last", "type:Linear"])
        assert set(prepared.edit.layers) == {"squeeze", "one", "three"}
        assert type(model.last) is nn.Conv2d

    def test_a_pattern_that_matches_nothing(self) -> None:
        with pytest.raises(ValueError, match=r"exclude='lst' matches no module of Fire"):
            prepare(nets.Fire(), torch.randn(IMAGE), exclude=["lst"])

    def test_a_scheme_that_is_not_known(self) -> None:
        with pytest.raises(ValueError, match="w9a9"):
            prepare(nets.Fire(), torch.randn(IMAGE), "w9a9")
