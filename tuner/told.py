"""What an earlier run of the same request went by. A run that repeats it, or goes on with it, goes by it too and comes to the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from aivmm.planner.candidates import Candidate, Rejection, Score
from aivmm.planner.records import TrialRecord
from aivmm.runtime.config import Config

Known = Mapping[str, tuple[Candidate, Score | Rejection]]  # by candidate key
Point = tuple[str, str, int, int, int]


def point(target: str, config: Config, batch: int, callers: int, replicas: int) -> Point:
    """Return what identifies a point of the search in stored trials."""
    return target, config.digest(), batch, callers, replicas


def point_of(candidate: Candidate) -> Point:
    """Return what identifies a candidate in stored trials."""
    return point(str(candidate.target), candidate.config, candidate.batch, candidate.callers, candidate.replicas)


def point_in(trial: TrialRecord) -> Point:
    """Return what identifies a stored trial."""
    return point(trial.target, trial.config, trial.batch, trial.callers, trial.replicas)


def as_told(known: Known, trials: Sequence[TrialRecord]) -> dict[str, tuple[Candidate, Score | Rejection]]:
    """Return what is known with the scores that `trials` were told.

    The best so far races again beside each group of new points, and the database has all of its races. Of those the newest is not the one
    that the earlier run went by: a target whose defaults are about as far behind as is still worth searching would come and go with it.
    """
    told = {point_in(each): each for each in trials}
    found: dict[str, tuple[Candidate, Score | Rejection]] = {}
    for key, (candidate, outcome) in known.items():
        trial = told.get(point_of(candidate))
        if trial is not None and trial.value is not None:
            if isinstance(outcome, Rejection):
                outcome = replace(outcome, ratio=trial.value) if trial.state == "pruned" else outcome
            elif trial.state == "complete" and trial.low is not None and trial.high is not None:
                metrics = {**outcome.metrics, **trial.metrics}
                outcome = replace(
                    outcome, ratio=trial.value, low=trial.low, high=trial.high, median_s=trial.median_s or outcome.median_s, metrics=metrics
                )
        found[key] = candidate, outcome
    return found
