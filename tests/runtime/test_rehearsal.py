"""A way that does nothing is built and run while a runtime wakes: nothing of it stays, and it stops nobody."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from aivmm.runtime import program, rehearsal
from aivmm.runtime.bundle import Bundle
from aivmm.runtime.engine import Engine
from aivmm.runtime.plan import Plan
from tests.making import ONNXRUNTIME, OPENVINO, Part, chain_model, make_bundle, normal, reference
from tests.runtime.engines import close_to

CUT = [Part(OPENVINO, 0, 3), Part(ONNXRUNTIME, 4)]


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The programs that are rehearsed."""
    made: list[Any] = []

    def noted(*arguments: Any, **options: Any) -> Any:
        made.append(program.Program(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(rehearsal, "Program", noted)
    return made


def plan_of(bundle: Path) -> Plan:
    with Bundle.open(bundle) as opened:
        return opened.plan


@pytest.mark.parametrize("parts", [[Part(ONNXRUNTIME)], CUT], ids=["whole", "cut"])
def test_it_answers_once_by_the_lanes_of_the_plan_and_is_closed(tmp_path: Path, built: list[Any], parts: list[Part]) -> None:
    threads = threading.active_count()
    rehearsal.rehearse(plan_of(make_bundle(tmp_path / "m.aivmm", chain_model(), parts)))
    (made,) = built
    assert [each["count"] for each in made.stats()["stages"]] == [1] * len(parts)
    assert made._closed and made not in program._running and threading.active_count() == threads


def test_what_would_take_much_memory_or_has_no_fixed_shape_is_not_rehearsed(tmp_path: Path, built: list[Any]) -> None:
    for number, model in enumerate((chain_model(rows=1 << 14), chain_model(rows="n"))):  # type: ignore[arg-type]
        rehearsal.rehearse(plan_of(make_bundle(tmp_path / f"{number}.aivmm", model, [Part(ONNXRUNTIME)])))
    assert built == []


def test_what_fails_in_it_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(rehearsal, "Program", broken)
    monkeypatch.setattr(Bundle, "runtime_awake", lambda _: False)  # as in a process that has loaded nothing
    bundle, x = make_bundle(tmp_path / "m.aivmm", chain_model(), CUT), {"x": normal(2, 32)}
    with Engine.load(bundle) as engine:
        close_to(engine.run(x), reference(chain_model(), x))
