"""How far the planner's predictions are from what is measured: tier by tier, and end to end.

    python -m benchmarks.prediction [--state FOLDER] [--minutes M] [--segments 2 0 3 4] [--out benchmarks/results/prediction.md]
        [--data FILE] [MODEL ...]
    python -m benchmarks.prediction --only batches [--state FOLDER] [--minutes 5.5] [--out benchmarks/results/batches.md] [MODEL ...]

Records, then evaluates. Twenty quiet minutes make about thirty forced cuts and the parts of ten models. Recorded are, for each model
(default: all demo models but the three with hundreds of megabytes of weights, and in `../shared/models`) on each CPU target: the whole
model in fp32 at several batches, raced together; each unique operator and each block alone; the ceilings; and what the runtime makes of the
nodes. And tunes with forced cuts: the proof of each gives the cut plan and the baselines, each over the reference executable in the same
race, while what was predicted of it is over the reference that took turns with its probes minutes before. `--segments` records a part
only: cuts in so many segments, 0 for the parts (`--segments 3 demo:lstm` is one tune). What is done is kept in
`--state`, one file a model or tune, and the next call goes on from there if it is of the same commit; with `--minutes` nothing is begun
after that time. `--data` writes what was recorded into one file, and as accepted the errors of what this code computes from it (what a tune
told was computed when it was recorded): `tests/planner/prediction.json` is such a file, and a test fails when errors on it grow.
`--only batches` records the whole models alone, each at its batches, and begins with those that it measured first once more while there
is time: how far the two are apart is what no prediction can beat. It takes less than six minutes on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from aivmm.models.demo import demo_names
from aivmm.planner.evidence import Estimate
from aivmm.planner.modelled import Alone, Factors, operator
from aivmm.planner.scaling import Point, batch_points, left_out
from aivmm.planner.segments import Segments
from aivmm.probes.ceilings import Ceilings
from aivmm.probes.compare import compare
from aivmm.runtime.cpu import cpu_device
from benchmarks import batches
from benchmarks.batches import whole_times

ROOT = Path(__file__).parent.parent
HEAVY = ("alexnet", "zfnet512", "vgg19")
SLOW = ("densenet121", "inception_v1", "inception_v2", "resnet50", "bertsquad", "vgg16")  # a minute a tune: they come last
SEGMENTS = (2, 0, 3, 4)  # forced cuts in so many; 0 stands for the parts. What there is after half of the time says something of each
PARTS_S = 10.0
SUMS = {"planned": "planned_ratio", "believed": "believed_ratio"}  # of cut plans: sums of segments and boundaries, as rows have them
COMPUTED = ("interpolated", "modelled")  # tiers that this code computes from what was recorded; the others compare recorded numbers
PLANNED = "cut plans, sum of segments measured in place"
Row = Mapping[str, Any]


def main() -> None:
    """Record, evaluate, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--state", type=Path, default=Path(tempfile.gettempdir()) / "aivmm-prediction")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--segments", type=int, nargs="*", default=[*SEGMENTS], help="forced cuts in so many segments; 0 is the parts")
    parser.add_argument("--only", choices=["batches"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--data", type=Path)
    arguments = parser.parse_args()
    arguments.state.mkdir(parents=True, exist_ok=True)
    arguments.out = arguments.out or ROOT / "benchmarks" / "results" / f"{arguments.only or 'prediction'}.md"
    models = arguments.models or all_models()
    if arguments.only:
        batches_alone(models, arguments.state, time.monotonic() + 60 * (arguments.minutes or 5.0), arguments.out)
        return
    whole = record(models, arguments.state, time.monotonic() + 60 * (arguments.minutes or 25.0), arguments.segments)
    data = {
        "commit": code(),
        "parts": [kept(path) for path in sorted(arguments.state.glob("parts-*.json"))],
        "plans": [row for path in sorted(arguments.state.glob("plans-*.json")) for row in kept(path)],
    }
    lines = [*environment(whole), "", *report(data)]
    arguments.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    if arguments.data is not None:
        accepted = {name: round(middle(errors), 4) for name, errors in tiers(data).items() if errors and name.startswith(COMPUTED)}
        arguments.data.write_text(json.dumps({**data, "accepted": accepted}, separators=(",", ":")) + "\n")


def batches_alone(models: Sequence[str], state: Path, ends: float, out: Path) -> None:
    """Record whole models at their batches, and again while there is time; write what the others tell of each batch."""
    passes: list[list[Row]] = [[], []]
    whole = True
    for number, model in [(number, model) for number in range(len(passes)) for model in models]:
        path = state / f"batches-{stem(model)}-{number}.json"
        if not path.exists():
            if time.monotonic() > ends:
                whole = whole and number > 0
                continue
            print(f"{model}, pass {number + 1} ...", file=sys.stderr, flush=True)
            keep(path, batches.recorded_batches(model))
        passes[number].append(kept(path))
    lines = environment(whole)
    lines[0] = "# Predictions: a batch left out"
    lines += ["", *batches.report(*passes)]
    out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def all_models() -> list[str]:
    """Return the models at hand."""
    shared = sorted((ROOT.parent / "shared" / "models").glob("*.onnx"))
    found = [*(f"demo:{name}" for name in demo_names() if name not in HEAVY), *map(str, shared)]
    return sorted(found, key=lambda each: stem(each) in SLOW)


def environment(whole: bool) -> list[str]:
    """Return where and when this ran, and whether it ran to its end."""
    packages = ", ".join(f"{each} {version(each)}" for each in ("aivmm", "openvino", "numpy"))
    load = ", ".join(f"{each:.1f}" for each in psutil.getloadavg())
    moment = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    more = "" if whole else " **Not all was recorded within the time given: the same command goes on.**"
    return [
        "# Predictions",
        "",
        f"{moment}; {cpu_device().model}, {os.cpu_count()} cores; {packages}; commit {code()}; load average {load}.{more}",
    ]


# --- recording


@cache
def code() -> str:
    """Return the commit that is checked out here; "unknown" outside of a repository. What was changed since is not seen."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def kept(path: Path) -> Any:
    """Return what a file of the state holds; end in a line where other code recorded it, whose rows would be mixed with those of this."""
    held = json.loads(path.read_text())
    commit = held["commit"] if isinstance(held, dict) and "found" in held else "of an earlier version"
    if commit != code():
        raise SystemExit(f"{path} was recorded by code {commit}, and this is {code()}: name an empty folder with --state")
    return held["found"]


def record(models: Sequence[str], state: Path, ends: float, counts: Sequence[int]) -> bool:
    """Record what is not there yet, plans in so many segments (0: the parts), in that order; return whether all is."""
    jobs = [
        (state / (f"plans-{stem(model)}-{count}.json" if count else f"parts-{stem(model)}.json"), model, count)
        for count in counts
        for model in models
    ]
    whole = True
    for number, (path, model, count) in enumerate(jobs):
        if path.exists():
            kept(path)
            continue
        if time.monotonic() > ends:
            return False
        print(f"[{number + 1}/{len(jobs)}] {model} {f'in {count} segments' if count else 'parts'} ...", file=sys.stderr, flush=True)
        found = recorded_plans(model, count, state) if count else recorded_parts(model, state)
        if found is None:
            whole = False
            continue
        keep(path, found)
    return whole


def keep(path: Path, found: Any) -> None:
    """Write a file of the state, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"commit": code(), "found": found}))
    partial.replace(path)


