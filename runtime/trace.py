"""What the stages of an engine did and when, in the Trace Event Format that Perfetto (ui.perfetto.dev) and Chrome show.

Each engine is a process of the trace, each thread that ran a stage one of its threads, and each request a span over its stages, with an
arrow from one stage to the next. Off it costs nothing: while it is on, the lanes' steps are replaced by ones that look at the clock twice.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, NamedTuple

from aivmm.errors import UsageError

if TYPE_CHECKING:
    from aivmm.runtime.engine import Engine
    from aivmm.runtime.lane import Lane
    from aivmm.runtime.plan import Stage
    from aivmm.runtime.program import Program

LIMIT = 100_000  # runs of stages that are kept: half a kilobyte each in the file


class Ran(NamedTuple):
    """One run of one stage, in nanoseconds of one clock; `queued_ns` is when it was put before the stage, 0 where nobody queues."""

    engine: int
    stage: int
    lane: int
    request: int  # the lane's, counted from 1
    thread: int
    started_ns: int
    ended_ns: int
    queued_ns: int


class Trace:
    """A recording. On from `with engine.trace() as trace:` to the end of the block; then `write` it, or look at `runs`.

    Thread-safe. What a fallback runs that took over meanwhile is recorded, too.
    """

    def __init__(self, engines: Sequence[Engine], *, limit: int = LIMIT) -> None:
        """Make a recording of `engines` that is off; `limit` is how many runs of stages it keeps."""
        self.runs: list[Ran] = []
        self.dropped = 0  # runs beyond the limit
        self._limit = limit
        self._engines = list(engines)
        self._programs: list[Program] = []
        self._stages: dict[int, Sequence[Stage]] = {}
        self._titles: dict[int, str] = {}
        self._threads: dict[int, str] = {}
        self._on = False
        self._lock = threading.Lock()  # a fallback may take over while the recording ends

    def __enter__(self) -> Trace:
        taken = next((each for each in self._engines if each.tracer is not None), None)
        if taken is not None:
            raise UsageError(f"{taken.plan.model.name} is being traced already", advice="end the other trace first")
        self._on = True
        for engine in self._engines:
            engine.tracer = self
            self.follow(engine, engine._program)
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._on = False
            for engine in self._engines:
                engine.tracer = None
            for program in self._programs:
                for lane in program.lanes:
                    lane.wrap(None)
            self._programs.clear()

    def follow(self, engine: Engine, program: Program) -> None:
        """Record what `program`, which `engine` runs now, does from here on; nothing when the recording has ended or has it already."""
        with self._lock:
            if not self._on or program in self._programs:
                return
            number = len(self._stages)
            self._programs.append(program)
            self._stages[number] = program.stages
            self._titles[number] = f"{engine.plan.model.name}, {engine.running}, {program.execution.mode}"
            # Requests stand in front of each stage of a pipeline, and in front of the first one where they are batched.
            queues = len(program.stages) if program.pipelined else int(program.execution.batching is not None)
            for lane in program.lanes:
                lane.wrap(self._recorder(number, lane, queues))

    def as_json(self) -> dict[str, Any]:
        """Return the recording as an object of the Trace Event Format; times in microseconds from the first event."""
        return {
            "traceEvents": [*self._names(), *self._events()],
            "displayTimeUnit": "ms",
            "otherData": {"made by": "aivmm", "runs of stages": len(self.runs), "left out": self.dropped},
        }

    def write(self, path: str | Path) -> Path:
        """Write the recording to a file that ui.perfetto.dev and chrome://tracing open.

        Raises:
            UsageError: it cannot be written.
        """
        path = Path(path)
        try:
            path.write_text(json.dumps(self.as_json()), encoding="utf-8")
        except OSError as error:
            raise UsageError(f"cannot write the trace to {path}: {error.strerror or error}", advice="choose another file") from error
        return path

    def _recorder(self, engine: int, lane: Lane, queues: int) -> Callable[[int, Callable[[], None]], Callable[[], None]]:
        """Return what makes a recording step of a stage's own; the first `queues` stages have a queue."""
        request = [0]
        runs, threads, clock = self.runs, self._threads, perf_counter_ns

        def wrapped(stage: int, run: Callable[[], None]) -> Callable[[], None]:
            def recorded() -> None:
                if stage == 0:
                    request[0] += 1
                queued_ns = lane.queued_ns if stage < queues else 0
                started = clock()
                try:
                    run()
                finally:
                    ended = clock()
                    thread = threading.get_ident()
                    if thread not in threads:
                        threads[thread] = threading.current_thread().name
                    if len(runs) < self._limit:
                        runs.append(Ran(engine, stage, lane.index, request[0], thread, started, ended, queued_ns))
                    else:
                        self.dropped += 1

            return recorded

        return wrapped

    def _names(self) -> Iterator[dict[str, Any]]:
        for number, title in self._titles.items():
            yield {"ph": "M", "name": "process_name", "pid": number + 1, "tid": 0, "args": {"name": title}}
        for engine, thread in sorted({(each.engine, each.thread) for each in self.runs}):
            args = {"name": self._threads[thread]}
            yield {"ph": "M", "name": "thread_name", "pid": engine + 1, "tid": self._thread(thread), "args": args}

    def _events(self) -> Iterator[dict[str, Any]]:
        if not self.runs:
            return
        ordered = sorted(self.runs, key=lambda each: (each.started_ns, each.stage))
        origin = min(each.queued_ns or each.started_ns for each in ordered)
        ends: dict[tuple[int, int, int], list[Ran]] = {}
        for each in ordered:
            ends.setdefault((each.engine, each.lane, each.request), []).append(each)
            yield from self._stage(each, origin)
        for key, mine in ends.items():
            span: dict[str, Any] = {"cat": "request", "name": "request", "id": ".".join(map(str, key))}
            span |= {"pid": key[0] + 1, "tid": self._thread(mine[0].thread)}
            yield {**span, "ph": "b", "ts": _us(mine[0].started_ns - origin), "args": {"lane": key[1]}}
            yield {**span, "ph": "e", "ts": _us(max(each.ended_ns for each in mine) - origin)}

    def _stage(self, ran: Ran, origin: int) -> Iterator[dict[str, Any]]:
        """Yield the slice of one run, and its end of an arrow."""
        stages = self._stages[ran.engine]
        stage = stages[ran.stage]
        place = {"pid": ran.engine + 1, "tid": self._thread(ran.thread), "ts": _us(ran.started_ns - origin)}
        args: dict[str, Any] = {"lane": ran.lane, "request": ran.request, "precision": stage.precision}
        if ran.queued_ns:
            args["queued_us"] = _us(ran.started_ns - ran.queued_ns)
        name = f"stage {ran.stage + 1}: {stage.target}"
        yield {**place, "ph": "X", "cat": "stage", "name": name, "dur": _us(ran.ended_ns - ran.started_ns), "args": args}
        if len(stages) > 1:
            kind = "s" if ran.stage == 0 else "f" if ran.stage == len(stages) - 1 else "t"
            arrow = {**place, "ph": kind, "cat": "hand-over", "name": "hand-over", "id": f"{ran.engine}.{ran.lane}.{ran.request}"}
            yield {**arrow, "bp": "e"} if kind == "f" else arrow

    def _thread(self, thread: int) -> int:
        """Return a small number for a thread: Perfetto keeps 32 bits of it."""
        return list(self._threads).index(thread) + 1


def _us(nanoseconds: int) -> float:
    return nanoseconds / 1000
