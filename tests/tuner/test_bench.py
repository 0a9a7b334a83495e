"""`aivmm bench`: scenarios on an engine whose answers take as long as they are told, and the gate."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from aivmm.errors import UsageError
from aivmm.runtime.engine import Engine
from aivmm.tuner.cli_bench import FAILED, _sentence, failing
from aivmm.tuner.scenarios import Result, highest_rate, offline, server, single
from tests.making import ONNXRUNTIME, Part, chain_model, make_bundle
from tests.tuner.harness import Shell


class Waiter:
    """An engine with so many lanes, each of which takes so long for a query of `batch` samples."""

    def __init__(self, seconds: float, *, lanes: int = 1, batch: int = 1) -> None:
        self.plan = SimpleNamespace(batch=batch)
        self._seconds, self._pool, self._room = seconds, ThreadPoolExecutor(lanes), threading.Semaphore(lanes)

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        time.sleep(self._seconds)
        return {}

    def submit(self, inputs: Mapping[str, Any]) -> Future[dict[str, Any]]:
        self._room.acquire()
        future = self._pool.submit(self.run, inputs)
        future.add_done_callback(lambda _: self._room.release())
        return future

    @property
    def engine(self) -> Engine:
        return cast(Engine, self)


def test_single_sends_one_query_after_the_other() -> None:
    found = single(Waiter(5e-3, batch=4).engine, {}, 0.3)
    metrics = found.metrics()
    assert found.queries == len(found.latencies_s) and found.samples == 4 * found.queries
    assert all(each >= 5e-3 for each in found.latencies_s)
    assert metrics["p50_s"] <= metrics["p90_s"] <= metrics["p99_s"] <= metrics["max_s"]
    assert metrics["throughput_per_s"] == pytest.approx(found.samples / found.wall_s) and found.wall_s >= np.sum(found.latencies_s)


def test_offline_keeps_all_lanes_busy() -> None:
    alone, both = (offline(Waiter(5e-3, lanes=lanes).engine, {}, 0.5) for lanes in (1, 2))
    assert both.metrics()["throughput_per_s"] > 1.2 * alone.metrics()["throughput_per_s"]
    assert "p99_s" not in both.metrics()


def test_server_counts_the_wait_in_line_from_the_arrival() -> None:
    calm = server(Waiter(2e-3).engine, {}, 0.5, rate_per_s=20, bound_s=None)
    crowded = server(Waiter(20e-3).engine, {}, 0.5, rate_per_s=100, bound_s=None)  # twice what it can take
    assert 2 <= calm.queries <= 30 and calm.rate_per_s == 20
    assert crowded.queries == 50
    assert crowded.latencies_s[-1] > 0.2  # 1 s of work came in half a second
    assert crowded.metrics()["p50_s"] > 2 * calm.metrics()["p50_s"]


def test_arrivals_are_a_poisson_process_that_hangs_on_the_seed() -> None:
    one, same, other = (server(Waiter(0).engine, {}, 0.2, rate_per_s=100, bound_s=None, seed=seed) for seed in (1, 1, 2))
    assert one.queries == same.queries == other.queries == 20
    gaps = np.random.default_rng(1).exponential(0.01, 20)
    assert one.wall_s >= gaps.sum()  # the last one was not sent before it was due


def test_a_server_that_cannot_keep_up_is_not_loaded_for_the_whole_time() -> None:
    started = time.perf_counter()
    found = server(Waiter(50e-3).engine, {}, 30.0, rate_per_s=1000, bound_s=5e-3)
    assert not found.kept and found.verdict == "INVALID" and found.ended_early and time.perf_counter() - started < 20


def test_neither_is_one_that_keeps_no_bound() -> None:
    """A million arrived in a second once, and all of them were answered."""
    found = server(Waiter(20e-3).engine, {}, 0.1, rate_per_s=10_000, bound_s=None)
    assert found.ended_early and found.queries < 1000
    assert found.kept  # there is nothing to keep
    assert "ended early" in _sentence(found) and found.as_json()["ended_early"]


def test_a_bound_is_not_kept_by_the_few_before_the_line_became_hopeless() -> None:
    few = Result(scenario="server", latencies_s=np.array([1e-3]), queries=1, samples=1, wall_s=1.0, rate_per_s=1.0, bound_s=1.0)
    assert few.kept and not replace(few, ended_early=True).kept
    assert "INVALID, only 1 queries/s were answered, and the line grew past 20 times the bound of 1 s: " in _sentence(
        replace(few, ended_early=True)
    )


def test_a_server_run_is_called_valid_or_invalid_by_its_bound_as_mlperf_does() -> None:
    found = Result(
        scenario="server", latencies_s=np.full(2000, 5e-3), queries=2000, samples=2000, wall_s=10.0, rate_per_s=200.0, bound_s=20e-3
    )
    assert _sentence(found).startswith("VALID, p99 keeps the bound of 20 ms: 200 queries/s arriving: p50 5 ms")
    assert (found.as_json()["verdict"], found.as_json()["invalid_because"]) == ("VALID", "")
    assert found.as_json()["undecided_because"] == ""
    late = replace(found, bound_s=2e-3)
    assert _sentence(late).startswith("INVALID, p99 5 ms is over the bound of 2 ms: 200 queries/s arriving: p50 5 ms")
    assert late.as_json()["verdict"] == "INVALID" and not late.as_json()["valid"]
    free = replace(found, bound_s=None)
    assert free.as_json()["verdict"] is None and "VALID" not in _sentence(free)


def test_fewer_than_a_thousand_queries_have_no_verdict_unless_too_many_were_late_for_a_thousand() -> None:
    few = Result(scenario="server", latencies_s=np.full(999, 5e-3), queries=999, samples=999, wall_s=10.0, rate_per_s=99.9, bound_s=20e-3)
    assert (few.verdict, few.as_json()["verdict"], few.as_json()["valid"], few.as_json()["invalid_because"]) == (None, None, None, "")
    assert few.as_json()["undecided_because"] == "999 queries are fewer than the 1,000 that a 99th percentile takes"
    told = (
        "no verdict, 999 queries are fewer than the 1,000 that a 99th percentile takes (2 times the --duration has enough); p99 keeps the"
    )
    assert _sentence(few).startswith(told)
    for late, verdict in ((10, None), (11, "INVALID")):
        seconds = np.full(100, 5e-3)
        seconds[:late] = 30e-3
        found = replace(few, latencies_s=seconds, queries=100)
        assert found.verdict == verdict and not found.kept
        assert "p99 30 ms is over the bound of 20 ms" in _sentence(found)


def test_a_bound_that_was_just_missed_is_told_with_the_digits_that_show_it() -> None:
    found = Result(
        scenario="server", latencies_s=np.full(2000, 20.0004e-3), queries=2000, samples=2000, wall_s=10.0, rate_per_s=200.0, bound_s=20e-3
    )
    assert found.as_json()["invalid_because"] == "p99 20.0004 ms is over the bound of 20 ms"


def test_the_highest_rate_keeps_the_bound_and_is_below_what_offline_reaches() -> None:
    told: list[str] = []
    found = highest_rate(Waiter(5e-3).engine, {}, 3.0, bound_s=1.0, tell=told.append)
    assert found.kept and found.rate_per_s is not None and 20 < found.rate_per_s < 200
    assert len(told) >= 7
    hopeless = highest_rate(Waiter(5e-3).engine, {}, 1.0, bound_s=1e-4)
    assert not hopeless.kept


def test_a_query_that_fails_is_no_answer() -> None:
    class Broken(Waiter):
        def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        server(Broken(0).engine, {}, 0.2, rate_per_s=100, bound_s=None)


def test_figures_are_those_of_mlperf() -> None:
    seconds = np.arange(1, 101) / 1e3
    found = Result(scenario="single", latencies_s=seconds, queries=100, samples=800, wall_s=4.0).as_json()
    assert found["figure"] == "p90_s" and found["metrics"]["p90_s"] == pytest.approx(0.0901)
    assert found["metrics"]["throughput_per_s"] == 200
    bounded = Result(scenario="server", latencies_s=seconds, queries=100, samples=100, wall_s=1.0, bound_s=0.0995)
    assert bounded.metrics()["p99_s"] == pytest.approx(0.09901) and bounded.kept
    assert not Result(scenario="server", latencies_s=seconds, queries=100, samples=100, wall_s=1.0, bound_s=0.099).kept


def test_what_fails_is_the_opposite_of_a_constraint() -> None:
    assert [(text, str(each)) for text, each in failing("p99>20ms, throughput < 100/s", ["single"])] == [
        ("p99>20ms", "p99<=20ms"),
        ("throughput < 100/s", "throughput>=100/s"),
    ]


@pytest.mark.parametrize(
    ("text", "scenarios", "words"),
    [
        ("p99", ["single"], r'METRIC>LIMIT; write it like --fail-if "p99>20ms"'),
        ("p99>20", ["single"], "'p99>20' makes no sense: p99 is a time and needs a unit .*; write it like --fail-if .p99>20ms."),
        ("p99<20ms", ["single"], "would fail where p99 is good; p99 fails with >: p99>20ms"),
        ("throughput>5/s", ["single"], "throughput fails with <: throughput<5/s"),
        ("size>1MB", ["single"], "size is not measured here; choose from latency, p99, throughput"),
        ("latency>1ms", ["offline"], "offline measures no latency; add --scenario single"),
    ],
)
def test_what_cannot_fail_is_refused(text: str, scenarios: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        failing(text, scenarios)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    make_bundle(folder / "m.aivmm", chain_model(), [Part(ONNXRUNTIME)], constraints=["latency<1ms", "p99<1s"])
    make_bundle(folder / "median.aivmm", chain_model(), [Part(ONNXRUNTIME)], constraints=["latency<1s"])
    make_bundle(folder / "free.aivmm", chain_model(), [Part(ONNXRUNTIME)])
    return folder


@pytest.fixture
def place(made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.setenv("AIVMM_LOCK", str(made / "lock"))
    monkeypatch.setenv("AIVMM_CACHE", str(made / "cache"))
    return Shell(made, capsys)


def test_bench_measures_all_scenarios_with_the_plans_own_bound(place: Shell) -> None:
    found = place.aivmm("bench", "m.aivmm", "--scenario", "all", "--duration", "2s", "--json", "-q")
    assert (found.code, found.err) == (0, "")
    single, offline, server = found.json["scenarios"]
    assert [each["scenario"] for each in (single, offline, server)] == ["single", "offline", "server"]
    assert 0 < single["metrics"]["p50_s"] <= single["metrics"]["p99_s"]
    assert server["latency_bound_s"] == 1.0 and server["rate_per_s"] > 0
    assert found.json["validity"] == "exact" and found.json["failed"] == []
    words = place.aivmm("bench", "m.aivmm", "--scenario", "offline", "--duration", "500ms")
    assert words.code == 0 and "samples/s" in words.out and "offline: 0.5 s" in words.err


def test_the_gate_has_an_exit_status_of_its_own(place: Shell) -> None:
    passed = place.aivmm("bench", "m.aivmm", "--duration", "300ms", "--fail-if", "p99>100s", "--fail-if", "throughput<0.001/s")
    assert passed.code == 0
    failed = place.aivmm("bench", "m.aivmm", "--duration", "300ms", "--fail-if", "p99>1ns, latency>100s", "--json", "-q")
    assert failed.code == FAILED == 4
    (sentence,) = failed.json["failed"]
    assert sentence.startswith("p99>1ns (single: p99 is ") and failed.error_lines == [f"aivmm: failed: {sentence}"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--scenario", "multi"), "unknown scenario 'multi'; choose from single, offline, server, all"),
        (("--duration", "soon"), "--duration 'soon' is not a time"),
        (("--rate", "fast"), "--rate 'fast' is not a rate"),
        (("--rate", "1000000000000"), "1e+13 queries are more than the 20,000,000 that are kept"),
        (("--bucket", "seq=8"), "there is no shape 'seq=8'"),
        (("--model", "other"), "there is no model 'other'"),
    ],
)
def test_what_cannot_be_measured_is_one_line(place: Shell, options: tuple[str, ...], words: str) -> None:
    refused = place.aivmm("bench", "m.aivmm", *options)
    assert (refused.code, refused.out) == (2, "") and words in refused.err and len(refused.error_lines) == 1


def test_a_server_without_a_bound_asks_for_one(place: Shell) -> None:
    for name in ("free.aivmm", "median.aivmm"):  # a limit on the median is none on p99
        refused = place.aivmm("bench", name, "--scenario", "server")
        assert refused.code == 2 and "the plan has no limit on p99; give one with --latency-bound 20ms" in refused.err
    found = place.aivmm("bench", "free.aivmm", "--scenario", "server", "--rate", "50/s", "--duration", "1s", "--json", "-q")
    assert found.json["scenarios"][0]["queries"] == 50


def test_at_a_rate_that_is_given_the_plans_own_bound_counts_and_a_run_that_breaks_it_is_no_failure(place: Shell) -> None:
    own = place.aivmm("bench", "m.aivmm", "--scenario", "server", "--rate", "50/s", "--duration", "500ms")
    assert own.code == 0 and "server   no verdict, 25 queries are fewer than the 1,000" in own.out
    assert "p99 keeps the bound of 1 s: 50 queries/s arriving" in own.out
    late = place.aivmm("bench", "m.aivmm", "--scenario", "server", "--rate", "50/s", "--duration", "500ms", "--latency-bound", "0.01us")
    assert late.code == 0 and "server   INVALID, " in late.out
