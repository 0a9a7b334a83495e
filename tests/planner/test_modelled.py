"""Sums of operators, held to pieces whose parts are known."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aivmm.planner.modelled import Alone, Factors, operator
from aivmm.planner.scaling import Point

CALL = 10e-6


def piece(own: float, fused: float) -> Alone:
    return Alone(own_s=own, fused_s=fused, call_s=CALL)


@given(
    own=st.floats(0.5, 1.2),
    fused=st.floats(0.0, 0.6),
    parts=st.lists(st.tuples(st.floats(1e-4, 1e-2), st.floats(1e-4, 1e-2)), min_size=12, max_size=20),
)
@settings(max_examples=40, deadline=None)
def test_what_the_parts_are_worth_is_found_from_pieces_measured_both_ways(
    own: float, fused: float, parts: list[tuple[float, float]]
) -> None:
    truth = Factors(own=own, fused=fused)
    known = [(piece(*each), truth.seconds(piece(*each))) for each in parts]
    found = Factors.fitted(known[:-1])
    assert found.estimate(known[-1][0]).seconds == pytest.approx(known[-1][1], rel=0.25)
    assert found.fitted_to == len(known) - 1 and found.sigma < 0.25


def test_with_nothing_to_fit_to_it_is_a_guess_that_says_so() -> None:
    found = Factors.fitted([]).estimate(piece(1e-3, 1e-3))
    assert 0.5e-3 < found.seconds < 2e-3 and found.sigma == 0.5 and found.source == "modelled" and "0 pieces" in found.because


def test_one_odd_piece_does_not_make_the_others_unsure() -> None:
    known = [(piece(n * 1e-3, 0.0), CALL + 0.8e-3 * n) for n in range(1, 12)]
    assert Factors.fitted([*known, (piece(1e-3, 0.0), 9e-3)]).sigma < 0.2


def test_each_operator_pays_the_call_once_when_alone_and_the_piece_once_in_all() -> None:
    together = Alone.of([(CALL + 1e-3, 2, 1), (0.5 * CALL, 4, 0)], CALL)
    assert together.own_s == pytest.approx(2e-3) and together.fused_s == pytest.approx(1e-3) and together.call_s == CALL


def test_an_operator_of_a_new_size_is_taken_from_its_type() -> None:
    known = {"Conv": [Point(floor_s=floor, seconds=2 * floor) for floor in (1e-3, 1e-2)]}
    found = operator("Conv", 5e-3, known)
    assert found and found.seconds == pytest.approx(1e-2) and found.source == "interpolated"
    assert operator("Gemm", 5e-3, known) is None
