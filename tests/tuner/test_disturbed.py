"""A search that had too little of the machine is told to be one, in words that fit what helps."""

from __future__ import annotations

from aivmm.probes.records import Caution, Measured, Outcome, ProbeKey, Samples
from aivmm.runtime.config import Config
from aivmm.tuner.disturbed import advice_on_proof, disturbed

BUSY = Caution(code="machine-busy", message="other processes kept 1.6 of 2 cores busy", advice="close them and tune again with --fresh")
SPREAD = Caution(code="spread", message="the middle half of the samples spans 20 % of the median", advice="raise --budget")


def raced(race: str, *cautions: Caution, kind: str = "model", threads: int = 1) -> tuple[Outcome, bool]:
    key = ProbeKey(kind=kind, subject="s", target="null:CPU", environment="e", config=Config(settings=(("threads", threads),)))  # type: ignore[arg-type]
    return Measured(key=key, samples=Samples(warmup_s=(), timed_s=(0.1,)), race=race, cautions=cautions), False


def test_a_search_most_of_whose_races_were_disturbed_says_so_and_by_what() -> None:
    found = [raced("a", BUSY), raced("a", BUSY, threads=2), raced("b", SPREAD, BUSY), raced("c")]
    assert disturbed(found, searched_before=False) == (
        "2 of 3 races of the search were disturbed (other processes kept 1.6 of 2 cores busy), so another plan may be better: "
        "once that has ended, tune again with --fresh"
    )
    again = disturbed(found, searched_before=True)
    assert again.startswith("what an earlier run measured is used again, and 2 of 3 races") and again.endswith(
        "--fresh measures all of it again"
    )


def test_what_does_not_pass_or_is_seldom_or_is_no_whole_model_is_not_told() -> None:
    assert disturbed([raced("a", SPREAD), raced("b", SPREAD)], searched_before=True) == ""
    assert disturbed([raced("a", BUSY), raced("b"), raced("c")], searched_before=True) == ""
    assert disturbed([raced("a", BUSY, kind="segment"), raced("b")], searched_before=True) == ""
    assert disturbed([], searched_before=True) == ""


def test_a_proof_alone_that_was_disturbed_needs_no_search_anew() -> None:
    assert advice_on_proof(BUSY, search_disturbed=False) == "close them and tune again: what was searched is kept"
    assert advice_on_proof(BUSY, search_disturbed=True) == BUSY.advice
    assert advice_on_proof(SPREAD, search_disturbed=False) == SPREAD.advice
