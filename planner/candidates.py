"""A candidate: one way to run the whole model that the search may try, and how it came out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from aivmm.runtime.config import Config
from aivmm.runtime.target import Target

MOST_REPLICAS = 4  # of one model on one target that are tried


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How a model may be cut. Where the cuts lie is no part of it: the exact placement answers that (`planner.policy`)."""

    targets: tuple[tuple[Target, Config], ...]  # that may take part, each with the config it would run
    most_pieces: int
    cut_price: float = 1.0  # times what a cut is thought to cost: above 1, fewer cuts are taken on trust
    contiguous: bool = True  # each target has one piece at most

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON takes it."""
        return {
            "targets": {str(target): config.key() for target, config in self.targets},
            "most_pieces": self.most_pieces,
            "cut_price": self.cut_price,
            "contiguous": self.contiguous,
        }

    def __str__(self) -> str:
        names = " + ".join(str(target) + ("" if config == Config() else f" {config}") for target, config in self.targets)
        kind = "one piece each" if self.contiguous else "any pieces"
        return f"{names}, at most {self.most_pieces} pieces, {kind}, a cut at {self.cut_price:g} times its price"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """The model on one target with one config, `batch` samples a call, `callers` calls in flight; or, with a `policy`, cut by it.

    With a policy `target` and `config` are the first of its own. `depth` is how many samples are inside a pipeline of stages at once,
    `replicas` how many copies of the whole run side by side.
    """

    target: Target
    config: Config
    batch: int = 1
    callers: int = 1
    policy: Policy | None = None
    depth: int = 1
    replicas: int = 1

    @property
    def key(self) -> str:
        """Text that is equal for equal candidates."""
        parts: list[Any] = [str(self.target), self.config.key(), self.batch, self.callers]
        if self.policy is not None or self.depth > 1 or self.replicas > 1:
            parts += [self.policy and self.policy.as_json(), self.depth, self.replicas]
        return json.dumps(parts, sort_keys=True)

    def how(self) -> dict[str, Any] | None:
        """Return policy, depth and replicas as JSON takes them, as far as they say something; None where they do not."""
        counts = {"depth": self.depth, "replicas": self.replicas}
        found = (self.policy.as_json() if self.policy else {}) | {name: count for name, count in counts.items() if count > 1}
        return found or None

    def __str__(self) -> str:
        text = str(self.target) + ("" if self.config == Config() else f" {self.config}") if self.policy is None else str(self.policy)
        counts = {"batch": self.batch, "depth": self.depth}
        extra = [f"{name} {count}" for name, count in counts.items() if count > 1]
        extra += [f"{count} {name}" for name, count in (("callers", self.callers), ("replicas", self.replicas)) if count > 1]
        return ", ".join([text, *extra])


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """A piece's blocks again, on another target or with another config.

    `weight` is each replica's part of the requests in flight; `share` the part of those answered that its replicas are to take.
    """

    target: Target
    config: Config
    replicas: int = 1
    weight: float = 1.0
    share: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A run of blocks, both ends included, on one target: a stage before anything is written.

    It may be there in several `replicas`, and elsewhere in `copies`: each request goes through one of them. See `Copy`.
    """

    target: Target
    config: Config
    first: int
    last: int
    replicas: int = 1
    weight: float = 1.0
    share: float | None = None
    copies: tuple[Copy, ...] = ()

    def everywhere(self) -> tuple[Copy, ...]:
        """Return all that runs these blocks, the piece's own target first."""
        own = Copy(target=self.target, config=self.config, replicas=self.replicas, weight=self.weight, share=self.share)
        return (own, *self.copies)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A plan before it is written: its pieces in order, and how it is called."""

    name: str
    pieces: tuple[Piece, ...]
    batch: int = 1
    callers: int = 1
    mode: Literal["sequential", "pipelined"] = "sequential"  # pipelined: its stages run at once, each on another request
    depth: int = 3  # pipelined: requests in flight for each stage and replica

    @classmethod
    def whole(cls, name: str, candidate: Candidate, blocks: int) -> Draft:
        """Return the uncut draft of a candidate."""
        piece = Piece(target=candidate.target, config=candidate.config, first=0, last=blocks - 1, replicas=candidate.replicas)
        return cls(name=name, pieces=(piece,), batch=candidate.batch, callers=candidate.callers)

    @property
    def targets(self) -> str:
        """The targets by name, each once, joined for people."""
        return " + ".join(map(str, self.all_targets))

    @property
    def all_targets(self) -> tuple[Target, ...]:
        """The targets, each once, in order."""
        return tuple(dict.fromkeys(each.target for piece in self.pieces for each in piece.everywhere()))

    @property
    def all_configs(self) -> tuple[Config, ...]:
        """What everything is compiled with, in order."""
        return tuple(each.config for piece in self.pieces for each in piece.everywhere())

    @property
    def lowered(self) -> str | None:
        """The first lowered form of the model that it runs anywhere, copies included; None where it runs none."""
        return next((each.lowered for each in self.all_configs if each.lowered), None)


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
    metrics: Mapping[str, float] = field(default_factory=dict)  # by the names that constraints use, in SI units


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """Why a candidate has no score."""

    state: str  # "refused" by the runtime, "failed" in a crash, "pruned" as hopeless or outside the limits
    reason: str
    seconds: float = 0.0
    reused: bool = False
    ratio: float | None = None
    median_s: float | None = None
