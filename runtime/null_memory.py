"""The memory of made-up devices: what copies to, from and within it take, and tensors that stay there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from aivmm.errors import Unsupported, UsageError
from aivmm.runtime.backend import Buffer, CopyRoute, aligned_empty
from aivmm.runtime.null_device import FakeClock, Memory, NullDevice
from aivmm.tensors import TensorSpec


def copy_s(source: NullDevice | None, destination: NullDevice | None, size_bytes: int, *, pinned: bool = False) -> float:
    """Return the seconds that a copy of so many bytes takes; None is the host.

    Between host and device: `copy_s + bytes / copy_bytes_per_s`, page-locked memory being `pinned_speed` times as fast. Within a device:
    each byte is read and written. Between two: at the slower one's `peer_bytes_per_s`, or, where one has none, through page-locked memory.
    """
    if source is not None and destination is not None:
        if source is destination:
            return source.launch_s + 2 * size_bytes / source.bytes_per_s
        if source.peer_bytes_per_s is not None and destination.peer_bytes_per_s is not None:
            return max(source.copy_s, destination.copy_s) + size_bytes / min(source.peer_bytes_per_s, destination.peer_bytes_per_s)
        return copy_s(source, None, size_bytes, pinned=True) + copy_s(None, destination, size_bytes, pinned=True)
    device = source or destination
    assert device is not None
    return device.copy_s + size_bytes / (device.copy_bytes_per_s * (device.pinned_speed if pinned else 1.0))


class NullCopier:
    """Bytes on both ends of a route. `last_s` is what the last copy took, in simulated time."""

    def __init__(
        self, route: CopyRoute, ends: tuple[NullDevice | None, NullDevice | None], size_bytes: int, memory: Memory, clock: FakeClock
    ):
        self._held: list[NullDevice] = []
        self._size, self._memory, self._clock = size_bytes, memory, clock
        self._seconds = copy_s(*ends, size_bytes, pinned=route.pinned)
        try:
            for each in ends:
                if each is not None:
                    memory.take("a copy", size_bytes, each)
                    self._held.append(each)
        except Unsupported:
            self.close()
            raise
        self.source, self.destination = np.ones(size_bytes, np.uint8), np.zeros(size_bytes, np.uint8)
        self.last_s = 0.0

    def run(self) -> None:
        """Copy, and move the clock."""
        self.destination[...] = self.source
        self.last_s = self._seconds
        self._clock.advance(self._seconds)

    def close(self) -> None:
        """Give the memory back."""
        while self._held:
            self._memory.free(self._held.pop(), self._size)


class NullTensor:
    """A tensor in a made-up device's memory. As an array of the host it is refused, as a card's would be."""

    def __init__(self, array: Buffer, memory: str) -> None:
        self.array, self.memory = array, memory

    def shape(self) -> Sequence[int]:
        """Return its extents."""
        return self.array.shape

    def __dlpack__(self, *, stream: Any = None) -> Any:
        raise BufferError(f"it lies in the memory of {self.memory}")

    def __dlpack_device__(self) -> tuple[int, int]:
        return 12, 0  # kDLExtDev: a device that no other library has

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"it lies in the memory of {self.memory}")


def tensor_for(spec: TensorSpec, memory: str) -> NullTensor:
    """Return an uninitialised tensor; raise Unsupported where its shape is open."""
    if not spec.static or spec.dtype == "string":
        raise Unsupported(f"{spec} has no fixed size, so that it has no place of its own in {memory}")
    return NullTensor(aligned_empty(spec), memory)


def callers_tensor(array: Any, spec: TensorSpec, memory: str) -> NullTensor:
    """Return a caller's tensor as it is; raise UsageError where it is not one of `memory`, or of another type or shape than `spec`."""
    if not isinstance(array, NullTensor) or array.memory != memory:
        raise UsageError(f"the input {spec.name!r} does not lie in {memory}, where the plan runs", advice="move it there")
    found = TensorSpec(name=spec.name, dtype=array.array.dtype.name, shape=array.array.shape)
    if (
        found.dtype != spec.dtype
        or len(found.shape) != len(spec.shape)
        or any(want not in (None, have) for want, have in zip(spec.shape, found.shape, strict=True))
    ):
        raise UsageError(f"the input {spec} was given as {found}")
    return array
