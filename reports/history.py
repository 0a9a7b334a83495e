"""The whole database as a few pages: which models were tuned where, and how each model's best plan went over time."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from aivmm.reports import format as fmt
from aivmm.reports.compare import Change, by_medians, through_baseline
from aivmm.reports.data import ReportData, throughput_wanted
from aivmm.reports.race import Figure, best_baseline, figure_of


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One run in the history of a model. `change` is against the run before it of the same goal on the same machine."""

    data: ReportData
    figure: Figure | None
    machine: str
    change: Change | None = None
    before: str = ""  # the id of the run that `change` is against

    @property
    def page(self) -> str:
        """The file name of the run's own report: of its id alone, never of a name."""
        return f"run-{_digest(self.data.run.id)}.html"

    @property
    def regressed(self) -> bool:
        """True when the plan is slower than that of the run before, beyond noise."""
        return self.change is not None and self.change.verdict == "slower"

    @property
    def value(self) -> str:
        """The plan's figure by the goal."""
        if self.figure is None:
            return "no plan"
        return (fmt.per_second if throughput_wanted(self.data) else fmt.seconds)(self.figure.median)

    @property
    def gain(self) -> str:
        """The plan against the best baseline that could have run instead."""
        rival = best_baseline(self.data)
        return fmt.ratio(rival.ratio) if rival is not None else "–"

    @property
    def targets(self) -> str:
        """Where the plan runs."""
        return self.data.planned.target if self.data.planned is not None else "–"


@dataclass(frozen=True, kw_only=True)
class History:
    """All runs of one model, newest first."""

    name: str
    entries: tuple[Entry, ...]

    @property
    def page(self) -> str:
        """The file name of this model's page."""
        return f"model-{_digest(self.name)}.html"

    @property
    def latest(self) -> Entry:
        """The newest run with a plan, or else the newest."""
        return next((each for each in self.entries if each.figure is not None), self.entries[0])

    @property
    def regressions(self) -> int:
        """How many runs lost speed against the run before."""
        return sum(each.regressed for each in self.entries)


def histories(runs: Sequence[ReportData]) -> tuple[History, ...]:
    """Return the history of each model, by name; the models in alphabetical order."""
    by_model: dict[str, list[ReportData]] = {}
    for data in sorted(runs, key=lambda data: (data.run.started_at, data.run.id)):
        by_model.setdefault(data.run.model.name, []).append(data)
    return tuple(History(name=name, entries=tuple(reversed(_entries(found)))) for name, found in sorted(by_model.items()))


def machines(runs: Sequence[ReportData]) -> tuple[tuple[str, int], ...]:
    """Return each machine with the count of its runs, the busiest first."""
    counts: dict[str, int] = {}
    for data in runs:
        counts[machine(data)] = counts.get(machine(data), 0) + 1
    return tuple(sorted(counts.items(), key=lambda each: (-each[1], each[0])))


def machine(data: ReportData) -> str:
    """Say on what a run took place: its devices, each once."""
    devices = []
    for each in data.environments:
        cores = f", {each.usable_cores} cores" if each.usable_cores else ""
        devices.append(f"{each.device_model}{cores}")
    return " + ".join(dict.fromkeys(devices)) or "unknown"


def _entries(runs: Sequence[ReportData]) -> list[Entry]:
    """Return the runs of one model, oldest first, each compared with the one before it that had the same goal, file, batch and machine."""
    before: dict[tuple[object, ...], ReportData] = {}
    found = []
    for data in runs:
        figure = figure_of(data, data.planned) if data.planned is not None else None
        key = (data.run.objective, data.run.constraints, data.run.model.sha256, data.run.model.batch, _environment(data))
        earlier = before.get(key) if figure is not None else None
        change = _change(earlier, data) if earlier is not None else None
        found.append(Entry(data=data, figure=figure, machine=machine(data), change=change, before=earlier.run.id if earlier else ""))
        if figure is not None:
            before[key] = data
    return found


def _change(earlier: ReportData, data: ReportData) -> Change | None:
    """Compare through a baseline only where nothing else changed: an upgrade that slows the baseline too is a regression to be seen."""
    same = {each.fingerprint for each in earlier.environments} == {each.fingerprint for each in data.environments}
    return (through_baseline(earlier, data) if same else None) or by_medians(earlier, data)


def _environment(data: ReportData) -> tuple[str, ...]:
    """Return what tells machines apart without the runtimes' versions: an upgrade that costs speed is a regression to be seen."""
    return tuple(
        sorted({f"{each.target} {each.device_model} {each.usable_cores} {each.power_limit_w} {each.system}" for each in data.environments})
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
