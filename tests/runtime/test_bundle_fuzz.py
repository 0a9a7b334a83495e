"""Thousands of bundles from strangers: none ends the process, and nothing outside of a bundle is read or written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.making import ONNXRUNTIME, OPENVINO, Part, chain_model, make_bundle
from tests.runtime.mutating import MUTATIONS, SECRET

ROOT = Path(__file__).parent.parent.parent

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="inotify tells what native code opens")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parts = [Part(OPENVINO, 0, 3), Part(ONNXRUNTIME, 4)]
    fallbacks = [[Part(ONNXRUNTIME)]]
    return make_bundle(tmp_path_factory.mktemp("sound") / "m.aivmm", chain_model(width=16), parts, fallbacks=fallbacks)


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is such: thousands of small files are written and removed."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or shutil.disk_usage(memory).free < 256 << 20:
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def load_mutated(sound: Path, folder: Path, first: int, count: int) -> list[dict[str, Any]]:
    """Load mutations in a process of its own, and return what it said of each; a process that ends before is started again behind it."""
    for each in ("room", "tmp"):
        (folder / each).mkdir(exist_ok=True)
    (folder / "room" / SECRET).write_bytes(b"SECRET" * 200)
    results: list[dict[str, Any]] = []
    at = first
    while at < first + count:
        arguments = [sys.executable, "-m", "tests.runtime.loading_strangers", sound, folder / "room", at, first + count - at]
        places = {"TMPDIR": str(folder / "tmp"), "AIVMM_CACHE": str(folder / "tmp" / "cache"), "HOME": str(folder / "nowhere")}
        environment = {**os.environ, **places, "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(list(map(str, arguments)), cwd=ROOT, env=environment, capture_output=True, timeout=3600)
        out, err = (each.decode(errors="replace") for each in (done.stdout, done.stderr))  # runtimes print names as they find them
        lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        results += [each for each in lines if "said" in each]
        if done.returncode == 0:
            break
        assert lines, err
        results.append({**lines[-1], "said": f"ended the process: {done.returncode} {err[-500:]}", "found": [], "left": []})
        at = lines[-1]["seed"] + 1
    return results


def assert_harmless(results: list[dict[str, Any]], count: int) -> None:
    assert len({each["seed"] for each in results}) == count
    odd = [each for each in results if not each["said"].startswith(("ran", "refused: ")) or "\n" in each["said"]]
    assert odd == []
    assert [each for each in results if each["found"] or each["left"]] == []
    kinds = Counter(each["said"].partition(":")[0] for each in results)
    assert kinds["refused"] > count / 3 and kinds["ran"] > 0  # neither is everything refused at the door, nor let in


def test_five_hundred_bundles_from_strangers_do_no_harm(sound: Path, room: Path) -> None:
    assert_harmless(load_mutated(sound, room, 0, 500), 500)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("first", range(1000, 11_000, 500))
def test_ten_thousand_bundles_from_strangers_do_no_harm(sound: Path, room: Path, first: int) -> None:
    """In lots of 500, so that it says how far it is, and one can be run again alone."""
    assert_harmless(load_mutated(sound, room, first, 500), 500)


def test_the_watch_sees_what_is_opened_outside(sound: Path, tmp_path: Path) -> None:
    """The instrument itself: Python's opens and those of native code, through another link too, are found where there are some."""
    code = """
import os, sys, json, pathlib, ctypes
from tests.runtime.loading_strangers import Notices, Watch
secret = pathlib.Path(sys.argv[1])
os.link(secret, secret.with_name("link"))
watch, notices = Watch(), Notices(secret)
watch.temporary, watch.on = pathlib.Path("/nowhere"), True
open(secret).close()
watch.on = False
python, seen = watch.found, notices.events()
library = ctypes.CDLL(None)
library.close(library.open(os.fsencode(secret.with_name("link")), 0))
print(json.dumps([python, seen, notices.events()]))
"""
    (tmp_path / SECRET).write_bytes(b"x")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / SECRET)], cwd=ROOT, capture_output=True, text=True, check=True)
    python, seen, native = json.loads(done.stdout)
    assert python == [f"reads {tmp_path / SECRET}"]
    assert "opened" in seen and "opened" in native


def test_each_kind_of_mutation_takes_part() -> None:
    assert {each.__name__ for each in MUTATIONS} >= {"damage_plan", "change_model", "change_files", "slip_zip", "name_outside"}
