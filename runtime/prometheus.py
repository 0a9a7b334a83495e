"""An engine's statistics for Prometheus. Imported only by who wants that: `pip install 'aivmm[prometheus]'`.

from prometheus_client import REGISTRY, start_http_server
from aivmm.runtime.prometheus import EngineCollector

REGISTRY.register(EngineCollector(engine))
start_http_server(9000)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Protocol

from aivmm.errors import UsageError
from aivmm.runtime.clocks import QUANTILES

if TYPE_CHECKING:
    from prometheus_client import Metric

_STAGE = ("stage", "target", "precision")
_Part = tuple[tuple[str, ...], Mapping[str, Any]]  # the values of the labels, and statistics


class HasStats(Protocol):
    """An engine, as far as a collector asks."""

    def stats(self) -> dict[str, Any]:
        """Return its statistics."""


class EngineCollector:
    """A collector: it reads `engine.stats()` when it is scraped, and costs nothing in between.

    Seconds and bytes are counted since the engine was loaded; quantiles are over the last runs (up to 1024 a stage and lane). A registry
    takes one collector: several engines are a mapping from names to engines, which what `load_plan` gives of a workload is. Engines of
    several shapes have a label `shape`.
    """

    def __init__(self, engine: HasStats | Mapping[str, HasStats], *, model: str = "") -> None:
        """Collect from `engine`, or from each of several; `model` is the value of the label of that name, by default the plan's.

        Raises:
            UsageError: the library is not installed.
        """
        try:
            from prometheus_client import core
        except ImportError as error:
            raise UsageError("prometheus_client is not installed", advice="pip install 'aivmm[prometheus]'") from error
        self._core = core
        self._engines = list(engine.items()) if isinstance(engine, Mapping) else [(model or _name(engine), engine)]

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics as they are now."""
        found = [(name, each.stats()) for name, each in self._engines]
        shaped = any("buckets" in stats for _, stats in found)
        labels = ("model", "shape") if shaped else ("model",)
        plans = [((name, shape) if shaped else (name,), stats) for name, whole in found for shape, stats in _by_shape(whole)]
        counter, gauge = self._core.CounterMetricFamily, self._core.GaugeMetricFamily
        yield from self._stages(labels, plans)
        yield self._each(counter, "aivmm_runs", "Runs of the first stage", labels, plans, lambda stats: stats["runs"])
        waited = "Time that requests waited for a free lane"
        yield self._each(counter, "aivmm_lane_wait_seconds", waited, labels, plans, lambda stats: stats["waits"]["total_s"])
        yield self._each(gauge, "aivmm_lanes", "Requests that can be in flight", labels, plans, lambda stats: stats["lanes"])
        yield self._each(counter, "aivmm_events", "What did not go as planned", labels, plans, lambda stats: len(stats["events"]))
        batched = [(values, stats["batches"]) for values, stats in plans if stats["batches"]]
        for name, words in (("count", "Batches that ran"), ("rows", "Rows in them"), ("requests", "Requests that asked for them")):
            if batched:
                yield self._each(counter, f"aivmm_batch_{name}", words, labels, batched, itemgetter(name))
        wholes = [((name,), stats) for name, stats in found if "buckets" in stats]
        for name, words in (("padded", "Requests that were padded to a shape"), ("fallback", "Requests that ran with open extents")):
            if wholes:
                yield self._each(counter, f"aivmm_{name}", words, ("model",), wholes, itemgetter(name))

    def _stages(self, labels: tuple[str, ...], plans: Sequence[_Part]) -> Iterator[Metric]:
        names = (*labels, *_STAGE)
        stages = [
            ((*values, str(index), each["target"], each["precision"]), each)
            for values, stats in plans
            for index, each in enumerate(stats["stages"])
        ]
        yield from self._summary("aivmm_stage_seconds", "Time in a stage", names, stages, ("count", "total_s", "p{}_s"))
        waits = ("wait_count", "wait_total_s", "wait_p{}_s")
        yield from self._summary("aivmm_stage_queue_seconds", "Time in front of a stage", names, stages, waits)
        counter, gauge = self._core.CounterMetricFamily, self._core.GaugeMetricFamily
        yield self._each(counter, "aivmm_stage_output_bytes", "Bytes that a stage made", names, stages, lambda stage: stage["out_bytes"])
        yield self._each(gauge, "aivmm_stage_replicas", "Copies of a stage", names, stages, lambda stage: stage["replicas"])

    def _each(
        self, kind: Any, name: str, words: str, labels: tuple[str, ...], parts: Sequence[_Part], value: Callable[[Any], float]
    ) -> Metric:
        family: Metric = kind(name, words, labels=labels)
        for values, stats in parts:
            family.add_metric(values, value(stats))
        return family

    def _summary(
        self, name: str, words: str, labels: tuple[str, ...], stages: Sequence[_Part], keys: tuple[str, str, str]
    ) -> Iterator[Metric]:
        count, total, quantile = keys
        family = self._core.SummaryMetricFamily(name, words, labels=labels)
        for values, each in stages:
            family.add_metric(values, count_value=each[count], sum_value=each[total])
            for q in QUANTILES:
                value = each[quantile.format(q)]
                if value is not None:  # nothing was measured yet
                    family.add_sample(name, {**dict(zip(labels, values, strict=True)), "quantile": str(q / 100)}, value)
        yield family


def _name(engine: HasStats) -> str:
    """Return the model's name, as far as an engine tells it."""
    served, plan = getattr(engine, "served", None), getattr(engine, "plan", None)
    return str(served.name) if served is not None else str(plan.model.name) if plan is not None else ""


def _by_shape(stats: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the statistics of each shape by its name; those of an engine of one shape have none."""
    yield from stats["buckets"].items() if "buckets" in stats else [("", stats)]
