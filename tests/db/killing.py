"""Writers to be killed: what they do is known from its number alone, so that what is found afterwards can be compared with it.

They run in processes of their own that are forked from a server which has imported everything already, so that a kill costs 0.1 s.
"""

from __future__ import annotations

import multiprocessing
import os
import struct
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import sqlalchemy

from aivmm.db.database import Database
from aivmm.models.records import Category, ModelFacts
from aivmm.planner.records import ProofRecord, RunRecord, TrialRecord
from aivmm.probes.records import Caution, Failed, Measured, Outcome, ProbeKey, Refused, Samples
from aivmm.runtime.config import Config
from aivmm.runtime.environment import Environment

CONTEXT: Any = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
CONTEXT.set_forkserver_preload(
    ["pytest", "alembic.command", "alembic.autogenerate", "aivmm.db.database", "sqlalchemy.dialects.postgresql.psycopg"]
)

GROUP = 10  # operations of one run
BULK = 150  # outcomes of one bulk insert
CALLED, COMMITTING, ACKNOWLEDGED = "called", "committing", "acknowledged"

ENVIRONMENT = Environment(
    target="null:0",
    device_model="child",
    driver="",
    runtime_version="1",
    instruction_sets=(),
    usable_cores=1,
    power_limit_w=None,
    system="x",
)
FACTS = ModelFacts(
    name="m",
    path="m.onnx",
    sha256="ab" * 32,
    category=Category(name="CNN", reason=""),
    inputs=(),
    outputs=(),
    opset=17,
    ir_version=8,
    batch=1,
    batchable=True,
    notes=(),
)


def run_of(number: int) -> RunRecord:
    """The run that operation `number` belongs to."""
    first = number - number % GROUP
    return RunRecord(
        id=str(uuid.uuid5(uuid.NAMESPACE_OID, str(first))),
        request=f"request {first}",
        started_at=datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=first),
        model=FACTS,
        objective="latency",
        constraints=(),
        options={"first": first},
        command="aivmm-tune m.onnx",
        seed=first,
        aivmm_version="0.1.0",
    )


def outcome(name: str, number: int) -> Outcome:
    """A measurement, a refusal or a failure; they take 0.3 to 3 kB."""
    config = Config.of({"threads": number % 7, "name": f"c{number % 40}"}, precision="fp32")
    key = ProbeKey(kind="segment", subject=name, target="null:0", environment=ENVIRONMENT.fingerprint, config=config)
    if number % 9 == 4:
        return Refused(key=key, reason=f"no {number}")
    if number % 9 == 7:
        return Failed(key=key, reason="crash", output="last words\n" * (number % 50))
    return Measured(
        key=key,
        samples=Samples(timed_s=tuple(1e-3 + number + each * 1e-6 for each in range(20 + number % 300))),
        metrics={"compile_s": float(number), "peak_memory_bytes": 1e6 + number},
        cautions=(Caution(code="spread", message=f"{number}", advice="a"),),
        race=f"race {number}",
    )


def bulk(number: int) -> list[Outcome]:
    """The outcomes of one bulk insert."""
    return [outcome(f"{number}-{each}", number + each) for each in range(BULK)]


def trial(number: int) -> TrialRecord:
    return TrialRecord(
        number=number, target="null:0", config=Config.of({"n": number % 5}), batch=1, callers=1, state="complete", value=1.0 / number
    )


def proof(number: int) -> ProofRecord:
    return ProofRecord(
        name=f"plan {number}",
        role="plan",
        target="null:0",
        config=Config.of({"n": number % 5}),
        batch=1,
        callers=1,
        eligible=True,
        samples=Samples(timed_s=tuple(1.0 + each for each in range(number % 90 + 1))),
        metrics={"throughput_per_s": float(number)},
    )


def perform(database: Database, number: int) -> None:
    """Operation `number`, which is one transaction. The first of each ten begins the run that the others belong to."""
    run = run_of(number)
    match number % GROUP:
        case 0:
            database.start_run(run)
        case 2 | 5:
            database.add_many(bulk(number), run_id=run.id)
        case 3 | 6:
            database.add_trial(run.id, trial(number))
        case 7:
            database.add_proof(run.id, proof(number))
        case 8:
            database.save_plan(run.id, {"number": number}, f"{number}.aivmm")
        case 9:
            database.update_run(replace(run, status="complete", finished_at=run.started_at))
        case _:
            database.add(outcome(str(number), number), run_id=run.id)


def write(location: str, first: int, told: Connection) -> None:
    """Perform operations from `first` on until killed, telling where it stands: `(what, number)`."""
    with Database.open(location) as database:
        database.remember_environment(ENVIRONMENT)
        number = first
        sqlalchemy.event.listen(database._engine, "commit", lambda _: told.send((COMMITTING, number)))
        while True:
            told.send((CALLED, number))
            perform(database, number)
            told.send((ACKNOWLEDGED, number))
            number += 1


