"""What a worker does with a bundle of several plans: answer inputs of any shape, and serve several models at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aivmm.errors import AivmmError
from aivmm.probes import phases
from aivmm.probes.accuracy import judge
from aivmm.probes.arrays import load_arrays
from aivmm.runtime.backend import Buffer
from aivmm.runtime.engine import Engine
from aivmm.runtime.many import Engines, ShapedEngine, load, load_one

_GRACE_S = 1.0  # after the end, for what has arrived before it
_MOST_KEPT = 50_000  # latencies sent back of one model
_WARM_UP = 5
_LEAST_ALONE = 5.0  # requests that have to be expected of a rate to time a model alone at it


def fit(state: Any, *, bundle: str, samples: list[str], references: list[str]) -> dict[str, Any]:
    """Load the one model of `bundle`, run each sample, and judge its outputs against its reference."""
    judged = []
    with load_one(bundle, cache=False) as engine:  # of bundles that are thrown away
        phases.enter(phases.RUN)
        for sample, reference in zip(samples, references, strict=True):
            found = judge(engine.run(load_arrays(sample)), load_arrays(reference))
            judged.append({"accuracy": found.metrics(), "problem": found.problem})
        return {"judged": judged, "stats": {"padded": engine.stats().get("padded", 0)}}


class ShapedRunner:
    """A bundle of several shapes, driven as a user drives it, with one sample."""

    simulated = False  # which of its plans runs is decided call by call

    def __init__(self, engine: Engine | ShapedEngine, inputs: Mapping[str, Buffer]) -> None:
        self.engine = engine
        arrays = dict(inputs)
        self.steps: Sequence[Callable[[], object]] = [lambda: engine.run(arrays)]

    def outputs(self, inputs: Mapping[str, Buffer]) -> dict[str, Buffer]:
        """Run once on `inputs`."""
        return self.engine.run(inputs)

    def close(self) -> None:
        """Close the engine, for all of its samples."""
        self.engine.close()


def load_shaped(state: Any, *, name: str, bundle: str, samples: list[str]) -> dict[str, Any]:
    """Load a bundle of several shapes and keep a runner for each sample, named `name`-0, `name`-1, ...

    Returns how long the first and the second call of each took, `first_s` and `second_s`: some runtimes prepare for each new shape.
    """
    engine = load_one(bundle, cache=False)
    phases.enter(phases.RUN)
    times: list[list[float]] = []
    for index, sample in enumerate(samples):
        runner = ShapedRunner(engine, load_arrays(sample))
        took = []
        for _ in range(2):
            started = time.perf_counter()
            runner.steps[0]()
            took.append(time.perf_counter() - started)
        times.append(took)
        state.runners[f"{name}-{index}"] = runner
    return {"first_s": [each[0] for each in times], "second_s": [each[1] for each in times]}


@dataclass(slots=True)
class Client:
    """Sends requests to one model: at given times after the start, or each when the last one is answered."""

    engine: Engine | ShapedEngine
    inputs: Mapping[str, Buffer]
    due_s: Sequence[float] | None  # when requests arrive, after the start; None: one after the other
    callers: int
    latencies_s: list[float] = field(default_factory=list)  # from arrival to answer
    durations_s: list[float] = field(default_factory=list)  # of the call alone
    error: str = ""
    bug: BaseException | None = None
    _next: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def drive(self, started: float, ends: float) -> None:
        """Send requests from one thread until `ends`, in seconds of the clock; what has arrived by then is still answered for a while.

        Who sends one after the other sends one at least: on a busy machine a thread may get its first turn when a short time is over.
        """
        first = self.due_s is None
        try:
            while (due := self._due(started)) is not None and (first or due < ends):
                first = False
                late = due - time.perf_counter()
                if late > 0:
                    time.sleep(late)
                begun = time.perf_counter()
                if begun > ends + _GRACE_S:
                    return
                self.engine.run(self.inputs)
                done = time.perf_counter()
                self.latencies_s.append(done - due)
                self.durations_s.append(done - begun)
        except AivmmError as error:
            self.error = str(error)
        except BaseException as bug:  # noqa: BLE001  raised again by who waits: it must not look like a client with nothing to do
            self.bug = bug

    def _due(self, started: float) -> float | None:
        if self.due_s is None:
            return time.perf_counter()
        with self._lock:
            index = self._next
            self._next += 1
        return started + self.due_s[index] if index < len(self.due_s) else None


def arrivals_s(rate_per_s: float, seconds: float, seed: int) -> list[float]:
    """Return when requests arrive within `seconds`: a Poisson process, the same for the same seed; but one at least.

    Of a low rate mostly none would arrive in so short a time, which says nothing of how requests are served.
    """
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(1 / rate_per_s, size=max(16, int(2 * rate_per_s * seconds) + 16))
    times = np.cumsum(gaps)
    return [float(each) for each in times[times < seconds]] or [float(rng.uniform(0, seconds))]


def client_of(
    engine: Engine | ShapedEngine,
    inputs: Mapping[str, Buffer],
    rate_per_s: float | None,
    callers: int,
    *,
    for_s: float,
    seed: int,
    alone: bool,
) -> Client:
    """Return who sends a model's requests for so long; where it is `alone`, to find out what a call takes when nothing else runs.

    Where few would arrive in that time, one request after the other says more of it; with several callers they would slow each other.
    """
    if alone and rate_per_s is not None and rate_per_s * for_s < _LEAST_ALONE:
        return Client(engine, inputs, None, 1)
    return Client(engine, inputs, None if rate_per_s is None else arrivals_s(rate_per_s, for_s, seed), callers)


def serve(state: Any, *, bundle: str, models: dict[str, dict[str, Any]], seconds: float, alone_s: float, seed: int) -> dict[str, Any]:
    """Load a workload's bundle and serve its models: each alone for `alone_s`, then all at once for `seconds`.

    `models` has for each name `inputs` and `reference` (files), `rate_per_s` (None: one request after the other) and `callers`. Returns for
    each name how close its answers are, and of both services the `latencies_s`, `durations_s`, and how many requests were `offered` and
    `served`.
    """
    with load(bundle) as engines:
        assert isinstance(engines, Engines)
        phases.enter(phases.RUN)
        inputs = {name: load_arrays(each["inputs"]) for name, each in models.items()}
        answers: dict[str, dict[str, Any]] = {}
        for name, each in models.items():
            found = judge(engines[name].run(inputs[name]), load_arrays(each["reference"]))
            answers[name] = {"accuracy": found.metrics(), "problem": found.problem}
            for _ in range(_WARM_UP):
                engines[name].run(inputs[name])

        def client(number: int, name: str, for_s: float, *, alone: bool) -> Client:
            asked = models[name]
            return client_of(
                engines[name], inputs[name], asked["rate_per_s"], asked["callers"], for_s=for_s, seed=seed + number, alone=alone
            )

        for number, name in enumerate(models):
            answers[name]["alone"] = _served({name: client(number, name, alone_s, alone=True)}, alone_s)[name]
        together = {name: client(number, name, seconds, alone=False) for number, name in enumerate(models)}
        for name, one in _served(together, seconds).items():
            answers[name]["together"] = one
    return {"models": answers}


def _served(clients: Mapping[str, Client], seconds: float) -> dict[str, dict[str, Any]]:
    """Drive all clients at once, and return what came of each."""
    started = time.perf_counter() + 0.01  # until all threads stand ready
    threads = [
        threading.Thread(target=each.drive, args=(started, started + seconds)) for each in clients.values() for _ in range(each.callers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each in clients.values():
        if each.bug is not None:
            raise each.bug
    return {
        name: {
            "latencies_s": each.latencies_s[:_MOST_KEPT],
            "durations_s": each.durations_s[:_MOST_KEPT],
            "offered": len(each.latencies_s) if each.due_s is None else len(each.due_s),
            "served": len(each.latencies_s),
            "seconds": seconds,
            "error": each.error,
        }
        for name, each in clients.items()
    }


OPERATIONS: dict[str, Callable[..., dict[str, Any]]] = {"fit": fit, "load_shaped": load_shaped, "serve": serve}
