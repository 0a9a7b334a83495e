"""Runs the command line as its users do, in processes of its own, and builds the small models that it is run on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper

from aivmm.tuner.options import DEFAULT_COSINE

ROOT = Path(__file__).parent.parent.parent
MODELS = ROOT.parent / "shared" / "models"
SMALL = ("--budget", "10s", "--trials", "3", "--top", "1")  # the trials fit in any case: they are asked for at once
ONE_RUNTIME = ("--targets", "onnxruntime")  # where a second one would only be measured too, for 10 seconds more
LIMIT_S = 240.0  # of one command: many times what it takes, for a machine that others keep busy

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON object that standard output is, and nothing else."""
        lines = self.out.splitlines()
        assert len(lines) == 1, f"standard output is not one line:\n{self.out}\n{self.err}"
        found = json.loads(lines[0], parse_constant=lambda text: (_ for _ in ()).throw(ValueError(f"{text} is no JSON")))
        assert isinstance(found, dict)
        return found

    @property
    def error_lines(self) -> list[str]:
        """The lines of standard error that are not progress."""
        return [line for line in self.err.splitlines() if line.strip() and not line.startswith("[")]


def environment(home: Path, **changes: str) -> dict[str, str]:
    """Return an environment in which everything that aivmm keeps lies below `home`, and nothing tells it that it is tested."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AIVMM_", "XDG_", "PYTEST_", "CI", "GITHUB_"))}
    folders = {"HOME": "home", "USERPROFILE": "home", "LOCALAPPDATA": "data", "XDG_DATA_HOME": "data", "AIVMM_CACHE": "cache"}
    for folder in folders.values():
        (home / folder).mkdir(parents=True, exist_ok=True)
    kept |= {name: str(home / folder) for name, folder in folders.items()}
    # A lock of our own: what is asserted here does not depend on how long something took, so nobody needs to wait for us, nor we for them.
    return {**kept, "AIVMM_LOCK": str(home / "lock"), "PYTHONIOENCODING": "utf-8", "COLUMNS": "100", **changes}


def command(*arguments: str | Path) -> list[str]:
    """Return how to start aivmm with `arguments`. -P: as with the console script, the current folder is not imported from."""
    return [sys.executable, "-P", "-m", "aivmm", *map(str, arguments)]


def run(arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str], limit_s: float = LIMIT_S) -> Finished:
    """Run a command to its end."""
    done = subprocess.run(
        arguments, cwd=cwd, env=dict(env), capture_output=True, encoding="utf-8", timeout=limit_s, stdin=subprocess.DEVNULL
    )
    return Finished(done.returncode, done.stdout, done.stderr)


@dataclass(frozen=True)
class Place:
    """A folder to work in, with a home of its own: what is measured in one place is not known in another."""

    folder: Path

    @classmethod
    def at(cls, folder: Path) -> Place:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "work").mkdir(exist_ok=True)
        return cls(folder)

    @property
    def work(self) -> Path:
        """Where commands run."""
        return self.folder / "work"

    @property
    def db(self) -> Path:
        """The database that `aivmm` uses here."""
        return self.folder / "tune.db"

    def env(self, **changes: str) -> dict[str, str]:
        return environment(self.folder, AIVMM_DB=str(self.db), **changes)

    def aivmm(self, *arguments: str | Path, **changes: str) -> Finished:
        return run(command(*arguments), cwd=self.work, env=self.env(**changes))

    @contextmanager
    def started(self, *arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
        """Start a command, and make sure that it and its workers are gone in the end."""
        process = subprocess.Popen(
            command(*arguments),
            cwd=self.work,
            env=self.env(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        try:
            with process:
                yield process
                process.kill()
        finally:
            process.kill()


@dataclass(frozen=True)
class Shell:
    """Runs commands in this process, in a folder: for the many that need no process of their own, which takes a second to start."""

    work: Path
    capsys: pytest.CaptureFixture[str]

    def aivmm(self, *arguments: str | Path) -> Finished:
        from aivmm.tuner.cli import run as run_here

        self.capsys.readouterr()
        before = Path.cwd()
        os.chdir(self.work)
        try:
            code = run_here([str(each) for each in arguments])
        finally:
            os.chdir(before)
        out, err = self.capsys.readouterr()
        return Finished(code, out, err)


def workers_of(pid: int) -> list[psutil.Process]:
    """Return the processes that a command has started."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def living(processes: Sequence[psutil.Process], *, within_s: float = 10.0) -> list[psutil.Process]:
    """Return those that still live after waiting for them; nobody reaps orphans in a container, so the dead count as gone."""
    _, alive = psutil.wait_procs(processes, timeout=0.1)
    waited = 0.0
    while waited < within_s and (alive := [each for each in alive if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]):
        psutil.wait_procs(alive, timeout=0.2)
        waited += 0.2
    found: list[psutil.Process] = list(alive)
    return found


