"""Outputs handed out without a copy: the last stage of a lane has several requests, each with arrays of its own to write.

A caller keeps the arrays that a run wrote, and the next run goes to a request whose arrays nobody has. Whether somebody has them, their
reference counts tell. What callers get are views of an array that only we refer to besides, over memory which that array holds through
an object that is no array: NumPy lets views of views refer to the first one that such an object stands behind, so each array that is left
of an output, however it was sliced, counts there.
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from sys import getrefcount, intern
from types import MethodType
from typing import Any

import numpy as np

from aivmm.errors import AivmmError
from aivmm.runtime.backend import Buffer, CallsDirectly, Executable, ForgetsInputs, Request, aligned_empty
from aivmm.tensors import TensorSpec

log = logging.getLogger("aivmm.engine")
_COUNTS: bool = sys.implementation.name == "cpython" and getattr(sys, "_is_gil_enabled", lambda: True)()
_Direct = tuple[Callable[[], object], Callable[[BaseException], Exception | None]]
_MOST = 3  # requests whose arrays are handed out. A caller who keeps more of them than that gets copies.


class _Memory:
    """Keeps an array alive for another one over the same memory. On purpose no array: see above."""

    __slots__ = ("__array_interface__", "array")

    def __init__(self, array: Buffer) -> None:
        self.array = array
        self.__array_interface__ = array.__array_interface__


def counts_references() -> bool:
    """Say whether this interpreter's reference counts are exact: CPython's, with its global lock."""
    return _COUNTS


class Slot:
    """One request of a stage, its output arrays, and what shows them to callers: `faces`, none where callers get copies.

    `after` is the one to look at next: what was handed out longest ago is the first that nobody has any more. `alone` is what is counted of
    a face that no caller has. How many of our own references there are to count hangs on the way it is asked, and on the interpreter: so it
    is asked at first, in the same way. Where there is one output only, `face` is its face, and `face_alone` what is counted by that way.
    `ready` and `shown` are for the hot path in C: how it runs the request, and the view of `face` that it handed out last, or a list of
    views of all `faces`. They are kept to be handed out again once their caller has let them go, so who counts references in Python lets go
    of them first.
    """

    __slots__ = ("after", "alone", "arrays", "face", "face_alone", "faces", "forget", "ready", "request", "runs", "shown", "stale")

    def __init__(self, executable: Executable, outputs: Sequence[TensorSpec], *, lent: bool) -> None:
        self.after: Slot | None = None
        self.request = executable.new_request()
        self.run_by(self.request.run)
        self.shown: Buffer | list[Buffer | None] | None = None
        self.stale = True  # inputs were bound since it ran last
        self.forget: Callable[[], None] | None = getattr(self.request, ForgetsInputs.forget_inputs.__name__, None)
        arrays = []
        for spec in outputs:
            array = aligned_empty(spec)
            self.request.bind(spec.name, array)
            arrays.append((intern(spec.name), array))  # as names in callers' code are
        self.arrays: tuple[tuple[str, Buffer], ...] = tuple(arrays)
        self.faces: tuple[tuple[str, Buffer], ...] = tuple((name, _face(array)) for name, array in arrays) if lent else ()
        self.face = self.faces[0][1] if len(self.faces) == 1 else None
        self.alone = _count(self)
        self.face_alone = getrefcount(self.face)

    def run_by(self, runs: Callable[[], object]) -> None:
        """Have each run call `runs`."""
        self.runs = runs
        self.ready = _ready(runs)


def _ready(runs: Callable[[], object]) -> object:
    """Return a call of the runtime's as its function and all its arguments, side by side in one tuple; else `runs` itself."""
    if type(runs) is not partial or runs.keywords:
        return runs
    function, arguments = runs.func, runs.args
    return (function.__func__, function.__self__, *arguments) if type(function) is MethodType else (function, *arguments)


def run_ready(ready: Any) -> None:
    """Run what `_ready` returned."""
    if type(ready) is tuple:
        ready[0](*ready[1:])
    else:
        ready()


def _count(slot: Slot) -> int:
    # Never through a variable: a debugger that looks at those of this frame would be counted, too.
    for face in slot.faces:
        return getrefcount(face[1])
    return 0


def _let_go(slot: Slot, ended: list[Buffer]) -> None:
    """Let go of what was shown last. What somebody has a weak reference to counts on, until its end is told."""
    shown, slot.shown = slot.shown, None
    for each in shown if isinstance(shown, list) else (shown,):
        if each is not None and weakref.getweakrefcount(each):
            ended.append(each)


def _is_free(slot: Slot, ended: list[Buffer]) -> bool:
    if slot.shown is not None:
        _let_go(slot, ended)
    for face in slot.faces:  # noqa: SIM110 - counted as `alone` was
        if getrefcount(face[1]) > slot.alone:
            return False
    return True


def _directly(request: object) -> _Direct | None:
    """Return what `CallsDirectly` gives. Not by `isinstance`, which takes 40 µs when it is first asked."""
    ask: Callable[[], _Direct | None] | None = getattr(request, CallsDirectly.direct.__name__, None)
    return None if ask is None else ask()


def direct_call(slot: Slot) -> Callable[[], object]:
    """Return the runtime's own call, or `run` where a run is more than that."""
    found = _directly(slot.request)
    return slot.request.run if found is None else found[0]


