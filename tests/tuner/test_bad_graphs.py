"""Graphs that cannot run: one line that says what and where, exit code 2; and those whose file only says something wrong, which run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.tuner.harness import Place
from tests.tuner.test_bad_input import Attempt, assert_one_line, attempt, tune

__all__ = ["attempt", "tune"]  # fixtures

F = TensorProto.FLOAT
node = helper.make_node


def info(name: str, shape: Sequence[int] = (2, 3), kind: int = F) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def model(
    nodes: Sequence[onnx.NodeProto],
    *,
    inputs: Sequence[onnx.ValueInfoProto] = (),
    outputs: Sequence[onnx.ValueInfoProto] = (),
    recorded: Sequence[onnx.ValueInfoProto] = (),
    weights: Sequence[onnx.TensorProto] = (),
    opset: int = 17,
    domains: Sequence[str] = (),
) -> bytes:
    graph = helper.make_graph(
        list(nodes), "net", list(inputs) or [info("x")], list(outputs) or [info("y")], list(weights), value_info=list(recorded)
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    data: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    return data


def _branch_that_needs_what_comes_later() -> bytes:
    body = helper.make_graph([node("Neg", ["late"], ["r"])], "body", [], [info("r")])
    nodes = [node("If", ["flag"], ["q"], then_branch=body, else_branch=body, name="choice"), node("Neg", ["q"], ["late"], name="after")]
    inputs = [info("x"), info("flag", (), TensorProto.BOOL)]
    return model([*nodes, node("Neg", ["late"], ["y"])], inputs=inputs)


def _branch(reads: str) -> bytes:
    body = helper.make_graph([node("Neg", [reads], ["r"], name="inner")], "body", [], [info("r")])
    nodes = [node("If", ["flag"], ["y"], then_branch=body, else_branch=body, name="choice")]
    return model(nodes, inputs=[info("x"), info("flag", (), TensorProto.BOOL)])


REFUSED: dict[str, tuple[Callable[[], bytes], list[str]]] = {
    "a cycle": (
        lambda: model([node("Add", ["x", "b"], ["a"], name="first"), node("Relu", ["a"], ["b"], name="second"), node("Neg", ["b"], ["y"])]),
        ["graph 'net' has a cycle of 2 nodes", "'first' (Add)", "'second' (Relu)"],
    ),
    "a cycle through a branch": (_branch_that_needs_what_comes_later, ["cycle of 2 nodes", "'choice' (If)", "'after' (Neg)"]),
    "an undefined input": (
        lambda: model([node("Add", ["x", "nowhere\n\x1b[31m"], ["y"], name="reader")]),
        ["node 'reader' (Add) of graph 'net' reads 'nowhere\\n\\x1b[31m', which nothing defines"],
    ),
    "an undefined input of a branch": (lambda: _branch("nix"), ["'choice' (If)", "reads 'nix', which nothing defines"]),
    "an output twice": (
        lambda: model([node("Relu", ["x"], ["y"])], outputs=[info("y"), info("y")]),
        ["graph 'net' lists output 'y' twice"],
    ),
    "a tensor written twice": (
        lambda: model([node("Relu", ["x"], ["y"], name="one"), node("Exp", ["x"], ["y"], name="other")]),
        ["tensor 'y'", "'one' (Relu)", "'other' (Exp)"],
    ),
    "a newer opset": (lambda: model([node("Relu", ["x"], ["y"])], opset=99), ["opset 99", "export it with opset 26"]),
    "a domain that no runtime has": (
        lambda: model([node("Teleport", ["x"], ["y"], domain="acme.magic")], domains=["acme.magic"]),
        ["no target here takes Teleport (node 0) of net", "onnxruntime:CPU", "openvino:CPU", "acme.magic"],
    ),
    "shapes that cannot be": (
        lambda: model([node("MatMul", ["x", "w"], ["y"])], weights=[numpy_helper.from_array(np.ones((5, 4), np.float32), "w")]),
        ["no target here takes MatMul (node 0) of net", "onnxruntime:CPU"],
    ),
    "an input larger than memory": (
        lambda: model([node("Relu", ["x"], ["y"])], inputs=[info("x", (1 << 40, 1 << 20))], outputs=[info("y", (1 << 40, 1 << 20))]),
        ["input 'x'", "more memory than there is", "--shape x="],
    ),
    "nothing but an input handed through": (
        lambda: model([node("Relu", ["x"], ["y"])], outputs=[info("x")]),
        ["computes nothing", "each of its outputs is an input"],
    ),
}


FAST = ("a cycle", "a domain that no runtime has")  # of the others tests/models tests the refusal without the command around it


@pytest.mark.parametrize("what", [pytest.param(each, marks=[] if each in FAST else [pytest.mark.slow]) for each in REFUSED])
def test_a_graph_that_cannot_run_is_one_line_and_exit_code_2(tune: Attempt, place: Place, what: str) -> None:
    make, words = REFUSED[what]
    (place.work / "net.onnx").write_bytes(make())
    assert_one_line(tune("net.onnx"), *words)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recorded", "output"),
    [
        (info("h", (7, 9)), info("y", (2, 4))),
        (info("h", (2, 4, 5)), info("y", (2, 4))),
        (info("h", (2, 4), TensorProto.INT64), info("y", (2, 4))),
        (info("h", (2, 4)), info("y", (5, 5))),
        (info("h", (2, 4)), info("y", (2, 4), TensorProto.INT32)),
    ],
)
def test_shapes_and_types_that_the_file_says_wrongly_are_worked_out_anew(
    attempt: Attempt, place: Place, recorded: onnx.ValueInfoProto, output: onnx.ValueInfoProto
) -> None:
    weights = [numpy_helper.from_array(np.ones((3, 4), np.float32), "w")]
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("Relu", ["h"], ["y"])]
    (place.work / "net.onnx").write_bytes(model(nodes, outputs=[output], recorded=[recorded], weights=weights))
    done: Any = attempt("tune", "net.onnx", "--budget", "4s", "--trials", "1")
    assert done.code == 0, done.err
    assert "Traceback" not in done.err
