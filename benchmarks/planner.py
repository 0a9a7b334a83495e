"""How good the planner's plans are, how sure it is of them, and how long it takes.

    python benchmarks/planner.py [--out benchmarks/results/planner.md] [--instances ../shared/planner_instances] [--time-limit 28]

Throughput on the published instances (Tarnawski et al., NeurIPS 2020) beside the published figures; serial latency on the same graphs with
four targets of seeded efficiencies per node, up to 800 nodes (larger graphs are copies in a row); long chains; a model of 200 blocks.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil

from aivmm.planner.problem import Choice, Edge, Goal, Move, Node, PlacedDevice, Problem
from aivmm.planner.problem_files import read_problem
from aivmm.planner.solve import Solution, solve
from aivmm.runtime.cpu import cpu_device

ROOT = Path(__file__).parent.parent
# Name -> human expert, PipeDream, best contiguous, best known: largest load in ms, from the README of ../shared/planner_instances.
PUBLISHED: dict[str, tuple[float | None, float, float, float]] = {
    "bert24_layer": (20.084, 17.790, 17.790, 17.778),
    "resnet50_layer": (43.918, 39.398, 33.775, 33.775),
    "bert3_operator": (None, 37.456, 27.919, 27.574),
}
SERIAL = [
    ("bert24_layer", 1),
    ("resnet50_layer", 1),
    ("bert3_operator", 1),
    ("bert3_operator", 2),
    ("resnet50_layer", 4),
    ("bert24_layer", 25),
]
TARGETS, PRECISIONS = 4, 3
SLACK = 1.001
SECONDS = 30.0


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "planner.md")
    parser.add_argument("--instances", type=Path, default=ROOT.parent / "shared" / "planner_instances")
    parser.add_argument("--time-limit", type=float, default=28.0)
    arguments = parser.parse_args()
    lines = [
        *environment(),
        *("", "## Throughput of the published instances", "", *published(arguments.instances, arguments.time_limit)),
        *("", "## Serial latency", "", *serial(arguments.instances)),
        *("", "## Chains", "", *chains()),
        *("", f"Load average at the end {load_average()}."),
    ]
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def environment() -> list[str]:
    """Return where and when this ran."""
    device = cpu_device()
    packages = ", ".join(f"{each} {version(each)}" for each in ("aivmm", "numpy", "scipy"))
    return [
        "# The planner",
        "",
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC; {device.model}, {device.cores} cores; {platform.platform()}; Python "
        f"{platform.python_version()}; {packages}; load average at the start {load_average()}. "
        "Seconds are wall clock; CPU seconds of the process are beside them, since others may keep the machine busy.",
    ]


def load_average() -> str:
    """Return how busy the machine is, over 1, 5 and 15 minutes."""
    return ", ".join(f"{each:.1f}" for each in psutil.getloadavg())


def timed(run: Callable[[], Solution]) -> tuple[Solution, float]:
    """Return what a solver found and the CPU seconds that it took."""
    started = time.process_time()
    found = run()
    return found, time.process_time() - started


def published(folder: Path, limit_s: float) -> list[str]:
    """Return the table of the published instances."""
    lines = [
        "Largest load in ms, smaller is better. To reach: the best contiguous figure + 0.1 % within 30 s.",
        "",
        "| instance | nodes | expert | PipeDream | best contiguous | best known | kind | objective | bound | gap | seconds | CPU s | |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, (expert, pipedream, best, known) in PUBLISHED.items():
        problem = read_problem(folder / f"throughput_{name}.json")
        for contiguous in (True, False):
            found, cpu_s = timed(lambda: solve(problem, "throughput", contiguous=contiguous, time_limit_s=limit_s))  # noqa: B023
            met = found.objective <= SLACK * best and found.seconds <= SECONDS
            kind, verdict = "contiguous" if contiguous else "any pieces", "met" if met else "missed"
            figures = f"{expert or '-'} | {pipedream} | {best} | {known}"
            lines.append(f"| {name} | {len(problem.nodes)} | {figures} | {kind} | {row(found, cpu_s)} | {verdict} |")
    return lines


def row(found: Solution, cpu_s: float) -> str:
    """Return the cells on a result."""
    return f"{found.objective:.4f} | {found.bound:.4f} | {found.gap:.3%} | {found.seconds:.2f} | {cpu_s:.2f}"


def serial(folder: Path) -> list[str]:
    """Return the table of serial latency."""
    lines = [
        "Four targets; a target's speed is uniform in [0.5, 2], a node's efficiency on a target lognormal (sigma 0.7), seed 1. Edge costs "
        "as published: the same between all targets, or scaled by a factor in [0.5, 2] per ordered pair plus a fixed cost. To reach: gap 0 "
        "within 1 s.",
        "",
        "| graph | nodes | edge costs | best single target | objective | bound | gap | seconds | CPU s | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for by_pair in (False, True):
        for name, copies in SERIAL:
            problem = serial_problem(read_problem(folder / f"throughput_{name}.json"), copies, by_pair=by_pair)
            found, cpu_s = timed(lambda: solve(problem, "latency"))  # noqa: B023
            met = found.gap == 0 and found.seconds <= 1
            single = min(sum(node.costs[each.name] for node in problem.nodes) for each in problem.choices)
            graph = name if copies == 1 else f"{copies} x {name}"
            lines.append(
                f"| {graph} | {len(problem.nodes)} | {'by pair' if by_pair else 'alike'} | {single:.4f} | {row(found, cpu_s)} "
                f"| {'met' if met else 'missed'} |"
            )
    return lines


def serial_problem(published: Problem, copies: int, *, by_pair: bool) -> Problem:
    """Return copies of a published graph in a row, on four unlike targets."""
    random = np.random.default_rng(1)
    names = [f"t{index}" for index in range(TARGETS)]
    inner = {edge.source for edge in published.edges}, {edge.reader for edge in published.edges}
    last = [node.id for node in published.nodes if node.id not in inner[0]][-1]
    first = [node.id for node in published.nodes if node.id not in inner[1]][-1]
    nodes: list[Node] = []
    edges: list[Edge] = []
    for copy in range(copies):
        speed = random.uniform(0.5, 2.0, TARGETS)
        for node in published.nodes:
            costs = node.costs["acc"] * speed * random.lognormal(0.0, 0.7, TARGETS)
            nodes.append(Node(id=f"{copy}.{node.id}", costs=dict(zip(names, costs.tolist(), strict=True))))
        edges += [replace(edge, source=f"{copy}.{edge.source}", reader=f"{copy}.{edge.reader}") for edge in published.edges]
        if copy:
            edges.append(Edge(source=f"{copy - 1}.{last}", reader=f"{copy}.{first}", bytes=0.01))
    pairs = [(one, other) for one in names for other in names if one != other]
    factors = random.uniform(0.5, 2.0, len(pairs)) if by_pair else np.ones(len(pairs))
    return Problem(
        unit="ms",
        devices=[PlacedDevice(name=name) for name in names],
        choices=[Choice(name=name, target=name, device=name) for name in names],
        nodes=nodes,
        edges=edges,
        transfers={pair: Move(0.001 * by_pair, float(factor)) for pair, factor in zip(pairs, factors, strict=True)},
    )


def chains() -> list[str]:
    """Return the table of chains."""
    cases: list[tuple[int, int, Goal, bool, float]] = [
        (10_000, 8, "latency", False, 5.0),
        (200, TARGETS, "latency", False, 2.0),
        (200, TARGETS, "throughput", True, 2.0),
        (200, TARGETS, "throughput", False, 2.0),
        (200, TARGETS, "throughput", False, SECONDS),
    ]
    lines = [
        f"Random costs per block, target and precision ({PRECISIONS} precisions), transfers by pair of targets. All that `solve` does is "
        "timed: arrays, search, pricing by the evaluator. The time limit given is nine tenths of what may be taken; what is not proven "
        "optimal by then ends with the best found.",
        "",
        "| blocks | targets | objective | kind | objective (s) | bound | gap | seconds | CPU s | limit | |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for blocks, targets, goal, contiguous, limit_s in cases:
        problem = chain_problem(blocks, targets)
        found, cpu_s = timed(lambda: solve(problem, goal, contiguous=contiguous, time_limit_s=0.9 * limit_s))  # noqa: B023
        verdict = "met" if found.seconds <= limit_s else "missed"
        kind = "contiguous" if contiguous else "any pieces"
        lines.append(f"| {blocks} | {targets} | {goal} | {kind} | {row(found, cpu_s)} | {limit_s:g} s | {verdict} |")
    return lines


def chain_problem(blocks: int, targets: int) -> Problem:
    """Return a chain of blocks, each target on a device of its own, in three precisions."""
    random = np.random.default_rng(0)
    names = [f"t{index}" for index in range(targets)]
    choices = [Choice(name=f"{name} p{index}", target=name, device=name) for name in names for index in range(PRECISIONS)]
    costs = random.exponential(1e-3, (blocks, len(choices)))
    return Problem(
        devices=[PlacedDevice(name=name) for name in names],
        choices=choices,
        nodes=[
            Node(id=str(index), costs={each.name: cost for each, cost in zip(choices, row, strict=True)})
            for index, row in enumerate(costs.tolist())
        ],
        edges=[Edge(source=str(index), reader=str(index + 1), bytes=float(random.exponential(1e5))) for index in range(blocks - 1)],
        transfers={(one, other): Move(1e-5, float(random.uniform(1e-10, 5e-10))) for one in names for other in names},
    )


if __name__ == "__main__":
    main()
