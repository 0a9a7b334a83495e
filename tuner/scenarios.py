"""How a running plan is loaded for `aivmm bench`: the scenarios of MLPerf Inference, on an engine as production has it.

    single   SingleStream: the next query is sent when the last one is answered; its figure is the 90th percentile of latency
    offline  Offline: all queries are there at once; its figure is samples a second
    server   Server: queries arrive in a Poisson process, whether the last ones are answered or not; its figure is the highest rate at
             which the 99th percentile of latency, counted from the arrival, keeps within a bound

(Reddi et al., "MLPerf Inference Benchmark", ISCA 2020, section IV; the percentiles are theirs.) What a submission also has to have, ten
minutes and 270,000 queries for a 99th percentile, is not enforced. How many there were is said instead, and there is no verdict on fewer
than 1,000: the 99th percentile of a hundred is about the slowest of them.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from aivmm.planner.constraints import apart, human
from aivmm.runtime.backend import Buffer
from aivmm.runtime.engine import Engine

Inputs = Mapping[str, Buffer]
Floats = npt.NDArray[np.float64]

SCENARIOS = ("single", "offline", "server")
_FIGURES = {"single": "p90_s", "offline": "throughput_per_s", "server": "throughput_per_s"}
_SEARCH_STEPS = 7  # a rate is known to 1 % of the offline rate
_HOPELESS = 20.0  # a backlog of so many bounds does not come back
LEAST_QUERIES = 1000  # for a verdict on a 99th percentile: ten of them may be late
MOST_QUERIES = 20_000_000  # of which the times of arrival and answer are kept: a third of a gigabyte


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One scenario. Latencies in seconds, in the order of arrival; for `offline` there are none that mean anything."""

    scenario: str
    latencies_s: Floats
    queries: int
    samples: int  # rows of queries: a query of a plan for a batch has as many
    wall_s: float
    rate_per_s: float | None = None  # queries a second that were to arrive
    bound_s: float | None = None
    ended_early: bool = False  # the line became hopeless, and the rest of the queries did not arrive

    def metrics(self) -> dict[str, float]:
        """Return figures by name, in SI units; quantiles of latency where it means something."""
        found = {"throughput_per_s": self.samples / self.wall_s}
        if self.scenario != "offline":
            found |= {f"p{q}_s": float(np.quantile(self.latencies_s, q / 100)) for q in (50, 90, 95, 99)}
            found |= {"mean_s": float(np.mean(self.latencies_s)), "max_s": float(np.max(self.latencies_s))}
        return found

    @property
    def kept(self) -> bool:
        """Whether the bound was kept by those that arrived, where there is one; not by the few before the line became hopeless."""
        return not self.not_kept_because

    @property
    def verdict(self) -> str | None:
        """VALID or INVALID, as MLPerf calls a run by its bound; None where there is no bound to keep, or there were too few queries."""
        if self.bound_s is None or self.undecided_because:
            return None
        return "VALID" if self.kept else "INVALID"

    @property
    def not_kept_because(self) -> str:
        """Say which way the bound was not kept; "" where it was, or there is none."""
        if self.bound_s is None:
            return ""
        if self.ended_early:
            bound = f"{_HOPELESS:g} times the bound of {human(self.bound_s, 'latency')}"
            return f"only {self.queries / self.wall_s:.4g} queries/s were answered, and the line grew past {bound}"
        p99_s = self.metrics()["p99_s"]
        if p99_s <= self.bound_s:
            return ""
        found, bound = apart(p99_s, self.bound_s, "latency")
        return f"p99 {found} is over the bound of {bound}"

    @property
    def undecided_because(self) -> str:
        """Say why there is no verdict by the bound; "" where there is one, or no bound.

        A verdict takes 1,000 queries. Fewer decide where so many were late that 1,000 would not keep it, were all others in time.
        """
        if self.bound_s is None or self.queries >= LEAST_QUERIES or self.ended_early:
            return ""
        if np.count_nonzero(self.latencies_s > self.bound_s) > LEAST_QUERIES // 100:
            return ""
        return f"{self.queries} queries are fewer than the {LEAST_QUERIES:,} that a 99th percentile takes"

    def as_json(self) -> dict[str, Any]:
        """Return it as `aivmm bench --json` gives it. `valid` is null where there is no verdict by the bound."""
        return {
            "scenario": self.scenario,
            "figure": _FIGURES[self.scenario],
            "valid": None if self.undecided_because else self.kept,
            "verdict": self.verdict,
            "invalid_because": self.not_kept_because if self.verdict == "INVALID" else "",
            "undecided_because": self.undecided_because,
            "queries": self.queries,
            "samples": self.samples,
            "wall_s": self.wall_s,
            "rate_per_s": self.rate_per_s,
            "latency_bound_s": self.bound_s,
            "ended_early": self.ended_early,
            "metrics": self.metrics(),
        }


