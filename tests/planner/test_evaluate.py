"""The evaluator, against sums done by hand: all solvers are judged by it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from aivmm.planner.evaluate import evaluate
from aivmm.planner.problem import Choice, Edge, Move, Node, Place, PlacedDevice, Problem

A0, A1, B, B8 = Place("a", 0), Place("a", 1), Place("b"), Place("b int8")

#      s ──x(10)──> t, u        s ──y(100)──> u        t ──(1)──> v
PROBLEM = Problem(
    devices=[PlacedDevice(name="acc", count=2, memory_bytes=5), PlacedDevice(name="cpu")],
    choices=[
        Choice(name="a", target="A", device="acc"),
        Choice(name="b", target="B", device="cpu"),
        Choice(name="b int8", target="B", device="cpu"),
    ],
    nodes=[
        Node(id="s", costs={"a": 1, "b": 2}, memory_bytes=3),
        Node(id="t", costs={"a": 4, "b": 8, "b int8": 5}, memory_bytes={"a": 2, "b": 1}),
        Node(id="u", costs={"a": 16, "b": 32}, memory_bytes=3),
        Node(id="v", costs={"a": 64, "b": 128}),
    ],
    edges=[
        Edge(source="s", reader="t", bytes=10, tensor="x"),
        Edge(source="s", reader="u", bytes=10, tensor="x"),
        Edge(source="s", reader="u", bytes=100, tensor="y"),
        Edge(source="t", reader="v", bytes=1),
    ],
    transfers={("A", "A"): Move(0.5, 0.01), ("A", "B"): Move(0.25, 0.001), ("B", "B"): Move(0.125)},
    exports={"A": Move(0.0, 0.1)},
    unsupported=frozenset({("B", "A")}),
    contention={("acc", "cpu"): 1.5, ("acc", "acc"): 2.0},
)


def places(s: Place, t: Place, u: Place, v: Place) -> dict[str, Place]:
    return {"s": s, "t": t, "u": u, "v": v}


def test_all_on_one_device_costs_the_sum_of_its_nodes() -> None:
    found = evaluate(PROBLEM, places(B, B, B, B))
    assert found.loads == found.slowed == {("cpu", 0): 170}
    assert found.objective("latency") == found.objective("throughput") == 170
    assert found.contiguous and not found.broken


def test_a_tensor_is_exported_once_and_received_once_at_each_place() -> None:
    found = evaluate(PROBLEM, places(A0, B, B, B))
    # s leaves with x and y: 0.1 * 10 + 0.1 * 100; the cpu receives x once although t and u read it, and y.
    assert found.loads[("acc", 0)] == pytest.approx(1 + 1 + 10)
    assert found.loads[("cpu", 0)] == pytest.approx(8 + 32 + 128 + (0.25 + 0.01) + (0.25 + 0.1))
    assert found.objective("latency") == pytest.approx(12 + 168.61)


def test_two_readers_at_two_places_receive_it_twice_and_it_is_still_exported_once() -> None:
    found = evaluate(PROBLEM, places(A0, A1, B, A1))
    assert found.loads[("acc", 0)] == pytest.approx(1 + 1 + 10)
    assert found.loads[("acc", 1)] == pytest.approx(4 + 64 + 0.5 + 0.1)
    assert found.loads[("cpu", 0)] == pytest.approx(32 + 0.25 + 0.01 + 0.25 + 0.1)


def test_devices_that_are_used_slow_each_other_for_throughput_only() -> None:
    found = evaluate(PROBLEM, places(A0, A1, B, A1))
    assert found.slowed[("acc", 1)] == pytest.approx(68.6 * (1 + 1.0 + 0.5))  # beside the other accelerator, and beside the cpu
    assert found.slowed[("cpu", 0)] == found.loads[("cpu", 0)]
    assert found.objective("throughput") == pytest.approx(68.6 * 2.5)
    assert found.objective("latency") == pytest.approx(12 + 68.6 + 32.61)


def test_two_choices_of_one_device_share_its_load_and_pay_for_moving_between_them() -> None:
    found = evaluate(PROBLEM, places(B, B8, B, B))
    assert found.loads == {("cpu", 0): pytest.approx(2 + 5 + 32 + 128 + 0.125 + 0.125)}
    assert not found.contiguous, "a device runs one segment, and a segment one choice"


def test_an_unsupported_pair_breaks_a_plan_where_a_tensor_meets_it() -> None:
    assert evaluate(PROBLEM, places(B, A0, B, B)).broken == ("nothing moves from 'B' to 'A', as node 's' needs",)


def test_memory_counts_per_device_and_by_choice() -> None:
    # s takes 3, t takes 2 in a, u takes 3: five fit, and eight do not
    assert not evaluate(PROBLEM, places(A0, A0, B, B)).broken
    assert evaluate(PROBLEM, places(A0, A0, A0, A0)).broken == ("acc:0 holds 8 of 5 bytes",)
    assert not evaluate(PROBLEM, places(A0, A1, A1, A1)).broken


def test_colocated_nodes_are_at_one_place() -> None:
    together = replace(PROBLEM, nodes=[replace(each, colocation="k" if each.id in "tv" else None) for each in PROBLEM.nodes])
    assert not evaluate(together, places(A0, B, B, B)).broken
    assert evaluate(together, places(B, B8, B, B)).broken == ("the nodes of class 'k' are at 2 places",)


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ({"s": B, "t": B, "u": B}, "node 'v' is not placed"),
        (places(B8, B, B, B), "'b int8' does not support node 's'"),
        (places(Place("a", 2), B, B, B), "there is no device 2 for 'a', where node 's' is placed"),
        (places(B, B, B, B) | {"w": B}, "unknown node 'w'"),
    ],
)
def test_what_is_no_assignment_is_said(assignment: dict[str, Place], words: str) -> None:
    assert evaluate(PROBLEM, assignment).broken == (words,)


def test_contiguous_is_when_no_device_needs_its_own_results_back() -> None:
    free = {(one, other): Move() for one in "AB" for other in "AB"}
    line = Problem(
        devices=PROBLEM.devices,
        choices=PROBLEM.choices,
        nodes=[Node(id=str(index), costs={"a": 1, "b": 1}) for index in range(3)],
        edges=[Edge(source="0", reader="1"), Edge(source="1", reader="2")],
        transfers=free,
    )
    assert evaluate(line, {"0": A0, "1": A0, "2": B}).contiguous
    assert evaluate(line, {"0": A0, "1": B, "2": A1}).contiguous
    assert not evaluate(line, {"0": A0, "1": B, "2": A0}).contiguous
