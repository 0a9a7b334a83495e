"""Dynamic batching: rows of several requests run together, and a request may have any number of rows.

A batch is open while it fills: its lane is taken, and each request copies its rows straight into the lane's buffers. It leaves when it is
full, when the next request does not fit any more, or when its first request has waited for long enough. What is missing to the fixed batch
of the stages is filled with zeros; rows are expected not to look at each other, which whoever writes batching into a plan has to know.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import Any, Protocol

import numpy as np

from aivmm.errors import BundleError, Unsupported, UsageError
from aivmm.runtime.backend import Buffer
from aivmm.runtime.inputs import checked, refuse_unknown
from aivmm.runtime.lane import Lane
from aivmm.runtime.plan import Batching
from aivmm.runtime.pool import Pool
from aivmm.tensors import TensorSpec

Outputs = dict[str, Buffer]
Rescue = Callable[[Mapping[str, Buffer], BaseException], Outputs]  # what else can be done with the inputs of a request that failed


class Lanes(Protocol):
    """What a batcher needs of a program."""

    free: Pool

    def acquire(self) -> Lane:
        """Return a free lane, waiting for it."""

    def launch(self, lane: Lane, done: Callable[[Lane], None]) -> None:
        """Send a loaded lane through the stages."""

    def answered(self, lane: Lane) -> None:
        """Take note of a lane that brought an answer."""


class Answer:
    """The outputs of one request, which may come in several pieces."""

    def __init__(self, rescue: Rescue | None) -> None:
        self.future: Future[Outputs] = Future()
        self.future.set_running_or_notify_cancel()
        self.rescue = rescue
        self._pieces: list[Outputs | None] = []
        self._lock = threading.Lock()
        self._missing = 0
        self._settled = False  # decided under the lock: the future itself says so only later

    def expect(self) -> int:
        """Make room for one more piece and return its place."""
        with self._lock:
            self._pieces.append(None)
            self._missing += 1
            return len(self._pieces) - 1

    def settle(self, place: int, found: Outputs | BaseException, *, last: int) -> None:
        """Take one piece of `last`; the first error is the whole answer."""
        failed = isinstance(found, BaseException)
        with self._lock:
            if self._settled:
                return
            self._pieces[place] = None if isinstance(found, BaseException) else found
            self._missing -= 1
            self._settled = failed or (len(self._pieces) == last and self._missing == 0)
            if not self._settled:
                return
        if isinstance(found, BaseException):
            self.future.set_exception(found)
            return
        pieces = [each for each in self._pieces if each is not None]
        try:
            joined = pieces[0] if last == 1 else {name: np.concatenate([each[name] for each in pieces]) for name in pieces[0]}
        except BaseException as error:  # noqa: BLE001 - pieces of unlike shapes, or no room: it is the answer, and there is no other
            self.future.set_exception(error)
        else:
            self.future.set_result(joined)


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows of one request in one batch."""

    answer: Answer
    place: int
    last: int  # how many pieces the answer has
    start: int
    rows: int

    def settle(self, found: Outputs | BaseException) -> None:
        self.answer.settle(self.place, found, last=self.last)


@dataclass(slots=True)
class _Open:
    """A batch that fills."""

    lane: Lane
    leaves: float  # on the monotonic clock
    common: dict[str, Buffer]  # the inputs that all rows share
    rows: int = 0
    parts: list[_Part] = field(default_factory=list)
    loose: dict[str, list[Buffer]] = field(default_factory=dict)  # rows of inputs for which the lane has no buffer of its own


