"""What a model asks of a made-up device: the part of the null backend that reads ONNX. Its functions import onnx, the module does not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aivmm.errors import Unsupported
from aivmm.tensors import TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one run of a model has to do: per node its op type, floating-point operations and bytes moved; and what it holds and copies."""

    nodes: tuple[tuple[str, float, int], ...]
    weight_bytes: int
    activation_bytes: int  # of all tensors alive at once, at the worst moment
    copied_bytes: int
    copied_tensors: int


def load(model: Path | bytes) -> tuple[Any, str]:
    """Return a checked model with its weights, and a name for it. Limited to 2 GB, as protobuf is."""
    import onnx

    try:
        if isinstance(model, bytes):
            onnx.checker.check_model(model)
            proto = onnx.load_model_from_string(model)
        else:
            onnx.checker.check_model(str(model))
            proto = onnx.load(str(model))
    except Exception as error:  # onnx and protobuf share no error class, and whatever they refuse is refused
        raise Unsupported(f"the null backend cannot read the model: {_one_line(error)}") from error
    if any(not each.type.HasField("tensor_type") for each in (*proto.graph.input, *proto.graph.output)):
        raise Unsupported("the null backend takes tensors only, no sequences, maps or optionals")
    return proto, model.stem if isinstance(model, Path) else proto.graph.name or "the model"


def evaluator_of(proto: Any) -> Any:
    from onnx.reference import ReferenceEvaluator

    try:
        return ReferenceEvaluator(proto)
    except Exception as error:  # it raises what its operators raise; whatever it refuses is refused
        raise Unsupported(f"the null backend cannot evaluate the model: {_one_line(error)}") from error


def evaluated(evaluator: Any, feeds: Mapping[str, Any]) -> list[Any]:
    """Return the outputs for `feeds`; raise Unsupported where an operator cannot be evaluated on them."""
    try:
        return list(evaluator.run(None, dict(feeds)))
    except Exception as error:  # as above
        raise Unsupported(f"the null backend cannot evaluate the model: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


def op_types(graph: Any) -> Iterator[str]:
    for node in graph.node:
        yield node.op_type
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                yield from op_types(body)


def spec_of(info: Any) -> TensorSpec:
    from onnx import TensorProto, helper

    tensor = info.type.tensor_type
    string = tensor.elem_type == TensorProto.STRING
    dtype = "string" if string else np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name
    shape = tuple(each.dim_value if each.HasField("dim_value") else None for each in tensor.shape.dim)
    return TensorSpec(name=info.name, dtype=dtype, shape=shape)


def work_of(proto: Any, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Work:
    """Return the work of one run of a loaded model whose inputs have `shapes`.

    An extent that stays unknown counts as 1, an If or Loop as one node whatever its body.
    """
    from onnx import shape_inference

    if shapes:
        bound = type(proto)()
        bound.CopyFrom(proto)
        for info in bound.graph.input:
            for extent, value in zip(info.type.tensor_type.shape.dim, shapes.get(info.name, ()), strict=False):
                extent.dim_value = value
        # What was inferred for other shapes would contradict these.
        del bound.graph.value_info[:]
        for info in bound.graph.output:
            info.type.tensor_type.ClearField("shape")
        proto = bound
    graph = shape_inference.infer_shapes(proto, data_prop=True).graph
    infos = [each for each in (*graph.input, *graph.value_info, *graph.output) if each.type.HasField("tensor_type")]
    specs = {spec.name: spec for spec in map(spec_of, infos)}
    extents = {name: tuple(1 if each is None else each for each in spec.shape) for name, spec in specs.items()}
    sizes = {name: TensorSpec(name=name, dtype=spec.dtype, shape=extents[name]).nbytes or 0 for name, spec in specs.items()}
    weights = {each.name: _weight(each) for each in graph.initializer}
    extents |= {name: extent for name, (extent, _) in weights.items()}
    sizes |= {name: size for name, (_, size) in weights.items()}
    edge = [each.name for each in (*graph.input, *graph.output) if each.name not in weights]
    return Work(
        nodes=tuple(
            (node.op_type, _flops(node, extents), sum(sizes.get(name, 0) for name in (*node.input, *node.output))) for node in graph.node
        ),
        weight_bytes=sum(size for _, size in weights.values()),
        activation_bytes=_peak_bytes(graph, sizes, weights),
        copied_bytes=sum(sizes.get(name, 0) for name in edge),
        copied_tensors=len(edge),
    )


def _weight(tensor: Any) -> tuple[tuple[int, ...], int]:
    from onnx import TensorProto, helper

    extent = tuple(tensor.dims)
    if tensor.data_type == TensorProto.STRING:
        return extent, sum(map(len, tensor.string_data))
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type)).name
    return extent, TensorSpec(name=tensor.name, dtype=dtype, shape=extent).nbytes or 0


def _flops(node: Any, extents: Mapping[str, tuple[int, ...]]) -> float:
    """Return 2 for each multiply-add of the operators made of them, and 1 for each element that any other writes."""
    first, second = [*(extents.get(name, ()) for name in node.input[:2]), (), ()][:2]
    written = float(sum(math.prod(extents.get(name, ())) for name in node.output if name))
    match node.op_type:
        case "MatMul":
            return 2.0 * written * (first[-1] if first else 1)
        case "Gemm":
            turned = any(each.name == "transA" and each.i for each in node.attribute)
            return 2.0 * written * (first[0 if turned else -1] if first else 1)
        case "Conv":
            return 2.0 * written * math.prod(second[1:])
        case "ConvTranspose":
            return 2.0 * math.prod(first) * math.prod(second[1:])
        case "LSTM" | "GRU" | "RNN":
            recurrent = extents.get(node.input[2], ())
            return 2.0 * math.prod(first[:2]) * (math.prod(second) + math.prod(recurrent))
        case _:
            return written


def _peak_bytes(graph: Any, sizes: Mapping[str, int], weights: Mapping[str, Any]) -> int:
    """Return the most bytes of inputs, outputs and tensors in between that are alive at one node."""
    ends = {name: step for step, node in enumerate(graph.node) for name in node.input}
    ends |= {each.name: len(graph.node) for each in (*graph.input, *graph.output)}
    alive = sum(sizes.get(each.name, 0) for each in graph.input if each.name not in weights)
    peak = alive
    for step, node in enumerate(graph.node):
        alive += sum(sizes.get(name, 0) for name in node.output)
        peak = max(peak, alive)
        done = {name for name in (*node.input, *node.output) if name not in weights and ends.get(name, step) == step}
        alive -= sum(sizes.get(name, 0) for name in done)
    return peak
