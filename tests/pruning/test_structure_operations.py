"""One small module for each kind of operation: cutting random units must be the same as zeroing them."""

import copy

import pytest
import torch
from structure_helpers import check_exact, enliven
from torch import nn
from torch.nn import functional as F

from lightning_opt.pruning.structure import trace


class Model(nn.Module):
    """A module from a forward function over named parts."""

    def __init__(self, forward, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self._forward = forward

    def forward(self, *inputs):
        return self._forward(self, *inputs)


def image(channels=3, size=8):
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(3))


def rows(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def conv(a, b, **more):
    return nn.Conv2d(a, b, 3, padding=1, **more)


def shuffled(m, x):
    a, b = m.a(x).chunk(2, 1)
    x = torch.cat([a, m.b(b)], 1)
    n, c, h, w = x.shape
    return m.head(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w).mean((2, 3)))


def shortcut_by_padding(m, x):
    x = m.a(x)
    return m.head((m.b(x) + F.pad(x, (0, 0, 0, 0, 3, 3))).mean((2, 3)))


def attend(q, k, v):
    return (q @ k.transpose(-1, -2) / 3.0).softmax(-1) @ v


def separate_heads(m, x):
    q, k, v = (layer(x).view(*x.shape[:2], m.heads, -1).transpose(1, 2) for layer in (m.q, m.k, m.v))
    return m.out(attend(q, k, v).transpose(1, 2).flatten(2)).sum(1)


def fused_heads(m, x):
    q, k, v = m.qkv(x).reshape(*x.shape[:2], 3, m.heads, m.dim).permute(2, 0, 3, 1, 4).unbind(0)
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return m.out(y.reshape(*x.shape[:2], m.heads * m.dim)).sum(1)


def fused_split(m, x):
    q, k, v = (part.unflatten(-1, (m.heads, -1)).transpose(1, 2) for part in m.qkv(x).split(m.width, -1))
    return m.out(attend(q, k, v).transpose(1, 2).flatten(2)).sum(1)


def grouped_queries(m, x):
    q = m.q(x).view(*x.shape[:2], -1, m.dim).transpose(1, 2)
    k, v = (layer(x).view(*x.shape[:2], -1, m.dim).transpose(1, 2) for layer in (m.k, m.v))
    y = F.scaled_dot_product_attention(q, k, v, scale=0.4, enable_gqa=True)
    return m.out(y.transpose(1, 2).flatten(2)).sum(1)


def grouped_by_repeats(m, x):
    q = m.q(x).view(*x.shape[:2], -1, m.dim).transpose(1, 2)
    k, v = (layer(x).view(*x.shape[:2], -1, m.dim).transpose(1, 2) for layer in (m.k, m.v))
    k, v = (part.repeat_interleave(m.repeats, 1) for part in (k, v))
    return m.out(attend(q, k, v).transpose(1, 2).flatten(2)).sum(1)


def by_einsum(m, x):
    q, k, v = (torch.einsum("btd,dhk->bthk", x, weight) for weight in (m.q, m.k, m.v))
    scores = torch.einsum("bihk,bjhk->bhij", q, k).softmax(-1)
    return torch.einsum("bhij,bjhk,hkd->bd", scores, v, m.out)


def rotary(m, x):
    q, k, v = (layer(x).view(*x.shape[:2], m.heads, -1).transpose(1, 2) for layer in (m.q, m.k, m.v))
    angles = torch.outer(torch.arange(x.shape[1]).float(), m.frequencies)
    cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()

    def turn(y):
        half = y.shape[-1] // 2
        return y * cos + torch.cat([-y[..., half:], y[..., :half]], -1) * sin

    return m.out(attend(turn(q), turn(k), v).transpose(1, 2).flatten(2)).sum(1)


def rotary_buffer():
    m = Model(rotary, q=nn.Linear(12, 12), k=nn.Linear(12, 12), v=nn.Linear(12, 12), out=nn.Linear(12, 3), heads=3)
    m.register_buffer("frequencies", torch.tensor([1.0, 0.1]))
    return m


def interleaved(m, x):
    y = m.a(x)
    return m.b(torch.stack([-y[..., 1::2], y[..., ::2]], -1).flatten(-2) * y)


def tokens_and_positions(m, ids):
    x = torch.cat([m.cls.expand(len(ids), -1, -1), m.table(ids)], 1) + m.positions
    return m.head((m.scale * m.inner(x)).relu().mean(1))


def tied(m, ids):
    return F.linear(torch.relu(m.inner(m.table(ids))), m.table.weight)


def join_with_nothing(m, x):
    y = torch.relu(m.a(x))
    return m.b(torch.cat([y, y[..., y.shape[-1] :]], -1))


def gated(m, x):
    a, b = m.a(x).chunk(2, -1)
    return m.b(a * torch.sigmoid(b))


def attend_to_channels(m, x):
    x = m.a(x)
    return m.head((x * torch.sigmoid(m.b(torch.relu(m.c(x.mean((2, 3), keepdim=True)))))).amax((2, 3)))


