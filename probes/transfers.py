"""What it costs to hand a tensor from one target to the next: measured in place, and fitted as a fixed and a proportional part.

Between targets of one host nothing is copied: the second stage reads the buffer that the first one wrote, as in the engine. What a boundary
costs is then what the stages take together beyond what they take alone: the caches are cold for the second, and threads of one runtime spin
while the other computes. Where a device has memory of its own, each stage alone copies from and to the host; what is saved where the tensor
between them stays there is in the cost too. So it can be negative, as it can within the noise. `aivmm.probes.copies` measures copies alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from aivmm.probes import phases, wire
from aivmm.probes.machine import wait_until_quiet
from aivmm.probes.records import Samples, Transfer, TransferPoint
from aivmm.runtime.backend import Buffer, DeviceRequest, DeviceTensor, DeviceTensors, Executable, Request, aligned_empty, host_buffer
from aivmm.runtime.null import SimulatedTime
from aivmm.runtime.registry import load_backend
from aivmm.runtime.target import Target
from aivmm.tensors import TensorSpec

if TYPE_CHECKING:
    from aivmm.probes.runners import State

SIZES_BYTES = tuple(1 << power for power in range(8, 27, 2))  # 256 B to 64 MiB
_ROUNDS = 5
_ROUND_S = 0.01  # of each of the three, in each round
_WARM_UP = 3
_NOISE = 0.05
_FITTED = ("size_bytes", "cost_s", "source_s", "destination_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferFit:
    """Seconds to hand over `n` bytes: `fixed_s + n * per_byte_s`, neither part below zero.

    `error` is the median relative error when each size is predicted from the others: 0.1 means that half of them are off by 10 % or less.
    """

    fixed_s: float
    per_byte_s: float
    error: float

    def seconds(self, size_bytes: float) -> float:
        """Return what handing over so many bytes costs."""
        return self.fixed_s + size_bytes * self.per_byte_s


def fit_transfer(sizes_bytes: Sequence[float], seconds: Sequence[float], *, resolution_s: Sequence[float] = ()) -> TransferFit:
    """Fit a fixed and a proportional cost to costs measured at three or more sizes.

    `resolution_s` says of each cost how small a difference can be told: a cost is a small difference of large times, and where it is next
    to nothing its relative error means nothing.

    Sizes span five powers of ten and noise is proportional to what is measured, so what is minimised is the relative error of each size:
    plain least squares would fit the largest alone. One size in four may be an outlier, for which the residuals count by their absolute
    value (iteratively reweighted non-negative least squares). Costs below 1 % of the median cost, and negative ones, weigh as that.

    Raises:
        ValueError: fewer than three different sizes, another number of costs, or a value that is not finite.
    """
    sizes, costs = np.asarray(sizes_bytes, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
    if sizes.shape != costs.shape or sizes.ndim != 1:
        raise ValueError(f"{sizes.size} sizes for {costs.size} costs")
    if np.unique(sizes).size < 3:
        raise ValueError("a fit and its error need three different sizes")
    if not (np.isfinite(sizes).all() and np.isfinite(costs).all() and (sizes >= 0).all()):
        raise ValueError("sizes and costs must be finite, and sizes not negative")
    scale = _scale(costs, np.asarray(resolution_s or np.zeros_like(costs), dtype=np.float64))
    fixed_s, per_byte_s = _fit(sizes, costs, scale)
    errors = []
    for left_out in range(sizes.size):
        fixed, slope = _fit(*(np.delete(each, left_out) for each in (sizes, costs, scale)))
        errors.append(abs(fixed + slope * sizes[left_out] - costs[left_out]) / scale[left_out])
    return TransferFit(fixed_s=fixed_s, per_byte_s=per_byte_s, error=float(median(errors)))


_Values = np.ndarray[Any, np.dtype[np.float64]]


def _scale(costs: _Values, resolution: _Values) -> _Values:
    """Return what the error of each cost is relative to; positive."""
    if resolution.shape != costs.shape:
        raise ValueError(f"{resolution.size} resolutions for {costs.size} costs")
    floor = max(0.01 * float(np.median(np.abs(costs))), np.finfo(np.float64).tiny)
    scale: _Values = np.maximum(np.maximum(np.abs(costs), resolution), floor)
    return scale


def _fit(sizes: _Values, costs: _Values, scale: _Values) -> tuple[float, float]:
    from scipy.optimize import nnls

    # Columns of like size: seconds and seconds a byte are twelve powers of ten apart.
    unit_s, unit_bytes = float(np.max(scale)), max(float(np.max(sizes)), 1.0)
    rows = np.stack([np.full_like(sizes, unit_s), sizes / unit_bytes * unit_s], axis=1) / scale[:, None]
    goal = costs / scale
    weights = np.ones_like(goal)
    found = np.zeros(2)
    for _ in range(30):
        root = np.sqrt(weights)
        found, _residual = nnls(rows * root[:, None], goal * root)
        weights = 1 / np.maximum(np.abs(rows @ found - goal), 1e-3)
    return float(found[0] * unit_s), float(found[1] * unit_s / unit_bytes)


def fit_boundaries(boundaries: Sequence[Mapping[str, float]]) -> TransferFit:
    """Fit what `boundary` measured. A cost is a difference of times of which 5 % are noise, so no less than that can be told.

    Raises:
        ValueError: as `fit_transfer`.
    """
    return fit_transfer(
        [each["size_bytes"] for each in boundaries],
        [each["cost_s"] for each in boundaries],
        resolution_s=[_NOISE * (each["source_s"] + each["destination_s"]) for each in boundaries],
    )


def fit_of(transfer: Transfer) -> TransferFit | None:
    """Fit what was measured of a pair; None when that are fewer than three sizes."""
    if len(transfer.points) < 3:
        return None
    return fit_boundaries([{name: getattr(point, name) for name in _FITTED} for point in transfer.points])


def points_of(boundaries: Sequence[Mapping[str, Any]]) -> tuple[TransferPoint, ...]:
    """Return what `boundary` measured as records, by size."""
    points = (
        TransferPoint(
            size_bytes=each["size_bytes"],
            samples=Samples(timed_s=tuple(each["durations"])),
            source_s=each["source_s"],
            destination_s=each["destination_s"],
            cost_s=each["cost_s"],
        )
        for each in boundaries
    )
    return tuple(sorted(points, key=lambda point: point.size_bytes))


def boundary(
    state: State,
    *,
    source: dict[str, Any],
    destination: dict[str, Any],
    sizes_bytes: Sequence[int],
    source_config: dict[str, Any],
    destination_config: dict[str, Any],
) -> dict[str, Any]:
    """Measure the boundary from one target to another at each size, both runtimes in this process, as the engine has them.

    Returns `boundaries`, one for each size: `size_bytes`; `durations` of both stages in sequence; `source_s` and `destination_s`, medians
    of the stages alone; and `cost_s`, the median over rounds of what the sequence takes beyond the two. The order of the three changes from
    round to round.
    """
    from aivmm.models.ceilings import stage_model  # here: it loads onnx, and every worker loads this module

    where = wire.target_in(source), wire.target_in(destination)
    configs = wire.config_in(source_config), wire.config_in(destination_config)
    found = []
    for size in sizes_bytes:
        executables: list[Executable] = []
        try:
            for target, config, (reads, writes) in zip(where, configs, (("a", "b"), ("b", "c")), strict=True):
                assert isinstance(target, Target)
                model = stage_model(size, reads=reads, writes=writes)
                executables.append(load_backend(target.runtime).compile(model, target, config))
            phases.enter(phases.RUN)
            found.append({"size_bytes": size, **measured(chained(executables, size))})
        finally:
            for each in executables:
                each.close()
    return {"boundaries": found}


@dataclass(frozen=True, slots=True)
class Chain:
    """Two stages that hand a tensor over: at `between`, where both can keep it in one device's memory, else in a buffer that they share."""

    requests: tuple[Request, Request]
    shared: Buffer
    between: DeviceTensor | None

    def bind(self, *, together: bool) -> None:
        """Let the tensor be where the engine has it when the stages run one after the other, or where it is when each runs alone."""
        for request in self.requests:
            if together and self.between is not None:
                cast(DeviceRequest, request).bind_device("b", self.between)
            else:
                request.bind("b", self.shared)


