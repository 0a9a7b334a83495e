"""Tunes one model at several shapes and writes one bundle that picks its plan by the inputs' shapes."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from aivmm.errors import AivmmError, UsageError
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
from aivmm.tuner.families import combine
from aivmm.tuner.many import ManyOutcome, Prefixed, report_beside, summed
from aivmm.tuner.options import DEFAULT_COSINE, TuneOptions
from aivmm.tuner.other_shapes import Fallback, OtherShapes
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

    def run(self) -> ManyOutcome | dict[str, Any]:
        """Tune; with `dry_run` return what would be measured instead.

        Raises:
            AivmmError: what the user can fix.
        """
        started = time.perf_counter()
        output = Session(self.options, self.progress).output
        if self.options.inputs is not None or self.options.dataset is not None:
            raise UsageError("samples have one shape, and several are asked for", advice="leave them away, or tune one shape")
        if self.options.dry_run:
            found = self._session(0, Path(), output, 0.0).run()
            assert isinstance(found, dict)
            return {**found, "buckets": [each.name for each in self.wanted]}
        check_destination(output)
        with tempfile.TemporaryDirectory(prefix=f"aivmm-{os.getpid()}-", ignore_cleanup_errors=True) as name:
            folder = Path(name)
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
        shown = (output, output / f"report-{index}.html")
        return Session(options, Prefixed(self.progress, each.name), command=self.command, shown=shown)

    def _tune(self, folder: Path, output: Path) -> list[TuneOutcome]:
        """Tune each shape with an equal share of the budget; the first that has no plan ends it.

        The shares are the same whenever the same is asked: what a run has searched is known again by its budget, too.
        """
        outcomes: list[TuneOutcome] = []
        share, asked = self.options.budget_s / len(self.wanted), False
        for index in range(len(self.wanted)):
            session = self._session(index, folder, output, 0.0 if asked else share)
            found = session.run()
            assert isinstance(found, TuneOutcome)
            outcomes.append(found)
            asked = asked or session.interrupts.asked
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
        same = next((index for index, each in enumerate(inputs) if each in inputs[:index]), None)
        if same is not None:
            raise UsageError(f"{self.wanted[same].name} gives inputs of a shape that is there already", advice="drop it from the list")
        dimensions = dimensions_of(inputs, {name: [each.dims[name] for each in self.wanted] for name in self.wanted[0].dims})
        buckets = [
            Bucket(name=each.name, plan=f"plans/{index}.json", extents=_extents(dimensions, inputs[index]))
            for index, each in enumerate(self.wanted)
        ]
        self.progress.phase("checking how smaller inputs may be padded")
        paddings = self._paddings(folder, buckets, inputs, dimensions)
        paddings = self._proven(folder, bundles, plans, buckets, paddings)
        lines = self._lines(plans, outcomes, paddings)
        others = self._others(folder, bundles, plans, buckets, inputs, paddings)
        if others is not None:
            lines = (*lines, others.line)
            bundles[_OTHERS] = others.bundle
        verdict = " ".join(lines)
        combine(output, self._family(plans, buckets, paddings, verdict, others=others is not None), bundles, folder / "gathered")
        for index, found in enumerate(outcomes):
            shutil.copyfile(found.report_path, output / f"report-{index}.html")
        summary = self._summary(outcomes, output, paddings, buckets, verdict, time.perf_counter() - started)
        report, use = output / "report.html", f"import aivmm; engine = aivmm.load_plan({str(output)!r})"
        report.write_text(render_family(self._overview(plans, outcomes, paddings, lines)), encoding="utf-8")
        return ManyOutcome(plan_path=output, report_path=report, summary=summary, lines=lines, outcomes=tuple(outcomes), use=use)

    def _paddings(
        self, folder: Path, buckets: Sequence[Bucket], inputs: Sequence[Mapping[str, TensorSpec]], dimensions: Sequence[Dimension]
    ) -> Paddings:
        with Lab() as lab:
            found, _ = lab.discover(list(self.options.backends) or list(default_backends()))
            (folder / "padding").mkdir()
            return PaddingCheck(
                lab=lab,
                source=self._source(folder),
                folder=folder / "padding",
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
    ) -> Fallback | None:
        """Make and prove the plan for all other shapes, where one is asked for."""
        if self.options.other_shapes == "refuse":
            return None
        self.progress.phase("proving what runs other shapes")

        def judge(bundle: Path, cases: Sequence[Case]) -> str:
            trial = bundle.parent / "trial.aivmm"
            family = self._family(plans, buckets, paddings, "", others=True)
            combine(trial, family, {**bundles, _OTHERS: bundle}, bundle.parent / "gathered")
            return self._judged(trial, cases)

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
                judge=judge,
                judged_by=self.judged_by(),
            )
            return others.run()

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
                {"name": bucket.name, "extents": dict(bucket.extents), **found.summary}
                for bucket, found in zip(buckets, outcomes, strict=True)
            ],
            "padding": [
                {"dimension": each.name, "places": [list(place) for place in each.places], "padding": each.padding, "why": each.why}
                for each in paddings.dimensions
            ],
            "cropped": [crop_json(each) for each in paddings.crops],
            "probes": summed(outcomes),
            "wall_s": wall_s,
            "verdict": verdict,
        }

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
