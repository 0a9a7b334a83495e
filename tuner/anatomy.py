"""Where time goes: every block and every unique operator of the model, on every target, alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from aivmm.db.database import Database
from aivmm.errors import AivmmError
from aivmm.models.records import Block
from aivmm.planner.evidence import Estimate, measured
from aivmm.probes import wire
from aivmm.probes.arrays import load_arrays, save_arrays
from aivmm.probes.ceilings import Ceilings
from aivmm.probes.client import WorkerDied, compile_limit_s, run_limit_s
from aivmm.probes.compare import cautions
from aivmm.probes.lab import Lab
from aivmm.probes.machine import measuring, wait_until_quiet
from aivmm.probes.records import Failed, Measured, Outcome, ProbeKey, Refused, Samples
from aivmm.runtime.config import Config
from aivmm.runtime.environment import environment_of
from aivmm.runtime.registry import load_backend
from aivmm.runtime.target import Target
from aivmm.tuner.emit import Emitter
from aivmm.tuner.measure import Counts
from aivmm.tuner.operators import OperatorProber
from aivmm.tuner.subject import Subject

_BLOCK_S = 0.03
_CHECK_S = 0.0  # a block that was timed before is only checked
_EVALUATED_FLOPS = 1e8  # a second or so in ONNX's own evaluator
# Relative L2 of a part against the trusted chain: beyond it the runtime computes something else. In fp32 two CPU runtimes differ by 5e-5 at
# most over 2197 cuts of 16 models (benchmarks/results/cuts.md); accelerators may multiply in TF32, and quantised kernels round elsewhere.
_TOLERANCE, _LOOSE = 1e-3, 1e-2
_QUANTISED = ("quant", "qlinear", "qgemm", "integer", "nbits")  # in operators' names, in small letters
WRONG = "gave wrong numbers"  # how the reason of a verdict on numbers begins
NOT_CHECKED = "its numbers were not checked: the budget was out"
Tell = Callable[[str, int, int], None]


@dataclass(slots=True)
class Anatomist:
    """Probes the parts of one prepared model at its base batch."""

    lab: Lab
    subject: Subject
    database: Database
    run_id: str | None  # None: what is measured belongs to no run
    targets: Sequence[Target]
    emitter: Emitter
    folder: Path
    counts: Counts
    fresh: bool = False
    retry_failed: bool = False
    measure_new: bool = True  # False: only recall what the database has
    stop: Callable[[], bool] = lambda: False  # True: what is not known yet is skipped
    seen: dict[ProbeKey, Outcome] = field(default_factory=dict)  # of this run: known even when all is to be measured afresh
    skipped: int = 0
    _waited: float = 0.0  # for the machine-wide lock: no part of the budget
    _used: list[ProbeKey] = field(default_factory=list)
    _recalled: set[ProbeKey] = field(default_factory=set)  # what the database knew and nobody has used yet
    _edges: list[tuple[Path, Path]] | None = None  # per block the files of its inputs and of its reference outputs
    _problems: dict[tuple[int, str], str] = field(default_factory=dict)  # (block, target) -> what made its outputs unusable, in this run
    found: dict[tuple[int, str], Outcome] = field(default_factory=dict)  # (block, target) -> how it came out
    operators_found: Mapping[tuple[str, str, str], Outcome] = field(default_factory=dict)  # (signature, target, precision) -> the same
    ceilings: Mapping[tuple[str, str], Ceilings] = field(default_factory=dict)  # (target, precision) -> its limits
    wrong: dict[tuple[int, str], str] = field(default_factory=dict)  # (block, target) -> what is wrong with its numbers

    def blocks(self, *, budget_s: float, tell: Tell) -> None:
        """Probe each block on each target, until done or out of budget; what came out is in `found` and `wrong`.

        Times hold for a structure, verdicts on numbers for a content: a block whose time is known from elsewhere is checked all the same.
        """
        found = self.found
        wanted = [(block, target, self._block_key(block, target)) for block in self.subject.structure.blocks for target in self.targets]
        known = self._recall([*(key for _, _, key in wanted), *(self._verdict_key(block, target) for block, target, _ in wanted)])
        started, self._waited = time.perf_counter(), 0.0

        def may_measure() -> bool:
            return self.measure_new and not self.stop() and time.perf_counter() - started - self._waited <= budget_s

        for number, (block, target, key) in enumerate(wanted):
            tell("blocks", number, len(wanted))
            if key in known:
                # A block like one before it in this model shares its time, which is nothing that the database knew.
                outcome = self._reuse(known[key]) if key in self._recalled else known[key]
            elif may_measure() and self._fed(block):
                outcome = self._probe(key, target, block, seconds=_BLOCK_S)
                known[key] = outcome
                self._keep(outcome)
            else:
                self.skipped += 1
                continue
            found[block.index, str(target)] = outcome
            problem = self._wrong(block, target, outcome, known, may_measure)
            if problem:
                self.wrong[block.index, str(target)] = problem
        self._link_reused()

    def inputs_of(self, block: Block) -> Path | None:
        """Return the file with the inputs of a block; None where no target takes a block before it."""
        return self._edges[block.index][0] if self._fed(block) and self._edges else None

    def not_placed(self) -> list[str]:
        """Say which blocks a plan will not place on which target because their numbers are wrong there; refusals are told elsewhere."""
        blocks = self.subject.structure.blocks
        return [
            f"block {index} ({', '.join(blocks[index].op_types)}) is not placed on {target}: it {reason}"
            for (index, target), reason in sorted(self.wrong.items())
            if reason.startswith(WRONG)
        ]

    def operators(self, *, budget_s: float, tell: Tell) -> None:
        """Probe each unique operator on each target in each native precision, the heaviest first, until done or out of budget."""
        prober = OperatorProber(
            lab=self.lab,
            subject=self.subject,
            database=self.database,
            run_id=self.run_id,
            targets=self.targets,
            folder=self.folder,
            counts=self.counts,
            fresh=self.fresh,
            retry_failed=self.retry_failed,
            measure_new=self.measure_new,
            stop=self.stop,
        )
        prober.run(budget_s=budget_s, tell=tell)
        self.skipped += prober.skipped
        self.operators_found, self.ceilings = prober.found, prober.ceilings

    def _fed(self, block: Block) -> bool:
        """Have files with the block's inputs and its reference outputs; False where no target takes a block before it."""
        if self._edges is None:
            self._edges = self._follow_chain()
        return block.index < len(self._edges)

    def _follow_chain(self) -> list[tuple[Path, Path]]:
        """Return for each block files with its inputs and its reference outputs: the chain, run block by block on the reference target.

        A block that it refuses runs on the next one of `trusted_for` that takes it.
        """
        prepared = self.subject.at(self.subject.base_batch)
        values: dict[str, Any] = dict(load_arrays(str(prepared.samples[0])))
        edges = []
        for block in self.subject.structure.blocks:
            segment = self.emitter.segment(block.index, block.index)
            inputs = self.folder / f"block-{block.index}-inputs.npz"
            outputs = self.folder / f"block-{block.index}-outputs.npz"
            save_arrays(inputs, {each.name: values[each.name] for each in segment.inputs})
            trusted = trusted_for(block, self.subject.reference_order())
            if not any(answers(self.lab, segment.path, target, inputs, outputs) for target in trusted):
                break
            values |= load_arrays(str(outputs))
            edges.append((inputs, outputs))
        return edges

    def _probe(self, key: ProbeKey, target: Target, block: Block, *, seconds: float) -> Outcome:
        """Time a block, and judge its numbers."""
        assert self._edges is not None
        inputs, reference = self._edges[block.index]
        model = self.emitter.segment(block.index, block.index).path
        worker = self.lab.worker(target.runtime)
        for other in self.lab.pids():
            if other != worker.pid:
                wait_until_quiet(other)
        with measuring() as waited:
            self._waited += waited
            try:
                answer = worker.call(
                    "probe",
                    limit_s=compile_limit_s(),
                    run_limit_s=run_limit_s(),
                    model=str(model),
                    target=wire.target_out(target),
                    config=wire.config_out(key.config),
                    inputs=str(inputs),
                    reference=str(reference),
                    seconds=seconds,
                )
            except AivmmError as error:
                return Refused(key=key, reason=error.message)
            except WorkerDied as died:
                return Failed(key=key, reason=died.reason, output=died.output)
        samples = Samples(timed_s=tuple(answer["durations"]))
        metrics = {"compile_s": answer["compile_s"], "first_inference_s": answer["first_inference_s"]}
        judged = self._judged(block)
        metrics |= {f"{name}@{judged}": value for name, value in answer["accuracy"].items()}
        if answer["problem"]:
            metrics[f"unusable@{judged}"] = 1.0
            self._problems[block.index, str(target)] = answer["problem"]
        return Measured(
            key=key,
            samples=samples,
            metrics=metrics,
            cautions=cautions(samples),
            effective_config=answer["effective_config"],
            placement=answer["nodes"],
        )

    def _wrong(
        self, block: Block, target: Target, outcome: Outcome, known: dict[ProbeKey, Outcome], may_measure: Callable[[], bool]
    ) -> str:
        """Say why the block must not run on the target, or return "". What gave wrong numbers is stored as failed, under its content."""
        if not isinstance(outcome, Measured):
            return outcome.reason
        key = self._verdict_key(block, target)
        stored = known.get(key)
        if stored is not None and stored is not outcome and key in self._recalled:
            self._reuse(stored)
        verdicts = [self._verdict(block, target, each) for each in (stored, outcome) if each is not None]
        judged = next((each for each in verdicts if each is not None), None)
        if isinstance(stored, Failed | Refused):
            return judged or ""
        if judged is None:
            if not (may_measure() and self._fed(block)):
                return NOT_CHECKED
            known[key] = probed = self._probe(key, target, block, seconds=_CHECK_S)
            judged = self._verdict(block, target, probed)
            if not judged:
                self._keep(probed)
        if judged:
            known[key] = Failed(key=key, reason=judged)
            self._keep(known[key])
        return judged or ""

    def _verdict(self, block: Block, target: Target, outcome: Outcome) -> str | None:
        """Return what is wrong with a block's numbers ("" when nothing is), or None when they were never compared for this content."""
        if not isinstance(outcome, Measured):
            return outcome.reason
        judged = self._judged(block)
        if f"unusable@{judged}" in outcome.metrics:
            return wrong_numbers(self._problems.get((block.index, str(target)), "its outputs are unusable"), 0.0, 0.0)
        error = outcome.metrics.get(f"relative_l2@{judged}")
        return None if error is None else wrong_numbers("", error, tolerance(target, block.op_types))

    def _block_key(self, block: Block, target: Target) -> ProbeKey:
        return self._key("segment", f"{block.content}@{self.subject.judged}" if block.data_dependent else block.structure, target)

    def _verdict_key(self, block: Block, target: Target) -> ProbeKey:
        return self._key("segment", f"{block.content}@{self.subject.judged}", target)

    def _judged(self, block: Block) -> str:
        """What a verdict on a block's numbers holds for: layers that are alike share times, but neither weights nor inputs."""
        return f"{self.subject.judged}.{block.content[:16]}"

    def _key(self, kind: Any, subject: str, target: Target) -> ProbeKey:
        return ProbeKey(
            kind=kind,
            subject=subject,
            target=str(target),
            environment=environment_of(target).fingerprint,
            config=Config(precision="fp32"),
            batch=self.subject.base_batch,
        )

    def _recall(self, keys: Iterable[ProbeKey]) -> dict[ProbeKey, Outcome]:
        keys = list(keys)
        found = {} if self.fresh else self.database.find_many(keys)
        known = {key: outcome for key, outcome in found.items() if not (self.retry_failed and isinstance(outcome, Failed))}
        self._recalled = set(known) - set(self.seen)
        return known | {key: self.seen[key] for key in keys if key in self.seen}

    def _reuse(self, outcome: Outcome) -> Outcome:
        self.counts.add(outcome, reused=True)
        self._recalled.discard(outcome.key)  # blocks of one structure share it: it counts once, as it did when it was measured
        self._used.append(outcome.key)
        return outcome

    def _link_reused(self) -> None:
        if self.run_id is not None:
            self.database.link(self.run_id, self._used)
        self._used.clear()

    def _keep(self, outcome: Outcome) -> None:
        self.counts.add(outcome, reused=False)
        self.database.add(outcome, run_id=self.run_id)
        self.seen[outcome.key] = outcome


