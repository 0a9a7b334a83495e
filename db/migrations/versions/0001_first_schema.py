"""The first schema. Frozen: what was released is never edited, a change is the next file."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make all tables."""
    _machines()
    _models()
    _measurements()
    _runs()


def _machines() -> None:
    op.create_table(
        "environment",
        sa.Column("fingerprint", sa.String(), nullable=False),
        sa.Column("target", sa.String(), nullable=False),
        sa.Column("device_model", sa.String(), nullable=False),
        sa.Column("driver", sa.String(), nullable=False),
        sa.Column("runtime_version", sa.String(), nullable=False),
        sa.Column("system", sa.String(), nullable=False),
        sa.Column("facts", sa.JSON(), nullable=False),
        sa.Column("first_seen_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("fingerprint", name=op.f("pk_environment")),
    )
    op.create_index(op.f("ix_environment_target"), "environment", ["target"])
    op.create_table(
        "device",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("driver", sa.String(), nullable=False),
        sa.Column("facts", sa.JSON(), nullable=False),
        sa.Column("first_seen_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_device")),
    )
    op.create_table(
        "target",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("runtime", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("runtime_version", sa.String(), nullable=False),
        sa.Column("precisions", sa.JSON(), nullable=False),
        sa.Column("device_id", sa.String(), nullable=False),
        sa.Column("environment", sa.String(), nullable=False),
        sa.Column("first_seen_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["device_id"], ["device.id"], name=op.f("fk_target_device_id_device")),
        sa.ForeignKeyConstraint(["environment"], ["environment.fingerprint"], name=op.f("fk_target_environment_environment")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_target")),
    )
    op.create_index(op.f("ix_target_device_id"), "target", ["device_id"])
    op.create_index(op.f("ix_target_environment"), "target", ["environment"])
    op.create_table(
        "config",
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("precision", sa.String(), nullable=True),
        sa.Column("settings", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_config")),
    )


def _models() -> None:
    op.create_table(
        "model",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("content", sa.String(), nullable=False),
        sa.Column("batch", sa.Integer(), nullable=False),
        sa.Column("structure", sa.String(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("category", sa.String(), nullable=False),
        sa.Column("node_count", sa.Integer(), nullable=False),
        sa.Column("flops", sa.Double(), nullable=True),
        sa.Column("weight_bytes", sa.BigInteger(), nullable=False),
        sa.Column("data_dependent", sa.Boolean(), nullable=False),
        sa.Column("facts", sa.JSON(), nullable=False),
        sa.Column("cut_points", sa.JSON(), nullable=False),
        sa.Column("first_seen_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_model")),
        sa.UniqueConstraint("content", "batch", name=op.f("uq_model_content_batch")),
    )
    op.create_index(op.f("ix_model_name"), "model", ["name"])
    op.create_index(op.f("ix_model_sha256"), "model", ["sha256"])
    op.create_index(op.f("ix_model_structure"), "model", ["structure"])
    op.create_table(
        "operator",
        sa.Column("signature", sa.String(), nullable=False),
        sa.Column("op_type", sa.String(), nullable=False),
        sa.Column("domain", sa.String(), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("flops", sa.Double(), nullable=True),
        sa.Column("io_bytes", sa.BigInteger(), nullable=True),
        sa.Column("data_dependent", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("signature", name=op.f("pk_operator")),
    )
    op.create_index(op.f("ix_operator_op_type"), "operator", ["op_type"])
    op.create_table(
        "model_operator",
        sa.Column("model_id", sa.String(), nullable=False),
        sa.Column("signature", sa.String(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("node_count", sa.Integer(), nullable=False),
        sa.Column("nodes", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["model_id"], ["model.id"], name=op.f("fk_model_operator_model_id_model"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["signature"], ["operator.signature"], name=op.f("fk_model_operator_signature_operator")),
        sa.PrimaryKeyConstraint("model_id", "signature", name=op.f("pk_model_operator")),
        sqlite_with_rowid=False,
    )
    op.create_index(op.f("ix_model_operator_signature"), "model_operator", ["signature"])
    op.create_table(
        "segment",
        sa.Column("structure", sa.String(), nullable=False),
        sa.Column("op_types", sa.JSON(), nullable=False),
        sa.Column("flops", sa.Double(), nullable=True),
        sa.Column("data_dependent", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("structure", name=op.f("pk_segment")),
    )
    op.create_table(
        "model_block",
        sa.Column("model_id", sa.String(), nullable=False),
        sa.Column("position", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("structure", sa.String(), nullable=False),
        sa.Column("content", sa.String(), nullable=False),
        sa.Column("first_node", sa.Integer(), nullable=False),
        sa.Column("last_node", sa.Integer(), nullable=False),
        sa.Column("weight_bytes", sa.BigInteger(), nullable=False),
        sa.Column("inputs", sa.JSON(), nullable=False),
        sa.Column("outputs", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["model_id"], ["model.id"], name=op.f("fk_model_block_model_id_model"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["structure"], ["segment.structure"], name=op.f("fk_model_block_structure_segment")),
        sa.PrimaryKeyConstraint("model_id", "position", name=op.f("pk_model_block")),
        sqlite_with_rowid=False,
    )
    op.create_index(op.f("ix_model_block_content"), "model_block", ["content"])
    op.create_index(op.f("ix_model_block_structure"), "model_block", ["structure"])


def _measurements() -> None:
    op.create_table(
        "probe",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("subject", sa.String(), nullable=False),
        sa.Column("target", sa.String(), nullable=False),
        sa.Column("environment", sa.String(), nullable=False),
        sa.Column("config_digest", sa.String(), nullable=False),
        sa.Column("batch", sa.Integer(), nullable=False),
        sa.Column("callers", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("samples", sa.LargeBinary(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("output", sa.Text(), nullable=False),
        sa.Column("effective_digest", sa.String(), nullable=True),
        sa.Column("placement", sa.JSON(), nullable=True),
        sa.Column("race", sa.String(), nullable=False),
        sa.Column("measured_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["config_digest"], ["config.digest"], name=op.f("fk_probe_config_digest_config")),
        sa.ForeignKeyConstraint(["effective_digest"], ["config.digest"], name=op.f("fk_probe_effective_digest_config")),
        sa.ForeignKeyConstraint(["environment"], ["environment.fingerprint"], name=op.f("fk_probe_environment_environment")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_probe")),
    )
    op.create_index("ix_probe_environment_kind", "probe", ["environment", "kind"])
    op.create_index("ix_probe_key_id", "probe", ["key", "id"])
    op.create_index("ix_probe_subject_kind", "probe", ["subject", "kind"])
    op.create_index("ix_probe_target_kind", "probe", ["target", "kind"])
    op.create_table(
        "metric",
        sa.Column("probe_id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("value", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["probe_id"], ["probe.id"], name=op.f("fk_metric_probe_id_probe"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("probe_id", "name", name=op.f("pk_metric")),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "caution",
        sa.Column("probe_id", sa.String(), nullable=False),
        sa.Column("position", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("code", sa.String(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("advice", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["probe_id"], ["probe.id"], name=op.f("fk_caution_probe_id_probe"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("probe_id", "position", name=op.f("pk_caution")),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "transfer",
        sa.Column("probe_id", sa.String(), nullable=False),
        sa.Column("source", sa.String(), nullable=False),
        sa.Column("destination", sa.String(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["probe_id"], ["probe.id"], name=op.f("fk_transfer_probe_id_probe"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("probe_id", name=op.f("pk_transfer")),
    )
    op.create_index("ix_transfer_source_destination", "transfer", ["source", "destination"])
    op.create_table(
        "lowering",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("content", sa.String(), nullable=False),
        sa.Column("precision", sa.String(), nullable=False),
        sa.Column("recipe", sa.JSON(), nullable=False),
        sa.Column("lowered_content", sa.String(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("data", sa.String(), nullable=False),
        sa.Column("accuracy", sa.JSON(), nullable=False),
        sa.Column("weight_bytes", sa.BigInteger(), nullable=True),
        sa.Column("duration_s", sa.Double(), nullable=False),
        sa.Column("made_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_lowering")),
    )
    op.create_index(op.f("ix_lowering_content"), "lowering", ["content"])
    op.create_index(op.f("ix_lowering_lowered_content"), "lowering", ["lowered_content"])


def _runs() -> None:
    op.create_table(
        "run",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("request", sa.String(), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("model_id", sa.String(), nullable=True),
        sa.Column("model_name", sa.String(), nullable=False),
        sa.Column("facts", sa.JSON(), nullable=False),
        sa.Column("objective", sa.String(), nullable=False),
        sa.Column("constraints", sa.JSON(), nullable=False),
        sa.Column("options", sa.JSON(), nullable=False),
        sa.Column("command", sa.Text(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("aivmm_version", sa.String(), nullable=False),
        sa.Column("summary", sa.JSON(), nullable=False),
        sa.Column("notes", sa.JSON(), nullable=False),
        sa.Column("unavailable", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["model_id"], ["model.id"], name=op.f("fk_run_model_id_model")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_run")),
    )
    op.create_index(op.f("ix_run_model_id"), "run", ["model_id"])
    op.create_index(op.f("ix_run_model_name"), "run", ["model_name"])
    op.create_index("ix_run_request_started_at", "run", ["request", "started_at"])
    op.create_index(op.f("ix_run_started_at"), "run", ["started_at"])
    op.create_table(
        "run_probe",
        sa.Column("run_id", sa.String(), nullable=False),
        sa.Column("probe_id", sa.String(), nullable=False),
        sa.Column("reused", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(["probe_id"], ["probe.id"], name=op.f("fk_run_probe_probe_id_probe"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name=op.f("fk_run_probe_run_id_run"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("run_id", "probe_id", name=op.f("pk_run_probe")),
        sqlite_with_rowid=False,
    )
    op.create_index(op.f("ix_run_probe_probe_id"), "run_probe", ["probe_id"])
    op.create_table(
        "run_environment",
        sa.Column("run_id", sa.String(), nullable=False),
        sa.Column("environment", sa.String(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["environment"], ["environment.fingerprint"], name=op.f("fk_run_environment_environment_environment")),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name=op.f("fk_run_environment_run_id_run"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("run_id", "environment", name=op.f("pk_run_environment")),
        sqlite_with_rowid=False,
    )
    op.create_index(op.f("ix_run_environment_environment"), "run_environment", ["environment"])
    op.create_table(
        "study",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("run_id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name=op.f("fk_study_run_id_run"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_study")),
        sa.UniqueConstraint("run_id", "name", name=op.f("uq_study_run_id_name")),
    )
    op.create_table(
        "trial",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("study_id", sa.String(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("target", sa.String(), nullable=False),
        sa.Column("config_digest", sa.String(), nullable=False),
        sa.Column("batch", sa.Integer(), nullable=False),
        sa.Column("callers", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("value", sa.Double(), nullable=True),
        sa.Column("low", sa.Double(), nullable=True),
        sa.Column("high", sa.Double(), nullable=True),
        sa.Column("median_s", sa.Double(), nullable=True),
        sa.Column("reused", sa.Boolean(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("duration_s", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["config_digest"], ["config.digest"], name=op.f("fk_trial_config_digest_config")),
        sa.ForeignKeyConstraint(["study_id"], ["study.id"], name=op.f("fk_trial_study_id_study"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_trial")),
        sa.UniqueConstraint("study_id", "number", name=op.f("uq_trial_study_id_number")),
    )
    op.create_table(
        "plan",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("run_id", sa.String(), nullable=False),
        sa.Column("path", sa.String(), nullable=False),
        sa.Column("content", sa.JSON(), nullable=False),
        sa.Column("saved_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name=op.f("fk_plan_run_id_run"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_plan")),
        sa.UniqueConstraint("run_id", name=op.f("uq_plan_run_id")),
    )
    op.create_table(
        "proof",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("run_id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("role", sa.String(), nullable=False),
        sa.Column("target", sa.String(), nullable=False),
        sa.Column("config_digest", sa.String(), nullable=False),
        sa.Column("batch", sa.Integer(), nullable=False),
        sa.Column("callers", sa.Integer(), nullable=False),
        sa.Column("eligible", sa.Boolean(), nullable=False),
        sa.Column("why_not", sa.Text(), nullable=False),
        sa.Column("samples", sa.LargeBinary(), nullable=True),
        sa.Column("ratio", sa.Double(), nullable=True),
        sa.Column("ratio_low", sa.Double(), nullable=True),
        sa.Column("ratio_high", sa.Double(), nullable=True),
        sa.Column("verdict", sa.String(), nullable=True),
        sa.Column("metrics", sa.JSON(), nullable=False),
        sa.Column("cautions", sa.JSON(), nullable=False),
        sa.Column("proved_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["config_digest"], ["config.digest"], name=op.f("fk_proof_config_digest_config")),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name=op.f("fk_proof_run_id_run"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_proof")),
    )
    op.create_index(op.f("ix_proof_run_id"), "proof", ["run_id"])
