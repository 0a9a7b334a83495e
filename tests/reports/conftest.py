"""Realistic rows for reports: a complete run, one without a plan, one with refused targets, hostile names, and a big model.

Times are drawn from a seeded generator once; nothing here measures.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import lru_cache
from typing import Any

import pytest

from aivmm.models.records import Category, ModelFacts
from aivmm.planner.records import RunRecord, TrialRecord
from aivmm.probes.records import Caution, Failed, Outcome, ProbeKey, Refused
from aivmm.reports.data import ReportData
from aivmm.runtime.config import Config, Setting
from aivmm.runtime.target import Unavailable
from tests.reports.html_page import Page
from tests.reports.rows import (
    EARLIER,
    GPU,
    HOSTILE,
    ORT,
    OV,
    ceilings,
    digest,
    environment,
    handovers,
    measured,
    probes,
    proof,
    structure,
    tensor,
)


def trials(count: int = 48) -> tuple[TrialRecord, ...]:
    made = []
    for number in range(count):
        chance = random.Random(number)
        target = OV if number % 3 else ORT
        threads = chance.choice([1, 2, 3, 4])
        settings: dict[str, Setting] = (
            {
                "INFERENCE_NUM_THREADS": threads,
                "PERFORMANCE_HINT": chance.choice(["LATENCY", "THROUGHPUT"]),
                "ENABLE_HYPER_THREADING": chance.random() < 0.5,
            }
            if target == OV
            else {"intra_op_num_threads": threads, "session.intra_op.allow_spinning": chance.choice(["0", "1"])}
        )
        value = (0.52 if target == OV else 0.93) * (1 + 0.34 * abs(threads - 2)) * chance.uniform(0.97, 1.14)
        if number % 11 == 7:
            made.append(
                TrialRecord(
                    number=number,
                    target=target,
                    config=Config.of(settings, precision="bf16"),
                    batch=1,
                    callers=1,
                    state="refused",
                    value=None,
                    reason="bf16 is not in OPTIMIZATION_CAPABILITIES of this device",
                )
            )
            continue
        made.append(
            TrialRecord(
                number=number,
                target=target,
                config=Config.of(settings),
                batch=1,
                callers=1,
                state="complete",
                value=value,
                low=value * 0.97,
                high=value * 1.035,
                median_s=0.0052 * value,
                metrics={"latency": 0.0052 * value, "throughput": 1 / (0.0052 * value), "cosine": 0.9999987},
                reused=number < 6,
                seconds=0.8,
            )
        )
    return tuple(made)


def facts(name: str = "demo:squeezenet") -> ModelFacts:
    return ModelFacts(
        name=name,
        path=name,
        sha256=digest(name),
        category=Category(name="CNN", reason="26 of 66 operators are convolutions, and none attends"),
        inputs=(tensor("data", 1, 3, 224, 224),),
        outputs=(tensor("softmaxout_1", 1, 1000, 1, 1),),
        opset=17,
        ir_version=8,
        batch=1,
        batchable=True,
        notes=("opset 9 raised to 17",),
    )


def summary(stages: list[dict[str, Any]], verdict: str) -> dict[str, Any]:
    return {
        "schema": 1,
        "plan": {"path": "squeezenet.aivmm", "batch": 1, "stages": stages},
        "objective": "latency",
        "measured": {"median_s": 0.00271, "ci95_s": [0.002702, 0.002719], "p99_s": 0.0031, "throughput_per_s": 369.0, "samples": 528},
        "predicted": {"median_s": 0.00264, "reference": "onnxruntime:CPU default"},
        "importance": [
            {"objective": "latency", "target": OV, "knob": "INFERENCE_NUM_THREADS", "share": 0.71, "trials": 31},
            {"objective": "latency", "target": OV, "knob": "PERFORMANCE_HINT", "share": 0.29, "trials": 31},
            {"objective": "latency", "target": "", "knob": "target", "share": 1.0, "trials": 46},
        ],
        "certificate": {
            "bound_s": 0.00261,
            "gap": 0.0114,
            "rests_on": {"measured": 0.8, "interpolated": 0.0, "modelled": 0.2},
            "sentence": "The plan was expected to take 2.64 ms; that is 80 % measured and 20 % modelled from measured parts.",
        },
        "accuracy": {"metric": "cosine", "value": 0.9999987, "limit": 0.999, "data": "synthetic"},
        "probes": {"measured": 163, "reused": 12, "refused": 5, "failed": 1},
        "wall_s": 61.3,
        "verdict": verdict,
    }


def full_data() -> ReportData:
    """Return a complete run on two CPU targets: the plan wins, one baseline is the same, one is not eligible."""
    shape = structure()
    tuned = Config.of({"INFERENCE_NUM_THREADS": 2, "PERFORMANCE_HINT": "LATENCY"}, precision="fp32")
    stage = {"model": "segments/a.onnx", "target": OV, "precision": "fp32", "config": tuned.as_dict(), "blocks": [0, len(shape.blocks) - 1]}
    wide = Caution(code="spread", message="the middle half spans 13 % of the median", advice="lock clocks, or raise --budget")
    busy = Caution(code="machine-busy", message="other processes used 0.4 cores", advice="stop other work on this machine and run again")
    return ReportData(
        run=RunRecord(
            id="0d9f6a3e-3f2f-4c3b-9d58-4a5a8f1f6a10",
            request=digest("request"),
            started_at=EARLIER,
            finished_at=EARLIER + timedelta(seconds=61),
            status="complete",
            model=facts(),
            objective="latency",
            constraints=("cosine>=0.999",),
            options={"budget_s": 60, "targets": ["*"], "precisions": ["fp32"]},
            command="aivmm-tune demo:squeezenet --budget 60s --seed 7",
            seed=7,
            aivmm_version="0.1.0",
            summary=summary(
                [stage],
                "openvino:CPU, 2 threads: 2.71 ms, 1.92x faster than ONNX Runtime's default (5.20 ms) "
                "and 1.06x faster than OpenVINO's default (2.87 ms).",
            ),
            notes=("bf16 was left out: this CPU has no bf16 instructions",),
        ),
        generated_at=EARLIER + timedelta(seconds=63),
        structure=shape,
        environments=(environment(OV), environment(ORT)),
        unavailable=(
            Unavailable(
                target="openvino:GPU", reason="libOpenCL.so.1 is missing", advice="install the Intel compute runtime (intel-opencl-icd)"
            ),
            Unavailable(target="openvino:NPU", reason="no NPU driver is loaded", advice="this CPU has no NPU"),
            Unavailable(
                target="onnxruntime:CUDA",
                reason="no NVIDIA driver (libcuda.so.1 is missing)",
                advice="install the NVIDIA driver 550 or newer",
            ),
        ),
        proofs=(
            proof("openvino:CPU, 2 threads", "plan", OV, 0.00271, config=tuned, cautions=()),
            proof("onnxruntime:CPU default", "baseline", ORT, 0.0052, spread=0.05, cautions=(wide,)),
            proof("openvino:CPU default", "baseline", OV, 0.00287),
            proof("openvino:AUTO", "baseline", "openvino:AUTO", 0.00291, spread=0.03),
            proof("openvino:CPU LATENCY hint, bf16", "baseline", OV, 0.0021, eligible=False, why_not="cosine 0.9984 is below 0.999"),
            proof("openvino:CPU, 2 threads, no hyper-threading", "candidate", OV, 0.00273),
            proof("onnxruntime:CPU, 2 threads, no spinning", "candidate", ORT, 0.0047, spread=0.04, cautions=(busy,)),
        ),
        outcomes=(
            *probes(shape, (OV, ORT)),
            *ceilings(OV),
            *ceilings(ORT),
            *handovers(OV, ORT),
            *handovers(ORT, OV, fixed_s=8e-6),
            Refused(
                key=ProbeKey(
                    kind="model",
                    subject=shape.structure,
                    target=OV,
                    environment=environment(OV).fingerprint,
                    config=Config(precision="bf16"),
                ),
                reason="bf16 is not in OPTIMIZATION_CAPABILITIES of this device: FP32, INT8, BIN, EXPORT_IMPORT",
            ),
            Failed(
                key=ProbeKey(
                    kind="segment",
                    subject=shape.blocks[4].structure,
                    target=ORT,
                    environment=environment(ORT).fingerprint,
                    config=Config.of({"intra_op_num_threads": 64}),
                ),
                reason="the worker died with signal 9 (out of memory?)",
                output="2026-11-03 09:12:40 [E:onnxruntime] bad allocation\nKilled",
            ),
        ),
        trials=trials(),
        plan={"schema": 1, "batch": 1, "callers": 1, "stages": [stage]},
    )


def split_data() -> ReportData:
    """Return a run whose plan has two stages on a GPU and a CPU, in two precisions."""
    data = full_data()
    assert data.structure is not None
    stages = [
        {"target": GPU, "precision": "f16", "config": {"INFERENCE_PRECISION_HINT": "f16"}, "blocks": [0, 16], "replicas": 1},
        {"target": OV, "precision": "fp32", "config": {"INFERENCE_NUM_THREADS": 2}, "blocks": [17, 25], "replicas": 2},
    ]
    plan = replace(data.proofs[0], name="openvino:GPU.0 + openvino:CPU", target=f"{GPU} + {OV}")
    return replace(
        data,
        run=replace(
            data.run,
            summary=summary(stages, "Two stages, openvino:GPU.0 then openvino:CPU: 2.71 ms, 1.92x faster than ONNX Runtime's default."),
        ),
        environments=(environment(GPU), *data.environments),
        outcomes=probes(data.structure, (GPU, OV, ORT)),
        proofs=(plan, *data.proofs[1:]),
        plan={"batch": 1, "stages": stages},
    )


def copies_data() -> ReportData:
    """Return a run for throughput whose plan has its first stage in two replicas on a GPU and in int8 on a CPU beside them."""
    data = full_data()
    assert data.structure is not None
    beside = {"target": ORT, "precision": "int8:made", "config": {"intra_op_num_threads": 1}, "replicas": 1, "share": 0.2}
    stages = [
        {"target": GPU, "precision": "f16", "config": {}, "blocks": [0, 16], "replicas": 2, "share": 0.8, "copies": [beside]},
        {"target": OV, "precision": "fp32", "config": {"INFERENCE_NUM_THREADS": 2}, "blocks": [17, 25], "replicas": 1},
    ]
    plan = replace(data.proofs[0], name="pipelined plan", target=f"{GPU} + {ORT} + {OV}", callers=8)
    tried = [
        {
            "kind": "copies",
            "what": f"{GPU} beside {OV}",
            "promised_per_s": 300.0,
            "to_beat_per_s": 340.0,
            "factors": [{"slowed": GPU, "beside": OV, "factor": 1.84}, {"slowed": OV, "beside": OV, "factor": 2.5}],
        },
        {"kind": "pipeline", "what": "two stages", "promised_per_s": 400.0, "to_beat_per_s": 340.0, "proven_per_s": 369.0, "is_plan": True},
    ]
    return replace(
        data,
        run=replace(
            data.run, objective="throughput", summary={**summary(stages, "Three executables and a fourth behind them."), "at_once": tried}
        ),
        environments=(environment(GPU), *data.environments),
        outcomes=probes(data.structure, (GPU, OV, ORT)),
        proofs=(plan, *data.proofs[1:]),
        plan={"batch": 1, "callers": 8, "execution": {"mode": "pipelined"}, "stages": stages},
    )


def infeasible_data() -> ReportData:
    """Return a run in which no plan meets the constraints: the least a report may get."""
    data = full_data()
    return ReportData(
        run=replace(
            data.run,
            status="infeasible",
            constraints=("latency<1ms",),
            summary={"schema": 1, "plan": None, "verdict": "No plan meets latency<1ms: the fastest eligible candidate takes 2.71 ms."},
            notes=(),
            options={},
        ),
        generated_at=data.generated_at,
    )


def refused_data() -> ReportData:
    """Return a run in which one target refused the whole model and one baseline crashed."""
    data = full_data()
    key = ProbeKey(kind="model", subject=data.structure.structure if data.structure else "", target=OV, environment="", config=Config())
    plan = proof("onnxruntime:CPU default", "plan", ORT, 0.0052)
    crashed = replace(
        data.proofs[2],
        samples=None,
        eligible=False,
        why_not="OpenVINO cannot convert If-16 with subgraphs of different ranks",
        ratio=None,
        verdict=None,
    )
    return replace(
        data,
        run=replace(
            data.run,
            summary=summary(
                [{"target": ORT, "precision": "default", "config": {}, "blocks": [0, 25]}],
                "The baseline won: onnxruntime:CPU with its defaults, 5.20 ms.",
            ),
        ),
        proofs=(plan, crashed),
        outcomes=(
            *probes(data.structure, (ORT,)),
            Refused(key=key, reason="OpenVINO cannot convert If-16 with subgraphs of different ranks"),
        )
        if data.structure
        else (),
        trials=(),
        plan=None,
    )


def hostile_data() -> ReportData:
    """Return a run in which every free text is hostile in its turn."""
    data = full_data()
    assert data.structure is not None
    turn = iter(range(1_000_000))

    def bad() -> str:
        return HOSTILE[next(turn) % len(HOSTILE)]

    evil = Caution(code=bad(), message=bad(), advice=bad())
    operators = tuple(replace(each, op_type=bad(), description=bad(), nodes=(bad(),)) for each in data.structure.operators)
    blocks = tuple(replace(each, op_types={bad(): 2, bad(): 1}) for each in data.structure.blocks)
    model = replace(
        data.run.model,
        name=bad(),
        path=bad(),
        category=Category(name=bad(), reason=bad()),
        notes=HOSTILE,
        inputs=tuple(replace(data.run.model.inputs[0], name=name) for name in HOSTILE),
        outputs=tuple(replace(data.run.model.outputs[0], name=name) for name in HOSTILE),
    )
    config = Config.of({bad(): bad(), "plain": bad()}, precision=bad())
    outcomes: list[Outcome] = [
        Failed(key=each.key, reason=bad(), output=bad()) if index % 9 == 0 else each for index, each in enumerate(data.outcomes)
    ]
    outcomes.append(measured("operator", operators[0].signature, bad(), 1e-4))
    return replace(
        data,
        run=replace(
            data.run,
            model=model,
            objective=bad(),
            constraints=HOSTILE,
            options={name: name for name in HOSTILE},
            command=HOSTILE[1],
            aivmm_version=bad(),
            notes=HOSTILE,
            summary={
                **summary(
                    [
                        {
                            "target": bad(),
                            "precision": bad(),
                            "config": {bad(): bad()},
                            "blocks": [0, 9],
                            "replicas": 10**12,
                            "copies": [{"target": bad(), "precision": bad(), "config": {bad(): bad()}, "share": bad()}, bad()],
                        }
                    ],
                    HOSTILE[0] + HOSTILE[3],
                ),
                "at_once": [
                    {"kind": bad(), "what": bad(), "promised_per_s": bad(), "factors": [{"slowed": bad(), "factor": bad()}, bad()]},
                    bad(),
                ],
            },
        ),
        structure=replace(data.structure, operators=operators, blocks=blocks),
        environments=tuple(
            replace(environment(OV), target=bad(), device_model=bad(), driver=bad(), runtime_version=bad()) for _ in HOSTILE
        ),
        unavailable=tuple(Unavailable(target=name, reason=name, advice=name) for name in HOSTILE),
        proofs=tuple(
            replace(each, name=bad(), target=bad(), config=config, eligible=False, why_not=bad(), cautions=(evil,)) for each in data.proofs
        ),
        outcomes=tuple(outcomes),
        trials=tuple(replace(each, target=bad(), config=config if each.number % 2 else each.config, reason=bad()) for each in data.trials),
        plan=None,
    )


def large_data(blocks: int = 500) -> ReportData:
    """Return a run of a model with thousands of nodes on three targets, and a long search."""
    data = split_data()
    shape = structure(blocks, "large")
    one = shape.operators[0]
    many = tuple(
        replace(one, signature=digest(f"op{index}"), description=f"Conv 3x3 #{index}", nodes=(f"n{index}",)) for index in range(blocks)
    )
    shape = replace(shape, operators=many)
    return replace(data, structure=shape, outcomes=probes(shape, (GPU, OV, ORT)), trials=trials(300))


@pytest.fixture(scope="session")
def full() -> ReportData:
    return full_data()


@pytest.fixture(scope="session")
def split() -> ReportData:
    return split_data()


@pytest.fixture(scope="session")
def copies() -> ReportData:
    return copies_data()


@pytest.fixture(scope="session")
def infeasible() -> ReportData:
    return infeasible_data()


@pytest.fixture(scope="session")
def refused() -> ReportData:
    return refused_data()


@pytest.fixture(scope="session")
def hostile() -> ReportData:
    return hostile_data()


@pytest.fixture(scope="session")
def large() -> ReportData:
    return large_data()


@pytest.fixture(scope="session")
def page() -> Callable[[str], Page]:
    return lru_cache(maxsize=16)(Page)
