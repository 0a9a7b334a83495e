"""The layout of blocks: cut where the user asks, and around what a target refuses or computes wrong, so that it can have the rest."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from aivmm.errors import UsageError
from aivmm.models.pieces import cut_around
from aivmm.models.records import Structure
from aivmm.runtime.target import Target
from aivmm.tuner.anatomy import WRONG, Anatomist
from aivmm.tuner.miscalculations import Miscalculations
from aivmm.tuner.refusals import Refusals
from aivmm.tuner.work import Work

Stop = Callable[[], bool]


def cut_as_asked(structure: Structure, model: Path, asked: Collection[str]) -> Structure:
    """Return `structure`, that of the prepared `model`, cut around the nodes that `asked` means: operator types, or names of nodes.

    Raises:
        UsageError: one of them means no node.
    """
    apart: set[str] = set()
    for each in asked:
        meant = {node for operator in structure.operators for node in operator.nodes if each in (operator.op_type, node)}
        if not meant:
            known = ", ".join(sorted({operator.op_type for operator in structure.operators}))
            raise UsageError(f"--cut-around {each!r} is neither an operator of the model nor a node's name", advice=f"it has {known}")
        apart |= meant
    return cut_around(model, structure, apart) if apart else structure


def cut_around_refused(work: Work, target: Target, reason: str, stop: Stop) -> None:
    """Find what `target` refuses of a model that it refuses as a whole, for `reason`, and cut the blocks around that.

    Where there is no time to ask it even once, nothing is claimed: it may have refused the whole for its size.
    """
    if stop():
        work.note(f"there was no time to look for what {target} refuses; raise --budget")
        return
    work.progress.phase(f"looking for what {target} refuses")
    subject = work.subject
    search = Refusals(work.lab, target, subject.path, subject.structure, work.folder / "refusals", stop=stop)
    refused = search.find(reason)
    for run in refused:
        work.note(f"{target} refuses {run.described(f'found in {search.compiles} compiles')}: {run.reason}")
    _lay_out(work, {name for run in refused for name in run.nodes})


def cut_around_wrong(work: Work, anatomist: Anatomist, stop: Stop) -> bool:
    """Find what within a block is computed wrong, and cut the blocks around that; say whether that changed them."""
    before = work.subject.structure
    apart: set[str] = set()
    for target in work.targets:
        found = {index: why for (index, name), why in anatomist.wrong.items() if name == str(target) and why.startswith(WRONG)}
        several = [block for block in before.blocks if block.index in found and block.last > block.first]
        if not several or len(work.targets) < 2:
            continue
        work.progress.phase(f"looking for what {target} computes wrong")
        search = Miscalculations(
            work.lab,
            target,
            work.subject.path,
            before,
            work.folder / f"wrong-{len(apart)}",
            trusted=work.subject.reference_order(),
            stop=stop,
        )
        try:
            for block, inputs in ((block, path) for block in several if (path := anatomist.inputs_of(block))):
                for run in search.within(block, inputs, found[block.index]):
                    work.note(f"{target} computes {run.described(f'found in {search.trials} trials')} wrong: {run.reason}")
                    apart |= set(run.nodes)
        finally:
            search.close()
    _lay_out(work, apart)
    return work.subject.structure != before


def _lay_out(work: Work, apart: Collection[str]) -> None:
    subject = work.subject
    before = subject.structure
    work.lay_out(cut_around(subject.path, before, apart) if apart else before)
    if subject.structure.pieces != before.pieces:
        work.note(f"the model is cut along its branches into {len(subject.structure.pieces)} pieces around that")