def skip_and_join(m, x):
    first = m.a(x)
    y = m.up(torch.relu(m.b(F.max_pool2d(first, 2))))
    return m.head(F.interpolate(torch.cat([y, first], 1), scale_factor=2).mean((2, 3)))


def recur(m, x):
    return m.head(torch.relu(m.rnn(m.a(x))[0]).mean(1))


def parameter(*shape):
    return nn.Parameter(torch.zeros(shape))


CASES = {
    "residual": (
        lambda: Model(
            lambda m, x: m.head(torch.relu(m.a(x) + m.c(torch.relu(m.n(m.b(m.a(x)))))).mean((2, 3))),
            **{"a": conv(3, 6), "b": conv(6, 8), "n": nn.BatchNorm2d(8), "c": conv(8, 6), "head": nn.Linear(6, 3)},
        ),
        image(),
    ),
    "concatenation": (
        lambda: Model(
            lambda m, x: m.head(torch.relu(m.n(torch.cat([m.a(x), m.b(x)], 1))).mean((2, 3))),
            **{"a": conv(3, 4), "b": conv(3, 6), "n": nn.BatchNorm2d(10), "head": nn.Linear(10, 3)},
        ),
        image(),
    ),
    "shuffle": (lambda: Model(shuffled, a=conv(3, 8), b=conv(4, 4), head=nn.Linear(8, 3)), image()),
    "channel_shuffle": (
        lambda: Model(
            lambda m, x: m.c(m.s(m.b(m.a(x)))).mean((2, 3)),
            **{"a": conv(3, 12), "b": conv(12, 12, groups=3), "s": nn.ChannelShuffle(3), "c": conv(12, 4)},
        ),
        image(),
    ),
    "shortcut_by_padding": (
        lambda: Model(shortcut_by_padding, a=conv(3, 6), b=conv(6, 12), head=nn.Linear(12, 3)),
        image(),
    ),
    "depthwise": (
        lambda: nn.Sequential(conv(3, 8), conv(8, 8, groups=8), nn.BatchNorm2d(8), nn.ReLU6(), conv(8, 2)),
        image(),
    ),
    "depthwise_with_multiplier": (lambda: nn.Sequential(conv(3, 4), conv(4, 12, groups=4), conv(12, 2)), image()),
    "grouped": (lambda: nn.Sequential(conv(3, 12), conv(12, 24, groups=4), nn.ReLU(), conv(24, 2)), image()),
    "transposed": (
        lambda: nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 12, 2, stride=2, groups=4), conv(12, 2)),
        image(),
    ),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(2, 6, 3), nn.ELU(), nn.AvgPool1d(2), nn.Conv1d(6, 2, 3)),
        rows(2, 2, 16),
    ),
    "conv3d": (
        lambda: nn.Sequential(nn.Conv3d(2, 6, 2), nn.InstanceNorm3d(6, affine=True), nn.ConvTranspose3d(6, 2, 2)),
        rows(2, 2, 4, 4, 4),
    ),
    "flatten": (
        lambda: nn.Sequential(
            conv(3, 6), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(96, 10), nn.PReLU(10), nn.Linear(10, 3)
        ),
        image(),
    ),
    "pixel_shuffle": (lambda: nn.Sequential(conv(3, 16), nn.PixelShuffle(2), conv(4, 2)), image()),
    "pixel_unshuffle": (lambda: nn.Sequential(conv(3, 4), nn.PixelUnshuffle(2), conv(16, 2)), image()),
    "group_norm": (lambda: nn.Sequential(conv(3, 12), nn.GroupNorm(4, 12), nn.ReLU(), conv(12, 2)), image()),
    "unet": (
        lambda: Model(
            skip_and_join, a=conv(3, 4), b=conv(4, 6), up=nn.ConvTranspose2d(6, 5, 2, stride=2), head=nn.Linear(9, 3)
        ),
        image(),
    ),
    "squeeze_excite": (
        lambda: Model(
            attend_to_channels, a=conv(3, 6), b=nn.Conv2d(4, 6, 1), c=nn.Conv2d(6, 4, 1), head=nn.Linear(6, 3)
        ),
        image(),
    ),
    "separate_heads": (lambda: _heads(), rows(2, 5, 12)),
    "fused_heads": (
        lambda: Model(fused_heads, qkv=nn.Linear(12, 36), out=nn.Linear(12, 3), heads=4, dim=3),
        rows(2, 5, 12),
    ),
    "fused_split": (
        lambda: Model(fused_split, qkv=nn.Linear(12, 36), out=nn.Linear(12, 3), heads=4, width=12),
        rows(2, 5, 12),
    ),
    "grouped_queries": (lambda: _grouped(grouped_queries), rows(2, 5, 12)),
    "grouped_by_repeats": (lambda: _grouped(grouped_by_repeats, repeats=3), rows(2, 5, 12)),
    "einsum": (
        lambda: Model(
            by_einsum, q=parameter(6, 4, 3), k=parameter(6, 4, 3), v=parameter(6, 4, 3), out=parameter(4, 3, 5)
        ),
        rows(2, 5, 6),
    ),
    "rotary": (rotary_buffer, rows(2, 5, 12)),
    "interleaved": (lambda: Model(interleaved, a=nn.Linear(6, 12), b=nn.Linear(12, 3)), rows(2, 6)),
    "class_token": (
        lambda: Model(
            tokens_and_positions,
            **{"cls": parameter(1, 1, 8), "positions": parameter(1, 6, 8), "table": nn.Embedding(20, 8)},
            **{"inner": nn.Linear(8, 10), "scale": parameter(10), "head": nn.Linear(10, 3)},
        ),
        torch.randint(0, 20, (2, 5)),
    ),
    "tied": (lambda: Model(tied, table=nn.Embedding(20, 8), inner=nn.Linear(8, 8)), torch.randint(0, 20, (2, 5))),
    "gated": (lambda: Model(gated, a=nn.Linear(6, 16), b=nn.Linear(8, 3)), rows(2, 6)),
    "join_with_nothing": (lambda: Model(join_with_nothing, a=nn.Linear(6, 8), b=nn.Linear(8, 3)), rows(2, 6)),
    "buffer": (lambda: _with_buffer(), rows(2, 6)),
    "glu": (lambda: nn.Sequential(conv(3, 8), nn.GLU(1), conv(4, 2)), image()),
    "gru": (
        lambda: Model(recur, a=nn.Linear(4, 6), rnn=nn.GRU(6, 8, 2, batch_first=True), head=nn.Linear(8, 3)),
        rows(2, 5, 4),
    ),
    "lstm": (
        lambda: Model(
            recur,
            **{"a": nn.Linear(4, 6), "rnn": nn.LSTM(6, 8, bidirectional=True, batch_first=True)},
            head=nn.Linear(16, 3),
        ),
        rows(2, 5, 4),
    ),
}


