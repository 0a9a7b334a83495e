"""A bundle's files are read and hashed beside the load: when that begins, in what order, and what counts as waiting for it."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

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
    with Bundle.open(bundle, read_later=True) as opened:
        opened.begin_reading(None)
        assert not begun.wait(0.2)
    monkeypatch.setattr("aivmm.runtime.reading._LARGE_BYTES", 1000)
    with Bundle.open(bundle, read_later=True) as opened:
        opened.begin_reading(None)
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
    with Bundle.open(bundle, read_later=True) as opened:
        opened.begin_reading(first)
        opened.start_reading()  # it has begun
        waiting = threading.Thread(target=opened.verify)
        waiting.start()
        time.sleep(0.2)
        assert order == ["first"]
        released = time.perf_counter()
        go_on.set()
        waiting.join()
        opened.verify()
        assert order == ["first"] + ["hash"] * len(opened.plan.files)
        assert 0 < opened.hashing["hash_wait_s"] <= time.perf_counter() - released  # and not what was waited for before


def test_all_is_hashed_before_models_are_looked_into(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashing needs no interpreter, looking into models does, and the runtime needs it at first."""
    order: list[str] = []
    monkeypatch.setattr("aivmm.runtime.reading.check_content", lambda folder, name, *_: order.append("hash"))
    monkeypatch.setattr("aivmm.runtime.reading.refuse_compiled", lambda *_: order.append("look"))
    with Bundle.open(bundle) as opened:
        assert order == ["hash"] * len(opened.plan.files) + ["look"] * len(opened.plan.model_files())
