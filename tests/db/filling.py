"""A database with a row in every table, and what all of its tables hold."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from aivmm.db import codec
from aivmm.db.database import Database
from aivmm.db.rows import TABLES, rows_of
from aivmm.db.schema import lowering, transfer
from aivmm.models.records import ModelFacts, Structure
from aivmm.planner.records import ProofRecord, RunRecord, TrialRecord
from aivmm.probes.records import Failed, Measured, Refused, Samples
from aivmm.runtime.config import Config
from aivmm.runtime.target import Device, Target


@dataclasses.dataclass(frozen=True)
class Filled:
    """What was put in."""

    run: RunRecord
    in_run: tuple[str, ...]  # ids of probes that the run rests on
    loose: tuple[str, ...]  # and of those that no run needs: a failed one, a refused one, one of another target


def fill(
    database: Database, measured: Callable[..., Measured], run_record: Callable[..., RunRecord], facts: ModelFacts, structure: Structure
) -> Filled:
    """Put a row into every table."""
    target = Target(
        runtime="openvino", name="GPU.0", device=Device(kind="gpu", model="A GPU"), runtime_version="2026.4", precisions=("fp32",)
    )
    database.remember_target(target)
    hashed = [dataclasses.replace(each, signature=hashlib.sha256(each.signature.encode()).hexdigest()) for each in structure.operators]
    structure = dataclasses.replace(structure, operators=tuple(hashed))
    model_id = database.remember_model(facts, structure)
    run = run_record()
    database.start_run(run, model_id=model_id)
    database.link_environments(run.id, [each.fingerprint for each in database.environments()])
    block, plain = measured("a"), measured("loose")
    operator = dataclasses.replace(
        measured(hashed[0].signature), key=dataclasses.replace(block.key, kind="operator", subject=hashed[0].signature)
    )
    in_run = database.add_many([block, operator], run_id=run.id)
    failed = Failed(key=dataclasses.replace(plain.key, batch=2), reason="segfault", output="x\ny")
    refused = Refused(key=dataclasses.replace(plain.key, target="openvino:GPU.0"), reason="no Loop")
    loose = database.add_many([failed, refused, plain])
    config = Config.of({"NUM_STREAMS": 2}, precision="bf16")
    database.add_trial(
        run.id, TrialRecord(number=0, target="openvino:CPU", config=config, batch=1, callers=1, state="measured", value=0.5, seconds=1.0)
    )
    database.add_proof(
        run.id,
        ProofRecord(
            name="plan",
            role="plan",
            target="openvino:CPU",
            config=Config(),
            batch=1,
            callers=1,
            eligible=True,
            samples=Samples(timed_s=(0.1, 0.2)),
        ),
    )
    database.save_plan(run.id, {"schema": 1, "share": 0.1}, "x.aivmm")
    now = datetime.now(UTC)
    made = {
        "recipe": {"bits": 8},
        "reason": "",
        "data": "real",
        "accuracy": {"cosine": 0.5},
        "weight_bytes": 5,
        "duration_s": 0.5,
        "made_at": now,
    }
    ends = {"source_environment": database.environments()[1].fingerprint, "source_config_digest": plain.key.config.digest()}
    with database.writing() as connection:
        moved = {"probe_id": loose[2], "source": "openvino:CPU", "destination": "openvino:GPU.0", "size_bytes": 2**40, **ends}
        connection.execute(transfer.insert(), [moved])
        row = {"id": codec.new_id(), "content": structure.content, "precision": "int8", "lowered_content": "lowered", **made}
        connection.execute(lowering.insert(), [row])
    return Filled(run=run, in_run=tuple(in_run), loose=tuple(loose))


def contents(database: Database) -> dict[str, list[tuple[Any, ...]]]:
    """Return every row of every table; JSON as values, so that its spaces do not matter."""
    with database.reading() as connection:
        return {table.name: [tuple(row) for rows in rows_of(connection, table) for row in rows] for table in TABLES}
