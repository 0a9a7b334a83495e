"""How good the outer search is: regret against the enumerated optimum, beside random search and one knob at a time.

    python benchmarks/search.py [--out benchmarks/results/search.md] [--instances 24] [--seeds 5] [--trials 150]

Each instance is a random chain of blocks and three random devices of the null backend (a CPU, a GPU, an NPU), with targets that may take
part, pieces at most, the price of a cut, contiguous or not, batch, threads, replicas, provider options and precision to choose; throughput
is the objective, memory and latency are limited. Blocks are placed exactly inside (`planner.policy`) from what they cost alone; what a cut
costs beyond that is hidden from the placement, so that the policy matters. The clock is fake: figures are exact whatever else the machine
does, but for the seconds that a trial takes.
"""

from __future__ import annotations

import argparse
import math
import platform
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from itertools import combinations, pairwise, product
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from scipy.stats import wilcoxon

from aivmm.planner.candidates import Candidate, Policy, Rejection, Score
from aivmm.planner.constraints import Constraint, check
from aivmm.planner.policy import place_under
from aivmm.planner.search import Search
from aivmm.planner.space import Space
from aivmm.runtime.config import Config
from aivmm.runtime.null import NullBackend, NullDevice
from aivmm.runtime.target import Target

ROOT = Path(__file__).parent.parent
NOISE = 0.03  # sigma of the log-normal factor on each measurement
BATCHES = (1, 2, 4, 8)
CUT_PRICES = (0.5, 1.0, 2.0, 8.0)
PIECES, REPLICAS, CORES = 3, 3, 3
Array = npt.NDArray[np.float64]
Taking = Sequence[tuple[Target, Config]]
CHOOSING = ((8, 2), (4, 2), (2, 3))  # the last 30 trials: so many of the best measured so often again, as the proof's races do
LIMIT = 0.01
SIGNIFICANT = 0.01


