"""What does the engine cost, beside the bare runtime? Gates of issue 5, points 3 and 7; measured, not asserted, on a quiet machine.

    python -m benchmarks.engine [--only overhead,cut,pipeline,memory,threads,cold] [--row TEXT] [--seconds 8] [--quick] [--out FILE.md]

About 13 minutes in all; `--quick` 1 minute, to see that it works. Nothing else may run meanwhile, this machine's other cores included.

- overhead: `engine.run` of an uncut plan against the runtime's own call on the *same* compiled model with pre-bound buffers, call by call
  in random order; a second bare request (A/A) says what two equal things differ by. The bare call copies nothing; the engine hands
  outputs out without a copy, copies small new inputs, and binds larger ones and those that come again and again.
- cut: what a cut costs the engine beyond what it costs the runtimes: (engine cut - engine whole) - (bare cut - bare whole).
- pipeline: rate of a two-stage plan against that of its slower stage, timed bare while the other one runs, in alternating blocks.
- memory: resident memory over a million calls after warm-up. threads: 64 of them on one engine, every answer compared.
- cold: fresh processes that load a cached plan and answer once, against fresh ones in which the runtime takes back the same compiled form.
  Imports are told apart, and so is hashing: what is compared is the time from the imports to the first answer, less what loading waited
  for the end of the hashing that went on meanwhile.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import random
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from onnx import helper

from aivmm.runtime import hot
from aivmm.runtime.backend import Executable
from aivmm.runtime.cpu import cpu_device
from aivmm.runtime.engine import Engine
from aivmm.runtime.feed import new_buffer
from aivmm.runtime.plan import Execution
from benchmarks.medians import median_shown
from tests.making import ONNXRUNTIME, OPENVINO, Part, chain_model, make_bundle, normal

SECTIONS = ("overhead", "cut", "pipeline", "memory", "threads", "cold")
ONE_THREAD = {OPENVINO: (("INFERENCE_NUM_THREADS", 1),), ONNXRUNTIME: (("intra_op_num_threads", 1),)}
SIZES = {"20 µs": (64, 1, 8), "300 µs": (512, 1, 8), "large input": (256, 64, 4)}  # name -> width, rows, layers of a chain
SEVERAL = "300 µs, 3 inputs, 2 outputs"
Samples = dict[str, "np.ndarray[Any, np.dtype[np.float64]]"]


@dataclass
class Report:
    """Lines for people, and whether every gate held."""

    lines: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    row: str = ""  # only rows whose name holds this

    def wants(self, *names: str) -> bool:
        """Say whether a row is asked for, by what it is named after."""
        return self.row in ", ".join(names)

    def say(self, line: str = "") -> None:
        """Add a line, and show it."""
        self.lines.append(line)
        print(line, flush=True)

    def gate(self, what: str, held: bool) -> str:
        """Note a gate and return its mark."""
        if not held:
            self.failed.append(what)
        return "ok" if held else "**failed**"


def bare(executable: Any, arrays: dict[str, Any], outputs: dict[str, Any] | None = None) -> Callable[[], object]:
    """Return the runtime's own call on a compiled model, with all inputs and outputs bound before: what a careful user would write."""
    outputs = outputs or {each.name: new_buffer(each) for each in executable.outputs}
    if hasattr(executable, "_session"):
        binding = executable._session.io_binding()
        for name, array in arrays.items():
            binding.bind_cpu_input(name, array)
        import onnxruntime

        for name, array in outputs.items():
            binding.bind_ortvalue_output(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
        run, keep = executable._session.run_with_iobinding, (binding, arrays, outputs)
        return lambda: run(keep[0])
    import openvino

    request = executable._compiled.create_infer_request()
    for name, array in arrays.items():
        request.set_input_tensor(executable.input_ports[name], openvino.Tensor(array, shared_memory=True))
    for name, array in outputs.items():
        request.set_output_tensor(executable.output_ports[name], openvino.Tensor(array, shared_memory=True))
    infer, keep = request.infer, (arrays, outputs)
    return lambda: infer(share_outputs=True) and keep


_STEADY_S, _STEADY_MOST_S = 2.0, 10.0  # for which calls are steady before they are timed, and for which that is waited for at most


def interleaved(
    calls: dict[str, Callable[[], object]], seconds: float, *, seed: int = 0, steady: Callable[[], bool] = lambda: True
) -> Samples:
    """Time each of `calls` once a round, in random order, for `seconds`; return durations in seconds by name. Not before all is `steady`.

    What was timed goes to memory that was touched before. Kept as Python's numbers it would need a new page every twenty rounds, and the
    fault would be counted to whoever makes the first number there: mostly to who makes more numbers, not to who keeps them.
    """
    clock, rng = time.perf_counter_ns, random.Random(seed)
    order = [(np.zeros(1, np.int64), call) for call in calls.values()]

    def one_round(count: int) -> None:
        rng.shuffle(order)
        for took, call in order:
            started = clock()
            call()
            took[count] = clock() - started

    # As they are timed later: an engine takes for usual what it sees first, and where calls come in the same order always they are faster.
    began_s = unsteady_s = time.monotonic()
    while (now_s := time.monotonic()) - began_s < _STEADY_MOST_S and now_s - unsteady_s < _STEADY_S:
        while time.monotonic() - now_s < 0.1:  # to ask an engine takes as long as many short calls, which would be missing later
            one_round(0)
        if not steady():
            unsteady_s = time.monotonic()
    began = clock()
    for _ in range(20):
        one_round(0)
    most = math.ceil(2 * seconds * 1e9 / max(1, (clock() - began) / 20)) + 50
    found = {name: np.full(most, -1, np.int64) for name in calls}
    order[:] = [(found[name], call) for name, call in calls.items()]
    end, count = time.monotonic() + seconds, 0
    while count < most and time.monotonic() < end:
        one_round(count)
        count += 1
    return {name: each[:count] / 1e9 for name, each in found.items()}


def p99_excess(found: Samples, name: str, *, seed: int = 0) -> tuple[float, float]:
    """Return by how many seconds the two tails of `name` are longer than those of the two bare calls, and what noise alone does to that.

    Each side runs twice a round: who runs once finds his code colder than who runs twice, by more than what is looked for here.

    The tail is the p99 with the median put where the bare calls' is: what is added to each call has a gate of its own. A lower median is
    left where it is: who is faster in most calls need not be so in the slowest ones. Noise alone: the 97.5 % quantile of the same figure
    after the labels of all four were exchanged at random, a whole block of rounds at a time, since disturbances last longer than a round:
    the distribution under the hypothesis that tails are alike (a permutation test), from the same rounds.
    """
    rng = np.random.default_rng(seed)
    names = ("bare", "again", name, f"{name} again")
    medians = [float(np.median(found[each])) for each in names]
    bare_s = sum(medians[:2]) / 2
    medians[2:] = [max(each, bare_s) for each in medians[2:]]
    four = np.array([found[each] - median for each, median in zip(names, medians, strict=True)])
    blocks = np.array_split(np.arange(four.shape[1]), 40)

    def excess(rows: Any) -> float:
        tails = np.quantile(rows, 0.99, axis=1)
        return float(tails[2:].mean() - tails[:2].mean())

    noise = []
    for _ in range(400):
        mixed = np.concatenate([four[rng.permutation(4)][:, block] for block in blocks], axis=1)
        noise.append(excess(mixed))
    return excess(four), float(np.quantile(noise, 0.975))


@contextmanager
def engine_of(model: Any, parts: Sequence[Part], **fields: Any) -> Iterator[Engine]:
    """Load a plan for `model` from a bundle that goes away again."""
    with tempfile.TemporaryDirectory() as folder, Engine.load(make_bundle(Path(folder) / "m.aivmm", model, parts, **fields)) as engine:
        yield engine


def single(target: str, first: int = 0, last: int = -1) -> Part:
    """Return a stage with one thread."""
    return Part(target, first, last, settings=ONE_THREAD[target])


def executables(engine: Engine) -> list[Executable]:
    """Return the first replica of each stage."""
    return [each[0] for each in engine._program._executables]


def chained(engine: Engine, arrays: dict[str, Any]) -> Callable[[], object]:
    """Return the bare calls of two stages, one after the other, the second on what the first makes, where it makes it."""
    one, two = executables(engine)
    between = {each.name: new_buffer(each) for each in one.outputs}
    first, second = bare(one, arrays, between), bare(two, between)
    return lambda: (first(), second())


def micro(seconds: float) -> str:
    """Return a duration in microseconds."""
    return f"{seconds * 1e6:.1f}"


def overhead(report: Report, seconds: float) -> None:
    """Uncut plans."""
    report.say("\n## Uncut plan against the bare call (µs)\n")
    report.say("`new` gives another array each time, and its bare call copies that in, too; the others fill one array.")
    report.say("`engine` and `new` keep an answer until the next is there. `tail`: what the p99 adds beyond the median, the gate.\n")
    report.say(
        "| model | target | bare p50 | engine adds | lent adds | new adds | allowed | | bare p99 | engine adds"
        " | of it tail | A/A band | | rounds |"
    )
    report.say("|---|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for name, (width, rows, layers) in (SIZES | {SEVERAL: SIZES["300 µs"]}).items():
        for target in (OPENVINO, ONNXRUNTIME):
            if not report.wants(name, target):
                continue
            model = chain_model(width=width, rows=rows, layers=layers)
            with engine_of(several(model) if name == SEVERAL else model, [single(target)]) as engine:
                # One after the other: who brings a new array each time, or gives an answer back, is another user.
                # An engine's first second, in which it takes its baseline, would be two of the five that are timed here.
                found: Samples = {}
                for calls, share in zip(overhead_calls(engine, rows, width), (0.6, 0.2, 0.2), strict=True):
                    found |= interleaved(calls, seconds * share, steady=lambda: engine.stats()["drift"]["state"] != "warming up")
            bare_s = float(np.median(np.concatenate([found["bare"], found["again"]])))
            engines = np.concatenate([found["engine"], found["engine again"]])
            added = {"engine": float(np.median(engines)) - bare_s}
            added |= {each: float(np.median(found[each]) - np.median(found[f"bare {each}"])) for each in ("lent", "new")}
            allowed = max(0.02 * bare_s, 10e-6)
            excess, band = p99_excess(found, "engine")
            held = report.gate(f"overhead p50, {name} on {target}", max(added["engine"], added["new"]) <= allowed)
            held99 = report.gate(f"overhead p99, {name} on {target}", excess <= band)
            medians = " | ".join([micro(bare_s), *(f"{each * 1e6:+.1f}" for each in added.values()), f"+{micro(allowed)}", held])
            bare99 = float(np.quantile(np.concatenate([found["bare"], found["again"]]), 0.99))
            all99 = float(np.quantile(engines, 0.99)) - bare99
            tails = f"{micro(bare99)} | {all99 * 1e6:+.1f} | {excess * 1e6:+.1f} | ±{micro(band)} | {held99}"
            report.say(f"| {name} | {target} | {medians} | {tails} | {len(found['bare'])} |")


def several(model: Any) -> Any:
    """Return a chain with two inputs more, which are added to its last tensor, and its first layer as an output, too."""
    nodes, inputs, outputs = model.graph.node, model.graph.input, model.graph.output
    nodes[-1].output[0] = "last"
    for name, source, sum_name in (("a", "last", "sum"), ("b", "sum", "y")):
        nodes.append(helper.make_node("Add", [source, name], [sum_name]))
        copy = inputs.add()
        copy.CopyFrom(inputs[0])
        copy.name = name
    outputs.add().CopyFrom(outputs[0])
    outputs[1].name = "r0"
    return model


def overhead_calls(engine: Engine, rows: int, width: int) -> list[dict[str, Callable[[], object]]]:
    """Return what is compared: the bare call and the engine twice each, then one with `lend`, and one with a new array each time."""
    (executable,) = executables(engine)
    names = [each.name for each in engine.inputs]
    arrays = {name: new_buffer_like(normal(rows, width)) for name in names}
    into = {name: new_buffer_like(each) for name, each in arrays.items()}
    others = itertools.cycle([{name: normal(rows, width, seed=seed) for name in names} for seed in range(16)])
    copied = bare(executable, into)
    kept: list[Any] = [None]

    def whole() -> None:
        kept[0] = engine.run(arrays)

    def new() -> None:
        kept[0] = engine.run(next(others))

    def lent() -> None:
        with engine.lend(arrays):
            pass

    def bare_new() -> None:
        for name, array in next(others).items():
            into[name][...] = array
        copied()

    first, second = bare(executable, arrays), bare(executable, arrays)
    four = {"bare": first, "again": second, "engine": whole, "engine again": whole}
    return [four, {"bare lent": first, "lent": lent}, {"bare new": bare_new, "new": new}]


def new_buffer_like(array: Any) -> Any:
    """Return a copy of `array` where a buffer of ours would lie."""
    from aivmm.tensors import TensorSpec

    buffer = new_buffer(TensorSpec(name="x", dtype=array.dtype.name, shape=array.shape))
    assert buffer is not None
    buffer[...] = array
    return buffer


def cut(report: Report, seconds: float) -> None:
    """Plans of two stages."""
    report.say("\n## What a cut costs the engine, beyond what it costs the runtimes (µs, median)\n")
    report.say("| stages | bare whole | bare cut | engine whole | engine cut | engine's share | allowed | |")
    report.say("|---|---|---|---|---|---|---|---|")
    width, rows, layers = SIZES["300 µs"]
    model, arrays = chain_model(width=width, rows=rows, layers=layers), {"x": new_buffer_like(normal(rows, width))}
    for first, second in ((OPENVINO, OPENVINO), (ONNXRUNTIME, ONNXRUNTIME), (OPENVINO, ONNXRUNTIME), (ONNXRUNTIME, OPENVINO)):
        if not report.wants(first, second):
            continue
        parts = [single(first, 0, layers - 1), single(second, layers)]
        with engine_of(model, [single(first)]) as whole, engine_of(model, parts) as apart:
            calls = {
                "bare whole": bare(executables(whole)[0], arrays),
                "bare cut": chained(apart, arrays),
                "engine whole": lambda whole=whole: whole.run(arrays),
                "engine cut": lambda apart=apart: apart.run(arrays),
            }
            found = {name: float(np.median(each)) for name, each in interleaved(calls, seconds).items()}
        share = (found["engine cut"] - found["engine whole"]) - (found["bare cut"] - found["bare whole"])
        held = report.gate(f"cut, {first} to {second}", share <= 20e-6)
        report.say(f"| {first}, {second} | {' | '.join(micro(each) for each in found.values())} | {micro(share)} | 20 | {held} |")


_PIPELINE_BLOCK_S = 0.5


def pipeline(report: Report, seconds: float) -> None:
    """Two stages, on threads of their own."""
    report.say("\n## Pipelined: rate against the slower stage's, timed bare while the other one runs (per second)\n")
    report.say("| stages | first | second | engine | ratio of blocks: median (its 95 % interval) | range | least | |")
    report.say("|---|---|---|---|---|---|---|---|")
    model = chain_model(width=1024, rows=32, layers=8)
    x = normal(32, 1024)
    for first, second in ((OPENVINO, ONNXRUNTIME), (OPENVINO, OPENVINO), (ONNXRUNTIME, ONNXRUNTIME)):
        if not report.wants(first, second):
            continue
        parts = [single(first, 0, 7), single(second, 8)]
        with engine_of(model, parts, execution=Execution(mode="pipelined")) as engine:
            calls = []
            for executable in executables(engine):
                inputs = {each.name: new_buffer_like(np.zeros(each.shape, dtype=np.float32) + 0.1) for each in executable.inputs}
                calls.append(bare(executable, inputs))
            rates: list[tuple[float, float, float]] = []
            # Short blocks, many of them, and each second pair the other way around: the host changes its speed within seconds.
            for number in range(1 + max(2, round(2 * seconds / _PIPELINE_BLOCK_S))):
                answers = streamed(engine, x, _PIPELINE_BLOCK_S) if number % 2 else 0.0
                apart = side_by_side(calls, _PIPELINE_BLOCK_S)
                rates.append((*apart, answers or streamed(engine, x, _PIPELINE_BLOCK_S)))
        table = np.array(rates[1:])  # the first block warms up
        ratios = table[:, 2] / table[:, :2].min(axis=1)
        held = report.gate(f"pipeline, {first} and {second}", float(np.median(ratios)) >= 0.95)
        middle = np.median(table, axis=0)
        shown = f"{median_shown(ratios)} | {ratios.min():.3f} to {ratios.max():.3f}"
        report.say(f"| {first}, {second} | {middle[0]:.1f} | {middle[1]:.1f} | {middle[2]:.1f} | {shown} | 0.95 | {held} |")


def side_by_side(calls: Sequence[Callable[[], object]], seconds: float) -> list[float]:
    """Return the rate of each call, all running at once on threads of their own."""
    rates = [0.0] * len(calls)
    end = time.perf_counter() + seconds

    def work(index: int) -> None:
        call, count, started = calls[index], 0, time.perf_counter()
        while time.perf_counter() < end:
            call()
            count += 1
        rates[index] = count / (time.perf_counter() - started)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(calls))]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    return rates


