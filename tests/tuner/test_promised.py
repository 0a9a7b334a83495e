"""What was promised of a plan beside what its proof found, where both are made up."""

from __future__ import annotations

from dataclasses import replace

import pytest

from aivmm.planner.evidence import Estimate
from aivmm.tuner.promised import nothing_promised, promised, proven_ratio
from aivmm.tuner.proof import Entrant, Proof
from tests.tuner.test_verdict import entrant

FOUND = Estimate(seconds=5e-3, sigma=0.01, source="measured")  # from the end of one call to that of the next


def made(name: str, seconds: float, *, callers: int = 1, batch: int = 1, role: str = "baseline") -> Entrant:
    """Return what took so long from one answer to the next."""
    found = entrant(name, seconds, callers=callers, role=role)
    assert found.contestant is not None
    found.draft, found.contestant.batch = replace(found.draft, batch=batch), batch
    return found


@pytest.mark.parametrize(
    ("theirs", "ours", "ratio", "words"),
    [
        ((1, 1), (1, 1), 0.5, "0.5 of the time of toy default ("),
        ((1, 1), (4, 1), 0.5, "0.5 of the time per sample of toy default ("),  # twice as many answers a second, each after 20 ms
        ((4, 1), (1, 1), 0.5, "0.5 of the time per sample of toy default ("),
        ((4, 1), (4, 1), 0.5, "0.5 of the time of toy default ("),
        ((1, 1), (1, 2), 0.25, "0.25 of the time per sample of toy default ("),
        ((1, 8), (2, 2), 2.0, "2 of the time per sample of toy default ("),
    ],
)
def test_a_promise_is_of_answered_samples_whatever_callers_and_batches_they_take(
    theirs: tuple[int, int], ours: tuple[int, int], ratio: float, words: str
) -> None:
    """The plan takes 5 ms from one answer to the next and the reference 10, in the search and in the proof."""
    reference = made("toy default", 10e-3, callers=theirs[0], batch=theirs[1])
    plan = made("candidate 1", 5e-3, callers=ours[0], batch=ours[1], role="candidate")
    proof = Proof(entrants=[reference, plan], plan=plan)
    told = promised(proof, FOUND, reference="toy default", reference_s=10e-3, engine_s=(0.0, 0.0))
    assert told["ratio_to_reference"] == pytest.approx(ratio) and told["proven_ratio"] == pytest.approx(ratio, rel=0.02)
    assert told["kept"] is True and told["sentence"].startswith(words)
    # Milliseconds are of one call, and so is what corrects them.
    assert told["median_s"] == pytest.approx(5e-3 * ours[0])
    assert told["reference_s"] == pytest.approx(10e-3 * theirs[0])
    assert told["reference_proven_s"] == pytest.approx(10e-3 * theirs[0], rel=0.01)
    assert told["by_reference_s"] == pytest.approx(5e-3 * ours[0], rel=0.01)
    assert proven_ratio(plan, reference)["proven_ratio"] == told["proven_ratio"]  # the report's table


def test_what_calling_the_engine_adds_is_in_the_ratio_as_in_the_seconds() -> None:
    plan, reference = made("candidate 1", 5e-3, callers=2, role="candidate"), made("toy default", 10e-3)
    told = promised(Proof(entrants=[reference, plan], plan=plan), FOUND, reference="toy default", reference_s=10e-3, engine_s=(2e-3, 2e-3))
    assert told["median_s"] == pytest.approx(12e-3) and told["reference_s"] == pytest.approx(12e-3)
    assert told["ratio_to_reference"] == pytest.approx(0.5)  # an answer each 6 ms


def test_what_was_never_searched_has_the_keys_of_what_was() -> None:
    plan, reference = made("candidate 1", 5e-3, role="candidate"), made("toy default", 10e-3)
    told = promised(Proof(entrants=[reference, plan], plan=plan), FOUND, reference="toy default", reference_s=10e-3, engine_s=(0.0, 0.0))
    nothing = nothing_promised("toy default")
    assert nothing.keys() == told.keys() and nothing["reference"] == "toy default" and nothing["sentence"] == "" and nothing["kept"] is None
