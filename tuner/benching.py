"""One `aivmm bench`: the plan is loaded as production loads it, and each scenario runs on it while nothing else of ours measures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aivmm.errors import UsageError
from aivmm.planner.constraints import parse
from aivmm.probes.machine import measuring
from aivmm.runtime.engine import Engine
from aivmm.runtime.many import load_one
from aivmm.tuner.running import inputs_for, shape_of
from aivmm.tuner.scenarios import Result, highest_rate, offline, server, single

_WARM_UP_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be measured. Times in seconds."""

    scenarios: tuple[str, ...]
    duration_s: float
    rate_per_s: float | None = None  # None: the highest is searched
    bound_s: float | None = None  # of p99; None: the plan's own
    inputs: Path | None = None
    model: str | None = None
    bucket: str | None = None
    seed: int = 0
    trace: Path | None = None  # where a recording of the stages goes


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What was measured."""

    engine: Mapping[str, Any]
    results: Sequence[Result]
    events: Sequence[str]

    def as_json(self) -> dict[str, Any]:
        """Return the object of `aivmm bench --json`."""
        return {"schema": 1, **self.engine, "events": list(self.events), "scenarios": [each.as_json() for each in self.results]}


def run_scenarios(plan: Path, request: Request, *, tell: Callable[[str], None]) -> Bench:
    """Load the bundle at `plan` and run the scenarios of `request` on it.

    Raises:
        AivmmError: it does not load, or `server` has neither a rate nor a bound.
    """
    with load_one(plan, request.model) as loaded:
        bucket, engine = shape_of(loaded, request.bucket)
        bound_s = request.bound_s if request.bound_s is not None else _own_bound(engine)
        if "server" in request.scenarios and bound_s is None and request.rate_per_s is None:
            raise UsageError(
                "the server scenario needs a bound, and the plan has no limit on p99", advice="give one with --latency-bound 20ms"
            )
        inputs = inputs_for(engine.inputs, request.inputs)
        results = []
        with measuring(), nullcontext() if request.trace is None else engine.trace() as recording:
            single(engine, inputs, min(_WARM_UP_S, request.duration_s / 4))
            for name in request.scenarios:
                tell(f"{name}: {request.duration_s:.3g} s")
                if name == "single":
                    results.append(single(engine, inputs, request.duration_s))
                elif name == "offline":
                    results.append(offline(engine, inputs, request.duration_s))
                elif request.rate_per_s is not None:
                    results.append(
                        server(engine, inputs, request.duration_s, rate_per_s=request.rate_per_s, bound_s=bound_s, seed=request.seed)
                    )
                else:
                    assert bound_s is not None
                    results.append(highest_rate(engine, inputs, request.duration_s, bound_s=bound_s, seed=request.seed, tell=tell))
        if request.trace is not None and recording is not None:
            recording.write(request.trace)
        facts = {
            "plan": str(plan),
            "model": engine.plan.model.name,
            "bucket": bucket,
            "targets": list(dict.fromkeys(each.target for stage in engine.stages for each in stage.everywhere())),
            "batch": engine.plan.batch,
            "validity": engine.validity.grade,
            "load_s": engine.load_s,
        }
        return Bench(engine=facts, results=results, events=list(engine.events))


def _own_bound(engine: Engine) -> float | None:
    """Return the tightest limit on the 99th percentile that the plan was made for. One on latency is on the median, and says less."""
    limits = [each for text in engine.plan.constraints for each in parse(text)]
    return min((each.limit for each in limits if each.metric == "p99"), default=None)