def _model(kind: str, rows: int, width: int) -> bytes:
    """Return one block: a product, or something elementwise."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (rows, width)) for name in ("x", "y")]
    inputs, names = values[:1], ["x"]
    if kind == "MatMul":
        inputs, names = [*inputs, helper.make_tensor_value_info("w", TensorProto.FLOAT, (width, width))], ["x", "w"]
    graph = helper.make_graph([helper.make_node(kind, names, ["y"])], "block", inputs, values[1:])
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    return model.SerializeToString()


@dataclass(frozen=True)
class Plan:
    """What a point comes to: its segments by target, seconds for a batch, and how long each device is busy with it."""

    segments: tuple[tuple[int, int, int], ...]
    total_s: float
    busy_s: tuple[float, ...]  # by target


@dataclass
class Instance:
    """A chain of blocks on three devices, and everything that can be asked of them."""

    number: int
    blocks: int = 10
    backend: NullBackend = field(init=False)
    space: Space = field(init=False)
    limits: tuple[Constraint, ...] = ()

    def __post_init__(self) -> None:
        self._random = chance = random.Random(self.number)
        kinds = ("MatMul", "Tanh", "Softmax", "Relu")

        def efficiency() -> dict[str, float]:
            return {kind: math.exp(chance.gauss(0.0, 1.0)) for kind in kinds}

        cpu = NullDevice(
            cores=CORES,
            max_streams=1,
            efficiency=efficiency(),
            thread_overhead=chance.uniform(0.0, 0.08),
            serial=chance.uniform(0.05, 0.3),
            speed={"fp32": 1.0, "bf16": chance.uniform(0.8, 1.6)},
            choices={"layout": {"plain": 1.0, "blocked": chance.uniform(0.7, 1.4), "odd": chance.uniform(0.7, 1.4)}},
        )
        gpu = NullDevice(
            name="GPU.0",
            kind="gpu",
            flops_per_s=20e9 * chance.uniform(2, 8),
            bytes_per_s=40e9,
            launch_s=chance.uniform(2, 20) * 1e-6,
            efficiency=efficiency(),
            cores=1,
            max_streams=1,
            speed={"fp32": 1.0, "f16": chance.uniform(0.9, 1.8)},
            choices={"layout": {"nchw": 1.0, "nhwc": chance.uniform(0.7, 1.4), "blocked": chance.uniform(0.7, 1.4)}},
        )
        npu = NullDevice(
            name="NPU",
            kind="npu",
            flops_per_s=20e9 * chance.uniform(2, 6),
            bytes_per_s=20e9,
            efficiency=efficiency(),
            cores=1,
            max_streams=1,
            choices={"turbo": {"off": 1.0, "low": chance.uniform(0.8, 1.2), "high": chance.uniform(0.8, 1.2)}},
        )
        self.backend = NullBackend([cpu, gpu, npu])
        self.targets = [each for each in self.backend.targets() if isinstance(each, Target)]
        self._shapes = [(chance.choice(kinds), chance.choice((16, 32, 64)), chance.choice((64, 128, 256))) for _ in range(self.blocks)]
        self._move_s = [[chance.uniform(1, 20) * 1e-6 for _ in self.targets] for _ in self.targets]
        self._per_byte_s = chance.uniform(0.05, 0.3) * 1e-9
        self._hidden_s = [chance.uniform(0, 60) * 1e-6 for _ in range(self.blocks)]  # fusion that a cut there costs; nobody is told
        self._busy: dict[tuple[str, str, int], Array] = {}
        self._plans: dict[str, Plan] = {}
        self.space = Space(
            targets=self.targets,
            knobs={str(each): self.backend.knobs(each) for each in self.targets},
            objective="throughput",
            precisions={str(each): each.precisions for each in self.targets},
            batches=BATCHES,
            most_pieces=PIECES,
            cut_prices=CUT_PRICES,
            most_replicas=REPLICAS,
        )
        self._limit()

    def _limit(self) -> None:
        """Limit memory and latency to what a third of 300 random points break, so that limits matter and never leave nothing."""
        chance = np.random.default_rng(self.number)
        seen = [self.metrics(self.space.point(_Chance(chance))) for _ in range(300)]
        self.limits = tuple(
            Constraint(metric=metric, operator="<=", limit=float(np.quantile([each[metric] for each in seen], 0.67)))
            for metric in ("memory", "latency")
        )

    def _alone_s(self, target: Target, config: Config, batch: int) -> Array:
        """Return what each block costs alone, in seconds."""
        key = (str(target), config.key(), batch)
        if key not in self._busy:
            models = [_model(kind, rows * batch, width) for kind, rows, width in self._shapes]
            self._busy[key] = np.array([self.backend.expect_s(model, target, config) for model in models])
        return self._busy[key]

    def _prices(self, taking: Taking, batch: int) -> tuple[Array, Array, list[int]]:
        """Return costs [blocks, targets] and boundaries [blocks - 1, from, to] as the placement is told them, and the targets' numbers."""
        costs = np.stack([self._alone_s(target, config, batch) for target, config in taking], axis=1)
        rows = [self.targets.index(target) for target, _ in taking]
        sizes = np.array([4.0 * shape[1] * shape[2] * batch for shape in self._shapes[1:]])
        return costs, np.array(self._move_s)[np.ix_(rows, rows)][None] + self._per_byte_s * sizes[:, None, None], rows

    def _plan(self, candidate: Candidate) -> Plan:
        taking = taking_part(candidate)
        policy = candidate.policy
        most, price, one_each = (policy.most_pieces, policy.cut_price, policy.contiguous) if policy else (1, 1.0, True)
        key = repr(([(str(target), config.key()) for target, config in taking], candidate.batch, most, price, one_each))
        if key not in self._plans:
            costs, boundary, rows = self._prices(taking, candidate.batch)
            placed = place_under(costs, boundary, most_pieces=most, cut_price=price, contiguous=one_each)
            self._plans[key] = self._priced(placed.segments, placed.cost_s, costs, rows)
        return self._plans[key]

    def _priced(self, segments: Sequence[tuple[int, int, int]], thought_s: float, costs: Array, rows: Sequence[int]) -> Plan:
        """Return what a placement really comes to: each cut costs what nobody was told."""
        busy = [0.0] * len(self.targets)
        for first, last, on in segments:
            busy[rows[on]] += float(costs[first : last + 1, on].sum())
        placed = tuple((first, last, rows[on]) for first, last, on in segments)
        return Plan(segments=placed, total_s=thought_s + sum(self._hidden_s[first] for first, _, _ in segments[1:]), busy_s=tuple(busy))

    def used(self, candidate: Candidate) -> Taking:
        """Return the targets that have a segment, each with its config: those that might have taken part cost nothing."""
        on = {self.targets[each[2]] for each in self._plan(candidate).segments}
        return [each for each in taking_part(candidate) if each[0] in on]

    def runs_as(self, candidate: Candidate) -> str:
        """Return what is equal for points that come to the same: the placement is known before anything is measured."""
        used = [(str(target), config.key()) for target, config in self.used(candidate)]
        return repr((self._plan(candidate).segments, used, candidate.batch, candidate.replicas))

    def metrics(self, candidate: Candidate) -> dict[str, float]:
        """Return the truth of a point."""
        return self._truth(self._plan(candidate), self.used(candidate), candidate.batch, candidate.replicas)

    def _truth(self, plan: Plan, taking: Taking, batch: int, copies: int) -> dict[str, float]:
        """Return metrics by the asymptotic bounds of `copies` on shared devices (Lazowska et al. 1984, ch. 5)."""
        threads = next((config.get("threads") or CORES for target, config in taking if target.name == "CPU"), CORES)
        assert isinstance(threads, int)
        shares = [busy * (threads / CORES if target.name == "CPU" else 1) for target, busy in zip(self.targets, plan.busy_s, strict=True)]
        period_s = max(plan.total_s / copies, *shares)
        weights = sum(4.0 * width**2 for kind, _, width in self._shapes if kind == "MatMul")
        buffers = 4.0 * batch * max(rows * width for _, rows, width in self._shapes)
        return {"latency": period_s * copies, "throughput": batch / period_s, "memory": copies * (weights * len(taking) + buffers)}

    def defaults(self) -> list[Candidate]:
        """Return what every way begins with: what a user would run for latency and throughput, and the model cut between all targets."""
        plain = tuple((target, Config(precision="fp32")) for target in self.targets)
        every = Policy(targets=plain, most_pieces=PIECES, contiguous=False)
        cut = Candidate(target=plain[0][0], config=plain[0][1], policy=every)
        serving = Candidate(target=plain[0][0], config=Config.of({"threads": 1}, precision="fp32"), replicas=REPLICAS)
        return [*(Candidate(target=target, config=config) for target, config in plain), serving, cut]

    def keeps(self, candidate: Candidate) -> bool:
        """Say whether a point keeps the limits."""
        return not check(self.limits, self.metrics(candidate))

    def best(self) -> Best:
        """Try every point; placements by trying every segmentation."""
        count, kept, least, which = 0, 0, math.inf, None
        configs = {each: list(self._configs(each)) for each in self.targets}
        for subset in (each for size in (1, 2, 3) for each in combinations(self.targets, size)):
            every = Segmentations(self.blocks, len(subset))
            for chosen, batch in product(product(*(configs[each] for each in subset)), BATCHES):
                taking = tuple(zip(subset, chosen, strict=True))
                costs, boundary, rows = self._prices(taking, batch)
                inside, between = every.price(costs, boundary)
                for policy in policies(taking):
                    at = every.least(inside, between, policy)
                    plan = self._priced(every.segments[at], float(inside[at] + between[at]), costs, rows)
                    on = {each[2] for each in plan.segments}
                    used = [each for each, row in zip(taking, rows, strict=True) if row in on]
                    for copies in range(1, REPLICAS + 1):
                        found = self._truth(plan, used, batch, copies)
                        count += 1
                        if not all(limit.allows(found[limit.metric]) for limit in self.limits):
                            continue
                        kept += 1
                        if 1 / found["throughput"] < least:
                            least, which = 1 / found["throughput"], (taking, batch, policy, copies)
        assert which is not None
        (target, config), *_ = which[0]
        point = Candidate(target=target, config=config, batch=which[1], policy=which[2], replicas=which[3])
        return Best(point, least, count, kept)

    def _configs(self, target: Target) -> Iterator[Config]:
        knobs = self.space.knobs_of(target)
        values = [knob.choices or range(int(knob.low), int(knob.high) + 1) for knob in knobs]
        for settings in product(*values):
            kept = {knob.name: value for knob, value in zip(knobs, settings, strict=True) if value != knob.default}
            for precision in target.precisions:
                yield Config.of(kept, precision=precision)