def tolerance(target: Target, op_types: Iterable[str]) -> float:
    """Return how far (relative L2) the outputs of a part of these operators may be from the trusted ones on a target, in fp32."""
    quantised = any(word in op_type.lower() for op_type in op_types for word in _QUANTISED)
    return _LOOSE if quantised or target.device.kind != "cpu" else _TOLERANCE


def wrong_numbers(problem: str, relative_l2: float, most: float) -> str:
    """Say what is wrong with a part's numbers, or "": a problem that makes its outputs unusable, or an error beyond `most`."""
    if problem:
        return f"{WRONG}: {problem}"
    return f"{WRONG}: its outputs differ by {relative_l2:.2g} (relative L2)" if relative_l2 > most else ""


def trusted_for(block: Block, order: Sequence[Target]) -> list[Target]:
    """Return whose numbers of a block are believed, the best first: ONNX's own evaluator stands behind the first of `order`, or not at all.

    Where that refuses a block, a single runtime would otherwise be held against itself. The evaluator is slow, so it is for small blocks.
    """
    small = block.flops is None or block.flops <= _EVALUATED_FLOPS
    return [*order[:1], *([evaluator()] if small else []), *order[1:]]


@cache
def evaluator() -> Target:
    """Return the target of the null backend, whose answers are those of ONNX's own evaluator."""
    return next(each for each in load_backend("null").targets() if isinstance(each, Target))


def answers(lab: Lab, model: Path, target: Target, inputs: Path, outputs: Path) -> bool:
    """Run a part of a model once in fp32 and write its outputs; False where the target does not take it."""
    try:
        loaded = lab.load(model, target, Config(precision="fp32"), inputs=inputs)
        lab.outputs(loaded.contestant, inputs, outputs)
        lab.unload(loaded.contestant)
    except (AivmmError, WorkerDied):
        return False
    return True


def estimates(outcomes: Mapping[tuple[int, str], Outcome], wrong: Mapping[tuple[int, str], str]) -> dict[tuple[int, str], Estimate]:
    """Return the seconds of each block on each target that may run it, with their uncertainty."""
    return {
        where: measured(each.samples, "the block alone")
        for where, each in outcomes.items()
        if isinstance(each, Measured) and where not in wrong
    }
