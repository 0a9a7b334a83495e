"""Evidence: what was measured stays as it is, what is put together says so, and how sure it is."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aivmm.planner.certificate import certify
from aivmm.planner.chain import ChainPlan
from aivmm.planner.evidence import Estimate, measured, shares, total
from aivmm.planner.lazy import Look
from aivmm.planner.scaling import Point, batch_points, left_out, scaled
from aivmm.planner.segments import Segments
from aivmm.probes.records import Samples

MS = 1e-3
times = st.floats(1e-6, 1e3)


def known(seconds: float, sigma: float = 0.0) -> Estimate:
    return Estimate(seconds=seconds, sigma=sigma, source="measured")


def test_a_measurement_is_its_median_and_more_samples_make_it_surer() -> None:
    few = measured(Samples(timed_s=(1.0, 1.1, 0.9, 5.0, 1.05)))
    many = measured(Samples(timed_s=(1.0, 1.1, 0.9, 5.0, 1.05) * 20))
    assert few.seconds == many.seconds == 1.05 and few.source == "measured"
    assert 0 < many.sigma < few.sigma < 0.2  # the one disturbed run does not count
    low, high = few.interval_s
    assert low < 1.05 < high and low * high == pytest.approx(1.05**2)


def test_a_batch_lies_between_others_whatever_is_read_once_for_all_samples() -> None:
    points = batch_points({1: 6.0, 2: 7.0, 8: 13.0, 16: 30.0})  # 5 ms once, 1 ms a sample; beyond 8 the caches are too small
    (_, two), (_, eight) = left_out(points)
    assert two.seconds == pytest.approx(7.0) and two.source == "interpolated"
    assert 13.0 < eight.seconds < 30.0
    found = scaled(points, 4.0)
    assert found is not None and found.seconds == pytest.approx(9.0)


def test_only_what_was_not_measured_may_be_hoped_to_be_less() -> None:
    assert known(2.0, 0.1).optimistic_s(3) == 2.0
    assert Estimate(seconds=2.0, sigma=0.1, source="modelled").optimistic_s(2) == pytest.approx(2 * math.exp(-0.2))


@pytest.mark.parametrize(("seconds", "sigma"), [(0.0, 0.1), (math.inf, 0.1), (math.nan, 0.1), (1.0, -0.1), (1.0, math.nan)])
def test_an_estimate_is_a_positive_time(seconds: float, sigma: float) -> None:
    with pytest.raises(ValueError):
        Estimate(seconds=seconds, sigma=sigma, source="measured")


def test_a_sum_rests_on_its_least_sure_part_and_errors_cancel() -> None:
    parts = [known(1.0, 0.1), Estimate(seconds=1.0, sigma=0.1, source="modelled")]
    whole = total(parts)
    assert whole.seconds == 2.0 and whole.source == "modelled"
    assert whole.sigma == pytest.approx(0.1 / math.sqrt(2))
    assert shares(parts) == {"measured": 0.5, "modelled": 0.5}


@given(fixed=st.floats(0, 1), rate=st.floats(0.1, 10), sizes=st.sets(st.integers(1, 64), min_size=3, max_size=6))
def test_what_takes_a_fixed_time_and_one_in_proportion_is_interpolated_exactly(fixed: float, rate: float, sizes: set[int]) -> None:
    points = [Point(floor_s=size * 1.0, seconds=fixed + rate * size) for size in sizes]
    for point, found in left_out(points):
        assert found.seconds == pytest.approx(point.seconds) and found.source == "interpolated" and found.sigma > 0


@given(st.lists(times, min_size=1, max_size=5, unique=True), times)
def test_measured_sizes_are_untouched_and_beyond_them_utilisation_is_held(floors: list[float], wanted: float) -> None:
    points = [Point(floor_s=floor, seconds=3 * floor, sigma=0.01) for floor in floors]
    found = scaled(points, wanted)
    assert found is not None and found.seconds == pytest.approx(3 * wanted)
    if any(math.isclose(floor, wanted, rel_tol=1e-9) for floor in floors):  # rounding makes no other size
        assert found.source == "measured" and found.sigma == 0.01
    elif wanted > max(floors) or wanted < min(floors):
        edge = max(floors) if wanted > max(floors) else min(floors)
        assert found.source == "interpolated" and found.sigma >= 0.2 * abs(math.log(wanted / edge))


sizes = st.dictionaries(st.integers(1, 512).map(float), st.floats(1e-6, 1e3), min_size=2, max_size=6)


@given(sizes, st.floats(0.5, 1024), st.floats(0.5, 1024))
def test_more_samples_never_take_less_where_that_is_so_of_what_was_measured(known: dict[float, float], one: float, other: float) -> None:
    points = [Point(floor_s=size, seconds=seconds) for size, seconds in zip(sorted(known), sorted(known.values()), strict=True)]
    few, many = (scaled(points, size) for size in sorted((one, other)))
    assert few is not None and many is not None and few.seconds <= many.seconds * (1 + 1e-9)


@given(sizes, st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_what_lies_between_is_between_and_surest_beside_what_was_measured(known: dict[float, float], one: float, other: float) -> None:
    """By ratios: the middle of 1 and 4 is 2."""
    points = [Point(floor_s=size, seconds=seconds, sigma=0.01) for size, seconds in known.items()]
    low, high, *_ = sorted(points, key=lambda each: each.floor_s)
    nearer, farther = sorted((one, other), key=lambda share: abs(share - 0.5), reverse=True)
    sure, less = (scaled(points, low.floor_s * (high.floor_s / low.floor_s) ** share) for share in (nearer, farther))
    assert sure is not None and less is not None
    assert 0.01 <= sure.sigma <= less.sigma + 1e-9
    for found in (sure, less):
        assert min(low.seconds, high.seconds) * (1 - 1e-9) <= found.seconds <= max(low.seconds, high.seconds) * (1 + 1e-9)


@given(st.floats(1, 512), times, st.floats(1.01, 8), st.floats(1.01, 8))
def test_the_farther_beyond_what_was_measured_the_less_sure(size: float, seconds: float, one: float, other: float) -> None:
    points = [Point(floor_s=size / 4, seconds=seconds / 3), Point(floor_s=size, seconds=seconds)]
    near, far = (scaled(points, size * factor) for factor in sorted((one, other)))
    assert near is not None and far is not None and 0 < near.sigma <= far.sigma
    assert far.seconds == pytest.approx(seconds * max(one, other))


@given(sizes)
def test_batches_that_were_measured_come_back_untouched(known: dict[float, float]) -> None:
    points = batch_points({int(size): seconds for size, seconds in known.items()})
    for size, seconds in known.items():
        found = scaled(points, size)
        assert found is not None and found.seconds == seconds and found.source == "measured"


def test_without_a_measured_size_there_is_no_number() -> None:
    assert scaled([], 1.0) is None
    with pytest.raises(ValueError):
        scaled([Point(floor_s=0.0, seconds=1.0)], 1.0)


def test_a_measured_segment_is_untouched_and_teaches_its_neighbours() -> None:
    belief = Segments([known(MS)] * 6)
    before = [belief.segment(0, 3), belief.segment(1, 4), belief.segment(4, 5)]
    belief.observe(0, 3, known(3.65 * MS))
    after = [belief.segment(0, 3), belief.segment(1, 4), belief.segment(4, 5)]
    assert after[0] == known(3.65 * MS)
    for old, new in zip(before[1:], after[1:], strict=True):
        assert old and new and new.source == "modelled"
        assert new.seconds < old.seconds and new.sigma < old.sigma
    assert before[1] and after[1] and before[2] and after[2]
    assert before[1].seconds - after[1].seconds > before[2].seconds - after[2].seconds  # what overlaps learns more


def test_the_table_says_what_single_questions_say() -> None:
    belief = Segments([known(MS, 0.02), known(2 * MS, 0.01), None, known(MS), known(3 * MS, 0.1)])
    belief.observe(3, 4, known(3.5 * MS, 0.01))
    mean, sigma = belief.table()
    for first in range(5):
        for last in range(5):
            one = belief.segment(first, last) if first <= last else None
            assert math.isinf(mean[first, last]) if one is None else mean[first, last] == pytest.approx(one.seconds)
            if one is not None and one.source != "measured":
                assert sigma[first, last] == pytest.approx(one.sigma)
    assert sigma[3, 4] == 0


def test_a_segment_that_ran_though_a_block_of_it_did_not_alone_is_known() -> None:
    belief = Segments([known(MS), None, known(MS)])
    assert belief.segment(0, 2) is None
    belief.observe(0, 2, known(4 * MS))
    assert belief.segment(0, 2) == known(4 * MS) and belief.table()[0][0, 2] == 4 * MS


def test_modelled_blocks_stay_modelled_and_unsure() -> None:
    guess = Estimate(seconds=MS, sigma=0.4, source="modelled", because="operators")
    belief = Segments([guess, known(MS)])
    assert belief.segment(0, 0) == guess
    pair = belief.segment(0, 1)
    assert pair and pair.source == "modelled" and pair.sigma > 0.15


def looked(cost_s: float, bound_s: float, *, proven: bool = True) -> Look:
    plan = ChainPlan(assignment=("a",), segments=((0, 0, "a"),), cost_s=cost_s, bound_s=cost_s, seconds=0.0)
    return Look(plan=plan, bound_s=bound_s, proven=proven, probes=7, possible=42, solves=4, seconds=0.01)


def test_a_certificate_says_in_words_what_it_holds_in_numbers() -> None:
    parts = [known(3 * MS, 0.01), Estimate(seconds=MS, sigma=0.1, source="modelled")]
    whole = Estimate(seconds=4.1 * MS, sigma=0.03, source="modelled")
    found = certify(whole, parts, objective="latency", looked=looked(4.1 * MS, 4 * MS), among="placements of 6 blocks")
    assert (found.low_s, found.high_s) == whole.interval_s
    assert found.objective_s == pytest.approx(4.1 * MS) and found.gap == pytest.approx(1 - 4 / 4.1)
    assert found.rests_on == {"measured": pytest.approx(0.75), "modelled": pytest.approx(0.25)}
    for said in ("4.1 ms", "75 % measured", "25 % modelled", "4 ms", "2.4 %", "7 of 42", "placements of 6 blocks"):
        assert said in found.sentence
    assert "ended before" not in found.sentence
    assert found.as_json()["sentence"] == found.sentence and sum(found.as_json()["rests_on"].values()) == pytest.approx(1)


def test_what_any_call_costs_is_in_the_objective_and_in_the_bound() -> None:
    found = certify(known(MS), [known(MS)], objective="latency", call_s=0.5 * MS, looked=looked(MS, 0.9 * MS), among="placements")
    assert found.objective_s == pytest.approx(1.5 * MS) and found.bound_s == pytest.approx(1.4 * MS)


def test_a_certificate_without_a_bound_says_why() -> None:
    found = certify(known(MS), [known(MS)], objective="latency", looked=None, among="", why_no_bound="the model has one block")
    assert found.bound_s is None and found.gap is None
    assert "the model has one block" in found.sentence


def test_a_plan_below_the_bound_of_the_search_is_not_called_the_best() -> None:
    found = certify(known(MS), [known(MS)], objective="latency", call_s=0.1 * MS, looked=looked(1.2 * MS, 1.1 * MS), among="placements")
    assert found.bound_s is None and found.gap is None and not found.proven
    assert "Nothing bounds what another plan could take: it takes less than the search" in found.sentence
    equal = certify(known(MS), [known(MS)], objective="latency", looked=looked(MS, MS * (1 + 1e-15)), among="placements")
    assert equal.gap == 0 and equal.bound_s == MS


def test_a_search_that_ended_early_is_said_to_have() -> None:
    found = certify(known(MS), [known(MS)], objective="latency", looked=looked(MS, 0.9 * MS, proven=False), among="placements")
    assert "ended before" in found.sentence and "10 %" in found.sentence
