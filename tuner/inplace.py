"""Segments in their place: timed between their neighbours as the engine runs them, and alone, since isolated times do not add up.

What is raced against the reference is the whole chain, as the proof will race it: blocks of a few calls in turn, the other process frozen.
Each segment has its share of that, by the middle half of the calls. Medians of segments do not add up: where threads come to lie, one
segment is slow in the very calls in which another one is fast (docs/decisions/0057).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from aivmm.errors import AivmmError
from aivmm.planner.candidates import Draft, Piece
from aivmm.probes.accuracy import over_limit
from aivmm.probes.client import Worker, WorkerDied, compile_limit_s, run_limit_s
from aivmm.probes.compare import Comparison, compare
from aivmm.probes.machine import measuring, wait_until_quiet
from aivmm.probes.race import Contestant, by_of, known_well, race
from aivmm.probes.records import ProbeKey, Samples
from aivmm.runtime.environment import environment_of
from aivmm.tuner.measure import fresh

# Of the race against the reference: probe and proof lie minutes apart, and only what is measured beside the same thing can be compared.
_LEAST_ROUNDS, _MOST_ROUNDS, _RACE_S = 8, 60, 1.2
_ALONE_S = 0.1
Span = tuple[int, int, str]  # first block, last block, target


@dataclass(frozen=True, slots=True, kw_only=True)
class InPlace:
    """One segment of a cut plan: what it takes between its neighbours, hand-over included, and what it takes alone.

    `ratio` is its share of what the whole chain takes, over the time of the reference executable that took turns with it, and `sigma` the
    standard error of the ratio's logarithm, which all segments of a chain have in common; None where there was no reference. `engine_s` is
    what a call of the engine takes beyond all of the chain's segments.
    `look` counts the measurements of this chain in one run: rows that belong together are the newest `look` ones.
    """

    piece: Piece
    placed: Samples
    alone: Samples
    ratio: float | None = None
    sigma: float = 0.0
    engine_s: float = 0.0
    look: int = 1

    @property
    def span(self) -> Span:
        """Which blocks on which target."""
        return self.piece.first, self.piece.last, str(self.piece.target)

    @property
    def difference(self) -> float:
        """How much longer it takes in its place: 0.1 is 10 % longer."""
        return self.placed.median_s / self.alone.median_s - 1

    def metrics(self) -> dict[str, float]:
        """Return what is stored beside the samples in its place; see `recalled`."""
        beside = {} if self.ratio is None else {"share_ratio": self.ratio, "share_sigma": self.sigma}
        return {**beside, "engine_s": self.engine_s, "look": float(self.look)}

    @classmethod
    def recalled(cls, piece: Piece, placed: Samples, alone: Samples, metrics: Mapping[str, float]) -> InPlace:
        """Return what was stored."""
        ratio, sigma = metrics.get("share_ratio"), metrics.get("share_sigma", 0.0)
        look = int(metrics.get("look", 1))
        return cls(piece=piece, placed=placed, alone=alone, ratio=ratio, sigma=sigma, engine_s=metrics.get("engine_s", 0.0), look=look)

    @classmethod
    def of_looks(cls, looks: Sequence[InPlace]) -> InPlace:
        """Return what several measurements of one segment say together: all their samples, and the mean ratio by how sure each is.

        Where one does not say how sure it is, the newest counts. `looks` are in the order of time.
        """
        newest = looks[-1]
        if len(looks) == 1:
            return newest
        ratio, sigma = newest.ratio, newest.sigma
        if all(each.ratio and each.sigma for each in looks):
            weights = [each.sigma**-2 for each in looks]
            mean = sum(weight * math.log(each.ratio or 1.0) for weight, each in zip(weights, looks, strict=True)) / sum(weights)
            ratio, sigma = math.exp(mean), sum(weights) ** -0.5
        return cls(
            piece=newest.piece,
            placed=_joined([each.placed for each in looks]),
            alone=_joined([each.alone for each in looks]),
            ratio=ratio,
            sigma=sigma,
            engine_s=median(each.engine_s for each in looks),
            look=newest.look,
        )

    @staticmethod
    def keys(index: int, draft: Draft, structures: Sequence[str], reference: str = "") -> tuple[ProbeKey, ProbeKey]:
        """Return what the segment `index` of a draft is known by in the database: alone, and in its place.

        `reference` tells the executable that its time is a ratio to.
        """
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

        chain = chain_digest(draft, structures, reference)
        return key(f"{structures[index]} alone in {chain}"), key(f"{structures[index]} in {chain}")

    def __str__(self) -> str:
        where = f"block {self.piece.first}" if self.piece.first == self.piece.last else f"blocks {self.piece.first} to {self.piece.last}"
        more = f"{abs(self.difference):.0%} {'more' if self.difference >= 0 else 'less'}"
        placed, alone = (f"{each.median_s * 1e3:.3g} ms" for each in (self.placed, self.alone))
        return f"{where} on {self.piece.target}: {placed} between its neighbours, {alone} alone ({more})"


def probe_in_place(
    draft: Draft,
    bundle: Path,
    *,
    sample: Path,
    others: Sequence[int] = (),
    reference: Contestant | None = None,
    expected: Path | None = None,
    cosine_limit: float | None = None,
) -> list[InPlace] | str:
    """Load the written cut plan with the engine in a worker of its own and time its segments; or say why that was not possible.

    `others` are the processes that have to be quiet first. `reference` is loaded elsewhere, and takes turns. Where
    `expected` outputs are given, what is too far from them is a reason too.
    """
    with Worker("segments in place") as worker:
        try:
            loaded = worker.call(
                "load_bundle",
                limit_s=compile_limit_s(),
                run_limit_s=run_limit_s(),
                name="engine",
                bundle=str(bundle),
                inputs=str(sample),
                reference=str(expected or ""),
            )
            if problem := _problem(loaded, cosine_limit):
                return problem
            for pid in others:
                wait_until_quiet(pid)
            mine = Contestant("engine", worker, batch=draft.batch, expected_s=loaded["first_inference_s"], keep=True)
            beside = None if reference is None else fresh(reference)
            _race(mine, beside)
            if mine.failed is not None:
                return mine.failed.reason
            with measuring():
                for pid in others:
                    wait_until_quiet(pid)
                answer = worker.call("stages", limit_s=run_limit_s(), name="engine", seconds=_ALONE_S)
        except WorkerDied as died:
            return died.reason
        except AivmmError as error:
            return error.message
    return _shared_out(draft, answer, mine, beside)


def _race(mine: Contestant, beside: Contestant | None) -> None:
    """Race the chain against the reference until their ratio is known well, or the time is over."""

    both = [mine] if beside is None else [mine, beside]
    for each in both:
        each.keep = True  # never hopeless: how slow it is is the question
    race(both[::-1], budget_s=_RACE_S, least_rounds=_LEAST_ROUNDS, most_rounds=_MOST_ROUNDS, enough=known_well(both[::-1]))


def _compared(mine: Contestant, beside: Contestant | None) -> Comparison | None:
    """Compare a call of the chain with one of the reference; None where one of them was not timed."""
    chain, reference = mine.samples(), beside.samples() if beside is not None and beside.failed is None else None
    if chain is None or reference is None or beside is None:
        return None
    return compare(chain, reference, by=by_of(mine, beside))


def _shared_out(draft: Draft, answer: Mapping[str, Any], mine: Contestant, beside: Contestant | None) -> list[InPlace]:
    """Share out what the chain takes among its segments, and what is the engine's own."""
    found = _compared(mine, beside)
    sigma = 0.0 if found is None else math.log(found.high / found.low) / (2 * 1.96)
    engine_s = max(0.0, median(answer["beyond"]))
    middle_s = middle_half([stage["placed"] for stage in answer["stages"]])
    total_s = math.fsum(middle_s) + engine_s
    return [
        InPlace(
            piece=piece,
            placed=Samples(timed_s=tuple(stage["placed"])),
            alone=Samples(timed_s=tuple(stage["alone"])),
            ratio=None if found is None else found.ratio * seconds / total_s,
            sigma=sigma,
            engine_s=engine_s,
        )
        for piece, stage, seconds in zip(draft.pieces, answer["stages"], middle_s, strict=True)
    ]


