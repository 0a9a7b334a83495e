"""Realistic rows for reports: a complete run, one without a plan, one with refused targets, hostile names, and a big model.

Times are drawn from a seeded generator once; nothing here measures.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

import pytest

from aivmm.models.records import Block, Category, CutPoint, ModelFacts, Operator, Structure
from aivmm.planner.records import ProofRecord, RunRecord, TrialRecord, Verdict
from aivmm.probes.records import Caution, Failed, Measured, Outcome, ProbeKey, ProbeKind, Refused, Samples
from aivmm.reports.data import ReportData
from aivmm.runtime.config import Config, Setting
from aivmm.runtime.environment import Environment
from aivmm.runtime.target import Unavailable
from aivmm.tensors import TensorSpec
from tests.reports.html_page import Page

OV, ORT, GPU = "openvino:CPU", "onnxruntime:CPU", "openvino:GPU.0"
SPEED = {OV: 1.0, ORT: 1.7, GPU: 0.62}
HOSTILE = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(2)'>",
    "$x^2$ and $\\frac{1}{0}$",
    "\u202egnp.exe\u202c",
    "שלום עולם",
    "🙂 model 🚀",
    "]]> --> {{ 7 * 7 }} {% raw %}",
    "nul\x00 bell\x07 lone\udc80",
    "x" * 10_000,
)
EARLIER = datetime(2026, 11, 3, 9, 12, tzinfo=UTC)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def tensor(name: str, *shape: int) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=shape)


def race_samples(median: float, *, spread: float = 0.02, rounds: int = 24, each: int = 22, seed: int = 0) -> Samples:
    """Return samples with a tail to the right, as latencies have."""
    chance = random.Random(f"{median}{seed}")
    timed = [
        median * (1 + spread * chance.gauss(0, 1) + (chance.expovariate(9) if chance.random() < 0.06 else 0)) for _ in range(rounds * each)
    ]
    return Samples(timed_s=tuple(max(value, median / 3) for value in timed), rounds=tuple(index // each for index in range(rounds * each)))


def fire(index: int) -> tuple[dict[str, int], float]:
    return {"Conv": 3, "Relu": 3, "Concat": 1}, 40e6 + 22e6 * (index % 5)


def structure(blocks: int = 26, name: str = "squeezenet") -> Structure:
    """Return a chain of blocks like SqueezeNet's, each with a cut before it."""
    made, cuts, position = [], [], 0
    for index in range(blocks):
        types, flops = fire(index) if index % 3 else ({"MaxPool": 1, "Conv": 1, "Relu": 1}, 180e6 / (1 + index % 7))
        nodes = sum(types.values())
        side = max(7, 112 >> (index * 5 // max(1, blocks)))
        edge = tensor(f"{name}/block{index}/out", 1, 64 + 16 * (index % 9), side, side)
        if index:
            cuts.append(CutPoint(position=position, tensors=(made[-1].outputs[0],), bytes=made[-1].outputs[0].nbytes))
        made.append(
            Block(
                index=index,
                first=position,
                last=position + nodes - 1,
                structure=digest(f"{name}-s{index}"),
                content=digest(f"{name}-c{index}"),
                inputs=(made[-1].outputs[0] if made else tensor("data", 1, 3, 224, 224),),
                outputs=(edge,),
                op_types=types,
                flops=flops,
                weight_bytes=48_000 * (1 + index % 6),
            )
        )
        position += nodes
    shapes = [(3, 64, 56), (3, 128, 28), (1, 64, 56), (1, 256, 14), (3, 256, 14), (1, 512, 14), (7, 3, 224)]
    operators = [
        Operator(
            signature=digest(f"{name}-op{index}"),
            op_type=kind,
            domain="",
            description=f"{kind} {k}x{k}: 1x{c}x{s}x{s} -> 1x{c}x{s}x{s}" if kind == "Conv" else f"{kind}: 1x{c}x{s}x{s}",
            count=1 + index % 4,
            nodes=tuple(f"{name}/{kind.lower()}_{index}_{n}" for n in range(1 + index % 4)),
            flops=2.0 * k * k * c * c * s * s if kind == "Conv" else float(c * s * s),
            bytes=8 * c * s * s + (4 * k * k * c * c if kind == "Conv" else 0),
        )
        for index, (kind, (k, c, s)) in enumerate((kind, shape) for shape in shapes for kind in ("Conv", "Relu", "Concat", "MaxPool"))
    ]
    return Structure(
        structure=digest(f"{name}-structure"),
        content=digest(f"{name}-content"),
        node_count=position,
        flops=sum(block.flops or 0 for block in made),
        weight_bytes=sum(block.weight_bytes for block in made),
        operators=tuple(operators),
        cut_points=tuple(cuts),
        blocks=tuple(made),
    )


def environment(target: str) -> Environment:
    gpu = "GPU" in target
    return Environment(
        target=target,
        device_model="Intel(R) Arc(TM) A380 Graphics (dGPU)" if gpu else "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz",
        driver="24.35.30872" if gpu else "",
        runtime_version="1.31.0" if target.startswith("onnxruntime") else "2026.4.1",
        instruction_sets=() if gpu else ("avx2", "avx512f", "avx512_vnni"),
        usable_cores=None if gpu else 2,
        power_limit_w=75.0 if gpu else None,
        system="Linux-x86_64",
    )


def measured(kind: ProbeKind, subject: str, target: str, median: float, config: Config | None = None) -> Measured:
    key = ProbeKey(kind=kind, subject=subject, target=target, environment=environment(target).fingerprint, config=config or Config())
    return Measured(key=key, samples=race_samples(median, rounds=8, each=5))


def probes(shape: Structure, targets: tuple[str, ...]) -> tuple[Outcome, ...]:
    found: list[Outcome] = []
    for target in targets:
        chance = random.Random(target)
        found.append(measured("model", shape.structure, target, (shape.flops or 1e9) / 7e11 * SPEED[target]))
        for block in shape.blocks:
            found.append(
                measured("segment", block.structure, target, (block.flops or 1e6) / 6e11 * SPEED[target] * chance.uniform(0.6, 1.5) + 4e-6)
            )
        for operator in shape.operators:
            time = (operator.flops or 1e6) / 5e11 * SPEED[target] * chance.uniform(0.5, 1.9) + 3e-6
            found.append(measured("operator", operator.signature, target, time))
    return tuple(found)


def proof(name: str, role: Any, target: str, median: float, *, plan: float = 0.00271, spread: float = 0.02, **more: Any) -> ProofRecord:
    ratio = median / plan
    low, high = ratio * 0.982, ratio * 1.017
    verdict: Verdict = "faster" if low > 1 else "slower" if high < 1 else "same"
    others: dict[str, Any] = {} if role == "plan" else {"ratio": ratio, "ratio_low": low, "ratio_high": high, "verdict": verdict}
    metrics = {
        "peak_memory_bytes": 148e6 * ratio,
        "compile_s": 0.41,
        "first_inference_s": 0.0068,
        "cosine": 0.9999987,
        "throughput_per_s": 1 / median,
    }
    given: dict[str, Any] = {"config": Config(), "batch": 1, "callers": 1, "eligible": True, "metrics": metrics} | others | more
    return ProofRecord(name=name, role=role, target=target, samples=race_samples(median, spread=spread), **given)


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
        "predicted": {"median_s": 0.00264},
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
                **summary([{"target": bad(), "precision": bad(), "config": {bad(): bad()}, "blocks": [0, 9]}], HOSTILE[0] + HOSTILE[3])
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
