"""The table that `cuts.py` writes: what a state folder says about cut and uncut."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SAME = 1e-5  # relative L2 that cut and uncut may differ by on one target whose kernels depend on what is fused
ACROSS = 1e-3  # and across targets
LANES = ("ORT plain", "ORT", "OpenVINO")
MIXES = (("ORT", "OpenVINO"), ("OpenVINO", "ORT"))
ALL_BLOCKS = -1  # in the place of a cut point's position: at all block boundaries at once
Comparison = tuple[float | None, bool, str]


@dataclass
class Tally:
    """What came out for one model on one lane or mix of two."""

    cuts: int = 0
    bitwise: int = 0
    worst: float = 0.0  # relative L2 over all outputs
    where: int = 0  # the cut point's position
    over: int = 0  # cuts beyond the limit
    refused: int = 0
    reason: str = ""
    blocks: float | None = None  # cut at all block boundaries at once; None: refused


@dataclass
class Found:
    """All of one model."""

    model: str
    error: str = ""
    nodes: int = 0
    cut_points: int = 0
    blocks: int = 0
    made: int = 0  # cuts that were tried, be it in vain
    seconds: float = 0.0  # of one process at a time
    whole: dict[str, str] = field(default_factory=dict)  # lane -> why the uncut model does not run there
    repeatable: dict[str, bool] = field(default_factory=dict)  # lane -> two runs of the uncut model agreed in every bit, each time
    across: float | None = None  # uncut OpenVINO against uncut ONNX Runtime
    crashed: list[str] = field(default_factory=list)
    tallies: dict[str, Tally] = field(default_factory=dict)
    where: Counter[str] = field(default_factory=Counter)  # the machines and versions -> cuts made there


def answers(state: Path) -> list[dict[str, Any]]:
    """Return the lines that `state` has of one model; what a killed process left half written is none."""
    found = []
    for file in sorted(state.glob("*.jsonl")):
        for line in file.read_text().splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found


def recalled(state: Path, model: str) -> Found:
    """Read what `state` has on `model`."""
    folder = state / model.replace(":", "_")
    if not (folder / "facts.json").exists():
        return Found(model=model, error="not run")
    facts = json.loads((folder / "facts.json").read_text())
    found = Found(model=model, **{**facts, "cut_points": len(facts.get("cut_points", []))})
    for answer in sorted(answers(folder), key=lambda line: line.get("position", 0)):
        _count(found, answer)
    return found


def _count(found: Found, answer: Mapping[str, Any]) -> None:
    if "crash" in answer:
        found.crashed.append(answer["crash"])
    position = answer.get("position")
    found.made += position not in (None, ALL_BLOCKS)
    found.seconds += answer.get("seconds", 0.0)
    found.where.update([answer["where"]] if "where" in answer else [])
    found.whole |= answer.get("whole", {})
    for lane, steady in answer.get("repeatable", {}).items():
        found.repeatable[lane] = steady and found.repeatable.get(lane, True)
    found.across = answer.get("across", found.across)
    for lane, (error, bitwise, reason) in answer.get("lanes", {}).items():
        tally = found.tallies.setdefault(lane, Tally())
        if position == ALL_BLOCKS:
            tally.blocks = error
        elif error is None:
            tally.refused += 1
            tally.reason = tally.reason or reason
        else:
            tally.cuts += 1
            tally.bitwise += bitwise
            tally.over += not error <= (ACROSS if "|" in lane else SAME)
            if not error <= tally.worst:
                tally.worst, tally.where = error, position


def report(state: Path, models: Sequence[str]) -> list[str]:
    """Return the file's lines."""
    found = [recalled(state, model) for model in models]
    columns = [*LANES, *map(" | ".join, MIXES)]
    titles = [title.replace(" | ", " then ") for title in columns]
    where: Counter[str] = sum((each.where for each in found), Counter())
    lines = [
        "# Cut and uncut",
        "",
        *(f"{count} cuts: {place}." for place, count in where.most_common()),
        "",
        f"Each cell: worst relative L2 error of all outputs over all cut points (at which position); how many cuts agree in every bit; how "
        f"many are beyond the limit, {SAME:g} on one target and {ACROSS:g} across; how many one of the runtimes refused. `uncut` is "
        "OpenVINO against ONNX Runtime without any cut: what the last two columns have to be read against.",
        "",
        f"| model | nodes | cut points | cut | {' | '.join(titles)} | uncut | seconds |",
        f"|{'---|' * (len(titles) + 6)}",
    ]
    for each in found:
        if each.error:
            lines.append(f"| {each.model} | not cut: {each.error} |{' |' * (len(titles) + 4)}")
            continue
        cells = [_cell(each.tallies.get(column, Tally())) for column in columns]
        uncut = "-" if each.across is None else f"{each.across:.1e}"
        counts = f"{each.nodes} | {each.cut_points} | {each.made}"
        lines.append(f"| {each.model} | {counts} | {' | '.join(cells)} | {uncut} | {each.seconds:.0f} |")
    return [*lines, "", *_sums(found, columns, titles), "", *_blocks(found), "", *_refusals(found)]


def _cell(tally: Tally) -> str:
    text = f"{tally.worst:.1e} (at {tally.where}); {tally.bitwise} of {tally.cuts} bitwise; {tally.over} over" if tally.cuts else "none ran"
    return text + (f"; {tally.refused} refused" if tally.refused else "")


def _sums(found: Sequence[Found], columns: Sequence[str], titles: Sequence[str]) -> list[str]:
    made, known = sum(each.made for each in found), sum(each.cut_points for each in found)
    lines = [f"{made} of {known} cut points of {len(found)} models.", ""]
    lines += ["| in sum | cuts compared | worst error | bitwise | over the limit | refused |", "|---|---|---|---|---|---|"]
    for column, title in zip(columns, titles, strict=True):
        each = [one.tallies[column] for one in found if column in one.tallies]
        numbers = (sum(tally.cuts for tally in each), f"{max((tally.worst for tally in each), default=0.0):.1e}")
        rest = (sum(tally.bitwise for tally in each), sum(tally.over for tally in each), sum(tally.refused for tally in each))
        lines.append(f"| {title} | {' | '.join(map(str, (*numbers, *rest)))} |")
    return lines


def _blocks(found: Sequence[Found]) -> list[str]:
    lines = [
        "Cut at all block boundaries at once, relative L2 against the uncut model on the same target:",
        "",
        f"| model | blocks | {' | '.join(LANES)} | the uncut model repeats itself bitwise |",
        f"|{'---|' * (len(LANES) + 3)}",
    ]
    for each in found:
        if not each.error:
            errors = [each.tallies.get(lane, Tally()).blocks for lane in LANES]
            cells = " | ".join("-" if error is None else f"{error:.1e}" for error in errors)
            steady = ", ".join(f"{lane} {'yes' if yes else 'no'}" for lane, yes in each.repeatable.items())
            lines.append(f"| {each.model} | {each.blocks} | {cells} | {steady} |")
    return lines


def _refusals(found: Sequence[Found]) -> list[str]:
    lines = [f"- {each.model}: {crash}" for each in found for crash in dict.fromkeys(each.crashed)]
    lines += [f"- {each.model}, whole, {lane}: {reason}" for each in found for lane, reason in each.whole.items()]
    lines += [f"- {each.model}, a piece, {lane}: {tally.reason}" for each in found for lane, tally in each.tallies.items() if tally.reason]
    return ["What crashed a process, and what was refused, with the first reason:", "", *(lines or ["- nothing"])]
