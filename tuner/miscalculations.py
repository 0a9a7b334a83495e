"""What a target computes wrong within a block, found in a few runs: halves of it are compared with a target that is trusted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from aivmm.errors import AivmmError
from aivmm.models.order import PreparedGraph
from aivmm.models.records import Block, Structure
from aivmm.models.slice import Slicer, WeightStore
from aivmm.probes.arrays import load_arrays, save_arrays
from aivmm.probes.client import WorkerDied
from aivmm.probes.lab import Lab
from aivmm.runtime.config import Config
from aivmm.runtime.target import Target
from aivmm.tuner.anatomy import answers, tolerance, wrong_numbers
from aivmm.tuner.halving import Halving, OddRun

_MOST_RUNS = 24  # of one target: so much that is wrong leaves nothing worth a plan
_NOT_TRUSTED = "nothing else takes it, so that its numbers cannot be judged"


class _Answered(NamedTuple):
    """A part of a block on disk, with right values of what it reads and writes."""

    model: Path
    inputs: Path
    outputs: Path


class Miscalculations(Halving):
    """Finds what `target` computes wrong in blocks of the prepared model at `model`, compared with the first of `trusted` that takes it."""

    def __init__(
        self,
        lab: Lab,
        target: Target,
        model: Path,
        structure: Structure,
        folder: Path,
        *,
        trusted: Sequence[Target],
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._lab, self._target, self._folder = lab, target, folder
        self._trusted = [each for each in trusted if each != target]
        self._slicer = Slicer(PreparedGraph(model, pieces=structure.pieces))
        super().__init__(self._slicer.prepared, structure, stop=stop, most_trials=_MOST_RUNS)
        folder.mkdir(parents=True, exist_ok=True)
        self._weights = WeightStore(folder / "weights.bin")
        self._start = 0  # of the block
        self._values: dict[str, Any] = {}  # of tensors that its nodes read, by trusted targets

    def within(self, block: Block, inputs: Path, reason: str) -> list[OddRun]:
        """Return the runs of a block that are wrong; `inputs` has what it reads, and `reason` says what is wrong with it as a whole."""
        self._start, self._values = block.first, dict(load_arrays(str(inputs)))
        return self.odd_runs(block.first, block.last + 1, reason)

    def close(self) -> None:
        """Let go of the model's files."""
        self._slicer.close()

    def _try(self, start: int, end: int) -> str:
        part = self._answered(start, end)
        if part is None:
            return _NOT_TRUSTED
        try:
            loaded = self._lab.load(part.model, self._target, Config(precision="fp32"), inputs=part.inputs, reference=part.outputs)
            self._lab.unload(loaded.contestant)
        except AivmmError as error:
            return error.message
        except WorkerDied as died:
            return died.reason
        most = tolerance(self._target, {node.op_type for node in self._prepared.nodes[start:end]})
        return wrong_numbers(loaded.problem, loaded.accuracy.get("relative_l2", 0.0), most)

    def _answered(self, start: int, end: int) -> _Answered | None:
        """Run the nodes [start, end) of the block on a trusted target, and learn the values they make; None where none takes them."""
        stem = self._folder / f"{start}-{end}"
        found = _Answered(stem.with_suffix(".onnx"), stem.with_suffix(".inputs.npz"), stem.with_suffix(".outputs.npz"))
        part = self._slicer.write(start, end - 1, found.model, weights=self._weights)
        known = all(each.name in self._values for each in part.inputs)
        if not known and self._answered(self._start, start) is None:
            return None
        save_arrays(found.inputs, {each.name: self._values[each.name] for each in part.inputs})
        if not any(answers(self._lab, found.model, each, found.inputs, found.outputs) for each in self._trusted):
            return None
        self._values |= load_arrays(str(found.outputs))
        return found
