"""The cache of compiled stages: compiled once, right ever after, rebuilt when odd, never in the way, and never a stranger's."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aivmm.runtime import blobs
from aivmm.runtime.bundle import write_bundle
from aivmm.runtime.engine import Engine
from aivmm.runtime.openvino import OpenVino
from tests.making import ONNXRUNTIME, OPENVINO, Part, chain_model, make_bundle, normal, reference
from tests.runtime.bundles import flip
from tests.runtime.engines import used_cache

PARTS = [Part(OPENVINO, 0, 3), Part(ONNXRUNTIME, 4)]
X = {"x": normal(2, 32)}
posix = pytest.mark.skipif(os.name != "posix", reason="owners and modes of files are POSIX's")


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "m.aivmm", chain_model(), PARTS)


def expected() -> Any:
    return reference(chain_model(), X)["y"]


def used(bundle: Path) -> dict[str, Any]:
    return used_cache(bundle, X, {"y": expected()})


def files(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.blob"))


def test_the_second_load_compiles_nothing_and_gives_the_same_bits(bundle: Path, cache: Path) -> None:
    with Engine.load(bundle) as engine:
        first = engine.run(X)["y"]
        assert engine.stats()["cache"] == {"hits": 0, "stored": 2, "problems": []}
        placed = [each[0].placement for each in engine._program._executables]
    assert len(files(cache)) == 2
    with Engine.load(bundle) as engine:
        np.testing.assert_array_equal(engine.run(X)["y"], first)
        assert engine.stats()["cache"] == {"hits": 2, "stored": 0, "problems": []}
        assert [each[0].placement for each in engine._program._executables] == placed


def test_replicas_are_compiled_once(tmp_path: Path, cache: Path) -> None:
    bundle = make_bundle(tmp_path / "m.aivmm", chain_model(), [Part(OPENVINO, replicas=3)])
    assert used(bundle) == {"hits": 2, "stored": 1, "problems": []}


def test_without_the_cache_nothing_is_read_or_written(bundle: Path, cache: Path) -> None:
    with Engine.load(bundle, cache=False) as engine:
        engine.run(X)
        assert engine.stats()["cache"] is None
    assert not cache.exists()


@pytest.mark.parametrize("setting", [("INFERENCE_NUM_THREADS", 1), ("NUM_STREAMS", 2)])
def test_what_was_compiled_with_other_settings_is_another_file(tmp_path: Path, setting: tuple[str, Any]) -> None:
    model = chain_model()
    used(make_bundle(tmp_path / "a.aivmm", model, [Part(OPENVINO)]))
    assert used(make_bundle(tmp_path / "b.aivmm", model, [Part(OPENVINO, settings=(setting,))]))["stored"] == 1
    with Engine.load(tmp_path / "b.aivmm") as engine:
        assert engine.stats()["cache"]["hits"] == 1
        assert engine._program._executables[0][0].effective_config[setting[0]] == setting[1]


@pytest.mark.parametrize(
    "change", [{"driver": "other"}, {"runtime_version": "0"}, {"instruction_sets": ()}, {"usable_cores": 999}], ids=repr
)
def test_another_environment_compiles_anew(bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]) -> None:
    used(bundle)
    real = blobs.environment_of
    monkeypatch.setattr(blobs, "environment_of", lambda target: dataclasses.replace(real(target), **change))
    assert used(bundle)["stored"] == 2
    assert len(files(cache)) == 4


def test_a_changed_bundle_never_meets_the_old_ones_blobs(bundle: Path, tmp_path: Path) -> None:
    used(bundle)
    other = chain_model(seed=1)
    changed = make_bundle(tmp_path / "other.aivmm", other, PARTS)
    with Engine.load(changed) as engine:
        assert engine.stats()["cache"]["hits"] == 0
        np.testing.assert_allclose(engine.run(X)["y"], reference(other, X)["y"], rtol=1e-4, atol=1e-5)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped bit": lambda path: flip(path, 4096 + (path.stat().st_size - 4096) // 2),
    "the last byte": lambda path: flip(path, -1),
    "no head": lambda path: path.write_bytes(b"\0" * 5000),
    "a head of nonsense": lambda path: path.write_bytes(b"aivmm compiled stage\n[1]\n".ljust(5000, b"\0")),
    "cut short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "cut within the head": lambda path: os.truncate(path, 100),
    "empty": lambda path: os.truncate(path, 0),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "two pages swapped": lambda path: path.write_bytes(
        (lambda data: data[:4096] + data[8192:12288] + data[4096:8192] + data[12288:])(path.read_bytes())
    ),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_compiled_again(bundle: Path, cache: Path, damage: str) -> None:
    used(bundle)
    whole = {each: each.read_bytes() for each in files(cache)}
    for each in whole:
        DAMAGES[damage](each)
    damaged = [each for each, data in whole.items() if not each.is_file() or each.read_bytes() != data]  # one has a single page
    assert len(damaged) >= 1
    found = used(bundle)
    assert found["hits"] == 2 - len(damaged) and len(found["problems"]) >= len(damaged)
    if damage != "a folder":
        assert found["stored"] == len(damaged) and all("compiled again" in each for each in found["problems"])
        assert used(bundle) == {"hits": 2, "stored": 0, "problems": []}


@pytest.fixture
def woken(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """OpenVINO takes its time to wake up, as in the first load of a process: until the event is set."""
    go_on = threading.Event()
    monkeypatch.setattr(OpenVino, "wakes", lambda self, name: lambda: go_on.wait(10))
    yield go_on
    go_on.set()


def looked_into(monkeypatch: pytest.MonkeyPatch, note: Callable[[str], None]) -> None:
    """Have `note` told the name of each file whose check sum is looked into."""
    real = blobs._payload

    def noted(file: Any, name: str, size: int) -> Any:
        note(name)
        return real(file, name, size)

    monkeypatch.setattr(blobs, "_payload", noted)


def test_what_was_kept_is_checked_once_and_while_the_runtime_wakes_up(
    bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, woken: threading.Event
) -> None:
    woken.set()
    used(bundle)
    woken.clear()
    seen: list[str] = []

    def note(name: str) -> None:
        assert not woken.is_set()
        seen.append(name)
        if len(seen) == 2:
            woken.set()

    looked_into(monkeypatch, note)
    assert used(bundle) == {"hits": 2, "stored": 0, "problems": []}
    assert sorted(seen) == [each.name for each in files(cache)]


def test_only_as_many_files_are_looked_into_early_as_the_plan_has_stages_the_last_used_first(
    bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, woken: threading.Event
) -> None:
    woken.set()
    used(bundle)
    wanted = [each.name for each in files(cache)]
    for number in range(3):
        stale = files(cache)[0].with_name(f"{number}.blob")
        stale.write_bytes(b"of another version")
        os.utime(stale, (1000 + number, 1000 + number))
    seen: list[str] = []
    looked_into(monkeypatch, seen.append)
    assert used(bundle) == {"hits": 2, "stored": 0, "problems": []} and sorted(seen) == sorted(wanted)
    for each in files(cache):  # and where those are others', the right ones are found all the same
        os.utime(each, (500, 500) if each.name in wanted else None)
    assert used(bundle) == {"hits": 2, "stored": 0, "problems": []}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_that_was_looked_into_early_is_compiled_again(
    bundle: Path, cache: Path, damage: str, woken: threading.Event
) -> None:
    woken.set()
    test_a_damaged_file_is_compiled_again(bundle, cache, damage)


def test_when_a_file_was_used_is_noted_to_the_hour(bundle: Path, cache: Path) -> None:
    used(bundle)
    old, new = files(cache)
    long_ago, lately = time.time() - 7200, time.time() - 60
    os.utime(old, (long_ago, long_ago))
    os.utime(new, (lately, lately))
    assert used(bundle)["hits"] == 2
    assert old.stat().st_mtime > long_ago + 3600 and new.stat().st_mtime == pytest.approx(lately, abs=1)


def test_another_stages_blob_under_this_ones_name_is_not_taken(bundle: Path, cache: Path) -> None:
    used(bundle)
    one, other = files(cache)
    one.write_bytes(other.read_bytes())
    found = used(bundle)
    assert found["hits"] == 1 and found["stored"] == 1


def test_what_the_runtime_refuses_is_compiled_again(bundle: Path, cache: Path) -> None:
    used(bundle)
    for each in files(cache):
        payload = b"not compiled by anyone" * 1000
        each.write_bytes(blobs._head(each.name, np.frombuffer(payload, dtype=np.uint8)) + payload)
    found = used(bundle)
    assert found["hits"] == 0 and found["stored"] == 2 and all("compiled again" in each for each in found["problems"])


@posix
@pytest.mark.parametrize("who", ["file", "folder", "root", "linked file", "linked folder"])
def test_what_others_may_have_written_is_never_loaded(bundle: Path, cache: Path, who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used(bundle)
    monkeypatch.setattr("aivmm.runtime.openvino.OpenVino.import_blob", lambda *_: pytest.fail("a stranger's blob was loaded"))
    monkeypatch.setattr("aivmm.runtime.onnxruntime.OnnxRuntime.import_blob", lambda *_: pytest.fail("a stranger's blob was loaded"))
    if who == "file":
        for each in files(cache):
            each.chmod(0o666)
    elif who == "linked file":
        for each in files(cache):
            moved = each.rename(each.with_suffix(".moved"))
            each.symlink_to(moved)
    else:
        folder = cache / "blobs" if who == "root" else next((cache / "blobs").iterdir())
        if who == "linked folder":
            moved = folder.rename(cache / "moved")
            folder.symlink_to(moved, target_is_directory=True)
        else:
            folder.chmod(0o777)
    found = used(bundle)
    assert found["hits"] == 0 and found["problems"]


@posix
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives files away")
def test_another_users_blob_is_never_loaded(bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used(bundle)
    for each in files(cache):
        os.chown(each, 12345, 12345)
    found = used(bundle)
    assert found["hits"] == 0 and any("belongs to another user" in each for each in found["problems"])


def test_a_bundle_that_carries_blobs_of_its_own_does_not_get_them_loaded(bundle: Path, cache: Path, tmp_path: Path) -> None:
    """The only place that is looked into is the user's folder: blobs that lie in the bundle, listed or not, are not found."""
    used(bundle)
    from aivmm.runtime.bundle import Bundle

    with Bundle.open(bundle) as opened:
        listed = {name: opened.file(name) for name in opened.plan.files}
        listed |= {f"blobs/{each.parent.name}/{each.name}": each for each in files(cache)}
        carrier = write_bundle(tmp_path / "carrier.aivmm", opened.plan, listed)
    for each in files(cache):
        each.unlink()
    assert used(carrier) == {"hits": 0, "stored": 2, "problems": []}


