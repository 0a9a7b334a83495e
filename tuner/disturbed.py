"""Whether the search that a plan rests on was disturbed by what passes, so that it deserves to be measured again."""

from __future__ import annotations

from collections.abc import Iterable

from aivmm.probes.records import Caution, Measured, Outcome

# What need not be so the next time: of a quota or a capped clock another search would find the same.
_PASSES = frozenset({"machine-busy", "clock-fell", "thermal", "on-battery", "card-shared", "gpu-clock-moved"})
_MOST = 0.5  # of the races: a burst of something else now and then is met by every search, and races are made to stand it


def disturbed(outcomes: Iterable[tuple[Outcome, bool]], *, searched_before: bool) -> str:
    """Say that most races of whole models among the outcomes of a run were disturbed, by what, and what helps; "" where they were not.

    `searched_before`: an earlier run measured them. Nothing is measured again for it: a user who repeats a command is promised that
    nothing but the proof is measured, and a search that had too little of the machine lacks more than the races of its finalists,
    which the proof runs anew in any case.
    """
    races: dict[str, Caution | None] = {}
    for outcome, _ in outcomes:
        if isinstance(outcome, Measured) and outcome.key.kind == "model":
            found = next((each for each in outcome.cautions if each.code in _PASSES), None)
            races[outcome.race] = races.get(outcome.race) or found
    cautions = [each for each in races.values() if each is not None]
    if not cautions or len(cautions) < _MOST * len(races):
        return ""
    middle = sorted(cautions, key=lambda each: each.message)[len(cautions) // 2]
    count = f"{len(cautions)} of {len(races)} races" if len(races) > 1 else "the only race"
    what = f"{count} of the search {'were' if len(races) > 1 else 'was'} disturbed ({middle.message})"
    if searched_before:
        return f"what an earlier run measured is used again, and {what}: --fresh measures all of it again"
    return f"{what}, so another plan may be better: once that has ended, tune again with --fresh"


def advice_on_proof(caution: Caution, *, search_disturbed: bool) -> str:
    """Return what helps a proof that was disturbed: each run proves anew, so --fresh is needed only where the search was as well."""
    again = "tune again with --fresh"
    return caution.advice if search_disturbed else caution.advice.replace(again, "tune again: what was searched is kept")
