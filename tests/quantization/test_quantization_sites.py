"""Sites: values that are caught where they are made, and modules that stay what they were around that."""

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lightning_opt.quantization import sites
from lightning_opt.quantization.grid import Grid
from lightning_opt.quantization.observers import MinMax
from lightning_opt.quantization.quantizer import FakeQuantizer, calibrating
from lightning_opt.quantization.sites import paused

SCALE = 0.125


def rounded(x: Tensor) -> Tensor:
    """Round to multiples of 1/8 from -16 to 15.875, which float32 does exactly."""
    return (x / SCALE).round().clamp(-128, 127) * SCALE


def site(function: str, index: int = 0) -> tuple[str, int, dict[str, Any]]:
    return (function, index, {"grid": {"symmetric": False, "signed": False, "narrow": False}})


def swap_owner(module: nn.Module, found: list[Any]) -> None:
    sites.swap_owner(module, found, make=made)


def made(values: Any) -> FakeQuantizer:
    quantizer = FakeQuantizer(Grid.from_dict(values["grid"]), observer=MinMax())
    quantizer.observing = False
    return quantizer


def switch_on(model: nn.Module) -> nn.Module:
    for quantizer in quantizers(model):
        quantizer.enabled, quantizer.observing = True, False
        quantizer.scale.fill_(SCALE)
        quantizer.zero_point.fill_(128)
    return model


def quantizers(model: nn.Module) -> Iterator[FakeQuantizer]:
    return (module for module in model.modules() if isinstance(module, FakeQuantizer))


class Block(nn.Module):
    """Uses functions, an operator, a shared activation module and a child that adds as well."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.relu = nn.ReLU()
        self.inner = Inner()

    def forward(self, x: Tensor) -> Tensor:
        a = self.relu(self.first(x))
        b = functional.relu(self.second(a))
        c = a + self.inner(b)
        return self.relu(c + 1)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x


def block_by_hand(block: Block, x: Tensor) -> Tensor:
    """The same block with its second relu, its second sum and its child's sum rounded."""
    a = functional.relu(block.first(x))
    b = rounded(functional.relu(block.second(a)))
    inner = rounded(block.inner.layer(b) + b)
    return functional.relu(rounded(a + inner) + 1)


def owned_block() -> Block:
    block = Block()
    swap_owner(block, [site("relu", 1), site("add", 0)])
    swap_owner(block.inner, [site("add", 0)])
    return block


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(5, 6)


