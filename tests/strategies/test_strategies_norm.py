"""The norm over plain tensors and DTensors on several meshes, against the whole gradients in float64."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from lightning_opt.strategies.gradient_norm import clip_by_norm_, clip_by_value_, global_norm
from lightning_opt.testing.ranks import on_ranks

SHAPES = {"a": (6, 4), "b": (5,), "c": (1, 4), "d": (8, 2), "e": (8, 4), "f": (3, 3), "g": (4,)}


def whole():
    """Return gradients of very different sizes, so that float32 sums of squares would lose the small ones."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 10.0**n for n, (name, shape) in enumerate(SHAPES.items())}


def parameters(mesh):
    """Return parameters with these gradients: plain, on one of two lines, on both, strided, and a sum."""
    data, tensor = mesh["data_parallel"], mesh["tensor_parallel"]
    layouts = {
        "b": (mesh, [Shard(0), Replicate()]),  # five values on two processes
        "c": (data, [Shard(0)]),  # one row: a process has nothing
        "d": (mesh, [Replicate(), Shard(1)]),
        "e": (mesh, [_StridedShard(0, split_factor=2), Shard(0)]),
        "f": (tensor, [Replicate()]),
    }
    made = {}
    for name, gradient in whole().items():
        if name == "e":  # as FSDP2 leaves a layer that was cut along its rows
            piece = gradient.chunk(2)[tensor.get_local_rank()].chunk(2)[data.get_local_rank()].contiguous()
            placed = DTensor.from_local(piece, mesh, layouts[name][1], run_check=False, shape=(8, 4), stride=(4, 1))
        elif name == "g":
            placed = DTensor.from_local(gradient / 2, tensor, [Partial()], run_check=False)
        else:
            placed = distribute_tensor(gradient, *layouts[name]) if name in layouts else gradient
        parameter = nn.Parameter(torch.zeros_like(placed))
        parameter.grad = placed
        made[name] = parameter
    return made


def full(gradient):
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def job():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data_parallel", "tensor_parallel"))
    norms, clipped, valued = parameters(mesh), parameters(mesh), parameters(mesh)
    said = {"norm": global_norm(norms.values()), "before": clip_by_norm_(clipped.values(), 2.0)}
    clip_by_value_(valued.values(), 0.5)
    said["clipped"] = {name: full(one.grad) for name, one in clipped.items() if name != "e"}
    said["valued"] = {name: full(one.grad) for name, one in valued.items() if name != "e"}
    said["strided"] = clipped["e"].grad.to_local(), valued["e"].grad.to_local()

    # two stages of a pipeline, each on two processes with the same parameters
    stages = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    own = nn.Parameter(torch.zeros(3))
    own.grad = torch.full((3,), 2.0 if dist.get_rank() < 2 else 3.0)
    said["pipeline"] = global_norm([own], groups=[stages[dist.get_rank() % 2]])
    said["nothing"] = global_norm([nn.Parameter(torch.zeros(2))])
    return said


@pytest.fixture(scope="module")
def ranks():
    return on_ranks(job, ranks=4, group=True)


def test_the_norm_is_that_of_the_whole_gradients(ranks):
    expected = torch.cat([one.double().flatten() for one in whole().values()]).norm()
    for rank in ranks:
        assert rank["norm"].item() == pytest.approx(expected.item(), rel=1e-6)
        assert rank["before"].item() == pytest.approx(expected.item(), rel=1e-6)
        assert rank["nothing"] == 0.0


def test_clipping_scales_and_clamps_every_piece(ranks):
    norm = torch.cat([one.double().flatten() for one in whole().values()]).norm()
    for number, rank in enumerate(ranks):
        for name, got in rank["clipped"].items():
            assert torch.allclose(got.double(), whole()[name].double() * (2.0 / (norm + 1e-6)), rtol=1e-5, atol=0)
        for name, got in rank["valued"].items():
            assert torch.allclose(got, whole()[name].clamp(-0.5, 0.5))
        piece = whole()["e"].chunk(2)[number % 2].chunk(2)[number // 2]
        assert torch.allclose(rank["strided"][0].double(), piece.double() * (2.0 / norm), rtol=1e-5, atol=0)
        assert torch.equal(rank["strided"][1], piece.clamp(-0.5, 0.5))


def test_stages_of_a_pipeline_count_each_parameter_once(ranks):
    expected = (3 * 2.0**2 + 3 * 3.0**2) ** 0.5
    assert all(rank["pipeline"].item() == pytest.approx(expected, rel=1e-6) for rank in ranks)


def test_in_one_process_it_is_torchs_own():
    one, other = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(2, 2))
    one.grad, other.grad = torch.arange(4.0), torch.full((2, 2), -2.0)
    expected = [one.grad.clone(), other.grad.clone()]
    total = torch.nn.utils.clip_grad_norm_([one, other], 1.5)
    theirs = one.grad.clone(), other.grad.clone()
    one.grad, other.grad = expected
    assert clip_by_norm_([one, other], 1.5).item() == pytest.approx(total.item(), rel=1e-6)
    assert torch.allclose(one.grad, theirs[0])
    assert torch.allclose(other.grad, theirs[1])
