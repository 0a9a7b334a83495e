"""A served workload in words, as JSON, and as the page above its models' reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from aivmm.planner.workload import Demand, Division, Option
from aivmm.reports.family import Overview, Row
from aivmm.tuner.ladder import Ladder
from aivmm.tuner.serving import LATE, Seen, Trial, rate_text
from aivmm.tuner.verdict import time_text


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """Says what came of a workload. `demands` are in the order of priority, `ladders` by model."""

    demands: Sequence[Demand]
    ladders: Mapping[str, Ladder]

    def machine(self) -> str:
        """Name the devices: `2 cores, NVIDIA H200`."""
        units = {device: count for ladder in self.ladders.values() for device, count in ladder.units.items()}
        return ", ".join(f"{count} core{'' if count == 1 else 's'}" if device == "cpu" else device for device, count in units.items())

    def division(self, division: Division) -> str:
        """Say which model runs where."""
        return "; ".join(f"{name} on {self._what(option)}" for name, option in division.options.items())

    def told(self, trial: Trial) -> tuple[str, ...]:
        """Say of each model what it runs and how it was served."""
        return tuple(f"{each.name}: {self.text(trial.division.options[each.name], trial.seen.get(each.name))}" for each in self.demands)

    def text(self, option: Option, seen: Seen | None) -> str:
        """Say what one model runs, and how it was served when it was."""
        if seen is None or not seen.count:
            return self._what(option)
        demand = self._demand(option.model)
        p99 = "" if seen.p99_s is None else f", p99 {time_text(seen.p99_s)}"
        asked = [f"priority {demand.priority}", *self._asked(demand)]
        text = f"{self._what(option)}: median {time_text(seen.latency_s)}{p99}, {rate_text(seen.rate_per_s)} served ({', '.join(asked)})"
        by_few = f", p99 by {seen.count} requests only" if demand.p99_s is not None and seen.p99_s is None else ""
        held = f"; not kept: {'; '.join(seen.broken)}" if seen.broken else f"; kept{by_few}" if len(asked) > 1 else ""
        return f"{text}{held}. A call takes {seen.slowdown:.2f} times as long as alone."

    def why_not(self, trial: Trial) -> tuple[str, ...]:
        """Say which models cannot be served, the first by priority in front, and what stands in their way."""
        if trial.error:
            return (f"Serving the models at once failed: {trial.error}.",)
        return tuple(self._why_not(each, trial.seen[each.name]) for each in self.demands if trial.seen[each.name].broken)

    def impossible(self, demand: Demand) -> str:
        """Say why a demand cannot be met whatever else runs here; "" where it may be.

        Not by what is typical: by the shortest call that was ever seen of the model, so that no noise refuses what could hold.
        """
        ladder = self.ladders[demand.name]
        if not ladder.least_s:
            return ""
        start = f"{demand.name} (priority {demand.priority}) cannot be served"
        fastest = min(ladder.options, key=lambda each: each.service_s)
        for name, limit in (("median", demand.latency_s), ("p99", demand.p99_s)):
            if limit is not None and limit < ladder.least_s:
                return (
                    f"{start}: its {name} is limited to {time_text(limit)}, and not even alone on the whole machine was any call shorter"
                    f" than {time_text(ladder.least_s)}; its fastest plan takes {time_text(fastest.service_s)} ({self._what(fastest)})."
                )
        most = max(each.replicas for each in ladder.options) / ladder.least_s
        if demand.rate_per_s is not None and demand.rate_per_s * (1 - LATE) > most:
            widest = max(ladder.options, key=lambda each: each.replicas / each.service_s)
            alone = rate_text(widest.replicas / widest.service_s)
            return (
                f"{start}: {rate_text(demand.rate_per_s)} arrive, and not even alone on the whole machine more than {rate_text(most)} could"
                f" be answered by its shortest calls; {self._what(widest)} answers {alone}."
            )
        return ""

    def _why_not(self, demand: Demand, seen: Seen) -> str:
        fastest = min(self.ladders[demand.name].options, key=lambda each: each.service_s)
        alone = f"{time_text(fastest.service_s)} ({self._what(fastest)})"
        text = f"{demand.name} (priority {demand.priority}) cannot be served: {'; '.join(seen.broken)}."
        limit = min((each for each in (demand.latency_s, demand.p99_s) if each is not None), default=None)
        if limit is not None and fastest.service_s > limit:
            return f"{text} Not even alone on the whole machine: its fastest plan takes {alone}."
        widest = max(self.ladders[demand.name].options, key=lambda each: each.replicas / each.service_s)
        most = widest.replicas / widest.service_s
        if demand.rate_per_s is not None and demand.rate_per_s > most:
            return f"{text} Not even alone on the whole machine: {self._what(widest)} answers {rate_text(most)} at most."
        first = [each.name for each in self.demands if each.priority < demand.priority]
        beside = f"{' and '.join(first)} {'are' if len(first) > 1 else 'is'} served first" if first else "the others run too"
        return f"{text} Alone its fastest plan takes {alone}, but {beside}, and calls take {seen.slowdown:.2f} times as long beside them."

    def summary(
        self,
        *,
        plan: str | None,
        report: str,
        chosen: Trial | None,
        tried: Sequence[Trial],
        alone: Mapping[str, Mapping[str, Any]],
        probes: Mapping[str, int],
        notes: Sequence[str],
        wall_s: float,
        verdict: str,
    ) -> dict[str, Any]:
        """Return the object of `tune --json`; `alone` has that of each model's own tuning."""
        return {
            "schema": 1,
            "kind": "workload",
            "plan": None if plan is None else {"path": plan, "models": [each.name for each in self.demands]},
            "report": report,
            "models": [self._model(each, chosen, alone.get(each.name)) for each in self.demands],
            "tried": [self._tried(each) for each in tried],
            "notes": list(notes),
            "probes": dict(probes),
            "wall_s": wall_s,
            "verdict": verdict,
        }

    def _model(self, demand: Demand, chosen: Trial | None, alone: Mapping[str, Any] | None) -> dict[str, Any]:
        seen = chosen.seen.get(demand.name) if chosen else None
        return {
            "name": demand.name,
            "priority": demand.priority,
            "limits": {"latency_s": demand.latency_s, "p99_s": demand.p99_s, "rate_per_s": demand.rate_per_s},
            "plan": self._option(chosen.division.options[demand.name]) if chosen else None,
            "seen": seen.as_json() if seen else None,
            "holds": None if seen is None else not seen.broken,  # null: it was never served
            "broken": list(seen.broken) if seen else [],
            "alone": alone,
        }

    def _option(self, option: Option) -> dict[str, Any]:
        shown = {"device": option.device, "threads": option.threads, "replicas": option.replicas}
        return {**shown, "alone_s": option.service_s, "text": self._what(option)}

    def _tried(self, trial: Trial) -> dict[str, Any]:
        models = {name: self._what(option) for name, option in trial.division.options.items()}
        seen = {name: each.as_json() for name, each in trial.seen.items()}
        return {"models": models, "seen": seen, "broken": list(trial.broken), "error": trial.error or None}

    def overview(self, chosen: Trial | None, lines: tuple[str, ...], links: Mapping[str, str], notes: Sequence[str]) -> Overview:
        """Return the page; `links` leads from a model to its own report."""
        columns = ("model", "priority", "plan", "asked", "median", "p99", "served", "slowed", "verdict")
        return Overview(
            title=f"{len(self.demands)} models on {self.machine() or 'this machine'}",
            lines=lines,
            columns=columns,
            rows=tuple(
                self._row(each, chosen, links.get(each.name, "")) if chosen else self._not_served(each, links.get(each.name, ""))
                for each in self.demands
            ),
            notes=tuple(notes),
            created=f"aivmm {version('aivmm')}",
        )

    def _not_served(self, demand: Demand, link: str) -> Row:
        """Return the row of a model where nothing was served."""
        ladder = self.ladders.get(demand.name)
        why = "not tuned" if ladder is None else "cannot be served" if ladder.options and self.impossible(demand) else "not served"
        cells = (str(demand.priority), "", ", ".join(self._asked(demand)) or "what is left", "", "", "", "", why)
        return Row(name=demand.name, link=link, cells=cells, tone="bad" if why == "cannot be served" else "")

    def _row(self, demand: Demand, chosen: Trial, link: str) -> Row:
        seen = chosen.seen.get(demand.name)
        what = self._what(chosen.division.options[demand.name])
        cells = (str(demand.priority), what, ", ".join(self._asked(demand)) or "what is left")
        if seen is None or not seen.count:
            why = "; ".join(seen.broken) if seen else "not served"
            return Row(name=demand.name, link=link, cells=(*cells, "", "", "", "", why), tone="bad")
        p99 = "fewer than 500 requests" if seen.p99_s is None else time_text(seen.p99_s)
        shown = (time_text(seen.latency_s), p99, rate_text(seen.rate_per_s), f"{seen.slowdown:.2f}x", "; ".join(seen.broken) or "kept")
        return Row(name=demand.name, link=link, cells=(*cells, *shown), tone="bad" if seen.broken else "good")

    def _asked(self, demand: Demand) -> list[str]:
        limits = [("latency", demand.latency_s), ("p99", demand.p99_s)]
        asked = [f"{name}<={time_text(value)}" for name, value in limits if value is not None]
        return [*asked, *([f"{rate_text(demand.rate_per_s)} arriving"] if demand.rate_per_s is not None else [])]

    def _demand(self, name: str) -> Demand:
        return next(each for each in self.demands if each.name == name)

    def _what(self, option: Option) -> str:
        return self.ladders[option.model].texts[option.name]