def listing(folder: Path) -> dict[str, bytes]:
    """Return every file below `folder` with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_tiny(path: Path, *, layers: int = 3, width: int = 32) -> Path:
    """Write a small convolutional network, `input` [batch, 3, side, side] to `output` [batch, 10]; a run takes under a millisecond."""
    generator = np.random.default_rng(0)
    nodes, weights, tensor, channels = [], [], "input", 3
    for index in range(layers):
        kernel = generator.standard_normal((width, channels, 3, 3)) * np.sqrt(2 / (9 * channels))
        weights.append(numpy_helper.from_array(kernel.astype(np.float32), f"kernel{index}"))
        nodes.append(helper.make_node("Conv", [tensor, f"kernel{index}"], [f"conv{index}"], name=f"conv{index}", pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"conv{index}"], [f"relu{index}"], name=f"relu{index}"))
        tensor, channels = f"relu{index}", width
    weights.append(numpy_helper.from_array(generator.standard_normal((channels, 10)).astype(np.float32), "head"))
    nodes.append(helper.make_node("GlobalAveragePool", [tensor], ["pooled"], name="pool"))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"], name="flatten"))
    nodes.append(helper.make_node("MatMul", ["flat", "head"], ["output"], name="head"))
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, "side", "side"])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 10])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return path


TINY = ("--dim", "side=16")  # what `write_tiny`'s model has to be told


def reference(model: Path, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Return what ONNX Runtime's CPU answers in fp32."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def computes_exactly(stages: Iterable[Mapping[str, Any]]) -> bool:
    """Whether all stages of a plan compute in fp32. A "default" may be bf16: OpenVINO's is on a CPU that has it."""
    return all({"default": default_precision(each["target"])}.get(each["precision"], each["precision"]) == "fp32" for each in stages)


@cache
def default_precision(target: str) -> str:
    """Return what a target computes in when it is told nothing; "fp32" or something else, in the runtime's words."""
    import openvino

    hint = "f32" if target.startswith("onnxruntime") else openvino.Core().get_property("CPU", "INFERENCE_PRECISION_HINT").to_string()
    return "fp32" if hint == "f32" else str(hint)


def assert_as_promised(stages: Iterable[Mapping[str, Any]], mine: Mapping[str, Array], theirs: Mapping[str, Array]) -> None:
    """A plan in fp32 answers as the reference does, and any other within the accuracy limit that holds when none is given."""
    if computes_exactly(stages):
        assert relative_l2(mine, theirs) <= 1e-4
    for name, expected in theirs.items():
        assert cosine(mine[name], expected) >= DEFAULT_COSINE


def cosine(mine: Array, theirs: Array) -> float:
    """Return the cosine of the angle between two tensors."""
    mine, theirs = mine.astype(np.float64).ravel(), theirs.astype(np.float64).ravel()
    return float(mine @ theirs / (np.linalg.norm(mine) * np.linalg.norm(theirs)))


def relative_l2(mine: Mapping[str, Array], theirs: Mapping[str, Array]) -> float:
    """Return the largest relative L2 error over all outputs."""
    assert mine.keys() == theirs.keys()
    return max(float(np.linalg.norm(mine[name] - theirs[name])) / max(float(np.linalg.norm(theirs[name])), 1e-30) for name in theirs)
