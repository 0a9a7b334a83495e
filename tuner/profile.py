"""`aivmm profile`: the operators and blocks of a model, each alone on every target, without a search and without a plan."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from aivmm.db.database import Database
from aivmm.errors import AivmmError, UsageError
from aivmm.models.records import Operator
from aivmm.probes import wire
from aivmm.probes.ceilings import Ceilings, bound_of, rates
from aivmm.probes.client import WorkerDied
from aivmm.probes.fusion import Fusion, fusion_in
from aivmm.probes.lab import COMPILE_LIMIT_S, Lab
from aivmm.probes.records import Failed, Measured, Outcome, Refused, Transfer
from aivmm.probes.transfers import SIZES_BYTES, fit_of
from aivmm.runtime.config import Config
from aivmm.runtime.environment import environment_of
from aivmm.runtime.registry import default_backends
from aivmm.runtime.target import Target, Unavailable, select
from aivmm.tuner.anatomy import Anatomist
from aivmm.tuner.emit import Emitter
from aivmm.tuner.handover import HandoverProber
from aivmm.tuner.measure import Counts
from aivmm.tuner.memory_copies import CopyProber
from aivmm.tuner.operators import OperatorProber
from aivmm.tuner.options import TuneOptions
from aivmm.tuner.progress import Progress
from aivmm.tuner.refusals import as_laid_out_before
from aivmm.tuner.subject import Subject
from aivmm.tuner.text import printable
from aivmm.tuner.transfers import Probing
from aivmm.tuner.work import remove_orphans

DEFAULT_BUDGET_S = 600.0


@dataclass(slots=True, kw_only=True)
class Profile:
    """What a profile found. `operators` and `blocks` say how each came out on (target, precision)."""

    subject: Subject
    given: str
    targets: Sequence[Target]
    unavailable: Sequence[Unavailable]
    operators: Mapping[tuple[str, str, str], Outcome]  # (signature, target, precision)
    blocks: Mapping[tuple[int, str], Outcome]  # (block, target)
    wrong: Mapping[tuple[int, str], str]
    ceilings: Mapping[tuple[str, str], Ceilings]
    transfers: Mapping[tuple[str, str], Transfer]  # (source, destination)
    copies: Mapping[tuple[str, str], Transfer]  # between the host's memory and those of devices
    fusions: Mapping[str, Fusion]  # target -> what became of the nodes inside the whole model
    counts: Counts
    notes: list[str] = field(default_factory=list)
    skipped: int = 0
    wall_s: float = 0.0

    @property
    def places(self) -> list[tuple[str, str]]:
        """Each (target, precision) that was asked, in order."""
        return [(str(target), precision) for target in self.targets for precision in target.precisions]

    def total_s(self, place: tuple[str, str]) -> float:
        """Return what all measured nodes take one by one on a target, in seconds. That is no model's time: see the fusions."""
        return sum(self.seconds(operator, place) or 0.0 for operator in self.subject.structure.operators)

    def seconds(self, operator: Operator, place: tuple[str, str]) -> float | None:
        """Return the seconds of all nodes of one operator, one by one; None where it was not measured."""
        outcome = self.operators.get((operator.signature, *place))
        return operator.count * outcome.samples.median_s if isinstance(outcome, Measured) else None

    def coverage(self) -> tuple[int, int]:
        """Return how many nodes were measured on at least one target, and how many there are."""
        measured = {signature for (signature, _, _), each in self.operators.items() if isinstance(each, Measured)}
        operators = self.subject.structure.operators
        return sum(each.count for each in operators if each.signature in measured), sum(each.count for each in operators)

    def fused(self, operator: Operator, target: str) -> int | None:
        """Return how many nodes of an operator have no kernel of their own inside the whole model; None when the runtime does not tell."""
        fusion = self.fusions.get(target)
        return None if fusion is None else len(set(operator.nodes) - set(fusion.own))

    def sorted_operators(self) -> list[Operator]:
        """Return the operators, those first that take longest on the target where they take least."""

        def least(operator: Operator) -> float:
            times = [each for place in self.places if (each := self.seconds(operator, place)) is not None]
            return min(times, default=0.0)

        return sorted(self.subject.structure.operators, key=lambda each: (-least(each), each.description))

    def metrics(self, operator: Operator, outcome: Measured) -> dict[str, float]:
        """Return rates, floors and share of the ceiling; worked out now for what was stored before the ceilings were known."""
        found = dict(outcome.metrics)
        if bound_of(found) is None:
            seconds = outcome.samples.median_s
            ceilings = self.ceilings.get((outcome.key.target, outcome.key.config.precision or ""))
            roofline = ceilings.roofline(seconds=seconds, flops=operator.flops, moved_bytes=operator.bytes) if ceilings else None
            found |= rates(seconds, operator.flops, operator.bytes) | (roofline.metrics() if roofline else {})
        return found


