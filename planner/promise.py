"""What was expected of a plan beside what its proof found, and whether the one held.

Search and proof are minutes apart, and a host that changes its speed in between makes any number of seconds wrong. What the search can
promise is a ratio to one reference, which took turns with the candidate then and takes turns with the plan in the proof. So a promise is
kept or missed by that ratio; seconds are told beside it, as they were and as the reference says that they have become.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from aivmm.planner.constraints import human

_Z95 = 1.96
_MOVED = 0.04  # two loads of the same thing differ by as much on a machine that has not changed (`probes.compare.APART`, twice, at 95 %)
_TOLD = 0.005  # what rounds to 0 % is no news


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """The promise and the proof of one plan. Seconds are of one call; ratios are of its time per sample to the reference's.

    A sample's time is that from one answer to the next over the batch, so that what answers twice as much in a second is at 0.5, however
    many callers or samples in a batch that took. A sigma is the standard deviation of a ratio's logarithm: the promise's has the
    differences between processes in it, the proof's is the noise of its rounds alone. What is not known is None: the ratios where the
    reference was not in the proof, or is the plan itself.
    """

    reference: str
    expected_s: float
    proven_s: float
    ratio: float | None = None
    sigma: float = 0.0
    proven_ratio: float | None = None
    proven_sigma: float = 0.0
    reference_s: float | None = None  # of one call of the reference in the search
    reference_proven_s: float | None = None  # ... and in the proof
    reference_proven_interval_s: tuple[float, float] | None = None  # ... 95 % of it
    is_reference: bool = False  # the plan is what all are compared with
    per_sample: bool = False  # plan and reference differ in batch or callers, so that a ratio of calls would be another one

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the promised ratio."""
        return None if self.ratio is None else _interval(self.ratio, self.sigma)

    @property
    def proven_interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the proven ratio."""
        return None if self.proven_ratio is None else _interval(self.proven_ratio, self.proven_sigma)

    @property
    def off(self) -> float | None:
        """Proven over promised, less 1: above 0 it takes longer than promised. None where there is no ratio to judge."""
        if self.is_reference or self.ratio is None or self.proven_ratio is None:
            return None
        return self.proven_ratio / self.ratio - 1

    @property
    def kept(self) -> bool | None:
        """Say whether the two ratios are within what their errors allow (`kept`); None where nothing can tell, or there is no ratio."""
        if self.off is None or self.ratio is None or self.proven_ratio is None:
            return None
        return kept(self.ratio, self.proven_ratio, self.sigma, self.proven_sigma)

    @property
    def moved(self) -> float | None:
        """How much longer (below 0 shorter) the reference took in the proof than in the search, as a share; None when that is not known."""
        return self.reference_proven_s / self.reference_s - 1 if self.reference_s and self.reference_proven_s else None

    @property
    def by_reference_s(self) -> float | None:
        """What was expected, at the speed that the reference shows the machine to have had in the proof."""
        return None if self.moved is None else self.expected_s * (1 + self.moved)

    @property
    def sentence(self) -> str:
        """All of it for a reader, in one or two sentences."""
        return ". ".join(filter(None, (self._by_ratio, self._in_time))) + "."

    @property
    def short(self) -> tuple[str, str]:
        """The outcome in two lines, where there is no room for the sentence."""
        proven = f"proven {_told(self.proven_s)}"
        if self.is_reference:
            return f"{proven}{self._by_how_much}", "the reference itself, so no ratio was promised"
        if self.off is None:
            return proven, "no ratio to judge by"
        ratios = f"{self._outcome}: {self.ratio:.3g} of the reference's time{self._of_what}, proven {self.proven_ratio:.3g}"
        if self._changed and self.by_reference_s:
            return ratios, f"{_told(self.by_reference_s)} at its speed in the proof; {proven}"
        return ratios, proven

    @property
    def _outcome(self) -> str:
        if self.kept is None or self.off is None:
            return "too few or too unsteady rounds to tell"
        if self.kept:
            return "kept"
        # Who got less time than he was promised has lost nothing; that the promise was wrong is said all the same (`kept` is False).
        return f"missed, {_taken(self.off).removesuffix(' time')}" if self.off > 0 else f"better than promised, {_taken(self.off)}"

    @property
    def _of_what(self) -> str:
        return " per sample" if self.per_sample else ""

    @property
    def _by_how_much(self) -> str:
        off = self.proven_s / self.expected_s - 1
        return f": {_taken(off)}" if abs(off) >= _TOLD else ""

    @property
    def _changed(self) -> bool:
        """Whether the reference took another time than two loads of it on the same machine, and than its rounds in the proof leave open."""
        if self.moved is None:
            return False
        low, high = self.reference_proven_interval_s or (1.0, 1.0)
        return abs(math.log1p(self.moved)) > math.hypot(_MOVED, math.log(high / low) / 2)

    @property
    def _by_ratio(self) -> str:
        """The promise as a ratio and what became of it; "" without one."""
        if self.off is None:
            return ""
        promised, proven = (_within(each) for each in (self.interval, self.proven_interval))
        time = f"{self.ratio:.3g} of the time{self._of_what} of {self.reference}{promised}"
        return f"{time}, proven {self.proven_ratio:.3g}{proven}: {self._outcome}"

    @property
    def _in_time(self) -> str:
        """The promise in seconds: as it was, as the reference corrects it where that changed, and what was proven."""
        expected, proven = f"{_told(self.expected_s)}{' a call' if self.per_sample else ''}", _told(self.proven_s)
        if self.is_reference:
            told = f"{expected} expected, {proven} proven{self._by_how_much}"
            return f"{told}. The plan is what the others are timed against, so no ratio was promised"
        if self.moved is None or self.by_reference_s is None:
            without = f"; {self.reference} was not proven beside it, so nothing tells an error from a change of the machine"
            return f"{expected} expected, {proven} proven{without if self.reference else ''}"
        if not self._changed:
            return f"{expected} expected, {proven} proven"
        changed = f"{self.reference} took {_taken(self.moved)} in the proof"
        return f"{expected} expected; {changed}: {_told(self.by_reference_s)} by that, {proven} proven"

    def as_json(self) -> dict[str, Any]:
        """Return what `tune --json` has beside what was expected."""
        return {
            "ratio_interval": None if self.interval is None else list(self.interval),
            "proven_ratio": self.proven_ratio,
            "proven_interval": None if self.proven_interval is None else list(self.proven_interval),
            "kept": self.kept,
            "reference_s": self.reference_s,
            "reference_proven_s": self.reference_proven_s,
            "reference_proven_interval_s": None if self.reference_proven_interval_s is None else list(self.reference_proven_interval_s),
            "by_reference_s": self.by_reference_s,
            "sentence": self.sentence,
        }


def unpromised() -> dict[str, Any]:
    """Return the keys of `Promise.as_json` where nothing was promised: None each, and no sentence."""
    keys = Promise(reference="", expected_s=1.0, proven_s=1.0).as_json()  # whatever the seconds are, they are not returned
    return {**dict.fromkeys(keys), "sentence": ""}


def kept(promised: float, proven: float, sigma: float, proven_sigma: float) -> bool | None:
    """Say whether two ratios are within the 95 % that their errors make together; a sigma is of a ratio's logarithm.

    None where they are and that means nothing, since the proof leaves more open than the promise did: a proof of two rounds would keep
    nearly all. What is beyond even a wide interval is missed.
    """
    if abs(math.log(proven / promised)) > _Z95 * math.hypot(sigma, proven_sigma):
        return False
    return True if proven_sigma <= sigma else None


def _interval(middle: float, sigma: float) -> tuple[float, float]:
    return middle * math.exp(-_Z95 * sigma), middle * math.exp(_Z95 * sigma)


def _within(interval: tuple[float, float] | None) -> str:
    """Return an interval in brackets; "" where both ends read the same, since it would claim more than is known."""
    low, high = (f"{each:.3g}" for each in interval or (0.0, 0.0))
    return f" ({low} to {high})" if low != high else ""


def _taken(moved: float) -> str:
    return f"{1 + moved:.2g} times as long" if moved >= 1 else f"{abs(moved) * 100:.0f} % {'less' if moved < 0 else 'more'} time"


def _told(seconds: float) -> str:
    return human(seconds, "latency")
