"""How close outputs are to a reference, and what makes them unusable."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aivmm.probes.accuracy import combined, judge, narrowed

X = np.array([1.0, -2.0, 3.0], dtype=np.float32)


def one(actual: Any, expected: Any) -> Any:
    return judge({"y": np.asarray(actual)}, {"y": np.asarray(expected)})


def test_equal_outputs_are_perfect() -> None:
    found = one(X, X)
    assert (found.cosine, found.relative_l2, found.max_abs, found.problem) == (pytest.approx(1.0), 0.0, 0.0, "")
    assert found.metrics() == {"cosine": pytest.approx(1.0), "relative_l2": 0.0, "max_abs": 0.0, "sqnr": 200.0}


def test_known_errors_are_measured_as_defined() -> None:
    found = one([3.0, 4.0], [3.0, 0.0])
    assert found.relative_l2 == pytest.approx(4 / 3) and found.max_abs == 4 and found.cosine == pytest.approx(0.6)
    assert (
        one(-X, X).cosine == pytest.approx(-1)
        and one(2 * X, X).cosine == pytest.approx(1)
        and one(2 * X, X).relative_l2 == pytest.approx(1)
    )


def test_the_worst_output_counts() -> None:
    found = judge({"a": X, "b": -X, "more": X}, {"a": X, "b": X})
    assert found.cosine == pytest.approx(-1) and found.relative_l2 == pytest.approx(2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_a_number_is_a_problem_unless_the_reference_has_it_too(bad: float) -> None:
    assert "NaN or infinity" in one([1.0, bad], [1.0, 2.0]).problem
    assert "differs from the reference" in one([1.0, 2.0], [1.0, bad]).problem
    assert "differs from the reference" in one([1.0, -math.inf], [1.0, math.inf]).problem
    assert one([1.0, bad], [1.0, bad]).problem == "" and one([bad], [bad]).cosine == 1.0
    unusable = one([1.0, bad], [1.0, 2.0])
    assert unusable.cosine == -1 and unusable.relative_l2 == math.inf and unusable.metrics() == {"cosine": -1.0}


def test_missing_outputs_and_other_shapes_are_problems() -> None:
    assert judge({}, {"y": X}).problem == "the output 'y' is missing"
    assert one(X[None], X).problem == "output 'y' has shape [1, 3], the reference has [3]"
    assert "strings" in one(np.array(["1", "2", "3"], dtype=object), X).problem


def test_zeros() -> None:
    assert one([0.0, 0.0], [0.0, 0.0]).cosine == 1.0
    assert one([3.0, 4.0], [0.0, 0.0]).cosine == 0.0 and one([3.0, 4.0], [0.0, 0.0]).relative_l2 == pytest.approx(5)
    assert one([0.0, 0.0], [3.0, 4.0]).cosine == 0.0 and one([0.0, 0.0], [3.0, 4.0]).relative_l2 == 1
    assert one(np.zeros((0, 2)), np.zeros((0, 2))).cosine == 1.0


@pytest.mark.parametrize(
    ("actual", "expected", "share"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 0.0),
        ([1, 2, 3, 9], [1, 2, 3, 4], 0.25),
        ([True, False], [True, True], 0.5),
        (np.array(["a", "b"], dtype=object), np.array(["a", "c"], dtype=object), 0.5),
        (np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), 0.0),
        (np.array(3), np.array(4), 1.0),
    ],
)
def test_integers_booleans_and_strings_have_to_be_equal(actual: Any, expected: Any, share: float) -> None:
    found = one(actual, expected)
    assert found.relative_l2 == pytest.approx(share) and found.cosine == pytest.approx(1 - share) and found.problem == ""


@pytest.mark.parametrize("scale", [1e-300, 1e-40, 1.0, 1e38, 1e300])
def test_no_magnitude_makes_the_wrong_look_right(scale: float) -> None:
    right, wrong = np.array([1.0, 2.0]) * scale, np.array([2.0, -1.0]) * scale
    assert one(right, right).cosine == pytest.approx(1) and one(right, right).relative_l2 == 0
    assert one(wrong, right).cosine == pytest.approx(0, abs=1e-9) and one(wrong, right).relative_l2 == pytest.approx(2**0.5)


def test_complex_numbers_are_compared_in_both_parts() -> None:
    assert one([1 + 2j], [1 + 2j]).relative_l2 == 0
    assert one([1 - 2j], [1 + 2j]).relative_l2 == pytest.approx(4 / 5**0.5)
    assert one([1.0], [1 + 2j]).problem


FLOATS = st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=8)


@given(x=FLOATS, data=st.data())
def test_cosine_is_a_cosine_and_errors_are_not_negative(x: list[float], data: st.DataObject) -> None:
    r = data.draw(st.lists(st.floats(-1e30, 1e30), min_size=len(x), max_size=len(x)))
    found = one(x, r)
    assert -1 <= found.cosine <= 1 and found.relative_l2 >= 0 and found.max_abs >= 0 and found.problem == ""


def test_sqnr_is_the_relative_error_in_decibels() -> None:
    assert one([1.1, 0.0], [1.0, 0.0]).metrics()["sqnr"] == pytest.approx(20.0)
    assert one([0.5], [1.0]).metrics()["sqnr"] == pytest.approx(6.0206, abs=1e-4)


def test_agreement_is_the_share_of_rows_with_the_same_best_class() -> None:
    expected = np.array([[9, 1, 2, 3, 4, 5, 6.0], [1, 2, 3, 9, 4, 5, 6], [1, 2, 3, 4, 9, 5, 6], [9, 8, 7, 6, 5, 4, 3]])
    actual = np.array([[9, 1, 2, 3, 4, 5, 6.0], [1, 2, 3, 4, 9, 5, 6], [1, 2, 3, 4, 9, 5, 6], [1, 8, 7, 6, 5, 4, 3]])
    found = one(actual, expected).metrics()
    assert found["top1_agreement"] == 0.5
    assert found["top5_agreement"] == 0.75  # the last one's best class is now the last but none
    assert one(actual[:, :, None, None], expected[:, :, None, None]).metrics()["top1_agreement"] == 0.5


@pytest.mark.parametrize("shape", [(4,), (4, 2), (2, 3, 4), (0, 10), ()])
def test_what_is_no_classifiers_output_has_no_agreement(shape: tuple[int, ...]) -> None:
    assert "top1_agreement" not in one(np.ones(shape), np.ones(shape)).metrics()


def test_over_samples_agreements_are_averaged_and_of_all_else_the_worst_counts() -> None:
    found = combined(
        [
            {"cosine": 1.0, "sqnr": 50.0, "relative_l2": 0.1, "top1_agreement": 1.0},
            {"cosine": 0.9, "sqnr": 60.0, "relative_l2": 0.2, "top1_agreement": 0.0},
        ]
    )
    assert found == {"cosine": 0.9, "sqnr": 50.0, "relative_l2": 0.2, "top1_agreement": 0.5}


def test_float64_computed_as_float32_is_told_and_float64_rounding_is_not() -> None:
    r = np.random.default_rng(0).standard_normal(100)
    assert "is float64 and was computed in less" in narrowed({"y": r.astype(np.float32).astype(np.float64)}, {"y": r})
    assert narrowed({"y": r * (1 + 1e-13)}, {"y": r}) == ""
    assert narrowed({"y": r.astype(np.float32) * 1.001}, {"y": r.astype(np.float32)}) == ""  # float32 has its limit elsewhere


@pytest.mark.parametrize(("found", "expected"), [(0, 2**40), (2**31 - 1, 2**33), (-(2**31), 2**31), (-5, -(2**40))])
def test_one_integer_beyond_32_bits_that_came_out_as_another_is_told_among_ten_thousand(found: int, expected: int) -> None:
    r = np.zeros(10_000, dtype=np.int64)
    x = r.copy()
    r[77], x[77] = expected, found
    assert one(x, r).cosine > 0.999  # which no limit on the cosine would see
    assert "1 integers beyond 32 bits" in narrowed({"y": x}, {"y": r})
    assert narrowed({"y": r}, {"y": r}) == ""
    assert narrowed({"y": x}, {"y": np.minimum(r, 9)}) == "" or found >= 9 or expected < 0


def test_large_integers_that_stem_from_rounded_floats_may_differ_a_little() -> None:
    r = np.array([5_000_000_000], dtype=np.int64)
    assert narrowed({"y": r + 512}, {"y": r}) == ""


def test_what_cannot_be_compared_is_left_to_the_judge() -> None:
    assert narrowed({}, {"y": np.float64([1])}) == ""
    assert narrowed({"y": np.float64([1, 2])}, {"y": np.float64([1])}) == ""
    assert narrowed({"y": np.array(["a"], dtype=object)}, {"y": np.array(["a"], dtype=object)}) == ""
