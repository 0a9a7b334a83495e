"""What a target refuses of a model, found in a few compiles, and the layout of blocks that follows from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from aivmm.errors import AivmmError
from aivmm.models.graph import analyse
from aivmm.models.order import PreparedGraph
from aivmm.models.records import Structure
from aivmm.models.slice import Slicer, WeightStore
from aivmm.probes import wire
from aivmm.probes.client import WorkerDied, compile_limit_s
from aivmm.probes.lab import Lab
from aivmm.runtime.config import Config
from aivmm.runtime.target import Target
from aivmm.tuner.halving import Halving, OddRun

_MOST_COMPILES = 48  # beyond it what is left counts as refused: so scattered a refusal leaves no run worth a plan


class Refusals(Halving):
    """Finds what `target` refuses of the prepared model at `model`, of which it is known that it refuses the whole.

    Operators like one that was refused alone are taken for refused without another compile. Once `stop` says so nothing more is compiled,
    and what is not known to be taken counts as refused.
    """

    def __init__(
        self, lab: Lab, target: Target, model: Path, structure: Structure, folder: Path, *, stop: Callable[[], bool] = lambda: False
    ) -> None:
        self._lab, self._target, self._folder = lab, target, folder
        self._slicer = Slicer(PreparedGraph(model, pieces=structure.pieces))
        super().__init__(self._slicer.prepared, structure, stop=stop, most_trials=_MOST_COMPILES)
        by_node = {node: each.signature for each in structure.operators for node in each.nodes}
        self._signatures = [by_node.get(node.name or "", "") for node in self._prepared.nodes]
        self._refused_alone: dict[str, str] = {}  # signature of an operator -> the reason

    @property
    def compiles(self) -> int:
        """How often something was compiled."""
        return self.trials

    def find(self, reason: str) -> list[OddRun]:
        """Return the refused runs in order; `reason` is why the whole is refused."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._weights = WeightStore(self._folder / "weights.bin")
        with self._slicer:
            return self.odd_runs(0, len(self._prepared.nodes), reason)

    def _known(self, start: int, end: int) -> str:
        return next((reason for each in self._signatures[start:end] if (reason := self._refused_alone.get(each))), "")

    def _leaf(self, start: int, end: int, reason: str) -> OddRun:
        if end - start == 1 and self._signatures[start]:
            self._refused_alone[self._signatures[start]] = reason
        return super()._leaf(start, end, reason)

    def _try(self, start: int, end: int) -> str:
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


def as_laid_out_before(structure: Structure, model: Path, stored: Structure | None) -> Structure:
    """Return the layout of blocks that an earlier run found better for `structure`, that of `model`: its measurements are then found again.

    The database may be anybody's: what is stored is taken only where it fits this very model, its names included.
    """
    if stored is None or stored.node_count != structure.node_count:
        return structure
    bare = structure
    if stored.pieces != structure.pieces:
        try:
            bare = analyse(model, pieces=stored.pieces)
        except ValueError:  # pieces of a model that is the same but for its names
            return structure
    starts = {block.first for block in stored.blocks}
    return stored if stored.cut_points == bare.cut_points and {block.first for block in bare.blocks} <= starts else structure
