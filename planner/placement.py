"""A model's blocks as a placement problem (`problem`): one node a block, one choice a target, one edge a tensor that a later block reads.

A chain of runs (`lazy`) prices a boundary by what the block before it hands to the block behind it. Blocks of a model with branches read
from several blocks before them, and then only the graph says which tensors move where. Its solver is exact for that, with the memory of
devices for limits, but it knows costs of blocks only: what it finds is measured like any other plan, and competes with the chain's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

from aivmm.models.records import Structure
from aivmm.planner.problem import Choice, Edge, Move, Node, Place, PlacedDevice, Problem
from aivmm.planner.segments import Segments
from aivmm.runtime.target import Target

Crossing = Callable[[str, str, int], float]  # source, destination, bytes -> seconds
_PROBE_BYTES = 1 << 20


def problem_of(structure: Structure, targets: Sequence[Target], beliefs: Mapping[str, Segments], crossing_s: Crossing) -> Problem:
    """Return the problem of placing the blocks, in seconds of one call.

    A block costs what it is believed to add to a segment that runs on from the block before it. A tensor whose size is not known before the
    run counts as nothing. `block_bytes` count against a device's memory where that is known.
    """
    devices = {str(target): device_of(target) for target in targets}
    memory = dict.fromkeys(devices.values(), math.inf)
    for target in targets:
        if target.device.memory_bytes is not None:
            memory[devices[str(target)]] = float(target.device.memory_bytes)
    added = {name: belief.added() for name, belief in beliefs.items()}
    nodes = [
        Node(
            id=str(block.index),
            costs={name: float(costs[block.index]) for name, costs in added.items() if math.isfinite(costs[block.index])},
            memory_bytes=held,
        )
        for block, held in zip(structure.blocks, block_bytes(structure), strict=True)
    ]
    return Problem(
        devices=[PlacedDevice(name=name, memory_bytes=size) for name, size in memory.items()],
        choices=[Choice(name=name, target=name, device=device) for name, device in devices.items()],
        nodes=nodes,
        edges=edges_of(structure),
        transfers={(a, b): _move(a, b, crossing_s) for a, b in itertools.permutations(devices, 2)},
    )


def block_bytes(structure: Structure) -> list[float]:
    """Return what each block takes of a device's memory at least: its weights, and what it hands on."""
    return [float(block.weight_bytes + sum(each.nbytes or 0 for each in block.outputs)) for block in structure.blocks]


def edges_of(structure: Structure) -> list[Edge]:
    """Return an edge for each tensor and each later block that reads it."""
    maker: dict[str, int] = {}
    edges = []
    for block in structure.blocks:
        for each in block.inputs:
            if each.name in maker:
                edges.append(Edge(source=str(maker[each.name]), reader=str(block.index), bytes=float(each.nbytes or 0), tensor=each.name))
        maker |= {each.name: block.index for each in block.outputs}
    return edges


def runs_of(structure: Structure, assignment: Mapping[str, Place]) -> list[tuple[int, int, str]]:
    """Return an assignment of blocks as runs of the order that they are in: (first block, last block, choice)."""
    chosen = [assignment[str(block.index)].choice for block in structure.blocks]
    found: list[tuple[int, int, str]] = []
    for name, run in itertools.groupby(range(len(chosen)), key=chosen.__getitem__):
        places = list(run)
        found.append((places[0], places[-1], name))
    return found


def device_of(target: Target) -> str:
    """Return what tells the device of a target: several runtimes run on one CPU."""
    device = target.device
    return " ".join(filter(None, (device.kind, device.model, device.uid)))


def _move(source: str, destination: str, crossing_s: Crossing) -> Move:
    fixed = crossing_s(source, destination, 0)
    return Move(fixed=fixed, per_byte=max(0.0, crossing_s(source, destination, _PROBE_BYTES) - fixed) / _PROBE_BYTES)
