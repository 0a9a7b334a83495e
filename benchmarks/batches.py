"""What whole models take at several batches, and how well a batch is told from the others: a part of `benchmarks/prediction.py`.

All batches of a model on all targets take turns in one race, each in blocks beside the reference executable (the model's own batch on
ONNX Runtime); what they take is told over it. They are loaded before the race begins, so that its seconds are seconds of racing: counted
together, ten compiled models left a race three rounds. A second pass, minutes later and in other processes, says how well the first can be
repeated at all, which no prediction can beat.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from aivmm.planner.scaling import batch_points, left_out, scaled

BATCHES = (1, 2, 4, 8, 16)
_RACE_S, _MOST_ROUNDS = 12.0, 40
Times = Mapping[int, float]  # batch -> seconds of a call
Row = Mapping[str, Any]


def whole_times(model: str) -> dict[str, dict[str, float]]:
    """Race the whole model in fp32 at several batches on each CPU target; return target -> batch -> seconds of one call."""
    from aivmm.errors import AivmmError
    from aivmm.probes.client import WorkerDied
    from aivmm.probes.compare import compare
    from aivmm.probes.lab import Lab, Loaded
    from aivmm.probes.race import by_of, race
    from aivmm.runtime.config import Config
    from aivmm.runtime.registry import default_backends
    from aivmm.runtime.target import select
    from aivmm.tuner.options import TuneOptions
    from aivmm.tuner.subject import Subject

    with tempfile.TemporaryDirectory(prefix="aivmm-batches-") as folder, Lab() as lab:
        subject = Subject(TuneOptions(model=model, targets=("*:CPU",)), lab, Path(folder))
        found, unavailable = lab.discover(list(default_backends()))
        targets = sorted(select(found, ["*:CPU"], unavailable), key=lambda each: str(each) != "onnxruntime:CPU")
        subject.remember_targets(found)
        subject.make_reference(found)
        base = subject.base_batch
        batches = sorted(BATCHES, key=lambda each: each != base) if subject.facts.batchable else [base]
        loads: list[tuple[str, int, Loaded]] = []
        for target in targets:
            for batch in batches:
                prepared = subject.at(batch)
                try:
                    inputs, expected = prepared.samples[0], prepared.references[0]
                    file, config = subject.variant(batch, None), Config(precision="fp32")
                    loaded = lab.load(file, target, config, inputs=inputs, reference=expected, batch=batch, callers=1)
                except (AivmmError, WorkerDied):
                    continue  # refused: there is no such row
                loaded.contestant.keep = True
                loads.append((str(target), batch, loaded))
        contestants = [each.contestant for _, _, each in loads]
        race(contestants, budget_s=_RACE_S, most_rounds=_MOST_ROUNDS, enough=lambda _: False)
        reference = contestants[0].samples()
        assert reference is not None
        times: dict[str, dict[str, float]] = {}
        for target, batch, loaded in loads:
            mine = loaded.contestant.samples()
            if mine is not None and loaded.contestant.failed is None:
                ratio = compare(mine, reference, by=by_of(loaded.contestant, contestants[0])).ratio
                times.setdefault(target, {})[str(batch)] = float(f"{ratio * reference.median_s:.5g}")
        return {target: dict(sorted(each.items(), key=lambda pair: int(pair[0]))) for target, each in times.items()}


def recorded_batches(model: str) -> dict[str, Any]:
    """Return a row of the model: its name and `whole_times`."""
    return {"model": Path(model.removeprefix("demo:")).stem, "targets": whole_times(model)}


# --- forms: what is known at some batches -> what is expected at another one. `interpolated` is the planner's.


def interpolated(times: Times, batch: int) -> float:
    """A fixed time and one in proportion to the samples, between the two neighbours."""
    found = scaled(batch_points(times), float(batch))
    assert found is not None
    return found.seconds


def fitted(times: Times, batch: int) -> float:
    """One fixed time and one slope for all batches, neither of them negative, by least relative errors."""
    import numpy as np
    from scipy.optimize import nnls

    table = np.array([[1 / seconds, size / seconds] for size, seconds in times.items()])
    (fixed, slope), _ = nnls(table, np.ones(len(times)))
    return float(fixed + slope * batch)


def powers(times: Times, batch: int) -> float:
    """A power of the batch between the two neighbours: a line where both axes are logarithmic."""
    below, above = max(each for each in times if each < batch), min(each for each in times if each > batch)
    share = math.log(batch / below) / math.log(above / below)
    return math.exp((1 - share) * math.log(times[below]) + share * math.log(times[above]))


def corrected(times: Times, batch: int) -> float:
    """The fit of all, times how far it is off at the two neighbours."""
    off = {size: seconds / fitted(times, size) for size, seconds in times.items()}
    return fitted(times, batch) * powers(off, batch)


def mixed(times: Times, batch: int) -> float:
    """The geometric mean of the planner's and the fit of all."""
    return math.sqrt(interpolated(times, batch) * fitted(times, batch))


