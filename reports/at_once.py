"""Plans whose parts run at once, as far as any were tried: what each promised, what it had to beat, and what its proof said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aivmm.reports import format as fmt
from aivmm.reports.data import ReportData, number

_KINDS = {"copies": "copies of the whole model", "pipeline": "a pipeline"}
_MOST_FACTORS = 12  # that are named of one plan


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """The best plan of one kind. Rates are samples a second; None where there is none."""

    kind: str
    what: str
    promised: float | None
    to_beat: float | None
    proven: float | None
    outcome: str
    factors: tuple[str, ...]  # "a takes 1.84× as long beside b"


def attempts(data: ReportData) -> tuple[Attempt, ...]:
    """Return what was tried; empty where the goal has nothing run at once, or an older run did not say."""
    stored = data.run.summary.get("at_once")
    return tuple(_attempt(each) for each in stored if isinstance(each, Mapping)) if isinstance(stored, (list, tuple)) else ()


def _attempt(raw: Mapping[str, Any]) -> Attempt:
    factors = raw.get("factors")
    named = [_factor(each) for each in factors if isinstance(each, Mapping)] if isinstance(factors, (list, tuple)) else []
    kind = str(raw.get("kind", ""))
    return Attempt(
        kind=_KINDS.get(kind, kind),
        what=str(raw.get("what", "")),
        promised=number(raw.get("promised_per_s")),
        to_beat=number(raw.get("to_beat_per_s")),
        proven=number(raw.get("proven_per_s")),
        outcome=_outcome(raw),
        factors=tuple(named[:_MOST_FACTORS]),
    )


def _outcome(raw: Mapping[str, Any]) -> str:
    if raw.get("is_plan") is True:
        return "the plan"
    if number(raw.get("proven_per_s")) is not None:
        return "proven, and not the best"
    if raw.get("could_not_be_measured") is True:
        return "could not be measured"
    if raw.get("assumes_no_contention") is True:
        promised, to_beat = number(raw.get("promised_per_s")), number(raw.get("to_beat_per_s"))
        slow = promised is not None and to_beat is not None and promised <= to_beat
        return "not measured: too slow even if its parts cost each other nothing" if slow else "not measured"  # it may have been stopped
    if raw.get("measured_whole") is True and raw.get("entrant") is not True:
        return "not proven: measured whole, it was no better"
    return "could not be proven" if raw.get("entrant") is True else "not proven: it promised too little"


def _factor(raw: Mapping[str, Any]) -> str:
    slowed, beside, factor = str(raw.get("slowed", "")), str(raw.get("beside", "")), number(raw.get("factor"))
    other = "another copy of it" if slowed == beside else fmt.shorten(beside, 60)
    return f"{fmt.shorten(slowed, 60)} takes {fmt.ratio(factor)} as long beside {other}"
