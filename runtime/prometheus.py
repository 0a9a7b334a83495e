"""An engine's statistics for Prometheus. Imported only by who wants that: `pip install 'aivmm[prometheus]'`.

from prometheus_client import REGISTRY, start_http_server
from aivmm.runtime.prometheus import EngineCollector

REGISTRY.register(EngineCollector(engine))
start_http_server(9000)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from aivmm.errors import UsageError
from aivmm.runtime.clocks import QUANTILES

if TYPE_CHECKING:
    from prometheus_client import Metric

_STAGE = ("model", "stage", "target", "precision")
_Stages = Sequence[tuple[tuple[str, ...], Mapping[str, Any]]]


class HasStats(Protocol):
    """An engine, as far as a collector asks."""

    def stats(self) -> dict[str, Any]:
        """Return its statistics."""


class EngineCollector:
    """A collector over one engine: it reads `engine.stats()` when it is scraped, and costs nothing in between.

    Seconds and bytes are counted since the engine was loaded; quantiles are over the last runs (up to 4096 a stage and lane).
    """

    def __init__(self, engine: HasStats, *, model: str = "") -> None:
        """Collect from `engine`; `model` is the value of the label of that name, by default the plan's.

        Raises:
            UsageError: the library is not installed.
        """
        try:
            from prometheus_client import core
        except ImportError as error:
            raise UsageError("prometheus_client is not installed", advice="pip install 'aivmm[prometheus]'") from error
        self._core = core
        self._engine = engine
        plan = getattr(engine, "plan", None)
        self._model = model or (plan.model.name if plan is not None else "")

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics as they are now."""
        stats, counter, gauge = self._engine.stats(), self._core.CounterMetricFamily, self._core.GaugeMetricFamily
        stages = [((self._model, str(index), each["target"], each["precision"]), each) for index, each in enumerate(stats["stages"])]
        yield from self._summary("aivmm_stage_seconds", "Time in a stage", stages, ("count", "total_s", "p{}_s"))
        waits = ("wait_count", "wait_total_s", "wait_p{}_s")
        yield from self._summary("aivmm_stage_queue_seconds", "Time in front of a stage", stages, waits)
        made = counter("aivmm_stage_output_bytes", "Bytes that a stage made", labels=_STAGE)
        copies = gauge("aivmm_stage_replicas", "Copies of a stage", labels=_STAGE)
        for labels, each in stages:
            made.add_metric(labels, each["out_bytes"])
            copies.add_metric(labels, each["replicas"])
        yield made
        yield copies
        yield self._one(counter, "aivmm_runs", "Runs of the first stage", stats["runs"])
        yield self._one(counter, "aivmm_lane_wait_seconds", "Time that requests waited for a free lane", stats["waits"]["total_s"])
        yield self._one(gauge, "aivmm_lanes", "Requests that can be in flight", stats["lanes"])
        yield self._one(counter, "aivmm_events", "What did not go as planned", len(stats["events"]))
        if stats["batches"]:
            for name, words in (("count", "Batches that ran"), ("rows", "Rows in them"), ("requests", "Requests that asked for them")):
                yield self._one(counter, f"aivmm_batch_{name}", words, stats["batches"][name])

    def _one(self, kind: Any, name: str, words: str, value: float) -> Metric:
        family: Metric = kind(name, words, labels=("model",))
        family.add_metric((self._model,), value)
        return family

    def _summary(self, name: str, words: str, stages: _Stages, keys: tuple[str, str, str]) -> Iterator[Metric]:
        count, total, quantile = keys
        family = self._core.SummaryMetricFamily(name, words, labels=_STAGE)
        for labels, each in stages:
            family.add_metric(labels, count_value=each[count], sum_value=each[total])
            for q in QUANTILES:
                value = each[quantile.format(q)]
                if value is not None:  # nothing was measured yet
                    family.add_sample(name, {**dict(zip(_STAGE, labels, strict=True)), "quantile": str(q / 100)}, value)
        yield family
