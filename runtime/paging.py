"""Memory that a runtime is about to ask for: in large pages, and with as many of them there as there is time for.

ONNX Runtime packs a model's weights into memory of its own, on the thread that loads the model. Each new page of 4 KiB is a fault, which
takes 2.4 µs on a virtual machine: a third of what it takes to load 8 MB. So the thread that loads takes as much memory in large pages
beforehand and gives it back to the C library, which hands it out to who asks next on that thread. While a runtime wakes up on another
thread, it writes to those pages, too.

The GNU C library unmaps a large block that is freed, and from then on takes blocks of up to its size from what it keeps, of which it gives
back nothing below twice that size: "dynamic mmap threshold" in mallopt(3). So who had room made gives back what he can in the end. With
another library nothing may be gained by it, and nothing is lost. NumPy asks for large pages (`madvise`) for arrays of 4 MiB and more; where
the system has none to give, they are as small as ever.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from contextlib import suppress

import numpy as np

# The largest block that the library keeps is one of 32 MiB, its own head included. For more there would be several, and a load of 80 MB was
# hardly shorter for the room of a part of it.
MOST_BYTES = 31 << 20
_LEAST_BYTES = 4 << 20
_PIECE_BYTES = 2 << 20  # a large page
_PAGE_BYTES = 4096


def make_room(size: int, until: Callable[[], bool]) -> bool:
    """Have the next `size` bytes of the calling thread's heap in large pages, and write to them until `until` says so.

    Say whether that was done: not for less than 4 MiB, where it is not worth it, nor for more than 31, nor where there is no more memory.
    What was not written to takes none before it is asked for.
    """
    if sys.platform != "linux" or not _LEAST_BYTES <= size <= MOST_BYTES:
        return False
    try:
        np.empty(size + _PAGE_BYTES, dtype=np.uint8)  # mapped for itself and freed: what comes next is taken from the heap
        held = np.empty(size, dtype=np.uint8)
    except MemoryError:  # the runtime, which needs less at a time, may still find it
        return False
    for start in range(0, size, _PIECE_BYTES):
        if until():
            break
        held[start : start + _PIECE_BYTES : _PAGE_BYTES] = 0
    return True


def give_back() -> None:
    """Give the memory that was freed, and that the C library keeps, back to the system, where the library can (`malloc_trim`)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
