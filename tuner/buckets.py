"""Tunes one model at several shapes and writes one bundle that picks its plan by the inputs' shapes."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from aivmm.errors import AivmmError, ModelError, UsageError
from aivmm.planner.constraints import ACCURACY
from aivmm.probes.accuracy import over_limit
from aivmm.probes.client import Worker, WorkerDied, compile_limit_s, run_limit_s
from aivmm.probes.lab import Lab
from aivmm.reports.family import Overview, Row, render_family
from aivmm.runtime.bundle import Bundle, check_destination
from aivmm.runtime.family import Bucket, Crop, Dimension, Family, Served
from aivmm.runtime.plan import Plan
from aivmm.runtime.registry import default_backends
from aivmm.runtime.target import Target, Unavailable
from aivmm.tensors import TensorSpec
from aivmm.tuner.asked import allowed
from aivmm.tuner.bucket_data import BucketData, Shares
from aivmm.tuner.families import combine
from aivmm.tuner.interrupt import Interrupts
from aivmm.tuner.many import ManyOutcome, Prefixed, report_beside, summed
from aivmm.tuner.open_or_padded import Choice, OpenOrPadded
from aivmm.tuner.options import DEFAULT_COSINE, TuneOptions
from aivmm.tuner.other_shapes import OtherShapes
from aivmm.tuner.padding import Case, PaddingCheck, Paddings, dimensions_of, replace_padding
from aivmm.tuner.progress import Progress
from aivmm.tuner.session import Session, TuneOutcome
from aivmm.tuner.shapes import Wanted
from aivmm.tuner.verdict import time_text

_OTHERS = "plans/others.json"  # of what fits no bucket
_LEAST_BUDGET_S = 5.0  # of each shape, so that the baselines are measured at least


@dataclass(slots=True)
class BucketTuner:
    """One model, several shapes. `options` holds what all share; each of `wanted` is tuned and proven on its own."""

    options: TuneOptions
    wanted: Sequence[Wanted]
    progress: Progress
    command: str = ""
    _shares: Shares | None = None  # of the user's samples
    _early: tuple[Sequence[Mapping[str, TensorSpec]], Paddings] | None = None  # the inputs of each shape, and how they are padded
    _interrupts: Interrupts | None = None  # once is for all shapes, twice is twice

    def run(self) -> ManyOutcome | dict[str, Any]:
        """Tune; with `dry_run` return what would be measured instead.

        Raises:
            AivmmError: what the user can fix.
        """
        started = time.perf_counter()
        output = Session(self.options, self.progress).output
        if self.options.dry_run:
            found = self._session(0, Path(), output, 0.0).run()
            assert isinstance(found, dict)
            return {**found, "buckets": [each.name for each in self.wanted]}
        check_destination(output)
        self._interrupts = Interrupts(self.progress.note)
        with (
            self._interrupts,
            tempfile.TemporaryDirectory(prefix=f"aivmm-{os.getpid()}-", ignore_cleanup_errors=True) as name,
        ):
            folder = Path(name)
            self._sort_samples(folder)
            outcomes = self._tune(folder, output)
            missing = next(((each, found) for each, found in zip(self.wanted, outcomes, strict=False) if found.plan_path is None), None)
            if missing is not None:
                return self._infeasible(missing[0], missing[1], outcomes, output, time.perf_counter() - started)
            return self._write(folder, outcomes, output, started)

    def _session(self, index: int, folder: Path, output: Path, budget_s: float) -> Session:
        each = self.wanted[index]
        options = replace(
            self.options,
            shapes=each.shapes,
            dims=each.dims,
            output=folder / f"bucket-{index}.aivmm",
            budget_s=max(_LEAST_BUDGET_S, budget_s),
        )
        data = None if self._shares is None else self._shares.shares[index].data
        if data is None:  # no sample is of this shape
            options = replace(options, inputs=None, dataset=None)
        shown = (output, output / f"report-{index}.html")
        progress = Prefixed(self.progress, each.name)
        return Session(options, progress, command=self.command, shown=shown, data=data, interrupts=self._interrupts)

    def _sort_samples(self, folder: Path) -> None:
        """Find out how each shape is padded before it is tuned, and sort the user's samples by it, where there are some.

        Raises:
            UsageError: they cannot be used; see `BucketData.sorted`. Or one of the user's metric's shapes has none.
        """
        given = self.options.dataset or (None if self.options.inputs is None else str(self.options.inputs))
        if given is None:
            return
        self.progress.phase("sorting the samples by shape")
        source = self._source(folder)
        (folder / "samples").mkdir()
        with Lab() as lab:
            inputs = [self._inputs(lab, source, each, folder / "samples" / f"shape-{index}") for index, each in enumerate(self.wanted)]
            buckets, dimensions = self._buckets(inputs)
            paddings = self._paddings(folder, buckets, inputs, dimensions)
            self._early = inputs, paddings
            self._shares = BucketData(
                lab=lab,
                given=given,
                source=source,
                folder=folder / "samples",
                buckets=buckets,
                shapes=inputs,
                paddings=paddings,
                seed=self.options.seed,
            ).sorted()
        for note in self._shares.notes:
            self.progress.note(note)
        self.progress.note(self._shares.line)
        empty = [each.bucket for each in self._shares.shares if each.data is None]
        if empty and self.options.metric is not None:
            raise UsageError(
                f"--metric judges on your samples, and {given} has none for {', '.join(empty)}", advice="drop those shapes, or add samples"
            )

    def _inputs(self, lab: Lab, source: Path, each: Wanted, folder: Path) -> dict[str, TensorSpec]:
        """Return what the model takes at one of the shapes."""
        folder.mkdir()
        batch = self.options.batches[0] if self.options.batches else 1
        try:
            facts = lab.prepare(
                source, folder / "model.onnx", shapes=each.shapes, dims=each.dims, batch=batch, contract=self.options.contract
            )
        except WorkerDied as died:
            raise ModelError(f"{source} cannot be read: preparing it {died.reason}", advice="is the file damaged?") from died
        return {spec.name: spec for spec in facts.inputs}

    def _buckets(self, inputs: Sequence[Mapping[str, TensorSpec]]) -> tuple[list[Bucket], tuple[Dimension, ...]]:
        """Return the buckets of shapes that take `inputs`, and the dimensions in which they differ.

        Raises:
            UsageError: two shapes are the same.
        """
        same = next((index for index, each in enumerate(inputs) if each in inputs[:index]), None)
        if same is not None:
            raise UsageError(f"{self.wanted[same].name} gives inputs of a shape that is there already", advice="drop it from the list")
        dimensions = dimensions_of(inputs, {name: [each.dims[name] for each in self.wanted] for name in self.wanted[0].dims})
        named = zip(self.wanted, inputs, strict=True)
        buckets = [
            Bucket(name=each.name, plan=f"plans/{index}.json", extents=_extents(dimensions, one)) for index, (each, one) in enumerate(named)
        ]
        return buckets, dimensions

    def _tune(self, folder: Path, output: Path) -> list[TuneOutcome]:
        """Tune each shape with an equal share of the budget; the first that has no plan ends it.

        The shares are the same whenever the same is asked: what a run has searched is known again by its budget, too.
        """
        outcomes: list[TuneOutcome] = []
        share = self.options.budget_s / len(self.wanted)
        for index in range(len(self.wanted)):
            asked = self._interrupts is not None and self._interrupts.asked
            found = self._session(index, folder, output, 0.0 if asked else share).run()
            assert isinstance(found, TuneOutcome)
            outcomes.append(found)
            if found.plan_path is None:
                break
        return outcomes

    def _write(self, folder: Path, outcomes: Sequence[TuneOutcome], output: Path, started: float) -> ManyOutcome:
        bundles = {f"plans/{index}.json": found.plan_path for index, found in enumerate(outcomes) if found.plan_path is not None}
        plans = []
        for path in bundles.values():
            with Bundle.open(path) as bundle:
                plans.append(bundle.plan)
        inputs = [{each.name: each.spec for each in plan.model.inputs} for plan in plans]
        buckets, dimensions = self._buckets(inputs)
        paddings = self._known_paddings(inputs)
        if paddings is None:
            paddings = self._paddings(folder, buckets, inputs, dimensions)
        paddings = self._proven(folder, bundles, plans, buckets, paddings)
        lines = self._lines(plans, outcomes, paddings)
        others = self._others(folder, bundles, plans, buckets, inputs, paddings)
        if others is not None:
            lines = (*lines, *others.lines)
            bundles[_OTHERS] = others.plan.bundle
            buckets = list(others.buckets)
        verdict = " ".join(lines)
        combine(output, self._family(plans, buckets, paddings, verdict, others=others is not None), bundles, folder / "gathered")
        for index, found in enumerate(outcomes):
            shutil.copyfile(found.report_path, output / f"report-{index}.html")
        summary = self._summary(outcomes, output, paddings, buckets, verdict, time.perf_counter() - started, others)
        report, use = output / "report.html", f"import aivmm; engine = aivmm.load_plan({str(output)!r})"
        report.write_text(render_family(self._overview(plans, outcomes, paddings, lines)), encoding="utf-8")
        return ManyOutcome(plan_path=output, report_path=report, summary=summary, lines=lines, outcomes=tuple(outcomes), use=use)

    def _known_paddings(self, inputs: Sequence[Mapping[str, TensorSpec]]) -> Paddings | None:
        """Return what was found of the padding before, unless plans were made for another batch since."""
        if self._early is None:
            return None
        shapes = [[{name: spec.shape for name, spec in each.items()} for each in some] for some in (inputs, self._early[0])]
        return self._early[1] if shapes[0] == shapes[1] else None

    def _paddings(
        self, folder: Path, buckets: Sequence[Bucket], inputs: Sequence[Mapping[str, TensorSpec]], dimensions: Sequence[Dimension]
    ) -> Paddings:
        self.progress.phase("checking how smaller inputs may be padded")
        with Lab() as lab:
            found, _ = lab.discover(list(self.options.backends) or list(default_backends()))
            files = Path(tempfile.mkdtemp(prefix="padding-", dir=folder))
            return PaddingCheck(
                lab=lab,
                source=self._source(folder),
                folder=files,
                buckets=buckets,
                shapes=inputs,
                dimensions=dimensions,
                targets=reference_first(found),
                contract=self.options.contract,
                seed=self.options.seed,
            ).run()

    def _source(self, folder: Path) -> Path:
        if not self.options.model.startswith("demo:"):
            return Path(self.options.model)
        from aivmm.models.demo import write_demo

        return write_demo(self.options.model.removeprefix("demo:"), folder)

    def _proven(
        self, folder: Path, bundles: Mapping[str, Path], plans: Sequence[Plan], buckets: Sequence[Bucket], paddings: Paddings
    ) -> Paddings:
        """Run the padded inputs through the written bundle, as production will; drop the padding where a plan's answers are too far off."""
        if not paddings.cases:
            return paddings
        trial = folder / "trial.aivmm"
        combine(trial, self._family(plans, buckets, paddings, ""), bundles, folder / "gathered-trial")
        why = self._judged(trial, paddings.cases)
        if not why:
            return paddings
        none = [replace_padding(each, "none", f"not padded: {why}") for each in paddings.dimensions]
        return Paddings(dimensions=tuple(none))

    def _judged(self, bundle: Path, cases: Sequence[Case]) -> str:
        """Run the samples of `cases` through a bundle in a worker; say why an answer is too far off, or return ""."""
        worker = Worker("other sizes")
        try:
            answer = worker.call(
                "fit",
                limit_s=compile_limit_s(),
                run_limit_s=run_limit_s(),
                bundle=str(bundle),
                samples=[str(each) for case in cases for each in case.samples],
                references=[str(each) for case in cases for each in case.references],
            )
            return _too_far(answer["judged"], cases, self._cosine())
        except (AivmmError, WorkerDied) as error:
            return error.reason if isinstance(error, WorkerDied) else error.message
        finally:
            worker.close()

    def _cosine(self) -> float:
        """Return the limit on the cosine that the tuning of each shape has, or the default where accuracy is limited in another way."""
        limit = Session(self.options, self.progress).cosine_limit
        return DEFAULT_COSINE if limit is None else limit

    def judged_by(self) -> str:
        """Say what the answers to other sizes are held to, and which limits on accuracy are not judged there."""
        constraints = self.options.parsed_constraints()
        others = [str(each) for each in constraints if each.metric in ACCURACY and each.metric != "cosine"]
        return f"cosine>={self._cosine():g}" + (f", not by {', '.join(others)}" if others else "")

    def usable(self, found: Sequence[Target], unavailable: Sequence[Unavailable]) -> list[Target]:
        """Return the targets that options and constraints leave, in the order in which they are tried for other shapes."""
        return reference_first(allowed(self.options, found, unavailable))

    def _others(
        self,
        folder: Path,
        bundles: Mapping[str, Path],
        plans: Sequence[Plan],
        buckets: Sequence[Bucket],
        inputs: Sequence[Mapping[str, TensorSpec]],
        paddings: Paddings,
    ) -> Choice | None:
        """Make and prove the plan for all other shapes, where one is asked for, and time it against padding."""
        if self.options.other_shapes == "refuse":
            return None
        self.progress.phase("proving what runs other shapes")
        unpadded = Paddings(dimensions=tuple(replace_padding(each, "none", "") for each in paddings.dimensions))

        @cache
        def trial(opened: Path | None) -> Path:
            """Write the bundle that pads, or the one that runs whatever is not listed with open extents."""
            path = Path(tempfile.mkdtemp(prefix="trial-", dir=folder)) / "trial.aivmm"
            family = self._family(plans, buckets, paddings if opened is None else unpadded, "", others=opened is not None)
            combine(path, family, dict(bundles) if opened is None else {**bundles, _OTHERS: opened}, path.parent / "gathered")
            return path

        with Lab() as lab:
            found, unavailable = lab.discover(list(self.options.backends) or list(default_backends()))
            (folder / "others").mkdir()
            check = PaddingCheck(
                lab=lab,
                source=self._source(folder),
                folder=folder / "others",
                buckets=buckets,
                shapes=inputs,
                dimensions=paddings.dimensions,
                targets=reference_first(found),
                contract=self.options.contract,
                seed=self.options.seed,
            )
            others = OtherShapes(
                check=check,
                targets=self.usable(found, unavailable),
                dimensions=paddings.dimensions,
                plan=plans[0],
                folder=folder / "open",
                judge=lambda opened, cases: self._judged(trial(opened), [*cases, *paddings.cases]),
                judged_by=self.judged_by(),
            )
            opened = others.run()
        self.progress.phase("timing open extents against padding")
        return OpenOrPadded(
            plans=opened,
            buckets=buckets,
            between=paddings.cases,
            trial=lambda plan: trial(None if plan is None else plan.bundle),
            seed=self.options.seed,
        ).run()

    def _family(
        self, plans: Sequence[Plan], buckets: Sequence[Bucket], paddings: Paddings, verdict: str, *, others: bool = False
    ) -> Family:
        served = Served(
            name=plans[0].model.name,
            buckets=list(buckets),
            dimensions=list(paddings.dimensions),
            crops=list(paddings.crops),
            fallback=_OTHERS if others else None,
        )
        return Family(
            kind="shapes",
            created_by=f"aivmm {version('aivmm')}",
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            models=[served],
            verdict=verdict,
            files=dict.fromkeys(served.plan_files(), "0" * 64),
        )

    def _lines(self, plans: Sequence[Plan], outcomes: Sequence[TuneOutcome], paddings: Paddings) -> tuple[str, ...]:
        verdicts = [plan.verdict or str(found.summary["verdict"]) for plan, found in zip(plans, outcomes, strict=True)]
        parts = [f"{each.name}: {verdict}" for each, verdict in zip(self.wanted, verdicts, strict=True)]
        return (
            f"{len(parts)} shapes, each with a plan of its own.",
            *parts,
            *([] if self._shares is None else [self._shares.line]),
            *(f"{each.name} is {each.why}." for each in paddings.dimensions),
        )

    def _summary(
        self,
        outcomes: Sequence[TuneOutcome],
        output: Path,
        paddings: Paddings,
        buckets: Sequence[Bucket],
        verdict: str,
        wall_s: float,
        others: Choice | None,
    ) -> dict[str, Any]:
        first = outcomes[0].summary
        return {
            "schema": 1,
            "kind": "shapes",
            "model": first["model"],
            "plan": {"path": str(output), "buckets": [each.name for each in buckets]},
            "report": str(output / "report.html"),
            "objective": first["objective"],
            "buckets": [
                {"name": bucket.name, "extents": dict(bucket.extents), **self._sample_counts(index), **found.summary}
                for index, (bucket, found) in enumerate(zip(buckets, outcomes, strict=True))
            ],
            "padding": [
                {"dimension": each.name, "places": [list(place) for place in each.places], "padding": each.padding, "why": each.why}
                for each in paddings.dimensions
            ],
            "cropped": [crop_json(each) for each in paddings.crops],
            "other_shapes": None
            if others is None
            else {"target": others.plan.target, "open_against_padding": [each.json() for each in others.timed]},
            "probes": summed(outcomes),
            "wall_s": wall_s,
            "verdict": verdict,
        }

    def _sample_counts(self, index: int) -> dict[str, Any]:
        if self._shares is None:
            return {}
        share = self._shares.shares[index]
        return {"samples": {"used": share.samples, "padded": share.padded}}

    def _infeasible(self, each: Wanted, found: TuneOutcome, outcomes: Sequence[TuneOutcome], output: Path, wall_s: float) -> ManyOutcome:
        """Say which shape has no plan: a bundle that lacks one of the shapes asked for is none."""
        report = report_beside(output)
        shutil.copyfile(found.report_path, report)
        verdict = f"{each.name}: {found.summary['verdict']}"
        summary = {
            "schema": 1,
            "kind": "shapes",
            "model": found.summary["model"],
            "plan": None,
            "report": str(report),
            "objective": found.summary["objective"],
            "buckets": [{"name": name.name, **one.summary} for name, one in zip(self.wanted, outcomes, strict=False)],
            "baselines": found.summary["baselines"],
            "probes": summed(outcomes),
            "wall_s": wall_s,
            "verdict": verdict,
        }
        return ManyOutcome(plan_path=None, report_path=report, summary=summary, lines=(verdict,), outcomes=tuple(outcomes))

    def _overview(self, plans: Sequence[Plan], outcomes: Sequence[TuneOutcome], paddings: Paddings, lines: tuple[str, ...]) -> Overview:
        rows = []
        for index, (each, plan, found) in enumerate(zip(self.wanted, plans, outcomes, strict=True)):
            measured = found.summary["measured"]
            low, high = measured["ci95_s"]
            best = best_baseline_text(found.summary)
            cells = (
                " + ".join(plan.targets()),
                f"{time_text(measured['median_s'])} ({time_text(low)} to {time_text(high)})",
                f"{measured['throughput_per_s']:.4g}/s",
                best,
            )
            rows.append(Row(name=each.name, link=f"report-{index}.html", cells=cells))
        return Overview(
            title=f"{plans[0].model.name} at {len(plans)} shapes",
            lines=lines,
            columns=("shape", "plan", "median of a call (95 %)", "throughput", "against the best baseline"),
            rows=tuple(rows),
            facts=tuple((each.name, each.why) for each in paddings.dimensions),
            facts_title="Inputs smaller than a shape",
            created=f"aivmm {version('aivmm')}",
        )


