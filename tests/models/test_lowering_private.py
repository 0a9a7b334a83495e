"""Lowering sends nothing anywhere: NNCF would report each call, unless it runs under CI or pytest. So this runs in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from aivmm.models.prepare import prepare
from tests.models.test_lowering import products

TRAP = """
import socket, sys
reached = []
def refuse(*given, **named):
    import traceback
    reached.append("".join(traceback.format_stack(limit=12)))
    raise OSError("the network was reached for")
class Guarded(socket.socket):
    def __init__(self, *given, **named):
        refuse()
socket.socket = Guarded
for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex", "create_connection"):
    setattr(socket, name, refuse)
{before}
import numpy as np
from pathlib import Path
from aivmm.models.lowering import lower
from aivmm.models.lowering_recipes import recipes
sample = {{"x": np.ones((1, 64), np.float32)}}
for recipe in recipes("int8", "CNN")[:1] + recipes("int4", "CNN")[1:2]:
    lower(Path({model!r}), Path({out!r}), recipe, [sample])
assert "nncf" in sys.modules and "pytest" not in sys.modules
import threading, time
time.sleep(0.5)  # reports go out from threads
assert not reached, reached
{after}
print("done")
"""


def run(tmp_path: Path, *, before: str = "", after: str = "") -> subprocess.CompletedProcess[str]:
    prepare(products(tmp_path / "m.onnx"), tmp_path / "p.onnx")
    home = tmp_path / "home"
    home.mkdir()
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in ("CI", "GITHUB_ACTIONS") and not name.startswith(("NNCF", "PYTEST"))
    }
    env |= {"HOME": str(home), "USERPROFILE": str(home)}
    code = TRAP.format(model=str(tmp_path / "p.onnx"), out=str(tmp_path / "low.onnx"), before=before, after=after)
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False, timeout=120)


def test_lowering_opens_no_socket_prints_nothing_and_leaves_the_home_empty(tmp_path: Path) -> None:
    after = "assert not any(each.partition('.')[0] == 'openvino_telemetry' for each in sys.modules), 'it was loaded'"
    done = run(tmp_path, after=after)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
    assert list((tmp_path / "home").rglob("*")) == []


def test_neither_does_it_when_somebody_imported_nncf_before(tmp_path: Path) -> None:
    sends = (
        "sent = []\nimport nncf.telemetry.wrapper as w\n"
        "w.NNCFTelemetry.send_event = w.NNCFTelemetry.start_session = lambda *a, **k: sent.append(a)\nimport nncf"
    )
    done = run(tmp_path, before=sends, after="assert not sent, sent")
    assert done.returncode == 0, done.stderr


def test_the_trap_would_tell(tmp_path: Path) -> None:
    """NNCF left to itself does report: or else the tests above would prove nothing."""
    sends = (
        "sent = []\nimport nncf, onnx\nimport nncf.telemetry.wrapper as w\n"
        "w.NNCFTelemetry.start_session = w.NNCFTelemetry.end_session = lambda *a, **k: None\n"
        "w.NNCFTelemetry.send_event = lambda *a, **k: sent.append(k)\n"
        f"nncf.compress_weights(onnx.load({str(tmp_path / 'p.onnx')!r}))\nassert sent\nprint(len(sent))"
    )
    done = run(tmp_path, before=sends)
    assert done.stdout.splitlines()[-2:-1] != ["0"] and done.returncode == 0, done.stderr
    assert np.isfinite(float(done.stdout.splitlines()[-2]))
