"""Drift on simulated and recorded latencies: noise is none, a slowdown of 30 % is one, and it is told once."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import aivmm
from aivmm.errors import UsageError
from aivmm.runtime import engine as engine_module
from aivmm.runtime import hot, lane, shortest
from aivmm.runtime.causes import Machine
from aivmm.runtime.drift import BLOCK, Drift, DriftMonitor
from aivmm.runtime.plan import Batching, Execution, Number
from tests.making import ONNXRUNTIME, Part, chain_model, make_bundle, normal
from tests.runtime.machines import ByHand, Suspicious

Floats = npt.NDArray[np.float64]
CALL_S = 5e-3
TEN_MINUTES = int(600 / CALL_S)


def plan_says(value: float = CALL_S, *, width: float = 0.02) -> Number:
    return Number(value=value, low=value * (1 - width), high=value * (1 + width), source="measured", samples=1000)


def feed(monitor: DriftMonitor, seconds: Floats) -> list[tuple[int, Drift]]:
    """Feed latencies, and return each event with the number of calls after which it came."""
    found: list[tuple[int, Drift]] = []
    nanoseconds = (seconds * 1e9).astype(np.int64).tolist()
    machine = monitor._machine
    for at in range(0, len(nanoseconds) - BLOCK + 1, BLOCK):
        before = len(monitor.events)
        if isinstance(machine, ByHand):
            machine.passes(sum(nanoseconds[at : at + BLOCK]) / 1e9)
        monitor.add(nanoseconds[at : at + BLOCK])
        found += [(at + BLOCK, each) for each in list(monitor.events)[before:]]
    return found


def quiet(_: Drift) -> None:
    pass


def monitor(expected: Number | None = None, *, callers: int = 1, machine: Machine | None = None) -> DriftMonitor:
    """Watch with a machine that sees a cause whenever calls are slow: what is tested is the statistic."""
    return DriftMonitor(expected or plan_says(), tell=quiet, callers=callers, machine=machine or Suspicious())


def unexpected() -> DriftMonitor:
    return DriftMonitor(None, tell=quiet, machine=Suspicious())


# --- noise ---


def white(rng: np.random.Generator, count: int) -> Floats:
    return CALL_S * np.exp(rng.normal(0, 0.08, count))


def stalls(rng: np.random.Generator, count: int) -> Floats:
    """One call in two hundred waits for a whole time slice or three of somebody else."""
    return white(rng, count) + np.where(rng.random(count) < 0.005, rng.choice([4e-3, 12e-3, 100e-3], count), 0.0)


def correlated(rng: np.random.Generator, count: int) -> Floats:
    """Clocks and caches wander: a first-order process with a memory of a second, and white noise on top."""
    memory = np.exp(-CALL_S)
    steps = rng.normal(0, 0.03 * np.sqrt(1 - memory**2), count)
    level = np.zeros(count)
    for index in range(1, count):
        level[index] = memory * level[index - 1] + steps[index]
    return CALL_S * np.exp(level + rng.normal(0, 0.04, count))


def cron(rng: np.random.Generator, count: int) -> Floats:
    """Every ten seconds something else runs for a third of a second and takes half of the machine."""
    period, length = int(10 / CALL_S), int(0.3 / CALL_S)
    return white(rng, count) * np.where(np.arange(count) % period < length, 2.0, 1.0)


def creeping(rng: np.random.Generator, count: int) -> Floats:
    """Everything gets warm: 6 % slower over the ten minutes."""
    return white(rng, count) * np.linspace(1.0, 1.06, count)


STALLS = [(0.4e-3, 0.02, 4e-3), (0.4e-3, 0.03, 12e-3), (2e-3, 0.05, 4e-3), (2e-3, 0.03, 12e-3), (5e-3, 0.03, 12e-3)]


@pytest.mark.parametrize(("call", "share", "stall"), STALLS)
@pytest.mark.parametrize("seed", range(3))
def test_stalls_that_were_there_from_the_beginning_are_no_drift(call: float, share: float, stall: float, seed: int) -> None:
    """Threads that take turns on few cores: a mean far above the median, from the first call to the last."""
    rng = np.random.default_rng(seed)
    count = int(30 / (call + share * stall))
    seconds = call * np.exp(rng.normal(0, 0.08, count)) + np.where(rng.random(count) < share, stall, 0.0)
    assert feed(unexpected(), seconds) == []
    assert len(feed(unexpected(), np.concatenate([seconds, 1.8 * seconds[: int(5 / call)]]))) == 1


@pytest.mark.parametrize("noise", [white, stalls, correlated, cron, creeping])
@pytest.mark.parametrize("seed", range(3))
def test_ten_minutes_of_noise_are_no_drift(noise: Callable[[np.random.Generator, int], Floats], seed: int) -> None:
    watch = monitor()
    assert feed(watch, noise(np.random.default_rng(seed), TEN_MINUTES)) == []
    assert watch.state()["state"] == "inside"


@settings(max_examples=60, deadline=None)
@given(
    spread=st.floats(0.0, 0.15),
    share=st.floats(0.0, 0.01),
    stall=st.floats(0.0, 0.1),
    call=st.floats(1e-4, 0.1),
    seed=st.integers(0, 2**32 - 1),
)
def test_noise_of_any_size_is_no_drift(spread: float, share: float, stall: float, call: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = 200 * BLOCK + int(0.6 / call)
    seconds = call * np.exp(rng.normal(0, spread, count)) + np.where(rng.random(count) < share, min(stall, 4 * call), 0.0)
    assert feed(monitor(plan_says(call)), seconds) == []


# --- a slowdown of 30 % ---


def throughout(rng: np.random.Generator, seconds: Floats) -> Floats:
    return seconds * 1.3


def sliced(rng: np.random.Generator, seconds: Floats) -> Floats:
    """A process of lower priority takes a slice of 4 ms now and then: the calls that it falls into wait, and the mean grows by 30 %."""
    return seconds + np.where(rng.random(len(seconds)) < 0.3 * float(np.mean(seconds)) / 4e-3, 4e-3, 0.0)


def in_turns(rng: np.random.Generator, seconds: Floats) -> Floats:
    """It works three calls in ten, and then the machine is shared in two."""
    return seconds * np.where(np.arange(len(seconds)) % 10 < 3, 2.0, 1.0)


@pytest.mark.parametrize("slow", [throughout, sliced, in_turns])
@pytest.mark.parametrize("seed", range(40))
def test_a_slowdown_of_thirty_percent_is_reported_once_within_200_calls(
    slow: Callable[[np.random.Generator, Floats], Floats], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    before, watch = white(rng, 100 * BLOCK + seed % BLOCK), monitor()
    after = slow(rng, white(rng, 2000))
    ((calls, event),) = feed(watch, np.concatenate([before, after]))
    assert len(before) < calls <= len(before) + 200
    assert watch.state()["state"] == "outside"
    assert event.plan_s == CALL_S and 0.9 < event.baseline_s / CALL_S < 1.1
    assert "\n" not in str(event) and "the plan says 5 ms (4.9 ms to 5.1 ms)" in str(event)


def test_a_recorded_slowdown_by_another_process_is_reported_once_within_200_calls() -> None:
    """ONNX Runtime on one core of a virtual machine (a Xeon): alone, and from the half on beside a process at nice 5 on that core."""
    seconds = np.load(Path(__file__).parent / "recorded_latencies.npz")["alone_then_shared"].astype(float)
    half = len(seconds) // 2
    assert 1.3 < float(np.mean(seconds[half:]) / np.mean(seconds[:half])) < 1.5
    assert float(np.median(seconds[half:]) / np.median(seconds[:half])) < 1.15  # most calls do not meet the other process
    ((calls, event),) = feed(monitor(plan_says(float(np.median(seconds[:half])))), seconds)
    assert half < calls <= half + 200
    assert event.live_s > event.baseline_s
    assert event.live_mean_s > 1.25 * event.baseline_mean_s and "on average" in str(event)  # the medians are not what is slower


def test_an_event_says_what_is_slower_where_most_calls_are_not() -> None:
    """Seen under 64 threads: a median of 16 µs that was 61 at first, told as a drift of 16 µs."""
    rng = np.random.default_rng(0)
    before, after = white(rng, 4000), 0.8 * white(rng, 2000) + np.where(rng.random(2000) < 0.2, 12e-3, 0.0)
    ((_, event),) = feed(monitor(), np.concatenate([before, after]))
    assert event.live_s < event.baseline_s
    assert event.live_mean_s > 1.15 * event.baseline_mean_s
    assert f"a call takes {event.live_s * 1e3:.3g} ms ({event.live_mean_s * 1e3:.3g} ms on average)" in str(event)


@settings(max_examples=60, deadline=None)
@given(factor=st.floats(1.3, 5.0), call=st.floats(3e-3, 0.1), spread=st.floats(0.0, 0.1), seed=st.integers(0, 2**32 - 1))
def test_more_is_reported_as_well(factor: float, call: float, spread: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    before = call * np.exp(rng.normal(0, spread, int(max(60 * BLOCK, 0.7 / call))))
    after = factor * call * np.exp(rng.normal(0, spread, 400))
    ((calls, event),) = feed(monitor(plan_says(call)), np.concatenate([before, after]))
    assert calls <= len(before) + 200
    assert event.live_s > event.baseline_s


def test_short_calls_are_judged_over_half_a_second() -> None:
    rng = np.random.default_rng(0)
    call = 50e-6
    before, burst, after = (call * factor * np.exp(rng.normal(0, 0.05, count)) for factor, count in ((1, 20_000), (2.0, 4000), (1, 20_000)))
    assert feed(monitor(plan_says(call)), np.concatenate([before, burst, after])) == []  # 0.4 s
    slow = 1.3 * call * np.exp(rng.normal(0, 0.05, 20_000))
    ((calls, _),) = feed(monitor(plan_says(call)), np.concatenate([before, slow]))
    assert 0.5 <= (calls - len(before)) * 1.3 * call < 0.55


# --- the plan's interval ---


def test_latency_within_the_plans_interval_is_no_drift_however_fast_it_began() -> None:
    rng = np.random.default_rng(0)
    seconds = np.concatenate([0.6 * white(rng, 4000), white(rng, 4000)])
    assert feed(monitor(plan_says(width=0.1)), seconds) == []
    assert len(feed(monitor(plan_says(width=0.1)), np.concatenate([seconds, 1.4 * white(rng, 400)]))) == 1


def test_an_engine_that_starts_outside_of_the_plans_interval_says_so_once_and_knows_when_it_is_back() -> None:
    rng = np.random.default_rng(0)
    watch = monitor()
    ((calls, event),) = feed(watch, 1.5 * white(rng, 4000))
    assert calls < 200 and event.cause == "other processes" and event.live_s == pytest.approx(1.5 * CALL_S, rel=0.1)
    assert watch.state()["state"] == "outside"
    assert feed(watch, white(rng, 14_000)) == []
    assert watch.state()["state"] == "inside"
    assert len(feed(watch, 1.5 * white(rng, 4000))) == 1


def test_an_event_is_raised_again_only_after_it_was_over_for_a_minute() -> None:
    rng = np.random.default_rng(0)
    good, bad, long = white(rng, 2000), 1.5 * white(rng, 2000), white(rng, int(60 / CALL_S))
    assert len(feed(monitor(), np.concatenate([good, bad, bad]))) == 1
    assert len(feed(monitor(), np.concatenate([good, bad, good, bad]))) == 1
    assert len(feed(monitor(), np.concatenate([good, bad, long, bad]))) == 2


def test_with_several_callers_more_load_is_no_drift_until_it_is_more_than_the_plans() -> None:
    rng = np.random.default_rng(0)
    assert feed(monitor(callers=4), np.concatenate([0.4 * white(rng, 4000), white(rng, 4000)])) == []
    assert feed(monitor(callers=4), 1.5 * white(rng, 4000)) == []  # who keeps more in flight than the plan has; the baseline knows
    assert len(feed(monitor(callers=4), np.concatenate([0.4 * white(rng, 4000), 1.5 * white(rng, 4000)]))) == 1


def test_a_plan_without_a_latency_is_watched_against_its_own_beginning() -> None:
    rng = np.random.default_rng(0)
    watch = unexpected()
    ((_, event),) = feed(watch, np.concatenate([white(rng, 2000), 1.4 * white(rng, 2000)]))
    assert event.plan_s is None and "the plan names no latency" in str(event)


def test_a_clock_that_sees_nothing_of_a_call_costs_no_request() -> None:
    watch = monitor()
    for _ in range(9000):  # as many blocks as a warm-up takes at most, and more
        watch.add([0] * BLOCK)
    assert watch.state()["state"] == "inside"


def test_many_threads_may_feed_it() -> None:
    watch = monitor()
    calls = [int(CALL_S * 1e9)] * BLOCK
    threads = [threading.Thread(target=lambda: [watch.add(calls) for _ in range(500)]) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert watch.state() == {"state": "inside", "baseline_s": pytest.approx(CALL_S), "events": []}


# --- in an engine ---


class Slow:
    """How long a run of the runtime takes, and what lies between two."""

    seconds = pause = others = 0.0
    machine: ByHand
    wait: Callable[[], None]


@contextmanager
def slowed(folder: Path, monkeypatch: pytest.MonkeyPatch, call_s: float) -> Iterator[aivmm.Engine]:
    """An engine whose calls take what `Slow.seconds` says: its clock is moved by hand, so that no load of the machine is seen."""
    now = [0]
    Slow.machine = Suspicious()
    monkeypatch.setattr(engine_module, "Machine", lambda _: Slow.machine)
    monkeypatch.setattr(hot, "native", None)  # whose clock is the machine's
    monkeypatch.delenv(hot.VARIABLE, raising=False)
    for module in (lane, shortest):
        monkeypatch.setattr(module, "perf_counter_ns", lambda: now[0])
    bundle = make_bundle(folder / "m.aivmm", chain_model(), [Part(ONNXRUNTIME)], expected={"median_s": plan_says(call_s)})
    with aivmm.load_plan(bundle) as loaded:

        def slow(_: int, real: Callable[[], None]) -> Callable[[], None]:
            def run() -> None:
                real()
                now[0] += int(Slow.seconds * 1e9)
                Slow.machine.passes(Slow.seconds, own=Slow.seconds, others=Slow.others * Slow.seconds)

            return run

        def wait() -> None:
            now[0] += int(Slow.pause * 1e9)
            Slow.machine.passes(Slow.pause)

        Slow.wait = staticmethod(wait)
        for each in loaded._program.lanes:
            each.wrap(slow)
        yield loaded


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[aivmm.Engine]:
    with slowed(tmp_path, monkeypatch, CALL_S) as loaded:
        yield loaded


@pytest.mark.parametrize("call_s", [20e-6, 150e-6, 450e-6])
def test_short_calls_are_passed_on_as_sums_and_told_after_half_a_second(
    call_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with slowed(tmp_path, monkeypatch, call_s) as engine:
        told: list[Drift] = []
        engine.on_drift = told.append
        x = {"x": normal(2, 32)}
        for call in range(int(1.5 / call_s)):
            Slow.seconds = call_s if call % int(0.3 / call_s) else 3e-3  # one by one, and counted as what it is
            engine.run(x)
        assert engine.stats()["drift"]["state"] == "inside" and not told
        Slow.seconds, calls = 1.3 * call_s, 0
        while not engine.stats()["drift"]["events"] and calls < 1 / call_s:
            for _ in range(100):
                engine.run(x)
            calls += 100
        (event,) = heard(told)
        assert 0.45 < calls * 1.3 * call_s < 0.7  # what it began in counts whole
        assert event.live_s == pytest.approx(1.3 * call_s) and event.baseline_s == pytest.approx(call_s, rel=0.01)


def test_an_engine_tells_its_listener_its_log_and_its_statistics(engine: aivmm.Engine, caplog: pytest.LogCaptureFixture) -> None:
    told: list[Drift] = []
    engine.on_drift = told.append
    x = {"x": normal(2, 32)}
    for Slow.seconds, calls in ((CALL_S, 600), (1.3 * CALL_S, 200)):
        assert engine.stats()["drift"]["state"] in ("warming up", "inside") and not told
        for _ in range(calls):
            engine.run(x)
    (event,) = heard(told)
    assert event.live_s == pytest.approx(1.3 * CALL_S) and event.baseline_s == pytest.approx(CALL_S)
    stats = engine.stats()
    assert stats["drift"]["state"] == "outside" and len(stats["drift"]["events"]) == 1
    assert str(event) in stats["events"] and str(event) in caplog.text
    assert stats["drift"]["events"][0]["cause"] == event.cause == "card"
    assert event.seen == stats["drift"]["events"][0]["seen"] and event.seen in str(event)


def test_futures_are_watched_as_calls_are(engine: aivmm.Engine) -> None:
    told: list[Drift] = []
    engine.on_drift = told.append
    for Slow.seconds, calls in ((CALL_S, 600), (1.3 * CALL_S, 200)):
        for _ in range(calls):
            engine.submit({"x": normal(2, 32)}).result()
    assert len(heard(told)) == 1


@pytest.mark.parametrize("how", ["run", "close"])
def test_a_listener_may_ask_the_engine_or_close_it(engine: aivmm.Engine, how: str) -> None:
    """The call that showed the drift has its turn still, and there is one."""
    told: list[Drift] = []
    x = {"x": normal(2, 32)}

    def listener(found: Drift) -> None:
        engine.run(x) if how == "run" else engine.close()
        told.append(found)

    engine.on_drift = listener
    for Slow.seconds, calls in ((CALL_S, 600), (1.3 * CALL_S, 200)):
        for _ in range(calls):
            with suppress(UsageError):  # closed by then
                engine.run(x)
    assert len(heard(told)) == 1


def heard(told: list[Drift]) -> list[Drift]:
    """Wait for what listeners are told on a thread of theirs."""
    end = time.monotonic() + 60
    while not told and time.monotonic() < end:
        time.sleep(0.01)
    return told


def test_a_listener_that_fails_costs_no_answer(engine: aivmm.Engine, caplog: pytest.LogCaptureFixture) -> None:
    def fails(_: Drift) -> None:
        raise RuntimeError("the listener's own")

    engine.on_drift = fails
    for Slow.seconds, calls in ((CALL_S, 600), (2 * CALL_S, 400)):
        for _ in range(calls):
            assert engine.run({"x": normal(2, 32)})["y"].shape == (2, 32)
    end = time.monotonic() + 60
    while "the listener's own" not in caplog.text and time.monotonic() < end:
        time.sleep(0.01)
    assert "the listener's own" in caplog.text


def test_where_latency_says_nothing_it_is_not_watched(tmp_path: Path) -> None:
    batching = Execution(batching=Batching(max_batch=4))
    with aivmm.load_plan(make_bundle(tmp_path / "m.aivmm", chain_model(), [Part(ONNXRUNTIME)], execution=batching, batch=2)) as loaded:
        assert loaded.stats()["drift"] == {
            "state": "not watched",
            "reason": "requests are batched, and a batch takes as long as it has rows",
        }


def test_an_engine_tells_pauses_from_slow_calls(engine: aivmm.Engine) -> None:
    told: list[Drift] = []
    engine.on_drift = told.append
    x = {"x": normal(2, 32)}
    for Slow.seconds, Slow.pause in ((CALL_S, 0.0), (2 * CALL_S, 0.2), (CALL_S, 0.0)):
        for _ in range(600):
            engine.run(x)
            Slow.wait()
    assert engine.stats()["drift"]["state"] == "inside" and not told


@pytest.mark.parametrize(
    ("call_s", "period_s", "factor"), [(10e-3, 20e-3, 1.5), (10e-3, 25e-3, 2.0), (10e-3, 33.3e-3, 2.5), (5e-3, 20e-3, 3.0)]
)
def test_calls_at_a_fixed_rate_have_shorter_pauses_when_they_are_slower(
    engine: aivmm.Engine, call_s: float, period_s: float, factor: float
) -> None:
    told: list[Drift] = []
    engine.on_drift = told.append
    x = {"x": normal(2, 32)}
    for Slow.seconds, calls in ((call_s, 600), (factor * call_s, 200)):
        assert not engine.stats()["drift"]["events"]
        Slow.pause = period_s - Slow.seconds
        for _ in range(calls):
            engine.run(x)
            Slow.wait()
    assert len(heard(told)) == 1 and engine.stats()["drift"]["state"] == "outside"


def test_slow_calls_may_wait_for_a_moment_unless_they_are_kept_from_cores() -> None:
    """What is told of the others takes half a second at least."""
    machine = ByHand()
    monitor = DriftMonitor(None, tell=lambda _: None, machine=machine)

    def comes(call_s: float, own_s: float) -> None:
        """An observation of calls that need so much CPU time."""
        calls = int(0.021 / call_s)
        machine.passes(calls * call_s, own=calls * own_s, waited=calls * (call_s - own_s), others=calls * (call_s - own_s))
        monitor.add_short([[int(call_s * 1e9)] * calls])

    for _ in range(40):
        comes(300e-6, 300e-6)
    calm = monitor.calm()
    assert calm is not None and calm.may_wait and not calm.begun and 300e3 < calm.call_ns < 400e3
    comes(450e-6, 450e-6)
    calm = monitor.calm()
    assert calm is not None and calm.may_wait and calm.begun and calm.call_ns == math.inf and calm.ratio < 2
    comes(450e-6, 300e-6)
    assert monitor.calm() is None