def stem(model: str) -> str:
    """Return a model's name for a file."""
    return Path(model.removeprefix("demo:")).stem


def recorded_parts(model: str, state: Path) -> dict[str, Any]:
    """Return operators, blocks, ceilings, and the whole model at several batches, by target."""
    from aivmm.probes.records import Measured
    from aivmm.tuner.options import TuneOptions
    from aivmm.tuner.profile import profile_model
    from aivmm.tuner.progress import Silent

    options = TuneOptions(model=model, db=str(state / "probes.db"), targets=("*:CPU",), budget_s=PARTS_S)
    profile = profile_model(options, Silent())
    structure = profile.subject.structure
    wholes = whole_times(model)
    targets = {}
    for target in map(str, profile.targets):
        ceilings = profile.ceilings.get((target, "fp32"))
        if ceilings is None or target not in wholes:
            continue
        fusion = profile.fusions.get(target)
        own = None if fusion is None else set(fusion.own)
        operators = []
        for each in structure.operators:
            outcome = profile.operators.get((each.signature, target, "fp32"))
            if isinstance(outcome, Measured):
                with_kernel = each.count if own is None else len(own & set(each.nodes))
                operators.append(
                    [each.op_type, each.flops, each.bytes, digits(outcome.samples.median_s), with_kernel, each.count - with_kernel]
                )
        blocks = [profile.blocks.get((block.index, target)) for block in structure.blocks]
        targets[target] = {
            "ceilings": asdict(ceilings),
            "fusion_known": own is not None,
            "operators_lacking": sum(each.count for each in structure.operators) - sum(each[4] + each[5] for each in operators),
            "operators": operators,
            "blocks": [digits(each.samples.median_s) if isinstance(each, Measured) else None for each in blocks],
            "whole": wholes[target],
        }
    moved = sum((each.bytes or 0) * each.count for each in structure.operators)
    return {
        "model": stem(model),
        "flops": structure.flops,
        "bytes": moved,
        "weight_bytes": structure.weight_bytes,
        "batch": profile.subject.base_batch,
        "targets": targets,
    }