class Refusing:
    """What a run is said to have failed of: `refuse` has the runtime's words in an error of ours."""

    __slots__ = ("_explained",)

    def __init__(self, request: object) -> None:
        """Have those of the runtime that `request` is one of."""
        found = _directly(request)
        self._explained = None if found is None else found[1]

    def refuse(self, error: Exception) -> None:
        """Raise the runtime's words in an error of ours; nothing where they are not the runtime's."""
        known = None if self._explained is None or isinstance(error, AivmmError) else self._explained(error)
        if known is not None:
            raise known from error


def run_before(request: Request, wrapped: Callable[[], None] | None) -> tuple[object, Refusing]:
    """Return how the hot path runs a stage in front of the last one, as `Slot.ready` says it, or `wrapped` in its place; and who is told
    when that fails."""
    found = _directly(request)
    runs = wrapped or (request.run if found is None else found[0])
    return _ready(runs), Refusing(request)


def _face(array: Buffer) -> Any:
    return np.asarray(_Memory(array))


class Handing:
    """A stage's requests as one. Used by one thread at a time, as any request is.

    `ended` has answers that nobody has any more and whose ends somebody waits for: his functions may do anything, ask the same engine too,
    so they are called when the lane was given back, by who empties the list.
    """

    __slots__ = ("_executable", "_inputs", "_made", "_most", "_ran", "_refusing", "_specs", "ended", "now", "private", "slots", "turn")

    def __init__(self, executable: Executable, outputs: Sequence[TensorSpec]) -> None:
        """Make the request whose outputs are copied; the others follow when runs show that there is use for them.

        Raises:
            Unsupported: the runtime does not take an array of ours.
        """
        self._executable, self._specs = executable, tuple(outputs)
        self._inputs: dict[str, Buffer] = {}
        self.ended: list[Buffer] = []
        self.slots: list[Slot] = []  # whose arrays are handed out
        self.private = Slot(executable, outputs, lent=False)
        self.now = self.private  # the one that ran last, by `run`
        self.turn: Slot | None = None  # the one to look at first
        self._ran = False
        self._most = _MOST
        self._made: Callable[[Slot], Callable[[], object]] = direct_call
        self._refusing = Refusing(self.private.request)
        self.private.run_by(direct_call(self.private))

    def bind(self, name: str, buffer: Buffer) -> None:
        """Have each run read `buffer`; the runtime is told when a request runs next, and refuses it then."""
        self._inputs[name] = buffer
        for slot in (self.private, *self.slots):
            if not slot.stale:
                slot.stale = True
                if slot.forget is not None:  # what callers gave once is theirs to free: a slot may not run again for hours
                    slot.forget()

    def refresh(self, made: Callable[[Slot], Callable[[], object]]) -> None:
        """Run each request, those to come too, by what `made` returns for it."""
        self._made = made
        for slot in (self.private, *self.slots):
            slot.run_by(made(slot))

    def next(self) -> Slot:
        """Return a request whose arrays nobody has, with its inputs bound.

        Raises:
            Unsupported: the runtime does not take an input's array.
        """
        slot = self.turn
        if slot is None or not _is_free(slot, self.ended):
            slot = self.another()
        self.turn = slot.after
        self.now = slot
        if slot.stale:
            self.catch_up(slot)
        return slot

    def another(self) -> Slot:
        """Return a request whose arrays nobody has, made anew if need be.

        At first, when there may be no second run, and where there are enough it is the one whose outputs are copied.
        """
        for slot in self.slots:
            if _is_free(slot, self.ended):
                return slot
        new = self._new_slot() if self._ran and len(self.slots) < self._most else None
        self._ran = True
        if new is None:
            self.private.after = self.turn
            return self.private
        for each, after in zip(self.slots, (*self.slots[1:], self.slots[0]), strict=True):
            each.after = after
        return new

    def _new_slot(self) -> Slot | None:
        try:
            slot = Slot(self._executable, self._specs, lent=True)
        except Exception as error:  # noqa: BLE001 - whatever the runtime says (no memory left, say): it has requests enough to answer
            log.info("outputs are copied: the runtime makes no further request (%s)", error)
            self._most = len(self.slots)
            return None
        self.slots.append(slot)
        made = None
        while made is not self._made:  # which a trace that begins or ends may change meanwhile
            made = self._made
            slot.run_by(made(slot))
        return slot

    def close(self) -> None:
        """Let go of the requests; as long as one lives, so does what the runtime holds for it."""
        for slot in self.slots:
            slot.after = None  # they refer to each other in a ring
        self.private.after = self.turn = None
        self.slots.clear()
        self._inputs.clear()

    def catch_up(self, slot: Slot) -> None:
        """Bind the inputs to a request that has missed some."""
        for name, buffer in self._inputs.items():
            slot.request.bind(name, buffer)
        slot.stale = False

    def run(self) -> None:
        """Run once, as a request does."""
        slot = self.next()
        try:
            slot.runs()
        except Exception as error:
            self.refuse(error)
            raise

    def refuse(self, error: Exception) -> None:
        """Raise what a run is said to have failed of; see `Refusing`."""
        self._refusing.refuse(error)

    def output(self, name: str) -> Buffer:
        """Return the array that the last run wrote; a later run overwrites it."""
        return dict(self.now.arrays)[name]

    def hand_out(self) -> dict[str, Buffer]:
        """Return what the last run wrote, in arrays that are the caller's own."""
        return self.given(self.now)

    def given(self, slot: Slot) -> dict[str, Buffer]:
        """Return what a request's last run wrote, in arrays that are the caller's own."""
        if slot.faces:
            return {name: face.view() for name, face in slot.faces}
        return {name: array.copy() for name, array in slot.arrays}
