"""What a process holds of a device's own memory (docs/decisions/0040)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass

from aivmm.errors import Unsupported
from aivmm.runtime.backend import Backend, CountsMemory
from aivmm.runtime.config import Config
from aivmm.runtime.nvml import card_memory_bytes, is_nvidia, process_memory_bytes
from aivmm.runtime.ort_library import TRIAL
from aivmm.runtime.target import Target


@dataclass(slots=True)
class MemoryOf:
    """What one loaded model holds of its device's memory, as a process of its own would: with what the device keeps for any process.

    `read` gives what this process holds at all. What was held before is taken off, and `context` is put back: the memory that the first
    model in a process makes the driver take, whatever its size.
    """

    read: Callable[[], int]
    before: int
    context: int
    most: int = 0

    def look(self) -> int:
        """Return the most bytes seen so far, 0 where nothing told. Call it while nothing else of the process runs on the device."""
        with contextlib.suppress(Unsupported):  # what cannot be counted any more is no fault of the model's
            self.most = max(self.most, self.context + max(0, self.read() - self.before))
        return self.most


def memory_of(backend: Backend, target: Target, contexts: dict[Target, int]) -> MemoryOf | None:
    """Return what will tell the device memory of the model that is loaded next; None where nothing tells, or the target is a CPU.

    A small model is loaded first where none was in this process: what the driver keeps for any process, noted in `contexts`, is not the
    first model's.
    """
    try:
        if target not in contexts:
            contexts[target] = _context_of(backend, target)
        read, _ = reader(backend, target)
        return MemoryOf(read=read, before=read(), context=contexts[target])
    except Unsupported:
        return None


def _context_of(backend: Backend, target: Target) -> int:
    """Return the bytes that the driver keeps for this process whatever is loaded, after loading a small model.

    Raises:
        Unsupported: nothing tells, or not even that model can be loaded.
    """
    card = card_memory_bytes(target.device.uid) if is_nvidia(target.device) else 0
    if not card:
        reader(backend, target)  # where nothing tells, nothing is loaded
    backend.compile(TRIAL, target, Config()).close()
    read, others = reader(backend, target)  # on a card only now: who holds nothing there is not among those that NVML could tell of
    return max(0, read() - card) if others else read()  # discovery may have run here before, so what is held is more than what grew


def reader(backend: Backend, target: Target) -> tuple[Callable[[], int], bool]:
    """Return what reads the bytes of the target's own memory that this process holds, and whether those of others are among them.

    Ask when something of this process is on the device: only then can NVML show whether it knows the process.

    Raises:
        Unsupported: nothing tells.
    """
    if is_nvidia(target.device):
        uid = target.device.uid
        try:
            known = process_memory_bytes(uid, os.getpid()) > 0
        except Unsupported:
            known = False
        if known:
            return lambda: process_memory_bytes(uid, os.getpid()), False
        card_memory_bytes(uid)
        return lambda: card_memory_bytes(uid), True  # in a container NVML knows no process by our ids: what grows on the card is ours
    if target.device.kind != "cpu" and isinstance(backend, CountsMemory):
        return lambda: backend.memory_in_use(target), False
    raise Unsupported(f"{target} does not tell how much of its memory a process holds")
