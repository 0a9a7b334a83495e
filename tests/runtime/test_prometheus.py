"""The exporter: a real registry, scraped over HTTP as Prometheus does, read back with the library's own parser."""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import aivmm
from aivmm.errors import UsageError
from aivmm.runtime.engine import Engine
from aivmm.runtime.family import Bucket, Dimension, Served
from aivmm.runtime.plan import Batching, Execution
from aivmm.runtime.prometheus import EngineCollector
from tests.making import ONNXRUNTIME, OPENVINO, Part, chain_model, make_bundle, make_family, normal, token_model

prometheus_client = pytest.importorskip("prometheus_client")


def scraped(registry: Any) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    from prometheus_client.parser import text_string_to_metric_families

    server, thread = prometheus_client.start_http_server(0, addr="127.0.0.1", registry=registry)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics") as answer:
            text = answer.read().decode()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_what_is_scraped_is_what_the_engine_counted(tmp_path: Path) -> None:
    execution = Execution(mode="pipelined", batching=Batching(max_batch=2))
    bundle = make_bundle(tmp_path / "m.aivmm", chain_model(), [Part(OPENVINO, 0, 3), Part(ONNXRUNTIME, 4)], execution=execution, batch=2)
    with Engine.load(bundle) as engine:
        registry = prometheus_client.CollectorRegistry()
        registry.register(EngineCollector(engine))
        before = scraped(registry)
        assert before["aivmm_runs_total", (("model", "made"),)] == 0
        assert not [labels for _, labels in before if "quantile" in dict(labels)]
        for rows in (1, 2, 3):
            engine.run({"x": normal(rows, 32)})
        after, stats = scraped(registry), engine.stats()
    for index, stage in enumerate(stats["stages"]):
        labels = (("model", "made"), ("precision", "fp32"), ("stage", str(index)), ("target", stage["target"]))
        assert after["aivmm_stage_seconds_count", labels] == 4
        assert np.isclose(after["aivmm_stage_seconds_sum", labels], stage["total_s"])
        assert after["aivmm_stage_output_bytes_total", labels] == 4 * 2 * 32 * 4
        assert after["aivmm_stage_queue_seconds_count", labels] == 4
        for q in (50, 90, 99):
            quantile = tuple(sorted((*labels, ("quantile", str(q / 100)))))
            assert np.isclose(after["aivmm_stage_seconds", quantile], stage[f"p{q}_s"])
    whole = (("model", "made"),)
    assert after["aivmm_runs_total", whole] == after["aivmm_batch_count_total", whole] == 4
    assert after["aivmm_batch_rows_total", whole] == 6 and after["aivmm_lanes", whole] == stats["lanes"]


def test_several_shapes_and_several_models_are_told_apart(tmp_path: Path) -> None:
    made = {f"{rows}": make_bundle(tmp_path / f"{rows}.aivmm", token_model(rows), [Part(ONNXRUNTIME)]) for rows in (4, 16)}
    dimension = Dimension(name="rows", places=[("x", 1), ("mask", 1)], padding="zero")
    buckets = [Bucket(name=f"rows={rows}", plan=f"plans/{index}.json", extents={"rows": rows}) for index, rows in enumerate((4, 16))]
    shapes = make_family(tmp_path / "s.aivmm", made, models=[Served(name="tokens", buckets=buckets, dimensions=[dimension])])
    chain = make_bundle(tmp_path / "m.aivmm", chain_model(), [Part(ONNXRUNTIME)])
    with aivmm.load_plan(shapes) as tokens, aivmm.load_plan(chain) as other:
        registry = prometheus_client.CollectorRegistry()
        registry.register(EngineCollector({"tokens": tokens, "chain": other}))
        for rows in (4, 4, 9):
            tokens.run({"x": normal(1, rows, 16), "mask": np.ones((1, rows), np.int64)})
        other.run({"x": normal(2, 32)})
        found = scraped(registry)
        alone = prometheus_client.CollectorRegistry()
        alone.register(EngineCollector(tokens))
        assert scraped(alone)["aivmm_runs_total", (("model", "tokens"), ("shape", "rows=16"))] == 1
    runs = {dict(labels)["model"] + dict(labels)["shape"]: value for (name, labels), value in found.items() if name == "aivmm_runs_total"}
    assert runs == {"tokensrows=4": 2, "tokensrows=16": 1, "chain": 1}
    assert found["aivmm_padded_total", (("model", "tokens"),)] == 1 and found["aivmm_fallback_total", (("model", "tokens"),)] == 0
    counts = [value for (name, labels), value in found.items() if name == "aivmm_stage_seconds_count"]
    assert sorted(counts) == [1, 1, 2]


def test_without_the_library_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(UsageError, match=r"not installed; pip install 'aivmm\[prometheus\]'"):
        EngineCollector(object())  # type: ignore[arg-type]


def test_the_library_is_loaded_by_who_asks_for_it_and_by_nobody_else(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "m.aivmm", chain_model(), [Part(ONNXRUNTIME)])
    code = f"import sys, aivmm\nwith aivmm.load_plan({str(bundle)!r}) as engine: engine.stats()\nprint('prometheus_client' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
