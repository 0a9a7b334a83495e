"""Whether the search that a plan rests on was disturbed by what passes, so that it deserves to be measured again."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from aivmm.probes.records import Caution, Measured, Outcome
from aivmm.tuner.proof import Proof

# What need not be so the next time: of a quota or a capped clock another search would find the same.
_PASSES = frozenset({"machine-busy", "clock-fell", "thermal", "on-battery", "card-shared", "gpu-clock-moved"})
_MOST = 0.5  # of the races: a burst of something else now and then is met by every search, and races are made to stand it
_AGAIN = "tune again"  # how advice ends that is completed here
_FIGURES = re.compile(r"\d+(?:\.\d+)?")


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
    if len(cautions) <= _MOST * len(races):
        return ""
    count = f"{len(cautions)} of {len(races)} races" if len(races) > 1 else "the only race"
    what = f"{count} of the search {'were' if len(races) > 1 else 'was'} disturbed ({_typical(cautions).message})"
    if searched_before:
        return f"what an earlier run measured is used again, and {what}: --fresh measures all of it again"
    return f"{what}, so another plan may be better: once that has ended, tune again with --fresh"


def of_search(caution: Caution) -> Caution:
    """Return a caution of a search with all of its advice: what was searched is used again unless --fresh is given."""
    return _advised(caution, " with --fresh")


def told_of_proof(proof: Proof, *, search_disturbed: bool) -> list[str]:
    """Complete the advice of a proof's cautions, which its records hand to the report, and return the same for the terminal.

    Each run proves anew, so --fresh is needed only where the search was disturbed as well.
    """
    more = " with --fresh" if search_disturbed else ": what was searched is kept"
    proof.cautions = tuple(_advised(each, more) for each in proof.cautions)
    return [f"while the plan was proven, {each.message}: {each.advice}" for each in proof.cautions]


def _advised(caution: Caution, more: str) -> Caution:
    return replace(caution, advice=f"{caution.advice}{more}") if caution.advice.endswith(_AGAIN) else caution


def _typical(cautions: Sequence[Caution]) -> Caution:
    """Return the middle one, by its figures, of those with the commonest code; those of one code differ in nothing else."""
    (code, _), *_ = Counter(each.code for each in cautions).most_common(1)
    alike = [each for each in cautions if each.code == code]
    return sorted(alike, key=lambda each: [*map(float, _FIGURES.findall(each.message))])[(len(alike) - 1) // 2]
