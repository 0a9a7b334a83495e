"""Models on made-up devices whose tensors can stay there between stages, as on a card: only what crosses is copied."""

from __future__ import annotations

from typing import Any

from aivmm.runtime.backend import Buffer, DeviceTensor
from aivmm.runtime.null import NullExecutable, NullRequest
from aivmm.runtime.null_memory import NullTensor, callers_tensor, tensor_for
from aivmm.tensors import TensorSpec


class NullCardExecutable(NullExecutable):
    """An executable with `DeviceTensors` (`NullDevice.keeps_tensors`)."""

    @property
    def memory(self) -> str:
        """The memory's name: executables on one device share tensors."""
        return f"null:{self.placement.devices[0]}"

    def new_request(self) -> NullCardRequest:
        """Make another request."""
        self._require_open()
        request = NullCardRequest(self)
        self._requests.add(request)
        return request

    def device_tensor(self, spec: TensorSpec) -> DeviceTensor:
        """Return an uninitialised tensor of static shape."""
        return tensor_for(spec, self.memory)

    def from_dlpack(self, array: Any, spec: TensorSpec) -> DeviceTensor:
        """Return a caller's tensor."""
        return callers_tensor(array, spec, self.memory)


class NullCardRequest(NullRequest):
    """A request whose inputs and outputs may be on the device already."""

    def bind(self, name: str, buffer: Buffer) -> None:
        """Bind an array of the host; it crosses at each run."""
        super().bind(name, buffer)
        self._resident.discard(name)

    def bind_device(self, name: str, tensor: DeviceTensor) -> None:
        """Bind a tensor where it is; nothing crosses."""
        assert isinstance(tensor, NullTensor)
        super().bind(name, tensor.array)
        self._resident.add(name)