FORMS: dict[str, Callable[[Times, int], float]] = {
    "fixed time and slope between neighbours (the planner's)": interpolated,
    "fixed time and slope fitted to all": fitted,
    "the same, corrected by its errors at the neighbours": corrected,
    "mean of the first two": mixed,
    "power of the batch between neighbours": powers,
}


def times_of(row: Row) -> Iterator[tuple[str, dict[int, float]]]:
    """Yield each target with its times, where there is a batch between two others."""
    for target, raw in row["targets"].items():
        times = {int(batch): seconds for batch, seconds in raw.items()}
        if len(times) > 2:
            yield target, times


def errors_of(form: Callable[[Times, int], float], rows: Sequence[Row]) -> list[float]:
    """Return the signed relative errors of a form at each batch between others, that one left out."""
    return [
        form({each: seconds for each, seconds in times.items() if each != batch}, batch) / times[batch] - 1
        for row in rows
        for _, times in times_of(row)
        for batch in sorted(times)[1:-1]
    ]


def chosen_by_others(rows: Sequence[Row]) -> list[float]:
    """Return the errors where each model is told by the form that is best for the others: what choosing on one's own data is worth."""
    found: list[float] = []
    for row in rows:
        rest = [each for each in rows if each["model"] != row["model"]]
        form = min(FORMS.values(), key=lambda each: statistics.median(map(abs, errors_of(each, rest))))
        found += errors_of(form, [row])
    return found


def apart(first: Sequence[Row], again: Sequence[Row]) -> list[float]:
    """Return how far two passes differ, relative to the same batch of the reference: |log ratio|, each shape of the curve for itself."""
    found = []
    for row in again:
        before = next((each for each in first if each["model"] == row["model"]), None)
        if before is None:
            continue
        earlier = dict(times_of(before))
        for target, times in times_of(row):
            logs = {batch: math.log(times[batch] / earlier[target][batch]) for batch in times if batch in earlier.get(target, {})}
            middle = statistics.median(logs.values()) if logs else 0.0  # that the machine is slower as a whole is nothing of the curve's
            found += [abs(each - middle) for batch, each in logs.items() if batch in sorted(logs)[1:-1]]
    return found


def report(first: Sequence[Row], again: Sequence[Row]) -> list[str]:
    """Return the tables."""
    rows = [row for row in first if any(times_of(row))]
    if len(rows) < 2:
        return [f"There are batches between others of {len(rows)} models only: nothing to tell yet."]
    errors = [abs(each) for each in errors_of(interpolated, rows)]
    reached = "met" if statistics.median(errors) <= 0.05 else "missed"
    held = [held for row in rows for _, times in times_of(row) for held in _within_intervals(times)]
    lines = [
        f"{len(rows)} models that take batches, on each CPU target, in fp32: {len(errors)} batches, each told from the others.",
        f"To reach: a median error of 5 %: {reached}. Of the planner's 95 % intervals {sum(held)} hold.",
        *_repeated(apart(first, again)),
        "",
        "| form | median error | mean | 90 % below | within 10 % |",
        "|---|---|---|---|---|",
        *(_line(name, errors_of(form, rows)) for name, form in FORMS.items()),
        _line("for each model the form that is best for the others", chosen_by_others(rows)),
        "",
        "Milliseconds a sample, and the errors of the planner's form:",
        "",
        "| model | target | by batch | errors |",
        "|---|---|---|---|",
    ]
    for row in rows:
        for target, times in times_of(row):
            shown = ", ".join(f"{batch}: {1e3 * seconds / batch:.4g}" for batch, seconds in times.items())
            off = errors_of(interpolated, [{"model": row["model"], "targets": {target: times}}])
            told = ", ".join(f"{batch}: {each:+.1%}" for batch, each in zip(sorted(times)[1:-1], off, strict=True))
            lines.append(f"| {row['model']} | {target} | {shown} | {told} |")
    return lines


def _within_intervals(times: Times) -> list[bool]:
    """Say of each batch between others whether it lies in the 95 % interval that the others give it."""
    return [abs(math.log(found.seconds / point.seconds)) <= 1.96 * found.sigma for point, found in left_out(batch_points(times))]


def _repeated(differences: Sequence[float]) -> list[str]:
    """Say how far two passes are apart, where there were two."""
    if not differences:
        return []
    ninety = sorted(differences)[math.ceil(0.9 * len(differences)) - 1]
    middle = statistics.median(differences)
    return [
        f"Measured again minutes later, in other processes, {len(differences)} batches came out {middle:.1%} apart"
        f" (median; 90 % below {ninety:.1%})."
    ]


def _line(name: str, errors: Sequence[float]) -> str:
    sizes = sorted(map(abs, errors))
    ninety, within = sizes[math.ceil(0.9 * len(sizes)) - 1], sum(each <= 0.10 for each in sizes) / len(sizes)
    return f"| {name} | {statistics.median(sizes):.1%} | {statistics.fmean(sizes):.1%} | {ninety:.1%} | {within:.0%} |"
