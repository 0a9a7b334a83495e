"""Where one input of a lane comes in: copied into a buffer that is bound once, or bound where the caller has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from sys import intern
from typing import Any

from numpy import ndarray

from aivmm.errors import UsageError
from aivmm.runtime.backend import Buffer, DeviceTensors, Executable, aligned_empty, host_buffer
from aivmm.runtime.inputs import checked, dtype_of, elsewhere, is_numpy
from aivmm.tensors import TensorSpec

# Up to this size an input is copied into a buffer bound once; beyond it the caller's own array is bound for the call, since a copy of a
# megabyte takes longer than a rebinding. An executable for which binding is dear says so itself (`copy_limit_bytes`).
COPY_LIMIT_BYTES = 32 << 10
# A caller who fills one array again and again is not asked for a copy each time: after so many calls his array is bound itself.
_STEADY = 8


def new_buffer(spec: TensorSpec) -> Buffer | None:
    """Return a buffer for `spec`, or None when only the runtime can allocate it."""
    return aligned_empty(spec) if spec.static and is_numpy(spec.dtype) else None


def wanted_buffer(spec: TensorSpec, executables: Sequence[Executable]) -> Buffer | None:
    """Return a buffer of the kind that the first of the executables which wants any wants, of any kind where none does.

    None when only the runtime can allocate it.
    """
    for each in executables:
        buffer = host_buffer(each, spec)
        if buffer is not None:
            return buffer
    return new_buffer(spec)


class Feed:
    """Where one input comes in. `bound` is what the stages read now: the lane's own buffer, or an array of a caller's."""

    __slots__ = ("_copies", "_dtype", "_known", "_own", "_seen", "_shape", "_spec", "_times", "_users", "bound", "copied_bytes", "name")

    def __init__(self, spec: TensorSpec, known: Mapping[str, TensorSpec], users: Sequence[tuple[Any, Executable]]) -> None:
        """Bind a buffer where one is copied into: for a small input of a size that is known."""
        self.name = intern(spec.name)  # as names in callers' code are
        self.bound: Any = self  # at first nothing that a caller could bring
        self._spec, self._known, self._users = spec, known, users  # the requests that read it, with their executables
        self._dtype, self._shape = dtype_of(spec), spec.shape  # without a type only `checked` can compare
        size = spec.nbytes
        limit = max((getattr(executable, "copy_limit_bytes", COPY_LIMIT_BYTES) for _, executable in users), default=COPY_LIMIT_BYTES)
        self._copies = size is not None and size <= limit
        self.copied_bytes = (size or 0) if self._copies else 0  # the size of an input that is copied in, as each new small one is; else 0
        self._own: Buffer | None = None
        self._seen: Any = None  # the array that was copied last, and how often in a row
        self._times = 0
        if self._copies:
            own = self.own()
            assert own is not None
            self._bind(own)

    def own(self) -> Buffer | None:
        """Return the lane's own buffer for the input; None when its size is not known before the call."""
        if self._own is None:
            self._own = self.new()
        return self._own

    def new(self) -> Buffer | None:
        """Return another buffer for the input, in the memory that its stages read fastest; None as `own`."""
        return wanted_buffer(self._spec, [executable for _, executable in self._users])

    def take(self, array: Any) -> None:
        """Copy a small array, bind a large one where it is.

        Raises:
            UsageError: it is missing, or of another type or shape.
        """
        if not (type(array) is ndarray and array.dtype is self._dtype and array.shape == self._shape):
            if elsewhere(array):
                self._read_there(array)
                return
            array = checked(array, self._spec, self._known)
        own = self._own
        if self._copies and array is not own:
            self._times = self._times + 1 if array is self._seen else 0
            self._seen = array
            if self._times < _STEADY or not array.flags.carray:
                if self.bound is not own:
                    self._bind(own)
                own[...] = array  # type: ignore[index]
                return
        # `carray`: C-contiguous, aligned and writeable, which is what the runtimes share.
        self._bind(array if array.flags.carray else checked(array, self._spec, self._known))

    def copy(self, array: Any) -> None:
        """Take a copy, of a large array too: its owner may change it as soon as this returns.

        Raises:
            UsageError: as `take`.
        """
        if not (type(array) is ndarray and array.dtype is self._dtype and array.shape == self._shape):
            if elsewhere(array):
                raise UsageError(
                    f"the input {self.name!r} lies on a device, and is to be copied on the host", advice="use run or run_on_device"
                )
            array = checked(array, self._spec, self._known)
        own = self.own()
        if own is None:
            self._bind(array.copy())
            return
        own[...] = array
        if self.bound is not own:
            self._bind(own)

    def _bind(self, array: Any) -> None:
        self.bound = self  # nothing, should one of several stages refuse it
        for request, _ in self._users:
            request.bind(self.name, array)
        self.bound = array

    def _read_there(self, array: Any) -> None:
        """Have an input that lies on the stages' own device read where it is.

        Raises:
            UsageError: it lies on a device that is not the stages', or is not the input it should be.
        """
        self.bound = self  # the same tensor may hold something else next time, and its writer has to be waited for
        for request, executable in self._users:
            if not isinstance(executable, DeviceTensors):
                raise UsageError(f"the input {self.name!r} lies on a device, and is read on the host", advice="give an array of the host")
            request.bind_device(self.name, executable.from_dlpack(array, self._spec))
