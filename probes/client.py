"""The parent's side of a worker: start it, ask it, and outlive whatever happens to it.

Messages are lines of JSON over the worker's standard input and output; arrays travel as files. Nothing is pickled: a driver that goes wild
in the child must not reach the parent through what it sends. What it may do is crash, hang, take all memory, write rubbish where its
answers go, close its pipes and leave children behind: each of these ends in `WorkerDied` with a reason, and in a process that is gone.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from types import TracebackType
from typing import IO, Any

import psutil

from aivmm.errors import AivmmError, ModelError, Unsupported, UsageError
from aivmm.probes import guard, phases
from aivmm.probes.watch import MemoryWatch, ending

START_LIMIT_S = 60.0
_COMPILE_LIMIT_S = 300.0  # compilations of minutes are real on NPUs
_RUN_LIMIT_S = 120.0
_OUTPUT_BYTES = 8 << 10  # how much of what a worker prints is kept
_LINE_BYTES = 16 << 20  # the longest answer taken
_UNREAD = 8  # how many answers may wait: one is asked for at a time, so more are rubbish
_LAST_WORDS_S = 0.3  # for a worker that hangs to say where
# What uses something that was loaded before: it makes no sense in a fresh worker.
_NEEDS_LOADED = frozenset({"judge", "outputs", "stages", "timed"})
_ERRORS: dict[str, type[AivmmError]] = {"Unsupported": Unsupported, "UsageError": UsageError, "ModelError": ModelError}


def compile_limit_s() -> float:
    """Return how long a worker may take to compile a model: 300 s, or `AIVMM_COMPILE_LIMIT` seconds.

    Raises:
        UsageError: the variable is no time.
    """
    return _limit_s("AIVMM_COMPILE_LIMIT", _COMPILE_LIMIT_S)


def run_limit_s() -> float:
    """Return how long a worker may take for anything else that it is asked: 120 s, or `AIVMM_RUN_LIMIT` seconds.

    Raises:
        UsageError: the variable is no time.
    """
    return _limit_s("AIVMM_RUN_LIMIT", _RUN_LIMIT_S)


def _limit_s(name: str, default: float) -> float:
    given = os.environ.get(name)
    if not given:
        return default
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise UsageError(f"{name} is {given!r}, which is no number of seconds", advice="set it to one such as 600, or unset it")
    return seconds


class WorkerDied(Exception):
    """The worker crashed, hung or was killed, or a plug-in's own code broke in it.

    `reason` is for people; `output` is the last that it printed.
    """

    def __init__(self, reason: str, output: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.output = output


class WorkerLate(WorkerDied):
    """It was stopped when whoever asked had no more time. Whether it hangs or is slow nobody waited long enough to tell."""


class WorkerLost(WorkerDied):
    """The worker had died before it was asked, or was not to be trusted any more: no fault of what was asked now."""


class Worker:
    """A spawned process that does what cannot be trusted. Started at the first call, and again at the first call after it died."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.generation = 0  # grows with each start: what was compiled in an earlier one is gone
        self._process: subprocess.Popen[bytes] | None = None
        self._answers: queue.Queue[bytes | None] = queue.Queue()
        self._printed: deque[bytes] = deque()
        self._drain: threading.Thread | None = None
        self.asked = 0  # requests so far, each start's first among them
        self._retired = False

    @property
    def pid(self) -> int:
        """The process's id; 0 when it does not run."""
        return self._process.pid if self._process and self._process.poll() is None else 0

    def call(
        self, operation: str, *, limit_s: float, run_limit_s: float | None = None, patience_s: float = math.inf, **arguments: Any
    ) -> dict[str, Any]:
        """Ask the worker for one thing and wait at most `limit_s` seconds; where it says that it runs what it compiled, `run_limit_s` more.

        What takes longer is taken for one that hangs. `patience_s` is what the caller can wait in all, which says nothing about the worker.

        Raises:
            WorkerDied: it crashed, or was killed for taking longer or for using more memory than the machine can spare; or a plug-in broke.
            WorkerLate: it was killed since `patience_s` were over.
            WorkerLost: what is asked needs what was loaded in it, and it had died before.
            AivmmError: it refused, in the class it refused with.
            RuntimeError: a bug in the worker's own Python code, with its traceback.
        """
        self._ensure(operation)
        answer = self._ask({"operation": operation, **arguments}, limit_s, run_limit_s, patience_s)
        if "result" in answer:
            result: dict[str, Any] = answer["result"]
            return result
        error = answer["error"]
        if error["kind"] in _ERRORS:
            raise _ERRORS[error["kind"]](error["message"], advice=error.get("advice", ""))
        if error["kind"] == "plug-in":
            raise WorkerDied(error["message"], error["traceback"][-_OUTPUT_BYTES:].strip())
        raise RuntimeError(f"in worker {self.name}, {operation}:\n{error['traceback']}")

    def close(self) -> None:
        """End the process, gently first, since a driver may want to clean up; then whatever it has started."""
        process = self._process
        if process is None:
            return
        self._process = None
        try:
            if process.stdin:
                process.stdin.close()
            process.wait(timeout=2.0)
        except (OSError, subprocess.TimeoutExpired):
            _kill(process)
            process.wait()
        _kill_group(process.pid)
        # Its pipes are closed by the threads that read them.

    def retire(self) -> None:
        """End the process for good: another thread may be about to start it, and that start is then undone."""
        self._retired = True
        self.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _ensure(self, operation: str) -> None:
        """Have a process that runs and that has not said anything out of turn: who wrote that is not known, so nobody is blamed for it."""
        talks = self.pid != 0 and not self._answers.empty()
        if operation in _NEEDS_LOADED and self.generation and (talks or self.pid == 0):
            if talks or self._process is None:
                self._end_now()
                raise WorkerLost("what was loaded here is gone: the worker ended, or wrote rubbish where its answers go")
            died = self._died("")
            raise WorkerLost(f"{died.reason} after its last answer", died.output)
        if talks:
            self._end_now()
        if self.pid == 0:
            self._start()

    def _start(self) -> None:
        self.close()
        self.generation += 1
        self._answers = queue.Queue(_UNREAD)
        self._printed = deque()
        # -P: the current folder may hold an onnx.py, or our own source folders.
        command = [sys.executable, "-P", "-m", "aivmm.probes.worker", str(os.getpid())]
        self._process = process = _spawner().submit(_spawn, command).result()
        assert process.stdout and process.stderr
        if self._retired:  # before, or meanwhile by another thread, which found no process to end
            self._end_now()
            process.stdout.close()
            process.stderr.close()
            raise WorkerDied("was ended with its laboratory")
        guard.watch(process.pid)
        threading.Thread(target=_read_answers, args=(process.stdout, self._answers), daemon=True).start()
        self._drain = threading.Thread(target=_keep_tail, args=(process.stderr, self._printed), daemon=True)
        self._drain.start()
        self._ask({"operation": "hello"}, START_LIMIT_S)

    def _ask(
        self, message: dict[str, Any], limit_s: float, run_limit_s: float | None = None, patience_s: float = math.inf
    ) -> dict[str, Any]:
        process = self._process
        assert process and process.stdin
        self.asked += 1
        try:
            # Requests are shorter than a pipe's buffer, so writing one does not wait for a worker that does not read.
            process.stdin.write(json.dumps({"id": self.asked, **message}).encode() + b"\n")
            process.stdin.flush()
            return self._wait(process, limit_s, run_limit_s, patience_s)
        except OSError:
            raise self._died("") from None  # the pipe broke: it is gone
        except WorkerDied:
            raise
        except BaseException:  # interrupted: the answer to this question would be taken for the answer to the next one
            self._end_now()
            raise

    def _wait(self, process: subprocess.Popen[bytes], limit_s: float, run_limit_s: float | None, patience_s: float) -> dict[str, Any]:
        """Return the answer to the last question. Sleeps meanwhile: the one that is measured shares the machine with us."""
        memory = MemoryWatch(process.pid)
        end, pause, doing = time.monotonic() + limit_s, memory.look(), ""
        last = time.monotonic() + patience_s
        while True:
            try:
                line = self._answers.get(timeout=max(0.0, min(end - time.monotonic(), last - time.monotonic(), pause)))
            except queue.Empty:
                if process.poll() is not None:
                    # Its pipe need not have ended with it: what it forked may hold that open.
                    try:
                        line = self._answers.get(timeout=0.2)
                    except queue.Empty:
                        raise self._died("") from None
                else:
                    if time.monotonic() >= end:
                        _say_where(process)
                        raise self._died(f"took longer than {limit_s:g} s{doing} and was stopped") from None
                    if time.monotonic() >= last:
                        died = self._died(f"was stopped after {patience_s:.3g} s, when time was up")
                        raise WorkerLate(died.reason, died.output) from None
                    pause = memory.look()
                    if pause == 0.0:
                        raise self._died(memory.reason) from None
                    continue
            if line is None:
                raise self._died("")
            answer = _parsed(line, self.asked)
            if answer is None:
                raise self._died("wrote rubbish where its answers go and was stopped")
            if "phase" not in answer:
                return answer
            if answer["phase"] == phases.RUN and run_limit_s is not None:
                end, limit_s, doing = time.monotonic() + run_limit_s, run_limit_s, " to run"

    def _died(self, reason: str) -> WorkerDied:
        """End what is left of the process; return why it ended, `reason` or what its exit status says."""
        process = self._process
        assert process
        if reason:
            _kill(process)
        try:
            code = process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            reason = "closed the pipe of its answers and was stopped"
            _kill(process)
            code = process.wait()
        _kill_group(process.pid)
        if self._drain:
            self._drain.join(timeout=1.0)
        output = b"".join(self._printed)[-_OUTPUT_BYTES:].decode(errors="replace").strip()
        self.close()
        return WorkerDied(reason or ending(code), output)

    def _end_now(self) -> None:
        if self._process is not None:
            _kill(self._process)
        self.close()


