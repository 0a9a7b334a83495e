"""A bundle's files are read and hashed beside the load: when that begins, in what order, and what counts as waiting for it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aivmm.errors import BundleError
from aivmm.runtime import reading
from aivmm.runtime.bundle import Bundle
from tests.making import OPENVINO, Part, chain_model, make_bundle


def test_contents_are_read_while_the_engine_loads_and_told_apart(tmp_path: Path) -> None:
    from aivmm.runtime.engine import Engine

    bundle = make_bundle(tmp_path / "m.aivmm", chain_model(), [Part(OPENVINO)])
    with Bundle.open(bundle, read_later=True) as opened:
        opened.verify()
        assert opened.hashing["hash_s"] > 0
    with Engine.load(bundle) as engine:
        stats = engine.stats()
        assert 0 < stats["hash_s"] < 60 and 0 <= stats["hash_wait_s"] <= stats["load_s"]


def test_what_is_small_is_read_beside_the_runtime_and_what_is_large_at_once(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = threading.Event()
    monkeypatch.setattr("aivmm.runtime.reading.check_content", lambda *_: begun.set())
    with Bundle.open(bundle, read_later=True):
        assert not begun.wait(0.2)
    monkeypatch.setattr("aivmm.runtime.reading._LARGE_BYTES", 1000)
    with Bundle.open(bundle, read_later=True):
        assert begun.wait(60)


def test_the_thread_that_reads_rests_at_first_unless_somebody_waits_for_it(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aivmm.runtime.reading._PAUSE_S", 250.0)
    begun = threading.Event()
    real = reading.check_content

    def noted(*arguments: Any) -> None:
        begun.set()
        real(*arguments)

    monkeypatch.setattr("aivmm.runtime.reading.check_content", noted)
    with Bundle.open(bundle, read_later=True) as opened:
        opened.start_reading()
        assert not begun.wait(0.2)
        waiting = [threading.Thread(target=opened.verify) for _ in range(3)]
        for each in waiting:
            each.start()
        for each in waiting:
            each.join()
        assert begun.is_set() and opened.hashing["hash_s"] > 0
    with Bundle.open(bundle, read_later=True) as opened:
        opened.start_reading()  # and closing does not wait for the rest, either


@pytest.mark.parametrize("large", [1000, 32 << 20])
@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_what_comes_first_on_the_thread_is_no_wait_for_hashes_and_may_fail(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], large: int
) -> None:
    monkeypatch.setattr("aivmm.runtime.reading._LARGE_BYTES", large)
    order: list[str] = []
    go_on = threading.Event()
    real = reading.check_content

    def first() -> None:
        order.append("first")
        go_on.wait(60)
        raise error("of the runtime's")

    def noted(*arguments: Any) -> None:
        order.append("hash")
        real(*arguments)

    monkeypatch.setattr("aivmm.runtime.reading.check_content", noted)
    told: list[bytes] = []

    def asked(text: bytes) -> Callable[[], object]:
        told.append(text)
        return first

    with Bundle.open(bundle, read_later=True, first=asked) as opened:
        assert told == [(bundle / "plan.json").read_bytes()] and not opened.runtime_awake()
        opened.start_reading()  # it has begun
        waiting = threading.Thread(target=opened.verify)
        waiting.start()
        time.sleep(0.2)
        assert order == ["first"]
        released = time.perf_counter()
        go_on.set()
        waiting.join()
        opened.verify()
        assert order == ["first"] + ["hash"] * len(opened.plan.files) and opened.runtime_awake()
        assert 0 < opened.hashing["hash_wait_s"] <= time.perf_counter() - released  # and not what was waited for before


def test_all_is_hashed_before_models_are_looked_into(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashing needs no interpreter, looking into models does, and the runtime needs it at first."""
    order: list[str] = []
    monkeypatch.setattr("aivmm.runtime.reading.check_content", lambda folder, name, *_: order.append("hash"))
    monkeypatch.setattr("aivmm.runtime.reading.refuse_compiled", lambda *_: order.append("look"))
    with Bundle.open(bundle) as opened:
        assert order == ["hash"] * len(opened.plan.files) + ["look"] * len(opened.plan.model_files())


