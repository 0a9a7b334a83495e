"""How large can a database grow before anyone notices? Builds one of a million probes and asks it what a tuning asks.

    python benchmarks/db.py [--probes 1000000] [--models 2000] [--environments 50] [--batch 20000] [--seed 0] [--folder /tmp/aivmm-db]
                            [--db postgresql+psycopg://USER@HOST/EMPTY] [--out benchmarks/results/db.md]

The probes are synthetic and seeded: segments of models on the five targets of a machine, about 30 durations and 6 metrics each, 1 in 8 with
a caution, 2 % refused, 1 % failed; every 40th model has 500 blocks. A model is the set of its segments here, and there is no run. Only
`add_many` is timed while the database is built, not the making of its records.
Questions are asked of a database that was closed and opened again, in a random order of keys. A garbage collection of the benchmark's own
million keys is no part of a question, so they are kept out of it (`gc.freeze`).

A figure comes twice: as it went by on the clock, and as CPU time of this process. Where other work shares the machine the two differ; for a
server the CPU time is the client's alone.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import os
import platform
import random
import shutil
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import islice
from pathlib import Path

from aivmm.db.database import Database
from aivmm.db.query import statistics as statistics_of
from aivmm.probes.records import Caution, Failed, Measured, Outcome, ProbeKey, Refused, Samples
from aivmm.runtime.config import Config
from aivmm.runtime.cpu import cpu_device
from aivmm.runtime.environment import Environment

LARGE_EVERY, LARGE_BLOCKS = 40, 500
TARGETS = ("openvino:CPU", "onnxruntime:CPU", "openvino:GPU.0", "onnxruntime:CUDA:0", "openvino:NPU")
ASKED_TARGETS = (1, 2, 5)
METRICS = ("compile_s", "first_inference_s", "load_s", "peak_memory_bytes", "relative_l2", "cosine")
SPREAD = Caution(code="spread", message="the middle half spans 14 % of the median", advice="close what else runs, or raise --budget")
LIMITS = {"find_s": 1e-3, "find_many_s": 0.1, "insert_per_s": 20_000.0}  # issue 3, point 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What is built."""

    probes: int
    models: int
    environments: int
    batch: int
    seed: int


