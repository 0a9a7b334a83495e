"""The library `onnxruntime`, and what it does once in a process."""

from __future__ import annotations

from functools import cache
from typing import Any

# A model of one Relu on float32[4] (onnx.helper, opset 17, IR 8): what a trial compile compiles.
TRIAL = (
    b'\x08\x08\x12\x00:3\n\x0c\n\x01x\x12\x01y"\x04Relu\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x04'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x04B\x04\n\x00\x10\x11"
)


@cache
def library() -> Any:
    """Return the module, imported when it is first asked for.

    Raises:
        ImportError, OSError: it is not installed, or broken.
    """
    import onnxruntime

    # Errors reach us as exceptions; without this a GPU-less machine prints red lines at each discovery.
    onnxruntime.set_default_logger_severity(4)
    return onnxruntime


@cache
def wake() -> None:
    """Make a first session, of our own model: the CPU's kernels are registered then, in 2 to 6 ms without the interpreter's lock.

    Nothing is optimized, as where a model is taken back from the cache: the optimizers would be registered, too.
    """
    options = library().SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = library().GraphOptimizationLevel.ORT_DISABLE_ALL
    library().InferenceSession(TRIAL, options, providers=["CPUExecutionProvider"], enable_fallback=0)


def was_woken() -> bool:
    """Say whether `wake` was called before. There may have been sessions all the same; then it takes a fifth of a millisecond."""
    return wake.cache_info().currsize > 0