def profile_model(options: TuneOptions, progress: Progress, *, with_blocks: bool = True) -> Profile:
    """Measure what the database does not know of the model's operators and blocks, store it, and return all of it.

    Raises:
        AivmmError: what the user can fix.
    """
    started = time.perf_counter()
    with (
        Database.open(options.db) as database,
        tempfile.TemporaryDirectory(prefix=f"aivmm-{os.getpid()}-", ignore_cleanup_errors=True) as name,
        Lab() as lab,
    ):
        folder = Path(name)
        remove_orphans(folder.parent)
        progress.phase("reading the model")
        subject = Subject(options, lab, folder)
        progress.phase("looking for devices")
        found, unavailable = lab.discover(list(options.backends) or list(default_backends()))
        if not found:
            raise UsageError(f"there is no target to run on: {'; '.join(map(str, unavailable)) or 'no runtime is installed'}")
        targets = select(found, list(options.targets) or ["*"], unavailable)
        subject.remember_targets(found)
        subject.make_reference(found)
        for target in found:
            database.remember_environment(environment_of(target))
            database.remember_target(target)
        stored = database.structure(subject.structure.content, subject.base_batch)
        subject.structure = as_laid_out_before(subject.structure, subject.path, stored)
        database.remember_model(subject.facts, subject.structure)
        profile = _measure(options, progress, database, lab, folder, subject, targets, unavailable, with_blocks=with_blocks)
        profile.wall_s = time.perf_counter() - started
        return profile


def _measure(
    options: TuneOptions,
    progress: Progress,
    database: Database,
    lab: Lab,
    folder: Path,
    subject: Subject,
    targets: Sequence[Target],
    unavailable: Sequence[Unavailable],
    *,
    with_blocks: bool,
) -> Profile:
    started = time.perf_counter()
    counts = Counts()
    parts = folder / "parts"
    parts.mkdir()

    def left_s() -> float:
        return max(0.0, options.budget_s - (time.perf_counter() - started))

    def tell(what: str, number: int, total: int) -> None:
        progress.detail(f"{what}: {number} of {total}", left_s=left_s())

    progress.phase("measuring operators")
    operators = OperatorProber(
        lab=lab,
        subject=subject,
        database=database,
        run_id=None,
        targets=targets,
        folder=parts,
        counts=counts,
        fresh=options.fresh,
        retry_failed=options.retry_failed,
    )
    operators.run(budget_s=left_s(), tell=tell)
    blocks = _blocks(options, database, lab, folder, subject, targets, counts)
    if with_blocks:
        progress.phase("measuring blocks")
        blocks.blocks(budget_s=left_s(), tell=tell)
        blocks.emitter.close()
    progress.phase("measuring transfers between targets")
    probing = Probing(
        lab=lab,
        database=database,
        run_id=None,
        targets=targets,
        counts=counts,
        fresh=options.fresh,
        retry_failed=options.retry_failed,
        sizes_bytes=SIZES_BYTES,
    )
    transfers = HandoverProber(probing)
    transfers.run(budget_s=left_s(), tell=tell)
    copies = CopyProber(probing)
    copies.run(budget_s=left_s(), tell=tell)
    progress.phase("asking what is fused")
    notes: list[str] = [*subject.facts.notes, *subject.notes]
    fusions = {}
    for target in targets:
        try:
            fusions[str(target)] = _fusion(lab, subject, target)
        except AivmmError as error:
            notes.append(printable(error.message))
        except WorkerDied as died:
            notes.append(printable(f"{target} does not tell what it fuses: asking it {died.reason}"))
    skipped = operators.skipped + blocks.skipped + transfers.skipped + copies.skipped
    if skipped:
        notes.append(f"{skipped} probes did not fit the budget; raise --budget to have them all")
    return Profile(
        subject=subject,
        given=options.model,
        targets=targets,
        unavailable=unavailable,
        operators=operators.found,
        blocks=blocks.found,
        wrong=blocks.wrong,
        ceilings=operators.ceilings,
        transfers=transfers.found,
        copies=copies.found,
        fusions=fusions,
        counts=counts,
        notes=notes,
        skipped=skipped,
    )


def _blocks(
    options: TuneOptions, database: Database, lab: Lab, folder: Path, subject: Subject, targets: Sequence[Target], counts: Counts
) -> Anatomist:
    prepared = subject.at(subject.base_batch)
    return Anatomist(
        lab=lab,
        subject=subject,
        database=database,
        run_id=None,
        targets=targets,
        emitter=Emitter(prepared.path, prepared.facts, subject.structure, folder / "segments", version=version("aivmm")),
        folder=folder / "parts",
        counts=counts,
        fresh=options.fresh,
        retry_failed=options.retry_failed,
    )


