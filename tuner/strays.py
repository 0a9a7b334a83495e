"""Nodes that an accelerator left to the CPU: counted for each candidate, and for the plan also what they cost, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aivmm.planner.candidates import Piece
from aivmm.planner.constraints import human
from aivmm.probes import wire
from aivmm.probes.client import Worker, compile_limit_s, run_limit_s
from aivmm.probes.records import Caution
from aivmm.runtime.bundle import PLAN_FILE
from aivmm.runtime.plan import Stage, parse_plan
from aivmm.runtime.target import Target

_NAMED = 4  # how many are named in a sentence
_ADVICE = "bind shapes that are open (--shape, --dim), or place these operators elsewhere (--cut-around)"


def cautions(target: Target, nodes: Mapping[str, int], strays: Sequence[str], count: int) -> tuple[Caution, ...]:
    """Return the caution that `count` nodes, the first of which are `strays`, are not on the target; nothing where there are none."""
    if not count or target.device.kind == "cpu":
        return ()
    message = f"{count} of {sum(nodes.values())} nodes are not on {target} but on the CPU: {_named(strays, count)}"
    return (Caution(code="stray-nodes", message=message, advice=_ADVICE),)


def explained(
    worker: Worker, stages: Sequence[Stage], pieces: Sequence[Piece], bundle: Path, sample: Path, scratch: Path
) -> dict[str, Any]:
    """Profile each stage on an accelerator in `worker`; return `metrics` and a `sentence`, or neither where every node is on its device.

    `metrics` are `stray_nodes`, `stray_copies` and `stray_s`, the seconds of one call that both take.

    Raises:
        WorkerDied, Unsupported: a stage cannot be profiled.
    """
    nodes: list[list[Any]] = []
    copies: list[list[Any]] = []
    call_s = 0.0
    for number, (stage, piece) in enumerate(zip(stages, pieces, strict=True)):
        if piece.target.device.kind == "cpu":
            continue
        answer = worker.call(
            "strays",
            limit_s=compile_limit_s() + run_limit_s(),
            model=str(bundle / stage.model),
            target=wire.target_out(piece.target),
            config=wire.config_out(stage.compiled_with.compiled_for(piece.target.precisions)),
            inputs=str(sample) if number == 0 and len(stages) == 1 else "",
            folder=str(scratch),
        )
        nodes += answer.get("nodes", [])
        copies += answer.get("copies", [])
        call_s += answer.get("call_s", 0.0)
    if not nodes and not copies:
        return {}
    seconds = sum(each[2] for each in (*nodes, *copies))
    return {
        "metrics": {"stray_nodes": float(len(nodes)), "stray_copies": float(len(copies)), "stray_s": seconds},
        "sentence": _sentence(nodes, copies, seconds, call_s),
    }


def _sentence(nodes: Sequence[Sequence[Any]], copies: Sequence[Sequence[Any]], seconds: float, call_s: float) -> str:
    ranked = sorted(nodes, key=lambda each: -each[2])
    what = (
        f"{len(nodes)} {'node runs' if len(nodes) == 1 else 'nodes run'} on the CPU ({_named([f'{each[1]} {each[0]}' for each in ranked])})"
    )
    between = f"with {len(copies)} {'copy' if len(copies) == 1 else 'copies'} to and from it" if copies else "without copies"
    return f"{what}, {between}: they take {human(seconds, 'latency')} of a profiled call of {human(call_s, 'latency')}."


def _named(names: Sequence[str], count: int | None = None) -> str:
    more = (len(names) if count is None else count) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def read_stages(bundle: Path) -> list[Stage]:
    """Return the stages of a bundle that we have written."""
    return parse_plan((bundle / PLAN_FILE).read_bytes(), str(bundle / PLAN_FILE)).stages
