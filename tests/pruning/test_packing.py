"""Sparse weights as files: exact round trips, sizes by hand, and files that lie."""

import json
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_opt.errors import StorageError, UntrustedInputError
from lightning_opt.pruning.packing import FORMAT, encode, pack_bits, read_sparse, unpack_bits, write_sparse
from lightning_opt.pruning.selection import select
from lightning_opt.pruning.sizes import sizes_on_disk


def pruned(sparsity=0.9):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(256, 300), nn.Linear(300, 10)
    )
    with torch.no_grad():
        weights = {name: p for name, p in model.named_parameters() if p.dim() > 1}
        for name, mask in select({n: p.abs() for n, p in weights.items()}, sparsity=sparsity).items():
            weights[name].mul_(mask)
    return model


@given(st.lists(st.booleans(), max_size=70))
@settings(max_examples=80, deadline=None)
def test_bits_are_numpys(bits):
    mask = torch.tensor(bits, dtype=torch.bool)
    packed = pack_bits(mask)
    np.testing.assert_array_equal(packed.numpy(), np.packbits(np.array(bits, dtype=bool)))
    assert torch.equal(unpack_bits(packed, mask.shape), mask)


def test_bits_are_in_row_major_order_whatever_the_layout():
    mask = (torch.rand(4, 3, 5, 5) < 0.5).to(memory_format=torch.channels_last)
    assert not mask.is_contiguous()
    np.testing.assert_array_equal(pack_bits(mask).numpy(), np.packbits(mask.numpy().ravel()))
    assert torch.equal(unpack_bits(pack_bits(mask), mask.shape), mask)


def test_wrong_bits_are_refused():
    with pytest.raises(ValueError, match="9 bits need 2 bytes"):
        unpack_bits(torch.zeros(3, dtype=torch.uint8), (3, 3))
    with pytest.raises(ValueError, match="behind the end"):
        unpack_bits(torch.tensor([255, 255], dtype=torch.uint8), (3, 3))


def test_fp32_is_lossless_for_every_type(tmp_path):
    state = dict(pruned().state_dict())
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool):
        state[f"sparse_{dtype}"] = (torch.randn(40, 50) * 9 * (torch.rand(40, 50) < 0.1)).abs().to(dtype)
        state[f"dense_{dtype}"] = (torch.randn(4, 5).abs() + 1).to(dtype)
    state |= {"zero": torch.zeros(30, 30), "none": torch.zeros(0, 3), "scalar": torch.tensor(2.5)}
    state["nan"] = torch.full((9, 9), float("nan"))
    state["last"] = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    found = read_sparse(write_sparse(state, tmp_path / "w.safetensors"))
    assert list(found) == list(state)
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype, name
        np.testing.assert_array_equal(found[name].double().numpy(), tensor.double().numpy(), err_msg=name)


def test_fp16_rounds_matrices_only_and_reads_back_what_it_stored(tmp_path):
    model = pruned()
    model[1].running_var.fill_(1e-7)
    with torch.no_grad():
        model[4].weight[0, 0] = 1e6  # beyond float16
    found = read_sparse(write_sparse(model, tmp_path / "w.safetensors", dtype="fp16"))
    for name, tensor in model.state_dict().items():
        rounded = name in ("0.weight", "3.weight")
        expected = tensor.numpy().astype(np.float16).astype(np.float32) if rounded else tensor.numpy()
        np.testing.assert_array_equal(found[name].numpy(), expected, err_msg=name)
        assert found[name].dtype == tensor.dtype
    again = read_sparse(write_sparse(found, tmp_path / "again.safetensors", dtype="fp16"))
    assert all(torch.equal(again[name], found[name]) for name in found)
    pruned().load_state_dict(found, strict=True)