@dataclass(frozen=True)
class Best:
    """The best point that keeps the limits, its time per sample, how many points there are, and how many keep the limits."""

    point: Candidate
    seconds: float
    points: int
    kept: int


def taking_part(candidate: Candidate) -> Taking:
    """Return the targets of a point, each with its config."""
    return candidate.policy.targets if candidate.policy else ((candidate.target, candidate.config),)


def policies(taking: Taking) -> list[Policy | None]:
    """Return every policy that these targets can have; None: the whole model on the one there is."""
    if len(taking) == 1:
        return [None]
    kinds = [(pieces, one) for one in (True, False) for pieces in range(2, 1 + (min(PIECES, len(taking)) if one else PIECES))]
    return [
        Policy(targets=tuple(taking), most_pieces=pieces, cut_price=price, contiguous=one) for pieces, one in kinds for price in CUT_PRICES
    ]


class Segmentations:
    """Every way to cut a chain into at most `PIECES` segments on neighbouring unlike targets, in arrays."""

    def __init__(self, blocks: int, width: int) -> None:
        self.segments: list[tuple[tuple[int, int, int], ...]] = []
        for pieces in range(1, PIECES + 1):
            for cuts in combinations(range(1, blocks), pieces - 1):
                edges = [0, *cuts, blocks]
                for on in product(range(width), repeat=pieces):
                    if all(a != b for a, b in pairwise(on)):
                        self.segments.append(tuple((edges[at], edges[at + 1] - 1, on[at]) for at in range(pieces)))
        self._inside = np.zeros((len(self.segments), blocks * width))
        self._between = np.zeros((len(self.segments), (blocks - 1) * width * width))
        for number, found in enumerate(self.segments):
            for first, last, column in found:
                self._inside[number, [block * width + column for block in range(first, last + 1)]] = 1
            for before, after in pairwise(found):
                self._between[number, ((after[0] - 1) * width + before[2]) * width + after[2]] = 1
        self._pieces = np.array([len(each) for each in self.segments])
        self._one_each = np.array([len({on for _, _, on in each}) == len(each) for each in self.segments])

    def price(self, costs: Array, boundary: Array) -> tuple[Array, Array]:
        """Return of each segmentation what its segments cost, and what its boundaries cost."""
        return self._inside @ costs.ravel(), self._between @ boundary.ravel()

    def least(self, inside: Array, between: Array, policy: Policy | None) -> int:
        """Return the number of the cheapest that a policy allows, at its prices."""
        if policy is None:
            return int(np.argmin(np.where(self._pieces == 1, inside, np.inf)))
        allowed = (self._pieces <= policy.most_pieces) & (self._one_each if policy.contiguous else True)
        return int(np.argmin(np.where(allowed, inside + policy.cut_price * between, np.inf)))