def recorded_plans(model: str, count: int, state: Path) -> list[dict[str, Any]] | None:
    """Tune with a forced cut; return what was predicted and proven of each entrant, over the reference, the reference itself left out.

    Nothing where the model has no such plan; None when the tune broke, to be tried again.
    """
    from aivmm.db.database import Database

    database = state / "probes.db"
    with tempfile.TemporaryDirectory() as folder:
        tuning = [sys.executable, "-P", "-m", "aivmm", "tune", model, "--db", str(database), "-o", f"{folder}/plan.aivmm", "--json", "-q"]
        done = subprocess.run(
            [*tuning, "--targets", "*:CPU", "--budget", "10s", "--trials", "1", "--min-segments", str(count)],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        print(f"  {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return [] if done.returncode in (2, 3) else None
    summary = json.loads(done.stdout)
    name = summary["predicted"]["reference"]
    with Database.open(str(database)) as opened:
        proofs = opened.proofs(opened.runs(1)[0].id)
    reference = next((each for each in proofs if each.name == name and each.samples), None)
    if reference is None or reference.samples is None:
        return None
    rows = []
    shared = set(reference.samples.rounds)
    for each in proofs:
        # What lost the choice among finalists never raced against the reference.
        raced = each is not reference and each.samples is not None and shared & set(each.samples.rounds)
        if not raced or each.samples is None or "predicted_ratio" not in each.metrics or each.callers != 1:
            continue
        found = compare(each.samples, reference.samples, scale=reference.batch / each.batch)
        rows.append(
            {
                "model": stem(model),
                "plan": f"{each.name} of {count}" if "plan" in each.name else each.name,
                "forced": "plan" in each.name,
                "predicted": digits(each.metrics["predicted_ratio"]),
                "sigma": digits(each.metrics["predicted_sigma"]),
                "measured": each.metrics["predicted_measured"],
                **{name: digits(each.metrics[metric]) for name, metric in SUMS.items() if metric in each.metrics},
                "assembled": each.metrics.get("planned_assembled", 0.0) > 0,
                "proven": digits(found.ratio),
                "proven_low": digits(found.low),
                "proven_high": digits(found.high),
            }
        )
    return rows


def digits(value: float) -> float:
    """Return a value with five significant digits."""
    return float(f"{value:.5g}")


# --- evaluating


def tiers(data: Row) -> dict[str, list[float]]:
    """Return the relative errors of each tier, |predicted / measured - 1|."""
    parts, plans = data["parts"], distinct(data["plans"])
    return {
        "interpolated: a batch left out": [error for row in parts for error in batches_left_out(row)],
        "interpolated: an operator left out": [error for row in parts for error in operators_left_out(row, [row])],
        "interpolated: a model's operators left out": [error for row in parts for error in operators_left_out(row, others(parts, row))],
        "modelled: a whole model from its blocks": [error for row in parts for error in from_blocks(row)],
        "modelled: a whole model from its operators, that model left out": list(from_operators(parts, fusion=True)),
        "modelled: the same without knowing what is fused": list(from_operators(parts, fusion=False)),
        "end to end: plans that rest on measurements": [error(row["predicted"], row["proven"]) for row in plans if row["measured"] > 0.999],
        "end to end: forced cuts among them": [
            error(row["predicted"], row["proven"]) for row in plans if row["measured"] > 0.999 and row["forced"]
        ],
        "end to end: plans that do not": [error(row["predicted"], row["proven"]) for row in plans if row["measured"] <= 0.999],
        "cut plans, as told": [error(row["predicted"], row["proven"]) for row in plans if "planned" in row],
        PLANNED: [error(row["planned"], row["proven"]) for row in plans if "planned" in row],
        f"{PLANNED}, all of it in other chains": [
            error(row["planned"], row["proven"]) for row in plans if "planned" in row and row["assembled"]
        ],
        "cut plans, sum believed before their own chain was timed": [
            error(row["believed"], row["proven"]) for row in plans if "believed" in row
        ],
    }


def distinct(plans: Sequence[Row]) -> list[Row]:
    """Return each plan once: baselines are proven again beside each forced cut."""
    return list({(row["model"], row["plan"]): row for row in plans}.values())


def others(parts: Sequence[Row], row: Row) -> list[Row]:
    """Return the other models."""
    return [each for each in parts if each is not row]


def error(predicted: float, measured: float) -> float:
    """Return the relative error."""
    return abs(predicted / measured - 1)


def middle(errors: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(errors)


def ceilings_of(place: Row) -> Ceilings:
    """Return the ceilings of a target as they were recorded."""
    raw = place["ceilings"]
    return Ceilings(flops_per_s=raw["flops_per_s"], copies=tuple(map(tuple, raw["copies"])), call_s=raw["call_s"])  # type: ignore[arg-type]


def floor_s(ceilings: Ceilings, flops: float | None, moved: float | None) -> float | None:
    """Return the least seconds of so much work."""
    found = ceilings.roofline(seconds=1.0, flops=flops, moved_bytes=moved)
    return None if found is None else found.share


def batches_left_out(row: Row) -> Iterator[float]:
    """Yield the errors at batches between others, each predicted from the others."""
    for place in row["targets"].values():
        points = batch_points({int(batch): seconds for batch, seconds in place["whole"].items()})
        yield from (error(found.seconds, point.seconds) for point, found in left_out(points))


def operator_points(rows: Iterable[Row], target: str, *, without: int | None = None) -> dict[str, list[Point]]:
    """Return the measured operators by type; one of the first row's may be left out."""
    points: dict[str, list[Point]] = {}
    for row in rows:
        place = row["targets"].get(target)
        if place is None:
            continue
        for number, (op_type, flops, moved, seconds, *_) in enumerate(place["operators"]):
            least = floor_s(ceilings_of(place), flops, moved)
            if least is not None and number != without:
                points.setdefault(op_type, []).append(Point(floor_s=least, seconds=seconds))
    return points


def operators_left_out(row: Row, known: Sequence[Row]) -> Iterator[float]:
    """Yield the errors of each operator, predicted from others of its type in the models `known`."""
    for target, place in row["targets"].items():
        shared = None if any(each is row for each in known) else operator_points(known, target)
        for number, (op_type, flops, moved, seconds, *_) in enumerate(place["operators"]):
            points = operator_points([row], target, without=number) if shared is None else shared
            least = floor_s(ceilings_of(place), flops, moved)
            if least is None:
                continue
            same = [point for point in points.get(op_type, ()) if not math.isclose(point.floor_s, least, rel_tol=1e-9)]
            found = operator(op_type, least, {op_type: same})
            if found is not None:
                yield error(found.seconds, seconds)


def from_blocks(row: Row) -> Iterator[float]:
    """Yield the error of the whole model on each target, from its blocks alone, before any segment was measured."""
    for place in row["targets"].values():
        whole = place["whole"].get(str(row["batch"]))
        if whole is None or len(place["blocks"]) < 2 or None in place["blocks"]:
            continue
        belief = Segments([Estimate(seconds=each, sigma=0.03, source="measured") for each in place["blocks"]])
        found = belief.segment(0, len(place["blocks"]) - 1)
        assert found is not None
        yield error(found.seconds, whole)


def from_operators(parts: Sequence[Row], *, fusion: bool) -> Iterator[float]:
    """Yield the error of each whole model on each target, from its operators, with factors fitted to the other models there."""
    for target in sorted({target for row in parts for target in row["targets"]}):
        known: list[tuple[Alone, float]] = []
        for row in parts:
            place = row["targets"].get(target)
            if place is None or str(row["batch"]) not in place["whole"] or place["operators_lacking"]:
                continue
            nodes = [(seconds, own, fused) if fusion else (seconds, own + fused, 0) for _, _, _, seconds, own, fused in place["operators"]]
            known.append((Alone.of(nodes, place["ceilings"]["call_s"]), place["whole"][str(row["batch"])]))
        for number, (alone, seconds) in enumerate(known):
            factors = Factors.fitted([each for index, each in enumerate(known) if index != number])
            yield error(factors.seconds(alone), seconds)


# --- writing


def report(data: Row) -> list[str]:
    """Return the tables."""
    found = tiers(data)
    plans = distinct(data["plans"])
    forced = sum(row["forced"] for row in plans)
    lines = [
        f"Errors are |predicted / measured - 1|. In sum {len(data['parts'])} models and {len(plans)} plans, {forced} of them forced cuts.",
        "",
        "| tier | predictions | median | 90 % below | within 10 % | |",
        "|---|---|---|---|---|---|",
    ]
    for name, errors in found.items():
        if not errors:
            lines.append(f"| {name} | 0 | - | - | - | |")
            continue
        within = sum(each <= 0.10 for each in errors) / len(errors)
        ninety = sorted(errors)[min(len(errors) - 1, math.ceil(0.9 * len(errors)) - 1)]
        lines.append(f"| {name} | {len(errors)} | {middle(errors):.1%} | {ninety:.1%} | {within:.0%} | {verdict(name, errors, within)} |")
    told = [row for row in plans if row["measured"] > 0.999]
    if told:
        inside = sum(abs(math.log(row["predicted"] / row["proven"])) <= 1.96 * math.hypot(row["sigma"], proof_sigma(row)) for row in told)
        lines += [
            "",
            f"Of {len(told)} plans that rest on measurements {inside} lie within the 95 % interval that prediction and proof make.",
        ]
    lines += [
        "",
        "A cut plan's own chain is raced whole before it is proven, so what is told of it shows how well a race repeats. What its segments",
        "and boundaries add up to shows errors of the planner: as planned (mostly shares of this very chain; where all segments were timed",
        "in other chains, that is said), and as believed before this chain was first timed.",
        "",
        "## End to end",
        "",
        "Times over those of the reference executable, which took turns with the probes, and again with the proof.",
    ]
    lines += [
        "",
        "| model | plan | sum believed first | sum planned | predicted | proven | 95 % | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in plans:
        interval = f"{row['proven_low']:.3f} to {row['proven_high']:.3f}"
        off = row["predicted"] / row["proven"] - 1
        sums = " | ".join(f"{row[name]:.3f}" if name in row else "" for name in ("believed", "planned"))
        sums += " (other chains)" if row.get("assembled") else ""
        lines.append(
            f"| {row['model']} | {row['plan']} | {sums} | {row['predicted']:.3f} | {row['proven']:.3f} | {interval} | {off:+.1%} |"
        )
    return lines


def proof_sigma(row: Row) -> float:
    """Return the standard deviation of the logarithm of what was proven."""
    return math.log(row["proven_high"] / row["proven_low"]) / (2 * 1.96)


def verdict(name: str, errors: Sequence[float], within: float) -> str:
    """Say whether a tier reached what it has to; nothing where nothing is asked of it."""
    if name == "interpolated: a batch left out":
        said = "met" if middle(errors) <= 0.05 else "missed"
        return f"{said}; no tune interpolates a batch (decisions 0057 and 0062)"
    if name == "end to end: plans that rest on measurements":
        return "met" if middle(errors) <= 0.05 and within >= 0.9 and len(errors) >= 30 else "missed"
    return ""


if __name__ == "__main__":
    main()
