"""A teacher in 8 bits: rounded as the formula says, smaller, and nearly of the same opinion."""

import copy
import logging

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from lightning_opt.errors import ConfigError
from lightning_opt.losses.teachers import FixedWeights
from lightning_opt.models import GPT, ConvNet, TextEncoder
from lightning_opt.modules import Teacher
from lightning_opt.modules.teacher_cache import cache_key
from lightning_opt.modules.teacher_placement_int8 import as_int8
from lightning_opt.modules.teacher_placement_whole import bytes_of
from lightning_opt.testing.ranks import on_ranks


def rounded(weight, *, rows=0):
    """Return the nearest multiple of each row's scale, in float64: max |w| / 127 (symmetric, round half to even)."""
    values = np.moveaxis(weight.detach().double().numpy(), rows, 0)
    scale = np.abs(values).reshape(len(values), -1).max(1) / 127
    scale = scale.reshape(-1, *[1] * (values.ndim - 1))
    return torch.from_numpy(np.moveaxis(np.rint(values / scale) * scale, 0, rows))


def with_rounded_weights(network):
    """Return a float64 copy whose large weights are rounded, each in its place and without any of our classes."""
    network = copy.deepcopy(network).double()
    done = set()
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Embedding | nn.Conv2d | nn.Conv1d) and id(layer.weight) not in done:
            done.add(id(layer.weight))
            layer.weight.data = rounded(layer.weight.data.float())
    return network.eval()


def encoder():
    torch.manual_seed(1)
    return TextEncoder(num_outputs=3, vocab_size=500, max_length=16, dim=64, depth=2, heads=4)


def gpt():
    torch.manual_seed(2)
    return GPT(vocab_size=300, context_length=16, dim=64, depth=2, heads=4)  # its table is its head


def cnn():
    torch.manual_seed(3)
    return ConvNet(in_channels=1, widths=[16, 32], num_outputs=5)


WORDS = torch.randint(300, (20, 16), generator=torch.Generator().manual_seed(7))
IMAGES = torch.randn(20, 1, 12, 12, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize(("make", "inputs", "share"), [(encoder, WORDS, 0.3), (gpt, WORDS, 0.3), (cnn, IMAGES, 0.35)])
def test_it_answers_as_the_rounded_weights_do_and_takes_a_quarter_of_the_memory(make, inputs, share):
    network = make().eval()
    teacher = Teacher(network, dtype="int8")
    said = teacher(inputs).logits
    assert said.dtype == torch.float32
    expected = with_rounded_weights(network)(inputs.double() if inputs.is_floating_point() else inputs)
    torch.testing.assert_close(said.double(), expected, atol=2e-5, rtol=1e-4)
    assert not torch.equal(said, network(inputs)), "nothing was rounded"
    assert bytes_of(teacher.answering) < share * bytes_of(network)
    assert next(network.parameters()).dtype == torch.float32, "the caller's network changed"


class Conv1D(nn.Module):
    """The layer of Hugging Face's GPT-2: its weight is (inputs, outputs)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.weight, self.bias = nf, nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


def test_a_transposed_layer_has_a_scale_an_output_and_a_tied_weight_is_held_once():
    torch.manual_seed(5)
    layer = Conv1D(6, 8)
    x = torch.randn(4, 8)
    said = as_int8(nn.Sequential(layer))(x)
    expected = x.double() @ rounded(layer.weight, rows=1) + layer.bias.double()
    torch.testing.assert_close(said.double(), expected, atol=1e-5, rtol=1e-5)

    table, head = nn.Embedding(40, 8), nn.Linear(8, 40, bias=False)
    head.weight = table.weight
    tied = as_int8(nn.Sequential(table, head))
    assert tied[0].integers is tied[1].integers
    assert functional.cosine_similarity(tied[0].weight, table.weight).min() > 0.999


def test_a_network_without_large_weights_is_refused():
    with pytest.raises(ConfigError, match=r"teacher.dtype=int8: Sequential has no linear layer"):
        Teacher(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4)), dtype="int8")


def test_the_log_says_how_it_computes_and_how_often_it_agrees(caplog):
    network = encoder().eval()
    teacher = Teacher(network, dtype="int8", name="tutor")
    with caplog.at_level(logging.INFO, logger="lightning_opt"):
        logging.getLogger("lightning_opt").propagate = True
        said = teacher(WORDS).logits
        teacher(WORDS)
    # A handler on the logger itself and one above it may both hear it, if an earlier test let it through.
    once = {id(record): record for record in caplog.records if "int8" in record.getMessage()}
    lines = [record.getMessage() for record in once.values()]
    agree = (said.argmax(-1) == network(WORDS).argmax(-1)).float().mean() * 100
    assert len(lines) == 1, "it is said once"
    assert lines[0].startswith("tutor: int8 weights in 15 layers")
    assert f"on 20 samples it says what the float teacher does in {agree:.1f} %" in lines[0]


def test_stored_answers_of_an_int8_teacher_are_not_those_of_a_float_one():
    keys = [
        cache_key([Teacher(encoder(), dtype=dtype)], data_fingerprint="", versions=1, spec={}, weighting=FixedWeights())
        for dtype in (None, "int8", "bfloat16")
    ]
    assert len(set(keys)) == 3


class Standing:
    root_device = torch.device("cpu")
    world_size = 2

    @property
    def distributed_sampler_kwargs(self):
        return {"rank": dist.get_rank()}


@pytest.mark.parametrize("placement", ["sharded", "pipeline"])
def test_its_integers_are_spread_like_any_weights(placement):
    def job():
        network = gpt()
        words = WORDS[dist.get_rank() :: 2]
        whole = Teacher(network, dtype="int8")(words).logits
        teacher = Teacher(network, dtype="int8", placement=placement)
        teacher(words)
        teacher.place(Standing())
        said, held = teacher(words).logits, teacher.held()
        teacher.release()
        return float((said - whole).abs().max()), held.rank_bytes, held.whole_bytes, bytes_of(network)

    for difference, on_a_rank, whole, floats in on_ranks(job, group=True):
        assert difference <= 1e-6
        assert whole < 0.3 * floats
        assert on_a_rank < (0.55 if placement == "sharded" else 0.75) * whole
