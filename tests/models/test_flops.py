"""Operations and bytes against counts made by hand, and against published totals of known networks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from aivmm.models.demo import write_demo
from aivmm.models.flops import bytes_moved, flops
from aivmm.models.graph import analyse
from aivmm.models.prepare import prepare

Shapes = Sequence[Sequence[int | str] | None]


def node(op: str, reads: Shapes, writes: Shapes, *, domain: str = "", kind: int = TensorProto.FLOAT, **attributes: Any) -> ir.Node:
    """One node with these shapes; None stands for an input that is left out."""
    names = ["" if shape is None else f"i{index}" for index, shape in enumerate(reads)]
    inputs = [helper.make_tensor_value_info(name, kind, shape) for name, shape in zip(names, reads, strict=True) if shape is not None]
    outputs = [helper.make_tensor_value_info(f"o{index}", kind, shape) for index, shape in enumerate(writes)]
    made = helper.make_node(op, names, [value.name for value in outputs], domain=domain, **attributes)
    graph = helper.make_graph([made], "g", inputs, outputs)
    return next(iter(ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])).graph))


@pytest.mark.parametrize(
    ("built", "expected"),
    [
        (node("Conv", [(1, 3, 8, 8), (16, 3, 3, 3), (16,)], [(1, 16, 6, 6)]), 16 * 36 * (2 * 27 + 1)),
        (node("Conv", [(2, 8, 8, 8), (8, 1, 3, 3)], [(2, 8, 6, 6)], group=8), 2 * 8 * 36 * 2 * 9),
        (node("ConvTranspose", [(1, 4, 5, 5), (4, 2, 3, 3)], [(1, 2, 7, 7)]), 2 * 100 * 18),
        (node("Gemm", [(5, 7), (7, 3), (3,)], [(5, 3)]), 15 * (2 * 7 + 1)),
        (node("Gemm", [(7, 5), (3, 7)], [(5, 3)], transA=1, transB=1), 15 * 14),
        (node("MatMul", [(2, 4, 5, 7), (7, 3)], [(2, 4, 5, 3)]), 2 * 4 * 5 * 3 * 14),
        (node("MatMul", [(7,), (7,)], [()]), 14),
        (node("FusedMatMul", [(2, 7, 5), (2, 7, 3)], [(2, 5, 3)], domain="com.microsoft", transA=1), 30 * 14),
        (node("MatMulNBits", [(2, 64), (8, 2, 16), (16,)], [(2, 8)], domain="com.microsoft", K=64, N=8, bits=4), 2 * 8 * 128),
        (node("Einsum", [(2, 3, 4), (2, 4, 5)], [(2, 3, 5)], equation="bij,bjk->bik"), 2 * 2 * 3 * 4 * 5),
        (node("Einsum", [(2, 3)], [(2, 3)], equation="...->..."), None),
        (node("MaxPool", [(1, 2, 8, 8)], [(1, 2, 4, 4)], kernel_shape=[2, 2]), 32 * 4),
        (node("GlobalAveragePool", [(1, 2, 8, 8)], [(1, 2, 1, 1)]), 128),
        (node("ReduceMean", [(2, 8)], [(2, 1)]), 16),
        (node("Softmax", [(2, 8)], [(2, 8)]), 80),
        (node("Sum", [(2, 8)] * 3, [(2, 8)]), 32),
        (node("Mean", [(2, 8)] * 3, [(2, 8)]), 48),
        (node("Resize", [(1, 1, 4, 4), None, (4,)], [(1, 1, 8, 8)], mode="linear"), 2 * 64 * 4),
        (node("Resize", [(1, 1, 4, 4), None, (4,)], [(1, 1, 8, 8)], mode="nearest"), 0),
        (node("RNN", [(5, 2, 3), (1, 4, 3), (1, 4, 4)], [(5, 1, 2, 4)], hidden_size=4), 10 * (2 * 4 * 7 + 8 + 4)),
        (node("LSTM", [(5, 2, 3), (2, 16, 3), (2, 16, 4)], [(5, 2, 2, 4)], hidden_size=4), 10 * 2 * (2 * 16 * 7 + 32 + 18 * 4)),
        (node("Attention", [(1, 2, 5, 8)] * 3, [(1, 2, 5, 8)]), 2 * 25 * (2 * 16 + 6)),
        (node("Attention", [(1, 5, 16)] * 3, [(1, 5, 16)], q_num_heads=2, kv_num_heads=2), 2 * 25 * (2 * 16 + 6)),
        (
            node("Attention", [(1, 5, 16), (16, 48), (48,)], [(1, 5, 16)], domain="com.microsoft", num_heads=2),
            2 * 5 * 16 * 48 + 25 * (64 + 12),
        ),
        (node("MultiHeadAttention", [(1, 5, 16)] * 3, [(1, 5, 16)], domain="com.microsoft", num_heads=2), 25 * (64 + 12)),
        (node("Transpose", [("n", 8)], [(8, "n")]), 0),
        (node("Relu", [("n", 8)], [("n", 8)]), None),
        (node("Relu", [(2, 8)], [(2, 8)], domain="my.own"), None),
        (node("TreeEnsembleRegressor", [(2, 8)], [(2, 1)], domain="ai.onnx.ml"), None),
    ],
)
def test_operations_are_as_counted_by_hand(built: ir.Node, expected: float | None) -> None:
    assert flops(built) == expected


@pytest.mark.parametrize(
    ("built", "expected"),
    [
        (node("Add", [(2, 8), (8,)], [(2, 8)]), 4 * (16 + 8 + 16)),
        (node("Relu", [(2, 8)], [(2, 8)], kind=TensorProto.FLOAT16), 64),
        (node("Gather", [(1000, 8), (3,)], [(3, 8)]), 4 * (24 + 24 + 3)),
        (node("Shape", [(2, 8)], [(2,)]), 8),
        (node("Relu", [("n", 8)], [("n", 8)]), None),
        (node("StringNormalizer", [(4,)], [(4,)], kind=TensorProto.STRING), None),
    ],
)
def test_bytes_are_as_counted_by_hand(built: ir.Node, expected: int | None) -> None:
    assert bytes_moved(built) == expected


@pytest.mark.parametrize(("name", "mac"), [("squeezenet", 0.35e9), ("shufflenet", 0.13e9)])
def test_totals_of_known_networks_are_twice_their_published_multiply_adds(tmp_path: Path, name: str, mac: float) -> None:
    """SqueezeNet 1.1: 0.35 G multiply-adds (Iandola 2016, authors' repository); ShuffleNet 1x g=3: 0.13-0.14 G (Zhang 2017, table 1)."""
    prepare(write_demo(name, tmp_path), tmp_path / "p.onnx")
    total = analyse(tmp_path / "p.onnx").flops
    assert total is not None
    assert np.isclose(total, 2 * mac, rtol=0.08)