def single(engine: Engine, inputs: Inputs, duration_s: float) -> Result:
    """Send one query after another for `duration_s`."""
    latencies: list[float] = []
    started = last = time.perf_counter()
    while last - started < duration_s or not latencies:
        engine.run(inputs)
        now = time.perf_counter()
        latencies.append(now - last)
        last = now
    return Result(
        scenario="single",
        latencies_s=np.array(latencies),
        queries=len(latencies),
        samples=len(latencies) * engine.plan.batch,
        wall_s=last - started,
    )


def offline(engine: Engine, inputs: Inputs, duration_s: float) -> Result:
    """Send queries as fast as they are taken for `duration_s`, and wait for all of them."""
    sent = 0
    pending: list[Future[Any]] = []
    started = time.perf_counter()
    while time.perf_counter() - started < duration_s or not sent:
        pending.append(engine.submit(inputs))
        sent += 1
        if len(pending) >= 1024:  # those in front are done long since
            for each in pending[:512]:
                each.result()
            del pending[:512]
    for each in pending:
        each.result()
    wall_s = time.perf_counter() - started
    return Result(scenario="offline", latencies_s=np.zeros(0), queries=sent, samples=sent * engine.plan.batch, wall_s=wall_s)


def server(engine: Engine, inputs: Inputs, duration_s: float, *, rate_per_s: float, bound_s: float | None, seed: int = 0) -> Result:
    """Let queries arrive at `rate_per_s` in a Poisson process for `duration_s`. Latency counts from the time at which one was to arrive.

    So who arrives while the engine takes no more waits in line, and its waiting counts. Ends early when the line has become hopeless: by
    the bound, else when the next in it was due so long ago as all of this was to take.
    """
    hopeless_s = max(duration_s, 1.0) if bound_s is None else _HOPELESS * bound_s
    rng = np.random.default_rng(seed)
    due = np.cumsum(rng.exponential(1 / rate_per_s, max(1, int(rate_per_s * duration_s))))
    done = np.full(len(due), math.nan)
    pending = threading.Semaphore(0)
    errors: list[BaseException] = []
    sent = 0
    started = time.perf_counter()
    for index, at in enumerate(due.tolist()):
        ahead = at - (time.perf_counter() - started)
        if ahead > 0:
            _wait(started + at)
        elif -ahead > hopeless_s:
            break
        engine.submit(inputs).add_done_callback(_stamp(done, index, started, pending, errors))
        sent += 1
    for _ in range(sent):
        pending.acquire()
    wall_s = time.perf_counter() - started
    if errors:
        raise errors[0]  # as `single` and `offline` do: a query that fails is no answer
    return Result(
        scenario="server",
        latencies_s=done[:sent] - due[:sent],
        queries=sent,
        samples=sent * engine.plan.batch,
        wall_s=wall_s,
        rate_per_s=rate_per_s,
        bound_s=bound_s,
        ended_early=sent < len(due),
    )


def highest_rate(
    engine: Engine, inputs: Inputs, duration_s: float, *, bound_s: float, seed: int = 0, tell: Callable[[str], None] = lambda _: None
) -> Result:
    """Search the highest rate at which `server` keeps `bound_s`, below what `offline` reaches; each step takes a part of `duration_s`.

    Returns the result at that rate, over a third of `duration_s`; where no rate keeps the bound, one that does not at the lowest tried.
    """
    part_s = duration_s / (_SEARCH_STEPS + 5)
    most = offline(engine, inputs, part_s)
    low, high = 0.0, most.queries / most.wall_s
    for step in range(_SEARCH_STEPS):
        rate = (low + high) / 2
        found = server(engine, inputs, part_s, rate_per_s=rate, bound_s=bound_s, seed=seed + step)
        tell(f"{rate:.4g} queries/s: p99 {found.metrics()['p99_s'] * 1e3:.3g} ms")
        low, high = (rate, high) if found.kept else (low, rate)
    result = server(engine, inputs, 4 * part_s, rate_per_s=low or high, bound_s=bound_s, seed=seed + _SEARCH_STEPS)
    while not result.kept and low and result.rate_per_s and result.rate_per_s > 0.5 * low:  # a longer run sees rarer queries
        lower = 0.95 * result.rate_per_s
        tell(f"{result.rate_per_s:.4g} queries/s does not hold for longer, {lower:.4g} may")
        result = server(engine, inputs, 4 * part_s, rate_per_s=lower, bound_s=bound_s, seed=seed)
    return result


def _stamp(
    done: Floats, index: int, started: float, pending: threading.Semaphore, errors: list[BaseException]
) -> Callable[[Future[Any]], None]:
    def stamp(future: Future[Any]) -> None:
        done[index] = time.perf_counter() - started
        error = future.exception()
        if error is not None:
            errors.append(error)
        pending.release()

    return stamp


def _wait(until: float) -> None:
    """Wait for a point in time, the last tenth of a millisecond awake: a sleep ends late by about as much."""
    left = until - time.perf_counter()
    if left > 2e-4:
        time.sleep(left - 1e-4)
    while time.perf_counter() < until:
        pass
