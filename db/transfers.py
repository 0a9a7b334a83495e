"""Transfers: what handing a tensor from one target to the next costs, found by pair and environment."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from sqlalchemy import Connection, Select, select
from sqlalchemy.exc import IntegrityError

from aivmm.db.codec import new_id
from aivmm.db.insert import Batch, insert_values
from aivmm.db.probes import ProbeStore
from aivmm.db.schema import probe, transfer
from aivmm.probes.records import Failed, Measured, Outcome, Refused, Transfer, TransferPoint
from aivmm.runtime.config import Config

_COSTS = ("cost_s", "source_s", "destination_s")  # metrics of a point's probe
_PAIR = ("source", "source_environment", "source_config_digest", "destination", "environment", "config_digest")


class TransferStore(ProbeStore):
    """What hand-overs were measured. Each size is a probe, those of one measuring share its race, and the newest measuring counts."""

    def add_transfers(self, transfers: Iterable[Transfer], *, run_id: str | None = None) -> list[str]:
        """Store transfers in one transaction, all or none, and return the ids of their probes. `run_id` links them as measured there.

        Raises:
            ValueError: a cost is NaN or infinite, or one of the environments (or the run) was not remembered before.
        """
        given = [(each, size, outcome) for each in transfers for size, outcome in _outcomes(each)]
        if not given:
            return []
        batch = Batch.of([outcome for _, _, outcome in given], self._engine.dialect)
        values: list[Any] = []
        for identity, (each, size, _) in zip(batch.ids, given, strict=True):
            source_config = batch.configs.digest(each.source_config)
            values += (identity, each.source, each.destination, size, each.source_environment, source_config)
        with self._writing() as connection:
            self._store_configs(connection, batch.configs.by_digest)
            try:
                batch.insert(connection, run_id)
                insert_values(connection, transfer, values)
            except IntegrityError as error:
                raise ValueError(f"an environment of a transfer (or the run {run_id}) is not stored: remember it first") from error
        return batch.ids

    def find_transfers(
        self, environments: Collection[str] | None = None, *, source: str | None = None, destination: str | None = None
    ) -> list[Transfer]:
        """Return the newest measuring of each pair with its configs, or why there is none; the one measured first comes first.

        With `environments` (fingerprints) both ends have to be in one of them: what was measured before an upgrade is not found then.
        `source` and `destination` are targets. The keys of what is found (`Transfer.keys`) are what `link` takes.
        """
        query = _query(environments, source=source, destination=destination)
        with self._reading() as connection:
            measurings = list(_newest(connection.execute(query).all()))
            return [self._transfer(connection, rows) for rows in measurings]

    def _transfer(self, connection: Connection, rows: Sequence[Any]) -> Transfer:
        first = rows[0]
        outcomes = [entry.outcome for entry in self.entries_by_id(connection, [row.probe_id for row in rows])]
        configs = self._load_configs(connection, [first.source_config_digest])
        pair = {name: getattr(first, name) for name in ("source", "source_environment", "destination")}
        return _of(outcomes, [row.size_bytes for row in rows], source_config=configs[first.source_config_digest], **pair)


def _query(environments: Collection[str] | None, *, source: str | None, destination: str | None) -> Select[Any]:
    query = select(transfer, probe.c.environment, probe.c.config_digest, probe.c.race).join(probe)
    query = query.where(transfer.c.source_environment.is_not(None), transfer.c.source_config_digest.is_not(None))
    if environments is not None:
        known = list(environments)
        query = query.where(probe.c.environment.in_(known), transfer.c.source_environment.in_(known))
    for column, wanted in ((transfer.c.source, source), (transfer.c.destination, destination)):
        query = query if wanted is None else query.where(column == wanted)
    return query.order_by(transfer.c.probe_id)


def _newest(rows: Iterable[Any]) -> Iterator[list[Any]]:
    """Yield the rows of the newest measuring of each pair, by size; `rows` are the oldest first."""
    measurings: dict[tuple[str, ...], dict[str, list[Any]]] = {}
    for row in rows:
        pair = tuple(getattr(row, name) for name in _PAIR)
        # What was refused has no race: each time is a measuring of its own.
        measurings.setdefault(pair, {}).setdefault(row.race or row.probe_id, []).append(row)
    newest = [list(of_pair.values())[-1] for of_pair in measurings.values()]
    for each in sorted(newest, key=lambda found: str(found[0].probe_id)):
        yield sorted(each, key=lambda row: int(row.size_bytes))


def _outcomes(transfer: Transfer) -> Iterator[tuple[int, Outcome]]:
    """Yield the probe of each size; one of size 0 says why there is none."""
    race = new_id()
    for point in transfer.points:
        metrics = {name: getattr(point, name) for name in _COSTS}
        key = transfer.key(point.size_bytes)
        yield point.size_bytes, Measured(key=key, samples=point.samples, metrics=metrics, cautions=transfer.cautions, race=race)
    if transfer.state == "refused":
        yield 0, Refused(key=transfer.key(), reason=transfer.reason)
    elif transfer.state == "failed":
        yield 0, Failed(key=transfer.key(), reason=transfer.reason, output=transfer.output)


def _of(
    outcomes: Sequence[Outcome], sizes: Sequence[int], *, source: str, source_environment: str, source_config: Config, destination: str
) -> Transfer:
    """Return the record whose probes these are, by size."""
    first = outcomes[0]
    ends: dict[str, Any] = {
        "source": source,
        "source_environment": source_environment,
        "source_config": source_config,
        "destination": destination,
        "destination_environment": first.key.environment,
        "destination_config": first.key.config,
    }
    match first:
        case Refused():
            return Transfer(**ends, state="refused", reason=first.reason)
        case Failed():
            return Transfer(**ends, state="failed", reason=first.reason, output=first.output)
        case Measured():
            measured = [(size, each) for size, each in zip(sizes, outcomes, strict=True) if isinstance(each, Measured)]
            points = tuple(
                TransferPoint(size_bytes=size, samples=each.samples, **{name: each.metrics[name] for name in _COSTS})
                for size, each in measured
            )
            return Transfer(**ends, points=points, cautions=first.cautions)
