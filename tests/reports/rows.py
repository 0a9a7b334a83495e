"""The rows that reports are made of, one kind at a time: structures, environments, probes, ceilings, hand-overs, proofs."""

from __future__ import annotations

import hashlib
import random
from datetime import UTC, datetime
from typing import Any

from aivmm.models.ceilings import matmul_flops
from aivmm.models.records import Block, CutPoint, Operator, Structure
from aivmm.planner.records import ProofRecord, Verdict
from aivmm.probes.ceilings import CALL, COPY_BYTES, MATMUL_SIZES
from aivmm.probes.records import Measured, Outcome, ProbeKey, ProbeKind, Samples, Transfer, TransferPoint
from aivmm.runtime.config import Config
from aivmm.runtime.environment import Environment
from aivmm.tensors import TensorSpec

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


def ceilings(target: str) -> tuple[Outcome, ...]:
    """Return what a target was seen to do at best: 6 µs a call, 600 GFLOP/s, 40 GB/s in its caches and 11 GB/s beyond."""
    times = {CALL: 6e-6}
    times |= {f"ceiling:copy:{size}": 6e-6 + size / (40e9 if size < 1 << 21 else 11e9) for size in COPY_BYTES}
    times |= {f"ceiling:matmul:{size}": 6e-6 + matmul_flops(size) * SPEED[target] / 6e11 for size in MATMUL_SIZES[:3]}
    return tuple(measured("operator", subject, target, time) for subject, time in times.items())


def handovers(source: str, destination: str, fixed_s: float = 5e-6, per_byte_s: float = 4e-11) -> tuple[Outcome, ...]:
    """Return the probes of one ordered pair, as the database gives them."""
    sizes = tuple(1 << power for power in range(8, 27, 3))
    made = Transfer(
        source=source,
        source_environment=environment(source).fingerprint,
        destination=destination,
        destination_environment=environment(destination).fingerprint,
        points=tuple(
            TransferPoint(
                size_bytes=size,
                samples=race_samples(60e-6 + fixed_s + size * per_byte_s, rounds=5, each=8),
                source_s=30e-6,
                destination_s=30e-6,
                cost_s=fixed_s + size * per_byte_s,
            )
            for size in sizes
        ),
    )
    return tuple(
        Measured(
            key=made.key(point.size_bytes),
            samples=point.samples,
            metrics={"cost_s": point.cost_s, "source_s": point.source_s, "destination_s": point.destination_s},
        )
        for point in made.points
    )


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
        "predicted_ratio": 1.04 * median / 0.0052 if name != "onnxruntime:CPU default" else 1.0,
        "predicted_sigma": 0.03,
        "predicted_measured": 1.0,
    }
    given: dict[str, Any] = {"config": Config(), "batch": 1, "callers": 1, "eligible": True, "metrics": metrics} | others | more
    return ProofRecord(name=name, role=role, target=target, samples=race_samples(median, spread=spread), **given)
