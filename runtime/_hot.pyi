"""The hot path in C: see `_hot.c`."""

from collections.abc import Callable
from typing import Any

RING: int  # durations that a clock remembers

class Clock:
    """What each call counts. Durations in nanoseconds; `clocks.PythonClock` is its reference."""

    count: int
    due: int
    due_ns: int
    ended_ns: int
    looking_ns: int
    def note(self, nanoseconds: int, /) -> None: ...
    def newest(self, many: int, /) -> list[int]: ...
    def newest_ns(self, many: int, /) -> int: ...
    def sums(self, many: int, without: int, step: int, most_ns: int, /) -> list[int]: ...
    def may_wait(self, now_ns: int, /) -> bool: ...
    def wait(self, now_ns: int, step: int, most: int, pause_ns: int, most_ns: int, call_ns: float, ratio: float, later: int, /) -> None: ...
    def fill(self) -> None: ...

class Shortest:
    """Answers requests as `reference` does."""

    def __new__(
        cls,
        take: Callable[[], Any],
        give: Callable[[Any], None],
        wake: Callable[[], None],
        reference: Callable[[Any], Any],
        failed: Callable[[Any, BaseException, Any], Any],
        lane: type,
        feed: type,
        slot: type,
        array: type,
        clock: type,
        inputs: int,
        one: tuple[str, str, int] | None,
        /,
    ) -> Shortest: ...
    @property
    def ask(self) -> Callable[[Any], Any]: ...

def array_fields(array: Any, /) -> tuple[int, int, int, int, int, Any, Any, int, bool]: ...
