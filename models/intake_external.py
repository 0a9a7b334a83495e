"""Checks of weights stored outside the model file: a model may read files in its own folder, and nothing else of the machine."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto

from aivmm.errors import ModelError

_BESIDE = "keep the weights as a plain file beside the model, or save the model again with onnx.save(..., save_as_external_data=True)"


def tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Yield every stored tensor of a model: initializers and attributes, subgraphs and functions included."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        for node in function.node:
            yield from _node_tensors(node)


def _graph_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield sparse.values
        yield sparse.indices
    for node in graph.node:
        yield from _node_tensors(node)


def _node_tensors(node: onnx.NodeProto) -> Iterator[TensorProto]:
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        for sparse in [attribute.sparse_tensor] if attribute.type == AttributeProto.SPARSE_TENSOR else []:
            yield sparse.values
            yield sparse.indices
        for graph in _graphs(attribute):
            yield from _graph_tensors(graph)


def _graphs(attribute: AttributeProto) -> list[GraphProto]:
    return [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def external_files(model: ModelProto, folder: Path) -> tuple[Path, ...]:
    """Return the files that hold `model`'s external weights, sorted; raise `ModelError` for one that is missing, too short or not safe.

    Safe is: a relative location without `..`, no symbolic link on the way, a regular file with one hard link, under `folder`.
    """
    files: dict[str, Path] = {}
    for tensor in tensors(model):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        if location not in files:
            files[location] = _safe_file(location, folder, tensor.name)
        _check_range(tensor, entries, files[location])
    return tuple(sorted(set(files.values())))


def _safe_file(location: str, folder: Path, tensor: str) -> Path:
    where = f"external data of tensor {tensor!r}"
    posix, windows = PurePosixPath(location), PureWindowsPath(location)
    if not location or "\0" in location:
        raise ModelError(f"{where} names no file", advice=_BESIDE)
    if posix.is_absolute() or windows.is_absolute() or windows.drive or windows.root:
        raise ModelError(f"{where} has an absolute path, {location!r}: only files in the model's folder are read", advice=_BESIDE)
    if ".." in posix.parts or ".." in windows.parts:
        raise ModelError(f"{where} leaves the model's folder, {location!r}", advice=_BESIDE)
    path = folder
    for part in posix.parts:
        path = path / part
        try:
            info = os.lstat(path)
        except OSError as error:
            advice = "download or copy that file beside the model"
            raise ModelError(f"{where} is missing: no file {location!r} in the model's folder", advice=advice) from error
        if stat.S_ISLNK(info.st_mode) or _is_junction(path):
            raise ModelError(f"{where}, {location!r}, is a symbolic link, which may leave the model's folder", advice=_BESIDE)
    if not stat.S_ISREG(info.st_mode):
        raise ModelError(f"{where}, {location!r}, is not a regular file", advice=_BESIDE)
    if info.st_nlink > 1:
        raise ModelError(f"{where}, {location!r}, has {info.st_nlink} hard links, so it may be a file from elsewhere", advice=_BESIDE)
    return path


def _is_junction(path: Path) -> bool:
    """Windows directory junctions act as symbolic links; `Path.is_junction` exists from Python 3.12 on."""
    attributes = getattr(os.lstat(path), "st_file_attributes", 0)
    return bool(attributes & getattr(stat, "FILE_ATTRIBUTE_REPARSE_POINT", 0))


def _check_range(tensor: TensorProto, entries: dict[str, str], file: Path) -> None:
    size = file.stat().st_size
    where = f"external data of tensor {tensor.name!r} in {file.name!r}"
    try:
        offset, length = int(entries.get("offset") or 0), int(entries.get("length") or -1)
    except ValueError as error:
        raise ModelError(f"{where} has an offset or length that is no number") from error
    needed = stored_bytes(tensor)
    if length < 0:
        length = needed if needed is not None else 0
    elif needed is not None and length != needed:
        raise ModelError(
            f"{where} is {length} bytes, but its shape and type need {needed}", advice="the model file is damaged; export it again"
        )
    if offset < 0 or offset + length > size:
        raise ModelError(
            f"{where} ends at byte {offset + length}, beyond the file's {size} bytes", advice="the file is truncated: download it again"
        )


def stored_bytes(tensor: TensorProto) -> int | None:
    """Bytes of `tensor` as raw data; None for strings and types that this onnx does not know."""
    elements = 1
    for extent in tensor.dims:
        elements *= extent
    if tensor.data_type == TensorProto.STRING or tensor.data_type not in TensorProto.DataType.values():
        return None
    bits = _BITS.get(tensor.data_type)
    if bits is None:
        bits = int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize) * 8
    return (elements * bits + 7) // 8


_BITS = {
    getattr(TensorProto, name): bits
    for name, bits in (("INT4", 4), ("UINT4", 4), ("FLOAT4E2M1", 4), ("INT2", 2), ("UINT2", 2))
    if hasattr(TensorProto, name)
}