def _fusion(lab: Lab, subject: Subject, target: Target) -> Fusion:
    answer = lab.worker(target.runtime).call(
        "fusion",
        limit_s=COMPILE_LIMIT_S,
        model=str(subject.path),
        target=wire.target_out(target),
        config=wire.config_out(Config(precision=target.precisions[0])),
    )
    return fusion_in(answer)


def as_json(profile: Profile) -> dict[str, Any]:
    """Return the profile as `aivmm profile --json` prints it. Times in seconds, of one node unless the name says total."""
    facts, structure = profile.subject.facts, profile.subject.structure
    measured, nodes = profile.coverage()
    return {
        "schema": 1,
        "model": {
            "path": profile.given,
            "sha256": facts.sha256,
            "category": facts.category.name,
            "batch": facts.batch,
            "nodes": nodes,
            "operators": len(structure.operators),
        },
        "targets": [str(each) for each in profile.targets],
        "unavailable": [str(each) for each in profile.unavailable],
        "ceilings": [_ceilings_json(place, each) for place, each in profile.ceilings.items()],
        "operators": [_operator_json(profile, each) for each in profile.sorted_operators()],
        "blocks": [
            {
                "index": block.index,
                "nodes": [block.first, block.last],
                "op_types": dict(block.op_types),
                "flops": block.flops,
                "targets": [
                    {"target": str(target), **_came_out(outcome), "wrong": profile.wrong.get((block.index, str(target)))}
                    for target in profile.targets
                    if (outcome := profile.blocks.get((block.index, str(target)))) is not None
                ],
            }
            for block in structure.blocks
        ],
        "transfers": [_transfer_json(each) for each in profile.transfers.values()],
        "copies": [_transfer_json(each) for each in profile.copies.values()],
        "fusion": [
            {"target": target, "kernels": len(each.kernels), "fused_into": dict(each.fused_into), "vanished": list(each.vanished)}
            for target, each in profile.fusions.items()
        ],
        "coverage": {"measured_nodes": measured, "nodes": nodes},
        "probes": {**asdict(profile.counts), "skipped": profile.skipped},
        "notes": profile.notes,
        "wall_s": profile.wall_s,
    }


def _transfer_json(transfer: Transfer) -> dict[str, Any]:
    fit = fit_of(transfer)
    return {
        "source": transfer.source,
        "destination": transfer.destination,
        "state": transfer.state,
        "reason": transfer.reason,
        "points": [{"bytes": point.size_bytes, "cost_s": point.cost_s} for point in transfer.points],
        "fixed_s": None if fit is None else fit.fixed_s,
        "per_byte_s": None if fit is None else fit.per_byte_s,
        "fit_error": None if fit is None else fit.error,
    }


def _ceilings_json(place: tuple[str, str], ceilings: Ceilings) -> dict[str, Any]:
    return {
        "target": place[0],
        "precision": place[1],
        "flops_per_s": ceilings.flops_per_s,
        "bytes_per_s": ceilings.bytes_per_s,
        "call_s": ceilings.call_s,
        "copies": [{"bytes": size, "bytes_per_s": size / seconds} for size, seconds in ceilings.copies],
    }


def _operator_json(profile: Profile, operator: Operator) -> dict[str, Any]:
    return {
        "signature": operator.signature,
        "op_type": operator.op_type,
        "description": operator.description,
        "count": operator.count,
        "nodes": list(operator.nodes),
        "flops": operator.flops,
        "bytes": operator.bytes,
        "targets": [
            {"target": place[0], "precision": place[1], **_operator_at(profile, operator, place, outcome)}
            for place in profile.places
            if (outcome := profile.operators.get((operator.signature, *place))) is not None
        ],
    }


def _operator_at(profile: Profile, operator: Operator, place: tuple[str, str], outcome: Outcome) -> dict[str, Any]:
    found = _came_out(outcome)
    if isinstance(outcome, Measured):
        metrics = profile.metrics(operator, outcome)
        seconds = profile.seconds(operator, place) or 0.0
        found |= {
            "total_s": seconds,
            "share": seconds / profile.total_s(place),
            **{name: metrics.get(name) for name in ("flops_per_s", "bytes_per_s", "ceiling_share")},
            "bound": bound_of(metrics),
        }
    return {**found, "fused_nodes": profile.fused(operator, place[0])}


def _came_out(outcome: Outcome) -> dict[str, Any]:
    match outcome:
        case Measured():
            cautions = [each.code for each in outcome.cautions]
            return {
                "state": "measured",
                "median_s": outcome.samples.median_s,
                "samples": len(outcome.samples.timed_s),
                "cautions": cautions,
            }
        case Refused():
            return {"state": "refused", "reason": outcome.reason}
        case Failed():
            return {"state": "failed", "reason": outcome.reason}
