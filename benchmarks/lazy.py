"""How few segments have to be measured for the best cut plan, and what planning takes beside measuring: simulated, whatever the load.

    python benchmarks/lazy.py [--out benchmarks/results/lazy.md] [--seeds N]

A made-up model is a chain of blocks on some targets. Each run of blocks on each target has a true cost: its blocks alone (lognormal around
100 µs; targets differ in speed and, block by block, in efficiency), less what running on saves at each boundary inside it (3 to 12 % of the
smaller neighbour), times luck that no sum explains. A probe tells it with some noise. Blocks alone and the whole on each target are probed
first, as a tune does. Regret is the true cost of the plan that was found over that of the best there is, which an exact search finds by the
true costs of all segments.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean

import numpy as np
import numpy.typing as npt
import psutil

from aivmm.models.records import Block, Structure
from aivmm.planner.chain import ChainPlan
from aivmm.planner.evidence import Estimate
from aivmm.planner.lazy import Chain, Span, look
from aivmm.planner.partition import ChainEvidence, beliefs_of, place_cuts
from aivmm.planner.segments import Segments
from aivmm.runtime.cpu import cpu_device
from aivmm.runtime.target import Device, Target
from aivmm.tensors import TensorSpec

Array = npt.NDArray[np.float64]
ROOT = Path(__file__).parent.parent
WORLDS = {  # luck, noise of a probe, spread of efficiency
    "sums explain all, probes are exact": (0.0, 0.0, 0.5),
    "luck 2 %, probes 1 %": (0.02, 0.01, 0.5),
    "luck 2 %, probes 3 %": (0.02, 0.03, 0.5),
    "luck 2 %, probes 1 %, targets more alike": (0.02, 0.01, 0.2),
}
PLANNING_S = 2.0
MOST_PROBED = 0.05
SLACK = 10  # segments of the last plan, which may come on top of what was allowed


@dataclass
class World:
    """Every segment's true cost [first, last, choice], infinite where a choice does not run it; and who asked for which."""

    truth: Array
    prices: Array  # [boundary, from, to]
    noise: float = 0.0
    seed: int = 0
    wholes: bool = False  # whether they are probed before, as a tune does
    asked: list[Span] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.seed)
        self.names = [f"t{number}" for number in range(self.truth.shape[2])]
        blocks = len(self.truth)
        beliefs = {name: Segments([self.probed(i, i, name) for i in range(blocks)]) for name in self.names}
        for name, belief in beliefs.items():
            if self.wholes and (found := self.probed(0, blocks - 1, name)):
                belief.observe(0, blocks - 1, found)
        self.chain = Chain(beliefs=beliefs, prices=self.prices)

    def probed(self, first: int, last: int, name: str) -> Estimate | None:
        """Return what a probe of a segment says; None where it does not run."""
        value = self.truth[first, last, self.names.index(name)]
        if not math.isfinite(value):
            return None
        return Estimate(seconds=float(value * self._random.lognormal(0, self.noise)), sigma=self.noise, source="measured")

    def measure(self, spans: Sequence[Span]) -> dict[Span, Estimate]:
        """Probe segments, and remember that they were asked for."""
        self.asked += spans
        return {span: found for span in spans if (found := self.probed(*span))}

    def cost(self, plan: ChainPlan[str]) -> float:
        """Return what a plan truly costs."""
        spans = [(first, last, self.names.index(name)) for first, last, name in plan.segments]
        moved = [self.prices[b[0] - 1, a[2], b[2]] for a, b in itertools.pairwise(spans)]
        return math.fsum([*(self.truth[span] for span in spans), *moved])

    @property
    def best(self) -> float:
        """What the best plan truly costs."""
        return self.chain.place(self.truth).cost_s


def made_up(blocks: int, targets: int, seed: int, *, luck: float = 0.02, noise: float = 0.0, spread: float = 0.5) -> World:
    """Return a made-up model; see above."""
    random = np.random.default_rng(seed)
    alone = random.lognormal(math.log(100e-6), 0.7, (blocks, 1)) * random.uniform(0.5, 2, targets)
    alone = alone * random.lognormal(0, spread, (blocks, targets))
    saved = random.uniform(0.03, 0.12, (blocks - 1, targets)) * np.minimum(alone[:-1], alone[1:])
    sums, savings = (np.vstack([np.zeros(targets), each.cumsum(axis=0)]) for each in (alone, saved))
    truth = np.full((blocks, blocks, targets), math.inf)
    for first in range(blocks):
        for last in range(first, blocks):
            truth[first, last] = sums[last + 1] - sums[first] - (savings[last] - savings[first])
    truth *= random.lognormal(0, luck, truth.shape)
    prices = np.broadcast_to(15e-6 + random.choice([8e-6, 32e-6, 125e-6], (blocks - 1, 1, 1)), (blocks - 1, targets, targets)).copy()
    return World(truth, prices, noise=noise, seed=seed, wholes=True)


