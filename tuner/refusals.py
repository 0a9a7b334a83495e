"""What a target refuses of a model, found in a few compiles: runs of nodes are compiled, and halved where they are refused.

One refused operator among n cut points costs about log2(n) compiles, since of two halves of a refused run the second need not be compiled
when the first is taken. Operators like one that was refused alone are taken for refused without another compile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from aivmm.errors import AivmmError
from aivmm.models.graph import cut_further
from aivmm.models.records import Structure
from aivmm.models.slice import Slicer, WeightStore
from aivmm.probes import wire
from aivmm.probes.client import WorkerDied, compile_limit_s
from aivmm.probes.lab import Lab
from aivmm.runtime.config import Config
from aivmm.runtime.target import Target

_MOST_COMPILES = 48  # beyond it what is left counts as refused: so scattered a refusal leaves no run worth a plan
_GAVE_UP = "it lies in a part that is refused; there was no time, or too much is refused, to look further"


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusedRun:
    """The nodes [first, last], which lie between neighbouring cut points, and why the target does not take them."""

    first: int
    last: int
    op_types: tuple[str, ...]
    reason: str


class Refusals:
    """Finds what `target` refuses of the prepared model at `model`, of which it is known that it refuses the whole.

    Once `stop` says so nothing more is compiled, and what is not known to be taken counts as refused.
    """

    def __init__(
        self, lab: Lab, target: Target, model: Path, structure: Structure, folder: Path, *, stop: Callable[[], bool] = lambda: False
    ) -> None:
        self.compiles = 0
        self._stop = stop
        self._lab, self._target, self._model, self._folder = lab, target, model, folder
        self._structure = structure
        self._places = [cut.position for cut in structure.cut_points]
        self._starts = {block.first for block in structure.blocks}
        self._signatures: list[str] = []  # of each node's operator
        self._known: dict[str, str] = {}  # signature of an operator that was refused alone -> the reason

    def find(self, reason: str) -> list[RefusedRun]:
        """Return the refused runs in order; `reason` is why the whole is refused."""
        self._folder.mkdir(parents=True, exist_ok=True)
        by_node = {node: each.signature for each in self._structure.operators for node in each.nodes}
        with Slicer(self._model) as self._slicer:
            nodes = self._slicer.prepared.nodes
            self._weights = WeightStore(self._folder / "weights.bin")
            self._signatures = [by_node.get(node.name or "", "") for node in nodes]
            return self._refused(0, len(nodes), reason)

    def _refused(self, start: int, end: int, reason: str, *, seen: bool = True) -> list[RefusedRun]:
        """Return the refused runs within one that is refused as a whole; `seen` tells whether that was compiled, or follows."""
        middle = self._middle(start, end)
        if middle is None and not seen:
            reason = self._why_refused(start, end)  # it may be taken alone: then nothing but the combination is refused
        if middle is None or reason == _GAVE_UP:
            return [self._leaf(start, end, reason)] if reason else []
        before = self._why_refused(start, middle)
        found = self._refused(start, middle, before) if before else []
        # What is refused as a whole is refused in one half at least.
        after = self._why_refused(middle, end) if before else reason
        return found + (self._refused(middle, end, after, seen=bool(before)) if after else [])

    def _leaf(self, start: int, end: int, reason: str) -> RefusedRun:
        if end - start == 1 and self._signatures[start]:
            self._known[self._signatures[start]] = reason
        nodes = self._slicer.prepared.nodes[start:end]
        return RefusedRun(first=start, last=end - 1, op_types=tuple(dict.fromkeys(each.op_type for each in nodes)), reason=reason)

    def _middle(self, start: int, end: int) -> int | None:
        """Return the place to cut a run at: the one nearest its middle, and one between blocks if there is any."""
        inner = [place for place in self._places if start < place < end]
        between = [place for place in inner if place in self._starts]
        return min(between or inner, key=lambda place: abs(2 * place - start - end), default=None)

    def _why_refused(self, start: int, end: int) -> str:
        """Return why the target refuses the run, or ""."""
        known = next((reason for each in self._signatures[start:end] if (reason := self._known.get(each))), "")
        if known:
            return known
        if self.compiles >= _MOST_COMPILES or self._stop():
            return _GAVE_UP
        self.compiles += 1
        path = self._folder / "run.onnx"
        try:
            self._slicer.write(start, end - 1, path, weights=self._weights)
            self._lab.worker(self._target.runtime).call(
                "accepts",
                limit_s=compile_limit_s(),
                model=str(path),
                target=wire.target_out(self._target),
                config=wire.config_out(Config(precision="fp32").compiled_for(self._target.precisions)),
            )
        except AivmmError as error:
            return error.message
        except WorkerDied as died:
            return died.reason
        return ""


def refine(structure: Structure, model: Path, refused: Sequence[RefusedRun]) -> Structure:
    """Return the structure with its blocks cut around what is refused, so that the rest of them can be placed."""
    edges = {run.first for run in refused} ^ {run.last + 1 for run in refused}  # neighbours that are both refused stay together
    return cut_further(model, structure, edges & {cut.position for cut in structure.cut_points})


def as_refined_before(structure: Structure, stored: Structure | None) -> Structure:
    """Return the structure as an earlier run cut it around what was refused, if one did, so that its measurements are found again."""
    if stored is None or stored.cut_points != structure.cut_points or stored.node_count != structure.node_count:
        return structure
    starts = {block.first for block in stored.blocks}
    return stored if {block.first for block in structure.blocks} <= starts else structure
