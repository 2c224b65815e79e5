import copy

import pytest
import torch
from layer_helpers import ACTIVATION, IDS, TiedNet, insert, shake, tied_edit, trained, weight_grid
from torch import nn

import lightning_opt
from lightning_opt.evaluation.parameters import bytes_by_dtype
from lightning_opt.export import save_artifact
from lightning_opt.quantization.convert import convert, float_twin
from lightning_opt.quantization.edits import QuantizeEdit
from lightning_opt.quantization.grid import Grid
from lightning_opt.quantization.layers import IntegerLayer, LayerPlan, unpack_weights
from lightning_opt.quantization.state import freeze_observers, switch_on
from lightning_opt.surgery import recipe_of

ENCODER = {"num_outputs": 3, "vocab_size": 4000, "max_length": 24, "dim": 256, "depth": 1}
TARGET = "lightning_opt.models.TextEncoder"
TOKENS = torch.arange(60).reshape(3, 20) % 2000


def encoder(bits, sites=True):
    """Return a transformer whose tables and linear layers are quantized, its weights trained a little."""
    from lightning_opt.models import TextEncoder

    torch.manual_seed(0)
    model = TextEncoder(**ENCODER)
    plans = {
        name: LayerPlan(weight=weight_grid(bits), **({"input": ACTIVATION} if isinstance(module, nn.Linear) else {}))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding) and "position" not in name
    }
    return trained(insert(model, QuantizeEdit(plans)), TOKENS)


@pytest.mark.parametrize("bits", [8, 4])
def test_an_artifact_gives_the_same_answers_and_is_small(tmp_path, bits):
    """Size with the embedding table: a quarter of float32 for int8 and an eighth for int4, plus scales and norms."""
    model = encoder(bits)
    expected = model(TOKENS)
    dense = sum(p.numel() for p in model.parameters() if p.dim()) * 4
    convert(model)
    save_artifact(tmp_path, model, architecture={"_target_": TARGET, **ENCODER})
    assert torch.equal(lightning_opt.load(tmp_path)(TOKENS), expected)
    most = {8: 0.26, 4: 0.14}[bits]
    assert (tmp_path / "model.safetensors").stat().st_size <= most * dense
    assert sum(bytes_by_dtype(model).values()) <= most * dense


@pytest.mark.parametrize("stage", ["off", "on", "frozen", "converted"])
def test_every_stage_is_written_and_read_as_safetensors(tmp_path, stage):
    from lightning_opt.export.safetensors import read_safetensors, write_safetensors
    from lightning_opt.surgery import replay

    torch.manual_seed(0)
    model = insert(shake(TiedNet()), tied_edit(4, learnable=stage == "on")).eval()
    if stage != "off":
        trained(model, IDS)
    if stage in ("frozen", "converted"):
        freeze_observers(model)
    if stage == "converted":
        convert(model)
    path = write_safetensors(model, tmp_path / "model.safetensors")
    other = read_safetensors(replay(TiedNet(), recipe_of(model)), path).eval()
    assert torch.equal(other(IDS), model(IDS))


def test_tied_weights_stay_one(tmp_path):
    from safetensors import safe_open

    from lightning_opt.export.safetensors import read_safetensors, write_safetensors
    from lightning_opt.surgery import replay

    torch.manual_seed(0)
    model = convert(trained(insert(TiedNet(), tied_edit(4)), IDS))
    path = write_safetensors(model, tmp_path / "model.safetensors")
    with safe_open(path, "pt") as file:
        names = set(file.keys())
    assert {"table.weight", "table.weight_scale"} <= names
    assert not any(name.startswith("head.") for name in names)
    loaded = read_safetensors(replay(TiedNet(), recipe_of(model)), path)
    for each in (model, copy.deepcopy(model), loaded, copy.deepcopy(model).bfloat16(), copy.deepcopy(model).to("meta")):
        assert each.head.stored is each.table.stored
        assert each.head.weight_scale is each.table.weight_scale


def test_weights_that_are_tied_but_rounded_differently_are_kept_apart():
    torch.manual_seed(0)
    edit = QuantizeEdit({"table": LayerPlan(weight=weight_grid(8)), "head": LayerPlan(weight=weight_grid(4))})
    model = trained(insert(TiedNet(), edit), IDS)
    expected = model(IDS)
    assert torch.equal(convert(model)(IDS), expected)
    assert (model.table.stored.dtype, model.head.stored.dtype) == (torch.int8, torch.uint8)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("values", [{}, {"symmetric": False}, {"symmetric": False, "signed": False}])
def test_zeros_of_a_mask_stay_zeros(bits, values):
    """A pruned weight is zero in the rounded weight, and is the zero point among the integers."""
    torch.manual_seed(0)
    model = shake(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5)))
    masks = {name: torch.rand_like(model.get_parameter(name)) < 0.5 for name in ("0.weight", "3.weight")}

    def mask():
        with torch.no_grad():
            for name, zero in masks.items():
                model.get_parameter(name)[zero] = 0

    x, grid = torch.randn(6, 3, 4, 4), weight_grid(bits, **values)
    insert(model, QuantizeEdit({"0": LayerPlan(weight=grid, batch_norm="1"), "3": LayerPlan(weight=grid)}))
    mask()
    switch_on(model.train())
    for training in (True, False):
        model.train(training)
        model(x).sum().backward()
        for name, zero in masks.items():
            layer = model[int(name[0])]
            assert bool((layer.rounded_weight(layer.weight_quantizer)[0][zero] == 0).all())
    convert(model)
    for name, zero in masks.items():
        layer = model[int(name[0])]
        zero_point = layer.weight_zero_point.reshape(-1, *[1] * (zero.dim() - 1)).expand(zero.shape)
        assert torch.equal(layer.int_weight().int()[zero], zero_point[zero])
        assert bool((layer.float_weight()[zero] == 0).all())


