"""What a target can do at best, as measured on it, and how near an operator comes: the roofline, with the cost of a call as third limit.

An operator can take no less time than its operations need at the matrix-multiplication peak, no less than its bytes need at the bandwidth
of as many bytes, and in any case what a call costs that does nothing. The first two overlap, so the least time is

    call + max(operations / peak, bytes / bandwidth)

(Williams, Waterman, Patterson 2009, doi:10.1145/1498765.1498785, plus the call). The largest of the three terms names the bound, and the
least time by the measured one is the share of the ceiling. A share above 1 is possible and left as it is: a convolution may need fewer
operations than its definition counts (Winograd), and what lies in a cache comes faster than what a copy of that size gets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from aivmm.models.ceilings import call_model, copy_model, matmul_flops, matmul_model
from aivmm.probes.records import Measured, Outcome

Bound = Literal["compute", "memory", "overhead"]
BOUNDS: tuple[Bound, ...] = ("compute", "memory", "overhead")

PREFIX = "ceiling:"
CALL = f"{PREFIX}call"
COPY_BYTES = tuple(1 << power for power in range(14, 28, 2))  # 16 KiB, below any first cache, to 64 MiB
BIG_COPY_BYTES = 1 << 28  # where 64 MiB could still lie in a last cache
MATMUL_SIZES = (256, 512, 1024, 2048, 4096, 8192)
_GAIN = 1.05  # a larger matrix that is no faster than this ends the growing
_LONGEST_MATMUL_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceiling:
    """One thing to measure for the ceilings: under which subject, with which model, and what one run of it does."""

    subject: str
    model: Callable[[], bytes]
    flops: float = 0.0
    bytes: int = 0
    constant_bytes: int = 0


def call_ceiling() -> Ceiling:
    """Return the smallest model there is."""
    return Ceiling(subject=CALL, model=call_model)


def copy_ceilings() -> tuple[Ceiling, ...]:
    """Return copies of all sizes."""
    return tuple(
        Ceiling(subject=f"{PREFIX}copy:{size}", model=lambda size=size: copy_model(size), bytes=size)  # type: ignore[misc]
        for size in (*COPY_BYTES, BIG_COPY_BYTES)
    )


def matmul_ceiling(size: int) -> Ceiling:
    """Return the product of two square matrices."""
    weights = 4 * size * size
    return Ceiling(
        subject=f"{PREFIX}matmul:{size}",
        model=lambda: matmul_model(size),
        flops=matmul_flops(size),
        bytes=3 * weights,
        constant_bytes=weights,
    )


def grows(done: Sequence[tuple[int, Outcome]]) -> int | None:
    """Return the next size of matrix to multiply, given (size, outcome) of those so far, or None when larger ones would say nothing new.

    Matrices grow until the rate does not, until the next product would take more than 0.1 s, or until the target refuses.
    """
    if not done:
        return MATMUL_SIZES[0]
    size, last = done[-1]
    if not isinstance(last, Measured) or 8 * min(last.samples.timed_s) > _LONGEST_MATMUL_S or size == MATMUL_SIZES[-1]:
        return None
    best_before = max((_rate(number, each) for number, each in done[:-1]), default=0.0)
    if _rate(size, last) < _GAIN * best_before:
        return None
    return MATMUL_SIZES[MATMUL_SIZES.index(size) + 1]


def _rate(size: int, outcome: Outcome) -> float:
    return matmul_flops(size) / min(outcome.samples.timed_s) if isinstance(outcome, Measured) else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """What limits one operator, in seconds of a run: at the peak, at the bandwidth, for the call; and the share of the ceiling reached."""

    compute_s: float
    memory_s: float
    overhead_s: float
    share: float

    @property
    def bound(self) -> Bound:
        """The largest of the three."""
        return _largest(self.compute_s, self.memory_s, self.overhead_s)

    def metrics(self) -> dict[str, float]:
        """Return the metrics under which this is stored beside a measurement; `bound_of` reads them."""
        return {
            "ceiling_share": self.share,
            "compute_floor_s": self.compute_s,
            "memory_floor_s": self.memory_s,
            "overhead_floor_s": self.overhead_s,
        }


def bound_of(metrics: Mapping[str, float]) -> Bound | None:
    """Return what bounds an operator by its stored metrics; None where they do not say."""
    names = [f"{each}_floor_s" for each in BOUNDS]
    if any(name not in metrics for name in names):
        return None
    return _largest(*(metrics[name] for name in names))


def _largest(compute_s: float, memory_s: float, overhead_s: float) -> Bound:
    seconds: dict[Bound, float] = {"compute": compute_s, "memory": memory_s, "overhead": overhead_s}
    return max(BOUNDS, key=seconds.__getitem__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """The measured ceilings of one target in one precision. `copies` are (bytes read and written, seconds beyond a call's), ascending."""

    flops_per_s: float | None  # None: the target refuses to multiply matrices
    copies: tuple[tuple[int, float], ...]
    call_s: float

    @classmethod
    def of(cls, outcomes: Iterable[Outcome]) -> Ceilings | None:
        """Read them from the probes whose subjects begin with `ceiling:`; None without the call and at least one copy.

        What counts is the fastest run, not the usual one: a ceiling is what the target can do, and whatever disturbs a run only slows it.
        """
        fastest = {each.key.subject: min(each.samples.timed_s) for each in outcomes if isinstance(each, Measured)}
        call_s = fastest.get(CALL)
        if call_s is None:
            return None
        copies: dict[int, float] = {}
        peak = 0.0
        for subject, best_s in fastest.items():
            kind, _, number = subject.removeprefix(PREFIX).partition(":")
            # A call is a part of each time. Where that is nearly all, what is left is noise: half of the time stays a copy's own.
            work_s = max(best_s - call_s, best_s / 2)
            if kind == "copy":
                copies[int(number)] = work_s
            elif kind == "matmul":
                peak = max(peak, matmul_flops(int(number)) / work_s)
        if not copies:
            return None
        return cls(flops_per_s=peak or None, copies=tuple(sorted(copies.items())), call_s=call_s)

    @property
    def bytes_per_s(self) -> float:
        """The bandwidth of the largest copy: that of the device's main memory."""
        size, seconds = self.copies[-1]
        return size / seconds

    def memory_s(self, size: float) -> float:
        """Return the least seconds in which `size` bytes are read and written.

        Between two sizes the bandwidth is interpolated over the logarithm of the size, beyond the smallest and largest it is held.
        """
        if size <= 0:
            return 0.0
        rates = [(math.log(each), each / seconds) for each, seconds in self.copies]
        place = math.log(size)
        if place <= rates[0][0]:
            return size / rates[0][1]
        for (low, below), (high, above) in pairwise(rates):
            if place <= high:
                return size / (below + (above - below) * (place - low) / (high - low))
        return size / rates[-1][1]

    def roofline(self, *, seconds: float, flops: float | None, moved_bytes: float | None) -> Roofline | None:
        """Return what limits an operator that took `seconds`; None when its work is not known, or has no ceiling here."""
        if flops is None or moved_bytes is None or (flops > 0 and self.flops_per_s is None):
            return None
        compute_s = flops / self.flops_per_s if self.flops_per_s else 0.0
        memory_s = self.memory_s(moved_bytes)
        least_s = self.call_s + max(compute_s, memory_s)
        return Roofline(compute_s=compute_s, memory_s=memory_s, overhead_s=self.call_s, share=least_s / seconds)


def rates(seconds: float, flops: float | None, moved_bytes: float | None) -> dict[str, float]:
    """Return the metrics `flops_per_s` and `bytes_per_s` of an operator that took `seconds`, as far as its work is known."""
    found = {}
    if flops:
        found["flops_per_s"] = flops / seconds
    if moved_bytes:
        found["bytes_per_s"] = moved_bytes / seconds
    return found
