"""What the database's tests share: a database of their own, and records to put into it.

Those that take `location` or `database` run twice: on a SQLite file, and on a PostgreSQL server that is started for them (`postgres.py`;
with AIVMM_TEST_POSTGRES=postgresql+psycopg://... on that one), each in a database of its own. What is SQLite's own takes `tmp_path`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from aivmm.db.database import Database
from aivmm.models.records import Block, Category, CutPoint, ModelFacts, Operator, Structure
from aivmm.planner.records import RunRecord
from aivmm.probes.records import Caution, Measured, ProbeKey, Samples
from aivmm.runtime.config import Config
from aivmm.runtime.environment import Environment
from aivmm.tensors import TensorSpec
from tests.db import postgres

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
def public_folder() -> Iterator[Path]:
    """A folder that anybody may enter and write. Not below pytest's: each pytest that starts makes those private again."""
    with tempfile.TemporaryDirectory(prefix="aivmm-test-") as folder:
        Path(folder).chmod(0o777)
        yield Path(folder).resolve()
        Path(folder).chmod(0o777)


@pytest.fixture(scope="session")
def started_server() -> Iterator[postgres.Server | postgres.Missing]:
    """One server for all tests, or why there is none."""
    try:
        with postgres.server() as server:
            yield server
    except postgres.Missing as missing:
        yield missing


@pytest.fixture
def server(started_server: postgres.Server | postgres.Missing) -> postgres.Server:
    """The PostgreSQL server; skips the test where there is none."""
    if isinstance(started_server, postgres.Missing):
        pytest.skip(f"no PostgreSQL server: {started_server}")
    return started_server


@pytest.fixture(scope="session")
def filled_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with all tables and no row, to be copied: making one anew takes a quarter of a second each time."""
    file = tmp_path_factory.mktemp("filled") / "filled.db"
    Database.open(file).close()
    return file


@pytest.fixture(scope="session")
def filled_on_server(started_server: postgres.Server | postgres.Missing) -> Iterator[str]:
    """The name of a database of the server with all tables and no row, to be copied."""
    assert isinstance(started_server, postgres.Server)
    name = started_server.create()
    Database.open(started_server.location(name)).close()
    yield name
    started_server.drop(name)


@pytest.fixture(params=["sqlite", "postgresql"])
def location(request: pytest.FixtureRequest, tmp_path: Path, filled_file: Path) -> Iterator[str]:
    """A place where no database is yet: a file, or a new database of the server. With `database` it is filled with the tables."""
    filled = "database" in request.fixturenames
    if request.param == "sqlite":
        if filled:
            shutil.copyfile(filled_file, tmp_path / "performance.db")
        yield str(tmp_path / "performance.db")
        return
    server: postgres.Server = request.getfixturevalue("server")
    name = server.create(template=request.getfixturevalue("filled_on_server") if filled else None)
    yield server.location(name)
    server.drop(name)


@pytest.fixture
def database(location: str) -> Iterator[Database]:
    """A database with no row in it, open."""
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