def streamed(engine: Engine, x: Any, seconds: float) -> float:
    """Return the rate at which a full pipeline answers."""
    end = math.inf  # until it is full: filling it may take longer than a short block

    def requests() -> Iterator[dict[str, Any]]:
        while time.perf_counter() < end:
            yield {"x": x}

    stream = engine.stream(requests())
    for _ in range(6):
        next(stream)
    started, count = time.perf_counter(), 0
    last, end = started, started + seconds
    for _ in stream:
        now = time.perf_counter()
        if now < end or not count:  # and not while it runs empty, unless one answer takes longer than the block
            count, last = count + 1, now
    return count / max(last - started, 1e-9)


def memory(report: Report, calls: int) -> None:
    """Many calls."""
    report.say(f"\n## Resident memory over {calls:,} calls\n")
    report.say("| how | calls | after warm-up | at the end | growth | allowed | |")
    report.say("|---|---|---|---|---|---|---|")
    x = {"x": normal(2, 32)}
    cut = [single(OPENVINO, 0, 3), single(ONNXRUNTIME, 4)]
    process = psutil.Process()
    ways = (
        ("run, one stage", [single(ONNXRUNTIME)], Execution(), calls),
        ("run", cut, Execution(), calls),
        ("stream, pipelined", cut, Execution(mode="pipelined"), calls // 5),
    )
    for how, parts, execution, count in ways:
        with engine_of(chain_model(), parts, execution=execution) as engine:

            def many(number: int, engine: Engine = engine, pipelined: bool = execution.mode == "pipelined") -> None:
                if pipelined:
                    for _ in engine.stream(x for _ in range(number)):
                        pass
                else:
                    for _ in range(number):
                        engine.run(x)

            many(max(20_000, count // 20))
            before = process.memory_info().rss
            many(count)
            after = process.memory_info().rss
        held = report.gate(f"memory, {how}", after - before < 1 << 20)
        shown = " | ".join(f"{each / 2**20:.2f} MiB" for each in (before, after, after - before))
        report.say(f"| {how} | {count:,} | {shown} | 1 MiB | {held} |")


def threads(report: Report, seconds: float, count: int = 64) -> None:
    """Many threads on one engine."""
    report.say(f"\n## {count} threads on one engine for {seconds:.0f} s, every answer compared\n")
    report.say("| how | calls | wrong | stuck | |")
    report.say("|---|---|---|---|---|")
    cut = [single(OPENVINO, 0, 3), single(ONNXRUNTIME, 4)]
    for how, mode, parts in (("one stage", "sequential", [single(OPENVINO)]), *((each, each, cut) for each in ("sequential", "pipelined"))):
        with engine_of(chain_model(), parts, execution=Execution(mode=mode), callers=2) as engine:  # type: ignore[arg-type]
            samples = [{"x": normal(2, 32, seed=seed)} for seed in range(count)]
            answers = [engine.run(each)["y"] for each in samples]
            end = time.monotonic() + seconds
            wrong, done = [0] * count, [0] * count

            def work(
                index: int, engine: Engine = engine, end: float = end, wrong: list[int] = wrong, done: list[int] = done,
                samples: Any = samples, answers: Any = answers,
            ) -> None:  # fmt: skip
                kept = deque([answers[index]] * 3, maxlen=3)  # what later runs must not write
                while time.monotonic() < end:
                    kept.append(engine.run(samples[index])["y"])
                    wrong[index] += not np.allclose(kept[done[index] % 3], answers[index], rtol=1e-4, atol=1e-5)
                    done[index] += 1

            workers = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(count)]
            for each in workers:
                each.start()
            for each in workers:
                each.join(seconds + 60)
            stuck = sum(each.is_alive() for each in workers)
            held = report.gate(f"threads, {how}", not any(wrong) and not stuck and all(done))
            report.say(f"| {how} | {sum(done):,} | {sum(wrong)} | {stuck} | {held} |")


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS))
    parser.add_argument(
        "--row", default="", help="of overhead, cut, pipeline and cold only rows whose name holds this: '300 µs, onnxruntime:CPU'"
    )
    parser.add_argument("--seconds", type=float, default=8.0, help="for each comparison")
    parser.add_argument("--quick", action="store_true", help="a look whether it works; its figures mean nothing")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    from benchmarks.cold_start import cold  # it reports to this module

    wanted = options.only.split(",")
    unknown = set(wanted) - set(SECTIONS)
    if unknown:
        parser.error(f"unknown section {unknown.pop()!r}; choose from {', '.join(SECTIONS)}")
    seconds = 0.7 if options.quick else options.seconds
    report = Report(row=options.row)
    device = cpu_device()
    report.say("# The engine beside the bare runtimes\n")
    runtimes = f"OpenVINO {version('openvino')}, ONNX Runtime {version('onnxruntime-gpu')}, Python {sys.version.split()[0]}"
    report.say(f"{device.model}, {device.cores} cores usable, {runtimes}; load when it began: {os.getloadavg()[0]:.2f}.")
    report.say(f"`python -m benchmarks.engine {' '.join(sys.argv[1:])}`; hot path: {'python' if hot.native is None else 'native'}.")
    measures: dict[str, Callable[[], None]] = {
        "overhead": lambda: overhead(report, seconds),
        "cut": lambda: cut(report, seconds),
        "pipeline": lambda: pipeline(report, seconds),
        "memory": lambda: memory(report, 20_000 if options.quick else 1_000_000),
        "threads": lambda: threads(report, 2 if options.quick else 60),
        "cold": lambda: cold(report, 3 if options.quick else 31),
    }
    for name in wanted:
        measures[name]()
    report.say(f"\nGates that failed: {', '.join(report.failed) or 'none'}.")
    if options.out:
        options.out.write_text("\n".join(report.lines) + "\n", encoding="utf-8")
    raise SystemExit(1 if report.failed else 0)


if __name__ == "__main__":
    main()