class TestWhatIsRounded:
    def test_calls_count_by_name_and_only_those_of_the_innermost_owner(self, x: Tensor) -> None:
        block = switch_on(owned_block())
        assert torch.equal(block(x), block_by_hand(block, x))

    def test_each_forward_counts_from_zero(self, x: Tensor) -> None:
        block = switch_on(owned_block())
        assert torch.equal(block(block(x)), block_by_hand(block, block_by_hand(block, x)))

    def test_a_child_that_is_no_owner_counts_for_the_owner_around_it(self, x: Tensor) -> None:
        block = Block()
        swap_owner(block, [site("add", 1)])
        switch_on(block)
        a = functional.relu(block.first(x))
        b = functional.relu(block.second(a))
        by_hand = functional.relu(rounded(a + (block.inner.layer(b) + b)) + 1)
        assert torch.equal(block(x), by_hand)

    @pytest.mark.parametrize("spelling", ["x + y", "x.add(y)", "torch.add(x, y)", "x.clone().add_(y)", "plus(x, y)"])
    def test_each_spelling_of_a_function_is_the_same_site(self, spelling: str, x: Tensor) -> None:
        class Sum(nn.Module):
            def forward(self, x: Tensor, y: Tensor) -> Any:
                calls = {
                    "x + y": lambda: x + y,
                    "x.add(y)": lambda: x.add(y),
                    "torch.add(x, y)": lambda: torch.add(x, y),
                    "x.clone().add_(y)": lambda: x.clone().add_(y),
                    "plus(x, y)": lambda: x.__radd__(y),
                }
                return calls[spelling]()

        module = Sum()
        swap_owner(module, [site("add")])
        assert torch.equal(switch_on(module)(x, x + 0.3), rounded(x + (x + 0.3)))

    def test_inputs_and_outputs(self, x: Tensor) -> None:
        class Pair(nn.Module):
            def forward(self, x: Tensor, mask: Tensor | None, y: Tensor) -> tuple[Tensor, Tensor]:
                return x * 3, y * 3

        module = Pair()
        swap_owner(module, [site("input", 2), site("output", 0)])
        switch_on(module)
        first, second = module(x, None, y=x)
        assert torch.equal(first, rounded(x * 3))
        assert torch.equal(second, rounded(x) * 3)

    def test_calls_while_paused_do_not_count(self, x: Tensor) -> None:
        class Careful(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                with paused():
                    x = x + 0.3
                return x + 0.3

        module = Careful()
        swap_owner(module, [site("add", 0)])
        assert torch.equal(switch_on(module)(x), rounded(x + 0.3 + 0.3))


class TestWhatStays:
    def test_switched_off_nothing_runs(self, x: Tensor) -> None:
        torch.manual_seed(1)
        plain = Block()
        block = copy.deepcopy(plain)
        parameters = list(block.parameters())
        swap_owner(block, [site("relu", 1), site("output")])
        for quantizer in quantizers(block):
            quantizer.forward = None  # type: ignore[assignment, method-assign]
        assert torch.equal(block(x), plain(x))
        assert all(a is b for a, b in zip(parameters, block.parameters(), strict=True))
        assert set(plain.state_dict()) < set(block.state_dict())
        assert isinstance(block, Block)

    def test_observes_in_calibration_only(self, x: Tensor) -> None:
        block = Block().eval()
        swap_owner(block, [site("relu", 0)])
        block.eval()
        (quantizer,) = quantizers(block)
        quantizer.observing = True
        block(x * 3)
        with calibrating():
            block(x)
        quantizer.fit()
        largest = functional.relu(block.first(x)).max().item()
        assert quantizer.scale.item() == pytest.approx(largest / 255, rel=1e-6)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
    def test_copies_and_pickles(self, copied: Any, x: Tensor) -> None:
        block = switch_on(owned_block())
        twin = copied(block)
        assert torch.equal(twin(x), block(x))
        assert type(twin) is type(block)
        assert {id(t) for t in twin.parameters()}.isdisjoint({id(t) for t in block.parameters()})

    def test_a_sequential_runs_counts_and_gives_out_its_own_parts(self, x: Tensor) -> None:
        relu = nn.ReLU()
        chain = nn.Sequential(nn.Linear(6, 6), relu, nn.Linear(6, 6), relu)
        by_hand = functional.relu(chain[2](rounded(functional.relu(chain[0](x)))))
        swap_owner(chain, [site("relu", 0)])
        switch_on(chain)
        assert torch.equal(chain(x), by_hand)
        assert len(chain) == 4
        assert chain[-1] is relu
        assert list(chain[1:]) == [relu, chain[2], relu]

    def test_gradients_pass_where_values_are_not_clipped(self) -> None:
        module = nn.ReLU()
        swap_owner(module, [site("output")])
        switch_on(module)
        x = torch.tensor([-1.0, 2.03, 17.0], requires_grad=True)
        module(x).sum().backward()
        assert x.grad is not None
        assert x.grad.tolist() == [0.0, 1.0, 0.0]


class TestOtherMachinery:
    def test_activation_checkpointing_rounds_again_when_it_recomputes(self, x: Tensor) -> None:
        block = switch_on(owned_block())
        block.train()
        (grad,) = torch.autograd.grad(block(x).sum(), block.first.weight)
        (again,) = torch.autograd.grad(checkpoint(block, x, use_reentrant=False).sum(), block.first.weight)
        assert torch.equal(grad, again)

    def test_export_follows(self, x: Tensor) -> None:
        block = switch_on(owned_block()).eval()
        exported = torch.export.export(block, (x,), strict=False).module()
        assert torch.equal(exported(x), block_by_hand(block, x))

    def test_compile_follows_without_breaking_the_graph(self, x: Tensor) -> None:
        block = switch_on(owned_block()).eval()
        torch.compiler.reset()
        compiled = torch.compile(block, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), block_by_hand(block, x))


class TestBadInput:
    @pytest.mark.parametrize(
        "wrong",
        [("no_such_function", 0, {"grid": {}}), ("add", -1, {"grid": {}}), ("add", 0), "add"],
    )
    def test_a_site_that_is_none(self, wrong: Any) -> None:
        with pytest.raises(ValueError, match="site"):
            swap_owner(Block(), [wrong])

    def test_the_same_site_twice(self) -> None:
        with pytest.raises(ValueError, match=r"'add' number 0 of .*Block is quantized already"):
            swap_owner(Block(), [site("add"), site("add")])

    def test_a_forward_on_the_object(self) -> None:
        block = Block()
        block.forward = lambda x: x  # type: ignore[method-assign]
        with pytest.raises(ValueError, match="put in on the object"):
            swap_owner(block, [site("add")])

    def test_an_output_that_is_no_tensor(self, x: Tensor) -> None:
        class Named(nn.Module):
            def forward(self, x: Tensor) -> dict[str, Tensor]:
                return {"x": x}

        module = Named()
        swap_owner(module, [site("output")])
        with pytest.raises(TypeError, match="returned dict"):
            switch_on(module)(x)