class _Chance:
    """Answers by chance."""

    def __init__(self, chance: np.random.Generator) -> None:
        self._chance = chance

    def suggest(self, name: str, known: BaseDistribution) -> Any:
        values = values_of(known)
        return values[int(self._chance.integers(len(values)))]


def values_of(known: BaseDistribution) -> Sequence[Any]:
    """Return all values of a distribution."""
    if isinstance(known, IntDistribution):
        return range(known.low, known.high + 1)
    assert isinstance(known, CategoricalDistribution)
    return known.choices


class Bench:
    """Measures points with noise, and counts."""

    def __init__(self, instance: Instance, seed: int) -> None:
        self.instance, self.seed = instance, seed
        self._noise = np.random.default_rng((instance.number, seed, 7))
        self.seen: dict[str, tuple[Candidate, list[float]]] = {}
        self.count = 0

    def measure(self, candidate: Candidate) -> float:
        """Return one noisy time per sample."""
        self.count += 1
        seconds = math.exp(self._noise.normal(0.0, NOISE)) / self.instance.metrics(candidate)["throughput"]
        self.seen.setdefault(self.instance.runs_as(candidate), (candidate, []))[1].append(seconds)
        return seconds

    def chosen(self) -> Candidate:
        """Measure the best few again, as the proof's races do, and return the best of them that keeps the limits."""
        kept = [each for each in self.seen.values() if self.instance.keeps(each[0])]
        for most, times in CHOOSING:
            kept = sorted(kept, key=lambda each: fmean(map(math.log, each[1])))[:most]
            for candidate, _ in kept:
                for _ in range(times):
                    self.measure(candidate)
        return min(kept, key=lambda each: fmean(map(math.log, each[1])))[0]


