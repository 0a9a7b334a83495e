"""From a draft to a bundle on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from aivmm.models.records import ModelFacts, Structure, Taken
from aivmm.planner.candidates import Draft, Piece
from aivmm.runtime.bundle import PLAN_FILE, write_bundle
from aivmm.runtime.config import Config
from aivmm.runtime.environment import environment_of
from aivmm.runtime.plan import Accuracy, Alternative, Certificate, Conditions, Execution, Model, Number, Plan, Stage, parse_plan, tensors
from aivmm.runtime.plan import Copy as PlannedCopy
from aivmm.runtime.plan import Taken as PlannedTaken
from aivmm.runtime.target import Target

if TYPE_CHECKING:
    from aivmm.models.slice import Segment

AddSegment = Callable[["Segment"], str]  # takes its files into a bundle; returns the name of its model there
_UNKNOWN_DIGEST = "0" * 64  # replaced by the real one when the bundle is written


@dataclass(frozen=True, slots=True, kw_only=True)
class Other:
    """A draft that a plan keeps for another goal, with the numbers of its proof; `emitter` writes at its batch."""

    draft: Draft
    objective: str
    expected: Mapping[str, Number]
    emitter: Emitter


class Emitter:
    """Writes bundles for one model at one batch. Segments are sliced once, however many drafts use them."""

    def __init__(
        self,
        prepared: Path,
        facts: ModelFacts,
        structure: Structure,
        folder: Path,
        *,
        version: str,
        lowered: Callable[[str], Path] | None = None,
    ) -> None:
        """Write for the model at `prepared`; `lowered` gives the file of the same model lowered to a precision."""
        from aivmm.models.order import PreparedGraph  # here: it loads onnx_ir, a second before the first line is shown
        from aivmm.models.slice import Slicer, WeightStore

        self._facts = facts
        self._structure = structure
        self._folder = folder
        self._version = version
        self._slicer = Slicer(PreparedGraph(prepared, pieces=structure.pieces))
        self._segments: dict[tuple[int, int], Segment] = {}
        self._lowered = lowered
        self._lowered_segments: dict[str, Segment] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._weights = WeightStore(folder / "weights.bin")

    def write(
        self,
        draft: Draft,
        destination: Path,
        *,
        objective: str,
        constraints: Sequence[str] = (),
        expected: Mapping[str, Number] | None = None,
        accuracy: Accuracy | None = None,
        certificate: Certificate | None = None,
        fallbacks: Sequence[Draft] = (),
        alternatives: Sequence[Other] = (),
        verdict: str = "",
    ) -> Plan:
        """Write `draft` as a bundle and return its plan."""
        files: dict[str, Path] = {}
        add = partial(_add, files)
        stages = [self._stage(piece, add) for piece in draft.pieces]
        others = [Alternative(name=each.name, stages=[self._stage(piece, add) for piece in each.pieces]) for each in fallbacks]
        # Files of another batch have the names of ours, and other bytes where a weight hangs on the batch: ours take in what differs.
        kept = [each.emitter.alternative(each, add if each.emitter is self else partial(self._take_in, files)) for each in alternatives]
        everyone = (draft, *fallbacks, *(each.draft for each in alternatives))
        used: dict[str, Target] = {str(target): target for each in everyone for target in each.all_targets}
        plan = Plan(
            created_by=f"aivmm {self._version}",
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            model=Model(
                name=self._facts.name,
                sha256=self._facts.sha256,
                content=self._structure.content,
                category=self._facts.category.name,
                inputs=tensors(self._facts.inputs),
                outputs=tensors(self._facts.outputs),
                taken=[_taken(each) for each in self._facts.taken],
            ),
            objective=objective,
            constraints=list(constraints),
            batch=draft.batch,
            callers=draft.callers,
            execution=Execution(mode=draft.mode, depth=draft.depth),
            stages=stages,
            expected=dict(expected or {}),
            accuracy=accuracy,
            certificate=certificate,
            environments=[_conditions(target) for target in used.values()],
            alternatives=kept,
            fallbacks=others,
            verdict=verdict,
            files=dict.fromkeys(files, _UNKNOWN_DIGEST),
        )
        write_bundle(destination, plan, files)
        return parse_plan((destination / PLAN_FILE).read_bytes(), str(destination))  # with the digests of what was written

    def alternative(self, other: Other, add: AddSegment) -> Alternative:
        """Return a draft for another goal as a plan keeps it; `add` takes its segments into the bundle."""
        return Alternative(
            name=other.draft.name,
            objective=other.objective,
            batch=other.draft.batch,
            callers=other.draft.callers,
            execution=Execution(mode=other.draft.mode, depth=other.draft.depth),
            stages=[self._stage(piece, add) for piece in other.draft.pieces],
            expected=dict(other.expected),
        )

    def segment(self, first: int, last: int) -> Segment:
        """Return the segment of the blocks [first, last], written on first use; all share one file of weights."""
        if (first, last) not in self._segments:
            blocks = self._structure.blocks
            partial = self._folder / "partial.onnx"
            made = self._slicer.write(blocks[first].first, blocks[last].last, partial, weights=self._weights)
            # Hashes do not see names: runs that are alike, one after the other, still read and write other tensors.
            final = self._folder / f"{made.content[:32]}-{first}-{last}.onnx"
            partial.replace(final)
            self._segments[first, last] = replace(made, path=final)
        return self._segments[first, last]

    def node_names(self) -> list[list[str]]:
        """Return the names of each block's nodes, in order."""
        nodes = self._slicer.prepared.nodes
        return [[str(node.name) for node in nodes[block.first : block.last + 1]] for block in self._structure.blocks]

    def close(self) -> None:
        """Let go of the model's files."""
        self._slicer.close()

    def _lowered_whole(self, precision: str) -> Segment:
        """Return the whole model in a lowered form, as one segment."""
        assert self._lowered is not None
        from aivmm.models.slice import Slicer, WeightStore

        if precision not in self._lowered_segments:
            partial = self._folder / "partial.onnx"
            with Slicer(self._lowered(precision)) as slicer:
                made = slicer.write_whole(partial, weights=WeightStore(self._folder / f"weights-{precision.replace(':', '-')}.bin"))
            final = self._folder / f"{made.content[:32]}.onnx"
            partial.replace(final)
            self._lowered_segments[precision] = replace(made, path=final)
        return self._lowered_segments[precision]

    def _segment_of(self, piece: Piece, config: Config) -> Segment:
        lowered = config.lowered
        if lowered is None:
            return self.segment(piece.first, piece.last)
        if (piece.first, piece.last) != (0, len(self._structure.blocks) - 1):
            raise ValueError(f"blocks {piece.first} to {piece.last} in {lowered}: only whole models are lowered")
        return self._lowered_whole(lowered)

    def _take_in(self, files: dict[str, Path], segment: Segment) -> str:
        """Add another emitter's segment, its weights in our own file, where equal ones are there once; return the name of its model."""
        from aivmm.models.gather import Gatherer

        path, weights = Gatherer(self._folder, store=self._weights).take(segment.path)
        return _add(files, replace(segment, path=path, weights=weights))

    def _stage(self, piece: Piece, add: AddSegment) -> Stage:
        segment = self._segment_of(piece, piece.config)
        copies = [
            PlannedCopy(
                model=add(self._segment_of(piece, each.config)),
                target=str(each.target),
                precision=each.config.precision or "default",
                config=dict(each.config.settings),
                replicas=each.replicas,
                weight=each.weight,
                share=each.share,
            )
            for each in piece.copies
        ]
        return Stage(
            model=add(segment),
            target=str(piece.target),
            precision=piece.config.precision or "default",
            config=dict(piece.config.settings),
            replicas=piece.replicas,
            weight=piece.weight,
            share=piece.share,
            copies=copies,
            blocks=(piece.first, piece.last),
            inputs=tensors(segment.inputs),
            outputs=tensors(segment.outputs),
        )


def _add(files: dict[str, Path], segment: Segment) -> str:
    """Add a segment's files to those of a bundle; return the name of its model.

    Raises:
        ValueError: another file has the name of one of them.
    """
    for path in (segment.path, *segment.weights):
        held = files.setdefault(f"segments/{path.name}", path)
        if held != path:
            raise ValueError(f"{held} and {path} would be one file of the bundle")
    return f"segments/{segment.path.name}"


def _taken(given: Taken) -> PlannedTaken:
    steps = given.normalisation
    return PlannedTaken(
        name=given.name,
        model_dtype=given.model_dtype,
        dtype=given.dtype,  # type: ignore[arg-type]  # checked there
        mean=list(steps.mean) if steps else [],
        scale=list(steps.scale) if steps else [],
    )


def _conditions(target: Target) -> Conditions:
    fields = asdict(environment_of(target))
    fields["instruction_sets"] = list(fields["instruction_sets"])
    return Conditions(**fields)


def folder_bytes(folder: Path) -> int:
    """Return the size of all files below `folder`."""
    return sum(each.stat().st_size for each in folder.rglob("*") if each.is_file())
