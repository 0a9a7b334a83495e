"""The seam: what a runtime offers to the rest of aivmm.

Small on purpose: each method added breaks every plug-in. An ability that not all have is a protocol of its own
(`ExportsBlob`), asked for with `isinstance`. A plug-in needs to import nothing from us but these names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from ctypes import addressof, c_char
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeGuard, runtime_checkable

import numpy as np
import numpy.typing as npt

from aivmm.errors import Unsupported
from aivmm.runtime.config import Config, Knob, Setting
from aivmm.runtime.target import Target, Unavailable
from aivmm.tensors import TensorSpec

Buffer = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where the runtime itself says that the nodes run.

    `devices` are the runtime's names of the devices that execute; `nodes` counts nodes by device where the runtime tells, after fusion.
    """

    devices: tuple[str, ...]
    nodes: Mapping[str, int] = field(default_factory=dict)
    stray: tuple[str, ...] = ()  # nodes left on another device than the one asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """What a user would run without us. A target such as `openvino:AUTO` may exist only as a baseline."""

    name: str  # "onnxruntime:CPU default", "openvino:CPU LATENCY hint", "openvino:AUTO"
    target: Target
    config: Config
    callers: int = 1  # calls that such a user keeps in flight


class Request(Protocol):
    """One slot of an executable that can run: its bound buffers. Not thread-safe; use one per thread."""

    def bind(self, name: str, buffer: Buffer) -> None:
        """Bind a C-contiguous array of the tensor's type and shape to an input or output; it is read or written in place by each run.

        An output whose shape is not known before the run cannot be bound, nor can strings as outputs: read those with `output`.

        Raises:
            Unsupported: the array cannot be shared (not C-contiguous, or read-only), or is of a kind that the runtime does not take.
        """

    def run(self) -> None:
        """Run once. Return when the device is idle and the outputs are written.

        Raises:
            Unsupported: the runtime cannot run the model on what is bound, in its own words.
        """

    def output(self, name: str) -> Buffer:
        """Return an output of the last run: the bound buffer itself, or the runtime's array, which the next run may overwrite.

        Raises:
            Unsupported: it is of a type that NumPy cannot hold.
        """


@runtime_checkable
class CallsDirectly(Protocol):
    """A request whose run is one call of the runtime's own, which the engine then makes itself: a function in Python less for each run."""

    def direct(self) -> tuple[Callable[[], object], Callable[[BaseException], Exception | None]] | None:
        """Return what runs once, and what tells why it failed: the error that `run` would have raised, None where it would have let it be.

        None where a run is more than a call. Asked for once all is bound; binding other arrays changes nothing in it.
        """


class ForgetsInputs(Protocol):
    """A request that keeps the arrays of its inputs alive, and can be told that they are not read any more."""

    def forget_inputs(self) -> None:
        """Let go of the arrays of all inputs. No run comes before others were bound in their place."""


class Executable(Protocol):
    """A model compiled for one target with one config."""

    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    effective_config: Mapping[str, Setting]  # read back from the runtime, not echoed
    placement: Placement

    def new_request(self) -> Request:
        """Make another request; several may be in flight at once."""

    def close(self) -> None:
        """Free what the runtime holds. Requests made from it are invalid afterwards."""


@runtime_checkable
class Backend(Protocol):
    """What a runtime offers."""

    name: ClassVar[str]

    def targets(self) -> Sequence[Target | Unavailable]:
        """List what runs here, proved by a trial, and what a user could expect and why it is absent. Same answer when asked twice."""

    def knobs(self, target: Target) -> Sequence[Knob]:
        """List what can be tuned on `target`."""

    def baselines(self, targets: Sequence[Target], objective: str) -> Sequence[Baseline]:
        """List what a user would run on `targets` without us, for an objective ("latency", "throughput", "energy")."""

    def compile(self, model: Path | bytes, target: Target, config: Config) -> Executable:
        """Compile `model` for `target`.

        Raises:
            Unsupported: the runtime refuses the model, a setting or the precision, in its own words, or would run it elsewhere.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Stray:
    """A node that ran on another device than the one asked for, or a copy that this made needed; seconds of one call."""

    node: str
    op_type: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Strays:
    """All of a compiled model's strays and the copies between them and the device, beside what the call took in which they were seen."""

    nodes: tuple[Stray, ...]
    copies: tuple[Stray, ...]
    call_s: float  # with the profiler on, which slows it down: a share of it is worth more than it alone

    @property
    def seconds(self) -> float:
        """What nodes and copies took of one call."""
        return sum(each.seconds for each in (*self.nodes, *self.copies))