class Batcher:
    """Puts requests together for one program. Thread-safe."""

    def __init__(self, lanes: Lanes, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], batch: int, batching: Batching) -> None:
        """Fill lanes of the program `lanes`, whose stages were made for `batch` rows.

        Raises:
            BundleError: an output has no row for each row of the inputs, or no input has rows.
        """
        self._program = lanes
        self._specs = {each.name: each for each in inputs}
        self._rows = {
            each.name: TensorSpec(name=each.name, dtype=each.dtype, shape=(None, *each.shape[1:]))
            for each in inputs
            if each.shape and each.shape[0] in (batch, None)
        }
        odd = next((each for each in outputs if not each.shape or each.shape[0] not in (batch, None)), None)
        if odd is not None or not self._rows:
            what = f"the output {odd} has no row for each of {batch} samples" if odd else f"no input has {batch} rows"
            raise BundleError(f"requests cannot be batched: {what}", advice="leave batching out of the plan")
        fixed = any(self._specs[name].shape[0] is not None for name in self._rows)
        self.capacity = min(batching.max_batch, batch) if fixed else batching.max_batch
        self._fixed = batch if fixed else None
        self._wait_s = batching.max_wait_s
        self._turn = threading.Condition()
        self._open: _Open | None = None
        self._watch: threading.Thread | None = None
        self._closed = False
        self._count = self._sum_rows = self._requests = 0

    def submit(self, inputs: Mapping[str, Any], rescue: Rescue | None = None) -> Future[Outputs]:
        """Copy the rows of a request into batches and return a future of its outputs, by row.

        Raises:
            UsageError: an input is missing, unknown, or of another type or shape; inputs differ in rows; or the engine is closed.
        """
        arrays = {name: checked(inputs.get(name), self._rows.get(name, spec), self._specs) for name, spec in self._specs.items()}
        if len(inputs) != len(self._specs):
            refuse_unknown(inputs, self._specs)
        counts = {name: arrays[name].shape[0] for name in self._rows}
        rows = next(iter(counts.values()))
        if rows == 0 or len(set(counts.values())) > 1:
            shown = ", ".join(f"{name!r} has {count}" for name, count in counts.items())
            raise UsageError(f"inputs need the same number of rows, at least one: {shown}")
        answer = Answer(rescue)
        pieces = -(-rows // self.capacity)
        with self._turn:
            self._requests += 1
            for first in range(0, rows, self.capacity):
                self._add(arrays, first, min(self.capacity, rows - first), answer, pieces)
        return answer.future

    def flush(self) -> None:
        """Let the open batch leave now, and the thread that watches it end. No request comes after this."""
        with self._turn:
            self._closed = True
            self._leave()
            self._turn.notify_all()
        if self._watch is not None and self._watch is not threading.current_thread():
            self._watch.join()

    def stats(self) -> dict[str, int]:
        """Return how many batches left, with how many rows and requests."""
        with self._turn:
            return {"count": self._count, "rows": self._sum_rows, "requests": self._requests, "capacity": self.capacity}

    def _add(self, arrays: Mapping[str, Buffer], first: int, rows: int, answer: Answer, pieces: int) -> None:
        """Copy `rows` rows into the open batch, or into a new one where they do not fit. With the turn."""
        common = {name: array for name, array in arrays.items() if name not in self._rows}
        if self._open is not None and not self._takes(self._open, rows, arrays, common):
            self._leave()
        if self._open is None:
            kept = {name: array.copy() for name, array in common.items()}
            self._open = _Open(self._program.acquire(), monotonic() + self._wait_s, kept)
        batch = self._open
        for name in self._rows:
            own = batch.lane.own(name)
            taken = arrays[name][first : first + rows]
            if own is None:
                batch.loose.setdefault(name, []).append(taken.copy())
            else:
                own[batch.rows : batch.rows + rows] = taken
        batch.parts.append(_Part(answer, answer.expect(), pieces, batch.rows, rows))
        batch.rows += rows
        if batch.rows == self.capacity or self._wait_s == 0:
            self._leave()
        elif len(batch.parts) == 1:
            self._watched()

    def _takes(self, batch: _Open, rows: int, arrays: Mapping[str, Buffer], common: Mapping[str, Buffer]) -> bool:
        """Say whether `rows` more rows fit into an open batch: they share what all rows share, and their rows are as long."""
        alike = all(loose[0].shape[1:] == arrays[name].shape[1:] for name, loose in batch.loose.items())
        return batch.rows + rows <= self.capacity and alike and _same(batch.common, common)

    def _watched(self) -> None:
        if self._watch is None:
            self._watch = threading.Thread(target=self._wait, name="aivmm-batch", daemon=True)
            self._watch.start()
        self._turn.notify_all()

    def _wait(self) -> None:
        """Let batches leave when their time has come. The thread of that name."""
        with self._turn:
            while not self._closed:
                left = None if self._open is None else self._open.leaves - monotonic()
                if left is not None and left <= 0:
                    self._leave()
                else:
                    self._turn.wait(left)

    def _leave(self) -> None:
        """Send the open batch on its way. With the turn."""
        batch, self._open = self._open, None
        if batch is None:
            return
        self._count += 1
        self._sum_rows += batch.rows
        try:
            self._load(batch)
        except BaseException as error:  # noqa: BLE001 - it belongs to these requests, not to whose turn it is
            self._program.free.put(batch.lane)
            # On a thread of its own: callbacks may ask the engine, or close it, and whoever is here has the turn.
            threading.Thread(target=_fail, args=(batch.parts, error), name="aivmm-rescue", daemon=True).start()
            return
        self._program.launch(batch.lane, partial(self._land, batch.parts, batch.rows))

    def _load(self, batch: _Open) -> None:
        loaded: dict[str, Buffer] = dict(batch.common)
        for name in self._rows:
            own = batch.lane.own(name)
            if own is None:
                loaded[name] = np.concatenate(batch.loose[name])
            else:
                own[batch.rows :] = 0
                loaded[name] = own
        batch.lane.load(loaded)

    def _land(self, parts: Sequence[_Part], rows: int, lane: Lane) -> None:
        """Hand the outputs of a batch to its requests. On the last stage's thread."""
        error = lane.error
        found: list[Outputs] = []
        inputs: list[dict[str, Buffer]] = []
        try:
            if error is None:
                self._program.answered(lane)
                outputs = lane.views()
                self._require_rows(outputs, rows)
                found = [{name: each[part.start : part.start + part.rows].copy() for name, each in outputs.items()} for part in parts]
            else:
                loaded = lane.loaded()
                for part in parts:
                    mine = slice(part.start, part.start + part.rows)
                    inputs.append({name: each[mine] if name in self._rows else each for name, each in loaded.items()})
        except BaseException as failure:  # noqa: BLE001 - whatever it is, it is the answer to these requests
            error, inputs = failure, []
        lane.error = None
        self._program.free.put(lane)
        if error is None:
            for part, outputs in zip(parts, found, strict=True):
                part.settle(outputs)
        elif not inputs or (len(parts) == 1 and parts[0].answer.rescue is None):
            for part in parts:
                part.settle(error)
        else:  # on a thread of its own: each runs alone, and may have to wait for a lane
            threading.Thread(target=self._apart, args=(parts, inputs, error), name="aivmm-rescue", daemon=True).start()

    def _require_rows(self, outputs: Mapping[str, Buffer], rows: int) -> None:
        have = self._fixed or rows
        odd = next((name for name, each in outputs.items() if each.shape[:1] != (have,)), None)
        if odd is not None:
            raise Unsupported(f"the output {odd!r} has the shape {outputs[odd].shape} for {have} rows, so it cannot be divided")

    def _apart(self, parts: Sequence[_Part], inputs: Sequence[Mapping[str, Buffer]], error: BaseException) -> None:
        """Run the requests of a batch that failed each alone: the error is that of one of them, or of the stage."""
        for part, mine in zip(parts, inputs, strict=True):
            try:
                if len(parts) == 1:
                    raise error
                part.settle(self._alone(mine))
            except BaseException as own:  # noqa: BLE001 - whatever it is, it is the answer to this request
                part.settle(_rescued(part.answer.rescue, mine, own))

    def _alone(self, inputs: Mapping[str, Buffer]) -> Outputs:
        """Run one request by itself, on this thread's time."""
        rows = next(inputs[name].shape[0] for name in self._rows)
        lane: Lane = self._program.acquire()
        batch = _Open(lane, 0.0, {name: array for name, array in inputs.items() if name not in self._rows}, rows)
        landed = threading.Event()
        try:
            for name in self._rows:
                own = lane.own(name)
                if own is None:
                    batch.loose[name] = [inputs[name]]
                else:
                    own[:rows] = inputs[name]
            self._load(batch)
            self._program.launch(lane, lambda _: landed.set())
            landed.wait()
            if lane.error is not None:
                raise lane.error
            outputs = lane.views()
            self._require_rows(outputs, rows)
            return {name: each[:rows].copy() for name, each in outputs.items()}
        finally:
            lane.error = None
            self._program.free.put(lane)


def _fail(parts: Sequence[_Part], error: BaseException) -> None:
    for part in parts:
        part.settle(error)


def _rescued(rescue: Rescue | None, inputs: Mapping[str, Buffer], error: BaseException) -> Outputs | BaseException:
    if rescue is None:
        return error
    try:
        return rescue(inputs, error)
    except BaseException as failure:  # noqa: BLE001 - whatever it is, it is the answer to this request
        return failure


def _same(one: Mapping[str, Buffer], other: Mapping[str, Buffer]) -> bool:
    return all(np.array_equal(array, other[name]) for name, array in one.items())
