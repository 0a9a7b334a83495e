"""Gathers written segments of several models into one folder, where they share one file of weights: equal bytes are there once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx import external_data_helper

from aivmm.errors import ModelError
from aivmm.models.hashing import raw_chunks
from aivmm.models.slice import WeightStore


class Gatherer:
    """Copies segments to `folder`, each under a name made of its content. `store` takes their weights, by default one of its own there."""

    def __init__(self, folder: Path, *, store: WeightStore | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._store = store or WeightStore(folder / "weights.bin")

    def take(self, segment: Path) -> tuple[Path, tuple[Path, ...]]:
        """Copy the segment at `segment`, its weights beside it, and return the copy with the files of weights that it needs.

        Raises:
            ModelError: a weight lies outside the segment's folder.
        """
        model = onnx.load(str(segment), load_external_data=False)
        stored = [self._moved(tensor, segment.parent) for tensor in _tensors(model) if external_data_helper.uses_external_data(tensor)]
        text = model.SerializeToString(deterministic=True)
        copy = self._folder / f"{hashlib.sha256(text).hexdigest()[:32]}.onnx"
        copy.write_bytes(text)
        return copy, (self._store.path,) if stored else ()

    def _moved(self, proto: onnx.TensorProto, folder: Path) -> str:
        """Put a weight into the shared file and point `proto` there; return its digest."""
        info = external_data_helper.ExternalDataInfo(proto)
        if Path(info.location).name != info.location:
            raise ModelError(f"the weight {proto.name!r} lies in {info.location!r}, not beside its model")
        tensor = ir.ExternalTensor(
            info.location,
            info.offset,
            info.length,
            ir.DataType(proto.data_type),
            shape=ir.Shape(list(proto.dims)),
            name=proto.name,
            base_dir=folder,
        )
        digest = hashlib.sha256()
        for chunk in raw_chunks(tensor):
            digest.update(chunk)
        offset, length = self._store.put(tensor, digest.hexdigest())
        del proto.external_data[:]
        for key, value in (("location", self._store.path.name), ("offset", offset), ("length", length)):
            proto.external_data.add(key=key, value=str(value))
        return digest.hexdigest()


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield every tensor of a model: weights, and those in attributes, of subgraphs and functions too."""
    yield from _of_graph(model.graph)
    for function in model.functions:
        for node in function.node:
            yield from _of_node(node)


def _of_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        yield from _of_node(node)


def _of_node(node: onnx.NodeProto) -> Iterator[onnx.TensorProto]:
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        for body in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
            yield from _of_graph(body)
