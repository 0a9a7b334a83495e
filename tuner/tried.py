"""Plans whose parts run at once, as they were tried: what each promised, whether it was proven, and why it is not the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from aivmm.planner.constraints import human
from aivmm.tuner.proof import Entrant, Proof, typical_s

KINDS = {"copies": "copies", "pipeline": "a pipeline"}
Pair = tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """The best plan of one kind. Rates are samples a second; `best_per_s` is what the best other plan promised, that it had to beat.

    `hoped`: nothing was measured, since even parts that cost each other nothing would not be enough; or, where it is `unmeasurable`, since
    that was tried and failed. `whole`: it was measured with all of its parts at once, so that the promise is no sum. `entrant` is its
    name in the proof, where it was proven.
    """

    kind: Literal["copies", "pipeline"]
    text: str
    promised_per_s: float
    hoped: bool = False
    unmeasurable: bool = False
    whole: bool = False
    best_per_s: float | None = None
    factors: Mapping[Pair, float] = field(default_factory=dict)
    entrant: str = ""

    def as_json(self, proof: Proof) -> dict[str, Any]:
        """Return it as `tune --json` has it."""
        return {
            "kind": self.kind,
            "what": self.text,
            "promised_per_s": self.promised_per_s,
            "assumes_no_contention": self.hoped,
            "measured_whole": self.whole,
            "could_not_be_measured": self.unmeasurable,
            "to_beat_per_s": self.best_per_s,
            "factors": [{"slowed": slowed, "beside": beside, "factor": factor} for (slowed, beside), factor in self.factors.items()],
            "proven_per_s": self._proven_per_s(proof),
            "entrant": bool(self.entrant),
            "is_plan": self._is_plan(proof),
            "sentence": self.sentence(proof),
        }

    def sentence(self, proof: Proof) -> str:
        """Say what came of it."""
        what, promised = f"{KINDS[self.kind]} ({self.text})", human(self.promised_per_s, "throughput")
        best = "" if self.best_per_s is None else f", and {human(self.best_per_s, 'throughput')} is promised without"
        if self.hoped:
            why = "could not be measured" if self.unmeasurable else "not measured"
            return f"{what} would answer {promised} if the parts cost each other nothing{best}: {why}"
        if not self.entrant:
            if self.whole:
                return f"{what} answered {promised}{best}: not proven"
            return f"{what} promises {promised} by what the parts were seen to cost each other{best}: not proven"
        proven = self._proven_per_s(proof)
        if proven is None:
            return f"{what} promised {promised}, and could not be proven: {self._problem(proof)}"
        if self._is_plan(proof):
            return f"{what} promised {promised}, was proven with {human(proven, 'throughput')}, and is the plan"
        plan = None if proof.plan is None else _rate(proof.plan)
        instead = f"; {self._problem(proof)}" if plan is None else f", the plan with {human(plan, 'throughput')}"
        return f"{what} promised {promised} and was proven with {human(proven, 'throughput')}{instead}"

    def _entrant(self, proof: Proof) -> Entrant | None:
        return next((each for each in proof.entrants if each.draft.name == self.entrant), None) if self.entrant else None

    def _proven_per_s(self, proof: Proof) -> float | None:
        found = self._entrant(proof)
        return None if found is None else _rate(found)

    def _is_plan(self, proof: Proof) -> bool:
        return proof.plan is not None and proof.plan.draft.name == self.entrant

    def _problem(self, proof: Proof) -> str:
        found = self._entrant(proof)
        reasons = [each.sentence for each in proof.violations.get(self.entrant, ())]
        if found is not None and found.contestant is not None:
            reasons += filter(None, (str(found.contestant.failed or ""), found.contestant.dropped))
        return (found.problem if found is not None else "") or "; ".join(reasons) or "the proof had no room for it"


def _rate(entrant: Entrant) -> float | None:
    """Return the samples a second that an entrant was seen to answer; of one that left the race early, while it was in it."""
    samples = entrant.confirmed or entrant.choosing
    return entrant.metrics.get("throughput_per_s") or (entrant.draft.batch / typical_s(entrant, samples) if samples is not None else None)
