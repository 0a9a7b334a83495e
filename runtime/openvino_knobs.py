"""What can be tuned on OpenVINO's devices: each knob with its range, its default and why it may matter."""

from __future__ import annotations

from aivmm.runtime.config import Knob
from aivmm.runtime.cpu import usable_cores


def cpu_knobs() -> tuple[Knob, ...]:
    """Return those of the CPU, for the cores that we may use."""
    cores = usable_cores()
    serving = frozenset({"throughput", "energy"})
    return (
        Knob(
            "INFERENCE_NUM_THREADS",
            "int",
            "more threads pay only while each has enough work",
            low=1,
            high=cores,
            log=cores > 8,
            default=cores,
        ),
        Knob("NUM_STREAMS", "int", "streams run requests side by side", low=1, high=cores, log=cores > 8, default=1, objectives=serving),
        Knob(
            "ENABLE_CPU_PINNING",
            "choice",
            "pinned threads keep their caches; a shared machine wants them free",
            choices=(True, False),
            default=True,
        ),
        Knob("ENABLE_HYPER_THREADING", "choice", "two threads on one core share its vector units", choices=(True, False), default=True),
        Knob("TBB_PARTITIONER", "choice", "how work is divided between threads", choices=("AUTO", "STATIC"), default="STATIC"),
        Knob(
            "CPU_DENORMALS_OPTIMIZATION",
            "choice",
            "denormal numbers are slow; treating them as zero is checked numerically",
            choices=(False, True),
            default=False,
        ),
    )


def gpu_knobs(streams: int) -> tuple[Knob, ...]:
    """Return those of a GPU that takes up to `streams` streams."""
    serving = frozenset({"throughput", "energy"})
    return (
        Knob("NUM_STREAMS", "int", "streams overlap copies with compute", low=1, high=streams, default=1, objectives=serving),
        Knob("GPU_QUEUE_THROTTLE", "choice", "how eagerly the host polls the queue", choices=("LOW", "MEDIUM", "HIGH"), default="MEDIUM"),
        Knob(
            "GPU_HOST_TASK_PRIORITY",
            "choice",
            "priority of the host threads that feed the device",
            choices=("LOW", "MEDIUM", "HIGH"),
            default="MEDIUM",
        ),
    )


def npu_knobs() -> tuple[Knob, ...]:
    """Return those of an NPU."""
    return (
        Knob("NPU_TURBO", "choice", "raises the clock where the platform allows it", choices=(False, True), default=False),
        Knob(
            "NPU_COMPILATION_MODE_PARAMS",
            "choice",
            "how hard the compiler optimises",
            choices=("", "optimization-level=2 performance-hint-override=latency"),
            default="",
        ),
    )