@pytest.mark.parametrize("bits", [4, 8])
def test_the_float_twin_answers_alike_and_is_of_plain_classes(bits):
    torch.manual_seed(0)
    model = trained(insert(shake(TiedNet()), tied_edit(bits, grid=weight_grid(bits))), IDS)
    twin = float_twin(model)
    plain = TiedNet().eval()
    plain.load_state_dict(twin.state_dict(), strict=True)
    assert torch.equal(twin(IDS), plain(IDS))
    assert type(twin.conv) is nn.Conv1d
    assert twin.head.weight is twin.table.weight
    converted = convert(copy.deepcopy(model))
    twin = float_twin(converted)
    assert [type(m) for m in (twin.table, twin.conv, twin.act, twin.hidden)] == [
        nn.Embedding,
        nn.Conv1d,
        nn.ReLU,
        nn.Linear,
    ]
    assert twin.head.weight is twin.table.weight
    assert {t.dtype for t in twin.state_dict().values()} == {torch.float32}
    torch.testing.assert_close(twin.hidden.weight, converted.hidden.float_weight(), rtol=0, atol=0)
    assert torch.equal(converted(IDS), model(IDS)), "the model itself is as it was"
    with torch.no_grad():
        assert float((twin(IDS) - model(IDS)).abs().max()) < 0.1  # only activations are no longer rounded
    assert not len(recipe_of(twin))


def test_packed_weights_can_be_laid_out_for_exporters():
    torch.manual_seed(0)
    model = convert(trained(insert(shake(TiedNet()), tied_edit(4)), IDS))
    expected = model(IDS)
    unpack_weights(model)
    assert model.state_dict()["conv.weight"].dtype == torch.int8
    assert tuple(model.state_dict()["conv.weight"].shape) == (6, 8, 3)
    assert model.head.stored is model.table.stored
    assert torch.equal(model(IDS), expected)


def test_a_converted_model_cannot_be_trained_or_observe_by_mistake():
    torch.manual_seed(0)
    model = convert(trained(insert(shake(TiedNet()), tied_edit(8, learnable=True)), IDS))
    assert not list(model.parameters())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model(IDS)
    assert torch.equal(model.train()(IDS * 0 + 3), model.eval()(IDS * 0 + 3))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(IDS), expected)
    assert not any("observer" in name for name in state)


class Reader(nn.Module):
    """A net whose code reads weights of its layers, as language models with tied heads and many others do."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(24, 8)
        self.hidden = nn.Linear(8, 8, bias=False)

    def forward(self, ids):
        x = self.hidden(self.table(ids).to(self.hidden.weight.dtype))
        return nn.functional.linear(x, self.table.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_code_that_reads_a_weight_gets_numbers(dtype):
    torch.manual_seed(0)
    model = Reader().to(dtype)
    plan = LayerPlan(weight=weight_grid(4))
    trained(insert(model, QuantizeEdit({"table": plan, "hidden": plan})), IDS)
    x = model.hidden(model.table(IDS))
    convert(model)
    assert model.table.weight.dtype == dtype
    assert torch.equal(model(IDS), nn.functional.linear(x, model.table.float_weight().to(dtype)))
    model.load_state_dict(model.state_dict(), assign=True)
    assert model.table.stored.dtype == torch.uint8


def test_converting_again_changes_nothing():
    model = convert(trained(insert(TiedNet(), tied_edit()), IDS))
    assert convert(model) is model
    assert [edit.op for edit in recipe_of(model)] == ["quantize", "quantize_on", "convert"]


def test_a_model_that_is_not_ready_says_what_is_missing():
    with pytest.raises(ValueError, match="Linear has no quantizers; insert them"):
        convert(nn.Linear(2, 2))
    model = insert(TiedNet(), tied_edit())
    with pytest.raises(ValueError, match=r"quantizer '.*' is switched off"):
        convert(model)
    switch_on(model)
    with pytest.raises(ValueError, match=r"quantizer 'conv.input_quantizer' has not seen any values"):
        convert(model)
    assert not any(isinstance(module, IntegerLayer) for module in model.modules())


def test_layers_with_float_weights_keep_their_rounded_values():
    torch.manual_seed(0)
    model = shake(nn.Sequential(nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4), nn.Linear(5, 2)))
    edit = QuantizeEdit(
        {"0": LayerPlan(output=ACTIVATION, batch_norm="1"), "2": LayerPlan(weight=Grid(axis=0), output=ACTIVATION)}
    )
    x = torch.randn(2, 3, 6)
    expected = trained(insert(model, edit), x)(x)
    assert torch.equal(convert(model)(x), expected)
    assert model[0].weight.dtype == torch.float32
