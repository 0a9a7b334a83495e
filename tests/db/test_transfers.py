"""What hand-overs between targets cost: stored with raw points, found by both ends' environments."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from aivmm.db.database import Database
from aivmm.db.exchange import export, import_from
from aivmm.db.frames import evidence
from aivmm.db.query import Filter
from aivmm.db.upkeep import Prune, prune
from aivmm.planner.records import RunRecord
from aivmm.probes.records import Caution, Samples, Transfer, TransferPoint
from aivmm.probes.transfers import fit_of
from aivmm.runtime.config import Config
from aivmm.runtime.environment import Environment

SIZES = (256, 4096, 1 << 20, 1 << 26)


@pytest.fixture
def other(database: Database, environment: Environment) -> Environment:
    made = dataclasses.replace(environment, target="onnxruntime:CPU", runtime_version="1.31")
    database.remember_environment(made)
    return made


def point(size: int, *, cost_s: float | None = None) -> TransferPoint:
    cost_s = 1e-5 + size * 1e-10 if cost_s is None else cost_s
    return TransferPoint(
        size_bytes=size, samples=Samples(timed_s=(3e-5 + cost_s, 4e-5 + cost_s)), source_s=1e-5, destination_s=2e-5, cost_s=cost_s
    )


@pytest.fixture
def transfer(environment: Environment, other: Environment) -> Transfer:
    return Transfer(
        source="openvino:CPU",
        source_environment=environment.fingerprint,
        source_config=Config.of({"NUM_STREAMS": 1}, precision="fp32"),
        destination="onnxruntime:CPU",
        destination_environment=other.fingerprint,
        destination_config=Config(precision="fp32"),
        points=tuple(map(point, SIZES)),
        cautions=(Caution(code="spread", message="wide", advice=""),),
    )


def back(transfer: Transfer) -> Transfer:
    """The other direction of the same pair."""
    ends = {"source": transfer.destination, "source_environment": transfer.destination_environment}
    ends |= {"destination": transfer.source, "destination_environment": transfer.source_environment}
    return dataclasses.replace(transfer, **ends)  # type: ignore[arg-type]


def test_a_transfer_is_found_as_it_was_measured_each_direction_apart(database: Database, transfer: Transfer) -> None:
    ids = database.add_transfers([transfer, back(transfer)])
    assert len(ids) == 2 * len(SIZES)
    assert database.find_transfers() == [transfer, back(transfer)]
    assert database.find_transfers(source="openvino:CPU") == [transfer]
    assert database.find_transfers(destination="openvino:CPU") == [back(transfer)]
    assert database.check() == []


def test_its_fixed_and_proportional_cost_are_fitted_from_the_stored_points(database: Database, transfer: Transfer) -> None:
    database.add_transfers([transfer, dataclasses.replace(back(transfer), points=transfer.points[:2])])
    whole, short = database.find_transfers()
    fit = fit_of(whole)
    assert fit is not None
    assert fit.fixed_s == pytest.approx(1e-5, rel=1e-3)
    assert fit.per_byte_s == pytest.approx(1e-10, rel=1e-3)
    assert fit.error < 1e-3
    assert fit_of(short) is None


@pytest.mark.parametrize("side", ["source_environment", "destination_environment"])
def test_an_upgrade_at_either_end_hides_it_from_planning_and_not_from_reports(
    database: Database, environment: Environment, transfer: Transfer, side: str
) -> None:
    upgraded = dataclasses.replace(environment, runtime_version="2027.0")
    database.remember_environment(upgraded)
    before = {transfer.source_environment, transfer.destination_environment}
    after = before - {getattr(transfer, side)} | {upgraded.fingerprint}
    database.add_transfers([transfer])
    assert database.find_transfers(before) == [transfer]
    assert database.find_transfers(after) == []
    again = dataclasses.replace(transfer, **{side: upgraded.fingerprint})
    database.add_transfers([again])
    assert database.find_transfers(after) == [again]
    assert database.find_transfers() == [transfer, again]


def test_the_newest_measuring_counts_as_a_whole(database: Database, transfer: Transfer) -> None:
    fewer = dataclasses.replace(transfer, points=(point(SIZES[1], cost_s=-1e-7),))
    database.add_transfers([transfer])
    database.add_transfers([fewer])
    assert database.find_transfers() == [fewer]


@pytest.mark.parametrize("state", ["refused", "failed"])
def test_a_pair_that_gave_no_numbers_is_remembered_with_the_reason(database: Database, transfer: Transfer, state: str) -> None:
    said = "segfault" if state == "failed" else ""
    none = dataclasses.replace(transfer, points=(), cautions=(), state=state, reason="no Loop", output=said)  # type: ignore[arg-type]
    database.add_transfers([none])
    assert database.find_transfers() == [none]
    database.add_transfers([none])
    assert database.find_transfers() == [none]
    database.add_transfers([transfer])  # asked to try again, it worked
    assert database.find_transfers() == [transfer]


def test_a_run_rests_on_the_transfers_it_measured_or_reused(
    database: Database, transfer: Transfer, run_record: Callable[..., RunRecord]
) -> None:
    first, second = run_record(0), run_record(1)
    for run in (first, second):
        database.start_run(run)
    database.add_transfers([transfer], run_id=first.id)
    database.link(second.id, database.find_transfers()[0].keys())
    assert [reused for _, reused in database.run_outcomes(first.id)] == [False] * len(SIZES)
    assert [reused for _, reused in database.run_outcomes(second.id)] == [True] * len(SIZES)


def test_a_cost_that_is_no_number_or_an_unknown_end_is_refused_and_nothing_stays(database: Database, transfer: Transfer) -> None:
    with pytest.raises(ValueError, match="cost_s"):
        database.add_transfers([transfer, dataclasses.replace(transfer, points=(dataclasses.replace(point(256), cost_s=math.nan),))])
    for side in ("source_environment", "destination_environment"):
        with pytest.raises(ValueError, match="remember it first"):
            database.add_transfers([transfer, dataclasses.replace(transfer, **{side: "unknown"})])
    assert database.find_transfers() == []
    assert database.outcomes(all=True) == []
    assert database.add_transfers([]) == []


@pytest.mark.parametrize("sizes", [(4096, 256), (256, 256), (0, 256), ()])
def test_points_are_in_order_each_once_and_not_empty(transfer: Transfer, sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="points"):
        dataclasses.replace(transfer, points=tuple(map(point, sizes)))


def test_it_is_called_by_its_size_and_source_in_tables(database: Database, transfer: Transfer) -> None:
    database.add_transfers([transfer])
    frame = evidence(database, kind="transfer")
    assert frame["name"].tolist() == [f"{size} B from openvino:CPU" for size in SIZES]
    assert frame["cost_s"].tolist() == [each.cost_s for each in transfer.points]


def test_a_part_of_a_database_takes_both_ends_along(database: Database, transfer: Transfer, tmp_path: Path) -> None:
    database.add_transfers([transfer])
    export(database, tmp_path / "x.zip", Filter(target="onnxruntime:CPU"))
    with Database.open(tmp_path / "other.db") as taken:
        import_from(taken, tmp_path / "x.zip")
        assert taken.find_transfers() == [transfer]
        assert taken.check() == []


def test_pruning_other_environments_looks_at_both_ends(database: Database, transfer: Transfer) -> None:
    database.add_transfers([transfer])
    assert prune(database, Prune(other_than=[transfer.source_environment, transfer.destination_environment])).probes == 0
    assert database.find_transfers() == [transfer]
    assert prune(database, Prune(other_than=[transfer.destination_environment])).probes == len(SIZES)
    assert database.find_transfers() == []
