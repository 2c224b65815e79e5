"""A foreign ONNX file that wants to read other files is refused before an engine opens it."""

import os
from importlib.util import find_spec

import pytest

from lightning_opt.errors import StorageError, UntrustedInputError
from lightning_opt.export import OnnxRunner, OpenVinoRunner, check_onnx, check_openvino

onnx = pytest.importorskip("onnx")
SECRET = b"\x00\x00\x80?" * 4  # four times 1.0


def tensor(name, location, **more):
    made = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=[4])
    made.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, **more}.items():
        made.external_data.add(key=key, value=str(value))
    return made


def model_of(nodes, initializers=(), functions=()):
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [4]) for name in "xy")
    graph = onnx.helper.make_graph(list(nodes), "g", [x], [y], list(initializers))
    imports = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("mine", 1)]
    return onnx.helper.make_model(graph, opset_imports=imports, functions=list(functions), ir_version=10)


def node(kind, inputs, outputs, **attributes):
    return onnx.helper.make_node(kind, inputs, outputs, **attributes)


def in_initializer(said):
    return model_of([node("Add", ["x", "w"], ["y"])], [said])


def in_constant(said):
    return model_of([node("Constant", [], ["w"], value=said), node("Add", ["x", "w"], ["y"])])


def in_branch(said):
    out = onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [4])
    branch = onnx.helper.make_graph([node("Identity", ["v"], ["w"])], "b", [], [out], [tensor_named(said, "v")])
    branches = {"then_branch": branch, "else_branch": branch}
    flag = onnx.helper.make_tensor("flag", onnx.TensorProto.BOOL, [], [True])
    return model_of([node("If", ["flag"], ["w"], **branches), node("Add", ["x", "w"], ["y"])], [flag])


def in_function(said):
    body = [node("Constant", [], ["w"], value=said), node("Add", ["a", "w"], ["b"])]
    function = onnx.helper.make_function("mine", "F", ["a"], ["b"], body, [onnx.helper.make_opsetid("", 21)])
    return model_of([node("F", ["x"], ["y"], domain="mine")], functions=[function])


def in_sparse(said):
    sparse = onnx.SparseTensorProto(values=said, dims=[4])
    return model_of([node("Constant", [], ["w"], sparse_value=sparse), node("Add", ["x", "w"], ["y"])])


def tensor_named(said, name):
    copied = onnx.TensorProto()
    copied.CopyFrom(said)
    copied.name = name
    return copied


HIDDEN = [in_initializer, in_constant, in_branch, in_function, in_sparse]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "secret").write_bytes(SECRET)
    inside = tmp_path / "artifact"
    inside.mkdir()
    (inside / "weights.data").write_bytes(SECRET)
    return inside


def write(folder, model):
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def refused(path):
    uses = [check_onnx, check_openvino]
    if find_spec("onnxruntime"):
        uses.append(lambda p: OnnxRunner(p, threads=1))
    if find_spec("openvino"):
        uses.append(lambda p: OpenVinoRunner(p, threads=1))
    for use in uses:
        with pytest.raises(UntrustedInputError) as caught:
            use(path)
        assert caught.value.exit_code == 8
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("location", ["../secret", "{folder}/secret", "a/../../secret", "..\\secret", "", "C:/secret"])
def test_weights_outside_the_folder_are_refused_wherever_they_are_named(folder, hidden, location):
    refused(write(folder, hidden(tensor("w", location.format(folder=folder.parent)))))


def test_a_link_out_of_the_folder_is_refused(folder):
    (folder / "link.data").symlink_to(folder.parent / "secret")
    (folder / "deep").symlink_to(folder.parent)
    for location in ("link.data", "deep/secret"):
        refused(write(folder, in_initializer(tensor("w", location))))


def test_a_link_in_place_of_the_file_is_refused(folder):
    real = write(folder, in_initializer(tensor("w", "weights.data")))
    real.rename(folder / "real.onnx")
    real.symlink_to(folder / "real.onnx")
    refused(real)
    xml = folder / "model.xml"
    xml.write_text("<net/>")
    xml.with_suffix(".bin").symlink_to(folder.parent / "secret")
    with pytest.raises(UntrustedInputError, match=r"model\.bin"):
        check_openvino(xml)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_refused(folder):
    os.mkfifo(folder / "pipe.data")
    refused(write(folder, in_initializer(tensor("w", "pipe.data"))))


@pytest.mark.parametrize("more", [{"offset": 8}, {"length": 17}, {"offset": -4}, {"offset": "x"}, {"length": 1 << 60}])
def test_reading_beyond_the_end_is_refused(folder, more):
    more = {"length": 16} | more
    refused(write(folder, in_initializer(tensor("w", "weights.data", **more))))


@pytest.mark.parametrize("hidden", HIDDEN)
def test_weights_in_the_folder_are_welcome(folder, hidden):
    check_onnx(write(folder, hidden(tensor("w", "weights.data", length=16))))


def test_an_engine_reads_weights_from_the_folder(folder):
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxruntime")
    runner = OnnxRunner(write(folder, in_initializer(tensor("w", "weights.data", length=16))), threads=1)
    assert runner.predict(torch.zeros(4)).tolist() == [1.0] * 4


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"no model at all", None])
def test_a_damaged_or_missing_file_is_one_sentence(folder, content):
    path = folder / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StorageError, match=r"model\.onnx") as caught:
        check_onnx(path)
    assert "\n" not in str(caught.value)


def test_a_missing_weights_file_is_named(folder):
    with pytest.raises(StorageError, match=r"lost\.data"):
        check_onnx(write(folder, in_initializer(tensor("w", "lost.data"))))
