"""Searches the extent of an axis by asking what the model accepts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

_POWERS = tuple(2**exponent for exponent in range(13))  # 1 to 4096
_COMMON = (10, 20, 28, 40, 80, 100, 160, 192, 200, 224, 299, 300, 320, 384, 400, 416, 480, 600, 640, 768, 784, 800, 1000, 1600, 3000)
_MENTIONED = 128  # so many extents named by the graph are tried, the smallest first


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """An extent, and why this one, to be read after "guessed 512: "."""

    extent: int
    why: str


def search(accepts: Callable[[int], bool | None], *, mentioned: Iterable[int], usual: int | None, limit: int = 4096) -> Found | None:
    """Return the extent that the model implies, or None when it does not imply one (any will do, none will, or the trials cannot tell).

    Tried are powers of two, common sizes, and extents that the graph mentions, up to `limit`; larger mentioned ones only when none of
    those runs. The rule: the only one accepted is implied. When larger ones are refused the axis is a window, and the largest accepted
    power of two is taken: windows are made to be filled. When there is no upper end, only an axis with a `usual` extent is bound, to the
    smallest accepted power of two that is not less.
    """
    named = sorted(set(mentioned))
    candidates = sorted(extent for extent in {*_POWERS, *_COMMON, *named[:_MENTIONED]} if extent <= limit)
    accepted, ended = _accepted(accepts, candidates)
    if not accepted and ended:
        accepted, ended = _accepted(accepts, [extent for extent in named if extent > limit][:_MENTIONED])
    if len(accepted) > 1 and accepted[0] == 1:
        accepted = accepted[1:]  # 1 broadcasts where it does not belong
    if not accepted:
        return None
    if len(accepted) == 1 and ended:
        return Found(extent=accepted[0], why="the only extent that the graph accepts of those tried")
    powers = [extent for extent in accepted if extent in _POWERS]
    refusal = f"{usual}, the usual default, does not run, and " if usual is not None and usual not in accepted else ""
    if ended and accepted[-1] < candidates[-1]:
        why = f"{refusal}of the extents tried the graph accepts {accepted[0]} to {accepted[-1]} and refuses larger ones"
        return Found(extent=max(powers, default=accepted[-1]), why=why)
    larger = [extent for extent in powers if usual is not None and extent >= usual]
    return Found(extent=larger[0], why=f"{refusal}this is the next power of two that runs") if larger else None


def _accepted(accepts: Callable[[int], bool | None], candidates: Iterable[int]) -> tuple[list[int], bool]:
    """Those accepted, in order; False beside them when the trials ended before the last candidate (out of time, or nothing can be run)."""
    accepted: list[int] = []
    for extent in candidates:
        verdict = accepts(extent)
        if verdict is None:
            return accepted, False
        if verdict:
            accepted.append(extent)
    return accepted, True
