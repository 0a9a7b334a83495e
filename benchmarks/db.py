"""How large can a database grow before anyone notices? Builds one of a million probes and asks it what a tuning asks.

    python benchmarks/db.py [--probes 1000000] [--models 2000] [--environments 50] [--batch 20000] [--seed 0] [--folder /tmp/aivmm-db]
                            [--out benchmarks/results/db.md]

The probes are synthetic and seeded: segments of models on two targets a machine, about 30 durations and 6 metrics each, 1 in 8 with a
caution, 2 % refused, 1 % failed; every 40th model has 500 blocks. A model is the set of its segments here, and there is no run. Only
`add_many` is timed while the database is built, not the making of its records.
Questions are asked of a database that was closed and opened again, in a random order of keys.
"""

from __future__ import annotations

import argparse
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
from aivmm.probes.records import Caution, Failed, Measured, Outcome, ProbeKey, Refused, Samples
from aivmm.runtime.config import Config
from aivmm.runtime.cpu import cpu_device
from aivmm.runtime.environment import Environment

LARGE_EVERY, LARGE_BLOCKS = 40, 500
TARGETS = ("openvino:CPU", "onnxruntime:CPU")
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
                    target=TARGETS[number % 2],
                    device_model=f"CPU of machine {number // 2}",
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

    def keys_of(self, model: int, blocks: int, points: int) -> Iterator[ProbeKey]:
        """Yield a model's probes: every block on both targets of one machine at `points` configs."""
        machine = model % (len(self.environments) // 2)
        for block in range(blocks):
            subject = hashlib.sha256(f"{self.size.seed} {model} {block}".encode()).hexdigest()
            for side, target in enumerate(TARGETS):
                for point in range(points):
                    yield ProbeKey(
                        kind="segment",
                        subject=subject,
                        target=target,
                        environment=self.environments[2 * machine + side].fingerprint,
                        config=self.configs[(7 * model + 11 * point) % len(self.configs)],
                    )

    def keys(self) -> Iterator[ProbeKey]:
        """Yield all keys, model by model, as tunings would store them; the last model takes what is left over."""
        large = (self.size.models + LARGE_EVERY - 1) // LARGE_EVERY
        rest = max(0, self.size.probes - large * LARGE_BLOCKS * 2)
        points = 2
        blocks = max(1, rest // (max(1, self.size.models - large) * 2 * points))
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


def build(world: World, path: Path) -> list[float]:
    """Fill a new database and return the probes per second of each batch."""
    rates: list[float] = []
    outcomes = world.outcomes()
    with Database.open(path) as database:
        for environment in world.environments:
            database.remember_environment(environment)
        while batch := list(islice(outcomes, world.size.batch)):
            started = time.perf_counter()
            database.add_many(batch)
            rates.append(len(batch) / (time.perf_counter() - started))
            print(f"\r{len(rates) * world.size.batch:>9} probes, {rates[-1]:8.0f}/s", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return rates


def timed(step: Callable[[], object]) -> float:
    """Return the seconds one call takes."""
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def ask(world: World, path: Path) -> dict[str, list[float]]:
    """Ask what a tuning asks; return the durations of each question."""
    rng = random.Random(world.size.seed + 2)
    every = list(islice(world.keys(), world.size.probes))
    stored = set(every)
    large = [list(world.keys_of(model, LARGE_BLOCKS, 1)) for model in range(0, min(world.size.models, 20 * LARGE_EVERY), LARGE_EVERY)]
    large = [keys for keys in large if keys[-1] in stored]
    took: dict[str, list[float]] = {}
    with Database.open(path) as database:
        took["find_s"] = [timed(lambda key=key: database.find(key)) for key in rng.sample(every, 2000)]  # type: ignore[misc]
        took["find_many_s"] = [timed(lambda keys=keys: database.find_many(keys)) for keys in large]  # type: ignore[misc]
        for keys in large:
            assert len(database.find_many(keys)) == len(keys), "a stored key was not found"
        took["outcomes_s"] = [
            timed(lambda keys=keys: database.outcomes(kind="segment", subject={key.subject for key in keys}, target=TARGETS))  # type: ignore[misc]
            for keys in large
        ]
        fresh = [Measured(key=key, samples=world.samples[0], metrics=dict.fromkeys(METRICS, 0.5)) for key in rng.sample(every, 200)]
        took["add_s"] = [timed(lambda outcome=outcome: database.add(outcome)) for outcome in fresh]  # type: ignore[misc]
    return took


def report(size: Size, rates: list[float], took: dict[str, list[float]], file_bytes: int, table_rows: float) -> str:
    """Return the results as Markdown."""
    device = cpu_device()
    overall = len(rates) / sum(1 / rate for rate in rates)
    last = statistics.median(rates[-max(1, len(rates) // 10) :])
    find, many = statistics.median(took["find_s"]), statistics.median(took["find_many_s"])
    p99 = sorted(took["find_s"])[int(0.99 * len(took["find_s"]))]

    def verdict(value: float, limit: float, *, more: bool = False) -> str:
        return "yes" if (value >= limit if more else value < limit) else "**no**"

    lines = [
        "# The database's scale",
        "",
        f"`python benchmarks/db.py --probes {size.probes} --models {size.models} --environments {size.environments} --batch {size.batch} "
        f"--seed {size.seed}`, {time.strftime('%Y-%m-%d')}.",
        f"{device.model}, {os.cpu_count()} CPUs (load {os.getloadavg()[0] if hasattr(os, 'getloadavg') else float('nan'):.1f} at the end), "
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}, "
        f"SQLAlchemy {version('sqlalchemy')}; synchronous=FULL, foreign keys on.",
        "",
        "| what | figure | limit | met |",
        "|---|---|---|---|",
        f"| evidence for one segment (`find`), median of {len(took['find_s'])} | {find * 1e3:.3f} ms (p99 {p99 * 1e3:.3f} ms) | < 1 ms | "
        f"{verdict(find, LIMITS['find_s'])} |",
        f"| all evidence for a 500-block model on 2 targets (`find_many`, 1000 keys), median | {many * 1e3:.0f} ms "
        f"(worst {max(took['find_many_s']) * 1e3:.0f} ms) | < 100 ms | {verdict(many, LIMITS['find_many_s'])} |",
        f"| the same by subject (`outcomes`), median | {statistics.median(took['outcomes_s']) * 1e3:.0f} ms | | |",
        f"| bulk insert (`add_many`), probes/s, whole build | {overall:,.0f} (last tenth {last:,.0f}) | >= 20,000 | "
        f"{verdict(overall, LIMITS['insert_per_s'], more=True)} |",
        f"| the same in table rows/s ({table_rows:.2f} rows a probe: probe, metrics, cautions) | {overall * table_rows:,.0f} | | |",
        f"| one probe, one commit (`add`), median | {statistics.median(took['add_s']) * 1e3:.2f} ms | | |",
        f"| file | {file_bytes / 1e6:,.0f} MB, {file_bytes / size.probes:,.0f} bytes a probe | | |",
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
    parser.add_argument("--keep", action="store_true", help="leave the database in --folder")
    parser.add_argument("--out", type=Path, help="write the results here; default: standard output")
    given = parser.parse_args()
    size = Size(probes=given.probes, models=given.models, environments=given.environments, batch=given.batch, seed=given.seed)
    folder = Path(tempfile.mkdtemp(prefix="scale-", dir=given.folder if given.folder.is_dir() else None))
    path = folder / "performance.db"
    try:
        world = World.of(size)
        rates = build(world, path)
        with sqlite3.connect(path) as connection:
            counts = {name: connection.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in ("probe", "metric", "caution")}
        connection.close()
        table_rows = sum(counts.values()) / counts["probe"]
        file_bytes = path.stat().st_size
        text = report(size, rates, ask(world, path), file_bytes, table_rows)
    finally:
        if given.keep:
            print(f"kept {path}", file=sys.stderr)
        else:
            shutil.rmtree(folder)
    if given.out is None:
        print(text)
    else:
        given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
