"""What tests run: small ONNX models, and plan bundles of one or more stages for them, written with the real slicer and the real writer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from aivmm.models.slice import Segment, Slicer, WeightStore
from aivmm.runtime.bundle import write_bundle
from aivmm.runtime.environment import environment_of
from aivmm.runtime.family import Bucket, Family, Served
from aivmm.runtime.finding import find_target
from aivmm.runtime.plan import Alternative, Conditions, Copy, Model, Plan, Stage, tensors
from aivmm.runtime.registry import load_backend
from aivmm.tensors import TensorSpec
from aivmm.tuner.families import combine

OPENVINO, ONNXRUNTIME = "openvino:CPU", "onnxruntime:CPU"
Arrays = Mapping[str, np.ndarray[Any, Any]]
Tensor = tuple[str, int, Sequence[int | str]]  # name, element type, shape; a string is a dynamic extent


@dataclass(frozen=True)
class Part:
    """A stage to be: the nodes [first, last] of the model on `target`; by default all of them."""

    target: str
    first: int = 0
    last: int = -1  # counted from the end when negative
    settings: tuple[tuple[str, Any], ...] = ()
    replicas: int = 1
    weight: float = 1.0
    copies: tuple[Copy, ...] = ()  # their files are the part's own
    precision: str = "fp32"  # not "default", which is bf16 on some machines: what tests run they compare exactly


def onnx_model(
    nodes: Sequence[onnx.NodeProto], inputs: Sequence[Tensor], outputs: Sequence[Tensor], weights: Arrays | None = None
) -> onnx.ModelProto:
    """Return a checked model in opset 17 and IR 8."""
    graph = helper.make_graph(
        list(nodes),
        "made",
        [helper.make_tensor_value_info(*each) for each in inputs],
        [helper.make_tensor_value_info(*each) for each in outputs],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return onnx.shape_inference.infer_shapes(model)


def chain_model(*, width: int = 32, rows: int = 2, layers: int = 4, seed: int = 0) -> onnx.ModelProto:
    """Return `layers` times MatMul and Relu on float32 `x` [rows, width] to `y`: 2 * layers nodes in a row, weights beyond 1 KiB."""
    rng = np.random.default_rng(seed)
    nodes, weights, last = [], {}, "x"
    for index in range(layers):
        weights[f"w{index}"] = (rng.standard_normal((width, width)) * (2 / width) ** 0.5).astype(np.float32)
        nodes.append(helper.make_node("MatMul", [last, f"w{index}"], [f"m{index}"]))
        last = "y" if index == layers - 1 else f"r{index}"
        nodes.append(helper.make_node("Relu", [f"m{index}"], [last]))
    shape = (rows, width)
    return onnx_model(nodes, [("x", TensorProto.FLOAT, shape)], [("y", TensorProto.FLOAT, shape)], weights)


def write_model(path: Path, model: onnx.ModelProto) -> Path:
    """Write `model` at `path` and return that."""
    path.write_bytes(model.SerializeToString())
    return path


def make_bundle(
    destination: Path,
    model: onnx.ModelProto,
    parts: Sequence[Part],
    *,
    fallbacks: Sequence[Sequence[Part]] = (),
    conditions: bool = True,
    **fields: Any,
) -> Path:
    """Write a bundle of `model` cut into `parts` at `destination` and return that; `fields` go to the plan."""
    work = destination.parent / f"{destination.name}.work"
    work.mkdir()
    path = write_model(work / "model.onnx", model)
    store = WeightStore(work / "weights.bin")
    files: dict[str, Path] = {}

    with Slicer(path) as slicer:
        count = len(slicer.prepared.nodes)

        def stage(part: Part) -> Stage:
            last = part.last % count
            written = slicer.write(part.first, last, work / f"{part.first}-{last}.onnx", weights=store)
            files.update({f"segments/{each.name}": each for each in (written.path, *written.weights)})
            return _stage(part, written)

        stages = [stage(part) for part in parts]
        others = [Alternative(name=f"fallback {number}", stages=list(map(stage, each))) for number, each in enumerate(fallbacks)]
        inputs, outputs = interface_of(model)
    plan = Plan(
        created_by="aivmm tests",
        created_at="2026-01-01T00:00:00+00:00",
        model=Model(
            name="made",
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            content="0" * 64,
            category="unknown",
            inputs=tensors(inputs),
            outputs=tensors(outputs),
        ),
        stages=stages,
        fallbacks=others,
        environments=[conditions_of(each) for each in dict.fromkeys(each for part in parts for each in _targets_of(part))]
        if conditions
        else [],
        files=dict.fromkeys(files, "0" * 64),
        **{"objective": "latency", "batch": 1, **fields},
    )
    return write_bundle(destination, plan, files)


def token_model(rows: int | str, *, width: int = 16, mean: bool = False) -> onnx.ModelProto:
    """Return a model on float32 `x` [1, rows, width] and int64 `mask` [1, rows]: `y` of each row alone, `pooled` of the masked rows.

    With `mean` the pooled output is the mean over all rows, masked or not: no padding is right then.
    """
    weights: dict[str, Any] = {"w": normal(width, width), "last": np.array([2], np.int64), "rows": np.array([1], np.int64)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"]),
        helper.make_node("Tanh", ["m"], ["y"]),
        helper.make_node("Cast", ["mask"], ["kept"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["kept", "last"], ["column"]),
        helper.make_node("Mul", ["y", "column"], ["masked"]),
        helper.make_node("ReduceMean", ["masked"], ["pooled"], axes=[1])
        if mean
        else helper.make_node("ReduceSum", ["masked", "rows"], ["pooled"]),
    ]
    inputs: list[Tensor] = [("x", TensorProto.FLOAT, (1, rows, width)), ("mask", TensorProto.INT64, (1, rows))]
    outputs: list[Tensor] = [("y", TensorProto.FLOAT, (1, rows, width)), ("pooled", TensorProto.FLOAT, (1, 1, width))]
    return onnx_model(nodes, inputs, outputs, weights)


def make_family(
    destination: Path,
    bundles: Mapping[str, Path],
    *,
    kind: Literal["shapes", "workload"] = "shapes",
    models: Sequence[Served] | None = None,
) -> Path:
    """Write a bundle of the plans in `bundles` (by name) at `destination`; by default each is a model of its own."""
    files = {f"plans/{number}.json": path for number, path in enumerate(bundles.values())}
    served = models or [Served(name=name, buckets=[Bucket(name="", plan=file)]) for name, file in zip(bundles, files, strict=True)]
    family = Family(
        kind=kind,
        created_by="aivmm tests",
        created_at="2026-01-01T00:00:00+00:00",
        models=list(served),
        files=dict.fromkeys(files, "0" * 64),
    )
    combine(destination, family, files, destination.parent / f"{destination.name}.work")
    return destination


def interface_of(model: onnx.ModelProto) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Return what `onnx` itself says of a model's inputs (without initializers) and outputs."""
    weights = {each.name for each in model.graph.initializer} | {each.values.name for each in model.graph.sparse_initializer}
    return (
        tuple(_spec(each) for each in model.graph.input if each.name not in weights),
        tuple(_spec(each) for each in model.graph.output),
    )


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    dtype = "string" if tensor.elem_type == TensorProto.STRING else helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return TensorSpec(
        name=value.name, dtype=dtype, shape=tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim)
    )


def conditions_of(name: str) -> Conditions:
    """Return the conditions of a target of this machine, as a plan stores them."""
    runtime, _, device = name.partition(":")
    fields = asdict(environment_of(find_target(load_backend(runtime), device)))
    return Conditions(**{**fields, "instruction_sets": list(fields["instruction_sets"])})


def _targets_of(part: Part) -> list[str]:
    return [each.target for each in (part, *part.copies)]


def _stage(part: Part, segment: Segment) -> Stage:
    return Stage(
        model=f"segments/{segment.path.name}",
        target=part.target,
        precision=part.precision,
        config=dict(part.settings),
        replicas=part.replicas,
        weight=part.weight,
        copies=[each.replaced(model=f"segments/{segment.path.name}") for each in part.copies],
        blocks=(segment.first, segment.last),
        inputs=tensors(segment.inputs),
        outputs=tensors(segment.outputs),
    )


def reference(model: onnx.ModelProto, feeds: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a plain ONNX Runtime session answers."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def normal(*shape: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return standard normal float32 values."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