@cache
def _spawner() -> ThreadPoolExecutor:
    # On Linux a worker asks to be killed when the *thread* that started it ends, so all are started by one that lives as long as we do.
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="aivmm-spawner")


def _spawn(command: list[str]) -> subprocess.Popen[bytes]:
    # In a session, and so a process group, of its own: what a driver starts ends with its worker, and a terminal's Ctrl-C reaches neither.
    # With the user's environment, and not with what native libraries set in ours: once OpenVINO has looked for devices here, a loader of
    # OpenCL that would inherit OCL_ICD_FILENAMES=libpocl.so.2 from that shows no other driver, and the worker finds no GPU.
    pipe, environment = subprocess.PIPE, dict(os.environ)
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment, start_new_session=True)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a worker with all that it has started."""
    if sys.platform == "win32":
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    child.kill()
    elif process.poll() is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def _kill_group(pid: int) -> None:
    """Kill what a worker that has ended, and has been waited for, left in its group."""
    if sys.platform == "win32":
        return
    guard.forget(pid)
    # While members are left, no new process gets the number; if one has it, none were.
    if not psutil.pid_exists(pid):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


def _say_where(process: subprocess.Popen[bytes]) -> None:
    """Let a worker that hangs print its Python stack, which becomes the end of its output."""
    if sys.platform != "win32":
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            process.send_signal(signal.SIGUSR1)
            process.wait(timeout=_LAST_WORDS_S)


def _parsed(line: bytes, number: int) -> dict[str, Any] | None:
    """Return the message in a line if it belongs to question `number`, or else None."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(message, dict) or message.get("id") != number:
        return None
    found = [isinstance(message.get("phase"), str), isinstance(message.get("result"), dict), isinstance(message.get("error"), dict)]
    return message if any(found) else None


def _read_answers(stream: IO[bytes], answers: queue.Queue[bytes | None]) -> None:
    """Put each line into `answers`, and None at the end. A worker that floods us is not read on: its first line shows what it is."""
    with stream, contextlib.suppress(OSError, queue.Full):
        while line := stream.readline(_LINE_BYTES):
            answers.put_nowait(line)
    with contextlib.suppress(queue.Full):
        answers.put_nowait(None)


def _keep_tail(stream: IO[bytes], printed: deque[bytes]) -> None:
    """Read all that a worker prints, so that it never blocks, and keep the end of it."""
    kept = 0
    with stream, contextlib.suppress(OSError):
        while chunk := os.read(stream.fileno(), 1 << 16):
            printed.append(chunk)
            kept += len(chunk)
            while kept - len(printed[0]) >= _OUTPUT_BYTES:
                kept -= len(printed.popleft())
