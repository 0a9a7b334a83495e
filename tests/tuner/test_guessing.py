"""Blocks modelled from operators: what was not measured is told from what was, and said to be a model."""

from __future__ import annotations

import pytest

from aivmm.models.records import Block, Operator, Structure
from aivmm.planner.evidence import Estimate
from aivmm.probes.ceilings import Ceilings
from aivmm.probes.records import Measured, Outcome, ProbeKey, Refused, Samples
from aivmm.runtime.config import Config
from aivmm.tuner.guessing import modelled_blocks

CPU, CALL, MS = "one:CPU", 1e-5, 1e-3
LIMITS = {(CPU, "fp32"): Ceilings(flops_per_s=1e10, copies=((1 << 14, 1e-6), (1 << 26, 1e-2)), call_s=CALL)}


def key(subject: str) -> ProbeKey:
    return ProbeKey(kind="operator", subject=subject, target=CPU, environment="e", config=Config(precision="fp32"))


def took(seconds: float, subject: str = "s") -> Outcome:
    return Measured(key=key(subject), samples=Samples(timed_s=(seconds,) * 5))


def operator(name: str, flops: float, *nodes: str) -> Operator:
    return Operator(
        signature=name, op_type="Conv", domain="", description=name, count=len(nodes), nodes=nodes, flops=flops, bytes=1000
    )  # fmt: skip


def block(index: int, *, data_dependent: bool = False) -> Block:
    return Block(
        index=index,
        first=index,
        last=index,
        structure=f"s{index}",
        content=f"c{index}",
        inputs=(),
        outputs=(),
        op_types={"Conv": 1},
        flops=1e7,
        weight_bytes=0,
        data_dependent=data_dependent,
    )


NODES = [["a0", "b0"], ["a1", "b1"], ["a2"], ["odd"]]
MODEL = Structure(
    structure="s",
    content="c",
    node_count=6,
    flops=1.0,
    weight_bytes=0,
    operators=(operator("A", 1e7, "a0", "a1", "a2"), operator("B", 2e7, "b0", "b1"), operator("odd", 1e6, "odd")),
    cut_points=(),
    blocks=tuple(map(block, range(4))),
)
OPERATORS = {("A", CPU, "fp32"): took(MS + CALL), ("B", CPU, "fp32"): took(2 * MS + CALL)}


def test_what_operators_are_worth_is_learnt_from_measured_blocks() -> None:
    """Inside blocks they take 0.8 of what they take alone."""
    known = {(0, CPU): took(CALL + 0.8 * 3 * MS), (1, CPU): took(CALL + 0.8 * 3 * MS)}
    found = modelled_blocks(MODEL, NODES, [CPU], blocks=known, operators=OPERATORS, ceilings=LIMITS, wholes={})
    assert set(found) == {(2, CPU), (3, CPU)}  # what was measured is not guessed
    guess = found[2, CPU]
    assert guess.source == "modelled" and guess.sigma > 0 and guess.seconds == pytest.approx(0.8 * MS, rel=0.1)


def test_an_operator_that_was_not_measured_is_told_from_its_type_or_not_at_all() -> None:
    found = modelled_blocks(MODEL, NODES, [CPU], blocks={}, operators=OPERATORS, ceilings=LIMITS, wholes={})
    assert found[3, CPU].seconds < found[2, CPU].seconds  # a tenth of the work
    only = {("A", CPU, "fp32"): Refused(key=key("A"), reason="no")}
    assert modelled_blocks(MODEL, NODES, [CPU], blocks={}, operators=only, ceilings=LIMITS, wholes={}) == {}


def test_the_whole_model_is_a_piece_to_learn_from() -> None:
    all_of_it = Estimate(seconds=CALL + 0.5 * 7 * MS, sigma=0.01, source="measured")
    found = modelled_blocks(MODEL, NODES, [CPU], blocks={}, operators=OPERATORS, ceilings=LIMITS, wholes={CPU: all_of_it})
    without = modelled_blocks(MODEL, NODES, [CPU], blocks={}, operators=OPERATORS, ceilings=LIMITS, wholes={})
    assert found[2, CPU].seconds < without[2, CPU].seconds


def test_without_ceilings_nothing_is_made_up_and_a_refusal_is_no_gap() -> None:
    assert modelled_blocks(MODEL, NODES, [CPU], blocks={}, operators=OPERATORS, ceilings={}, wholes={}) == {}
    refused = {(index, CPU): Refused(key=key("x"), reason="no") for index in range(4)}
    assert modelled_blocks(MODEL, NODES, [CPU], blocks=refused, operators=OPERATORS, ceilings=LIMITS, wholes={}) == {}