def chained(executables: Sequence[Executable], size: int) -> Chain:
    """Bind two stages as the engine does (`aivmm.runtime.lane`), "a" to "b" on the first of `executables` and "b" to "c" on the second.

    A buffer of the host is of the kind that the executables want: page-locked for a card that asks for it.
    """
    maker, reader = executables
    spec = TensorSpec(name="b", dtype="float32", shape=(size // 4,))
    first, second = maker.new_request(), reader.new_request()
    first.bind("a", _filled(replace(spec, name="a"), maker))
    second.bind("c", _filled(replace(spec, name="c"), reader))
    one_memory = isinstance(maker, DeviceTensors) and isinstance(reader, DeviceTensors) and maker.memory == reader.memory
    between = maker.device_tensor(spec) if one_memory and isinstance(maker, DeviceTensors) else None
    chain = Chain((first, second), _filled(spec, maker, reader), between)
    chain.bind(together=True)
    return chain


def _filled(spec: TensorSpec, *executables: Executable) -> Buffer:
    """Return a buffer of the kind that the first of the executables which wants any wants."""
    wanted = (host_buffer(each, spec) for each in executables)
    buffer = next((each for each in wanted if each is not None), None)
    buffer = aligned_empty(spec) if buffer is None else buffer
    buffer[...] = 1.0
    return buffer


def measured(chain: Chain) -> dict[str, Any]:
    """Time both in sequence and each alone, as `boundary` returns it; requests whose time is arithmetic are asked for it."""
    steps = {"both": chain.requests, "source": chain.requests[:1], "destination": chain.requests[1:]}
    kept: dict[str, list[list[float]]] = {name: [] for name in steps}
    order = list(steps)
    for _ in range(_ROUNDS):
        for name in order:
            chain.bind(together=name == "both")
            kept[name].append(_durations(steps[name]))
        order = order[1:] + order[:1]
    costs = [median(a) - median(b) - median(c) for a, b, c in zip(kept["both"], kept["source"], kept["destination"], strict=True)]
    return {
        "durations": [each for times in kept["both"] for each in times],
        "source_s": median(each for times in kept["source"] for each in times),
        "destination_s": median(each for times in kept["destination"] for each in times),
        "cost_s": median(costs),
    }


def _durations(requests: Sequence[Request]) -> list[float]:
    """Return how long runs of these requests, one after the other, took; of requests whose time is arithmetic, one."""
    runs = [each.run for each in requests]

    def in_turn() -> None:
        for run in runs:
            run()

    if all(isinstance(each, SimulatedTime) for each in requests):
        in_turn()
        return [sum(cast(SimulatedTime, each).last_s for each in requests)]
    # Whatever ran before must not spin any more; its data leaves the caches during the warm-up.
    wait_until_quiet(os.getpid())
    return _times(runs[0] if len(runs) == 1 else in_turn)


def _times(step: Callable[[], object]) -> list[float]:
    clock = time.perf_counter
    for _ in range(_WARM_UP):
        step()
    durations: list[float] = []
    end = clock() + _ROUND_S
    while not durations or clock() < end:
        started = clock()
        step()
        durations.append(clock() - started)
    return durations


OPERATIONS: dict[str, Callable[..., dict[str, Any]]] = {"boundary": boundary}
