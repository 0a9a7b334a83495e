"""ONNX Runtime's providers and options in one place: what may be set, and what can be tuned.

ONNX Runtime accepts unknown keys in silence, so a mistyped one would be measured as if it did something. What is not in these tables is
refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from aivmm.errors import Unsupported
from aivmm.runtime.config import Knob, Setting
from aivmm.runtime.cpu import usable_cores
from aivmm.runtime.nvidia import EXTRA_ADVICE, TENSORRT_ADVICE
from aivmm.runtime.target import DeviceKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """One execution provider: its name in ONNX Runtime, the options it takes, and what to install when it is missing."""

    name: str
    options: frozenset[str] = frozenset()  # none that names a file: a plan comes from a stranger, and some load libraries
    precisions: tuple[str, ...] = ("fp32",)
    indexed: bool = False  # one target per card, with device_id
    kind: DeviceKind = "other"
    device: str = ""  # what it runs on, where nothing but the provider itself finds that out
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # options worth a search, each with its values, the default first
    session: Mapping[str, Setting] = field(default_factory=dict)  # settings of the session that it asks for
    one_call: bool = False  # of a session at a time
    advice: str = ""


# By the short name that targets are written with. Options and values are those of onnxruntime.ai's page of each provider, and of
# onnxruntime_c_api.h 1.31. Run by us: CPU and CUDA; TensorRT was only seen to be missing; the rest is written by the documentation.
PROVIDERS = {
    "CPU": Provider(name="CPUExecutionProvider", kind="cpu"),
    "CUDA": Provider(
        name="CUDAExecutionProvider",
        indexed=True,
        kind="gpu",
        options=frozenset({
            "arena_extend_strategy", "cudnn_conv1d_pad_to_nc1d", "cudnn_conv_algo_search", "cudnn_conv_use_max_workspace",
            "do_copy_in_default_stream", "enable_cuda_graph", "fuse_conv_bias", "gpu_mem_limit", "prefer_nhwc", "sdpa_kernel",
            "tunable_op_enable", "tunable_op_tuning_enable", "use_ep_level_unified_stream", "use_tf32",
        }),
        advice=EXTRA_ADVICE,
    ),
    "TensorRT": Provider(
        name="TensorrtExecutionProvider",
        indexed=True,
        kind="gpu",
        # No caches: without a path of ours they read and write engines in the current folder, on the word of a stranger's plan.
        options=frozenset({
            "trt_fp16_enable", "trt_bf16_enable", "trt_int8_enable", "trt_builder_optimization_level", "trt_cuda_graph_enable",
            "trt_max_workspace_size", "trt_min_subgraph_size", "trt_auxiliary_streams", "trt_sparsity_enable",
            "trt_context_memory_sharing_enable",
        }),
        advice=TENSORRT_ADVICE,
    ),
    "NvTensorRtRtx": Provider(
        name="NvTensorRTRTXExecutionProvider",
        indexed=True,
        kind="gpu",
        options=frozenset({"enable_cuda_graph", "nv_max_workspace_size", "nv_max_shared_mem_size", "nv_multi_profile_enable"}),
        choices={"enable_cuda_graph": ("0", "1")},
        advice="pip install onnxruntime-ep-nv-tensorrt-rtx beside a build of ONNX Runtime without CUDA",
    ),
    "MIGraphX": Provider(
        name="MIGraphXExecutionProvider",
        indexed=True,
        kind="gpu",
        device="AMD GPU",
        options=frozenset({
            "migraphx_fp16_enable", "migraphx_bf16_enable", "migraphx_fp8_enable", "migraphx_int8_enable", "migraphx_exhaustive_tune",
            "migraphx_mem_limit", "migraphx_arena_extend_strategy",
        }),
        choices={"migraphx_exhaustive_tune": ("0", "1")},
        advice="install ROCm, whose libraries MIGraphX needs",
    ),
    "DirectML": Provider(
        name="DmlExecutionProvider",
        indexed=True,
        kind="gpu",
        device="DirectX 12 adapter",
        options=frozenset({"performance_preference", "device_filter", "disable_metacommands", "enable_dynamic_graph_fusion"}),
        choices={"performance_preference": ("default", "high_performance", "minimum_power"), "disable_metacommands": ("False", "True")},
        # Its page: without these two a session is refused, and only one thread may call Run of a session.
        session={"enable_mem_pattern": False, "execution_mode": "sequential"},
        one_call=True,
        advice="update the graphics driver: DirectML needs DirectX 12",
    ),
    "QNN": Provider(
        name="QNNExecutionProvider",
        kind="npu",
        device="Qualcomm accelerator",
        options=frozenset({
            "backend_type", "htp_performance_mode", "htp_graph_finalization_optimization_mode", "enable_htp_fp16_precision", "vtcm_mb",
            "qnn_context_priority",
        }),
        choices={
            "htp_performance_mode": ("default", "burst", "balanced", "high_performance", "power_saver"),
            "htp_graph_finalization_optimization_mode": ("0", "1", "2", "3"),
        },
        advice="install the driver of the Qualcomm NPU",
    ),
    "CoreML": Provider(
        name="CoreMLExecutionProvider",
        device="Apple GPU and Neural Engine",
        options=frozenset({
            "ModelFormat", "MLComputeUnits", "RequireStaticInputShapes", "AllowLowPrecisionAccumulationOnGPU", "SpecializationStrategy",
        }),
        choices={
            "ModelFormat": ("NeuralNetwork", "MLProgram"),
            "MLComputeUnits": ("ALL", "CPUAndGPU", "CPUAndNeuralEngine"),
            "SpecializationStrategy": ("Default", "FastPrediction"),
        },
    ),
}  # fmt: skip

NVIDIA = ("CUDA", "TensorRT", "NvTensorRtRtx")  # those that run on the cards that CUDA shows
MOST_THREADS = 1024

# Settings of SessionOptions (attributes), and configuration entries by key.
SESSION_SETTINGS = frozenset({
    "enable_cpu_mem_arena", "enable_mem_pattern", "enable_mem_reuse", "execution_mode", "graph_optimization_level",
    "inter_op_num_threads", "intra_op_num_threads",
})  # fmt: skip
SWITCHES = frozenset({
    "session.intra_op.allow_spinning", "session.inter_op.allow_spinning", "session.force_spinning_stop", "session.set_denormal_as_zero",
    "session.disable_prepacking", "session.disable_quant_qdq", "session.use_env_allocators", "session.x64quantprecision",
    "session.qdqisint8allowed",
    "session.enable_gemm_fastmath_arm64_bfloat16",
})  # fmt: skip
COUNTS = frozenset({"session.intra_op.spin_duration_us", "session.intra_op.spin_backoff_max", "session.dynamic_block_base"})
SESSION_ENTRIES = SWITCHES | COUNTS | {"session.intra_op_thread_affinities"}
PROVIDER_PREFIX = "provider."  # "provider.use_tf32" is an option of the target's execution provider
HOST_MEMORY = "host_memory"  # our own: which memory of the host a card's inputs and outputs are in
HOST_MEMORIES = ("pageable", "pinned")
GRAPHS = ("enable_cuda_graph", "trt_cuda_graph_enable")
OPTIMIZATION_LEVELS = {
    "disabled": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
EXECUTION_MODES = {"sequential": "ORT_SEQUENTIAL", "parallel": "ORT_PARALLEL"}


def cpu_knobs() -> tuple[Knob, ...]:
    """Return the knobs of the CPU provider: those of the session."""
    import psutil  # here: who runs a plan need not wait for it

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


def _host_memory() -> Knob:
    return Knob(
        HOST_MEMORY,
        "choice",
        "a card reads page-locked memory several times as fast, for a copy into it",
        choices=HOST_MEMORIES,
        default="pageable",
        promising="pinned",
    )


def cuda_knobs() -> tuple[Knob, ...]:
    """Return the knobs of the CUDA provider, and where its inputs and outputs are on the host."""
    prefix = PROVIDER_PREFIX
    return (
        _host_memory(),
        Knob(
            prefix + "enable_cuda_graph",
            "choice",
            "launches all kernels at once; refused where a node runs on the CPU",
            choices=("0", "1"),
            default="0",
            promising="1",
            objectives=frozenset({"latency", "energy"}),  # a session's graph runs one call at a time
        ),
        Knob(prefix + "prefer_nhwc", "choice", "tensor cores like channels last", choices=("0", "1"), default="0", promising="1"),
        Knob(prefix + "use_tf32", "choice", "TF32 is faster and less exact; checked numerically", choices=("1", "0"), default="1"),
        Knob(
            prefix + "cudnn_conv_algo_search",
            "choice",
            "a thorough search can find faster kernels",
            choices=("EXHAUSTIVE", "HEURISTIC", "DEFAULT"),
            default="EXHAUSTIVE",
        ),
        Knob(
            prefix + "fuse_conv_bias",
            "choice",
            "fuses bias and activation into convolutions",
            choices=("0", "1"),
            default="0",
            promising="1",
        ),
        Knob(
            "graph_optimization_level",
            "choice",
            "a fusion or layout change can cost more than it saves",
            choices=("all", "extended", "basic"),
            default="all",
        ),
        Knob(
            "session.disable_quant_qdq",
            "choice",
            "without integer kernels: 1 makes weights and biases fp32 once, which is else done in each call, for biases on the CPU",
            choices=("0", "1"),
            default="0",
            promising="1",
            families=frozenset({"int8"}),
        ),
    )


def provider_knobs(kind: str) -> tuple[Knob, ...]:
    """Return the knobs of a provider that we know by its documentation only: the choices of its table."""
    return tuple(
        Knob(PROVIDER_PREFIX + option, "choice", f"{option} of {PROVIDERS[kind].name}", choices=values, default=values[0])
        for option, values in PROVIDERS[kind].choices.items()
    )


def tensorrt_knobs() -> tuple[Knob, ...]:
    """Return the knobs of the TensorRT provider. Its precisions are the model's own: nothing is lowered on the quiet."""
    prefix = PROVIDER_PREFIX
    return (
        _host_memory(),
        Knob(
            prefix + "trt_cuda_graph_enable",
            "choice",
            "launches all kernels at once",
            choices=("0", "1"),
            default="0",
            promising="1",
            objectives=frozenset({"latency", "energy"}),
        ),
        Knob(
            prefix + "trt_builder_optimization_level",
            "int",
            "higher levels try more kernels and build longer",
            low=2,
            high=5,
            default=3,
        ),
        Knob(prefix + "trt_auxiliary_streams", "int", "branches of the graph side by side", low=-1, high=4, default=-1),
    )


def require_entry(name: str, value: Setting) -> None:
    """Raise Unsupported unless the entry takes the value: ONNX Runtime reads what it does not know as off, in silence."""
    text = str(value)
    if (name in SWITCHES and text not in ("0", "1")) or (name in COUNTS and not text.isdigit()):
        raise Unsupported(
            f"{name}={text!r} is not a setting of ONNX Runtime", advice="give 0 or 1" if name in SWITCHES else "give a number"
        )
