"""Segments in their place: timed between their neighbours as the engine runs them, and alone, since isolated times do not add up."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from aivmm.errors import AivmmError
from aivmm.planner.candidates import Draft, Piece
from aivmm.probes.client import Worker, WorkerDied, compile_limit_s, run_limit_s
from aivmm.probes.machine import measuring, wait_until_quiet
from aivmm.probes.records import ProbeKey, Samples
from aivmm.runtime.environment import environment_of

_SECONDS = 0.3  # for the whole chain, and again for its segments alone
Span = tuple[int, int, str]  # first block, last block, target


@dataclass(frozen=True, slots=True, kw_only=True)
class InPlace:
    """One segment of a cut plan: what it takes between its neighbours, hand-over included, and what it takes alone."""

    piece: Piece
    placed: Samples
    alone: Samples

    @property
    def span(self) -> Span:
        """Which blocks on which target."""
        return self.piece.first, self.piece.last, str(self.piece.target)

    @property
    def difference(self) -> float:
        """How much longer it takes in its place: 0.1 is 10 % longer."""
        return self.placed.median_s / self.alone.median_s - 1

    @staticmethod
    def keys(index: int, draft: Draft, structures: Sequence[str]) -> tuple[ProbeKey, ProbeKey]:
        """Return what the segment `index` of a draft is known by in the database: alone, and in its place."""
        piece = draft.pieces[index]

        def key(subject: str) -> ProbeKey:
            return ProbeKey(
                kind="segment",
                subject=subject,
                target=str(piece.target),
                environment=environment_of(piece.target).fingerprint,
                config=piece.config,
                batch=draft.batch,
            )

        chain = chain_digest(draft, structures)
        return key(f"{structures[index]} alone in {chain}"), key(f"{structures[index]} in {chain}")

    def __str__(self) -> str:
        where = f"block {self.piece.first}" if self.piece.first == self.piece.last else f"blocks {self.piece.first} to {self.piece.last}"
        more = f"{abs(self.difference):.0%} {'more' if self.difference >= 0 else 'less'}"
        placed, alone = (f"{each.median_s * 1e3:.3g} ms" for each in (self.placed, self.alone))
        return f"{where} on {self.piece.target}: {placed} between its neighbours, {alone} alone ({more})"


def probe_in_place(draft: Draft, bundle: Path, *, sample: Path, others: Sequence[int] = ()) -> list[InPlace] | str:
    """Load the written cut plan with the engine in a worker of its own and time its segments; or say why that was not possible.

    `others` are the processes that have to be quiet first.
    """
    with Worker("segments in place") as worker:
        try:
            worker.call(
                "load_bundle", limit_s=compile_limit_s(), run_limit_s=run_limit_s(), name="engine", bundle=str(bundle), inputs=str(sample)
            )
            for pid in others:
                wait_until_quiet(pid)
            with measuring():
                answer = worker.call("stages", limit_s=run_limit_s(), name="engine", inputs=str(sample), seconds=_SECONDS)
        except WorkerDied as died:
            return died.reason
        except AivmmError as error:
            return error.message
    return [
        InPlace(piece=piece, placed=Samples(timed_s=tuple(each["placed"])), alone=Samples(timed_s=tuple(each["alone"])))
        for piece, each in zip(draft.pieces, answer["stages"], strict=True)
    ]


def chain_digest(draft: Draft, structures: Sequence[str]) -> str:
    """Return what tells the neighbours, in whose caches and threads a segment ran."""
    parts = [*structures, *(f"{each.target} {each.config.digest()}" for each in draft.pieces)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
