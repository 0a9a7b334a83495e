"""ONNX Runtime's providers and options in one place: what may be set, and what can be tuned.

ONNX Runtime accepts unknown keys in silence, so a mistyped one would be measured as if it did something. What is not in these tables is
refused.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import psutil

from aivmm.runtime.config import Knob
from aivmm.runtime.cpu import usable_cores


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """One execution provider: its name in ONNX Runtime, the options it takes, and what to install when it is missing."""

    name: str
    options: frozenset[str] = frozenset()  # none that names a file: a plan comes from a stranger, and some load libraries
    precisions: tuple[str, ...] = ("fp32",)
    indexed: bool = False  # one target per card, with device_id
    advice: str = ""


PROVIDERS = {
    "CPU": Provider(name="CPUExecutionProvider"),
    "CUDA": Provider(
        name="CUDAExecutionProvider",
        indexed=True,
        options=frozenset({
            "arena_extend_strategy", "cudnn_conv1d_pad_to_nc1d", "cudnn_conv_algo_search", "cudnn_conv_use_max_workspace",
            "do_copy_in_default_stream", "enable_cuda_graph", "fuse_conv_bias", "gpu_mem_limit", "prefer_nhwc", "sdpa_kernel",
            "tunable_op_enable", "tunable_op_tuning_enable", "use_ep_level_unified_stream", "use_tf32",
        }),
        advice="install an NVIDIA driver and the CUDA 13 and cuDNN 9 libraries (pip install nvidia-cudnn-cu13 nvidia-cublas)",
    ),
    "TensorRT": Provider(
        name="TensorrtExecutionProvider",
        indexed=True,
        # No caches: without a path of ours they read and write engines in the current folder, on the word of a stranger's plan.
        options=frozenset({
            "trt_fp16_enable", "trt_bf16_enable", "trt_int8_enable", "trt_builder_optimization_level", "trt_cuda_graph_enable",
            "trt_max_workspace_size", "trt_min_subgraph_size", "trt_auxiliary_streams", "trt_sparsity_enable",
            "trt_context_memory_sharing_enable",
        }),
        advice="install TensorRT 10 (pip install tensorrt)",
    ),
    "DirectML": Provider(name="DmlExecutionProvider", indexed=True, options=frozenset({"performance_preference", "device_filter"})),
    "MIGraphX": Provider(
        name="MIGraphXExecutionProvider", indexed=True, options=frozenset({"migraphx_fp16_enable", "migraphx_int8_enable"})
    ),
    "QNN": Provider(name="QNNExecutionProvider", options=frozenset({"backend_type", "htp_performance_mode"})),
    "CoreML": Provider(name="CoreMLExecutionProvider", options=frozenset({"ModelFormat", "MLComputeUnits"})),
}  # fmt: skip

MOST_THREADS = 1024

# Settings of SessionOptions (attributes), and configuration entries by key.
SESSION_SETTINGS = frozenset({
    "enable_cpu_mem_arena", "enable_mem_pattern", "enable_mem_reuse", "execution_mode", "graph_optimization_level",
    "inter_op_num_threads", "intra_op_num_threads",
})  # fmt: skip
SWITCHES = frozenset({
    "session.intra_op.allow_spinning", "session.inter_op.allow_spinning", "session.force_spinning_stop", "session.set_denormal_as_zero",
    "session.disable_prepacking", "session.use_env_allocators", "session.x64quantprecision", "session.qdqisint8allowed",
    "session.enable_gemm_fastmath_arm64_bfloat16",
})  # fmt: skip
COUNTS = frozenset({"session.intra_op.spin_duration_us", "session.intra_op.spin_backoff_max", "session.dynamic_block_base"})
SESSION_ENTRIES = SWITCHES | COUNTS | {"session.intra_op_thread_affinities"}
PROVIDER_PREFIX = "provider."  # "provider.use_tf32" is an option of the target's execution provider
OPTIMIZATION_LEVELS = {
    "disabled": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
EXECUTION_MODES = {"sequential": "ORT_SEQUENTIAL", "parallel": "ORT_PARALLEL"}


def cpu_knobs() -> tuple[Knob, ...]:
    """Return the knobs of the CPU provider: those of the session."""
    cores = usable_cores()
    physical = psutil.cpu_count(logical=False)
    # The library's own default: one thread a physical core, whatever a quota says.
    default = physical if physical and 1 <= physical <= cores and (os.cpu_count() or 0) == cores else None
    return (
        Knob(
            "intra_op_num_threads",
            "int",
            "more threads pay only while each has enough work",
            low=1,
            high=cores,
            log=cores > 8,
            default=default,
        ),
        Knob(
            "graph_optimization_level",
            "choice",
            "a fusion or layout change can cost more than it saves",
            choices=("all", "extended", "basic"),
            default="all",
        ),
        Knob(
            "session.intra_op.allow_spinning",
            "choice",
            "spinning threads answer at once and starve their neighbours",
            choices=("1", "0"),
            default="1",
        ),
        Knob(
            "session.force_spinning_stop",
            "choice",
            "stops spinning when a run ends, so that neighbours get the cores",
            choices=("0", "1"),
            default="0",
        ),
        Knob(
            "execution_mode",
            "choice",
            "branches of the graph can run side by side",
            choices=("sequential", "parallel"),
            default="sequential",
        ),
        Knob(
            "enable_mem_pattern",
            "choice",
            "plans all buffers ahead; off can be faster for tiny graphs",
            choices=(True, False),
            default=True,
        ),
        Knob(
            "session.set_denormal_as_zero",
            "choice",
            "denormal numbers are slow; treating them as zero is checked numerically",
            choices=("0", "1"),
            default="0",
        ),
    )


def cuda_knobs() -> tuple[Knob, ...]:
    """Return the knobs of the CUDA provider."""
    prefix = PROVIDER_PREFIX
    return (
        Knob(prefix + "prefer_nhwc", "choice", "tensor cores like channels last", choices=("0", "1"), default="0"),
        Knob(prefix + "use_tf32", "choice", "TF32 is faster and less exact; checked numerically", choices=("1", "0"), default="1"),
        Knob(
            prefix + "cudnn_conv_algo_search",
            "choice",
            "a thorough search can find faster kernels",
            choices=("EXHAUSTIVE", "HEURISTIC", "DEFAULT"),
            default="EXHAUSTIVE",
        ),
        Knob(prefix + "fuse_conv_bias", "choice", "fuses bias and activation into convolutions", choices=("0", "1"), default="0"),
        Knob(
            "graph_optimization_level",
            "choice",
            "a fusion or layout change can cost more than it saves",
            choices=("all", "extended", "basic"),
            default="all",
        ),
    )