def by_search(bench: Bench, trials: int) -> None:
    """Ask Optuna."""
    instance = bench.instance
    search = Search(space=instance.space, seed=bench.seed, limits=instance.limits, runs_as=instance.runs_as)
    search.enqueue(bench.instance.defaults())
    while bench.count < trials and not search.exhausted:
        for candidate in search.ask(min(3, trials - bench.count)):
            seconds = bench.measure(candidate)
            metrics = {name: value for name, value in bench.instance.metrics(candidate).items() if name != "throughput"}
            score: Score | Rejection = Score(ratio=seconds, low=seconds, high=seconds, median_s=seconds, metrics=metrics)
            search.tell(candidate, score)


def by_chance(bench: Bench, trials: int) -> None:
    """Try points by chance, each once."""
    chance = np.random.default_rng((bench.instance.number, bench.seed, 1))
    for candidate in bench.instance.defaults():
        bench.measure(candidate)
    while bench.count < trials:
        candidate = bench.instance.space.point(_Chance(chance))
        if bench.instance.runs_as(candidate) not in bench.seen:
            bench.measure(candidate)


def knob_by_knob(bench: Bench, trials: int) -> None:
    """Take the best value of one knob after the other, in random order, as long as that helps: from the best default, then from chance."""
    chance = np.random.default_rng((bench.instance.number, bench.seed, 2))
    instance = bench.instance

    def cost(values: dict[str, Any]) -> float:
        candidate = instance.space.point(_Filled(values, chance))
        known = bench.seen.get(instance.runs_as(candidate))
        if known is None and bench.count >= trials:
            return math.inf
        seconds = bench.measure(candidate) if known is None else known[1][0]
        return seconds if instance.keeps(candidate) else math.inf

    known = {each.key: instance.space.params(each) or {} for each in instance.defaults()}
    first = min(known.values(), key=cost)
    while bench.count < trials:
        start = _Filled(first, chance)
        instance.space.point(start)
        values, best, before, first = dict(start.values), cost(dict(start.values)), -1, {}
        while bench.count < trials and bench.count > before:
            before = bench.count
            filled = _Filled(values, chance)
            instance.space.point(filled)
            values = dict(filled.values)
            for name in chance.permutation(sorted(filled.asked)):
                for value in values_of(filled.asked[str(name)]):
                    tried = values | {str(name): value}
                    found = cost(tried)
                    if found < best:
                        best, values = found, tried


class _Filled:
    """Answers from values; what they lack is filled in by chance, and kept."""

    def __init__(self, values: dict[str, Any], chance: np.random.Generator) -> None:
        self.values, self._chance = dict(values), chance
        self.asked: dict[str, BaseDistribution] = {}

    def suggest(self, name: str, known: BaseDistribution) -> Any:
        self.asked[name] = known
        if name not in self.values:
            options = values_of(known)
            self.values[name] = options[int(self._chance.integers(len(options)))]
        return self.values[name]


WAYS: dict[str, Callable[[Bench, int], None]] = {"search": by_search, "random": by_chance, "one knob at a time": knob_by_knob}


@dataclass(frozen=True)
class Outcome:
    """How the ways came out on one instance: regret by way, one for each seed."""

    number: int
    points: int
    kept: int
    regret: dict[str, list[float]]
    ask_s: float  # of a trial of the search, without measuring


