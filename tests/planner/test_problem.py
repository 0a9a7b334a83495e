"""Placement problems: what is refused, and what a file gives back."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from aivmm.errors import UsageError
from aivmm.planner.problem import Choice, Move, Node, Place, PlacedDevice, Problem, topological_order
from aivmm.planner.problem_files import problem_from_json, problem_to_json, read_problem
from tests.planner.placing import problems, published

GOOD: dict[str, Any] = {
    "schema": 1,
    "devices": [{"name": "cpu"}, {"name": "gpu", "count": 2, "memory_bytes": 100}],
    "choices": [{"name": "c", "target": "x:CPU", "device": "cpu"}, {"name": "g", "target": "x:GPU", "device": "gpu"}],
    "nodes": [{"id": "a", "costs": {"c": 1, "g": 0.5}, "memory_bytes": 10}, {"id": "b", "costs": {"g": 2}, "colocation": "k"}],
    "edges": [{"from": "a", "to": "b", "bytes": 8}],
    "transfers": [
        {"from": "x:CPU", "to": "x:GPU", "fixed": 0.1, "per_byte": 0.5},
        {"from": "x:GPU", "to": "x:GPU", "fixed": 0.2},
    ],
    "exports": [{"target": "x:GPU", "per_byte": 1}],
    "unsupported_pairs": [["x:GPU", "x:CPU"]],
    "contention": [{"device": "cpu", "beside": "gpu", "factor": 1.5}],
}


def changed(**changes: Any) -> str:
    return json.dumps(GOOD | changes)


def test_a_file_says_all_that_a_problem_holds() -> None:
    problem = problem_from_json(json.dumps(GOOD))
    assert problem.devices == [PlacedDevice(name="cpu"), PlacedDevice(name="gpu", count=2, memory_bytes=100.0)]
    assert problem.devices[0].memory_bytes == math.inf
    assert problem.nodes[1] == Node(id="b", costs={"g": 2.0}, colocation="k")
    assert problem.transfers["x:CPU", "x:GPU"].cost(8) == 4.1
    assert problem.exports == {"x:GPU": Move(0.0, 1.0)}
    assert problem.unsupported == {("x:GPU", "x:CPU")}
    assert problem.contention == {("cpu", "gpu"): 1.5}
    assert problem.unit == "s"


@settings(deadline=None, max_examples=15)
@given(problems())
def test_a_problem_comes_back_from_its_json_as_it_was(problem: Problem) -> None:
    assert problem_from_json(problem_to_json(problem)) == problem


NODE = {"id": "a", "costs": {"c": 1}}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[1]", "holds no JSON object"),
        ('{"schema": 1, "schema": 1}', "the key 'schema' is there twice"),
        ("{}", r"schema: Field required \(and 3 more\)"),
        (changed(schema=2), "schema: Input should be 1"),
        (changed(colour="red"), "colour: Extra inputs are not permitted"),
        (changed(nodes=[]), "there is no node"),
        (changed(nodes=[NODE, NODE]), "node 'a' is there twice"),
        (changed(nodes=[{"id": 1, "costs": {}}]), r"nodes\[0\].id: Input should be a valid string"),
        (changed(nodes=[{"id": "a", "costs": {"c": -1}}]), r"nodes\[0\].costs.c: Input should be greater than or equal to 0"),
        (changed(nodes=[{"id": "a", "costs": {"c": math.nan}}]), r"nodes\[0\].costs.c: Input should be"),
        (changed(nodes=[{"id": "a", "costs": {"c": math.inf}}]), r"nodes\[0\].costs.c: Input should be a finite number"),
        (changed(nodes=[{"id": "a", "costs": {"c": 1e300}}], edges=[]), r"node 'a' in 'c' costs 1e\+300; give a finite number from 0 to"),
        (changed(contention=[{"device": "cpu", "beside": "gpu", "factor": 1e300}]), "the contention of 'cpu' beside 'gpu' is 1e"),
        ('{"schema": ' + "1" * 5000 + "}", "not JSON: Exceeds the limit"),
        (changed(nodes=[{"id": "a", "costs": {"c": True}}]), r"nodes\[0\].costs.c: Input should be a valid number"),
        (changed(nodes=[{"id": "a", "costs": {"tpu": 1}}], edges=[]), "node 'a' names the unknown choice 'tpu'; known: 'c', 'g'"),
        (changed(edges=[{"from": "a", "to": "z"}]), "the edge from 'a' to 'z' names the unknown node 'z'"),
        (changed(edges=[{"from": "a", "to": "b"}, {"from": "a", "to": "b"}]), "the edge from 'a' to 'b' is there twice"),
        (changed(edges=[{"from": "a", "to": "b"}, {"from": "b", "to": "a"}]), "the graph has a cycle behind node '[ab]'"),
        (changed(edges=[{"from": "a", "to": "a"}]), "the graph has a cycle behind node 'a'"),
        (
            changed(
                nodes=[*GOOD["nodes"], {"id": "d", "costs": {}}], edges=[{"from": "a", "to": "b", "bytes": 1}, {"from": "a", "to": "d"}]
            ),
            "one tensor of node 'a' has 1.0 and 0.0 bytes; give its edges the same bytes, or different names",
        ),
        (changed(devices=[{"name": "cpu", "count": 0}]), r"devices\[0\].count: Input should be greater than or equal to 1"),
        (changed(devices=[{"name": "cpu"}, {"name": "cpu"}]), "device 'cpu' is there twice"),
        (changed(devices=[{"name": "cpu"}]), "choice 'g' names the unknown device 'gpu'"),
        (changed(transfers=[]), "nothing says what a transfer from 'x:CPU' to 'x:GPU' costs; add it"),
        (changed(transfers=GOOD["transfers"][:1]), "nothing says what a transfer from 'x:GPU' to 'x:GPU' costs"),
        (changed(transfers=[*GOOD["transfers"], GOOD["transfers"][0]]), "is there twice in transfers, exports or contention"),
        (changed(transfers=[{"from": "x:CPU", "to": "x:NPU"}]), "the transfer from 'x:CPU' to 'x:NPU' names the unknown target 'x:NPU'"),
        (changed(unsupported_pairs=[["x:GPU", "x:CPU"], ["x:CPU", "x:GPU"]]), "has a cost and is unsupported; drop one"),
        (changed(contention=[{"device": "cpu", "beside": "gpu", "factor": 0.5}]), r"contention\[0\].factor: Input should be greater"),
        (changed(exports=[{"target": "y:CPU"}]), "exports names the unknown target 'y:CPU'"),
    ],
)
def test_a_bad_file_is_refused_in_one_line_that_says_where(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.json"
    file.write_text(text)
    with pytest.raises(UsageError, match=words) as caught:
        read_problem(file)
    assert str(file) in caught.value.message
    assert caught.value.advice
    assert "\n" not in str(caught.value)


def test_a_mark_of_the_byte_order_is_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "windows.json").write_text(json.dumps(GOOD), encoding="utf-8-sig")
    assert read_problem(tmp_path / "windows.json") == problem_from_json(json.dumps(GOOD))


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b'{"\xe9": 1}')
    for path in (tmp_path, tmp_path / "absent.json", tmp_path / "latin"):
        with pytest.raises(UsageError, match="cannot be read"):
            read_problem(path)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"cost": math.nan}, "node 'a' in 'c' costs nan; give a finite number"),
        ({"cost": -1.0}, "node 'a' in 'c' costs -1"),
        ({"memory": math.inf}, "node 'a' takes memory_bytes of inf"),
        ({"limit": math.nan}, "device 'd' has nan bytes of memory"),
        ({"count": 0}, "device 'd' has the count 0"),
    ],
)
def test_what_is_made_in_python_is_checked_alike(numbers: dict[str, float], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Problem(
            devices=[PlacedDevice(name="d", count=int(numbers.get("count", 1)), memory_bytes=numbers.get("limit", math.inf))],
            choices=[Choice(name="c", target="t", device="d")],
            nodes=[Node(id="a", costs={"c": numbers.get("cost", 1.0)}, memory_bytes=numbers.get("memory", 0.0))],
        )


def test_an_order_has_every_edge_forward_and_all_nodes() -> None:
    order = topological_order(["d", "c", "b", "a"], [("a", "b"), ("a", "c"), ("b", "d"), ("c", "d")])
    assert sorted(order) == ["a", "b", "c", "d"]
    assert order[0] == "a" and order[-1] == "d"


def test_a_place_is_written_as_its_choice_and_the_number_of_its_device() -> None:
    assert str(Place("acc", 3)) == "acc:3"


PUBLISHED: dict[str, Any] = {
    "maxFPGAs": 2,
    "maxCPUs": 1,
    "maxSizePerFPGA": 50,
    "nodes": [
        {"id": 7, "supportedOnFpga": 1, "cpuLatency": 10, "fpgaLatency": 1, "size": 30, "colorClass": 4, "name": "x", "isBackwardNode": 0},
        {"id": 9, "supportedOnFpga": False, "cpuLatency": 2, "fpgaLatency": 1, "size": 30},
    ],
    "edges": [{"sourceId": 7, "destId": 9, "cost": 0.25, "size": 100}],
}


def test_a_published_instance_becomes_a_problem() -> None:
    problem = problem_from_json(json.dumps(PUBLISHED))
    assert problem.devices == [PlacedDevice(name="acc", count=2, memory_bytes=50.0), PlacedDevice(name="cpu")]
    assert [each.costs for each in problem.nodes] == [{"acc": 1.0, "cpu": 10.0}, {"cpu": 2.0}]
    assert [each.colocation for each in problem.nodes] == ["4", None]
    # A result goes through host memory: the accelerator pays to put it there, and pays to fetch one; a CPU core pays nothing.
    assert problem.exports["acc"].cost(0.25) == 0.25 and "cpu" not in problem.exports
    assert {pair: move.cost(0.25) for pair, move in problem.transfers.items()} == {
        ("acc", "acc"): 0.25,
        ("cpu", "acc"): 0.25,
        ("acc", "cpu"): 0.0,
        ("cpu", "cpu"): 0.0,
    }


def test_a_published_instance_that_is_damaged_or_of_another_kind_is_refused() -> None:
    for change, words in (
        ({"nodes": [PUBLISHED["nodes"][0] | {"isBackwardNode": True}], "edges": []}, "training workload"),
        ({"edges": [{"sourceId": 7, "destId": 9, "cost": -1}]}, r"edges\[0\].cost"),
        ({"edges": [{"sourceId": 7, "destId": 8, "cost": 1}]}, "unknown node '8'"),
        ({"maxSizePerFPGA": math.nan}, "maxSizePerFPGA"),
    ):
        with pytest.raises(UsageError, match=words):
            problem_from_json(json.dumps(PUBLISHED | change))


@pytest.mark.parametrize(("name", "nodes", "edges"), [("bert24_layer", 32, 55), ("resnet50_layer", 177, 193), ("bert3_operator", 235, 250)])
def test_the_published_files_are_read(name: str, nodes: int, edges: int) -> None:
    problem = read_problem(published(name))
    assert (len(problem.nodes), len(problem.edges)) == (nodes, edges)
