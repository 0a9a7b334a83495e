"""One realistic row or more for every table, made by the public API: what an old database file holds, and what must be read back from it.

`python -m tests.db.old_rows REVISION` (in the repository's root) writes `old_files/REVISION.sql`. Do so once, when a schema is about to be
released, with the code of that release; never write it again, or the test no longer sees what that release wrote.
"""

from __future__ import annotations

import sqlite3
import sys
import tempfile
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy

from aivmm.db.database import Database
from aivmm.db.migrate import HEAD
from aivmm.db.schema import lowering, transfer
from aivmm.models.records import Block, Category, CutPoint, ModelFacts, Operator, Structure
from aivmm.planner.records import Importance, ProofRecord, RunRecord, StudyRecord, TrialRecord
from aivmm.probes.records import Caution, Failed, Measured, Outcome, ProbeKey, Refused, Samples, Transfer, TransferPoint
from aivmm.runtime.config import Config
from aivmm.runtime.environment import Environment, environment_of
from aivmm.runtime.target import Device, Target, Unavailable
from aivmm.tensors import TensorSpec

FOLDER = Path(__file__).parent / "old_files"
MOMENT = datetime(2026, 5, 4, 3, 2, 1, 123456, tzinfo=UTC)

CPU = Device(kind="cpu", model="A CPU, ünïcödé", instruction_sets=("avx2", "fma"), cores=2, memory_bytes=2**34, power_limit_w=None)
GPU = Device(kind="gpu", model="A GPU", driver="580.1", memory_bytes=150_000_000_000, power_limit_w=700)
TARGETS = (
    Target(runtime="openvino", name="CPU", device=CPU, runtime_version="2026.4", precisions=("fp32", "bf16")),
    Target(runtime="onnxruntime", name="CUDA:0", device=GPU, runtime_version="1.31", precisions=("fp32", "f16", "int8")),
)
ENVIRONMENTS: tuple[Environment, ...] = tuple(map(environment_of, TARGETS))

