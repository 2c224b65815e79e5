"""Which layers read which channels, in nets whose answers are known by construction."""

import torch
from torch import nn
from torch.nn import functional

from lightning_opt.quantization.neighbours import neighbours
from lightning_opt.quantization.rescaling import check, rescale


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """Names say nothing of what reads what."""

    def __init__(self):
        super().__init__()
        self.d = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.a = nn.BatchNorm2d(8)
        self.c = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.b = nn.Conv2d(8, 4, 1, groups=2)
        self.e = nn.Linear(4 * 9, 6)
        self.f = nn.Linear(6, 6)
        self.g = nn.Linear(6, 5)

    def forward(self, x):
        x = functional.max_pool2d(torch.relu(self.a(self.d(x))), 2)
        x = functional.leaky_relu(self.c(x))
        x = self.b(x).relu_().flatten(1)
        x = functional.gelu(self.e(x))
        return self.g(functional.dropout(torch.relu(self.f(x)), training=self.training))


def net():
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.a.running_mean.uniform_(-0.5, 0.5)
        model.a.running_var.uniform_(0.5, 2.0)
    return model.eval()


def test_channels_are_followed_through_what_lets_them_pass():
    found, refused = neighbours(net(), draw(4, 3, 6, 6))
    assert [(group.producer, group.norm, group.readers) for group in found] == [
        ("d", "a", ("c",)),
        ("c", None, ("b",)),
        ("b", None, ("e",)),
        ("f", None, ("g",)),
    ]
    assert refused == ()


def test_finding_changes_nothing():
    model, x = net(), draw(4, 3, 6, 6)
    model.train()
    model.a.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    neighbours(model, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert not model.a.training


def test_any_positive_factors_leave_the_answers_what_they_are():
    model, x = net(), draw(4, 3, 6, 6)
    wanted = model(x)
    for seed, group in enumerate(neighbours(model, x)[0]):
        channels = 4 if group.producer == "b" else 6 if group.producer == "f" else 8
        rescale(model, group, draw(channels, seed=seed).exp())
    assert not torch.equal(model.d.weight, net().d.weight) or not torch.equal(model.a.weight, net().a.weight)
    for name in ("a", "c", "b", "e", "f", "g"):
        assert not torch.allclose(getattr(model, name).weight, getattr(net(), name).weight)
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)


class Attention(nn.Module):
    """Pre-norm attention with a residual, then one norm that the residual reads as well."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.post = nn.RMSNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (layer(h).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        h = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.post(x + self.out(h))
        return x + self.down(torch.relu(self.up(x)))


def test_attention_and_norms():
    torch.manual_seed(0)
    found, refused = neighbours(Attention(), draw(2, 5, 8))
    assert [(group.producer, group.readers) for group in found] == [
        ("norm", ("q", "k", "v")),
        ("v", ("out",)),
        ("up", ("down",)),
    ]
    assert {one.path: one.why for one in refused} == {"post": "its output is also read by add in the model"}


class Refusing(nn.Module):
    """Each producer has a reader, and a reason why its channels cannot be scaled."""

    def __init__(self):
        super().__init__()
        self.returned, self.twice, self.tied, self.mixed = (nn.Linear(8, 8) for _ in range(4))
        self.r, self.s, self.t, self.u = (nn.Linear(8, 8) for _ in range(4))
        self.t.weight = self.u.weight

    def forward(self, x):
        y = self.returned(x)
        z = self.s(torch.relu(self.twice(torch.relu(self.twice(x)))))
        w = self.t(torch.relu(self.tied(x))) + self.u(x)
        m = self.mixed(x).unflatten(-1, (2, 4)).transpose(-1, -2).flatten(-2)
        return y, self.r(y) + z + w, torch.relu(m) @ self.r.weight.T


def test_refusals_say_why():
    torch.manual_seed(0)
    found, refused = neighbours(Refusing(), draw(4, 8))
    reasons = {one.path: one.why for one in refused}
    assert found == ()
    assert reasons["returned"] == "the model returns its output"
    assert reasons["twice"] == "twice is called 2 times"
    assert reasons["tied"] == "t shares its weight with another layer"


class Shuffled(nn.Module):
    """A reader that gets the channels in another order: only trying it out shows it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)).unflatten(-1, (2, 4)).transpose(-1, -2).flatten(-2))


def test_channels_in_another_order_are_noticed():
    torch.manual_seed(0)
    model = Shuffled()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found, refused = neighbours(model, draw(4, 8))
    assert found == ()
    assert [one.why for one in refused] == ["its channels do not reach second one by one"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_check_passes_what_is_right():
    model, x = net(), draw(4, 3, 6, 6)
    assert all(check(model, group, x) is None for group in neighbours(model, x)[0])
