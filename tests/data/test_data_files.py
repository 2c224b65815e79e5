import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from lightning_opt.data import ArrayFiles
from lightning_opt.errors import ConfigError, StorageError

RNG = np.random.default_rng(0)
X = RNG.random((200, 4)).astype(np.float32)
Y = np.arange(200) % 5


def saved(path, x=X, y=Y):
    if path.suffix == ".npz":
        np.savez(path, x=x, y=y)
    elif path.suffix == ".safetensors":
        save_file({"x": np.ascontiguousarray(x), "y": np.ascontiguousarray(y)}, path)
    else:
        np.savetxt(path, np.column_stack([x, y]), delimiter=",", fmt="%.9g")
    return path


def rows(part):
    return {(*np.round(x, 5).tolist(), int(y)) for x, y in zip(part.inputs.numpy().tolist(), part.targets, strict=True)}


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".csv"])
def test_one_file_is_split_into_disjoint_parts_of_everything(tmp_path, suffix):
    module = ArrayFiles(path=saved(tmp_path / f"data{suffix}"))
    parts = [rows(part) for part in vars(module.splits).values()]
    everything = {(*np.round(x, 5).tolist(), int(y)) for x, y in zip(X.tolist(), Y, strict=True)}
    assert set.union(*parts) == everything
    assert sum(len(part) for part in parts) == 200
    assert [len(part) for part in vars(module.splits).values()] == [140, 20, 40]
    assert module.num_outputs == 5
    assert module.splits.train.targets.dtype == torch.int64
    assert module.input_shape == (4,)


def test_three_files(tmp_path):
    kwargs = {
        name: saved(tmp_path / f"{name}.npz", X[start:][:50], Y[start:][:50])
        for name, start in (("train", 0), ("val", 50), ("test", 100))
    }
    module = ArrayFiles(**kwargs)
    assert torch.equal(module.splits.val.inputs, torch.from_numpy(X[50:100]))
    assert torch.equal(module.splits.test.targets, torch.from_numpy(Y[100:150]))
    del kwargs["test"]
    assert torch.equal(ArrayFiles(**kwargs).splits.test.inputs, torch.from_numpy(X[50:100]))


def test_a_heading_and_another_label_column(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("label,a,b\n" + "".join(f"{n % 2},{n},{n * 2}\n" for n in range(60)))
    module = ArrayFiles(path=path, label_column=0)
    data = module.splits.train
    assert torch.equal(data.inputs[:, 1], data.inputs[:, 0] * 2)
    assert torch.equal(data.targets, data.inputs[:, 0].long() % 2)


def test_shape_scale_and_values(tmp_path):
    path = saved(tmp_path / "data.npz", (X * 255).astype(np.uint8), Y.astype(np.float32) / 2)
    module = ArrayFiles(path=path, target="value", input_shape=[1, 2, 2], scale=1 / 255)
    data = module.splits.train
    assert data.inputs.shape[1:] == (1, 2, 2)
    assert data.inputs.max() <= 1.0
    assert data.targets.dtype == torch.float32
    assert module.num_outputs == 1
    assert ArrayFiles(path=path, target="value").fingerprint() != module.fingerprint()


def test_several_labels(tmp_path):
    path = saved(tmp_path / "data.npz", X, (RNG.random((200, 3)) > 0.5).astype(np.int64))
    module = ArrayFiles(path=path, target="multilabel")
    assert module.num_outputs == 3
    assert module.splits.train.targets.unique().tolist() == [0.0, 1.0]
    with pytest.raises(ConfigError, match="0 or 1"):
        ArrayFiles(path=saved(tmp_path / "b.npz", X, np.full((200, 3), 2)), target="multilabel").setup()


def nan_at(row):
    x = X.copy()
    x[row, 2] = np.nan
    return x


@pytest.mark.parametrize(
    ("x", "y", "kwargs", "message"),
    [
        (X, Y, {"inputs_key": "images"}, r"data\.inputs_key=images: .* holds x, y"),
        (X, Y, {"targets_key": "labels"}, r"data\.targets_key=labels"),
        (X, Y[:-1], {}, "equal length"),
        (X[:0], Y[:0], {}, "equal length, > 0"),
        (nan_at(7), Y, {}, "inputs of 1 samples hold NaN or infinity, first in sample 7"),
        (X, np.where(np.arange(200) == 3, np.inf, 0.0), {"target": "value"}, "targets of 1 .* sample 3"),
        (X, Y - 1, {}, "sample 0 has class -1"),
        (X, Y, {"num_outputs": 4}, r"sample 4 has class 4, outside 0\.\.3"),
        (X, Y + 0.5, {}, "whole numbers"),
        (X, np.zeros((200, 2)), {}, "whole numbers, one a sample"),
        (X, np.zeros((200, 2)), {"target": "value", "num_outputs": 3}, r"data\.num_outputs=3"),
        (X, Y, {"input_shape": [3, 3]}, r"data\.input_shape=\[3, 3\]"),
        (np.array(["a"] * 200), Y, {}, "expected numbers"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, x, y, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        ArrayFiles(path=saved(tmp_path / "data.npz", x, y), **kwargs).setup()


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".csv"])
def test_missing_and_damaged_files_are_one_error(tmp_path, suffix):
    path = tmp_path / f"data{suffix}"
    with pytest.raises(StorageError, match="does not exist"):
        ArrayFiles(path=path).setup()
    saved(path)
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2] + b"!", b"\xff" * 100):
        path.write_bytes(damaged)
        with pytest.raises((StorageError, ConfigError), match=str(path)):
            ArrayFiles(path=path).setup()


def test_a_flipped_byte_of_an_npz_is_noticed(tmp_path):
    path = saved(tmp_path / "data.npz")
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 3] ^= 1
    path.write_bytes(whole)
    with pytest.raises(StorageError, match="damaged"):
        ArrayFiles(path=path).setup()


def test_a_pickle_is_not_run(tmp_path):
    mark = tmp_path / "was-run"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(mark),)

    np.savez(tmp_path / "data.npz", x=np.array([Evil()] * 3, dtype=object), y=Y[:3])
    with pytest.raises(StorageError, match="plain arrays"):
        ArrayFiles(path=tmp_path / "data.npz").setup()
    assert not mark.exists()
    pickle.loads(pickle.dumps(Evil()))
    assert mark.exists()  # it would have shown


def test_a_csv_with_words_or_ragged_lines_is_one_error(tmp_path):
    path = tmp_path / "data.csv"
    for text in ("1,2\n3,four\n", "1,2\n3\n"):
        path.write_text(text)
        with pytest.raises(StorageError, match="no table"):
            ArrayFiles(path=path).setup()
    path.write_text("1,2\n3,0\n")
    with pytest.raises(ConfigError, match=r"data\.label_column=2: .* has 2 columns"):
        ArrayFiles(path=path, label_column=2).setup()


def test_another_kind_of_file_is_named(tmp_path):
    (tmp_path / "data.pkl").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"expected a \.npz"):
        ArrayFiles(path=tmp_path / "data.pkl").setup()


@pytest.mark.parametrize("kwargs", [{}, {"path": "a.npz", "train": "b.npz", "val": "c.npz"}, {"train": "b.npz"}])
def test_path_or_train_and_val(kwargs):
    with pytest.raises(ValueError, match="give path, or train and val"):
        ArrayFiles(**kwargs)
