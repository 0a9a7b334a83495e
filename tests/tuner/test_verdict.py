"""What a proof is told as, where its numbers are made up."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from aivmm.planner.candidates import Copy, Draft, Piece
from aivmm.planner.constraints import Violation, parse
from aivmm.planner.objectives import parse_objectives
from aivmm.probes.client import Worker
from aivmm.probes.compare import Comparison, Word
from aivmm.probes.race import Contestant, RaceState, race, undecided
from aivmm.runtime.config import Config
from aivmm.runtime.target import Device
from aivmm.tuner.proof import Entrant, Proof, call_s, interval_s, sample_s, targets_of
from aivmm.tuner.prove import Prover, loads_at_once
from aivmm.tuner.verdict import describe, factor_text, sentence
from tests.planner.test_search import target
from tests.probes.test_compare import Known

ROUNDS = 40


def entrant(name: str, seconds: float, *, role: str = "baseline", problem: str = "", callers: int = 1, on: str = "CPU") -> Entrant:
    """Return what took so long in each round of a race, give or take a percent."""
    taken = [seconds * (1 + 0.01 * (number % 3 - 1)) for number in range(ROUNDS)]
    contestant = Contestant(name, Worker(name), callers=callers, durations=taken, rounds=list(range(ROUNDS)))
    draft = Draft(name=name, pieces=(Piece(target=target(on), config=Config(precision="fp32"), first=0, last=3),), callers=callers)
    made = Entrant(draft=draft, role=role, bundle=Path(), size_bytes=1, sample=Path(), reference=Path(), problem=problem)
    made.contestant, made.confirmed = contestant, contestant.samples()
    made.metrics = {"throughput_per_s": 1 / seconds, "latency_s": seconds * callers}
    return made


def told(proof: Proof, objective: str = "throughput") -> str:
    return sentence(proof, objectives=parse_objectives(objective), accuracy_text="Right.")


def test_a_faster_baseline_that_may_not_be_the_plan_is_told_with_the_reason() -> None:
    plan = entrant("candidate 1", 10e-3, role="candidate")
    barred = "it computes in bf16, which is not among --precisions"
    proof = Proof(entrants=[entrant("toy default", 15e-3), entrant("toy THROUGHPUT hint", 7.1e-3, problem=barred), plan], plan=plan)
    assert f"1.5x faster than toy default. toy THROUGHPUT hint takes 0.71 of its time, and may not be the plan: {barred}." in told(proof)
    assert "may not be the plan" not in told(Proof(entrants=[proof.entrants[0], entrant("slow", 20e-3, problem=barred), plan], plan=plan))


def test_a_faster_baseline_that_breaks_a_limit_is_told_with_the_reason_and_not_as_a_rival() -> None:
    plan = entrant("candidate 1", 10e-3, role="candidate")
    proof = Proof(entrants=[entrant("toy default", 5e-3), entrant("toy slow", 15e-3), plan], plan=plan)
    (limit,) = parse("memory<1GB")
    broken = Violation(constraint=limit, value=2e9, percent=100.0, sentence="memory is 2 GB, 100 % above the limit of 1 GB")
    proof.violations = {"toy default": (broken,)}
    assert f"toy default takes 0.50 of its time, and may not be the plan: {broken.sentence}." in told(proof)
    assert "slower than" not in told(proof) and "faster than toy slow" in told(proof)


@pytest.mark.parametrize(("objective", "callers", "per_s"), [("throughput", 1, 400), ("throughput", 2, 400), ("latency", 1, 500)])
def test_a_proof_tells_of_throughput_what_one_and_several_callers_answered_stalls_included(
    objective: str, callers: int, per_s: float
) -> None:
    """Every fourth round answers a fifth of what the others do."""
    made = entrant("candidate 1", 2e-3, role="candidate", callers=callers)
    assert made.contestant
    made.contestant.rate = objective == "throughput"
    made.contestant.durations = [2e-3 if number % 4 else 10e-3 for number in range(ROUNDS)]
    made.confirmed = made.contestant.samples()
    prover = Prover(
        [made], constraints=(), cosine_limit=None, seed=0, tell=lambda what, state: None, objectives=parse_objectives(objective)
    )
    prover._measure(made, made.confirmed)
    assert made.metrics["throughput_per_s"] == pytest.approx(per_s)
    assert call_s(made) == pytest.approx(callers / per_s) == made.metrics["latency_s"]
    low, high = interval_s(made)
    assert low <= call_s(made) <= high and sample_s(made) == pytest.approx(1 / per_s)


def test_the_tail_of_several_callers_is_unknown_for_another_reason_than_time() -> None:
    plan = entrant("candidate 1", 10e-3, role="candidate", callers=4)
    prover = Prover([plan], constraints=parse("p99<1s"), cosine_limit=None, seed=0, tell=lambda what, state: None)
    prover._decide()
    (violation,) = prover._proof.violations["candidate 1"]
    assert "no time" not in violation.sentence
    assert "p99 is not known (with 4 callers the time between answers is measured, not that of a call)" in violation.sentence


def test_what_is_traded_says_which_of_its_times_and_sizes_is_what() -> None:
    plan, other = entrant("candidate 1", 10e-3, role="candidate"), entrant("toy default", 12e-3)
    for each, compile_s, memory in ((plan, 0.9, 2e8), (other, 0.2, 1e8)):
        each.metrics |= {"compile_s": compile_s, "peak_memory_bytes": memory}
    proof = Proof(entrants=[other, plan], plan=plan, alternatives=[other])
    said = told(proof, "latency,compile,memory")
    assert "The plan (10 ms, 900 ms to compile, 200 MB of memory) keeps 1 alternative: toy:CPU" in said
    assert "(12 ms, 200 ms to compile, 100 MB of memory)" in said


@pytest.mark.parametrize(
    ("prefer", "said"),
    [
        (("*:CPU", "*:GPU"), "It is the best on the hardware that is preferred (*:CPU, *:GPU)."),
        (("*:NPU", "*:CPU"), "It is the best on *:CPU, which is wanted next: nothing was proven on *:NPU."),
        (("*:GPU", "*:CPU"), "It is the best on *:CPU, which is wanted next: nothing that was proven on *:GPU may be the plan."),
        (("*:NPU", "*:GPU"), "It is the best of all others: nothing that was proven on *:NPU or *:GPU may be the plan."),
    ],
)
def test_preferred_hardware_is_told_as_it_came_out(prefer: tuple[str, ...], said: str) -> None:
    plan = entrant("candidate 1", 10e-3, role="candidate")
    proof = Proof(entrants=[entrant("toy default", 12e-3), entrant("on a card", 5e-3, problem="it is wrong", on="GPU"), plan], plan=plan)
    assert said in sentence(proof, accuracy_text="Right.", prefer=prefer)


def test_of_finalists_the_fastest_goes_on_that_keeps_the_limits_and_else_the_nearest() -> None:
    fast, frugal, least = (
        entrant(f"candidate {number}", seconds, role="candidate") for number, seconds in ((1, 8e-3), (2, 10e-3), (3, 12e-3))
    )
    for each, joules in ((fast, 3e-3), (frugal, 2e-3), (least, 1.5e-3)):
        each.metrics["energy_j"] = joules
    finalists = [fast, frugal, least]

    def goes_on(limit: str) -> Contestant | None:
        return Prover(finalists, constraints=parse(limit), cosine_limit=None, seed=0, tell=lambda what, state: None)._leader(finalists)

    assert goes_on("latency<1s") is fast.contestant
    assert goes_on("energy<=2mJ") is frugal.contestant
    assert goes_on("energy<1mJ") is least.contestant
    assert goes_on("latency<1ms") is fast.contestant


@pytest.mark.parametrize(
    ("objectives", "limits", "kept"),
    [
        ("latency", "latency<1s, cosine>=0.99", False),
        ("throughput", "", False),
        ("energy", "", True),  # what draws the least may be far behind in time
        ("latency", "memory<1GB", True),  # and so may be all that keeps a limit
    ],
)
def test_the_slow_stay_in_the_race_where_it_does_not_decide(objectives: str, limits: str, kept: bool) -> None:
    wanted = {"constraints": parse(limits) if limits else (), "objectives": parse_objectives(objectives)}
    prover = Prover([], cosine_limit=None, seed=0, tell=lambda what, state: None, **wanted)
    assert prover._may_win_slow is kept


def test_percent_and_times_say_the_same_of_one_ratio() -> None:
    near, far = (Comparison(ratio=ratio, low=ratio, high=ratio, pairs=9, verdict="faster") for ratio in (0.8, 0.5))
    assert factor_text(near) == "25 % faster than"  # the report's 1.25x, and not the 20 % of time that is saved
    assert factor_text(far) == "2.0x faster than"


@pytest.mark.parametrize(
    ("verdict", "low", "high", "said"),
    [
        ("same", 0.995, 1.008, "the same within noise (±1 %) as"),
        ("ambiguous", 0.97, 1.05, "undecided (±5 %) against"),  # the report's word for it
        ("ambiguous", 0.94, 0.999, "within 6 % of"),
        ("ambiguous", 0.5, 1.9, "too unsteady here to be compared with"),
    ],
)
def test_what_was_not_decided_is_not_said_to_be_the_same(verdict: Word, low: float, high: float, said: str) -> None:
    assert factor_text(Comparison(ratio=1.0, low=low, high=high, pairs=9, verdict=verdict)) == said


def test_where_a_call_counts_one_of_several_callers_is_no_rival_whatever_it_answers_in_a_second() -> None:
    plan = entrant("toy default", 10e-3)
    busy = entrant("toy THROUGHPUT hint", 2e-3, callers=8)  # five times as many answers, each after 16 ms
    proof = Proof(entrants=[plan, entrant("toy slow", 15e-3), busy], plan=plan)
    assert "slower than" not in told(proof, "latency,throughput") and "faster than toy slow" in told(proof, "latency,throughput")
    assert "slower than toy THROUGHPUT hint" in told(proof, "throughput")


@pytest.mark.parametrize(("share", "chosen"), [(1.0, "toy default"), (0.98, "toy default"), (0.9, "toy AUTO")])
def test_a_device_that_is_resolved_at_load_is_chosen_only_where_it_is_faster_than_processes_differ(share: float, chosen: str) -> None:
    entrants = [entrant("toy default", 10e-3), entrant("toy AUTO", share * 10e-3, on="AUTO")]
    plan = Prover(entrants, constraints=(), cosine_limit=None, seed=0, tell=lambda what, state: None)._pick()
    assert plan is not None and plan.draft.name == chosen


def test_what_is_neither_latency_nor_throughput_is_named_before_its_figure() -> None:
    plan, other = entrant("candidate 1", 10e-3, role="candidate"), entrant("toy default", 12e-3)
    for each, memory, cosine in ((plan, 1e8, 0.99999), (other, 2e8, 0.9999)):
        each.metrics |= {"peak_memory_bytes": memory, "cosine": cosine}
    proof = Proof(entrants=[other, plan], plan=plan)
    assert "peak memory 100 MB, 10 ms a call, 20 % faster than toy default. The peak memory of toy default is 200 MB." in told(
        proof, "memory"
    )
    assert ": cosine to the reference 0.99999, 10 ms a call," in told(proof, "accuracy")


@pytest.mark.parametrize(("count", "said"), [(2, "a=0, b=1"), (3, "a=0, b=1, + 1 setting"), (5, "a=0, b=1, + 3 settings")])
def test_a_headline_names_two_settings_and_counts_the_others(count: int, said: str) -> None:
    plan = entrant("candidate 1", 10e-3, role="candidate")
    config = Config.of({name: number for number, name in enumerate("abcde"[:count])}, precision="bf16")
    plan.draft = replace(plan.draft, pieces=(replace(plan.draft.pieces[0], config=config),))
    assert told(Proof(entrants=[entrant("toy default", 15e-3), plan], plan=plan)).startswith(f"toy:CPU, {said}, bf16: 100 samples/s, 1.5x ")
    assert "+" not in describe(plan.draft)


def test_copies_with_the_same_settings_name_them_once() -> None:
    config, other = Config.of({"a": 0}, precision="bf16"), Config.of({"a": 1}, precision="bf16")
    piece = Piece(target=target("CPU"), config=config, first=0, last=3, replicas=2, share=0.6)

    def beside(config: Config, replicas: int = 2) -> str:
        copy = Copy(target=target("GPU"), config=config, replicas=replicas, share=0.4)
        return describe(Draft(name="replicated plan", pieces=(replace(piece, copies=(copy,)),), batch=8, callers=4))

    assert beside(config) == (
        "toy:CPU (60% of the requests) beside toy:GPU (40% of the requests), each with a=0, bf16, 2 replicas, batch 8, 4 callers"
    )
    apart = "toy:CPU, a=0, bf16, 2 replicas, 60% of the requests beside toy:GPU, a=1, bf16, 2 replicas, 40% of the requests"
    assert beside(other) == f"{apart}, batch 8, 4 callers"
    assert "each with" not in beside(config, replicas=1)


@pytest.mark.parametrize(
    ("objective", "constraints", "prefer", "rests"),
    [
        ("latency", "latency<1s", (), True),
        ("throughput", "cosine>=0.9", (), True),
        ("latency", "p99<1s", (), False),  # a slow one may be all that keeps it
        ("latency,throughput", "latency<1s", (), False),
        ("memory", "latency<1s", (), False),
        ("latency", "latency<1s", ("*:CPU",), False),
    ],
)
def test_baselines_that_are_far_behind_rest_where_speed_alone_decides(
    objective: str, constraints: str, prefer: tuple[str, ...], rests: bool
) -> None:
    entrants = [entrant("toy default", 10e-3), entrant("candidate 1", 1e-3, role="candidate")]
    prover = Prover(
        entrants,
        constraints=parse(constraints),
        cosine_limit=None,
        seed=0,
        tell=lambda what, state: None,
        objectives=parse_objectives(objective),
        prefer=prefer,
    )
    tire = prover._tire()
    assert (tire is not None) == rests
    if tire is not None:
        tire(ROUNDS)
        slow, plan = (each.contestant for each in entrants)
        assert slow is not None and plan is not None and slow.rests and not plan.rests


def test_nobody_rests_for_the_sake_of_a_lowered_one_that_is_not_yet_judged_on_everything() -> None:
    """Should it fail there, the baseline becomes the plan, and three rounds are few."""
    entrants = [entrant("toy default", 10e-3), entrant("int8", 1e-3, role="candidate")]
    lowered = Config(precision="int8:made")
    entrants[1].draft = replace(entrants[1].draft, pieces=(replace(entrants[1].draft.pieces[0], config=lowered),))
    tire = Prover(entrants, constraints=(), cosine_limit=None, seed=0, tell=lambda what, state: None)._tire()
    assert tire is not None
    tire(ROUNDS)
    slow = entrants[0].contestant
    assert slow is not None and not slow.rests


@pytest.mark.parametrize(("cores", "loads"), [(1, 2), (8, 2), (16, 4), (64, 6)])
def test_as_many_entrants_are_loaded_at_once_as_have_cores(cores: int, loads: int) -> None:
    assert loads_at_once(cores) == loads


class Loading(Prover):
    """Notes how many entrants are loaded at once on each card; none of them races."""

    def __init__(self, entrants: Sequence[Entrant], cards: Sequence[str]) -> None:
        super().__init__(entrants, constraints=(), cosine_limit=None, seed=0, tell=lambda what, state: None)
        self.now, self.most = dict.fromkeys(cards, 0), dict.fromkeys(cards, 0)
        self.loading = self.together = 0
        self.lock = threading.Lock()

    def _load_now(self, entrant: Entrant) -> None:
        on = [each.name for each in targets_of(entrant)]
        with self.lock:
            self.now |= {card: self.now[card] + 1 for card in on}
            self.most = {card: max(self.most[card], self.now[card]) for card in self.now}
            self.loading += 1
            self.together = max(self.together, self.loading)
        time.sleep(0.05)
        with self.lock:
            self.loading -= 1
            self.now |= {card: self.now[card] - 1 for card in on}


def test_two_entrants_are_loaded_at_once_on_each_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aivmm.tuner.prove.usable_cores", lambda: 64)
    cards = [replace(target(name), device=Device(kind="gpu", model="card", uid=name)) for name in ("GPU.0", "GPU.1")]
    entrants = [entrant(f"{number}", 1e-3) for number in range(12)]
    for number, each in enumerate(entrants):
        on, other = cards[number % 2], cards[1 - number % 2]
        piece = replace(each.draft.pieces[0], target=on)
        both = (Copy(target=other, config=piece.config),) if number > 9 else ()
        each.draft = replace(each.draft, pieces=(replace(piece, copies=both),))
    loading = Loading(entrants, [each.name for each in cards])
    loading.run()
    assert loading.most == {"GPU.0": 2, "GPU.1": 2} and loading.together > 2


def unsettled(
    noise: float, rounds: int, asked: Mapping[str, Any] | None = None, **took: float
) -> tuple[Prover, dict[str, Contestant], Known]:
    """Return a proof whose race ended after so few rounds on a machine that is not quiet, and where `asked` was asked for."""
    worker, entrants = Known(took, noise=noise), []
    for name in took:
        each = entrant(name, took[name], role="candidate" if name == "ours" else "baseline")
        each.worker = cast(Any, worker)
        each.contestant = Contestant(name, cast(Any, worker), keep=True)
        entrants.append(each)
    racing = {each.draft.name: each.contestant for each in entrants if each.contestant is not None}
    race(list(racing.values()), budget_s=60, least_rounds=rounds, most_rounds=rounds)
    wanted: dict[str, Any] = {"constraints": (), **(asked or {})}
    return Prover(entrants, cosine_limit=None, seed=0, tell=lambda what, state: None, **wanted), racing, worker


def test_what_time_left_open_is_raced_on_with_the_best_alone() -> None:
    prover, racing, worker = unsettled(9.0, 3, ours=1.0, theirs=3.0, far=500.0)
    before = list(worker.asked)
    assert [each.name for each in undecided(list(racing.values()))] == ["theirs"]
    assert [each.code for each in racing["theirs"].cautions] == ["never-settled"]
    states = list[RaceState]()
    prover._settle(3, states.append)
    after = worker.asked[len(before) :]
    assert set(after) == {"ours", "theirs"} and len(after) <= 2 * 7  # ten rounds in all at most
    assert not undecided(list(racing.values())) and racing["theirs"].cautions == ()
    assert set(racing["theirs"].rounds) == set(range(3 + len(after) // 2)) and len(states) == len(after) // 2


@pytest.mark.parametrize(
    ("rounds", "took"),
    [
        (3, {"ours": 1.0, "theirs": 30.0}),  # clear
        (12, {"ours": 1.0, "theirs": 1.0}),  # as long as it may be
    ],
)
def test_what_is_clear_or_had_its_rounds_is_not_raced_on(rounds: int, took: dict[str, float]) -> None:
    prover, _, worker = unsettled(0.3, rounds, **took)
    before = len(worker.asked)
    prover._settle(rounds, lambda state: None)
    assert len(worker.asked) == before


def test_what_may_not_be_the_plan_is_not_raced_on() -> None:
    prover, racing, worker = unsettled(1.0, 3, ours=1.0, theirs=1.0)
    assert undecided(list(racing.values()))
    for each in prover._proof.entrants:
        each.problem = "it is wrong" if each.draft.name == "theirs" else ""
    before = len(worker.asked)
    prover._settle(3, lambda state: None)
    assert len(worker.asked) == before


@pytest.mark.parametrize(
    ("asked", "raced_on"),
    [
        ({}, {"big", "ours"}),
        ({"constraints": parse("memory<=1MB")}, {"ours", "theirs"}),  # the fastest breaks it, and the next is open against the one after
        ({"objectives": parse_objectives("memory")}, set()),  # the least memory decides, and one alone has it
        ({"objectives": parse_objectives("latency,memory")}, {"big", "ours"}),
        ({"prefer": ("*:GPU",)}, {"big", "ours"}),  # nothing is on one, so all serve alike
        ({"constraints": parse("p99<=1s")}, set()),  # measured afterwards
        ({"constraints": parse("energy<=1J")}, set()),
        ({"forced": True}, set()),  # the cut is the plan in any case
    ],
)
def test_those_are_raced_on_of_which_speed_decides_who_is_the_plan(asked: dict[str, Any], raced_on: set[str]) -> None:
    prover, racing, worker = unsettled(9.0, 3, asked, big=1.0, ours=3.0, theirs=9.0)
    for each, held in zip(racing.values(), (2e9, 2e5, 1e5), strict=True):
        each.memory_bytes = int(held)
    before = len(worker.asked)
    prover._settle(3, lambda state: None)
    assert set(worker.asked[before:]) == raced_on


def test_the_reference_of_a_promise_rests_later_than_other_baselines_unless_it_takes_seconds() -> None:
    entrants = [entrant("the reference", 100e-3), entrant("toy default", 100e-3), entrant("candidate 1", 1e-3, role="candidate")]
    reference, other, _ = (each.contestant for each in entrants)
    assert reference is not None and other is not None
    wanted: dict[str, Any] = {"constraints": (), "cosine_limit": None, "seed": 0, "tell": lambda what, state: None}
    tire = Prover(entrants, reference="the reference", **wanted)._tire()
    assert tire is not None
    tire(2)
    assert other.rests and not reference.rests
    tire(4)
    assert not reference.rests
    tire(5)
    assert reference.rests
    reference.rests, reference.took_s = False, 60.0
    tire(2)
    assert reference.rests
