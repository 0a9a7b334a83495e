"""Nothing that aivmm or the libraries under it do while tuning reaches for the network."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.probes.conftest import python_path
from tests.tuner.harness import TINY, Place, command, run, write_tiny

# Imported by Python itself in every process, workers included. Whoever opens a socket is written down with its traceback, and refused.
GUARD = """
import os, socket, traceback

def refuse(what):
    with open(os.environ["AIVMM_TEST_REACHED"], "a") as file:
        file.write(f"{what}\\n{''.join(traceback.format_stack(limit=12))}\\n")
    raise OSError(f"the network was reached for: {what}")

class Guarded(socket.socket):
    def __init__(self, family=-1, *rest, **named):
        if family in (-1, socket.AF_INET, socket.AF_INET6) and named.get("fileno") is None and not (len(rest) > 2 and rest[2] is not None):
            refuse(f"socket of family {family}")
        super().__init__(family, *rest, **named)

socket.socket = Guarded
for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex", "create_connection"):
    setattr(socket, name, lambda *given, _name=name, **named: refuse(f"{_name} {given}"))
with open(os.environ["AIVMM_TEST_REACHED"] + ".processes", "a") as file:
    file.write(f"{os.getpid()}\\n")
"""


@pytest.fixture
def guarded(tmp_path: Path) -> tuple[Place, dict[str, str], Path]:
    """A place in which every process is guarded, the environment for it, and the file of what was reached for."""
    (tmp_path / "guard").mkdir()
    (tmp_path / "guard" / "sitecustomize.py").write_text(GUARD)
    place = Place.at(tmp_path / "place")
    reached = tmp_path / "reached"
    env = place.env(PYTHONPATH=python_path(tmp_path / "guard"), AIVMM_TEST_REACHED=str(reached))
    assert "CI" not in env  # NNCF and OpenVINO keep quiet under CI, which would hide what they do at a user's
    return place, env, reached


def test_a_whole_tune_its_report_and_its_plan_open_no_socket(guarded: tuple[Place, dict[str, str], Path]) -> None:
    place, env, reached = guarded
    model = write_tiny(place.folder / "tiny.onnx")
    asked = ("--precisions", "fp32,int8", "--constraint", "cosine>=0.5", "--budget", "5s", "--trials", "2", "--top", "1", "--json")
    done = run(command("tune", model, *TINY, *asked), cwd=place.work, env=env)
    assert done.code == 0, done.err
    lowered = [path for path in (place.folder / "cache" / "lowered").iterdir() if path.suffix == ".onnx"]
    assert lowered, "the lowering is a part of what is proved here"
    shown = run(command("run", "tiny.aivmm"), cwd=place.work, env=env)
    assert shown.code == 0, shown.err
    processes = reached.with_name("reached.processes").read_text().split()
    assert len(set(processes)) >= 5  # two commands, and a worker for the models and for each runtime at least
    assert not reached.exists(), reached.read_text()
    # Native code opens sockets that Python does not see; what it would send it first writes here.
    written = [str(path) for path in (place.folder / "home").rglob("*") if path.is_file()]
    assert [path for path in written if "matplotlib" not in path] == []  # which caches the list of fonts


def test_the_guard_guards(guarded: tuple[Place, dict[str, str], Path]) -> None:
    """Or else the test above would prove nothing."""
    import sys

    place, env, reached = guarded
    done = run([sys.executable, "-P", "-c", "import socket; socket.create_connection(('127.0.0.1', 9))"], cwd=place.work, env=env)
    assert done.code != 0 and "the network was reached for" in done.err
    done = run([sys.executable, "-P", "-c", "import socket; socket.socket(socket.AF_INET)"], cwd=place.work, env=env)
    assert done.code != 0
    assert reached.read_text().count("test_offline") == 0 and "create_connection" in reached.read_text()
