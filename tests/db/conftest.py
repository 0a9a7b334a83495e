"""What the database's tests share: a database of their own, and records to put into it.

They run on SQLite; with AIVMM_TEST_POSTGRES=postgresql+psycopg://... those that take `location` run on that server instead, each in a
database of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy

from aivmm.db.database import Database
from aivmm.models.records import Block, Category, CutPoint, ModelFacts, Operator, Structure
from aivmm.planner.records import RunRecord
from aivmm.probes.records import Caution, Measured, ProbeKey, Samples
from aivmm.runtime.config import Config
from aivmm.runtime.environment import Environment
from aivmm.tensors import TensorSpec

SERVER = os.environ.get("AIVMM_TEST_POSTGRES")

# What a child process needs to write: `database` (opened at argv[1]), `outcome(number)` and their environment, remembered.
CHILD = """
import os, signal, sys
from aivmm.db.database import Database
from aivmm.probes.records import Measured, ProbeKey, Samples
from aivmm.runtime.config import Config
from aivmm.runtime.environment import Environment

ENVIRONMENT = Environment(target="null:0", device_model="child", driver="", runtime_version="1", instruction_sets=(), usable_cores=1,
                          power_limit_w=None, system="test")

def outcome(number, who=""):
    key = ProbeKey(kind="segment", subject=f"{who}{number}", target="null:0", environment=ENVIRONMENT.fingerprint, config=Config())
    return Measured(key=key, samples=Samples(timed_s=(1.0 + number,) * 20), metrics={"compile_s": float(number)})

def die():
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))  # on Windows SIGTERM is as sudden
"""


@pytest.fixture
def child() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a Python process that runs `CHILD` and then the given code, with pipes; none outlives its test."""
    started: list[subprocess.Popen[str]] = []

    def start(code: str, *arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", CHILD + code, *map(str, arguments)]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        with process:  # closes the pipes and waits
            pass


@pytest.fixture
def location(tmp_path: Path) -> Iterator[str]:
    """A place where no database is yet: a file, or a new database of the server."""
    if not SERVER:
        yield str(tmp_path / "performance.db")
        return
    name = f"aivmm_{uuid.uuid4().hex}"
    url = sqlalchemy.make_url(SERVER)
    engine = sqlalchemy.create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    yield url.set(database=name).render_as_string(hide_password=False)
    with engine.connect() as connection:
        connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
    engine.dispose()


@pytest.fixture
def database(location: str) -> Iterator[Database]:
    with Database.open(location) as opened:
        yield opened


@pytest.fixture
def environment(database: Database) -> Environment:
    """An environment that `database` remembers."""
    made = Environment(
        target="openvino:CPU",
        device_model="A CPU with ünïcödé",
        driver="",
        runtime_version="2026.4",
        instruction_sets=("avx2", "fma"),
        usable_cores=2,
        power_limit_w=None,
        system="Linux-x86_64",
    )
    database.remember_environment(made)
    return made


@pytest.fixture
def measured(environment: Environment) -> Callable[..., Measured]:
    """Make a measurement whose key differs where it is told to."""

    def make(subject: str = "block", *, median_s: float = 1e-3, config: Config | None = None, batch: int = 1, callers: int = 1) -> Measured:
        return Measured(
            key=ProbeKey(
                kind="segment",
                subject=subject,
                target="openvino:CPU",
                environment=environment.fingerprint,
                config=config or Config.of({"INFERENCE_NUM_THREADS": 2, "ENABLE_CPU_PINNING": True}, precision="fp32"),
                batch=batch,
                callers=callers,
            ),
            samples=Samples(timed_s=(median_s, median_s * 0.9, median_s * 1.1), rounds=(0, 1, 7), warmup_s=(median_s * 3,)),
            metrics={"compile_s": 0.5, "peak_memory_bytes": 1e8},
            cautions=(
                Caution(code="spread", message="wide", advice="close the browser"),
                Caution(code="few-samples", message="3", advice=""),
            ),
            effective_config={"INFERENCE_NUM_THREADS": 2, "SCALE": 0.1, "PINNED": True, "NAME": "x"},
            placement={"CPU": 12},
            race="race-1",
        )

    return make


@pytest.fixture
def facts() -> ModelFacts:
    return ModelFacts(
        name="squeezenet",
        path="models/squeezenet.onnx",
        sha256="ab" * 32,
        category=Category(name="CNN", reason="26 Conv"),
        inputs=(TensorSpec(name="x", dtype="float32", shape=(1, 3, None, 224)),),
        outputs=(TensorSpec(name="y", dtype="string", shape=()),),
        opset=17,
        ir_version=8,
        batch=1,
        batchable=True,
        notes=("opset 1 raised to 17",),
    )


@pytest.fixture
def structure() -> Structure:
    """Three blocks, two of them alike."""
    spec = TensorSpec(name="t", dtype="float32", shape=(1, 8))

    def block(index: int, kind: str, weights: int) -> Block:
        return Block(
            index=index,
            first=index * 2,
            last=index * 2 + 1,
            structure=kind,
            content=f"content-{index}",
            inputs=(spec,),
            outputs=(TensorSpec(name=f"o{index}", dtype="float32", shape=(1, None)),),
            op_types={"Conv": 1, "Relu": 1},
            flops=1e6,
            weight_bytes=weights,
        )

    return Structure(
        structure="structure-of-the-whole",
        content="content-of-the-whole",
        node_count=6,
        flops=None,
        weight_bytes=5_000_000_000,
        operators=(
            Operator(
                signature="s-relu",
                op_type="Relu",
                domain="",
                description="Relu 1x8",
                count=3,
                nodes=("r0", "r1", "r2"),
                flops=8.0,
                bytes=64,
            ),
            Operator(
                signature="s-loop",
                op_type="Loop",
                domain="x.y",
                description="Loop",
                count=1,
                nodes=("l",),
                flops=None,
                bytes=None,
                data_dependent=True,
            ),
        ),
        cut_points=(CutPoint(position=2, tensors=(spec,), bytes=32), CutPoint(position=4, tensors=(spec, spec), bytes=None)),
        blocks=(block(0, "a", 10), block(1, "b", 20), block(2, "a", 30)),
    )


@pytest.fixture
def run_record(facts: ModelFacts) -> Callable[..., RunRecord]:
    """Make the record of a run; the n-th starts in minute n."""

    def make(minute: int = 0, *, request: str = "request", run_id: str | None = None) -> RunRecord:
        return RunRecord(
            id=run_id or str(uuid.uuid4()),
            request=request,
            started_at=datetime(2026, 5, 4, 3, minute, 1, 123456, tzinfo=UTC),
            model=facts,
            objective="latency",
            constraints=("latency<100ms", "cosine>=0.999"),
            options={"budget_s": 60, "targets": ["openvino"], "fresh": False, "batch": None},
            command="aivmm-tune squeezenet.onnx",
            seed=2**40,
            aivmm_version="0.1.0",
            notes=("no GPU",),
        )

    return make
