"""What is known of how good a plan is: its objective, a bound that no placement is expected below, and what both rest on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aivmm.planner.evidence import SOURCES, Estimate, shares
from aivmm.planner.lazy import Look
from aivmm.probes.records import Source

_WORDS: Mapping[Source, str] = {
    "measured": "measured",
    "interpolated": "interpolated between measurements",
    "modelled": "modelled from measured parts",
}
_ROUNDING = 1e-9  # relative: sums of the same parts in another order


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """What the planner knew of the plan before it was proven. Seconds are of one call, or from one answer to the next for "throughput".

    `more` is a sentence on what the rest does not speak of. `bound_s` is None where nothing bounds it; `why_no_bound` then says why.
    `rests_on` are the shares of `objective_s` by source; they add to 1. Of `segments_possible` (runs of blocks times targets that run
    them) `segments_measured` were measured. `proven` is False where the search for cuts ended before nothing could be better.
    `planning_s` and `solves` are what placing took, without any measuring.
    """

    objective: str
    objective_s: float
    low_s: float  # 95 % interval of the objective
    high_s: float
    rests_on: Mapping[Source, float]
    bound_s: float | None = None
    why_no_bound: str = ""
    among: str = ""  # what the bound speaks of: "placements of 12 blocks on 2 targets"
    proven: bool = False
    segments_measured: int = 0
    segments_possible: int = 0
    planning_s: float = 0.0
    solves: int = 0
    more: str = ""

    @property
    def gap(self) -> float | None:
        """How much of the objective is not shown to be necessary; 0 is optimal, None unknown."""
        return None if self.bound_s is None else max(0.0, 1 - self.bound_s / self.objective_s)

    def as_json(self) -> dict[str, Any]:
        """Return it as plan, report and `tune --json` hold it."""
        return {
            "objective": self.objective,
            "objective_s": self.objective_s,
            "interval_s": [self.low_s, self.high_s],
            "bound_s": self.bound_s,
            "gap": self.gap,
            "proven": self.proven,
            "rests_on": {source: self.rests_on.get(source, 0.0) for source in SOURCES},
            "segments_measured": self.segments_measured,
            "segments_possible": self.segments_possible,
            "planning_s": self.planning_s,
            "solves": self.solves,
            "sentence": self.sentence,
        }

    @property
    def sentence(self) -> str:
        """All of it for a reader, in two to four sentences."""
        return f"{self._time_told} {self.more}".strip()

    @property
    def _time_told(self) -> str:
        parts = [f"{_percent(share)} {_WORDS[source]}" for source, share in self.rests_on.items() if share > 0]
        low, middle, high = map(_time, (self.low_s, self.objective_s, self.high_s))
        # Where all three read the same, an interval would claim more than is known: a measured number is believed as it is.
        does = "answer a call every" if self.objective == "throughput" else "take"
        expected = f"The plan was expected to {does} {middle}" + (f" ({low} to {high})" if low != high else "")
        rests = f"{expected}; that is {' and '.join(parts)}."
        if self.bound_s is None:
            return f"{rests} Nothing bounds what another plan could take: {self.why_no_bound}."
        gap = self.gap or 0.0
        if gap < 0.0005:
            bound = f"None of the {self.among} is expected to take less"
        else:
            bound = (
                f"None of the {self.among} is expected to take less than {_time(self.bound_s)}, so at most {_percent(gap)} is left to gain"
            )
        measured = f"{self.segments_measured} of {self.segments_possible} possible segments had to be measured"
        open_ = "" if self.proven else ", and the search ended before it could show more"
        return f"{rests} {bound}; {measured} for that{open_}."


def certify(
    found: Estimate,
    parts: Sequence[Estimate],
    *,
    objective: str,
    call_s: float = 0.0,
    looked: Look | None,
    among: str,
    why_no_bound: str = "",
    more: str = "",
) -> Certificate:
    """Return the certificate of a plan of which a call is expected to take `found`, and any call `call_s` beside; it rests on `parts`.

    `looked` is the search among the placements that `among` names; without one there is no bound, and `why_no_bound` says why. A plan that
    takes less than that search thought any could has shown its bound to be wrong, so it has none either.
    """
    low, high = found.interval_s
    bound = {}
    if looked is not None and found.seconds < looked.bound_s * (1 - _ROUNDING):
        looked, why_no_bound = None, "it takes less than the search for placements thought any of them could"
    if looked is not None:
        bound = {
            "bound_s": min(looked.bound_s, found.seconds) + call_s,
            "proven": looked.proven,
            "segments_measured": looked.probes,
            "segments_possible": looked.possible,
            "planning_s": looked.seconds,
            "solves": looked.solves,
        }
    return Certificate(
        objective=objective,
        objective_s=found.seconds + call_s,
        low_s=low + call_s,
        high_s=high + call_s,
        rests_on=shares(parts),
        among=among,
        why_no_bound="" if looked else why_no_bound,
        more=more,
        **bound,  # type: ignore[arg-type]
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.0995 or share == 0 else f"{100 * share:.1f} %"


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"
