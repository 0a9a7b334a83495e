"""What was refused or failed and why, and every caution with its advice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from aivmm.probes.records import Caution, Failed, Measured, Outcome, Refused
from aivmm.reports import format as fmt
from aivmm.reports.data import ReportData

MOST_TROUBLES = 60
_KINDS = {"model": "whole model", "segment": "block", "operator": "operator", "transfer": "transfer"}


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """One reason, on one target, for one kind of thing; `subjects` are the things it hit."""

    target: str
    kind: str
    state: str  # "refused" or "failed"
    reason: str
    subjects: tuple[str, ...]
    output: str = ""


@dataclass(frozen=True, kw_only=True)
class Warned:
    """One caution, and all that it was said of."""

    caution: Caution
    about: tuple[str, ...]
    on_plan: bool


def troubles(data: ReportData) -> tuple[Trouble, ...]:
    """Group refusals and failures by target, kind and reason; failures first, then what hit most."""
    names = _names(data)
    groups: dict[tuple[str, str, str, str], list[str]] = {}
    outputs: dict[tuple[str, str, str, str], str] = {}
    for target, kind, state, reason, subject, output in _incidents(data, names):
        key = (target, kind, state, reason)
        groups.setdefault(key, []).append(subject)
        outputs.setdefault(key, output)
    found = [
        Trouble(target=key[0], kind=key[1], state=key[2], reason=key[3], subjects=tuple(dict.fromkeys(subjects)), output=outputs[key])
        for key, subjects in groups.items()
    ]
    return tuple(sorted(found, key=lambda each: (each.state != "failed", -len(each.subjects), each.target, each.kind, each.reason)))


def cautions(data: ReportData) -> tuple[Warned, ...]:
    """Gather the cautions of proofs and probes: those on the plan first. Equal messages are said once."""
    names = _names(data)
    about: dict[Caution, list[str]] = {}
    on_plan = {caution for proof in data.proofs if proof.role == "plan" for caution in proof.cautions}
    merged: dict[tuple[str, str], Caution] = {}  # by code and advice, since each message has its own numbers; the plan's own stand alone
    for proof in data.proofs:
        for caution in proof.cautions:
            kept = caution if caution in on_plan else merged.setdefault((caution.code, caution.advice), caution)
            about.setdefault(kept, []).append("the plan" if proof.role == "plan" else proof.name)
    for outcome in data.outcomes:
        if isinstance(outcome, Measured):
            for caution in outcome.cautions:
                kept = merged.setdefault((caution.code, caution.advice), caution)
                about.setdefault(kept, []).append(f"{_subject(outcome, names)} on {outcome.key.target}")
    found = [Warned(caution=caution, about=tuple(dict.fromkeys(each)), on_plan=caution in on_plan) for caution, each in about.items()]
    return tuple(sorted(found, key=lambda each: (not each.on_plan, -len(each.about), each.caution.code)))


def _incidents(data: ReportData, names: dict[str, str]) -> Iterator[tuple[str, str, str, str, str, str]]:
    for proof in data.proofs:
        if proof.samples is None:
            yield proof.target, proof.role, "failed", proof.why_not or "no reason was stored", proof.name, ""
    for outcome in data.outcomes:
        kind = _KINDS[outcome.key.kind]
        if isinstance(outcome, Refused):
            yield outcome.key.target, kind, "refused", outcome.reason, _subject(outcome, names), ""
        elif isinstance(outcome, Failed):
            yield outcome.key.target, kind, "failed", outcome.reason, _subject(outcome, names), outcome.output
    for trial in data.trials:
        if trial.state in ("refused", "failed"):
            yield trial.target, "trial", trial.state, trial.reason or "no reason was stored", f"#{trial.number} {trial.config}", ""


def _names(data: ReportData) -> dict[str, str]:
    """Return what people call each subject of a probe."""
    if data.structure is None:
        return {}
    names = {operator.signature: operator.description or operator.op_type for operator in data.structure.operators}
    for block in reversed(data.structure.blocks):  # the first of several alike gives the name
        names[block.content] = names[block.structure] = f"block {block.index}"
    names[data.structure.content] = names[data.structure.structure] = "the whole model"
    return names


def _subject(outcome: Outcome, names: dict[str, str]) -> str:
    name = names.get(outcome.key.subject, f"{_KINDS[outcome.key.kind]} {outcome.key.subject[:12]}")
    config = outcome.key.config
    return f"{name} ({fmt.shorten(str(config), 60)})" if config.settings or config.precision else name
