"""Measurements as frames."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from aivmm.db.database import Database
from aivmm.db.frames import COLUMNS, evidence
from aivmm.probes.records import Failed, Measured, Refused


def test_one_row_a_probe_with_metrics_as_columns(database: Database, measured: Callable[..., Measured]) -> None:
    plain = measured("plain", median_s=2.0)
    rich = dataclasses.replace(measured("rich"), metrics={"cosine": 0.5, "count": 7.0}, cautions=())
    refused = Refused(key=measured("refused").key, reason="no Loop")
    failed = Failed(key=measured("failed").key, reason="segfault", output="x")
    ids = database.add_many([plain, rich, refused, failed])
    frame = evidence(database)
    assert list(frame.columns) == [*COLUMNS, "compile_s", "cosine", "metric_count", "peak_memory_bytes"]
    assert list(frame["subject"]) == ["plain", "rich", "refused", "failed"]
    assert list(frame["state"]) == ["measured", "measured", "refused", "failed"]
    assert set(frame["source"]) == {"measured"}
    assert list(frame["id"]) == ids
    first = frame.iloc[0]
    assert (first["median_s"], first["p90_s"], first["count"]) == (2.0, plain.samples.quantile_s(0.9), 3)
    assert (first["compile_s"], first["peak_memory_bytes"]) == (0.5, 1e8)
    assert first["cautions"] == "spread,few-samples"
    assert first["precision"] == "fp32"
    assert (first["config"], first["config_digest"]) == (plain.key.config.key(), plain.key.config.digest())
    assert frame["metric_count"][1] == 7.0
    assert all(math.isnan(value) for value in frame["median_s"][2:])
    assert list(frame["reason"][2:]) == ["no Loop", "segfault"]
    assert list(evidence(database, subject="rich")["subject"]) == ["rich"]


def test_nothing_measured_is_a_frame_without_rows(database: Database) -> None:
    frame = evidence(database, kind="operator")
    assert list(frame.columns) == list(COLUMNS)
    assert len(frame) == 0
    assert frame["median_s"].dtype == "float64"


def test_older_rows_come_only_when_asked_for(database: Database, measured: Callable[..., Measured]) -> None:
    database.add_many([measured(median_s=1.0), measured(median_s=2.0)])
    assert list(evidence(database)["median_s"]) == [2.0]
    assert list(evidence(database, all=True)["median_s"]) == [1.0, 2.0]