SPEC = TensorSpec(name="t", dtype="float32", shape=(1, None, 8))
FACTS = ModelFacts(
    name="squeezenet",
    path="models/squeezenet.onnx",
    sha256="ab" * 32,
    category=Category(name="CNN", reason="26 Conv"),
    inputs=(TensorSpec(name="x", dtype="float32", shape=(1, 3, None, 224)),),
    outputs=(TensorSpec(name="y", dtype="string", shape=()),),
    opset=17,
    ir_version=8,
    batch=4,
    batchable=True,
    notes=("opset 1 raised to 17",),
)
STRUCTURE = Structure(
    structure="structure-of-the-whole",
    content="content-of-the-whole",
    node_count=4,
    flops=None,
    weight_bytes=5_000_000_000,
    operators=(
        Operator(
            signature="s-relu", op_type="Relu", domain="", description="Relu 1x8", count=3, nodes=("r0", "r1", "r2"), flops=8.0, bytes=64
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
    cut_points=(CutPoint(position=2, tensors=(SPEC,), bytes=32), CutPoint(position=3, tensors=(SPEC, SPEC), bytes=None)),
    blocks=tuple(
        Block(
            index=index,
            first=index * 2,
            last=index * 2 + 1,
            structure="same",
            content=f"content-{index}",
            inputs=(SPEC,),
            outputs=(SPEC,),
            op_types={"Relu": 2},
            flops=1e6,
            weight_bytes=10 + index,
        )
        for index in range(2)
    ),
    pieces=(("r0", "l"), ("r1", "r2 <\N{SNOWMAN}>\n")),
)


def key(subject: str, *, kind: str = "segment", target: int = 0, batch: int = 1) -> ProbeKey:
    config = Config.of({"INFERENCE_NUM_THREADS": 2, "ENABLE_CPU_PINNING": True, "SCALE": 0.5, "HINT": "LATENCY"}, precision="bf16")
    return ProbeKey(
        kind=kind,
        subject=subject,
        target=f"{TARGETS[target].runtime}:{TARGETS[target].name}",
        environment=ENVIRONMENTS[target].fingerprint,
        config=config,
        batch=batch,
        callers=2,
    )


MEASURED = Measured(
    key=key("same", batch=4),
    samples=Samples(timed_s=(1.25e-3, 1.1e-3, 5e-324, 1.7e308), rounds=(0, 0, 1, 2**32 - 1), warmup_s=(3e-3,)),
    metrics={"compile_s": 0.5, "peak_memory_bytes": 1e8, "tiny": 5e-324},
    cautions=(Caution(code="spread", message="wide", advice="close the browser"), Caution(code="few-samples", message="4", advice="")),
    effective_config={"INFERENCE_NUM_THREADS": 2, "SCALE": 0.1, "PINNED": True, "NAME": "x"},
    placement={"CPU": 12},
    race="race-1",
)
MOVED = Measured(
    key=key("float32 1x8", kind="transfer"),
    samples=Samples(timed_s=(1e-6,)),
    metrics={},
    cautions=(),
    effective_config={},
    placement={},
    race="",
)
OUTCOMES: tuple[Outcome, ...] = (
    MEASURED,
    Refused(key=key("s-loop", kind="operator", target=1), reason="not implemented: Loop"),
    Failed(key=key("same", target=1), reason="segfault", output="last words \N{SNOWMAN}"),
    MOVED,
    replace(MEASURED, race="race-2"),  # measured again: this one counts
)
RUN = RunRecord(
    id="0197f0a0-0000-7000-8000-000000000001",
    request="request",
    started_at=MOMENT,
    model=FACTS,
    objective="latency",
    constraints=("latency<100ms", "cosine>=0.999"),
    options={"budget_s": 60, "targets": ["openvino"], "fresh": False, "batch": None},
    command="aivmm-tune squeezenet.onnx",
    seed=2**40,
    aivmm_version="0.1.0",
    notes=("no GPU",),
)
ENDED = replace(RUN, status="complete", finished_at=MOMENT + timedelta(seconds=61.5), summary={"schema": 1, "plan": {"batch": 4}})
ABSENT = Unavailable(target="openvino:GPU", reason="no driver", advice="install it")
TRIAL = TrialRecord(
    number=3,
    target="openvino:CPU",
    config=Config.of({"n": 2}),
    batch=4,
    callers=2,
    state="complete",
    value=0.91,
    low=0.9,
    high=0.92,
    median_s=1e-3,
    seconds=0.5,
)
PRUNED = replace(TRIAL, number=4, state="refused", value=None, low=None, high=None, median_s=None, reason="no", reused=True)
# Since schema 0005 a trial keeps what it measured and how it cut, and a study what it came to.
ASKED = replace(
    TRIAL,
    number=5,
    asked=True,
    policy={"targets": {"openvino:CPU": "{}"}, "most_pieces": 2, "cut_price": 0.5, "contiguous": True},
    metrics={"latency": 1e-3, "tiny": 5e-324},
)
STUDY = StudyRecord(
    objectives=("latency", "size"),
    front=(3, 5),
    importance=(Importance(objective="size", target="openvino:CPU", knob="n", share=0.1, trials=9),),
)
PROOF = ProofRecord(
    name="plan",
    role="plan",
    target="openvino:CPU",
    config=Config.of({"n": 2}, precision="bf16"),
    batch=4,
    callers=1,
    eligible=True,
    samples=Samples(timed_s=(1.0, 2.0), rounds=(0, 1)),
    metrics={"throughput_per_s": 12.5},
    cautions=(Caution(code="spread", message="m", advice="a"),),
)
BASELINE = ProofRecord(
    name="ORT default",
    role="baseline",
    target="onnxruntime:CPU",
    config=Config(),
    batch=1,
    callers=1,
    eligible=False,
    why_not="over the accuracy limit",
    ratio=1.9,
    ratio_low=1.8,
    ratio_high=2.0,
    verdict="faster",
)
PLAN = {"schema": 1, "stages": [{"config": {"a": True, "b": 1, "c": 1.5}, "blocks": [0, 1]}], "ünïcödé": None}

# Since schema 0002 a transfer knows both of its ends.
HANDED_OVER = Transfer(
    source="openvino:CPU",
    source_environment=ENVIRONMENTS[0].fingerprint,
    source_config=Config.of({"NUM_STREAMS": 1}, precision="fp32"),
    destination="onnxruntime:CUDA:0",
    destination_environment=ENVIRONMENTS[1].fingerprint,
    points=tuple(
        TransferPoint(size_bytes=size, samples=Samples(timed_s=(3e-6, 2e-6)), source_s=1e-6, destination_s=5e-7, cost_s=-1e-7)
        for size in (256, 4096, 2**26)
    ),
    cautions=(Caution(code="spread", message="wide", advice=""),),
)

# Rows that the API does not reach: they are made and compared as they are.
TRANSFER = {"source": "openvino:CPU", "destination": "onnxruntime:CUDA:0", "size_bytes": 2**33}
LOWERING = {
    "id": "0197f0a0000070008000000000000002",
    "content": "content-of-the-whole",
    "precision": "int8",
    "recipe": {"algorithm": "smoothquant", "samples": 300},
    "lowered_content": "content-in-int8",
    "reason": "",
    "data": "real",
    "accuracy": {"cosine": 0.9995},
    "weight_bytes": 1_250_000_000,
    "duration_s": 12.5,
    "made_at": MOMENT,
}


def write(database: Database) -> None:
    """Store all of the above."""
    for each in TARGETS:
        database.remember_target(each)
    model = database.remember_model(FACTS, STRUCTURE)
    database.start_run(RUN, unavailable=[ABSENT], model_id=model)
    database.link_environments(RUN.id, [each.fingerprint for each in reversed(ENVIRONMENTS)])
    ids = database.add_many(OUTCOMES[:1])
    ids += [database.add(each, run_id=RUN.id) for each in OUTCOMES[1:]]
    database.link(RUN.id, ids[:1])
    database.add_trial(RUN.id, PRUNED)
    database.add_trial(RUN.id, TRIAL)
    database.add_trial(RUN.id, replace(TRIAL, batch=8), study_name="batch")
    database.add_trial(RUN.id, ASKED)
    database.end_study(RUN.id, STUDY)
    for proof in (PROOF, BASELINE):
        database.add_proof(RUN.id, proof)
    database.save_plan(RUN.id, PLAN, "squeezenet.aivmm")
    database.update_run(ENDED)
    with database._writing() as connection:
        connection.execute(transfer.insert(), [{"probe_id": ids[OUTCOMES.index(MOVED)], **TRANSFER}])
        connection.execute(lowering.insert(), [LOWERING])
    database.add_transfers([HANDED_OVER])


def expected(revision: str = HEAD) -> dict[str, Any]:
    """Return what `read` gives for what the code of `revision` wrote."""
    structure = STRUCTURE if revision >= "0004" else replace(STRUCTURE, pieces=())
    return {
        "environments": list(ENVIRONMENTS),
        "targets": [repr(each) for each in TARGETS],
        "models": [FACTS],
        "structure": structure,
        "outcomes": list(OUTCOMES),
        "found": OUTCOMES[-1],
        "configs": repr(OUTCOMES[0].key.config),
        "run": ENDED,
        "last": ENDED,
        "absent": [ABSENT],
        "environments of the run": list(reversed(ENVIRONMENTS)),
        "outcomes of the run": [(each, number == 0) for number, each in enumerate(OUTCOMES)],
        "trials": [TRIAL, PRUNED, *([ASKED] if revision >= "0005" else []), replace(TRIAL, batch=8)],
        "studies": [STUDY if revision >= "0005" else StudyRecord(), StudyRecord(name="batch")],
        "proofs": [PROOF, BASELINE],
        "plan": PLAN,
        "path": "squeezenet.aivmm",
        "structure of the run": structure,
        "transfer": [tuple(TRANSFER.values())],
        "transfers": [HANDED_OVER] if revision >= "0002" else [],
        "lowering": [LOWERING],
    }


def read(database: Database) -> dict[str, Any]:
    """Read it all back."""
    handed_over = set(HANDED_OVER.keys())
    outcomes = [each for each in database.outcomes(all=True) if each.key not in handed_over]
    found = database.find(MEASURED.key)
    with database._reading() as connection:
        columns = [transfer.c[name] for name in TRANSFER]
        plain = sqlalchemy.select(*columns).where(transfer.c.size_bytes == TRANSFER["size_bytes"])
        transfers = [tuple(row) for row in connection.execute(plain)]
        lowerings = [{name: row[name] for name in LOWERING} for row in connection.execute(sqlalchemy.select(lowering)).mappings()]
    return {
        "environments": database.environments(),
        "targets": [repr(each) for each in database.targets()],
        "models": database.models(),
        "structure": database.structure(STRUCTURE.content, FACTS.batch),
        "outcomes": outcomes,
        "found": found,
        "configs": repr(outcomes[0].key.config),
        "run": database.run(RUN.id),
        "last": database.last_run(RUN.request, ["complete"]),
        "absent": database.unavailable(RUN.id),
        "environments of the run": database.run_environments(RUN.id),
        "outcomes of the run": database.run_outcomes(RUN.id),
        "trials": database.trials(RUN.id),
        "studies": database.studies(RUN.id),
        "proofs": database.proofs(RUN.id),
        "plan": database.plan(RUN.id),
        "path": database.plan_path(RUN.id),
        "structure of the run": database.run_structure(RUN.id),
        "transfer": transfers,
        "transfers": database.find_transfers(),
        "lowering": lowerings,
    }


def main() -> None:
    """Write the file of one revision; refuse to write one again."""
    target = FOLDER / f"{sys.argv[1]}.sql"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "old.db"
        with Database.open(file) as database:
            write(database)
        with closing(sqlite3.connect(file)) as connection, target.open("x", encoding="utf-8", newline="\n") as text:
            text.writelines(line + "\n" for line in connection.iterdump())


if __name__ == "__main__":
    main()
