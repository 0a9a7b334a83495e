"""A candidate: one way to run the whole model that the search may try, and how it came out."""

from __future__ import annotations

import json
from dataclasses import dataclass

from aivmm.runtime.config import Config
from aivmm.runtime.target import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """The model on one target with one config, `batch` samples a call, `callers` calls in flight."""

    target: Target
    config: Config
    batch: int = 1
    callers: int = 1

    @property
    def key(self) -> str:
        """Text that is equal for equal candidates."""
        return json.dumps([str(self.target), self.config.key(), self.batch, self.callers])

    def __str__(self) -> str:
        text = str(self.target) + ("" if self.config == Config() else f" {self.config}")
        extra = [f"batch {self.batch}"] * (self.batch > 1) + [f"{self.callers} callers"] * (self.callers > 1)
        return ", ".join([text, *extra])


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A run of blocks, both ends included, on one target: a stage before anything is written."""

    target: Target
    config: Config
    first: int
    last: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A plan before it is written: its pieces in order, and how it is called."""

    name: str
    pieces: tuple[Piece, ...]
    batch: int = 1
    callers: int = 1

    @classmethod
    def whole(cls, name: str, candidate: Candidate, blocks: int) -> Draft:
        """Return the uncut draft of a candidate."""
        piece = Piece(target=candidate.target, config=candidate.config, first=0, last=blocks - 1)
        return cls(name=name, pieces=(piece,), batch=candidate.batch, callers=candidate.callers)

    @property
    def targets(self) -> str:
        """The targets by name, each once, joined for people."""
        return " + ".join(dict.fromkeys(str(piece.target) for piece in self.pieces))


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The time per sample of a candidate over the reference's, of one race: below 1 is faster. `low` and `high` bound it with 95 %."""

    ratio: float
    low: float
    high: float
    median_s: float  # of one call
    cosine: float | None = None
    reused: bool = False
    seconds: float = 0.0  # spent on it


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """Why a candidate has no score."""

    state: str  # "refused" by the runtime, "failed" in a crash, "pruned" as hopeless or outside the limits
    reason: str
    seconds: float = 0.0
    reused: bool = False
    ratio: float | None = None
    median_s: float | None = None
