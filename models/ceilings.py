"""Small models that reach a device's limits: how fast it multiplies matrices, how fast it moves memory, and what a call costs at all."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_OPSET, _IR_VERSION = 17, 8  # what every runtime in use reads
_ELEMENT_BYTES = 4


def matmul_model(size: int) -> bytes:
    """Return `output_0 = input_0 · W` of float32 [size, size] matrices; W is a constant, as weights are. 2 · size³ operations.

    The weights are random: devices multiply constants such as zeros with less power, hence at higher clocks.
    """
    weights = np.random.default_rng(size).standard_normal((size, size), dtype=np.float32)
    return _model("MatMul", (size, size), numpy_helper.from_array(weights, "constant_1"))


def matmul_flops(size: int) -> float:
    """Return the operations of one run of `matmul_model`."""
    return 2.0 * size**3


def copy_model(moved_bytes: int) -> bytes:
    """Return `output_0 = 2 · input_0` on float32, which reads and writes `moved_bytes` in sum.

    A multiplication and no Identity, which runtimes remove: one operation an element is far below what any device can do while it waits
    for memory. `moved_bytes` is a multiple of 8.
    """
    count, rest = divmod(moved_bytes, 2 * _ELEMENT_BYTES)
    if count < 1 or rest:
        raise ValueError(f"{moved_bytes} bytes are no multiple of {2 * _ELEMENT_BYTES}")
    return _model("Mul", (count,), numpy_helper.from_array(np.array(2, np.float32), "constant_1"))


def call_model() -> bytes:
    """Return a model of one element and one operation: all that its run takes is the cost of a call."""
    return _model("Mul", (1,), numpy_helper.from_array(np.array(2, np.float32), "constant_1"))


def stage_model(size_bytes: int, *, reads: str, writes: str) -> bytes:
    """Return `writes = 2 · reads` on a float32 tensor of `size_bytes` (a multiple of 4): one stage of a chain, under those names."""
    count, rest = divmod(size_bytes, _ELEMENT_BYTES)
    if count < 1 or rest:
        raise ValueError(f"{size_bytes} bytes are no multiple of {_ELEMENT_BYTES}")
    return _model("Mul", (count,), numpy_helper.from_array(np.array(2, np.float32), "factor"), reads=reads, writes=writes)


def _model(op_type: str, shape: tuple[int, ...], constant: onnx.TensorProto, *, reads: str = "input_0", writes: str = "output_0") -> bytes:
    node = helper.make_node(op_type, [reads, constant.name], [writes], name=op_type)
    graph = helper.make_graph(
        [node],
        op_type,
        [helper.make_tensor_value_info(reads, TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(writes, TensorProto.FLOAT, shape)],
        [constant],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION, producer_name="aivmm")
    return bytes(model.SerializeToString(deterministic=True))
