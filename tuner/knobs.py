"""Which knobs can matter for a model on this machine: with few trials, one that cannot is a trial lost."""

from __future__ import annotations

from collections.abc import Sequence

import psutil

from aivmm.models.records import Structure
from aivmm.runtime.config import Knob
from aivmm.runtime.target import Target

_FEW_ALIVE = 1  # tensors at a cut: one, and nothing runs beside what made it
_CONVOLUTIONS = frozenset({"Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "FusedConv"})
_OF_CONVOLUTIONS = ("prefer_nhwc", "cudnn_conv_algo_search", "fuse_conv_bias")
_OF_NEIGHBOURS = ("session.intra_op.allow_spinning", "session.force_spinning_stop", "ENABLE_CPU_PINNING")


def that_can_matter(knobs: Sequence[Knob], target: Target, structure: Structure) -> list[Knob]:
    """Return the knobs of a target without those that change nothing for this model here."""
    return [each for each in knobs if not _idle(each.name, target, structure)]


def _idle(name: str, target: Target, structure: Structure) -> bool:
    if name == "ENABLE_HYPER_THREADING":
        return bool(psutil.cpu_count(logical=False) == psutil.cpu_count())
    if name == "execution_mode":
        return is_chain(structure)
    if name in _OF_NEIGHBOURS:
        return target.device.cores == 1  # there is one thread, and it waits for nobody
    if name.endswith(_OF_CONVOLUTIONS):
        return not any(each.op_type in _CONVOLUTIONS for each in structure.operators)
    return False


def is_chain(structure: Structure) -> bool:
    """Say whether the nodes run one behind the other in any case: each boundary between two is a cut with one tensor alive."""
    alone = {cut.position for cut in structure.cut_points if len(cut.tensors) <= _FEW_ALIVE}
    return alone >= set(range(1, structure.node_count)) and not any(each.op_type in ("If", "Loop", "Scan") for each in structure.operators)
