"""The way in for measurements: outcomes become driver-ready values, and many rows go into one statement.

Building a dictionary a row and letting SQLAlchemy convert each value costs more than SQLite takes to store it. Here the values are made
once, as the driver takes them, in one flat list.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from sqlalchemy import Connection, Table
from sqlalchemy.engine import Dialect
from sqlalchemy.exc import DBAPIError

from aivmm.db.codec import cautions_text, clean, dump_json, key_digest, metrics_text, new_ids, pack_samples
from aivmm.db.schema import probe, run_probe
from aivmm.db.store import now
from aivmm.probes.records import Failed, Measured, Outcome, Refused
from aivmm.runtime.config import Config, Setting

STATES: dict[type[Outcome], str] = {Measured: "measured", Refused: "refused", Failed: "failed"}

_VALUES = 30  # in one statement: several narrow rows at once are faster than one each, a wide row is fastest alone (both measured)
_COPY = 100  # rows from which a server's COPY pays
_BULK = 1000  # probes from which a larger page cache pays
_CACHE_KIB = 65536
_MOMENT = probe.c.measured_at.type


class Configs:
    """The configs and placements of many outcomes: most share a few, and a digest costs more than the rest of a row.

    Never known by equality: Python has 1 == True == 1.0, a runtime's options do not.
    """

    def __init__(self) -> None:
        self.by_digest: dict[str, Config] = {}
        self._of_object: dict[int, tuple[str, Config]] = {}  # the config is held, so that its id() stays its own
        self._of_text: dict[str, str] = {}
        self._placements: dict[str, str] = {}

    def digest(self, config: Config) -> str:
        """Return `config.digest()`, made once an object."""
        known = self._of_object.get(id(config))
        if known is None:
            known = self._of_object[id(config)] = (config.digest(), config)
            self.by_digest[known[0]] = config
        return known[0]

    def digest_of(self, settings: Mapping[str, Setting]) -> str:
        """Return the digest of settings that a runtime reported, made once for all that read the same."""
        text = repr(settings)  # tells 1, 1.0, True, 0.0 and -0.0 apart, as the digest does
        known = self._of_text.get(text)
        if known is None:
            known = self._of_text[text] = self.digest(Config.of(settings))
        return known

    def placement(self, nodes: Mapping[str, int]) -> str:
        """Return the JSON of a placement, made once for all that are alike."""
        text = repr(nodes)
        known = self._placements.get(text)
        if known is None:
            known = self._placements[text] = dump_json(dict(nodes))
        return known


@dataclass(slots=True)
class Batch:
    """Outcomes as values: one flat list, in the order of the table's columns."""

    ids: list[str]
    configs: Configs = field(default_factory=Configs)
    probes: list[Any] = field(default_factory=list)

    @classmethod
    def of(cls, outcomes: Sequence[Outcome], dialect: Dialect) -> Batch:
        """Make the values; raise ValueError for a metric that is NaN or infinite."""
        made = cls(new_ids(len(outcomes)))
        process = _MOMENT.dialect_impl(dialect).bind_processor(dialect)
        moment = now()
        stored_at = moment if process is None else process(moment)
        for identity, outcome in zip(made.ids, outcomes, strict=True):
            made._add(identity, outcome, stored_at)
        return made

    def insert(self, connection: Connection, run_id: str | None) -> None:
        """Store all of it; the configs are stored already. Raises IntegrityError when an environment or the run is not."""
        with large_cache(connection, len(self.ids)):
            insert_values(connection, probe, self.probes)
            if run_id:
                insert_values(connection, run_probe, [value for identity in self.ids for value in (run_id, identity, False)])

    def _add(self, identity: str, outcome: Outcome, stored_at: object) -> None:
        key = outcome.key
        config = self.configs.digest(key.config)
        samples = effective = placement = metrics = cautions = None
        reason = output = race = ""
        match outcome:
            case Measured():
                samples = pack_samples(outcome.samples)
                effective = self.configs.digest_of(outcome.effective_config)
                placement = self.configs.placement(outcome.placement)
                race = outcome.race
                metrics = metrics_text(outcome.metrics)
                cautions = cautions_text(outcome.cautions) if outcome.cautions else None
            case Refused():
                reason = clean(outcome.reason)
            case Failed():
                reason = clean(outcome.reason)
                output = clean(outcome.output)
        # In the order of the table's columns.
        self.probes += (
            identity,
            key_digest(key, config),
            key.kind,
            key.subject,
            key.target,
            key.environment,
            config,
            key.batch,
            key.callers,
            STATES[type(outcome)],
            samples,
            reason,
            output,
            effective,
            placement,
            race,
            stored_at,
            metrics,
            cautions,
        )


def insert_values(connection: Connection, table: Table, values: Sequence[Any], *, ignore: bool = False) -> None:
    """Insert rows given as one flat list, in the order of the table's columns and as the driver takes them (JSON is text).

    With `ignore`, rows whose key exists already are left out. Values are always bound, never part of the statement.
    """
    width = len(table.c)
    if connection.dialect.name == "postgresql" and not ignore and len(values) >= _COPY * width:
        _copy(connection, table, zip(*[iter(values)] * width, strict=True))
        return
    step = max(1, _VALUES // width) * width
    whole = len(values) - len(values) % step
    if whole:
        statement = _statement(connection, table, step // width, ignore)
        connection.exec_driver_sql(statement, list(zip(*[iter(values[:whole])] * step, strict=True)))
    if whole < len(values):
        rest = _statement(connection, table, (len(values) - whole) // width, ignore)
        connection.exec_driver_sql(rest, tuple(values[whole:]))


def _copy(connection: Connection, table: Table, rows: Iterable[Sequence[Any]]) -> None:
    """Insert rows by the server's own way in for many, which takes half the time."""
    quote = connection.dialect.identifier_preparer
    statement = f"COPY {quote.format_table(table)} ({', '.join(quote.quote(column.name) for column in table.c)}) FROM STDIN"
    driver = connection.dialect.loaded_dbapi
    assert driver is not None
    try:
        with closing(connection.connection.cursor()) as cursor, cast(Any, cursor).copy(statement) as copy:
            for row in rows:
                copy.write_row(row)
    except driver.Error as error:
        raise DBAPIError.instance(statement, None, error, driver.Error) from error  # as all that goes through SQLAlchemy


def _statement(connection: Connection, table: Table, rows: int, ignore: bool) -> str:
    quote = connection.dialect.identifier_preparer
    mark = "?" if connection.dialect.paramstyle == "qmark" else "%s"
    columns = ", ".join(quote.quote(column.name) for column in table.c)
    row = f"({', '.join([mark] * len(table.c))})"
    end = " ON CONFLICT DO NOTHING" if ignore else ""
    return f"INSERT INTO {quote.format_table(table)} ({columns}) VALUES {', '.join([row] * rows)}{end}"


@contextmanager
def large_cache(connection: Connection, rows: int) -> Iterator[None]:
    """Keys are digests, so rows go everywhere in their index: with SQLite's 2 MB of cache each one evicts the page of another."""
    if connection.dialect.name != "sqlite" or rows < _BULK:
        yield
        return
    before = connection.exec_driver_sql("PRAGMA cache_size").scalar_one()
    connection.exec_driver_sql(f"PRAGMA cache_size=-{_CACHE_KIB}")
    try:
        yield
    finally:
        connection.exec_driver_sql(f"PRAGMA cache_size={int(before)}")