@runtime_checkable
class CountsMemory(Protocol):
    """A backend that tells what this process holds of a target's own memory. NVIDIA's cards are asked themselves, whatever the backend."""

    def memory_in_use(self, target: Target) -> int:
        """Return the bytes that open executables hold.

        Raises:
            Unsupported: the device does not tell.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyRoute:
    """A way that bytes take from one memory to another, outside any model. None is the host's memory, on one end at most."""

    source: Target | None
    destination: Target | None
    pinned: bool = False  # the host's end is page-locked

    @property
    def ends(self) -> tuple[str, str]:
        """The names of both ends, as they are stored and shown: `host pinned`, `onnxruntime:CUDA:0 memory`."""
        host = "host pinned" if self.pinned else "host pageable"
        source, destination = (host if each is None else f"{each} memory" for each in (self.source, self.destination))
        return source, destination


def routes_of(cards: Sequence[Target]) -> tuple[CopyRoute, ...]:
    """Return the ways between the host and each of `cards`, within each, and from each to each other."""
    host = [(None, card, pinned) for card in cards for pinned in (False, True)]
    ends = [*host, *((card, None, pinned) for _, card, pinned in host), *((one, other, False) for one in cards for other in cards)]
    return tuple(CopyRoute(source=source, destination=destination, pinned=pinned) for source, destination, pinned in ends)


class Copier(Protocol):
    """Memory on both ends of a route, allocated once."""

    def run(self) -> None:
        """Copy all of it, and return when it has arrived.

        Raises:
            Unsupported: a device has failed, in the runtime's words.
        """

    def close(self) -> None:
        """Free the memory. Closing twice is closing once."""


@runtime_checkable
class CopiesMemory(Protocol):
    """A backend that can copy between the host and its devices' own memory, and within and between devices, so that this is measured."""

    def routes(self, targets: Sequence[Target]) -> Sequence[CopyRoute]:
        """List the routes that begin or end on one of `targets`; none for targets that compute in the host's memory."""

    def copier(self, route: CopyRoute, size_bytes: int) -> Copier:
        """Allocate `size_bytes` on both ends.

        Raises:
            Unsupported: there is no such memory, or not so much of it, in the runtime's words.
        """


@runtime_checkable
class ExplainsStrays(Protocol):
    """A backend that tells what the nodes cost which it leaves on another device."""

    def strays(self, model: Path, target: Target, config: Config, inputs: Mapping[str, Buffer]) -> Strays:
        """Compile, run some calls on `inputs`, and return what strays cost; nothing is in it where every node is on the device.

        Raises:
            Unsupported: as `Backend.compile`.
        """


@runtime_checkable
class ExportsBlob(Protocol):
    """An executable that can be stored compiled. Separate from `Executable`: half of the runtimes cannot."""

    def export_blob(self) -> bytes:
        """Return the compiled form.

        Raises:
            Unsupported: with the runtime's own words.
        """


@runtime_checkable
class ImportsBlob(Protocol):
    """A backend that takes back what its executables export. Only what this user's own process exported is ever handed to it."""

    def keeps_blobs(self, target: Target) -> bool:
        """Say whether models compiled for `target` can be exported and taken back."""

    def compile_to_export(self, model: Path, target: Target, config: Config) -> Executable:
        """Compile as `Backend.compile` does, for an executable that will be asked for its blob once, soon.

        Raises:
            Unsupported: as `Backend.compile`, or it cannot be exported.
        """

    def weights_in(self, blob: bytes) -> tuple[int, int]:
        """Return from where to where an import reads nothing but weights in what was exported, (0, 0) where that is not known.

        What is damaged there makes wrong numbers and nothing worse, so that it may be found out beside the import.
        """

    def look_ahead(self, model: Path) -> None:
        """Do of an import what needs no runtime: called on another thread while the runtime is at it, or not at all. Raises nothing."""

    def import_blob(self, blob: Buffer, model: Path, target: Target, config: Config) -> Executable:
        """Return the executable that `model` was compiled to. `blob` is bytes, which stay as they are for as long as it is referred to.

        Raises:
            Unsupported: the runtime refuses it, in its own words.
        """


@runtime_checkable
class HostBuffers(Protocol):
    """An executable for whose requests some kind of host memory is better than any other: page-locked memory, for a card."""

    def host_buffer(self, spec: TensorSpec) -> Buffer | None:
        """Return an uninitialised C-contiguous array for an input or output of static shape; None where any memory is as good.

        Raises:
            Unsupported: there is no such memory left, in the runtime's words.
        """


class DeviceTensor(Protocol):
    """A tensor in a device's own memory, in the runtime's own terms; other libraries take it through DLPack."""

    def shape(self) -> Sequence[int]:
        """Return its extents."""

    def __dlpack__(self, *, stream: Any = None) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...


