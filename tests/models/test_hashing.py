"""What the two hashes see, and what they do not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from onnx import TensorProto, helper, numpy_helper

from aivmm.models.hashing import Hasher, Hashes, raw_chunks
from aivmm.models.order import PreparedGraph


def info(name: str, shape: Sequence[int] = (2, 4), kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def array(name: str, value: Any, dtype: Any = np.float32) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(value, dtype), name)


def model(nodes: Sequence[onnx.NodeProto], weights: Sequence[onnx.TensorProto] = (), *, opset: int = 17, **edges: Any) -> onnx.ModelProto:
    inputs, outputs = edges.get("inputs", [info("x")]), edges.get("outputs", [info("y")])
    graph = helper.make_graph(list(nodes), "g", inputs, outputs, list(weights))
    return onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9))


def network(*, scale: float = 1.0, axis: int = 1) -> onnx.ModelProto:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="one"),
        helper.make_node("Add", ["a", "b"], ["c"], name="two"),
        helper.make_node("ReduceSum", ["c", "axes"], ["s"], name="three", keepdims=1),
        helper.make_node("Sub", ["c", "s"], ["y"], name="four"),
    ]
    return model(nodes, [array("w", scale * np.eye(4)), array("b", np.ones(4)), array("axes", [axis], np.int64)])


def hashes(proto: onnx.ModelProto, folder: Path, first: int | None = None, last: int | None = None) -> Hashes:
    onnx.save(proto, folder / "m.onnx")
    prepared = PreparedGraph(folder / "m.onnx")
    hasher = Hasher(prepared)
    return hasher.whole() if first is None or last is None else hasher.run(first, last)


def signatures(proto: onnx.ModelProto, folder: Path) -> list[str]:
    onnx.save(proto, folder / "m.onnx")
    prepared = PreparedGraph(folder / "m.onnx")
    hasher = Hasher(prepared)
    return [hasher.signature(node) for node in prepared.nodes]


def rename(proto: onnx.ModelProto) -> onnx.ModelProto:
    renamed = onnx.ModelProto()
    renamed.CopyFrom(proto)
    graph = renamed.graph
    graph.name = "another"
    for node in graph.node:
        node.name, node.doc_string = f"{node.name}!", "a comment"
        node.input[:] = [f"<{name}>" if name else "" for name in node.input]
        node.output[:] = [f"<{name}>" if name else "" for name in node.output]
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.name = f"<{value.name}>"
    return renamed


def test_names_and_comments_do_not_matter(tmp_path: Path) -> None:
    assert hashes(network(), tmp_path) == hashes(rename(network()), tmp_path)


def test_the_order_of_the_file_does_not_matter(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Exp", ["x"], ["b"]),
        helper.make_node("Neg", ["b"], ["c"]),
        helper.make_node("Add", ["a", "c"], ["y"]),
    ]
    one, two = model(nodes), model([nodes[1], nodes[0], nodes[2], nodes[3]])
    assert hashes(one, tmp_path) == hashes(two, tmp_path)


def test_weights_change_the_content_and_not_the_structure(tmp_path: Path) -> None:
    one, two = hashes(network(), tmp_path), hashes(network(scale=2.0), tmp_path)
    assert one.structure == two.structure
    assert one.content != two.content


def test_small_integers_that_shape_the_work_change_the_structure(tmp_path: Path) -> None:
    assert hashes(network(), tmp_path).structure != hashes(network(axis=0), tmp_path).structure


def test_an_integer_bias_is_a_weight(tmp_path: Path) -> None:
    def quantised(bias: int) -> onnx.ModelProto:
        nodes = [helper.make_node("DequantizeLinear", ["q", "s"], ["d"]), helper.make_node("Add", ["x", "d"], ["y"])]
        return model(nodes, [array("q", [bias] * 4, np.int32), array("s", 0.5)])

    one, two = hashes(quantised(1), tmp_path), hashes(quantised(2), tmp_path)
    assert one.structure == two.structure
    assert one.content != two.content


def test_where_weights_are_stored_does_not_matter(tmp_path: Path) -> None:
    inline = hashes(network(), tmp_path)
    onnx.save(network(), tmp_path / "e.onnx", save_as_external_data=True, location="w", size_threshold=0, all_tensors_to_one_file=True)
    typed = network()
    for tensor in typed.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.float_data.extend(numpy_helper.to_array(tensor).reshape(-1).tolist())
            tensor.ClearField("raw_data")
    assert Hasher(PreparedGraph(tmp_path / "e.onnx")).whole() == inline == hashes(typed, tmp_path)


def test_a_default_spelled_out_is_the_default(tmp_path: Path) -> None:
    def pooled(**attributes: Any) -> onnx.ModelProto:
        node = helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], **attributes)
        return model([node], inputs=[info("x", (1, 1, 4, 4))], outputs=[info("y", (1, 1, 3, 3))])

    assert hashes(pooled(), tmp_path) == hashes(pooled(storage_order=0, auto_pad="NOTSET"), tmp_path)
    assert hashes(pooled(), tmp_path) != hashes(pooled(storage_order=1), tmp_path)


def test_an_opset_that_did_not_change_an_operator_does_not_change_its_signature(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    assert signatures(model(nodes, opset=17), tmp_path) == signatures(model(nodes, opset=20), tmp_path)
    softmax = [helper.make_node("Softmax", ["x"], ["y"], axis=1)]
    assert signatures(model(softmax, opset=11), tmp_path) != signatures(model(softmax, opset=13), tmp_path)


@pytest.mark.parametrize("wiring", [("a", "c"), ("b", "c"), ("a", "a")])
def test_topology_matters_even_between_nodes_that_are_alike(tmp_path: Path, wiring: tuple[str, str]) -> None:
    """a and b are the same operator with other weights: who reads which is structure all the same."""

    def wired(left: str, right: str) -> Hashes:
        nodes = [
            helper.make_node("MatMul", ["x", "w0"], ["a"]),
            helper.make_node("MatMul", ["x", "w1"], ["b"]),
            helper.make_node("Add", ["a", "b"], ["c"]),
            helper.make_node("Sub", [left, right], ["y"]),
        ]
        return hashes(model(nodes, [array("w0", np.eye(4)), array("w1", 2 * np.eye(4))], outputs=[info("y"), info("c")]), tmp_path)

    others = {("a", "c"), ("b", "c"), ("a", "a"), ("c", "a")} - {wiring}
    assert wired(*wiring).structure not in {wired(*other).structure for other in others}


def test_sharing_a_weight_is_not_having_two_equal_ones(tmp_path: Path) -> None:
    def two(second: str) -> onnx.ModelProto:
        nodes = [helper.make_node("MatMul", ["x", "w0"], ["a"]), helper.make_node("MatMul", ["a", second], ["y"])]
        return model(nodes, [array("w0", np.eye(4)), array("w1", np.eye(4))])

    assert hashes(two("w0"), tmp_path).structure != hashes(two("w1"), tmp_path).structure


def test_the_order_of_declared_inputs_and_outputs_matters_to_the_whole(tmp_path: Path) -> None:
    nodes = [helper.make_node("Sub", ["x", "z"], ["y"])]
    one, two = (model(nodes, inputs=[info(name) for name in names]) for names in ("xz", "zx"))
    assert hashes(one, tmp_path) != hashes(two, tmp_path)


def test_models_that_share_a_run_of_nodes_share_its_hashes(tmp_path: Path) -> None:
    middle = [helper.make_node("MatMul", ["p", "w"], ["q"]), helper.make_node("Relu", ["q"], ["r"])]
    weights = [array("w", np.eye(4))]
    one = model([helper.make_node("Exp", ["x"], ["p"]), *middle, helper.make_node("Neg", ["r"], ["y"])], weights)
    two = model(
        [helper.make_node("Abs", ["x"], ["u"]), helper.make_node("Add", ["u", "x"], ["p"]), *middle, helper.make_node("Sin", ["r"], ["y"])],
        weights,
    )
    assert hashes(one, tmp_path, 1, 2) == hashes(two, tmp_path, 2, 3)
    assert hashes(one, tmp_path, 1, 2) != hashes(one, tmp_path, 0, 2)


def test_a_branchs_body_what_it_captures_and_its_constants_count(tmp_path: Path) -> None:
    def conditional(op: str = "Add", captured: str = "a", value: float = 1.0) -> Hashes:
        body = helper.make_graph([helper.make_node(op, [captured, "k"], ["r"])], "b", [], [info("r")], [array("k", np.full(4, value))])
        nodes = [
            helper.make_node("Relu", ["x"], ["a"]),
            helper.make_node("Exp", ["x"], ["b"]),
            helper.make_node("If", ["flag"], ["c"], then_branch=body, else_branch=body),
            helper.make_node("Sum", ["a", "b", "c"], ["y"]),
        ]
        return hashes(model(nodes, inputs=[info("x"), info("flag", (), TensorProto.BOOL)]), tmp_path)

    plain = conditional()
    assert plain == conditional()
    assert plain.structure != conditional(op="Mul").structure
    assert plain.structure != conditional(captured="b").structure
    assert plain.structure == conditional(value=2.0).structure
    assert plain.content != conditional(value=2.0).content


def test_a_tensor_attribute_is_content(tmp_path: Path) -> None:
    def filled(value: float) -> onnx.ModelProto:
        nodes = [helper.make_node("ConstantOfShape", ["s"], ["f"], value=array("", [value])), helper.make_node("Add", ["x", "f"], ["y"])]
        return model(nodes, [array("s", [2, 4], np.int64)])

    one, two = hashes(filled(1.0), tmp_path), hashes(filled(2.0), tmp_path)
    assert one.structure == two.structure
    assert one.content != two.content


def test_shapes_and_types_count_and_a_value_read_twice_is_not_two_values(tmp_path: Path) -> None:
    def added(right: str, shape: Sequence[int] = (2, 4), kind: int = TensorProto.FLOAT) -> str:
        edges = {"inputs": [info("x", shape, kind), info("z", shape, kind)], "outputs": [info("y", shape, kind)]}
        return signatures(model([helper.make_node("Add", ["x", right], ["y"])], **edges), tmp_path)[0]

    assert len({added("z"), added("x"), added("z", (2, 5)), added("z", kind=TensorProto.DOUBLE)}) == 4


@given(values=st.lists(st.floats(width=32), min_size=1, max_size=8), other=st.lists(st.floats(width=32), min_size=1, max_size=8))
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_content_is_equal_exactly_when_the_bytes_are(tmp_path: Path, values: list[float], other: list[float]) -> None:
    def holding(numbers: list[float]) -> onnx.ModelProto:
        return model([helper.make_node("Add", ["x", "w"], ["y"])], [array("w", np.resize(numbers, 4))])

    same = np.resize(values, 4).astype(np.float32).tobytes() == np.resize(other, 4).astype(np.float32).tobytes()
    assert (hashes(holding(values), tmp_path) == hashes(holding(other), tmp_path)) is same


@pytest.mark.parametrize("dtype", [ir.DataType.INT4, ir.DataType.BFLOAT16, ir.DataType.FLOAT8E4M3FN, ir.DataType.BOOL, ir.DataType.INT64])
def test_the_bytes_hashed_are_those_onnx_writes(tmp_path: Path, dtype: ir.DataType) -> None:
    tensor = ir.tensor(np.array([0, 1, 1, 0, 1]).astype(dtype.numpy()), dtype=dtype)
    proto = ir.serde.serialize_tensor(tensor)
    (tmp_path / "raw").write_bytes(b"12345678" + proto.raw_data)
    external = ir.ExternalTensor("raw", 8, len(proto.raw_data), dtype, shape=ir.Shape([5]), name="t", base_dir=str(tmp_path))
    assert b"".join(raw_chunks(tensor)) == proto.raw_data == b"".join(map(bytes, raw_chunks(external)))
    external.release()
