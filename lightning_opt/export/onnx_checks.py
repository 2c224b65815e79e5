"""Look at an ONNX or OpenVINO file before an engine opens it: weights may lie beside it, and nowhere else.

An ONNX file can name other files that hold its weights. Engines open whatever is named, so that a foreign file could
make them read, and a written copy then hold, any file of the machine.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_opt.errors import MissingExtraError, StorageError, UntrustedInputError

_MAX_DEPTH = 32


def check_onnx(path: str | Path) -> None:
    """Make sure that an ONNX file reads no file but plain ones in its own folder.

    Raises:
        UntrustedInputError: The file, or one that it names, is a link, no regular file, or outside the folder; or
            a named file is shorter than what would be read of it.
        StorageError: The file is missing or damaged.
        MissingExtraError: onnx is not installed.
    """
    path = Path(path)
    _check_plain(path)
    folder = path.absolute().parent
    for tensor in _tensors(_read(path)):
        if tensor.data_location == tensor.EXTERNAL:
            _check_place(path, folder, {entry.key: entry.value for entry in tensor.external_data})


def check_openvino(path: str | Path) -> None:
    """Make sure that an OpenVINO file and its weights are plain files; an `.onnx` file as in `check_onnx`.

    Raises:
        UntrustedInputError: One of them is a link or no regular file.
        StorageError: One of them is missing.
    """
    path = Path(path)
    if path.suffix == ".onnx":
        check_onnx(path)
        return
    for each in (path, path.with_suffix(".bin")):
        _check_plain(each)


def _read(path: Path) -> Any:
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise MissingExtraError("onnx", extra="export", needed_for="checking an ONNX file") from error
    try:
        model = onnx.load(str(path), load_external_data=False)
    except (DecodeError, OSError, ValueError) as error:
        raise StorageError(f"{path} is damaged: no ONNX model ({str(error)[:120]}); restore it from a copy") from error
    if not model.graph.node and not model.graph.output:
        raise StorageError(f"{path} is damaged: no ONNX model (it has no outputs); restore it from a copy")
    return model


def _tensors(model: Any) -> Iterator[Any]:
    """Yield every tensor of a model: constants of graphs, of graphs in nodes and of functions."""
    queue = [(model.graph, 0), *((function, 0) for function in model.functions)]
    queue += [(info.algorithm, 0) for info in model.training_info]
    queue += [(info.initialization, 0) for info in model.training_info]
    while queue:
        part, depth = queue.pop()
        if depth > _MAX_DEPTH:
            raise UntrustedInputError(f"the ONNX graph is nested deeper than {_MAX_DEPTH}; not opened")
        yield from getattr(part, "initializer", ())
        for sparse in getattr(part, "sparse_initializer", ()):
            yield from (sparse.values, sparse.indices)
        attributes = [each for node in part.node for each in node.attribute]
        for each in (*attributes, *getattr(part, "attribute_proto", ())):
            yield from (each.t, *each.tensors)
            for sparse in (each.sparse_tensor, *each.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            queue += [(graph, depth + 1) for graph in (each.g, *each.graphs)]


def _check_place(path: Path, folder: Path, said: dict[str, str]) -> None:
    location = said.get("location", "")
    shown = repr(location[:120])[1:-1]
    parts = location.replace("\\", "/").split("/")
    odd = not location or os.path.isabs(location) or ":" in parts[0] or "\x00" in location
    if odd or any(part in ("", "..") for part in parts):
        raise UntrustedInputError(f"{path} reads its weights from {shown!r}, outside its folder; not opened")
    target = folder
    for part in parts:
        target = target / part
        if target.is_symlink():
            raise UntrustedInputError(f"{path} reads its weights from {shown!r}, which is a link; not opened")
    if not target.exists():
        raise StorageError(f"{target} is missing: {path.name} reads its weights from it; restore it from a copy")
    if not target.is_file():
        raise UntrustedInputError(f"{path} reads its weights from {shown!r}, which is no regular file; not opened")
    try:
        offset, length = int(said.get("offset") or 0), int(said.get("length") or 0)
    except ValueError:
        offset, length = -1, -1
    if offset < 0 or length < 0 or offset + length > target.stat().st_size:
        raise UntrustedInputError(f"{path} reads {shown!r} beyond its end; the file is cut off or forged, not opened")


def _check_plain(path: Path) -> None:
    if path.is_symlink():
        raise UntrustedInputError(f"{path} is a link; not opened")
    if not path.exists():
        raise StorageError(f"{path} is missing; export the model again or restore the file from a copy")
    if not path.is_file():
        raise UntrustedInputError(f"{path} is no regular file; not opened")
