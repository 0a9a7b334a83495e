"""The drift monitor on a real engine: no event while the machine is idle, one when another process takes a share of the cores.

    python -m benchmarks.drift [--minutes 10] [--trials 10] [--only trials,idle] [--json FILE] [--traces DIR]

Idle: a small model runs on one pinned core for so many minutes, and events are counted. Shared: in each trial a process is let loose on
that core after a baseline, and the calls until the event are counted. It takes a share of the core that it knows from its own account.
How strong it was is measured afterwards in each trial: it is stopped and goes on again and again, and calls with it are held against
those without it that came just before, so that what the host does in between falls on both. Trials in which that is no slowdown of 30 to
40 % are shown, and others run in their place, as many as are wanted at most; stronger ones have to be told like those within. The share is
moved from trial to trial to where the slowdown is in the middle. What calls take by the CPU time that they get is shown beside: it leaves
out what caches and switches cost them. Cost: what feeding the monitor takes a call. Run it where nothing else runs.
FILE has what is known so far from the first trial on, and then with each idle minute, so that a run which ends early is not lost; what is
missing of it is a gate that failed. In DIR is what was counted in each trial by 16 calls, to be fed to a monitor later (the columns are
those of `tests/runtime/recorded_neighbour.npz`).

Gates (exit status 1 where one fails): no event while idle, none before a neighbour is let loose, as many trials of 30 to 40 % as are
wanted, and each slowdown of 30 % or more told within 200 calls, with other processes as its cause. Each event is printed, with what it
says of its cause; and so is how slow the machine itself was, in the idle minutes, by seconds that were slower than their median.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

import aivmm
from aivmm.runtime.causes import Counted, Machine
from aivmm.runtime.drift import BLOCK, Drift, DriftMonitor
from tests.making import ONNXRUNTIME, Part, chain_model, make_bundle, normal

WIDTH, ROWS, LAYERS = 768, 64, 8  # some 5 ms on one core
BASELINE_CALLS, WATCHED_CALLS, LEAST_CALLS = 1000, 1500, 400  # before a neighbour, with one who is not told, and with one who is
PAIRS, PAIR_BLOCKS = 8, 4  # with a neighbour and without, to see how strong he is
SHARE, SHARES = 0.18, (0.1, 0.3)  # of the core: at first, and at least and at most
SLICES_S = (2e-3, 4e-3, 12e-3)  # in which he takes it
SLOWDOWN, WORST_SLOWDOWN, TOLD_WITHIN = 1.3, 1.4, 200


def neighbour(share: float, slice_s: float) -> subprocess.Popen[bytes]:
    """Start a process that takes so much of the core from a line on its standard input on, by slices, and wait until it is there.

    It goes by its own account: it works until it has had its share of the time that passed, and sleeps until a slice is owed to it. After
    a time in which it was stopped it begins anew, in the middle of that.
    """
    process = subprocess.Popen([sys.executable, "-c", _NEIGHBOUR, str(share), str(slice_s)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process


_NEIGHBOUR = """
import sys, time
share, slice_s = map(float, sys.argv[1:])
print("there", flush=True)
sys.stdin.readline()
owed, rest, seen, had = 0.0, 0.0, time.monotonic(), time.process_time()
while True:
    now, has = time.monotonic(), time.process_time()
    stopped = now - seen > rest + 5 * slice_s
    owed = slice_s / 2 if stopped else owed + share * (now - seen) - (has - had)
    seen, had, rest = now, has, max(0.0, (slice_s - owed) / share)
    if rest:
        time.sleep(rest)
    else:
        while time.process_time() < has + slice_s:
            pass