def run_instance(number: int, *, seeds: int, trials: int) -> Outcome:
    """Enumerate an instance and search it in each way."""
    instance = Instance(number)
    best = instance.best()
    regret: dict[str, list[float]] = {}
    seconds = 0.0
    for name, way in WAYS.items():
        regret[name] = []
        for seed in range(seeds):
            bench = Bench(instance, seed)
            began = time.process_time()
            way(bench, trials - sum(most * times for most, times in CHOOSING))
            seconds += (time.process_time() - began) * (name == "search")
            chosen = bench.chosen()
            assert bench.count == trials and instance.keeps(chosen)
            regret[name].append(1 / instance.metrics(chosen)["throughput"] / best.seconds - 1)
    return Outcome(number, best.points, best.kept, regret, seconds / seeds / trials)


def worse(outcomes: Sequence[Outcome], way: str) -> float:
    """Return the p of the paired one-sided Wilcoxon test: the search's regrets are below those of another way on the same runs."""
    pairs = [(mine, theirs) for each in outcomes for mine, theirs in zip(each.regret["search"], each.regret[way], strict=True)]
    mine, theirs = zip(*pairs, strict=True)
    return float(wilcoxon(mine, theirs, alternative="less").pvalue)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "search.md")
    parser.add_argument("--instances", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=150)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    began = time.perf_counter()
    with ProcessPoolExecutor(arguments.processes) as pool:
        run = partial(run_instance, seeds=arguments.seeds, trials=arguments.trials)
        outcomes = list(pool.map(run, range(arguments.instances)))
    text = "\n".join(report(outcomes, arguments, time.perf_counter() - began)) + "\n"
    arguments.out.write_text(text, encoding="utf-8")
    print(text)


def report(outcomes: Sequence[Outcome], arguments: argparse.Namespace, seconds: float) -> list[str]:
    """Return the results file."""
    regrets = {way: [value for each in outcomes for value in each.regret[way]] for way in WAYS}
    mean = fmean(regrets["search"])
    tests = {way: worse(outcomes, way) for way in WAYS if way != "search"}
    met = mean <= LIMIT and all(p < SIGNIFICANT for p in tests.values())
    shares = [each.kept / each.points for each in outcomes]
    points = sorted(each.points for each in outcomes)
    again = sum(most * times for most, times in CHOOSING)
    rows = []
    for way, found in regrets.items():
        within = sum(value <= LIMIT for value in found) / len(found)
        p = f"{tests[way]:.1e}" if way in tests else ""
        middle = f"{fmean(found):.2%} | {median(found):.2%} | {np.quantile(found, 0.9):.2%} | {max(found):.2%}"
        rows.append(f"| {way} | {middle} | {within:.0%} | {p} |")
    command = f"python benchmarks/search.py --instances {arguments.instances} --seeds {arguments.seeds} --trials {arguments.trials}"
    versions = f"Python {platform.python_version()}; aivmm {version('aivmm')}, optuna {version('optuna')}"
    return [
        "# The outer search",
        "",
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC; {versions}. `{command}`, {seconds:.0f} s with {arguments.processes} processes. "
        "The clock is fake, so the regrets are exact whatever the machine does.",
        "",
        " ".join((__doc__ or "").split("\n\n")[2].split()),
        "",
        f"{len(outcomes)} instances of {points[0]:,} to {points[-1]:,} points, of which {min(shares):.0%} to {max(shares):.0%} keep both "
        f"limits; {arguments.seeds} seeds each; {NOISE:.0%} noise on each measurement; {arguments.trials} measurements for each way, the "
        f"last {again} of which measure its best few again. Regret is the time per sample of what was chosen over that of the best point "
        "that keeps the limits, minus 1, without noise.",
        "",
        "| way | mean regret | median | 90 % | worst | runs within 1 % | p (search is better) |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
        f"To reach: mean regret at most {LIMIT:.0%}, and p < {SIGNIFICANT:g} in the paired Wilcoxon test against each other way: "
        f"{'met' if met else 'missed'}. A trial of the search took {median([each.ask_s for each in outcomes]) * 1e3:.0f} ms of CPU.",
    ]


if __name__ == "__main__":
    main()
