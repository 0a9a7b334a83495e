"""Segments in their place: timed between their neighbours as the engine runs them, and alone, since isolated times do not add up."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from statistics import fmean, median
from typing import Any

from aivmm.errors import AivmmError
from aivmm.planner.candidates import Draft, Piece
from aivmm.probes.accuracy import over_limit
from aivmm.probes.client import Worker, WorkerDied, compile_limit_s, run_limit_s
from aivmm.probes.machine import measuring, wait_until_quiet
from aivmm.probes.race import Contestant
from aivmm.probes.records import ProbeKey, Samples
from aivmm.runtime.environment import environment_of

# Rounds of the chain, its segments alone, and the reference: probe and proof lie minutes apart, and only what is measured beside the same
# thing can be compared.
_ROUNDS, _SECONDS, _REFERENCE_S = 6, 0.06, 0.04
Span = tuple[int, int, str]  # first block, last block, target


@dataclass(frozen=True, slots=True, kw_only=True)
class InPlace:
    """One segment of a cut plan: what it takes between its neighbours, hand-over included, and what it takes alone.

    `ratio` is its time in its place over that of the reference executable, measured in turn with it, and `sigma` the standard error of the
    ratio's logarithm; None where there was no reference. `engine_s` is what a call of the engine takes beyond all of the chain's segments.
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
        beside = {} if self.ratio is None else {"reference_ratio": self.ratio, "reference_sigma": self.sigma}
        return {**beside, "engine_s": self.engine_s, "look": float(self.look)}

    @classmethod
    def recalled(cls, piece: Piece, placed: Samples, alone: Samples, metrics: Mapping[str, float]) -> InPlace:
        """Return what was stored."""
        ratio, sigma = metrics.get("reference_ratio"), metrics.get("reference_sigma", 0.0)
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
    rounds: list[tuple[list[dict[str, Any]], float | None]] = []
    beyond: list[float] = []
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
            for _ in range(_ROUNDS):
                beside = None
                for pid in others:
                    wait_until_quiet(pid)
                with measuring():
                    answer = worker.call("stages", limit_s=run_limit_s(), name="engine", inputs=str(sample), seconds=_SECONDS)
                    if reference is not None:
                        wait_until_quiet(worker.pid)
                        timed = reference.worker.call(
                            "timed", limit_s=run_limit_s(), name=reference.name, seconds=_REFERENCE_S, least=5, settle=2
                        )
                        beside = median(timed["durations"])
                rounds.append((answer["stages"], beside))
                beyond.append(median(answer["called"]) - sum(median(each["placed"]) for each in answer["stages"]))
        except WorkerDied as died:
            return died.reason
        except AivmmError as error:
            return error.message
    engine_s = max(0.0, median(beyond))
    return [
        replace(_of_rounds(piece, [(stages[index], beside) for stages, beside in rounds]), engine_s=engine_s)
        for index, piece in enumerate(draft.pieces)
    ]


def _problem(loaded: Mapping[str, Any], cosine_limit: float | None) -> str:
    """Say what is wrong with the outputs of a loaded plan, where they were compared; or ""."""
    accuracy = loaded.get("accuracy")
    if accuracy is None or loaded["problem"] or cosine_limit is None or "cosine" not in accuracy:
        return str(loaded.get("problem") or "")
    return over_limit(accuracy["cosine"], accuracy.get("relative_l2", math.inf), cosine_limit)


def _of_rounds(piece: Piece, rounds: Sequence[tuple[Mapping[str, Sequence[float]], float | None]]) -> InPlace:
    """Put together what the rounds say of one segment."""

    def samples(name: str) -> Samples:
        return Samples(
            timed_s=tuple(each for stage, _ in rounds for each in stage[name]),
            rounds=tuple(number for number, (stage, _) in enumerate(rounds) for _ in stage[name]),
        )

    logs = [math.log(median(stage["placed"]) / beside) for stage, beside in rounds if beside is not None]
    ratio, sigma = None, 0.0
    if logs:
        ratio = math.exp(median(logs))
        spread = math.sqrt(fmean((each - fmean(logs)) ** 2 for each in logs) * len(logs) / max(1, len(logs) - 1))
        sigma = 1.2533 * spread / math.sqrt(len(logs))
    return InPlace(piece=piece, placed=samples("placed"), alone=samples("alone"), ratio=ratio, sigma=sigma)


def _joined(parts: Sequence[Samples]) -> Samples:
    """Return the samples of several measurements, their rounds counted on."""
    rounds: list[int] = []
    for each in parts:
        after = max(rounds, default=-1) + 1
        rounds += [after + number for number in each.rounds]
    return Samples(timed_s=tuple(chain.from_iterable(each.timed_s for each in parts)), rounds=tuple(rounds))


def chain_digest(draft: Draft, structures: Sequence[str], reference: str = "") -> str:
    """Return what tells the neighbours, in whose caches and threads a segment ran, and the reference beside it."""
    parts = [*structures, *(f"{each.target} {each.config.digest()}" for each in draft.pieces), reference]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
