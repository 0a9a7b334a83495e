"""A runtime finds memory for its weights in pages that are there, and no plan is the worse for it where there are none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from aivmm.runtime import ahead
from aivmm.runtime.engine import Engine
from aivmm.runtime.finding import packs_weights
from aivmm.runtime.paging import MOST_BYTES, make_room
from tests.making import ONNXRUNTIME, OPENVINO, Part, chain_model, make_bundle

MIB = 1 << 20
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="nothing is done elsewhere")

# Prints how many pages came new into the process while a session of 8 MB of weights was made.
LOADS = """
import resource, sys, onnxruntime
from aivmm.runtime.paging import make_room
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
if sys.argv[2] == "room":
    assert make_room(9 << 20, lambda: False)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(model: Path, *arguments: str) -> int:
    done = subprocess.run([sys.executable, "-c", LOADS, str(model), *arguments], capture_output=True, text=True, check=True)
    return int(done.stdout)


@LINUX
def test_onnx_runtime_packs_weights_into_the_pages_that_are_there(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "m.aivmm", chain_model(width=512, layers=8), [Part(ONNXRUNTIME)])
    (model,) = (bundle / "segments").glob("*.onnx")
    without = faults(model, "none")
    if without < 2048:
        pytest.skip(f"{without} faults for 8 MiB: this system counts them otherwise, or gives large pages unasked")
    assert faults(model, "room") < without - 1024


@LINUX
def test_it_stops_when_it_is_told() -> None:
    asked = iter([False, False, True])
    assert make_room(9 * MIB, lambda: next(asked)) and list(asked) == []


@LINUX
@pytest.mark.parametrize("size", [0, 4 * MIB - 1, MOST_BYTES + 1, 1 << 40])
def test_what_is_small_or_very_large_is_left_as_it_is(size: int) -> None:
    assert not make_room(size, lambda: False)


@LINUX
def test_where_there_is_no_more_memory_nothing_is_made_of_it() -> None:
    code = "import resource; from aivmm.runtime.paging import make_room; resource.setrlimit(resource.RLIMIT_DATA, (1 << 20, 1 << 20))"
    done = subprocess.run([sys.executable, "-c", f"{code}; print(make_room(9 << 20, bool))"], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("False\n", 0), done.stderr


# Prints by how many bytes the process is larger than before it loaded a plan: while it is loaded, and when it was closed.
CLOSES = """
import gc, sys, aivmm, numpy as np
from aivmm.runtime.engine import Engine
from aivmm.runtime.ort_library import wake
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
wake()
before = resident()
engine = Engine.load(sys.argv[1])
engine.run({"x": np.zeros((2, 512), np.float32)})
assert engine._has_room
loaded = resident()
engine.close()
del engine
gc.collect()
print(loaded - before, resident() - before)
"""


@LINUX
def test_what_was_room_for_weights_is_given_back_when_the_engine_is_closed(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "m.aivmm", chain_model(width=512, layers=16), [Part(ONNXRUNTIME)])  # 16 MiB
    environment = {**os.environ, "AIVMM_CACHE": str(tmp_path / "cache")}
    for _ in range(2):  # compiled, and taken from the cache
        done = subprocess.run([sys.executable, "-c", CLOSES, str(bundle)], capture_output=True, text=True, check=True, env=environment)
        loaded, closed = map(int, done.stdout.split())
        assert loaded > 14 * MIB
        assert closed < loaded - 10 * MIB


def test_only_runtimes_that_pack_on_the_host_get_room() -> None:
    assert packs_weights(["openvino:CPU", "onnxruntime:CPU"])
    assert not packs_weights(["openvino:CPU", "onnxruntime:CUDA:0", "null:fast", "acme:CPU"])


@pytest.mark.parametrize("target, given", [(ONNXRUNTIME, True), (OPENVINO, False)])
def test_an_engine_has_room_for_what_lies_in_the_bundle(tmp_path: Path, target: str, given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(ahead, "make_room", lambda size, until: bool(sizes.append(size)))
    bundle = make_bundle(tmp_path / "m.aivmm", chain_model(), [Part(target)])
    with Engine.load(bundle) as engine:
        engine.run({"x": np.zeros((2, 32), dtype=np.float32)})
    lies_there = sum(each.stat().st_size for each in bundle.rglob("*") if each.is_file())
    assert sizes == ([lies_there] if given else [])