@dataclass(slots=True)
class World:
    """Where synthetic probes come from."""

    size: Size
    environments: list[Environment] = field(default_factory=list)
    samples: list[Samples] = field(default_factory=list)
    configs: list[Config] = field(default_factory=list)

    @classmethod
    def of(cls, size: Size) -> World:
        """Make the environments, a pool of samples and 40 configs."""
        rng = random.Random(size.seed)
        made = cls(size)
        for number in range(size.environments):
            made.environments.append(
                Environment(
                    target=TARGETS[number % len(TARGETS)],
                    device_model=f"device of machine {number // len(TARGETS)}",
                    driver="",
                    runtime_version="2026.4.0",
                    instruction_sets=("avx2", "avx512f", "fma"),
                    usable_cores=8,
                    power_limit_w=None,
                    system="Linux-x86_64",
                )
            )
        for _ in range(4096):
            median, count = 10 ** rng.uniform(-5, -2), rng.randint(24, 36)
            timed = tuple(median * rng.lognormvariate(0, 0.05) for _ in range(count))
            made.samples.append(Samples(timed_s=timed, rounds=tuple(range(count)), warmup_s=(median * 3, median * 1.2)))
        for number in range(40):
            settings = {"INFERENCE_NUM_THREADS": 1 + number % 8, "NUM_STREAMS": 1 + number // 8, "ENABLE_CPU_PINNING": number % 2 == 0}
            made.configs.append(Config.of(settings, precision=("fp32", "bf16")[number % 2]))
        return made

    def keys_of(self, model: int, blocks: int, points: int, *, targets: int = len(TARGETS)) -> Iterator[ProbeKey]:
        """Yield a model's probes: every block on the targets of one machine (or the first of them) at `points` configs."""
        machine = model % (len(self.environments) // len(TARGETS))
        for block in range(blocks):
            subject = hashlib.sha256(f"{self.size.seed} {model} {block}".encode()).hexdigest()
            for side, target in enumerate(TARGETS[:targets]):
                for point in range(points):
                    yield ProbeKey(
                        kind="segment",
                        subject=subject,
                        target=target,
                        environment=self.environments[len(TARGETS) * machine + side].fingerprint,
                        config=self.configs[(7 * model + 11 * point) % len(self.configs)],
                    )

    def keys(self) -> Iterator[ProbeKey]:
        """Yield all keys, model by model, as tunings would store them; the last model takes what is left over."""
        large = (self.size.models + LARGE_EVERY - 1) // LARGE_EVERY
        rest = max(0, self.size.probes - large * LARGE_BLOCKS * len(TARGETS))
        points = 2
        blocks = max(1, rest // (max(1, self.size.models - large) * len(TARGETS) * points))
        for model in range(self.size.models):
            yield from self.keys_of(model, LARGE_BLOCKS, 1) if model % LARGE_EVERY == 0 else self.keys_of(model, blocks, points)
        extra = self.size.models
        while True:
            yield from self.keys_of(extra, blocks, points)
            extra += 1

    def outcomes(self) -> Iterator[Outcome]:
        """Yield `size.probes` outcomes."""
        rng = random.Random(self.size.seed + 1)
        for key in islice(self.keys(), self.size.probes):
            luck = rng.random()
            if luck < 0.02:
                yield Refused(key=key, reason="Exception from src/plugins: operation Loop is not supported")
            elif luck < 0.03:
                yield Failed(key=key, reason="the worker died: segmentation fault", output="Segmentation fault (core dumped)\n")
            else:
                yield Measured(
                    key=key,
                    samples=rng.choice(self.samples),
                    metrics={name: rng.random() for name in METRICS},
                    cautions=(SPREAD,) if luck < 0.155 else (),
                    effective_config={**key.config.as_dict(), **{f"PROPERTY_{n}": f"value {n}" for n in range(12)}},
                    placement={"CPU": 3},
                    race=f"{rng.getrandbits(64):016x}",
                )


@dataclass(frozen=True, slots=True)
class Took:
    """Seconds of one step: by the clock, and of this process's CPU time."""

    wall_s: float
    cpu_s: float

    @classmethod
    def of(cls, step: Callable[[], object]) -> Took:
        """Time one call."""
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        step()
        return cls(time.perf_counter() - wall_s, time.process_time() - cpu_s)


def build(world: World, location: str | Path) -> list[Took]:
    """Fill a new database; return what each batch took."""
    took: list[Took] = []
    outcomes = world.outcomes()
    with Database.open(location) as database:
        for environment in world.environments:
            database.remember_environment(environment)
        while batch := list(islice(outcomes, world.size.batch)):
            took.append(Took.of(lambda batch=batch: database.add_many(batch)))  # type: ignore[misc]
            print(f"\r{len(took) * world.size.batch:>9} probes, {len(batch) / took[-1].wall_s:8.0f}/s", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return took


def ask(world: World, location: str | Path) -> dict[str, list[Took]]:
    """Ask what a tuning asks; return what each question took."""
    rng = random.Random(world.size.seed + 2)
    every = list(islice(world.keys(), world.size.probes))
    single, again = rng.sample(every, min(2000, len(every))), rng.sample(every, min(200, len(every)))
    stored = {key.subject for key in every}
    large = [
        model for model in range(0, world.size.models, LARGE_EVERY) if list(world.keys_of(model, LARGE_BLOCKS, 1))[-1].subject in stored
    ]
    del every, stored
    gc.collect()
    gc.freeze()
    took: dict[str, list[Took]] = {}
    with Database.open(location) as database:
        took["find"] = [Took.of(lambda key=key: database.find(key)) for key in single]  # type: ignore[misc]
        for count in ASKED_TARGETS:
            asked = [list(world.keys_of(model, LARGE_BLOCKS, 1, targets=count)) for model in large]
            took[f"find_many {count}"] = [Took.of(lambda keys=keys: database.find_many(keys)) for keys in asked]  # type: ignore[misc]
            for keys in asked:
                assert len(database.find_many(keys)) == len(keys), "a stored key was not found"
        took["outcomes"] = [
            Took.of(lambda keys=keys: database.outcomes(kind="segment", subject={key.subject for key in keys}, target=TARGETS[:2]))  # type: ignore[misc]
            for keys in asked
        ]
        fresh = [Measured(key=key, samples=world.samples[0], metrics=dict.fromkeys(METRICS, 0.5)) for key in again]
        took["add"] = [Took.of(lambda outcome=outcome: database.add(outcome)) for outcome in fresh]  # type: ignore[misc]
    return took


def row(what: str, took: list[Took], limit_s: float | None = None) -> str:
    """Return a line of the table: median and worst by the clock, median CPU time, and whether the limit is met by the clock."""
    wall, cpu = (sorted(getattr(each, name) * 1e3 for each in took) for name in ("wall_s", "cpu_s"))
    median = statistics.median(wall)
    figures = f"{median:.3g} ms (p99 {wall[int(0.99 * len(wall))]:.3g}) | {statistics.median(cpu):.3g} ms"
    said = "| |" if limit_s is None else f"< {limit_s * 1e3:g} ms | {'yes' if median < limit_s * 1e3 else '**no**'} |"
    return f"| {what}, median of {len(took)} | {figures} | {said}"


def report(world: World, built: list[Took], took: dict[str, list[Took]], size_bytes: int, server: str) -> str:
    """Return the results as Markdown."""
    size = world.size
    wall_s, cpu_s = sum(each.wall_s for each in built), sum(each.cpu_s for each in built)
    last = built[-max(1, len(built) // 10) :]
    last_rate = len(last) * size.batch / sum(each.wall_s for each in last)
    best = size.batch / min(each.wall_s for each in built)
    rate = size.probes / wall_s
    engine = server or f"SQLite {sqlite3.sqlite_version}, synchronous=FULL, foreign keys on"
    load = f"load {os.getloadavg()[0]:.1f} at the end" if hasattr(os, "getloadavg") else "load unknown"
    lines = [
        f"`python benchmarks/db.py --probes {size.probes} --models {size.models} --environments {size.environments} --batch {size.batch} "
        f"--seed {size.seed}`, {time.strftime('%Y-%m-%d')}.",
        f"{cpu_device().model}, {os.cpu_count()} CPUs ({load}), {platform.system()} {platform.machine()}, "
        f"Python {platform.python_version()}, SQLAlchemy {version('sqlalchemy')}; {engine}.",
        "",
        "| what | by the clock | CPU time | limit | met |",
        "|---|---|---|---|---|",
        row("evidence for one segment (`find`)", took["find"], LIMITS["find_s"]),
        *(
            row(
                f"all evidence for a 500-block model on {count} target{'s' * (count > 1)} (`find_many`, {count * LARGE_BLOCKS} keys)",
                took[f"find_many {count}"],
                LIMITS["find_many_s"],
            )
            for count in ASKED_TARGETS
        ),
        row("the same on 2 targets by subject (`outcomes`)", took["outcomes"]),
        f"| bulk insert (`add_many`): probes with their samples, metrics and cautions | {rate:,.0f}/s (best batch {best:,.0f}, last tenth "
        f"{last_rate:,.0f}) | {size.probes / cpu_s:,.0f}/s | >= {LIMITS['insert_per_s']:,.0f}/s | "
        f"{'yes' if rate >= LIMITS['insert_per_s'] else '**no**'} |",
        row("one probe, one commit (`add`)", took["add"]),
        f"| database | {size_bytes / 1e6:,.0f} MB, {size_bytes / size.probes:,.0f} bytes a probe | | | |",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Build, ask, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--probes", type=int, default=1_000_000)
    parser.add_argument("--models", type=int, default=2000)
    parser.add_argument("--environments", type=int, default=50)
    parser.add_argument("--batch", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "aivmm-db")
    parser.add_argument("--db", help="a database on a server, with nothing in it, instead of a SQLite file")
    parser.add_argument("--keep", action="store_true", help="leave the database in --folder")
    parser.add_argument("--out", type=Path, help="write the results here; default: standard output")
    given = parser.parse_args()
    size = Size(probes=given.probes, models=given.models, environments=given.environments, batch=given.batch, seed=given.seed)
    folder = Path(tempfile.mkdtemp(prefix="scale-", dir=given.folder if given.folder.is_dir() else None))
    location = given.db or folder / "performance.db"
    try:
        world = World.of(size)
        built = build(world, location)
        with Database.open(location) as database:
            size_bytes = statistics_of(database)["size_bytes"]
            with database.reading() as connection:
                server = "" if database.path else "PostgreSQL " + ".".join(map(str, connection.dialect.server_version_info or ()))
        text = report(world, built, ask(world, location), size_bytes, server)
    finally:
        if given.keep:
            print(f"kept {location}", file=sys.stderr)
        else:
            shutil.rmtree(folder)
    if given.out is None:
        print(text)
    else:
        given.out.write_text(f"# The database's scale\n\n{text}", encoding="utf-8")


if __name__ == "__main__":
    main()