def reference_first(targets: Sequence[Target]) -> list[Target]:
    """Return the targets in the order in which they serve as the fp32 reference."""
    return sorted(targets, key=lambda each: (str(each) != "onnxruntime:CPU", each.device.kind != "cpu"))


def best_baseline_text(summary: Mapping[str, Any]) -> str:
    """Say how the plan of a summary compares with the fastest eligible baseline."""
    known = [each for each in summary["baselines"] if each["eligible"] and each["median_s"] is not None]
    best = min(known, key=lambda each: each["median_s"], default=None)
    if best is None:
        return "no baseline ran"
    if best["verdict"] is None:
        return f"it is {best['name']}"
    return f"{best['verdict']}, {best['ratio_to_plan']:.2f}x ({best['name']}, {time_text(best['median_s'])})"


def crop_json(crop: Crop) -> dict[str, Any]:
    """Return a crop as `tune --json` gives it."""
    return {"output": crop.output, "axis": crop.axis, "dimension": crop.dimension, "times": crop.times}


def _extents(dimensions: Sequence[Dimension], inputs: Mapping[str, TensorSpec]) -> dict[str, int]:
    return {each.name: inputs[each.places[0][0]].shape[each.places[0][1]] or 0 for each in dimensions}


def _too_far(judged: Sequence[Mapping[str, Any]], cases: Sequence[Case], limit: float) -> str:
    """Say which padded input a plan answers too far off, or return ""."""
    names = [case for case in cases for _ in case.samples]
    for case, found in zip(names, judged, strict=True):
        accuracy = found["accuracy"]
        why = found["problem"] or over_limit(accuracy.get("cosine", -1.0), accuracy.get("relative_l2", 1e9), limit)
        if why:
            said = ", ".join(f"{name}={extent}" for name, extent in case.extents.items())
            return f"the plan answers an input of {said} too far off ({why})"
    return ""
