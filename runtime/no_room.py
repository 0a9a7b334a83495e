"""Whether words of a runtime mean that memory was not enough."""

from __future__ import annotations

# What the runtimes say when a device's memory is used up. The first two are ONNX Runtime's, as seen on an H100; others are drivers' names.
_NO_ROOM = (
    "failed to allocate memory for requested buffer", "is smaller than requested bytes", "out of memory", "out_of_memory", "alloc_failed",
    "device_allocation_failed", "cl_out_of_resources", "cl_mem_object_allocation_failure", "out of gpu resources",
    "exceeds max size of memory object allocation", "exceed max size of memory", "out_of_device_memory",
)  # fmt: skip


def is_no_room(words: str) -> bool:
    """Say whether a runtime's refusal means that memory was not enough: then more of the same is refused too, and less may not be."""
    lowered = words.lower()
    return any(each in lowered for each in _NO_ROOM) or (" needs " in lowered and " bytes, " in lowered and " has " in lowered)
