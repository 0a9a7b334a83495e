"""Decides by timing what runs inputs between the listed shapes: a plan that was tuned, on padded inputs, or the one of open extents.

Padding computes more than was asked for; open extents cost what a runtime loses when it does not know the shape. Which of the two is less
depends on model, runtime and size, so both are raced in the written bundles, in turn, at the sizes at which padding was checked: just above
the next smaller shape, where most is padded, and half-way. Decision 0045.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from aivmm.errors import AivmmError
from aivmm.probes.client import Worker, WorkerDied, compile_limit_s, run_limit_s
from aivmm.probes.compare import Comparison
from aivmm.probes.race import Contestant, per_sample_s, race, versus
from aivmm.runtime.family import Bucket
from aivmm.tuner.other_shapes import OpenPlan, said
from aivmm.tuner.padding import Case
from aivmm.tuner.verdict import time_text

_IN_ALL_S = 12.0  # of racing
_LEAST_S, _MOST_S = 0.3, 1.5  # at each size
_PADDED = "padded"


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """Open extents against padding at one size: the ratio of their times, above 1 where padding is faster."""

    bucket: str
    extents: Mapping[str, int]
    found: Comparison
    first_s: float  # of the first call of that size with open extents

    def json(self) -> dict[str, Any]:
        """Return it as `tune --json` gives it."""
        ratio = {"ratio": self.found.ratio, "low": self.found.low, "high": self.found.high, "verdict": self.found.verdict}
        return {"bucket": self.bucket, "extents": dict(self.extents), **ratio, "first_s": self.first_s}


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which open plan is taken, the buckets with what runs smaller inputs, and the sentences that say why."""

    plan: OpenPlan
    buckets: tuple[Bucket, ...]
    lines: tuple[str, ...]
    timed: tuple[Timed, ...]


@dataclass(slots=True, kw_only=True)
class OpenOrPadded:
    """Races what may run other shapes. `trial` writes a bundle that pads and has no open plan, or one that has it and pads nothing."""

    plans: Sequence[OpenPlan]  # whose answers are right
    buckets: Sequence[Bucket]
    between: Sequence[Case]  # sizes that are padded
    trial: Callable[[OpenPlan | None], Path]
    seed: int = 0

    def run(self) -> Choice:
        """Time them and choose. What cannot be timed leaves the first plan and the padding, and says so."""
        if not self.between and len(self.plans) == 1:
            return self._unchanged()
        workers: list[Worker] = []
        try:
            return self._choice(self._loaded(workers))
        except (AivmmError, WorkerDied) as error:
            why = error.reason if isinstance(error, WorkerDied) else error.message
            return self._unchanged(f"Whether open extents are faster than padding could not be timed ({why}).")
        finally:
            for each in workers:
                each.close()

    def _unchanged(self, *lines: str) -> Choice:
        return Choice(plan=self.plans[0], buckets=tuple(self.buckets), lines=(self.plans[0].line, *lines), timed=())

    @property
    def _cases(self) -> list[Case]:
        return [*self.between, *self.plans[0].cases]

    def _loaded(self, workers: list[Worker]) -> dict[str, tuple[Worker, list[float], list[float]]]:
        """Load each way in a worker of its own; return by its name the first and the second call at each size that it takes."""
        found = {}
        for name, plan in ((_PADDED, None), *((each.target, each) for each in self.plans)):
            cases = self.between if plan is None else self._cases
            if not cases:
                continue
            workers.append(worker := Worker(f"other shapes, {name}"))
            answer = worker.call(
                "load_shaped",
                limit_s=compile_limit_s(),
                run_limit_s=run_limit_s(),
                name=name,
                bundle=str(self.trial(plan)),
                samples=[str(each.samples[0]) for each in cases],
            )
            found[name] = (worker, answer["first_s"], answer["second_s"])
        return found

    def _choice(self, loaded: Mapping[str, tuple[Worker, list[float], list[float]]]) -> Choice:
        budget_s = min(_MOST_S, max(_LEAST_S, _IN_ALL_S / len(self._cases)))
        races = []
        for index in range(len(self._cases)):
            entrants = {
                name: Contestant(f"{name}-{index}", worker, expected_s=second_s[index], keep=True)
                for name, (worker, _, second_s) in loaded.items()
                if index < len(second_s)
            }
            if len(entrants) > 1:
                race(list(entrants.values()), budget_s=budget_s, least_rounds=8, most_rounds=60, seed=self.seed + index)
                _require_all(entrants)
            races.append(entrants)
        plan = min(self.plans, key=lambda each: _slowness(races, each.target))
        timed = tuple(
            Timed(
                bucket=case.bucket.name,
                extents=case.extents,
                found=versus(entrants[plan.target], entrants[_PADDED]),
                first_s=loaded[plan.target][1][index],
            )
            for index, (case, entrants) in enumerate(zip(self.between, races, strict=False))
        )
        buckets = tuple(each.replaced(smaller=_smaller(each, timed)) for each in self.buckets)
        return Choice(plan=plan, buckets=buckets, lines=(plan.line, *_lines(plan, buckets, timed)), timed=timed)


def _require_all(entrants: Mapping[str, Contestant]) -> None:
    """Raise WorkerDied where one has failed in the race."""
    for each in entrants.values():
        if each.failed is not None:
            raise each.failed
        if not each.durations:
            raise WorkerDied("nothing was measured")


def _slowness(races: Sequence[Mapping[str, Contestant]], target: str) -> float:
    """Return the mean logarithm of how much longer a target's open extents take than the best target's."""
    logs = []
    for entrants in races:
        times = {name: per_sample_s(each) for name, each in entrants.items() if name != _PADDED and each.durations}
        if times:
            logs.append(math.log(times[target] / min(times.values())))
    return fmean(logs) if logs else 0.0


def _smaller(bucket: Bucket, timed: Sequence[Timed]) -> str:
    """Say what runs inputs below a bucket: open extents where they were faster at a size and slower at none."""
    verdicts = {each.found.verdict for each in timed if each.bucket == bucket.name}
    return "open" if "faster" in verdicts and verdicts <= {"faster", "same"} else "padded"


def _lines(plan: OpenPlan, buckets: Sequence[Bucket], timed: Sequence[Timed]) -> list[str]:
    lines = []
    for bucket in buckets:
        mine = [each for each in timed if each.bucket == bucket.name]
        if not mine:
            continue
        ratios = ", ".join(f"{each.found.ratio:.2f} ({each.found.verdict}) at {said(each.extents)}" for each in mine)
        runs = "padded" if bucket.smaller == "padded" else f"with open extents on {plan.target}"
        first = f"; a size that is new takes up to {time_text(max(each.first_s for each in mine))} once" if bucket.smaller == "open" else ""
        lines.append(f"Inputs smaller than {bucket.name} run {runs}: open extents take {ratios} times as long as padding{first}.")
    return lines