def stored_until(database: Database, first: int) -> int:
    """Return the number of the first operation that is not stored, having checked that everything from the run of `first` on, up to it,
    is there and equal, that nothing is there twice, and that nothing is there after it."""
    start = first - first % GROUP
    for group in range(start, start + 10**6, GROUP):
        runs = [each for each in database.runs() if each.id == run_of(group).id] if group == start else _run(database, group)
        if not runs:
            return group
        until = _stored_of(database, group, runs[0])
        if until < group + GROUP:
            assert not _run(database, group + GROUP)
            return until
    raise AssertionError("too many operations")


def _run(database: Database, group: int) -> list[RunRecord]:
    with database._reading() as connection:
        ids = connection.scalars(sqlalchemy.text("SELECT id FROM run WHERE id = :id"), {"id": run_of(group).id}).all()
    return [database.run(each) for each in ids]


def _stored_of(database: Database, group: int, run: RunRecord) -> int:
    """Return the first operation of one run that is not stored, everything before it being as it was written."""
    found: dict[str, Any] = {
        "outcomes": database.run_outcomes(run.id),
        "trials": database.trials(run.id),
        "proofs": database.proofs(run.id),
        "plan": database.plan(run.id),
        "run": run,
    }
    for until in range(group + 1, group + GROUP + 1):
        if found == _expected(group, until):
            return until
    raise AssertionError(f"what is stored of run {group} is no beginning of what was written: {found}")


def _expected(group: int, until: int) -> dict[str, Any]:
    done = range(group, until)
    outcomes: list[Outcome] = []
    for number in done:
        match number % GROUP:
            case 2 | 5:
                outcomes += bulk(number)
            case 1 | 4:
                outcomes.append(outcome(str(number), number))
    run = run_of(group)
    return {
        "outcomes": [(each, False) for each in outcomes],
        "trials": [trial(number) for number in done if number % GROUP in (3, 6)],
        "proofs": [proof(number) for number in done if number % GROUP == 7],
        "plan": {"number": group + 8} if group + 8 in done else None,
        "run": replace(run, status="complete", finished_at=run.started_at) if group + 9 in done else run,
    }


@contextmanager
def running(work: Callable[..., None], *arguments: object) -> Iterator[tuple[Any, Connection]]:
    """Run `work(*arguments, told)` in a process of its own; give the process and the end of the pipe on which it tells."""
    mine, theirs = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=work, args=(*arguments, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield process, mine
    finally:
        process.kill()
        process.join()
        process.close()
        mine.close()


def everything_told(told: Connection, *, until: float | None = None) -> Iterator[Any]:
    """Give what a process tells until it ends, or until a moment of the monotonic clock."""
    try:
        while until is None or told.poll(max(0.0, until - time.monotonic())):
            yield told.recv()
    except (EOFError, OSError):
        return


@dataclass
class Kills:
    """Where the kills have hit."""

    opening: int = 0  # before the first operation
    between: int = 0  # after a call had returned
    before_commit: int = 0  # in a call, in its transaction
    in_commit: int = 0  # in a call, after its COMMIT was sent
    unacknowledged: int = 0  # of these, how many had been stored already
    torn: int = 0  # how many left a transaction half written in SQLite's log

    def count(self, told: str, *, unacknowledged: bool) -> None:
        """Count one more, which `told` this last."""
        self.opening += told == ""
        self.between += told == ACKNOWLEDGED
        self.before_commit += told == CALLED
        self.in_commit += told == COMMITTING
        self.unacknowledged += unacknowledged

    def __str__(self) -> str:
        total = self.opening + self.between + self.before_commit + self.in_commit
        return (
            f"{total} kills: {self.opening} while it opened, {self.before_commit} inside a transaction, {self.in_commit} inside a commit "
            f"(stored, but not yet acknowledged: {self.unacknowledged}), {self.between} between calls; "
            f"{self.torn} left a half-written transaction in the log"
        )


def wait_for_server(location: str) -> None:
    """Wait until a server has noticed that its client is dead: what the client had sent last may still be committed until then."""
    if "://" not in location:
        return
    others = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    engine = sqlalchemy.create_engine(location, poolclass=sqlalchemy.NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        while connection.exec_driver_sql(others).scalar():
            time.sleep(0.01)


def half_written(file: Path) -> bool:
    """Say whether SQLite's log ends with pages of a transaction that was never committed (https://sqlite.org/fileformat2.html#walformat)."""
    log = file.with_name(file.name + "-wal")
    content = log.read_bytes() if log.exists() else b""
    if len(content) < 32:
        return False
    page_size, salt = struct.unpack_from(">8xI", content)[0], content[16:24]
    last_is_commit = True
    for start in range(32, len(content), 24 + page_size):
        frame = content[start : start + 24]
        if len(frame) < 24 or frame[8:16] != salt:
            break  # of an earlier turn of the log
        last_is_commit = struct.unpack_from(">4xI", frame)[0] != 0 and start + 24 + page_size <= len(content)
    return not last_is_commit
