"""The parent's side of a worker: start it, ask it, and outlive whatever happens to it.

Messages are lines of JSON over the worker's standard input and output; arrays travel as files. Nothing is pickled: a driver that goes wild
in the child must not reach the parent through what it sends.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from types import TracebackType
from typing import IO, Any

from aivmm.errors import AivmmError, ModelError, Unsupported, UsageError

START_LIMIT_S = 60.0
_OUTPUT_BYTES = 8 << 10  # how much of what a worker prints is kept
_LOOK_S = 1.0  # how often a worker that says nothing is looked at
_LINE_BYTES = 64 << 20  # the longest answer taken
_ERRORS: dict[str, type[AivmmError]] = {"Unsupported": Unsupported, "UsageError": UsageError, "ModelError": ModelError}


class WorkerDied(Exception):
    """The worker crashed, hung or was killed. `reason` is for people; `output` is the last it printed."""

    def __init__(self, reason: str, output: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.output = output


class Worker:
    """A spawned process that does what cannot be trusted. Started at the first call, and again at the first call after it died."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.generation = 0  # grows with each start: what was compiled in an earlier one is gone
        self._process: subprocess.Popen[bytes] | None = None
        self._answers: queue.Queue[bytes | None] = queue.Queue()
        self._printed: deque[bytes] = deque()
        self._drain: threading.Thread | None = None

    @property
    def pid(self) -> int:
        """The process's id; 0 when it does not run."""
        return self._process.pid if self._process and self._process.poll() is None else 0

    def call(self, operation: str, *, limit_s: float, **arguments: Any) -> dict[str, Any]:
        """Ask the worker for one thing and wait at most `limit_s` seconds.

        Raises:
            WorkerDied: it crashed, or was killed for taking longer.
            AivmmError: it refused, in the class it refused with.
            RuntimeError: a bug in the worker's own Python code, with its traceback.
        """
        if self.pid == 0:
            self._start()
        answer = self._ask({"operation": operation, **arguments}, limit_s)
        if "result" in answer:
            result: dict[str, Any] = answer["result"]
            return result
        error = answer["error"]
        if error["kind"] in _ERRORS:
            raise _ERRORS[error["kind"]](error["message"], advice=error.get("advice", ""))
        raise RuntimeError(f"in worker {self.name}, {operation}:\n{error['traceback']}")

    def close(self) -> None:
        """End the process: gently first, since a driver may want to clean up."""
        process = self._process
        if process is None:
            return
        self._process = None
        try:
            if process.stdin:
                process.stdin.close()
            process.wait(timeout=2.0)
        except (OSError, subprocess.TimeoutExpired):
            process.kill()
            process.wait()
        # Its pipes are closed by the threads that read them: what the worker itself started may hold them open for longer.

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _start(self) -> None:
        self.close()
        self.generation += 1
        self._answers = queue.Queue()
        self._printed = deque()
        # -P: the current folder may hold an onnx.py, or our own source folders.
        command = [sys.executable, "-P", "-m", "aivmm.probes.worker", str(os.getpid())]
        self._process = _spawner().submit(_spawn, command).result()
        assert self._process.stdout and self._process.stderr
        threading.Thread(target=_read_answers, args=(self._process.stdout, self._answers), daemon=True).start()
        self._drain = threading.Thread(target=_keep_tail, args=(self._process.stderr, self._printed), daemon=True)
        self._drain.start()
        self._ask({"operation": "hello"}, START_LIMIT_S)

    def _ask(self, message: dict[str, Any], limit_s: float) -> dict[str, Any]:
        process = self._process
        assert process and process.stdin
        try:
            process.stdin.write(json.dumps(message).encode() + b"\n")
            process.stdin.flush()
            line = self._wait(process, limit_s)
        except queue.Empty:
            reason = f"took longer than {limit_s:.0f} s and was stopped"
            process.kill()
            raise self._died(reason) from None
        except OSError:
            line = None  # the pipe broke: it is gone
        except BaseException:
            # Interrupted: the answer to this question would be taken for the answer to the next one.
            process.kill()
            self.close()
            raise
        if line is None:
            raise self._died("")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _wait(self, process: subprocess.Popen[bytes], limit_s: float) -> bytes | None:
        """Return the next answer, or None when there will be none. Raises queue.Empty at the limit."""
        end = time.monotonic() + limit_s
        while True:
            with contextlib.suppress(queue.Empty):
                return self._answers.get(timeout=max(0.0, min(end - time.monotonic(), _LOOK_S)))
            if process.poll() is not None:
                # Its pipe need not have ended with it: what it forked may hold that open.
                with contextlib.suppress(queue.Empty):
                    return self._answers.get(timeout=0.2)
                return None
            if time.monotonic() >= end:
                raise queue.Empty

    def _died(self, reason: str) -> WorkerDied:
        process = self._process
        assert process
        try:
            code = process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        if self._drain:
            self._drain.join(timeout=1.0)
        output = b"".join(self._printed)[-_OUTPUT_BYTES:].decode(errors="replace").strip()
        self.close()
        return WorkerDied(reason or _exit_reason(code), output)


@cache
def _spawner() -> ThreadPoolExecutor:
    # On Linux a worker asks to be killed when the *thread* that started it ends, so all are started by one that lives as long as we do.
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="aivmm-spawner")


def _spawn(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def _exit_reason(code: int) -> str:
    if code < 0:
        import signal

        try:
            return f"crashed ({signal.Signals(-code).name})"
        except ValueError:
            return f"crashed (signal {-code})"
    return f"exited with status {code}"


def _read_answers(stream: IO[bytes], answers: queue.Queue[bytes | None]) -> None:
    with stream, contextlib.suppress(OSError):
        while line := stream.readline(_LINE_BYTES):
            answers.put(line)
    answers.put(None)


def _keep_tail(stream: IO[bytes], printed: deque[bytes]) -> None:
    """Read all that a worker prints, so that it never blocks, and keep the end of it."""
    kept = 0
    with stream, contextlib.suppress(OSError):
        while chunk := os.read(stream.fileno(), 1 << 16):
            printed.append(chunk)
            kept += len(chunk)
            while kept - len(printed[0]) >= _OUTPUT_BYTES:
                kept -= len(printed.popleft())
