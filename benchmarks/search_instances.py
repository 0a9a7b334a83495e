"""Random devices and chains of blocks for `benchmarks.search`, and their optimum by trying every point."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise, product
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from aivmm.planner.candidates import Candidate, Policy
from aivmm.planner.constraints import Constraint, check
from aivmm.planner.policy import place_under
from aivmm.planner.space import Space
from aivmm.runtime.config import Config
from aivmm.runtime.null import NullBackend
from aivmm.runtime.null_device import NullDevice
from aivmm.runtime.target import Target

BATCHES = (1, 2, 4, 8)
CUT_PRICES = (0.5, 1.0, 2.0, 8.0)
PIECES, REPLICAS, CORES = 3, 3, 3
Array = npt.NDArray[np.float64]
Taking = Sequence[tuple[Target, Config]]


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
        seen = [self.metrics(self.space.point(Chance(chance))) for _ in range(300)]
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

    def prices(self, taking: Taking, batch: int) -> tuple[Array, Array, list[int]]:
        """Return costs [blocks, targets] and boundaries [blocks - 1, from, to] as the placement is told them, and the targets' numbers."""
        costs = np.stack([self._alone_s(target, config, batch) for target, config in taking], axis=1)
        rows = [self.targets.index(target) for target, _ in taking]
        sizes = np.array([4.0 * shape[1] * shape[2] * batch for shape in self._shapes[1:]])
        return costs, np.array(self._move_s)[np.ix_(rows, rows)][None] + self._per_byte_s * sizes[:, None, None], rows

    def plan(self, candidate: Candidate) -> Plan:
        taking = taking_part(candidate)
        policy = candidate.policy
        most, price, one_each = (policy.most_pieces, policy.cut_price, policy.contiguous) if policy else (1, 1.0, True)
        key = repr(([(str(target), config.key()) for target, config in taking], candidate.batch, most, price, one_each))
        if key not in self._plans:
            costs, boundary, rows = self.prices(taking, candidate.batch)
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
        on = {self.targets[each[2]] for each in self.plan(candidate).segments}
        return [each for each in taking_part(candidate) if each[0] in on]

    def runs_as(self, candidate: Candidate) -> str:
        """Return what is equal for points that come to the same: the placement is known before anything is measured."""
        used = [(str(target), config.key()) for target, config in self.used(candidate)]
        return repr((self.plan(candidate).segments, used, candidate.batch, candidate.replicas))

    def metrics(self, candidate: Candidate) -> dict[str, float]:
        """Return the truth of a point."""
        return self._truth(self.plan(candidate), self.used(candidate), candidate.batch, candidate.replicas)

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
                costs, boundary, rows = self.prices(taking, batch)
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


class Chance:
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
