"""Masks of weights that are spread over processes are those of one process that has them whole."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lightning_opt.pruning.allocation import ERK, LAMP, GlobalAllocation, PerLayer, Uniform
from lightning_opt.pruning.criteria import Magnitude, Random
from lightning_opt.pruning.criteria.base import Evidence
from lightning_opt.pruning.parts import Layout, local_of
from lightning_opt.pruning.parts_selection import score_part, select_parts
from lightning_opt.pruning.patterns import NM, Block, Columns, Element, Pattern, Rows
from lightning_opt.pruning.selection import select
from lightning_opt.testing.ranks import on_ranks

SHAPES = {"a.weight": (10, 12), "b.weight": (7, 20), "c.weight": (1, 8), "d.weight": (24, 16), "e.weight": (5, 4, 3, 3)}
TURNED = ("d.weight",)


def weights(kind="normal", dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, shape in SHAPES.items():
        value = torch.randn(shape, generator=generator)
        if kind == "ties":
            value = value.mul(1.5).round().mul(0.5)  # a dozen values, zeros with both signs
        if kind == "equal":
            value = torch.ones(shape)
        found[name] = value.to(dtype)
    return found


class Halves(Pattern):
    """Somebody's own pattern: the first and the second half of each row."""

    def check(self, name, shape):
        pass

    def unit_size(self, shape):
        return shape.numel() // shape[0] // 2

    def pool(self, scores):
        return scores.reshape(len(scores), 2, -1).sum(-1).reshape(-1)

    def expand(self, kept, shape):
        half = kept.reshape(shape[0], 2, 1)
        return half.expand(shape[0], 2, shape.numel() // shape[0] // 2).reshape(shape)


class OnlyScores(GlobalAllocation):
    """Somebody's own allocation, which reads the scores themselves."""

    def rank(self, units):
        return {name: scores / scores.mean() for name, scores in units.items()}


def expected(values, *, criterion=Magnitude(), **how):  # noqa: B008
    scores = {name: criterion.score(value, Evidence(name=name)) for name, value in values.items()}
    return select(scores, **how)


def chosen(layout, held, *, criterion=Magnitude(), **how):  # noqa: B008
    parts = {name: local_of(held[name]) if name in held else None for name in layout}
    scores = {name: score_part(criterion, name, part, Evidence(name=name), layout) for name, part in parts.items()}
    masks = select_parts(scores, layout, **how)
    assert masks.keys() == held.keys()
    return {name: layout.whole(name, masks.get(name), dtype=torch.bool) for name in layout}


HOWS = [
    {"pattern": Element(), "allocation": GlobalAllocation()},
    {"pattern": Element(), "allocation": Uniform()},
    {"pattern": Element(), "allocation": ERK()},
    {"pattern": Element(), "allocation": LAMP()},
    {"pattern": Element(), "allocation": PerLayer(sparsities={"a*": 0.0, "b*": 0.3})},
    {"pattern": Element(), "allocation": GlobalAllocation(min_density=0.3)},
    {"pattern": Element(), "allocation": OnlyScores()},
    {"pattern": Element(), "allocation": GlobalAllocation(), "criterion": Random()},
]
COARSE = [
    {"pattern": NM(2, 4), "allocation": GlobalAllocation()},
    {"pattern": Rows(), "allocation": GlobalAllocation()},
    {"pattern": Rows(), "allocation": Uniform()},
    {"pattern": Columns(), "allocation": Uniform()},
    {"pattern": Columns(), "allocation": GlobalAllocation()},
    {"pattern": Block(1, 4), "allocation": GlobalAllocation()},
    {"pattern": Block(1, 2), "allocation": LAMP()},
    {"pattern": Halves(), "allocation": Uniform()},
]


def check_all(spread, values, hows=None, ratios=(0.5, 0.9)):
    """Compare under one way of spreading, in all processes at once."""
    held = spread(values)
    layout = Layout.of(held, order=list(values))
    assert list(layout) == list(values)
    for how in HOWS if hows is None else hows:
        for sparsity in ratios:
            for fraction in (0.6, 1.0):
                settings = {**how, "sparsity": sparsity, "fraction": fraction, "inputs_first": TURNED}
                if isinstance(how["allocation"], GlobalAllocation) and how["allocation"].min_density == 0.3:
                    settings["sparsity"] = min(sparsity, 0.6)
                one, many = expected(values, **settings), chosen(layout, held, **settings)
                for name in values:
                    assert torch.equal(one[name], many[name]), (settings, name)


def fsdp(values):
    """As `fully_shard` does it: rows, the last processes may have none."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    net = nn.Module()
    for name, value in values.items():
        child = nn.Module()
        child.weight = nn.Parameter(value.clone())
        net.add_module(name.split(".")[0], child)
    fully_shard(net, mesh=mesh)
    return {name: p.detach() for name, p in net.named_parameters()}


def by_dim(dims):
    def spread(values):
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        kinds = {name: Replicate() if dim is None else Shard(dim) for name, dim in zip(values, dims, strict=True)}
        return {name: distribute_tensor(value, mesh, [kinds[name]]) for name, value in values.items()}

    return spread


def two_by_two(values):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    kinds = [
        [Shard(0), Shard(1)],
        [Shard(1), Shard(1)],
        [Replicate(), Shard(1)],
        [Shard(0), Replicate()],
        [Replicate(), Replicate()],
    ]
    return {n: distribute_tensor(v, mesh, k) for (n, v), k in zip(values.items(), kinds, strict=True)}


def tensor_then_fsdp(values):
    """As FSDP2 over tensor parallelism leaves it: both along the rows."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    net = nn.Module()
    for number, (name, value) in enumerate(values.items()):
        child = nn.Module()
        kind = Shard(number % 2) if value.shape[0] % 4 == 0 else Replicate()
        child.weight = nn.Parameter(distribute_tensor(value.clone(), mesh["tensor"], [kind]))
        net.add_module(name.split(".")[0], child)
    fully_shard(net, mesh=mesh["data"])
    return {name: p.detach() for name, p in net.named_parameters()}


def stages(values):
    """As a pipeline leaves it: some of the layers, one of them on two stages."""
    rank, names = dist.get_rank(), list(values)
    mine = names[:3] if rank == 0 else names[2:]
    return {name: values[name].clone() for name in mine}


@pytest.mark.parametrize("ranks", [2, 3])
def test_rows_over_processes(ranks):
    def job():
        for kind in ("normal", "ties") if ranks == 2 else ("equal",):
            check_all(fsdp, weights(kind), ratios=(0.7,))
        check_all(fsdp, weights("normal", torch.bfloat16), ratios=(0.7,))
        check_all(fsdp, weights("ties"), COARSE, ratios=(0.5,))

    on_ranks(job, ranks=ranks, group=True)


def test_columns_replicas_and_stages():
    def job():
        for spread in (by_dim([1, 0, None, 1, 1]), stages):
            check_all(spread, weights("ties"), ratios=(0.7,))
            check_all(spread, weights("normal"), COARSE, ratios=(0.5,))

    on_ranks(job, group=True)


def test_two_dimensions_of_processes():
    def job():
        for spread in (two_by_two, tensor_then_fsdp):
            check_all(spread, weights("ties"), ratios=(0.7,))
            check_all(spread, weights("normal"), [*COARSE[:1], *COARSE[5:7]], ratios=(0.5,))

    on_ranks(job, ranks=4, group=True)


def test_what_is_not_a_number_is_refused_on_all_processes_by_name():
    def job():
        values = weights()
        values["d.weight"][23, 3] = torch.nan  # the last process has it
        held = fsdp(values)
        layout = Layout.of(held)
        scores = {name: local_of(value).abs() for name, value in held.items()}
        for how in (*HOWS[:4], COARSE[0], COARSE[5]):
            settings = {key: value for key, value in how.items() if key != "criterion"}
            with pytest.raises(ValueError, match=r"d\.weight hold NaN"):
                select_parts(scores, layout, sparsity=0.5, **settings)

    on_ranks(job, group=True)


def test_tensors_come_together_bit_for_bit():
    def job():
        for dtype in (torch.bfloat16, torch.float64, torch.bool, torch.float32):
            value = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
            if dtype.is_floating_point:
                value[0, 0], value[4, 1], value[2, 2] = -0.0, torch.nan, torch.inf
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            held = distribute_tensor(value, mesh, [Shard(0)]) if dtype != torch.bool else value
            layout = Layout.of({"w": held})
            whole = layout.whole("w", local_of(held))
            assert whole.dtype == dtype
            assert torch.equal(whole.view(torch.uint8), value.view(torch.uint8))
            if isinstance(held, DTensor):
                assert torch.equal(layout.part("w", value).view(torch.uint8), local_of(held).view(torch.uint8))

    on_ranks(job, ranks=3, group=True)
