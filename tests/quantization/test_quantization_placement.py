"""Which values get a grid, and where, by the plan alone."""

import json
from typing import Any

import placement_nets as nets
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_opt.forward import Inputs
from lightning_opt.models import MLP, MobileNet, ResNet, ViT
from lightning_opt.quantization.calls import record_calls
from lightning_opt.quantization.edits import QuantizeEdit
from lightning_opt.quantization.placement import plan
from lightning_opt.quantization.placement_graph import Steps
from lightning_opt.quantization.scheme import Scheme
from lightning_opt.surgery import edit_from_dict

IMAGE = torch.randn(2, 3, 8, 8)


def planned(model: nn.Module, inputs: Inputs, scheme: str | Scheme = "w8a8") -> QuantizeEdit:
    scheme = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    return plan(record_calls(model, inputs), model, scheme)[0]


def places(edit: QuantizeEdit) -> set[str]:
    """Return where values are rounded, as "path:input", "path:output" or "path:function:index"."""
    found = {f"{path}:{where}" for path, how in edit.layers.items() for where in ("input", "output") if where in how}
    return found | {f"{path}:{site[0]}:{site[1]}" for path, sites in edit.sites.items() for site in sites}


class TestConvolutions:
    def test_a_batch_norm_and_a_relu_are_part_of_the_convolution(self) -> None:
        edit = planned(nets.Residual(), IMAGE)
        assert edit.layers["blocks.0.conv1"]["batch_norm"] == "blocks.0.bn1"
        assert places(edit) == {
            "stem:input",
            ":relu:0",  # read by the first block's convolution and by its sum
            "blocks.0.conv2:input",
            "blocks.0.conv2:output",
            "blocks.0:output:0",
            "blocks.1.conv2:input",
            "blocks.1.conv2:output",
            "blocks.1:output:0",
            "head:input",
        }

    def test_a_relu_module_rounds_by_itself(self) -> None:
        edit = planned(ResNet(num_outputs=3, small_images=True), IMAGE)
        assert "relu:output:0" in places(edit)
        assert not any(":relu:" in place or ":add:" in place for place in places(edit))

    def test_an_activation_that_is_no_clip_leaves_the_convolution_a_grid_of_its_own(self) -> None:
        assert {"conv2:output", "fc1:input"} <= places(planned(nets.Functional(), torch.randn(2, 3, 12, 12)))

    @pytest.mark.parametrize(
        ("function", "is_part"),
        [
            (functional.relu6, True),
            (lambda x: functional.hardtanh(x, 0.0, 2.0), True),
            (lambda x: x.clamp(min=0), True),
            (lambda x: x.clamp(0, 1), True),
            (functional.hardtanh, False),
            (lambda x: x.clamp(max=1), False),
            (functional.leaky_relu, False),
            (functional.hardswish, False),
        ],
    )
    def test_which_activations_are_part_of_it(self, function: Any, is_part: bool) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

            def forward(self, x: Tensor) -> Tensor:
                return self.b(function(self.a(x)))

        assert ("a:output" in places(planned(Net(), IMAGE))) is not is_part

    def test_a_batch_norm_that_someone_else_reads_around_is_not_part_of_it(self) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv, self.norm, self.last = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)

            def forward(self, x: Tensor) -> Tensor:
                x = self.conv(x)
                return self.last(self.norm(x) + x)

        edit = planned(Net(), IMAGE)
        assert "batch_norm" not in edit.layers["conv"]
        assert {"conv:output", "norm:output:0", "last:input"} <= places(edit)

    def test_depthwise_and_linear_bottlenecks(self) -> None:
        edit = planned(MobileNet(num_outputs=3, width=0.25, stem_stride=1), torch.randn(1, 3, 32, 32))
        assert all("batch_norm" in how for path, how in edit.layers.items() if path != "classifier.1")
        assert {"features.2.conv.2:output", "features.3:output:0", "features.3.conv.2:output"} <= places(edit)


class TestJoins:
    def test_a_concatenation_has_one_grid_for_all_that_it_joins(self) -> None:
        assert places(planned(nets.Fire(), IMAGE)) == {"squeeze:input", ":relu:0", ":cat:0", "last:output"}

    def test_products_with_a_gate(self) -> None:
        edit = planned(nets.Gate(), IMAGE)
        assert {"act:output:0", ":hardsigmoid:0", "last:input", "up:output"} <= places(edit)

    def test_a_residual_stream_after_a_layer_norm_stays_in_float(self) -> None:
        edit = planned(ViT(num_outputs=3, image_size=8, dim=16, depth=1), IMAGE)
        assert not any(":add:" in place for place in places(edit))
        assert "patch_embedding:output" in places(edit)

    def test_a_sum_with_a_parameter_stays_in_float(self) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
                self.shift = nn.Parameter(torch.zeros(3, 1, 1))

            def forward(self, x: Tensor) -> Tensor:
                return self.b(functional.silu(self.a(x) + self.shift))

        assert places(planned(Net(), IMAGE)) == {"a:input", "a:output", "b:input", "b:output"}


