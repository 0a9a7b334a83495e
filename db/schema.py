"""The tables. Rows are made and read in `db/` only; `migrations/` holds the same tables as they were released.

Keys merge: what is measured or run has a time-ordered UUID (`codec.new_id`), what is only a fact (an environment, a device, a model,
a config) has the digest of its content, so that two databases that know the same fact know it by the same key. Times are seconds,
sizes bytes.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator


class UtcDateTime(TypeDecorator[datetime]):
    """A moment. Takes an aware datetime (a naive one is a bug), gives one in UTC; SQLite has no zones, so there it is stored as UTC."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Convert to UTC."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"{value!r} has no time zone")
        moment = value.astimezone(UTC)
        return moment.replace(tzinfo=None) if dialect.name == "sqlite" else moment

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Give the zone back."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


metadata = MetaData(
    # SQLite can only drop a constraint that has a name, and a later migration may have to.
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _id() -> Column[Any]:
    return Column("id", String, primary_key=True)


def _json(name: str, *, nullable: bool = False) -> Column[Any]:
    return Column(name, JSON(none_as_null=True), nullable=nullable)


def _of(name: str, target: str, *, cascade: bool = True, **options: Any) -> Column[Any]:
    """A reference. With `cascade` the row is a part of what it names and goes with it."""
    return Column(
        name, String, ForeignKey(target, ondelete="CASCADE" if cascade else None), nullable=options.pop("nullable", False), **options
    )


# --- what measures: facts about machines

environment = Table(
    "environment",
    metadata,
    Column("fingerprint", String, primary_key=True),
    Column("target", String, nullable=False, index=True),
    Column("device_model", String, nullable=False),
    Column("driver", String, nullable=False),
    Column("runtime_version", String, nullable=False),
    Column("system", String, nullable=False),
    _json("facts"),  # all fields, exactly: 350 W and 350.0 W have different fingerprints
    Column("first_seen_at", UtcDateTime, nullable=False),
)

device = Table(
    "device",
    metadata,
    _id(),  # digest of all fields
    Column("kind", String, nullable=False),
    Column("model", String, nullable=False),
    Column("driver", String, nullable=False),
    _json("facts"),
    Column("first_seen_at", UtcDateTime, nullable=False),
)

target = Table(
    "target",
    metadata,
    _id(),  # digest of all fields
    Column("runtime", String, nullable=False),
    Column("name", String, nullable=False),
    Column("runtime_version", String, nullable=False),
    _json("precisions"),
    _of("device_id", "device.id", cascade=False, index=True),
    _of("environment", "environment.fingerprint", cascade=False, index=True),
    Column("first_seen_at", UtcDateTime, nullable=False),
)

config = Table(
    "config",  # thousands of probes share a few hundred of these; what a runtime reads back is long
    metadata,
    Column("digest", String, primary_key=True),
    Column("precision", String),
    _json("settings"),
)

# --- what is measured: facts about models

model = Table(
    "model",
    metadata,
    _id(),  # digest of content hash and batch
    Column("content", String, nullable=False),
    Column("batch", Integer, nullable=False),
    Column("structure", String, nullable=False, index=True),
    Column("sha256", String, nullable=False, index=True),
    Column("name", String, nullable=False, index=True),
    Column("category", String, nullable=False),
    Column("node_count", Integer, nullable=False),
    Column("flops", Double),
    Column("weight_bytes", BigInteger, nullable=False),
    Column("data_dependent", Boolean, nullable=False),
    _json("facts"),
    _json("cut_points"),
    _json("pieces", nullable=True),  # lists of nodes' names: the order in which positions count, where it is not the usual one
    Column("first_seen_at", UtcDateTime, nullable=False),
    UniqueConstraint("content", "batch"),
)

operator = Table(
    "operator",
    metadata,
    Column("signature", String, primary_key=True),
    Column("op_type", String, nullable=False, index=True),
    Column("domain", String, nullable=False),
    Column("description", Text, nullable=False),
    Column("flops", Double),
    Column("io_bytes", BigInteger),
    Column("data_dependent", Boolean, nullable=False),
)

model_operator = Table(
    "model_operator",
    metadata,
    _of("model_id", "model.id", primary_key=True),
    _of("signature", "operator.signature", primary_key=True, index=True, cascade=False),
    Column("position", Integer, nullable=False),
    Column("node_count", Integer, nullable=False),
    _json("nodes"),
    sqlite_with_rowid=False,
)

segment = Table(
    "segment",
    metadata,
    Column("structure", String, primary_key=True),
    _json("op_types"),
    Column("flops", Double),
    Column("data_dependent", Boolean, nullable=False),
)

model_block = Table(
    "model_block",  # which segment each block of a model is; names and weights are the model's own
    metadata,
    _of("model_id", "model.id", primary_key=True),
    Column("position", Integer, primary_key=True, autoincrement=False),
    _of("structure", "segment.structure", index=True, cascade=False),
    Column("content", String, nullable=False, index=True),
    Column("first_node", Integer, nullable=False),
    Column("last_node", Integer, nullable=False),
    Column("weight_bytes", BigInteger, nullable=False),
    _json("inputs"),
    _json("outputs"),
    sqlite_with_rowid=False,
)

# --- measurements

probe = Table(
    "probe",
    metadata,
    _id(),  # time-ordered: the newest of a key is the greatest id
    Column("key", String, nullable=False),  # digest of the next seven: short in the index
    Column("kind", String, nullable=False),
    Column("subject", String, nullable=False),
    Column("target", String, nullable=False),
    _of("environment", "environment.fingerprint", cascade=False),
    _of("config_digest", "config.digest", cascade=False),
    Column("batch", Integer, nullable=False),
    Column("callers", Integer, nullable=False),
    Column("state", String, nullable=False),  # measured, refused, failed
    Column("samples", LargeBinary),  # codec.pack_samples; what was measured has it
    Column("reason", Text, nullable=False, default=""),
    Column("output", Text, nullable=False, default=""),
    _of("effective_digest", "config.digest", cascade=False, nullable=True),
    _json("placement", nullable=True),
    Column("race", String, nullable=False, default=""),
    Column("measured_at", UtcDateTime, nullable=False),
    # With the probe and not in tables of their own: read and written with it each time, half of all rows and time was theirs.
    _json("metrics", nullable=True),  # name -> number; open: the unit is in the name, a new metric needs no migration
    _json("cautions", nullable=True),  # objects of code, message and advice; what has none has no list
    # Keys are as good as random: an index that began with them would be written all over. Many probes of a subject come together.
    Index("ix_probe_subject_key_id", "subject", "key", "id"),
    Index("ix_probe_environment_kind", "environment", "kind"),
)

transfer = Table(
    "transfer",  # what a probe of kind "transfer" moved, and between which targets
    metadata,
    _of("probe_id", "probe.id", primary_key=True),
    Column("source", String, nullable=False),
    Column("destination", String, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),  # 0: the pair gave no numbers, and the probe says why
    # The probe's own are the destination's. Rows of schema 0001 have none, and are no evidence.
    _of("source_environment", "environment.fingerprint", cascade=False, nullable=True),
    _of("source_config_digest", "config.digest", cascade=False, nullable=True),
    Index("ix_transfer_source_destination", "source", "destination"),
)

lowering = Table(
    "lowering",  # a precision variant of a model, and how near it stays to fp32
    metadata,
    _id(),
    Column("content", String, nullable=False, index=True),  # of the fp32 model
    Column("precision", String, nullable=False),
    _json("recipe"),
    Column("lowered_content", String, index=True),  # None when it could not be made
    Column("reason", Text, nullable=False),
    Column("data", String, nullable=False),  # real, synthetic
    _json("accuracy"),
    Column("weight_bytes", BigInteger),
    Column("duration_s", Double, nullable=False),
    Column("made_at", UtcDateTime, nullable=False),
    Column("calibration", String),  # digest of the samples; rows of before schema 0003 do not say
)

# --- runs

run = Table(
    "run",
    metadata,
    _id(),  # the UUID of the record, as given
    Column("request", String, nullable=False),
    Column("started_at", UtcDateTime, nullable=False, index=True),
    Column("finished_at", UtcDateTime),
    Column("status", String, nullable=False),
    _of("model_id", "model.id", cascade=False, nullable=True, index=True),
    Column("model_name", String, nullable=False, index=True),
    _json("facts"),  # the model as this run found it: the same content may have another path each time
    Column("objective", String, nullable=False),
    _json("constraints"),
    _json("options"),
    Column("command", Text, nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("aivmm_version", String, nullable=False),
    _json("summary"),
    _json("notes"),
    _json("unavailable"),  # targets that were absent, with the reason
    Index("ix_run_request_started_at", "request", "started_at"),
)

run_probe = Table(
    "run_probe",
    metadata,
    _of("run_id", "run.id", primary_key=True),
    _of("probe_id", "probe.id", primary_key=True, index=True),
    Column("reused", Boolean, nullable=False),
    sqlite_with_rowid=False,
)

run_environment = Table(
    "run_environment",
    metadata,
    _of("run_id", "run.id", primary_key=True),
    _of("environment", "environment.fingerprint", primary_key=True, index=True, cascade=False),
    Column("position", Integer, nullable=False),
    sqlite_with_rowid=False,
)

study = Table(
    "study",
    metadata,
    _id(),
    _of("run_id", "run.id"),
    Column("name", String, nullable=False),
    _json("objectives", nullable=True),  # these three when it has ended, and not of before schema 0005
    _json("front", nullable=True),  # numbers of trials
    _json("importance", nullable=True),  # objects of objective, target, knob, share and trials
    UniqueConstraint("run_id", "name"),
)

trial = Table(
    "trial",
    metadata,
    _id(),
    _of("study_id", "study.id"),
    Column("number", Integer, nullable=False),
    Column("target", String, nullable=False),
    _of("config_digest", "config.digest", cascade=False),
    Column("batch", Integer, nullable=False),
    Column("callers", Integer, nullable=False),
    Column("state", String, nullable=False),
    Column("value", Double),
    Column("low", Double),
    Column("high", Double),
    Column("median_s", Double),
    Column("reused", Boolean, nullable=False),
    Column("reason", Text, nullable=False),
    Column("duration_s", Double, nullable=False),
    Column("asked", Boolean),  # these three not of before schema 0005
    _json("policy", nullable=True),
    _json("metrics", nullable=True),  # name -> number; open, as a probe's
    UniqueConstraint("study_id", "number"),
)

plan = Table(
    "plan",
    metadata,
    _id(),
    _of("run_id", "run.id", unique=True),
    Column("path", String, nullable=False),
    _json("content"),  # plan.json
    Column("saved_at", UtcDateTime, nullable=False),
)

proof = Table(
    "proof",
    metadata,
    _id(),
    _of("run_id", "run.id", index=True),
    Column("name", String, nullable=False),
    Column("role", String, nullable=False),
    Column("target", String, nullable=False),
    _of("config_digest", "config.digest", cascade=False),
    Column("batch", Integer, nullable=False),
    Column("callers", Integer, nullable=False),
    Column("eligible", Boolean, nullable=False),
    Column("why_not", Text, nullable=False),
    Column("samples", LargeBinary),
    Column("ratio", Double),
    Column("ratio_low", Double),
    Column("ratio_high", Double),
    Column("verdict", String),
    _json("metrics"),
    _json("cautions"),
    Column("proved_at", UtcDateTime, nullable=False),
)
