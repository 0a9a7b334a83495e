"""The roofline of a target from its measured ceilings, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from aivmm.probes.ceilings import CALL, Ceilings, bound_of, copy_ceilings, grows, matmul_ceiling, rates
from aivmm.probes.records import Measured, Outcome, ProbeKey, Refused, Samples
from aivmm.runtime.config import Config


def key(subject: str) -> ProbeKey:
    return ProbeKey(kind="operator", subject=subject, target="openvino:CPU", environment="e", config=Config(precision="fp32"))


def took(subject: str, *seconds: float) -> Measured:
    return Measured(key=key(subject), samples=Samples(timed_s=seconds))


# A call takes 10 µs; 1 MB is copied at 100 GB/s and 16 MB at 10 GB/s; matrices are multiplied at 100 GFLOP/s.
CEILINGS = Ceilings(flops_per_s=1e11, copies=((1 << 20, (1 << 20) / 1e11), (1 << 24, (1 << 24) / 1e10)), call_s=1e-5)


def test_ceilings_are_the_fastest_runs_less_a_call() -> None:
    outcomes: list[Outcome] = [
        took(CALL, 3e-5, 1e-5),
        took("ceiling:copy:1048576", 9.0, 1e-5 + 1e-4),
        took("ceiling:matmul:256", 1e-5 + 1e-3),
        took("ceiling:matmul:512", 1e-5 + 4e-3),  # 8 times the operations in 4 times the time
        Refused(key=key("ceiling:matmul:1024"), reason="no"),
        took("something else", 1.0),
    ]
    found = Ceilings.of(outcomes)
    assert found is not None
    assert found.call_s == 1e-5
    assert found.copies == ((1048576, pytest.approx(1e-4)),)
    assert found.flops_per_s == pytest.approx(2 * 512**3 / 4e-3)
    assert found.bytes_per_s == pytest.approx(1048576 / 1e-4)


def test_without_a_call_or_a_copy_there_are_no_ceilings() -> None:
    assert Ceilings.of([took(CALL, 1e-5), took("ceiling:matmul:256", 1e-3)]) is None
    assert Ceilings.of([took("ceiling:copy:1024", 1e-5)]) is None


def test_a_copy_that_takes_no_longer_than_a_call_keeps_half_of_its_time() -> None:
    found = Ceilings.of([took(CALL, 1e-5), took("ceiling:copy:16384", 1.1e-5)])
    assert found is not None
    assert found.copies == ((16384, pytest.approx(0.55e-5)),)


@pytest.mark.parametrize(
    ("flops", "moved", "bound", "least_s"),
    [
        (1e8, 1 << 20, "compute", 1e-5 + 1e-3),  # 1 ms of operations, 10 µs of bytes
        (1e6, 1 << 24, "memory", 1e-5 + (1 << 24) / 1e10),
        (100.0, 400, "overhead", 1e-5 + 400 / 1e11),
        (0.0, 0, "overhead", 1e-5),
    ],
)
def test_the_largest_floor_names_the_bound_and_the_least_time_gives_the_share(flops: float, moved: int, bound: str, least_s: float) -> None:
    roofline = CEILINGS.roofline(seconds=2 * least_s, flops=flops, moved_bytes=moved)
    assert roofline is not None
    assert roofline.bound == bound
    assert roofline.share == pytest.approx(0.5)
    assert bound_of(roofline.metrics()) == bound


def test_bandwidth_is_interpolated_over_the_logarithm_of_the_size_and_held_beyond() -> None:
    assert CEILINGS.memory_s(1 << 22) == pytest.approx((1 << 22) / 5.5e10)  # half of the way from 2^20 to 2^24
    assert CEILINGS.memory_s(1000) == pytest.approx(1000 / 1e11)
    assert CEILINGS.memory_s(1 << 30) == pytest.approx((1 << 30) / 1e10)
    assert CEILINGS.memory_s(1 << 20) == pytest.approx((1 << 20) / 1e11)  # a measured point is returned as it is


def test_unknown_work_has_no_roofline_and_no_invented_rates() -> None:
    assert CEILINGS.roofline(seconds=1.0, flops=None, moved_bytes=4) is None
    assert CEILINGS.roofline(seconds=1.0, flops=1.0, moved_bytes=None) is None
    assert Ceilings(flops_per_s=None, copies=CEILINGS.copies, call_s=1e-5).roofline(seconds=1.0, flops=1.0, moved_bytes=4) is None
    assert rates(2.0, None, 4) == {"bytes_per_s": 2.0}
    assert rates(2.0, 0.0, 4) == {"bytes_per_s": 2.0}
    assert bound_of({"flops_per_s": 1.0, "compute_floor_s": 1.0}) is None


def test_a_target_that_cannot_multiply_still_has_ceilings_for_moving() -> None:
    roofline = Ceilings(flops_per_s=None, copies=CEILINGS.copies, call_s=1e-5).roofline(seconds=1.0, flops=0.0, moved_bytes=1 << 24)
    assert roofline is not None
    assert roofline.bound == "memory"


def test_matrices_grow_while_it_pays() -> None:
    fast = took("m", 1e-5)
    assert grows([]) == 256
    assert grows([(256, fast)]) == 512
    assert grows([(256, fast), (512, took("m", 4e-5))]) == 1024  # twice the rate
    assert grows([(256, fast), (512, took("m", 8e-5))]) is None  # the same rate
    assert grows([(256, took("m", 0.02))]) is None  # the next would take too long
    assert grows([(256, Refused(key=key("m"), reason="no"))]) is None
    assert grows([(8192, fast)]) is None


def test_ceilings_have_subjects_of_their_own_and_count_their_work() -> None:
    subjects = [each.subject for each in copy_ceilings()]
    assert len(set(subjects)) == len(subjects)
    assert [each.bytes for each in copy_ceilings()] == sorted(int(each.rpartition(":")[2]) for each in subjects)
    assert math.isclose(matmul_ceiling(256).flops, 2 * 256**3)
