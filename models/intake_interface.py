"""What a model takes and gives must be tensors: sequences, maps and optional values have no shape to bind, measure or hand on."""

from __future__ import annotations

import onnx
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from aivmm.errors import ModelError


def keep_tensors(model: ModelProto, notes: list[str]) -> None:
    """Make every output a tensor where that is only a matter of form; raise `ModelError` for an input or output that is not a tensor.

    scikit-learn exports end in ZipMap, which turns a tensor of probabilities into a list of dictionaries: the tensor is given instead.
    """
    producers = {name: node for node in model.graph.node for name in node.output}
    for output in model.graph.output:
        node = producers.get(output.name)
        if node is not None and (node.domain, node.op_type) == ("ai.onnx.ml", "ZipMap"):
            identity = helper.make_node("Identity", list(node.input), list(node.output), name=node.name)
            node.CopyFrom(identity)
            output.type.CopyFrom(onnx.TypeProto(tensor_type=onnx.TypeProto.Tensor(elem_type=TensorProto.FLOAT)))
            notes.append(f"output {output.name!r} is the tensor that the model's ZipMap would turn into dictionaries")
    for value in model.graph.input:
        _must_be_tensor(value, "input")
    for value in model.graph.output:
        _must_be_tensor(value, "output")
    tensors = [value for value in model.graph.value_info if _kind(value) != "map"]  # onnx-ir cannot hold maps, and nothing needs them
    if len(tensors) < len(model.graph.value_info):
        del model.graph.value_info[:]
        model.graph.value_info.extend(tensors)


def _kind(value: ValueInfoProto) -> str:
    """One of "tensor", "sequence", "map", "optional", "sparse_tensor"; "tensor" when nothing is said. A sequence of maps is "map"."""
    kind = value.type.WhichOneof("value") or "tensor_type"
    if kind == "sequence_type" and value.type.sequence_type.elem_type.WhichOneof("value") == "map_type":
        return "map"
    return str(kind).removesuffix("_type")


def _must_be_tensor(value: ValueInfoProto, what: str) -> None:
    kind = _kind(value)
    if kind != "tensor":
        raise ModelError(
            f"{what} {value.name!r} is not a tensor (its type is {kind.replace('_', ' ')})", advice="export the model with tensors only"
        )
    if what == "input" and not value.type.tensor_type.elem_type:
        raise ModelError(f"input {value.name!r} has no element type", advice="the model is damaged; export it again")
