"""The null backend's devices with memory of their own: what callers leave there is tested without a card."""

from __future__ import annotations

from typing import Any

import pytest

from aivmm.runtime.backend import aligned_empty
from aivmm.runtime.null import NullExecutable, NullRequest
from aivmm.tensors import TensorSpec


class There:
    """A tensor in a device's memory, which as an array of the host is refused as torch refuses it."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def shape(self) -> Any:
        return self.array.shape

    def __dlpack__(self, *, stream: Any = None) -> Any:
        raise BufferError("it lies on a device")

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert a tensor on a device to numpy")


def give_memory(patch: pytest.MonkeyPatch) -> None:
    """Let null executables take and make tensors in a memory that is theirs."""

    def device_tensor(_: NullExecutable, spec: TensorSpec) -> There:
        return There(aligned_empty(spec))

    def from_dlpack(_: NullExecutable, tensor: There, spec: TensorSpec) -> There:
        assert tensor.shape() == spec.shape
        return tensor

    def bind_device(request: NullRequest, name: str, tensor: There) -> None:
        request.bind(name, tensor.array)

    patch.setattr(NullExecutable, "memory", "null:0", raising=False)
    patch.setattr(NullExecutable, "device_tensor", device_tensor, raising=False)
    patch.setattr(NullExecutable, "from_dlpack", from_dlpack, raising=False)
    patch.setattr(NullRequest, "bind_device", bind_device, raising=False)