def _heads():
    parts = {name: nn.Linear(12, 12) for name in "qkv"}
    return Model(separate_heads, **parts, out=nn.Linear(12, 3), heads=4)


def _with_buffer():
    """A buffer is added: cut units are not zero after it, which does no harm before a linear layer."""
    m = Model(lambda m, x: m.b(m.a(x) + m.shift), a=nn.Linear(6, 8), b=nn.Linear(8, 3))
    m.register_buffer("shift", torch.arange(8.0))
    return m


def _grouped(forward, **more):
    return Model(
        forward, q=nn.Linear(12, 24), k=nn.Linear(12, 8), v=nn.Linear(12, 8), out=nn.Linear(24, 3), dim=4, **more
    )


@pytest.mark.parametrize("case", CASES)
def test_cut_equals_zeroed(case):
    build, inputs = CASES[case]
    torch.manual_seed(0)
    check_exact(build(), inputs)


def sizes(case, kind):
    build, inputs = CASES[case]
    return sorted(group.size for group in trace(build(), inputs, verify=False).groups if group.kind == kind)


def test_what_can_be_cut():
    assert sizes("residual", "channels") == [6, 8]
    assert sizes("concatenation", "channels") == [4, 6]
    assert sizes("shortcut_by_padding", "channels") == [6]  # six of the twelve channels meet padding, which stays
    assert sizes("depthwise", "channels") == [8]
    assert sizes("grouped", "channels") == [4]
    assert sizes("grouped", "inner") == [3, 6]
    assert sizes("pixel_shuffle", "channels") == [4]
    assert sizes("grouped_queries", "heads") == [2]
    assert sizes("grouped_queries", "queries") == [3]
    assert sizes("rotary", "head_dim") == [2, 4]  # of queries and keys, pairs of entries that turn together
    assert sizes("fused_split", "heads") == [4]


def test_weight_norm_is_cut_with_its_lengths():
    model = enliven(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3)))
    structure = trace(model, rows(2, 6))
    (group,) = structure.groups
    assert not group.exact  # a row of zeros has no direction
    rows_of_weight = model[0].weight.detach()[[1, 4]]
    small = structure.edit({group.name: [1, 4]}).apply(copy.deepcopy(model))
    assert torch.equal(small[0].weight, rows_of_weight)
    assert small(rows(2, 6)).shape == (2, 3)


def test_heads_of_fused_and_of_separate_projections_are_the_same_units():
    fused = next(g for g in trace(*_built("fused_heads")).groups if g.kind == "heads")
    places = {(member.tensor, member.dim): member.indices.tolist() for member in fused.members}
    assert places["qkv.weight", 0][1] == [3, 4, 5, 15, 16, 17, 27, 28, 29]
    assert places["out.weight", 1][1] == [3, 4, 5]


def _built(case):
    build, inputs = CASES[case]
    return enliven(build()), inputs