SCRIPT = """
import sys, os
import numpy as np
from aivmm.runtime.engine import Engine
from aivmm.runtime.registry import load_backend
if sys.argv[2:]:
    for each in ("openvino", "onnxruntime"):  # the interpreter may lie where only root may look
        load_backend(each).targets()
    os.setuid(int(sys.argv[2]))
with Engine.load(sys.argv[1]) as engine:
    x = np.load(sys.argv[1] + ".x.npy")
    np.save(sys.stdout.buffer, engine.run({"x": x})["y"])
    import json
    print(json.dumps(engine.stats()["cache"]), file=sys.stderr)
"""


def start(bundle: Path, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
    np.save(f"{bundle}.x.npy", X["x"])
    names = {name: value for name, value in {**os.environ, **environment}.items() if value}
    command = [sys.executable, "-c", SCRIPT, str(bundle), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=names, cwd=bundle.parent)


def finish(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    import io

    out, words = process.communicate(timeout=120)
    assert process.returncode == 0, words.decode()
    np.testing.assert_allclose(np.load(io.BytesIO(out)), expected(), rtol=1e-4, atol=1e-5)
    found: dict[str, Any] = json.loads(words.decode().splitlines()[-1])
    return found


def test_processes_that_load_at_once_do_not_disturb_each_other(bundle: Path, cache: Path) -> None:
    found = [finish(process) for process in [start(bundle) for _ in range(4)]]
    assert [each["problems"] for each in found] == [[]] * 4
    assert not list(cache.rglob("*.partial"))
    assert used(bundle) == {"hits": 2, "stored": 0, "problems": []}


@posix
def test_a_process_that_is_killed_at_any_moment_leaves_a_cache_that_works(tmp_path: Path, cache: Path) -> None:
    bundle = make_bundle(tmp_path / "m.aivmm", chain_model(), PARTS)
    whole = start(bundle)
    began = time.monotonic()
    finish(whole)
    took = time.monotonic() - began
    for round_ in range(6):
        for each in cache.rglob("*.blob"):
            each.unlink()
        process = start(bundle)
        time.sleep(took * (0.4 + 0.1 * round_))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert used(bundle)["problems"] == []


WRITE_FOREVER = """
import sys
from pathlib import Path
from aivmm.runtime.blobs import BlobCache
cache = BlobCache("0" * 64, root=Path(sys.argv[1]))
while True:
    cache._write(str(Path(cache._root) / ("0" * 32) / "a.blob"), bytes([1]) * (8 << 20))
    print("written", flush=True)
"""


@posix
def test_a_writer_that_is_killed_while_writing_leaves_no_half_a_file(tmp_path: Path) -> None:
    cache = blobs.BlobCache("0" * 64, root=tmp_path / "killed")
    assert cache._root is not None
    path = str(Path(cache._root) / ("0" * 32) / "a.blob")
    for round_ in range(5):
        process = subprocess.Popen([sys.executable, "-c", WRITE_FOREVER, str(tmp_path / "killed")], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline()
        time.sleep(0.003 * round_)
        process.kill()
        process.communicate()
        found, weights = cache._read(path)
        assert weights is None and found is not None and found.size == 8 << 20 and bool((found == 1).all())
    assert cache.problems == []


@posix
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root becomes another user")
@pytest.mark.parametrize("home", ["", "/nonexistent", "read-only"])
def test_a_user_without_a_home_runs_the_plan_all_the_same(home: str) -> None:
    """A user that the password file does not know, as containers have them, and one whose folder cannot be written."""
    with tempfile.TemporaryDirectory() as text:  # pytest closes its own folders to other users, whenever another pytest starts
        folder = Path(text)
        folder.chmod(0o755)
        bundle = make_bundle(folder / "m.aivmm", chain_model(), PARTS)
        place = str(folder) if home == "read-only" else home
        found = finish(start(bundle, "54321", HOME=place, XDG_CACHE_HOME="", AIVMM_CACHE=""))
        assert found["hits"] == found["stored"] == 0 and found["problems"]
        assert not (folder / "~").exists() and not (folder / ".cache").exists()


def test_a_cache_that_cannot_be_made_is_no_reason_not_to_run(bundle: Path, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    found = used(bundle)
    assert found["stored"] == 0 and any("not kept" in each for each in found["problems"])


def test_the_files_used_longest_ago_go_first(tmp_path: Path) -> None:
    root = tmp_path / "blobs"
    made = []
    for number in range(5):
        path = root / str(number) / "a.blob"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x" * 100)
        os.utime(path, (1000 + number, 1000 + number))
        made.append(path)
    half = root / "4" / ".half.partial"
    half.write_bytes(b"x")
    os.utime(half, (1000, 1000))
    fresh = root / "4" / ".fresh.partial"
    fresh.write_bytes(b"x")
    blobs.prune(root, keep=made[0], most_bytes=250)
    assert [each.exists() for each in made] == [True, False, False, False, True]
    assert not half.exists() and fresh.exists() and not made[1].parent.exists()
    blobs.prune(tmp_path / "nothing there")


@pytest.fixture
def payloads() -> Iterator[bytes]:
    rng = np.random.default_rng(0)
    return iter([rng.bytes(size) for size in (1, 7, 8, 4095, 4096, 4097, 12288, 40000, (1 << 20) + 1, 2_500_001)])


def test_a_page_of_a_large_file_that_moved_or_was_lost_changes_the_check_sum() -> None:
    rng = np.random.default_rng(0)
    array = np.frombuffer(rng.bytes((3 << 20) + 5000), dtype=np.uint8).copy()
    pages = array[: len(array) // 4096 * 4096].reshape(-1, 4096)
    whole = blobs._check_sum(array)
    places = [(0, 1), (3, 4), (2, 300), (5, 6), (0, len(pages) - 1), *(rng.choice(len(pages), 2, replace=False) for _ in range(50))]
    for one, other in places:
        pages[[one, other]] = pages[[other, one]]
        assert blobs._check_sum(array) != whole
        pages[[one, other]] = pages[[other, one]]
        kept = pages[one].copy()
        for lost in (np.zeros(4096, np.uint8), pages[other].copy()):
            pages[one] = lost
            assert blobs._check_sum(array) != whole
        pages[one] = kept
    assert blobs._check_sum(array) == whole != blobs._check_sum(array[:-4096])


def test_every_flipped_bit_changes_the_check_sum(payloads: Iterator[bytes]) -> None:
    rng = np.random.default_rng(1)
    for payload in payloads:
        array = np.frombuffer(payload, dtype=np.uint8).copy()
        whole = blobs._check_sum(array)
        assert whole == blobs._check_sum(array)
        for _ in range(50):
            at, bit = int(rng.integers(array.size)), int(rng.integers(8))
            array[at] ^= 1 << bit
            assert blobs._check_sum(array) != whole
            array[at] ^= 1 << bit