def middle_half(stages: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean seconds of each stage in the calls whose sum over all stages is in the middle half; `stages` are of the same calls.

    Means add up, as medians do not; and what disturbs a call lies outside.
    """
    table = np.array(stages)
    order = np.argsort(table.sum(axis=0), kind="stable")
    count = len(order)
    kept = order[count // 4 : max(count // 4 + 1, count - count // 4)]
    return [float(each) for each in table[:, kept].mean(axis=1)]


def _problem(loaded: Mapping[str, Any], cosine_limit: float | None) -> str:
    """Say what is wrong with the outputs of a loaded plan, where they were compared; or ""."""
    accuracy = loaded.get("accuracy")
    if accuracy is None or loaded["problem"] or cosine_limit is None or "cosine" not in accuracy:
        return str(loaded.get("problem") or "")
    return over_limit(accuracy["cosine"], accuracy.get("relative_l2", math.inf), cosine_limit)


def _joined(parts: Sequence[Samples]) -> Samples:
    """Return the samples of several measurements, their rounds counted on; one that has none is one round."""
    rounds: list[int] = []
    for each in parts:
        after = max(rounds, default=-1) + 1
        rounds += [after + number for number in each.rounds or (0,) * len(each.timed_s)]
    return Samples(timed_s=tuple(chain.from_iterable(each.timed_s for each in parts)), rounds=tuple(rounds))


def chain_digest(draft: Draft, structures: Sequence[str], reference: str = "") -> str:
    """Return what tells the neighbours, in whose caches and threads a segment ran, and the reference beside it."""
    parts = [*structures, *(f"{each.target} {each.config.digest()}" for each in draft.pieces), reference]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
