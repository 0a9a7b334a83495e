"""A search that had too little of the machine is told to be one, in words that fit what helps."""

from __future__ import annotations

from dataclasses import replace

from aivmm.probes.records import Caution, Measured, Outcome, ProbeKey, Samples
from aivmm.runtime.config import Config
from aivmm.tuner.disturbed import disturbed, of_search, told_of_proof
from aivmm.tuner.proof import Proof
from tests.tuner.test_verdict import entrant

BUSY = Caution(code="machine-busy", message="other processes kept 1.6 of 2 cores busy", advice="close them and tune again")
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


def test_what_is_told_is_the_middle_one_of_the_commonest_kind() -> None:
    cores = [replace(BUSY, message=f"other processes kept {each:.1f} of 16 cores busy") for each in (10.0, 9.5, 1.2)]
    cold = Caution(code="clock-fell", message="at the end a core did the same work 12% slower", advice="tune again")
    found = [raced(name, each) for name, each in zip("abcdef", (*cores, cold, cold), strict=False)]
    assert "(other processes kept 9.5 of 16 cores busy)" in disturbed(found, searched_before=False)


def test_half_of_the_races_are_not_most_of_them() -> None:
    half = [raced("a", BUSY), raced("b")]
    assert disturbed(half, searched_before=False) == ""
    assert disturbed([*half, raced("c", BUSY)], searched_before=False).startswith("2 of 3 races")
    assert disturbed(half[:1], searched_before=False).startswith("the only race of the search was disturbed")


def test_advice_names_fresh_only_where_what_was_searched_has_to_be_measured_anew() -> None:
    assert of_search(BUSY).advice == "close them and tune again with --fresh" and of_search(SPREAD) == SPREAD
    for disturbed_too, advice in ((False, "close them and tune again: what was searched is kept"), (True, of_search(BUSY).advice)):
        proof = Proof(entrants=[entrant("toy default", 0.01)], cautions=(BUSY,))
        said = told_of_proof(proof, search_disturbed=disturbed_too)
        assert said == [f"while the plan was proven, {BUSY.message}: {advice}"]
        assert [each.advice for each in proof.records()[0].cautions if each.code == "machine-busy"] == [advice]  # the report's
