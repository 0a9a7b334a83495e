"""The workplace of one tuning: what all of its parts share."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import psutil

from aivmm.db.database import Database
from aivmm.models.records import Structure
from aivmm.planner.constraints import Constraint
from aivmm.probes.lab import Lab
from aivmm.probes.race import RaceState
from aivmm.runtime.target import Target, Unavailable
from aivmm.tuner.emit import Emitter
from aivmm.tuner.options import DEFAULT_BATCHES, LARGE_BATCHES, TuneOptions
from aivmm.tuner.progress import Progress
from aivmm.tuner.subject import Subject
from aivmm.tuner.text import printable
from aivmm.tuner.verdict import time_text


@dataclass(slots=True, kw_only=True)
class Work:
    """One tuning under way. `run_id` names its row in the database; `notes` are what its reader should know."""

    options: TuneOptions
    progress: Progress
    started: float  # of time.perf_counter
    database: Database
    lab: Lab
    folder: Path
    subject: Subject
    targets: Sequence[Target]
    all_targets: Sequence[Target]
    unavailable: Sequence[Unavailable]
    constraints: Sequence[Constraint]
    cosine_limit: float | None  # None when accuracy is limited in another way
    run_id: str
    asked: Callable[[], bool]  # True once the user wants an end: what is running is finished, nothing new is begun
    notes: list[str] = field(default_factory=list)
    variants: dict[str, Sequence[str]] = field(default_factory=dict)  # by str(target): the lowered models that its search may use
    taken_whole: bool = True  # False once it is known that no target takes the model whole
    _emitters: dict[int, Emitter] = field(default_factory=dict)
    _layouts: int = 0  # that the blocks have had

    def elapsed(self) -> float:
        """Return seconds since the start."""
        return time.perf_counter() - self.started

    def note(self, text: str) -> None:
        """Tell the user something, now and in the report."""
        text = printable(text)
        if text not in self.notes:
            self.notes.append(text)
            self.progress.note(text)

    def tell_race(self, state: RaceState) -> None:
        """Show how a race goes."""
        best = f"best so far {time_text(min(state.leader.durations))}" if state.leader else ""
        self.progress.detail(f"round {state.round}, {state.racing} candidates", best=best, left_s=self.options.budget_s - self.elapsed())

    def precisions(self, target: Target) -> list[str | None]:
        """Return the precisions that may be searched on a target."""
        wanted = [each for each in target.precisions if not self.options.precisions or each in self.options.precisions]
        return [*wanted, *self.variants.get(str(target), ())]

    @property
    def min_segments(self) -> int:
        """The fewest segments that a plan may have: what no target takes whole has to be cut."""
        return self.options.min_segments if self.taken_whole else max(2, self.options.min_segments)

    def batches(self, targets: Sequence[Target] = ()) -> tuple[int, ...]:
        """Return the batches that may be searched on `targets`: larger ones where each of them has memory of its own."""
        if self.options.drive != "throughput":
            if len(self.options.batches) > 1:
                goal, base = self.options.objective, self.subject.base_batch
                self.note(f"{goal} is tuned for batch {base}; use --objective throughput (or {goal},throughput) to search several")
            return (self.subject.base_batch,)
        if not self.subject.facts.batchable or not self.taken_whole:
            return (self.subject.base_batch,)
        if self.options.batches:
            return self.options.batches
        return LARGE_BATCHES if targets and all(each.device.memory_bytes for each in targets) else DEFAULT_BATCHES

    def emitter(self, batch: int) -> Emitter:
        """Return the writer of bundles at a batch."""
        if batch not in self._emitters:
            prepared = self.subject.at(batch)
            structure = self.subject.structure_at(batch)
            self._emitters[batch] = Emitter(
                prepared.path,
                prepared.facts,
                structure,
                self.folder / f"segments-{batch}-{self._layouts}",  # a runtime may still map what was written before
                version=version("aivmm"),
                lowered=lambda precision: self.subject.variant(batch, precision),
            )
        return self._emitters[batch]

    def lay_out(self, structure: Structure) -> None:
        """Go on with other blocks of the same model: what is written from now on is cut so."""
        self._layouts += 1
        self.subject.structure = structure
        self.database.remember_model(self.subject.facts, structure)
        emitter = self._emitters.pop(self.subject.base_batch, None)
        if emitter is not None:
            emitter.close()

    def close(self) -> None:
        """Let go of the model's files."""
        for emitter in self._emitters.values():
            emitter.close()


def remove_orphans(parent: Path) -> None:
    """Remove the working folders of tunings on this machine that were killed: they hold copies of models."""
    for folder in parent.glob("aivmm-*-*"):
        pid = folder.name.split("-")[1]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)  # another user's cannot be removed, and is not ours to worry about