class TestTransformers:
    def test_what_a_sum_reads_too_is_rounded_for_the_layers_alone(self) -> None:
        assert places(planned(nets.PostNorm(), torch.randn(2, 5, 4))) == {"inner:input:0", "inner.out:input"}

    def test_three_readers_of_a_norm_share_its_output(self) -> None:
        edit = planned(ViT(num_outputs=3, image_size=8, dim=16, depth=1), IMAGE)
        assert {"blocks.0.norm1:output:0", "blocks.0.attention.out:input", "blocks.0.down:input"} <= places(edit)
        assert not any("query" in place for place in places(edit))

    def test_linear_layers_alone_have_grids_on_their_inputs_only(self) -> None:
        edit = planned(MLP(num_outputs=3, in_features=8), torch.randn(2, 8))
        assert places(edit) == {f"{path}:input" for path in edit.layers}


class TestAttention:
    def test_its_factors_have_grids_when_that_is_asked_for(self) -> None:
        model = ViT(num_outputs=3, image_size=8, dim=16, depth=1)
        before, after = (places(planned(model, IMAGE, Scheme(attention=asked))) for asked in (False, True))
        assert after - before == {f"blocks.0.attention.{name}:output" for name in ("query", "key", "value")}
        assert before < after

    def test_written_out_the_weights_of_attention_too(self) -> None:
        class Attention(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.query, self.key, self.value = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                scores = self.query(x) @ self.key(x).transpose(1, 2) / 2
                return scores.softmax(-1) @ self.value(x)

        found = places(planned(Attention(), torch.randn(2, 3, 4), Scheme(attention=True)))
        assert found == {":input:0", "query:output", "key:output", "value:output", ":softmax:0"}


class TestSchemes:
    def test_weights_only(self) -> None:
        edit = planned(nets.Residual(), IMAGE, "w4g32")
        assert places(edit) == set()
        assert set(edit.layers) == {"stem", "head", *(f"blocks.{i}.conv{j}" for i in (0, 1) for j in (1, 2))}

    def test_dynamic_ranges_are_found_by_the_linear_layers_that_read(self) -> None:
        edit = planned(nets.Functional(), torch.randn(2, 3, 12, 12), "w8a8_dynamic")
        assert places(edit) == {"fc1:input", "fc2:input"}
        assert edit.layers["fc1"]["dynamic"] is True

    def test_a_layer_that_the_rules_leave_out_is_read_and_left_in_float(self) -> None:
        scheme = Scheme(rules={"blocks.1.*": None})
        edit = planned(nets.Residual(), IMAGE, scheme)
        assert not any(path.startswith("blocks.1") for path in edit.layers)
        assert "blocks.1:output:0" not in places(edit)

    def test_the_finest_grid_among_the_readers_is_taken(self) -> None:
        edit = planned(nets.PostNorm(), torch.randn(2, 5, 4), Scheme(rules={"inner.a": {"activation": {"bits": 4}}}))
        assert edit.sites["inner"][0][2]["grid"].get("bits", 8) == 8

    def test_a_reader_s_grid_goes_before_that_of_the_maker(self) -> None:
        edit = planned(nets.Residual(), IMAGE, Scheme(rules={"blocks.0.conv2": {"activation": {"bits": 4}}}))
        assert edit.layers["blocks.0.conv2"]["input"]["bits"] == 4
        assert edit.layers["blocks.1.conv2"]["input"].get("bits", 8) == 8

    def test_the_plan_is_plain_json(self) -> None:
        edit = planned(nets.Fire(), IMAGE, "w4a4_lsq")
        again = edit_from_dict(json.loads(json.dumps(edit.to_dict())))
        assert again.to_dict() == edit.to_dict()
        assert edit.sites[""][0][2]["learnable"] is True


class TestRootsAndReaders:
    def test_moves_are_looked_through(self) -> None:
        class Moves(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(3, 3)

            def forward(self, x: Tensor) -> Tensor:
                x = torch.tanh(x)
                x = functional.dropout(x.permute(0, 2, 3, 1).flatten(1, 2), 0.5, self.training)
                first, second = functional.pad(x, (0, 0, 1, 1)).chunk(2, 1)
                return self.layer(first[:, 0].contiguous()) + second.sum()

        graph = record_calls(Moves(), IMAGE)
        steps = Steps(graph, {"layer"})
        (layer,) = (step for step in steps.steps if step.layer)
        (tanh,) = (step for step in steps.steps if step.function == "tanh")
        assert steps.root(layer.inputs[0]) == tanh.outputs[0]
        assert [step.name for step, _ in steps.readers[tanh.outputs[0]]] == ["layer", "sum"]
        assert steps.drops(layer.inputs[0])

    def test_padding_with_another_value_makes_another_value(self) -> None:
        class Pads(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return functional.pad(x, (1, 1), value=1.0) + 1

        graph = record_calls(Pads(), IMAGE)
        steps = Steps(graph, set())
        assert steps.root(graph.calls[-1].inputs[0]) == graph.calls[-2].outputs[0]