def test_tied_weights_are_stored_once(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(50, 8), nn.Linear(8, 50, bias=False)
            self.head.weight = self.words.weight

    model = Tied()
    path = write_sparse(model, tmp_path / "w.safetensors")
    assert len(load_file(path)) == 1
    found = read_sparse(path)
    assert torch.equal(found["head.weight"], model.words.weight)
    model.load_state_dict(found, strict=True)


def test_ninety_percent_sparse_is_at_most_a_tenth_of_dense_and_sizes_are_those_of_the_files(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(768, 3072), nn.Linear(3072, 768))
    with torch.no_grad():
        weights = {name: p for name, p in model.named_parameters() if p.dim() > 1}
        for name, mask in select({n: p.abs() for n, p in weights.items()}, sparsity=0.9).items():
            weights[name].mul_(mask)
    sizes = sizes_on_disk(model)
    elements, biases = 2 * 768 * 3072, 4 * (768 + 3072)
    kept = round(0.1 * elements)
    assert sizes["dense"] == pytest.approx(4 * elements + biases, abs=1000)
    assert sizes["bitmask"] == pytest.approx(elements / 8 + 4 * kept + biases, abs=1000)
    assert sizes["bitmask_fp16"] == pytest.approx(elements / 8 + 2 * kept + biases, abs=1000)
    assert sizes["bitmask_fp16"] <= 0.10 * sizes["dense"]
    for key, dtype in (("bitmask", "fp32"), ("bitmask_fp16", "fp16")):
        assert write_sparse(model, tmp_path / key, dtype=dtype).stat().st_size == sizes[key]
    save_file(model.state_dict(), tmp_path / "dense")
    assert (tmp_path / "dense").stat().st_size == sizes["dense"]
    assert sizes["compressed"] == len(zlib.compress((tmp_path / "bitmask").read_bytes(), level=6)) < sizes["bitmask"]


def test_a_dense_model_grows_by_no_more_than_the_header():
    model = nn.Linear(512, 512)
    sizes = sizes_on_disk(model)
    assert sizes["dense"] <= sizes["bitmask"] <= sizes["dense"] + 1000
    assert sizes_on_disk(model.state_dict()) == sizes


def test_damaged_files_are_storage_errors(tmp_path):
    path = write_sparse(pruned(), tmp_path / "w.safetensors")
    with pytest.raises(StorageError, match="absent"):
        read_sparse(tmp_path / "absent")
    whole = path.read_bytes()
    for cut in (0, 4, 100, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(StorageError, match="not a readable bit-mask file"):
            read_sparse(path)
    save_file({"w": torch.zeros(3)}, path)
    with pytest.raises(StorageError, match="not a bit-mask file; write it"):
        read_sparse(path)


def lie(tmp_path, change):
    """Write a file whose parts contradict each other."""
    tensors, metadata = encode({"w": torch.eye(16), "d": torch.ones(3)})
    said = json.loads(metadata[FORMAT])
    change(tensors, said["entries"])
    path = tmp_path / "w.safetensors"
    save_file(tensors, path, metadata={FORMAT: json.dumps(said)})
    return path


LIES = {
    "huge shape": lambda t, e: e["w"].update(shape=[1 << 40, 1 << 20]),
    "other shape": lambda t, e: e["w"].update(shape=[16, 17]),
    "negative shape": lambda t, e: e["w"].update(shape=[-16, -16]),
    "shape of bools": lambda t, e: e["w"].update(shape=[True, 256]),
    "dense shape": lambda t, e: e["d"].update(shape=[1 << 40]),
    "values missing": lambda t, e: t.update({"w::values": t["w::values"][:-1]}),
    "values as a matrix": lambda t, e: t.update({"w::values": t["w::values"].view(4, 4)}),
    "values of another type": lambda t, e: t.update({"w::values": t["w::values"].double()}),
    "bits of another type": lambda t, e: t.update({"w::bits": t["w::bits"].to(torch.int64)}),
    "one bit more": lambda t, e: t.update({"w::bits": t["w::bits"] | 2}),
    "unknown type": lambda t, e: e["w"].update(dtype="complex64"),
    "a code name": lambda t, e: e["w"].update(dtype="os.system"),
    "no entry": lambda t, e: e.pop("d"),
    "no tensor": lambda t, e: t.pop("d::dense"),
    "extra field": lambda t, e: e["w"].update(code="print()"),
    "no object": lambda t, e: e.update(w=[1, 2]),
    "alias of nothing": lambda t, e: e.update(x={"same_as": "y"}),
    "alias of itself": lambda t, e: e.update(x={"same_as": "x"}),
}


@pytest.mark.parametrize("name", LIES)
def test_files_that_lie_are_refused(name, tmp_path):
    honest = lie(tmp_path, lambda tensors, entries: None)
    assert torch.equal(read_sparse(honest)["w"], torch.eye(16))
    with pytest.raises(UntrustedInputError, match="can't be trusted"):
        read_sparse(lie(tmp_path, LIES[name]))


def test_what_cannot_be_stored_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'w' is not a dense tensor"):
        write_sparse({"w": torch.eye(3).to_sparse()}, tmp_path / "w")
    with pytest.raises(ValueError, match="dtype must be 'fp32' or 'fp16'"):
        write_sparse({"w": torch.eye(3)}, tmp_path / "w", dtype="int8")
    with pytest.raises(StorageError, match="could not be written"):
        write_sparse({"w": torch.eye(3)}, tmp_path / "no" / "folder" / "w")
