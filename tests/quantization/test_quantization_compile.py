"""Quantized layers under autocast, in bfloat16, in torch.export and in torch.compile."""

import pytest
import torch
from layer_helpers import ACTIVATION, IDS, TiedNet, insert, shake, tied_edit, trained, weight_grid
from torch import nn
from torch.export import Dim, export

from lightning_opt.quantization.convert import convert
from lightning_opt.quantization.edits import QuantizeEdit
from lightning_opt.quantization.layers import LayerPlan
from lightning_opt.quantization.ops import exporting
from lightning_opt.quantization.state import freeze_observers

X = torch.randn(4, 3, 9, generator=torch.Generator().manual_seed(2))


def net(stage, bits=4):
    torch.manual_seed(0)
    model = trained(insert(shake(TiedNet()), tied_edit(bits)), IDS)
    if stage != "rounded":
        freeze_observers(model)
    return convert(model) if stage == "converted" else model


def operators(program):
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    return {str(target) for target in targets if isinstance(target, torch._ops.OpOverload)}


@pytest.mark.parametrize(("stage", "bits"), [("rounded", 4), ("frozen", 8), ("converted", 4), ("converted", 8)])
def test_a_program_answers_as_the_model_does_at_other_batch_sizes(stage, bits):
    model = net(stage, bits)
    shapes = ({0: Dim("batch", min=1, max=64)},)
    with torch.no_grad():
        program = export(model, (IDS,), dynamic_shapes=shapes, strict=False)
        with exporting():
            for_engines = export(model, (IDS,), dynamic_shapes=shapes, strict=False)
        for batch in (IDS, IDS[:3], IDS.repeat(5, 1)):
            assert torch.equal(program.module()(batch), model(batch))
            assert torch.equal(for_engines.module()(batch), model(batch))
    assert all(name.startswith("aten.") for name in operators(program))
    ours = {name for name in operators(for_engines) if not name.startswith("aten.")}
    rounded = {"lightning_opt.quantize_dequantize.default"}
    assert ours == (rounded | {"lightning_opt.dequantize.default"} if stage == "converted" else rounded)
    assert not {"aten.round.default", "aten.round_.default"} & operators(for_engines)


def test_a_converted_program_holds_no_float_weight():
    program = export(net("converted", 8), (IDS,), strict=False)
    floats = [tensor for tensor in program.state_dict.values() if tensor.dtype == torch.float32 and tensor.dim() > 1]
    assert not floats


def test_a_compiled_model_is_one_graph():
    for stage in ("frozen", "converted"):
        model = net(stage)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.equal(compiled(IDS), model(IDS))


def test_a_compiled_step_of_training_is_the_eager_step():
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        model = shake(nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)))
        plan = LayerPlan(weight=weight_grid(4), output=ACTIVATION, batch_norm="1")
        models.append(trained(insert(model, QuantizeEdit({"0": plan})), X).train())
        models[-1].zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(models[1], fullgraph=True, backend="aot_eager")
    for model, forward in zip(models, (models[0], compiled), strict=True):
        forward(X).square().mean().backward()
        assert model[1].weight.grad.abs().max() > 0
    for (name, one), (_, other) in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict())


@pytest.mark.parametrize("bits", [4, 8])
def test_autocast_to_bfloat16(bits):
    torch.manual_seed(0)
    model = trained(insert(shake(TiedNet()), tied_edit(bits)), IDS)
    exact = model(IDS).detach()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        model.train()(IDS).float().square().mean().backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
        expected = model.eval()(IDS)
        assert torch.equal(convert(model)(IDS), expected)
    assert expected.dtype == torch.bfloat16
    assert (expected.float() - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_of_bfloat16(tmp_path, bits):
    from lightning_opt.export.safetensors import read_safetensors, write_safetensors
    from lightning_opt.surgery import recipe_of, replay

    torch.manual_seed(0)
    model = trained(insert(shake(TiedNet()).bfloat16(), tied_edit(bits)), IDS)
    expected = model(IDS)
    assert expected.dtype == torch.bfloat16
    convert(model)
    assert torch.equal(model(IDS), expected)
    path = write_safetensors(model, tmp_path / "model.safetensors")
    loaded = read_safetensors(replay(TiedNet(), recipe_of(model)), path).eval()
    assert torch.equal(loaded(IDS), expected)
