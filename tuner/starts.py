"""Where a search looks first: at what is often best on a kind of device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from aivmm.planner.candidates import Candidate
from aivmm.planner.space import Space
from aivmm.runtime.config import Config
from aivmm.runtime.environment import environment_of
from aivmm.runtime.null import NullBackend
from aivmm.runtime.target import Target
from aivmm.tuner.narrow import sharing
from aivmm.tuner.room import most_replicas
from aivmm.tuner.work import Work

_LOADS = ((64, 4), (128, 8), (32, 8), (128, 4))  # (batch, callers) that keep a card busy, in the order to try them
_ON_A_CARD = max(callers for _, callers in _LOADS)
_THREADS = frozenset({"INFERENCE_NUM_THREADS", "intra_op_num_threads", "threads"})


def promising(space: Space, precisions: Mapping[Target, Sequence[str | None]], variants: Mapping[str, Sequence[str]]) -> list[Candidate]:
    """Return where devices with memory of their own are at their best more often than not, to be looked at first.

    That is with all of the knobs' promising values, in each precision, the lowered ones first; for throughput at the larger batches with
    several callers, whose copies hide behind each other's work.
    """
    found = []
    loads: tuple[tuple[int, int], ...] = ((space.batches[0], 1),)
    if space.objective == "throughput":
        loads = tuple(each for each in _LOADS if each[0] in space.batches)
        # A model of one batch keeps a card busy by its callers alone.
        loads = loads or tuple((space.batches[-1], callers) for _, callers in _LOADS[:2])
    for batch, callers in loads:
        for target, known in precisions.items():
            knobs = [each for each in space.knobs_of(target) if each.promising is not None] if target.device.memory_bytes else []
            if not knobs or callers > space.most_callers:
                continue
            config = {each.name: each.promising for each in knobs if each.promising is not None}
            lowered = list(variants.get(str(target), ()))
            ordered = [*lowered, *(each for each in known if each not in lowered)]
            found += [Candidate(target=target, config=Config.of(config, precision=each), batch=batch, callers=callers) for each in ordered]
    return found


def most_callers(target: Target) -> int:
    """Return how many callers at most a search tries on a target: two for each core; on a card as many as can be promising there."""
    return _ON_A_CARD if target.device.memory_bytes and target.device.kind != "cpu" else 2 * (target.device.cores or 2)


def can_be_replicated(target: Target) -> bool:
    """Say whether replicas of a whole model on a target are points of the search: on a processor, whose cores they share.

    On a card a replica costs memory and minutes of compiling; there `tuner.copying` decides, by what copies were seen to cost each other.
    Null devices take as long for a call whatever runs beside it.
    """
    return target.device.kind == "cpu" and target.name == "CPU" and target.runtime != NullBackend.name and most_replicas(target) > 1


def side_by_side(space: Space, precisions: Mapping[Target, Sequence[str | None]]) -> list[Candidate]:
    """Return replicas that divide a processor's cores among them, as many as may be: what one call cannot use, several can."""
    found = []
    for target, known in precisions.items():
        replicas = min(space.replicas_of(target), space.most_callers)
        threads = next((each for each in space.knobs_of(target) if each.name in _THREADS), None)
        if replicas < 2 or threads is None:
            continue
        share = max(int(threads.low), 1, (target.device.cores or replicas) // replicas)
        config = Config.of(sharing(space.knobs_of(target), share) or {}, precision=known[0])
        found.append(Candidate(target=target, config=config, batch=space.batches[0], callers=replicas, replicas=replicas))
    return found


def of_similar_models(work: Work, targets: Sequence[Target], batches: Sequence[int], *, most_callers: int) -> list[Candidate]:
    """Return the best found for models like this one on these targets as they are now, at its batch where that is searched."""
    known = {environment_of(target).fingerprint: target for target in targets}
    found = work.database.best_of_similar(work.subject.structure, list(known), objective=work.options.objective)
    if found:
        names = ", ".join(dict.fromkeys(each.model for each in found))
        work.note(f"the search tries first what was best for {names}")
    return [
        Candidate(
            target=known[each.environment],
            config=each.config,
            batch=each.batch if each.batch in batches else batches[0],
            callers=min(each.callers, most_callers),
            replicas=each.replicas,
        )
        for each in found
    ]
