"""Lowering by conversion: the model itself computes in float16 or bfloat16, its inputs and outputs stay as they were."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

from aivmm.errors import Unsupported
from aivmm.models.lowering_model import quiet, read

_PRODUCTS = ("Conv", "Gemm", "MatMul")
_HALF_MAX = 65504.0


def converted(base: Path, precision: str) -> ir.Model:
    """Return the model at `base` in "fp16" (everything that ONNX Runtime's converter knows) or "bf16" (products and convolutions).

    Raises:
        Unsupported: a weight is beyond what fp16 holds, or there is nothing to convert.
    """
    return _in_half(base) if precision == "fp16" else _in_bfloat(read(base))


def _in_half(base: Path) -> ir.Model:
    with quiet():
        from onnxruntime.transformers.float16 import convert_float_to_float16

        proto = onnx.load(base)
        for each in proto.graph.initializer:
            if each.data_type == onnx.TensorProto.FLOAT and np.abs(onnx.numpy_helper.to_array(each)).max(initial=0.0) > _HALF_MAX:
                raise Unsupported(f"weight {each.name!r} holds values beyond {_HALF_MAX:g}, the most that fp16 has")
        return ir.from_proto(convert_float_to_float16(proto, keep_io_types=True, disable_shape_infer=True))


def _in_bfloat(model: ir.Model) -> ir.Model:
    """Products read operands cast to bfloat16, and what they give is cast back."""
    casts: dict[ir.Value, ir.Value] = {}
    for node in [node for node in model.graph if node.op_type in _PRODUCTS and not node.domain]:
        operands = [value for value in node.inputs if value is not None]
        if any(value.dtype != ir.DataType.FLOAT for value in (*operands, node.outputs[0])):
            continue
        for index, value in enumerate(node.inputs):
            if value is not None:
                if value not in casts:
                    casts[value] = _narrow(model, value)
                node.replace_input_with(index, casts[value])
        _widen(model, node)
    if not casts:
        raise Unsupported("nothing to lower: the model has no product of float32 values")
    return model


def _narrow(model: ir.Model, value: ir.Value) -> ir.Value:
    name = f"{value.name}.bf16"
    if value.const_value is not None and not value.is_graph_input():
        array = np.asarray(value.const_value.numpy()).astype(ml_dtypes.bfloat16)
        made = ir.Value(
            name=name, type=ir.TensorType(ir.DataType.BFLOAT16), shape=ir.Shape(array.shape), const_value=ir.tensor(array, name=name)
        )
        model.graph.register_initializer(made)
        return made
    cast = ir.node("Cast", [value], attributes={"to": int(ir.DataType.BFLOAT16)}, name=name)
    out = cast.outputs[0]
    out.name, out.dtype, out.shape = name, ir.DataType.BFLOAT16, value.shape
    model.graph.append(cast)  # sorted when all is done
    return out


def _widen(model: ir.Model, node: ir.Node) -> None:
    old = node.outputs[0]
    name, is_output = old.name, old.is_graph_output()
    cast = ir.node("Cast", [old], attributes={"to": int(ir.DataType.FLOAT)}, name=f"{name}.fp32")
    wide = cast.outputs[0]
    wide.dtype, wide.shape = ir.DataType.FLOAT, old.shape
    old.replace_all_uses_with(wide, replace_graph_outputs=is_output)
    cast.replace_input_with(0, old)
    old.dtype, old.name, wide.name = ir.DataType.BFLOAT16, f"{name}.narrow", name
    model.graph.append(cast)