"""


def looked(machine: Machine) -> Counted:
    """Return what a machine has counted so far."""
    found = machine.counted()
    if found is None:
        raise RuntimeError("the machine's accounts cannot be read just now")
    return found


def idle(bundle: Path, inputs: Any, minutes: float) -> Iterator[dict[str, Any]]:
    """Run for so many minutes, and yield what was found so far, the events among it, after each of them."""
    told: list[Drift] = []
    means: list[float] = []  # of the calls of each second
    machine = Machine()
    with aivmm.load_plan(bundle, on_drift=told.append) as engine:
        started, calls, before = time.perf_counter(), 0, looked(machine)
        while (passed := time.perf_counter() - started) < 60 * minutes:
            until = min(60 * minutes, 60 * (passed // 60 + 1))
            while time.perf_counter() - started < until:
                second, first = time.perf_counter(), calls
                while time.perf_counter() - second < 1.0:
                    engine.run(inputs)
                    calls += 1
                means.append((time.perf_counter() - second) / (calls - first))
            spent, events = looked(machine).since(before), engine.stats()["drift"]["events"]
            yield {
                "minutes": (time.perf_counter() - started) / 60,
                "calls": calls,
                "events": events,
                "said": [str(each) for each in told],
                "others_cores": spent.others / spent.seconds,
                "slow_s": slow_runs(means),
            }


def slow_runs(means: Sequence[float]) -> list[int]:
    """Return for how many seconds in a row calls were slower by more than an eighth than in the median second, the longest first."""
    level = 1.125 * median(means)
    return sorted((len(list(run)) for slow, run in groupby(means, lambda each: each > level) if slow), reverse=True)


class Trace:
    """What was counted while calls ran, by `BLOCK` of them."""

    def __init__(self, engine: aivmm.Engine, inputs: Any) -> None:
        self._engine, self._inputs, self._machine = engine, inputs, Machine()
        self.calls = 0
        self.durations_s: list[float] = []
        self.rows: list[tuple[float, float, float, float, float]] = []
        self._look(0.0)

    def _look(self, busy_s: float) -> None:
        now = looked(self._machine)
        self.rows.append((now.seconds, busy_s, now.own + now.others, now.own, now.waited))

    def run(self) -> float:
        """Run a block, and return what it took."""
        for _ in range(BLOCK):
            started = time.perf_counter()
            self._engine.run(self._inputs)
            self.durations_s.append(time.perf_counter() - started)
            self.calls += 1
        self._look(busy_s := sum(self.durations_s[-BLOCK:]))
        return busy_s

    def by_cpu_time(self, first: int, last: int | None = None) -> float:
        """Return what calls took by the CPU time that they got, from one row to another."""
        rows = self.rows[first:last]
        return sum(row[1] for row in rows[1:]) / (rows[-1][3] - rows[0][3])


def slowdown(trace: Trace, process: subprocess.Popen[bytes]) -> float:
    """Return how much longer calls take with a neighbour: he is stopped again and again, and the host may do what it wants."""
    grown = 0.0
    for _ in range(PAIRS):
        for sign, what in ((-1, signal.SIGSTOP), (1, signal.SIGCONT)):
            os.kill(process.pid, what)
            grown += sign * math.log(sum(trace.run() for _ in range(PAIR_BLOCKS)))
    return math.exp(grown / PAIRS)


def shared(bundle: Path, inputs: Any, number: int, share: float, traces: Path | None) -> dict[str, Any]:
    """Let a neighbour loose after a baseline, and return after how many calls that was told, and by how much calls grew."""
    told: list[tuple[int, Drift]] = []
    slice_s = SLICES_S[number % len(SLICES_S)]
    process = neighbour(share, slice_s)
    try:
        with aivmm.load_plan(bundle, on_drift=lambda event: told.append((trace.calls, event))) as engine:
            trace = Trace(engine, inputs)
            while trace.calls < BASELINE_CALLS:
                trace.run()
            early, first, loose = len(told), trace.calls, len(trace.rows) - 1
            assert process.stdin is not None
            process.stdin.write(b"go\n")
            process.stdin.flush()
            while trace.calls - first < (WATCHED_CALLS if len(told) == early else LEAST_CALLS):
                trace.run()
            last, late = trace.calls, told[early:]
            grown = slowdown(trace, process)
    finally:
        process.kill()
        process.communicate()
    before, after = trace.durations_s[:first], trace.durations_s[first:last]
    if traces is not None:
        np.savez_compressed(traces / f"trial{number}.npz", rows=np.array(trace.rows), neighbour_from=loose)
    return {
        "share": share,
        "slice_s": slice_s,
        "slowdown": grown,
        "by_cpu_time_ratio": trace.by_cpu_time(loose, last // BLOCK + 1) / trace.by_cpu_time(0, loose + 1),
        "mean_ratio": fmean(after) / fmean(before),
        "median_ratio": median(after) / median(before),
        "events_before": early,
        "events_after": len(late),
        "calls_until_told": late[0][0] - first if late else None,
        "cause": late[0][1].cause if late else None,
        "said": [str(event) for _, event in told],
    }


class Pretended(Machine):
    """A machine on which calls that are fed, and never run, have had the CPU time that they are said to have taken."""

    fed_s = 0.0

    def own_s(self) -> float:
        """Return the CPU time of this process, and of those calls."""
        return super().own_s() + self.fed_s


def cost_s() -> float:
    """Return what feeding the monitor takes a call, in seconds: the least of several means."""
    machine = Pretended()
    monitor = DriftMonitor(None, tell=lambda event: None, machine=machine)
    rng = np.random.default_rng(0)
    blocks = [(5e6 * np.exp(rng.normal(0, 0.05, BLOCK))).astype(int).tolist() for _ in range(1000)]
    best = float("inf")
    for _ in range(20):
        started = time.perf_counter()
        for each in blocks:
            machine.fed_s += 5e-3 * BLOCK
            monitor.add(each)
        best = min(best, (time.perf_counter() - started) / (len(blocks) * BLOCK))
    return best


def is_wanted(trial: dict[str, Any]) -> bool:
    """Return whether a neighbour was one of those that are to be told and no stronger."""
    return SLOWDOWN <= float(trial["slowdown"]) <= WORST_SLOWDOWN


def next_share(trials: Sequence[dict[str, Any]]) -> float:
    """Return what share of the core a neighbour is to have next, after what trials have shown of those with the same slices."""
    alike = [each for each in trials if each["slice_s"] == SLICES_S[len(trials) % len(SLICES_S)]]
    if not alike:
        return SHARE
    wanted = (SLOWDOWN + WORST_SLOWDOWN) / 2 - 1
    found = alike[-1]["share"] * wanted / max(alike[-1]["slowdown"] - 1, wanted / 2)
    return float(min(max((found + alike[-1]["share"]) / 2, SHARES[0]), SHARES[1]))  # half of the way: one trial is but one


def described(trial: dict[str, Any]) -> str:
    """Say what a trial found."""
    told = f"told after {trial['calls_until_told']} calls" if trial["calls_until_told"] else "not told"
    return (
        f"neighbour with {trial['share']:.1%} of the core by {trial['slice_s'] * 1e3:g} ms: calls x {trial['slowdown']:.2f} with him, "
        f"by CPU time x {trial['by_cpu_time_ratio']:.2f}, after by before x {trial['mean_ratio']:.2f}; {told}, "
        f"{trial['events_before']} before, {trial['events_after']} after{'' if is_wanted(trial) else '; run again'}"
    )


def failures(found: dict[str, Any]) -> list[str]:
    """Return the gates that do not hold, in words."""
    trials, rest, wanted = found["shared"], found["idle"], found["wanted"]
    slowed = [each for each in trials if each["slowdown"] >= SLOWDOWN]
    late = [each["calls_until_told"] for each in slowed if (each["calls_until_told"] or math.inf) > TOLD_WITHIN]
    unseen = [each["cause"] for each in slowed if each["cause"] not in (None, "other processes")]
    failed = []
    if unseen:
        failed.append(f"other processes were not named as the cause ({', '.join(unseen)})")
    if (count := sum(map(is_wanted, trials))) < wanted["trials"]:
        between = f"{SLOWDOWN - 1:.0%} to {WORST_SLOWDOWN - 1:.0%}"
        failed.append(f"{count} of {wanted['trials']} trials had a neighbour of {between}, and {len(trials) - count} another one")
    if late:
        failed.append(f"{len(late)} of {len(slowed)} slowdowns were not told within {TOLD_WITHIN} calls ({', '.join(map(str, late))})")
    if early := sum(each["events_before"] for each in trials):
        failed.append(f"{early} events before the neighbour was let loose")
    if idle_events := len(rest.get("events", ())):
        failed.append(f"{idle_events} events while idle")
    if (minutes := rest.get("minutes", 0.0)) < wanted["minutes"]:
        failed.append(f"{minutes:.1f} of {wanted['minutes']:g} idle minutes were run")
    return failed


def watch(found: dict[str, Any], bundle: Path, inputs: Any, keep: Callable[[], None], traces: Path | None) -> None:
    """Run trials and idle minutes as wanted, put what they find into `found`, print it, and `keep` it each time that there is more."""
    wanted, trials = found["wanted"], found["shared"]
    while sum(map(is_wanted, trials)) < wanted["trials"] and len(trials) < 2 * wanted["trials"]:
        each = shared(bundle, inputs, len(trials), next_share(trials), traces)
        trials.append(each)
        print(described(each))
        for said in each["said"]:
            print(f"    {said}", flush=True)
        keep()
    for rest in idle(bundle, inputs, wanted["minutes"]):
        found["idle"] = rest
        slow = ", ".join(map(str, rest["slow_s"][:10])) or "no"
        print(f"idle: {len(rest['events'])} events in {rest['minutes']:.1f} minutes, {rest['calls']} calls; other processes took "
              f"{rest['others_cores']:.2f} cores; slow for {slow} s in a row", flush=True)  # fmt: skip
        keep()
    for said in found["idle"].get("said", ()):
        print(f"    {said}", flush=True)


def main() -> None:
    """Measure, print, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--only", default="trials,idle", help="what to run of these, with commas between them")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--traces", type=Path, help="a folder for what was counted in each trial")
    options = parser.parse_args()
    parts = set(options.only.split(","))
    if unknown := parts - {"trials", "idle"}:
        parser.error(f"--only knows trials and idle, not {', '.join(sorted(unknown))}")
    if options.traces:
        options.traces.mkdir(parents=True, exist_ok=True)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    wanted = {"minutes": options.minutes if "idle" in parts else 0.0, "trials": options.trials if "trials" in parts else 0}
    found: dict[str, Any] = {"system": platform.platform(), "wanted": wanted, "cost_s_per_call": cost_s(), "shared": [], "idle": {}}

    def keep() -> None:
        found["failed"] = failures(found)
        if options.json:
            part = options.json.with_name(f"{options.json.name}.part")  # at no time is there half a file
            part.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
            part.replace(options.json)

    print(f"cost: {found['cost_s_per_call'] * 1e6:.2f} µs a call", flush=True)
    keep()
    with tempfile.TemporaryDirectory() as folder:
        part = Part(ONNXRUNTIME, settings=(("intra_op_num_threads", 1),))
        bundle = make_bundle(Path(folder) / "m.aivmm", chain_model(width=WIDTH, rows=ROWS, layers=LAYERS), [part])
        watch(found, bundle, {"x": normal(ROWS, WIDTH)}, keep, options.traces)
    print(f"Gates that failed: {'; '.join(found['failed']) or 'none'}.")
    raise SystemExit(1 if found["failed"] else 0)


if __name__ == "__main__":
    main()