def test_jobs_are_done_before_what_is_hashed_and_between_its_pieces(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime that takes long over a first model leaves time for the jobs of a second one while a large file is hashed."""
    monkeypatch.setattr("aivmm.runtime.reading._PIECE_BYTES", 64)
    order: list[str] = []
    real = reading.hashlib.sha256

    class Noted:
        def __init__(self) -> None:
            self._digest = real()

        def update(self, data: Any) -> None:
            order.append("piece")
            self._digest.update(data)
            if order.count("piece") == 2:
                opened.start_reading([lambda: order.append("late")])

        def hexdigest(self) -> str:
            return self._digest.hexdigest()

    monkeypatch.setattr("aivmm.runtime.reading.hashlib.sha256", Noted)
    with Bundle.open(bundle, read_later=True) as opened:
        opened.start_reading([lambda: order.append("early")])
        opened.verify()
        assert order[:4] == ["early", "piece", "piece", "late"] and order[4:] == ["piece"] * (len(order) - 4)


def threads() -> int:
    """Return how many threads this process has, where that is said."""
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.is_dir() else 0


@pytest.mark.parametrize("first", [None, "fails"])
def test_a_thread_that_is_ready_ends_where_it_has_nothing_to_do(bundle: Path, first: str | None) -> None:
    """It is started before the plan is read, which may be missing, or name nothing that is to be woken."""
    before = threads()

    def asked(text: bytes) -> None:
        if first is not None:
            raise BundleError(first)

    if first is not None:
        with pytest.raises(BundleError, match=first):
            Bundle.open(bundle, read_later=True, first=asked)
        (bundle / "plan.json").unlink()
        with pytest.raises(BundleError, match="holds no plan"):
            Bundle.open(bundle, read_later=True, first=asked)
    else:
        Bundle.open(bundle, read_later=True, first=asked).close()
        with Bundle.open(bundle, read_later=True, first=asked) as opened:
            assert opened.runtime_awake()
            opened.verify()
            assert opened.hashing["hash_s"] > 0
    assert ended(before)


def test_what_is_small_waits_for_the_runtime_where_a_thread_is_ready_too(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = threading.Event()
    monkeypatch.setattr("aivmm.runtime.reading.check_content", lambda *_: begun.set())
    with Bundle.open(bundle, read_later=True, first=lambda text: None) as opened:
        assert not begun.wait(0.2)
        opened.start_reading()
        assert begun.wait(60)


@pytest.mark.parametrize("damage", ["plan.json", "listing"])
def test_what_is_done_first_ends_where_the_rest_is_refused(bundle: Path, damage: str) -> None:
    before = threads()
    done = threading.Event()
    if damage == "listing":
        (bundle / "unlisted").write_text("")
    else:
        (bundle / "plan.json").write_text("{}")
    with pytest.raises(BundleError):
        Bundle.open(bundle, read_later=True, first=lambda text: done.set)
    assert done.wait(60) and ended(before)


def ended(before: int) -> bool:
    """Say whether there are no more threads than before, in a while."""
    return any(threads() <= before or time.sleep(0.01) for _ in range(1000))


def core_of(thread: int) -> int:
    """Return the core that a thread of this process was on last."""
    return int(Path(f"/proc/self/task/{thread}/stat").read_text().rpartition(")")[2].split()[36])


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two cores, and Linux")
def test_a_thread_leaves_the_core_of_another_and_may_use_all_of_them_still() -> None:
    allowed, found, done = os.sched_getaffinity(0), dict[int, tuple[int, Any]](), threading.Event()
    loader: list[int] = []

    def load(core: int) -> None:
        os.sched_setaffinity(0, {core})
        loader.append(threading.get_native_id())
        done.wait(60)  # and takes the interpreter from nobody: who waits for it is put on any core

    def leave(core: int) -> None:
        me = threading.get_native_id()
        os.sched_setaffinity(0, {core})
        os.sched_setaffinity(0, allowed)  # and is still there, as after a runtime that asked each core
        reading.leave_core_of(loader[-1])
        found[core] = core_of(me), os.sched_getaffinity(0)

    for core in sorted(allowed)[:2]:
        done.clear()
        busy = threading.Thread(target=load, args=(core,))
        busy.start()
        while not loader or core_of(loader[-1]) != core:
            time.sleep(0.001)
        other = threading.Thread(target=leave, args=(core,))
        other.start()
        other.join()
        done.set()
        busy.join()
        loader.clear()
        assert found[core][0] != core and found[core][1] == allowed
    reading.leave_core_of(1 << 30)  # one that is gone
    assert os.sched_getaffinity(0) == allowed


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_on_one_core_a_thread_stays() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        reading.leave_core_of(threading.get_native_id())
        assert os.sched_getaffinity(0) == {min(allowed)}
    finally:
        os.sched_setaffinity(0, allowed)
