"""Copies between the host and cards, and within and between cards, for measuring: one at a time, on a stream of their own."""

from __future__ import annotations

import numpy as np

from aivmm.runtime.backend import Buffer, CopyRoute, aligned_empty
from aivmm.runtime.cuda import Stream, card_memory, free_card_memory, pinned_empty
from aivmm.runtime.target import Target
from aivmm.tensors import TensorSpec


def index_of(target: Target) -> int:
    """Return CUDA's index of a card: `CUDA:1` is 1."""
    return int(target.name.partition(":")[2] or 0)


class CardCopier:
    """Bytes on both ends of a route. Copies from and to other memory than page-locked go through the driver's own pieces."""

    def __init__(self, route: CopyRoute, size_bytes: int) -> None:
        """Allocate.

        Raises:
            Unsupported: there is not so much memory, or no such card, in CUDA's words.
        """
        self._size = size_bytes
        self._cards: list[tuple[int, int]] = []  # index, address
        self.host: Buffer = np.empty(0, np.uint8)  # the host's end, if there is one
        try:
            card = route.destination or route.source
            assert card is not None
            # The card's end first: it is refused at once, where the host's is touched page by page until the system kills somebody.
            ends = [self._end(each, route.pinned) for each in sorted((route.source, route.destination), key=lambda end: end is None)]
            self._source, self._destination = ends if route.source is not None else reversed(ends)
            self._stream = Stream(index_of(card))
        except BaseException:  # not handled, only cleaned up: the host's end may be too large as well
            self.close()
            raise

    def _end(self, card: Target | None, pinned: bool) -> int:
        """Return the address of an end."""
        if card is not None:
            index = index_of(card)
            address = card_memory(index, self._size)
            self._cards.append((index, address))
            return address
        spec = TensorSpec(name="x", dtype="uint8", shape=(self._size,))
        self.host = pinned_empty(spec) if pinned else aligned_empty(spec)
        self.host[...] = 1  # pages that nobody wrote to are all one page of zeros
        return int(self.host.ctypes.data)

    def run(self) -> None:
        """Copy, and return when all has arrived."""
        self._stream.copy(self._destination, self._source, self._size)
        self._stream.wait()

    def fill(self, array: Buffer) -> None:
        """Put these bytes where a route begins on a card."""
        self._stream.copy(self._source, array.ctypes.data, self._size)
        self._stream.wait()

    def arrived(self) -> Buffer:
        """Return the bytes at the destination, wherever that is."""
        back: Buffer = np.empty(self._size, np.uint8)
        self._stream.copy(back.ctypes.data, self._destination, self._size)
        self._stream.wait()
        return back

    def close(self) -> None:
        """Free the memory."""
        while self._cards:
            free_card_memory(*self._cards.pop())
