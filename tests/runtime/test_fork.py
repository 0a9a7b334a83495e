"""A process that was forked from one with an engine in it: told to load the plan itself, in each way of asking, and never left hanging."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aivmm.errors import UsageError
from aivmm.runtime.engine import Engine
from aivmm.runtime.plan import Batching, Execution
from tests.making import ONNXRUNTIME, OPENVINO, Part, chain_model, make_bundle, normal
from tests.runtime.bundles import zipped
from tests.runtime.engines import Load

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")

X = {"x": normal(2, 32)}
WAYS: dict[str, Callable[[Engine], Any]] = {
    "run": lambda engine: engine.run(X),
    "submit": lambda engine: engine.submit(X).result(),
    "arun": lambda engine: asyncio.run(engine.arun(X)),
    "stream": lambda engine: list(engine.stream([X])),
    "lend": lambda engine: engine.lend(X).__enter__(),
}


def refusals_in_a_child(engine: Engine, first: Callable[[], object] = lambda: None) -> list[str]:
    """Fork, do what comes `first`, ask in each way there, and return the ways that were not refused as they should be."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that there are threads is the point
        child = os.fork()
    if child == 0:
        signal.alarm(60)  # ends what hangs, and the test with it
        first()
        for name, ask in WAYS.items():
            try:
                ask(engine)
                os.write(writing, f"{name} was answered\n".encode())
            except UsageError as error:
                if "before the process was forked; load the plan in each process" not in str(error):
                    os.write(writing, f"{name}: {error}\n".encode())
            except BaseException as error:  # noqa: BLE001 - the child must not go on as a second run of the tests
                os.write(writing, f"{name}: {error!r}\n".encode())
        engine.close()
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as told:
        found = told.read().splitlines()
    _, status = os.waitpid(child, 0)
    return found if status == 0 else [*found, f"the child ended with {status}"]


@pytest.mark.parametrize("execution", [Execution(), Execution(mode="pipelined"), Execution(batching=Batching(max_batch=2))])
@pytest.mark.parametrize("timeout_s", [None, 60.0])
def test_a_forked_process_is_told_to_load_the_plan_itself(load: Load, execution: Execution, timeout_s: float | None) -> None:
    engine = load(chain_model(), [Part("null:CPU")], execution=execution, batch=2, timeout_s=timeout_s)
    for _ in range(2):  # the first request goes a longer way than later ones
        for ask in WAYS.values():
            if ask is not WAYS["lend"]:
                ask(engine)
    assert refusals_in_a_child(engine) == []
    for ask in (WAYS["run"], WAYS["submit"], WAYS["arun"]):
        ask(engine)  # the parent goes on


def test_an_engine_that_nobody_asked_before_the_fork_is_refused_as_well(load: Load) -> None:
    engine = load(chain_model(), [Part("null:CPU")])
    assert refusals_in_a_child(engine) == []
    engine.run(X)


def test_who_forks_while_outputs_are_lent_to_him_is_refused_once_he_gave_them_back(load: Load) -> None:
    engine = load(chain_model(), [Part("null:CPU", 0, 3), Part("null:CPU", 4)])
    for _ in range(3):
        engine.run(X)
    loan = engine.lend(X)
    loan.__enter__()
    assert refusals_in_a_child(engine, lambda: loan.__exit__(None, None, None)) == []
    loan.__exit__(None, None, None)
    engine.run(X)


ENDING = """
import os, signal, sys
import numpy as np
import aivmm
engine = aivmm.load_plan(sys.argv[1])
inputs = {"x": np.ones((2, 32), np.float32)}
engine.run(inputs)
child = os.fork()
if child == 0:
    signal.alarm(30)  # ends what hangs
    if sys.argv[2] == "closes":
        engine.close()
    sys.exit()  # as servers that fork their workers do; `multiprocessing` leaves without ending the interpreter
print(os.waitpid(child, 0)[1], engine._bundle.folder.is_dir(), engine.run(inputs)["y"].shape)
"""


@pytest.mark.parametrize("target", [OPENVINO, ONNXRUNTIME])
@pytest.mark.parametrize("child", ["closes", "ends"])
def test_a_forked_process_ends_and_leaves_its_parent_what_was_unpacked(tmp_path: Path, target: str, child: str) -> None:
    """OpenVINO waits for its threads when a model is freed, and they are the parent's."""
    path = zipped(make_bundle(tmp_path / "m.aivmm", chain_model(), [Part(target)]), tmp_path / "m.zip")
    ran = subprocess.run([sys.executable, "-c", ENDING, path, child], capture_output=True, text=True, timeout=120)
    assert ran.stdout == "0 True (2, 32)\n", ran.stdout + ran.stderr