def model_of(blocks: int) -> Structure:
    """Return a model that is a chain of blocks which hand 256 KiB on."""
    made = [TensorSpec(name=f"t{index}", dtype="uint8", shape=(1 << 18,)) for index in range(blocks)]
    chain = tuple(
        Block(
            index=index,
            first=index,
            last=index,
            structure=f"s{index}",
            content=f"c{index}",
            inputs=(made[index - 1],) if index else (),
            outputs=(made[index],),
            op_types={"Conv": 1},
            flops=1.0,
            weight_bytes=0,
        )
        for index in range(blocks)
    )
    return Structure(
        structure="s", content="c", node_count=blocks, flops=1.0, weight_bytes=0, operators=(), cut_points=(), blocks=chain
    )  # fmt: skip


def planned(blocks: int, targets: int, precisions: int, *, most: int = 8) -> tuple[float, int, int]:
    """Plan as a tune does, from probes to the plan; return seconds without the probes, placements, and probes of segments."""
    world = made_up(blocks, targets * precisions, 1, noise=0.01)
    devices = [Device(kind="cpu" if number == 0 else "gpu", model=f"made-up {number}") for number in range(targets)]
    places = [
        Target(runtime="sim", name=f"{number}.{precision}", device=devices[number], runtime_version="1")
        for number in range(targets)
        for precision in range(precisions)
    ]
    ours = dict(zip(map(str, places), world.names, strict=True))
    alone = {(i, name): found for name, theirs in ours.items() for i in range(blocks) if (found := world.probed(i, i, theirs))}
    wholes = {name: found for name, theirs in ours.items() if (found := world.probed(0, blocks - 1, theirs))}
    probing = 0.0

    def measure(spans: Sequence[Span]) -> dict[Span, Estimate]:
        nonlocal probing
        began = time.perf_counter()
        found = world.measure([(first, last, ours[name]) for first, last, name in spans])
        back = {theirs: name for name, theirs in ours.items()}
        learnt = {(first, last, back[name]): estimate for (first, last, name), estimate in found.items()}
        probing += time.perf_counter() - began
        return learnt

    structure = model_of(blocks)
    started = time.perf_counter()
    evidence = ChainEvidence(structure=structure, beliefs=beliefs_of(structure, list(ours), alone, wholes))
    cuts = place_cuts(evidence, measure, targets=places, min_segments=1, most=most)
    seconds = time.perf_counter() - started - probing
    assert cuts.looked is not None
    return seconds, cuts.looked.solves, len(set(world.asked))


def main() -> None:
    """Simulate and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "lazy.md")
    parser.add_argument("--seeds", type=int, default=10)
    arguments = parser.parse_args()
    load = ", ".join(f"{each:.1f}" for each in psutil.getloadavg())
    where = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC; {cpu_device().model}, {os.cpu_count()} cores; load average {load}."
    lines = ["# Lazy measuring", "", where, "", *simulated(arguments.seeds), "", *planning()]
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def simulated(seeds: int) -> list[str]:
    """Return the table of probes and regret."""
    blocks, targets = 100, 4
    possible = blocks * (blocks + 1) // 2 * targets
    lines = [
        f"{blocks} blocks, {targets} targets, {seeds} made-up models each: {possible:,} possible segments. Probes include all blocks alone "
        "and the whole model on each target, and each repetition of one. To reach: at most 5 % of all segments probed, regret at most 1 %.",
        "",
        "| world | probed, most | regret, mean | regret, worst | placements, most | best uncut over best | |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (luck, noise, spread) in WORLDS.items():
        shares, regrets, solves, gains = [], [], [], []
        for seed in range(seeds):
            world = made_up(blocks, targets, seed, luck=luck, noise=noise, spread=spread)
            before = (blocks + 1) * targets
            found = look(world.chain, world.measure, apart=True, most_probes=int(MOST_PROBED * possible) - before - targets * SLACK)
            shares.append((len(world.asked) + before) / possible)
            regrets.append(world.cost(found.plan) / world.best - 1)
            solves.append(found.solves)
            gains.append(float(world.truth[0, blocks - 1].min()) / world.best)
        met = "met" if max(shares) <= MOST_PROBED and fmean(regrets) <= 0.01 else "missed"
        lines.append(
            f"| {name} | {max(shares):.2%} | {fmean(regrets):.2%} | {max(regrets):.2%} | {max(solves)} | {fmean(gains):.2f} | {met} |"
        )
    more = (
        "The best plan there is profits from the luck of each of its segments, among thousands that were never looked at; luck that is "
        "independent for each segment is the worst case, since nothing can be learnt about it but by probing it."
    )
    return [*lines, "", more]


def planning() -> list[str]:
    """Return the table of planning times."""
    lines = [
        f"Planning beside measuring, as a tune does it with at most 8 looks: beliefs, the placement by the graph, and two placements by "
        f"dynamic programming a look. To reach: {PLANNING_S:g} s for 200 blocks on 4 targets in 3 precisions.",
        "",
        "| blocks | targets | precisions | seconds | placements | segments probed | |",
        "|---|---|---|---|---|---|---|",
    ]
    for blocks, targets, precisions in ((24, 2, 1), (100, 4, 1), (200, 4, 3)):
        seconds, solves, probed = planned(blocks, targets, precisions)
        verdict = "met" if seconds <= PLANNING_S else "missed"
        lines.append(f"| {blocks} | {targets} | {precisions} | {seconds:.2f} | {solves} | {probed} | {verdict} |")
    return lines


if __name__ == "__main__":
    main()
