"""Nodes with too few inputs are found without `onnx`, by a table that is held against it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import onnx
import onnx.defs
import pytest
from onnx import TensorProto, helper

import aivmm
from aivmm.errors import BundleError
from aivmm.runtime.onnx_arity import LEAST_INPUTS, short_of_inputs
from tests.making import OPENVINO, Part, chain_model, make_bundle, onnx_model


def test_the_table_is_that_of_onnx() -> None:
    least: dict[str, int] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain in ("", "ai.onnx"):
            least[schema.name] = min(least.get(schema.name, 99), schema.min_input)
    assert {name: count for name, count in least.items() if count} == LEAST_INPUTS


@pytest.mark.parametrize("inputs", [["m0"], ["m0", ""], []])
def test_a_conv_without_weights_is_refused_and_does_not_end_the_process(tmp_path: Path, inputs: list[str]) -> None:
    bundle = make_bundle(tmp_path / "m.aivmm", chain_model(width=16), [Part(OPENVINO)])
    (file,) = bundle.glob("segments/*.onnx")
    model = onnx.load(file, load_external_data=False)
    model.graph.node[1].op_type = "Conv"
    model.graph.node[1].input[:] = inputs
    file.write_bytes(model.SerializeToString())
    plan = json.loads((bundle / "plan.json").read_text())
    plan["files"][f"segments/{file.name}"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (bundle / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(BundleError, match="holds a Conv without the 2 inputs that it needs; tune from the original model"):
        aivmm.load_plan(bundle)


def test_nodes_of_subgraphs_are_seen_and_those_of_other_domains_are_left_alone() -> None:
    def branch(*nodes: onnx.NodeProto) -> onnx.GraphProto:
        return helper.make_graph(list(nodes), "b", [], [helper.make_tensor_value_info("r", TensorProto.FLOAT, [1])])

    sound = branch(helper.make_node("Identity", ["x"], ["r"]))
    graph = [("c", TensorProto.BOOL, []), ("x", TensorProto.FLOAT, [1])], [("y", TensorProto.FLOAT, [1])]
    model = onnx_model([helper.make_node("If", ["c"], ["y"], then_branch=sound, else_branch=sound)], *graph)
    assert short_of_inputs(model.SerializeToString()) == ""
    model.graph.node[0].attribute[1].g.node[0].ClearField("input")
    assert short_of_inputs(model.SerializeToString()) == "a Identity without the 1 input that it needs"
    model.graph.node[0].attribute[1].g.node[0].domain = "mine"
    assert short_of_inputs(model.SerializeToString()) == ""


@pytest.mark.parametrize("content", [b"", b"\xff" * 50, b"\x3a\x05\x0a", b"not onnx"])
def test_what_is_no_model_is_left_to_the_runtimes(content: bytes) -> None:
    assert short_of_inputs(content) == ""