@runtime_checkable
class DeviceTensors(Protocol):
    """An executable whose inputs and outputs can stay in its device's memory, between stages and for callers who have tensors there.

    `memory` names that memory ("cuda:0"): two executables of one backend with the same one can share a tensor. Their requests have
    `bind_device`, which takes the place of `bind`.
    """

    memory: str

    def device_tensor(self, spec: TensorSpec) -> DeviceTensor:
        """Return an uninitialised tensor of static shape.

        Raises:
            Unsupported: there is no memory left, or no such type, in the runtime's words.
        """

    def from_dlpack(self, array: Any, spec: TensorSpec) -> DeviceTensor:
        """Return a caller's tensor without a copy, once all that was to be written to it is written.

        Raises:
            UsageError: it lies on another device, or has another type or shape than `spec`, or gaps.
        """


class DeviceRequest(Request, Protocol):
    """A request of an executable with `DeviceTensors`."""

    def bind_device(self, name: str, tensor: DeviceTensor) -> None:
        """Read an input or write an output where it is; as `bind`, and in its place."""


def on_device(executable: object) -> TypeGuard[DeviceTensors]:
    """Say whether an executable has `DeviceTensors`. By one of its methods, as below."""
    return hasattr(executable, DeviceTensors.device_tensor.__name__)


def host_buffer(executable: Executable, spec: TensorSpec) -> Buffer | None:
    """Return the buffer that an executable wants for a tensor, None where it wants none in particular."""
    lend: Callable[[TensorSpec], Buffer | None] | None = getattr(executable, HostBuffers.host_buffer.__name__, None)
    return lend(spec) if lend is not None and spec.static else None  # no `isinstance`, which takes 30 µs when it is first asked


def aligned_empty(spec: TensorSpec, *, alignment: int = 4096) -> Buffer:
    """Return an uninitialised C-contiguous array for `spec` that starts at a multiple of `alignment` bytes and is padded to 64.

    Both runtimes share such an array without a copy, and so do GPU drivers that wrap host memory.

    Raises:
        ValueError: the shape is not static, or elements have no fixed size.
    """
    shape = tuple(extent for extent in spec.shape if extent is not None)
    if len(shape) != len(spec.shape) or spec.dtype == "string":
        raise ValueError(f"{spec} has no fixed size")
    dtype = np.dtype(spec.dtype)
    size = math.prod(shape) * dtype.itemsize
    return np.ndarray(shape, dtype, aligned_bytes(size, alignment=alignment))


def aligned_bytes(size: int, *, alignment: int = 4096) -> Buffer:
    """Return `size` uninitialised bytes that start at a multiple of `alignment` and are padded to 64."""
    padded = max(64, (size + 63) // 64 * 64)
    raw = np.empty(padded + alignment, dtype=np.uint8)
    start = -addressof(c_char.from_buffer(raw.data)) % alignment  # what NumPy takes ten times as long to say
    return raw[start : start + size]


# Types that NumPy knows only once `ml_dtypes` is imported. Of the packed ones several elements share a byte in both runtimes, and none in
# `ml_dtypes`, so no memory can be shared.
_PACKED = frozenset({"int4", "uint4", "int2", "uint2", "float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn"})
_FOREIGN = _PACKED | {"bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"}


def is_foreign(dtype: str) -> bool:
    """Say whether NumPy itself lacks the type: bfloat16, float8 and the like."""
    return dtype in _FOREIGN


def holds_foreign(buffer: Buffer) -> bool:
    """Say whether an array is of a foreign type. By a flag of its type: rebinding is part of each call, and names take a microsecond."""
    return buffer.dtype.isbuiltin == 2  # registered with NumPy by a library


def raw_view(buffer: Buffer, name: str) -> Buffer:
    """Return the memory of an array of a foreign type as unsigned integers, which the runtimes' own type numbers then give a meaning.

    Raises:
        Unsupported: its elements are smaller than a byte.
    """
    if buffer.dtype.name in _PACKED:
        raise Unsupported(f"{name!r} is {buffer.dtype.name}, whose elements share bytes", advice="cast it inside the model")
    return buffer.view(np.uint16 if buffer.dtype.itemsize == 2 else np.uint8)


def foreign_dtype(dtype: str, name: str) -> np.dtype[Any]:
    """Return NumPy's type for a foreign one.

    Raises:
        Unsupported: `ml_dtypes` is not imported, or elements are smaller than a byte.
    """
    try:
        found = np.dtype(dtype)
    except TypeError:
        raise Unsupported(f"{name!r} is {dtype}, which NumPy lacks", advice="import ml_dtypes, or cast it inside the model") from None
    if dtype in _PACKED:
        raise Unsupported(f"{name!r} is {dtype}, whose elements share bytes", advice="cast it inside the model")
    return found
