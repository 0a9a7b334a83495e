"""What the probes' tests share: a plug-in backend that does everything wrong that native code can do, installed for workers only."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aivmm.probes import wire
from aivmm.probes.client import Worker
from aivmm.runtime.target import Device, Target

WILD = """
import ctypes, os, signal, sys, threading, time
import numpy as np
from aivmm.runtime.backend import Placement
from aivmm.runtime.config import Config
from aivmm.runtime.target import Device, Target
from aivmm.tensors import TensorSpec

def everywhere(data):  # whatever is open besides the standard three: the pipe of the answers is among them
    for fd in range(3, 64):
        try:
            os.write(fd, data)
        except OSError:
            pass

def later(what, *arguments):
    threading.Timer(0.3, what, arguments).start()

def misbehave(how):
    if how == "segfault": ctypes.string_at(0)
    if how == "abort": os.abort()
    if how == "exit": sys.exit(7)
    if how == "vanish": os._exit(9)
    if how == "busy":
        while True: pass
    if how == "idle": time.sleep(3600)
    if how == "raise": raise KeyError("a bug of the plug-in")
    if how == "memory": raise MemoryError("no more")
    if how == "read": sys.stdout.write(repr(sys.stdin.read()) + repr(os.read(0, 10)))
    if how == "print":
        line = b"x" * 9999 + b"\\n"
        for number in range(5000):
            os.write(1, line)
            os.write(2, line)
        print("the end")
        ctypes.CDLL(None).puts(b"native too") if os.name == "posix" else None
    if how == "print and die":
        print("x" * 1000000 + "last words", file=sys.stderr, flush=True)
        os.abort()
    if how.startswith("child"):
        pid = os.fork()
        if pid == 0:
            time.sleep(120)
            os._exit(0)
        print("child is", pid, file=sys.stderr, flush=True)
        if how == "child and die": os.abort()
        if how == "child and hang": time.sleep(3600)
    if how == "eat":
        hoard = []
        while len(hoard) < 256:  # 4 GB and no more, should nobody stop it
            hoard.append(b"x" * (16 << 20))
        time.sleep(3600)
    if how == "rubbish": everywhere(b"hello from a driver\\n")
    if how == "half": everywhere(b"hello from a driver")
    if how == "forge": everywhere(b'{"id": 0, "result": {"first_inference_s": 1}}\\n')
    if how == "deep": everywhere(b"[" * 100000 + b"\\n")
    if how == "flood":
        while True: everywhere(b"x\\n" * 10000)
    if how == "flood one line":
        while True: everywhere(b"x" * 10000)
    if how == "rubbish later": later(everywhere, b"hello from a driver\\n")
    if how == "die later": later(os.kill, os.getpid(), 11)
    if how == "close": os.closerange(3, 256)
    if how == "close and hang":
        os.closerange(3, 256)
        time.sleep(3600)
    if how == "close the standard three": os.closerange(0, 3)
    if how == "slow": time.sleep(0.01)

class Request:
    def __init__(self, how): self.how = how; self.bound = {}
    def bind(self, name, buffer): self.bound[name] = buffer
    def run(self):
        misbehave(self.how.removeprefix("run "))
        self.bound["y"][...] = np.nan if self.how == "nan" else self.bound["x"]
    def output(self, name): return self.bound[name][:3] if self.how == "shape" else self.bound[name]

class Executable:
    inputs = [TensorSpec(name="x", dtype="float32", shape=(4,))]
    outputs = [TensorSpec(name="y", dtype="float32", shape=(4,))]
    placement = Placement(devices=("0",), nodes={"0": 1})
    def __init__(self, how):
        self.how = how
        self.effective_config = {"odd": object() if how == "not json" else np.float32(1)}
    def new_request(self): return Request(self.how)
    def close(self): pass

class Wild:
    name = "wild"
    def targets(self):
        misbehave(os.environ.get("WILD_DISCOVERY", ""))
        return [Target(runtime="wild", name="0", device=Device(kind="other", model="wild"), runtime_version="1")]
    def knobs(self, target): return []
    def baselines(self, targets, objective): return []
    def compile(self, model, target, config):
        how = dict(config.settings).get("how", "")
        misbehave(how)
        return Executable(how)
"""
TARGET = Target(runtime="wild", name="0", device=Device(kind="other", model="wild"), runtime_version="1")


@pytest.fixture(autouse=True)
def own_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine-wide lock is for measurements; tests would wait for each other's."""
    monkeypatch.setenv("AIVMM_LOCK", str(tmp_path / "measuring.lock"))


def install_wild(site: Path) -> Path:
    """Install the wild backend in `site` as pip would, and return that."""
    info = site / "wild_runtime-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "wild_runtime.py").write_text(WILD)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: wild-runtime\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[aivmm.backends]\nwild = wild_runtime:Wild\n")
    return site


def python_path(*folders: Path) -> str:
    """Return PYTHONPATH with `folders` before what it holds."""
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH", "")])])


@pytest.fixture
def wild(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install the wild backend for the processes started from here, and return where."""
    site = install_wild(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", python_path(site, Path(__file__).parent.parent.parent))
    return site


@pytest.fixture
def worker() -> Iterator[Worker]:
    with Worker("test") as started:
        yield started


@pytest.fixture
def compile_wild(wild: Path, worker: Worker, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Ask the worker to compile with the wild backend, which misbehaves as told."""
    import numpy as np

    from aivmm.probes.arrays import save_arrays

    save_arrays(tmp_path / "x.npz", {"x": np.ones(4, dtype=np.float32)})

    def ask(how: str, *, limit_s: float = 30.0, **more: Any) -> dict[str, Any]:
        config = {"settings": {"how": how}, "precision": None}
        inputs = str(tmp_path / "x.npz")
        return worker.call(
            "compile", limit_s=limit_s, name="m", model="none", target=wire.target_out(TARGET), config=config, inputs=inputs, **more
        )

    return ask
