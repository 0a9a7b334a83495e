"""Which knobs the search says mattered (`aivmm.planner.importance`), by objective and target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aivmm.reports import format as fmt
from aivmm.reports.data import ReportData, number

_MOST = 12  # knobs
_MOST_COLUMNS = 6


@dataclass(frozen=True, kw_only=True)
class Weighed:
    """The knobs of one target for one objective: a column of the table."""

    objective: str
    target: str  # "" is what all targets share
    slot: int
    trials: int
    knobs: Mapping[str, float]  # name -> share of the variation that the knobs explain

    @property
    def about(self) -> str:
        """What it is of, for a caption."""
        return f"{self.target or 'all targets'}, {self.objective}, by {fmt.count(self.trials, 'trial')}"


@dataclass(frozen=True, kw_only=True)
class Importance:
    """The table: columns for what was weighed, rows for knobs, the one that mattered most anywhere first."""

    columns: tuple[Weighed, ...]
    knobs: tuple[str, ...]


def account(data: ReportData, colours: Mapping[str, int]) -> Importance | None:
    """Return what the run stored; None where too few trials were made to tell."""
    stored = data.run.summary.get("importance")
    groups: dict[tuple[str, str, int], dict[str, float]] = {}
    for each in stored if isinstance(stored, (list, tuple)) else ():
        read = _read(each)
        if read is not None:
            groups.setdefault(read[0], {})[read[1][0]] = read[1][1]
    columns = tuple(
        Weighed(
            objective=objective,
            target=target,
            slot=colours.get(target, 7),
            trials=trials,
            knobs=knobs,
        )
        for (objective, target, trials), knobs in sorted(groups.items(), key=lambda group: (group[0][0], -group[0][2], group[0][1]))
    )[:_MOST_COLUMNS]
    most = {name: max(each.knobs.get(name, 0.0) for each in columns) for each in columns for name in each.knobs}
    return Importance(columns=columns, knobs=tuple(sorted(most, key=lambda name: (-most[name], name))[:_MOST])) if columns else None


def _read(each: Any) -> tuple[tuple[str, str, int], tuple[str, float]] | None:
    if not isinstance(each, Mapping):
        return None
    share = number(each.get("share"))
    if share is None or share < 0:
        return None
    key = str(each.get("objective") or ""), str(each.get("target") or ""), int(number(each.get("trials")) or 0)
    return key, (str(each.get("knob") or ""), share)
