"""What tunings for several plans share: their outcome, and how progress is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aivmm.tuner.progress import Progress
from aivmm.tuner.session import TuneOutcome


@dataclass(frozen=True, slots=True, kw_only=True)
class ManyOutcome:
    """What tuning for several plans gave. `plan_path` is None when one of them is missing; then no bundle is written."""

    plan_path: Path | None
    report_path: Path
    summary: Mapping[str, Any]
    lines: tuple[str, ...]  # the verdict, a line for each thing that it says
    outcomes: tuple[TuneOutcome, ...]
    notes: tuple[str, ...] = ()
    use: str = ""  # what to type to run it


class Prefixed:
    """Progress of one part of a larger work."""

    def __init__(self, progress: Progress, prefix: str) -> None:
        self._progress, self._prefix = progress, prefix

    def phase(self, text: str) -> None:
        """Pass on, with the part's name."""
        self._progress.phase(f"{self._prefix}: {text}")

    def detail(self, text: str, *, best: str = "", left_s: float | None = None) -> None:
        """Pass on."""
        self._progress.detail(text, best=best, left_s=left_s)

    def note(self, text: str) -> None:
        """Pass on, with the part's name."""
        self._progress.note(f"{self._prefix}: {text}")

    def close(self) -> None:
        """Nothing: the whole is closed once."""


def summed(outcomes: Sequence[TuneOutcome]) -> dict[str, int]:
    """Return the probes of all tunings."""
    return {name: sum(each.summary["probes"][name] for each in outcomes) for name in ("measured", "reused", "refused", "failed")}


def report_beside(output: Path) -> Path:
    """Return where a report goes that has no bundle to lie in."""
    return output.absolute().with_name(f"{output.absolute().name.removesuffix('.aivmm')}.report.html")
