"""What is said of a promise once the plan was proven."""

from __future__ import annotations

import pytest

from aivmm.planner.promise import Promise, unpromised

# The README's demo, as it was seen once: the host was slower while the plan was searched than while it was proven.
MOVED = Promise(
    reference="openvino:CPU fp32",
    expected_s=2.21e-3,
    proven_s=1.86e-3,
    ratio=0.545,
    sigma=0.03,
    proven_ratio=0.549,
    proven_sigma=0.01,
    reference_s=2.21e-3 / 0.545,
    reference_proven_s=1.86e-3 / 0.549,
)


def but(**changed: object) -> Promise:
    return Promise(**{name: getattr(MOVED, name) for name in MOVED.__dataclass_fields__} | changed)  # type: ignore[arg-type]


def test_a_promise_is_kept_by_its_ratio_and_not_by_its_seconds_where_the_machine_has_changed() -> None:
    assert MOVED.kept and MOVED.off == pytest.approx(0.0073, abs=1e-4)
    assert MOVED.moved == pytest.approx(-0.1645, abs=1e-3) and MOVED.by_reference_s == pytest.approx(1.846e-3, abs=1e-6)
    assert MOVED.sentence == (
        "0.545 of the time of openvino:CPU fp32 (0.514 to 0.578), proven 0.549 (0.538 to 0.56): kept. "
        "2.21 ms expected; openvino:CPU fp32 took 16 % less time in the proof: 1.85 ms by that, 1.86 ms proven."
    )


def test_seconds_that_fit_do_not_keep_a_promise_whose_ratio_is_broken() -> None:
    """The plan took what was said only since the machine had become faster: of the reference's time it takes more than was promised."""
    missed = but(proven_s=2.21e-3, proven_ratio=0.65, reference_proven_s=2.21e-3 / 0.65)
    assert missed.kept is False
    assert (
        "proven 0.65 (0.637 to 0.663): missed, 19 % more. 2.21 ms expected; openvino:CPU fp32 took 16 % less time in the proof"
        in missed.sentence
    )


def test_errors_of_both_races_count() -> None:
    assert but(proven_ratio=0.62, proven_sigma=0.01).kept is False
    assert but(proven_ratio=0.6, proven_sigma=0.01).kept is False
    assert but(proven_ratio=0.6, proven_sigma=0.03, sigma=0.04).kept is True


def test_a_proof_that_leaves_more_open_than_was_promised_keeps_nothing_and_may_still_miss() -> None:
    """Of two rounds Student's interval is so wide that what takes half as much again is within it."""
    wide = but(proven_ratio=0.82, proven_sigma=0.24)
    assert (
        wide.kept is None and wide.as_json()["kept"] is None and wide.short[0].startswith("too few or too unsteady rounds to tell: 0.545")
    )
    assert "proven 0.82 (0.512 to 1.31): too few or too unsteady rounds to tell. 2.21 ms expected" in wide.sentence
    assert but(proven_sigma=0.031).kept is None and but(proven_sigma=0.029).kept is True
    assert but(proven_ratio=5.0, proven_sigma=0.24).kept is False


def test_where_calls_answer_different_numbers_of_samples_or_overlap_the_ratio_says_that_it_is_of_samples() -> None:
    mixed = but(per_sample=True)
    assert mixed.sentence.startswith("0.545 of the time per sample of openvino:CPU fp32 (") and "2.21 ms a call expected" in mixed.sentence
    assert mixed.short[0] == "kept: 0.545 of the reference's time per sample, proven 0.549"


def test_a_reference_of_few_rounds_does_not_show_that_the_machine_has_changed() -> None:
    seen = MOVED.reference_proven_s
    assert seen is not None
    sure, unsure = (but(reference_proven_interval_s=(seen * (1 - off), seen * (1 + off))) for off in (0.02, 0.3))
    assert "took 16 % less time in the proof" in sure.sentence and "in the proof" not in unsure.sentence
    assert unsure.short[1] == "proven 1.86 ms" and unsure.as_json()["reference_proven_interval_s"] == pytest.approx(
        [seen * 0.7, seen * 1.3]
    )


def test_what_was_not_promised_has_the_same_keys() -> None:
    nothing = unpromised()
    assert nothing.keys() == MOVED.as_json().keys() and nothing.pop("sentence") == "" and set(nothing.values()) == {None}


def test_a_machine_that_has_not_changed_is_not_spoken_of() -> None:
    steady = but(reference_proven_s=MOVED.reference_s, proven_s=2.22e-3)
    assert steady.sentence.endswith(": kept. 2.21 ms expected, 2.22 ms proven.") and steady.short[1] == "proven 2.22 ms"
    assert "took 2.5 times as long in the proof" in but(reference_proven_s=2.5 * 2.21e-3 / 0.545).sentence


def test_what_cannot_be_judged_is_not_called_kept() -> None:
    itself = but(is_reference=True, ratio=1.0, proven_ratio=None)
    assert itself.kept is None and itself.short == ("proven 1.86 ms: 16 % less time", "the reference itself, so no ratio was promised")
    assert itself.sentence == (
        "2.21 ms expected, 1.86 ms proven: 16 % less time. The plan is what the others are timed against, so no ratio was promised."
    )
    assert "2.21 ms expected, 2.21 ms proven. The plan is" in but(is_reference=True, ratio=1.0, proven_s=2.211e-3).sentence
    absent = but(proven_ratio=None, reference_proven_s=None)
    assert absent.kept is None and absent.as_json()["by_reference_s"] is None
    assert "openvino:CPU fp32 was not proven beside it, so nothing tells an error from a change of the machine" in absent.sentence


def test_the_short_of_it_is_the_outcome_and_the_time_that_the_machine_left_of_the_promise() -> None:
    assert MOVED.short == ("kept: 0.545 of the reference's time, proven 0.549", "1.85 ms at its speed in the proof; proven 1.86 ms")
    assert but(proven_ratio=0.45).short[0].startswith("better than promised, 17 % less time: 0.545 of the reference's time, proven 0.45")
    assert but(proven_ratio=0.45).kept is False  # the promise was wrong all the same
    assert but(proven_ratio=0.65).short[0] == "missed, 19 % more: 0.545 of the reference's time, proven 0.65"
    assert but(proven_ratio=None).short == ("proven 1.86 ms", "no ratio to judge by")
