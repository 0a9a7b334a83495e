"""CUDA's own memory through its runtime library, which ONNX Runtime's provider has loaded anyway: page-locked buffers, copies, streams.

A card reads page-locked memory at the speed of its bus; of any other the driver first makes a copy, at a fraction of that.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np

from aivmm.errors import Unsupported
from aivmm.runtime.backend import Buffer
from aivmm.runtime.nvidia import EXTRA_ADVICE, cuda_major, libraries_loaded
from aivmm.tensors import TensorSpec

_NAME = "cudart64_{}.dll" if sys.platform == "win32" else "libcudart.so.{}"
_VERSIONS = ("13", "12")  # where a build does not say its own
_PORTABLE = 1  # cudaHostAllocPortable: page-locked for all cards
_NON_BLOCKING = 1  # cudaStreamNonBlocking: does not wait for the legacy stream, as ONNX Runtime's own do not
_EITHER_WAY = 4  # cudaMemcpyDefault: the addresses say which way
_LEGACY_STREAM = 0
_NO_TIMING = 2  # cudaEventDisableTiming
_SLOTS, _SLOT_BYTES = 3, 4 << 20


@cache
def _library() -> Any:
    """Return CUDA's runtime library, of the version that ONNX Runtime's provider links against: the loader has one of each name.

    Another may be installed as well, be too new for the driver, or be loaded already by others in the process.

    Raises:
        Unsupported: it is not installed where the loader looks.
    """
    libraries_loaded()  # those in wheels, which are found by their names then
    try:
        library = _first([_NAME.format(version) for version in dict.fromkeys((cuda_major(), *_VERSIONS))])
    except OSError as error:
        raise Unsupported(f"CUDA's runtime library cannot be loaded ({error})", advice=EXTRA_ADVICE) from None
    library.cudaGetErrorString.restype = ctypes.c_char_p
    return library


def _first(names: Sequence[str]) -> Any:
    """Return the first library that loads.

    Raises:
        OSError: none loads; with what was said of the first.
    """
    problems = []
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError as error:
            problems.append(error)
    raise problems[0]


def _check(code: int, what: str, *, advice: str = "") -> None:
    if code:
        _library().cudaGetLastError()  # else the next call reports it again
        words = _library().cudaGetErrorString(code).decode(errors="replace")
        raise Unsupported(f"CUDA could not {what}: {words}", advice=advice)


@contextmanager
def _on(device: int) -> Iterator[None]:
    """Do what is inside on the card with CUDA's index `device`. The calling thread's own choice of a card stays."""
    library, before = _library(), ctypes.c_int()
    _check(library.cudaGetDevice(ctypes.byref(before)), "tell its device")
    if before.value == device:
        yield
        return
    _check(library.cudaSetDevice(device), f"use device {device}")
    try:
        yield
    finally:
        library.cudaSetDevice(before)


class ThreadsCard:
    """Leaves the calling thread's choice of a card as it was: ONNX Runtime's own calls change it, and others in the process go by it.

    For one thread at a time. Where there is one card it does nothing.
    """

    def __init__(self) -> None:
        count = ctypes.c_int()
        _check(_library().cudaGetDeviceCount(ctypes.byref(count)), "count its devices")
        self._several = count.value > 1
        self._before, self._after = ctypes.c_int(), ctypes.c_int()
        self._get, self._set = _library().cudaGetDevice, _library().cudaSetDevice

    def __enter__(self) -> None:
        if self._several:
            self._get(ctypes.byref(self._before))

    def __exit__(self, *_: object) -> None:
        if self._several:
            self._get(ctypes.byref(self._after))
            if self._after.value != self._before.value:
                self._set(self._before)


class _Block:
    """Page-locked memory; freed when no array refers to it any more."""

    def __init__(self, size: int) -> None:
        self._address = ctypes.c_void_p()
        self._size = size
        _check(
            _library().cudaHostAlloc(ctypes.byref(self._address), ctypes.c_size_t(size), ctypes.c_uint(_PORTABLE)),
            f"lock {size} bytes of the host's memory",
            advice="use fewer callers or a smaller batch, or allow more memory to be locked (ulimit -l)",
        )

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"shape": (self._size,), "typestr": "|u1", "data": (self._address.value, False), "version": 3}

    def __del__(self) -> None:
        if self._address:
            _library().cudaFreeHost(self._address)  # at exit the driver may be gone, and says so: nobody is left to be told


def pinned_empty(spec: TensorSpec) -> Buffer:
    """Return an uninitialised C-contiguous array for `spec` in page-locked memory.

    Raises:
        Unsupported: CUDA refuses, in its own words.
        ValueError: the shape is not static.
    """
    if not spec.static:
        raise ValueError(f"{spec} has no fixed size")
    shape = tuple(extent for extent in spec.shape if extent is not None)
    dtype = np.dtype(spec.dtype)
    size = math.prod(shape) * dtype.itemsize
    array: Buffer = np.asarray(_Block(max(64, size)))[:size].view(dtype).reshape(shape)
    return array


def card_memory(device: int, size: int) -> int:
    """Return the address of `size` uninitialised bytes on the card with CUDA's index `device`; `free_card_memory` gives them back.

    Raises:
        Unsupported: CUDA refuses, in its own words.
    """
    address = ctypes.c_void_p()
    with _on(device):
        _check(_library().cudaMalloc(ctypes.byref(address), ctypes.c_size_t(size)), f"have {size} bytes on device {device}")
    return address.value or 0


def free_card_memory(device: int, address: int) -> None:
    """Give back what `card_memory` returned."""
    with _on(device):
        _check(_library().cudaFree(ctypes.c_void_p(address)), "free a card's memory")


def is_pinned(array: Buffer) -> bool:
    """Say whether an array lies in memory that `pinned_empty` locked."""
    owner: Any = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    return isinstance(owner, _Block)


class Stream:
    """A queue of copies of its own on one card, so that nobody waits for anybody else's."""

    def __init__(self, device: int) -> None:
        """Make one on the card with CUDA's index `device`. The calling thread's own choice of a card stays."""
        self._stream = ctypes.c_void_p()  # first, for `__del__`
        library = _library()
        self._events = [ctypes.c_void_p() for _ in range(_SLOTS)]
        self._slots: list[Buffer] = []  # page-locked, for what comes from other memory
        with _on(device):
            _check(library.cudaStreamCreateWithFlags(ctypes.byref(self._stream), ctypes.c_uint(_NON_BLOCKING)), "make a stream")
            for event in self._events:
                _check(library.cudaEventCreateWithFlags(ctypes.byref(event), ctypes.c_uint(_NO_TIMING)), "make an event")
        self._copy, self._wait = library.cudaMemcpyAsync, library.cudaStreamSynchronize
        self._copy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
        self._wait.argtypes = [ctypes.c_void_p]

    @property
    def handle(self) -> int:
        """CUDA's own name for it, good as long as this object lives."""
        return self._stream.value or 0

    def copy(self, destination: int, source: int, size: int) -> None:
        """Begin to copy `size` bytes between two addresses, on the host or on cards.

        Raises:
            Unsupported: CUDA refuses, or a card has failed.
        """
        code = self._copy(destination, source, size, _EITHER_WAY, self._stream)
        if code:
            _check(code, "copy")

    def upload(self, destination: int, array: Buffer) -> None:
        """Begin to copy a contiguous array of any memory to an address on the card, a piece at a time through page-locked memory.

        While one piece is on its way the next is copied into place. The pieces stay in the processor's cache, so that the host's memory is
        read once and not written.
        Returns when the array has been read. Raises as `copy`.
        """
        raw = array.reshape(-1).view(np.uint8)
        if not self._slots:
            self._slots = [pinned_empty(TensorSpec(name="slot", dtype="uint8", shape=(_SLOT_BYTES,))) for _ in self._events]
        record, reached = _library().cudaEventRecord, _library().cudaEventSynchronize
        for number, start in enumerate(range(0, raw.size, _SLOT_BYTES)):
            slot, event = self._slots[number % _SLOTS], self._events[number % _SLOTS]
            size = min(_SLOT_BYTES, raw.size - start)
            # The card may still read what lies there, from this array or the one before; where nothing was recorded this returns at once.
            _check(reached(event), "finish a copy")
            slot[:size] = raw[start : start + size]
            self.copy(destination + start, slot.ctypes.data, size)
            _check(record(event, self._stream), "mark a copy")

    def wait(self) -> None:
        """Return when all that was begun is done. Raises as `copy`."""
        code = self._wait(self._stream)
        if code:
            _check(code, "finish a copy")

    def __del__(self) -> None:
        if self._stream:
            for event in self._events:
                if event:
                    _library().cudaEventDestroy(event)
            _library().cudaStreamDestroy(self._stream)


def wait_for_producers(device: int) -> None:
    """Return when what others wrote to their tensors on the legacy stream of one card, where DLPack has them ready, is written."""
    with _on(device):  # each card has a legacy stream of its own, and which one is meant goes by the thread's card
        _check(_library().cudaStreamSynchronize(ctypes.c_void_p(_LEGACY_STREAM)), "wait for a tensor")
