"""What tests of the runtime share: bundles, engines that are closed again, and devices that are lost."""

from __future__ import annotations

import itertools
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import aivmm
from aivmm.errors import Unsupported
from aivmm.runtime import hot, onnxruntime
from aivmm.runtime.engine import Engine
from tests.making import ONNXRUNTIME, OPENVINO, Part, chain_model, make_bundle
from tests.runtime.engines import LOADING, Load, Lose


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of compiled stages of the test's own; all tests that do not ask for one share one."""
    monkeypatch.setenv("AIVMM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Load]:
    """Write a bundle of a model cut into parts and load it; closed at the end. What is no option of loading goes to the plan."""
    engines: list[Engine] = []
    numbers = itertools.count()

    def make(model: Any, parts: Sequence[Part], **fields: Any) -> Engine:
        options = {name: fields.pop(name) for name in LOADING if name in fields}
        engine = aivmm.load_plan(make_bundle(tmp_path / f"{next(numbers)}.aivmm", model, parts, **fields), **options)
        assert isinstance(engine, Engine)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(params=["native", "python"])
def hot_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Have requests take the hot path in C, and then its reference in Python. (Only clocks are what they are: `test_hot` compares them.)"""
    monkeypatch.delenv(hot.VARIABLE, raising=False)
    if request.param == "python":
        monkeypatch.setattr(hot, "native", None)
        monkeypatch.setattr(hot, "why_not", "a test asks for it")
    elif hot.native is None:
        pytest.skip(hot.why_not)
    return str(request.param)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of two stages, without conditions; for all tests of a file, so none may leave it changed."""
    parts = [Part(OPENVINO, 0, 3), Part(ONNXRUNTIME, 4)]
    return make_bundle(tmp_path_factory.mktemp("made") / "m.aivmm", chain_model(width=16), parts, conditions=False)


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    """A copy of it, for one test to spoil."""
    return Path(shutil.copytree(made, tmp_path / "m.aivmm"))


@pytest.fixture
def lose(monkeypatch: pytest.MonkeyPatch) -> Lose:
    """Have every request of a kind for which `dead` says so fail from now on, as a GPU's do once the device is lost."""

    def start(kind: Any, dead: Callable[[Any], bool], words: str = "device lost") -> None:
        run = kind.run

        def dying(request: Any) -> None:
            if dead(request):
                raise Unsupported(words)
            run(request)

        monkeypatch.setattr(kind, "run", dying)
        if hasattr(kind, "direct"):
            monkeypatch.setattr(kind, "direct", lambda _: None)  # so that all runs come by here

    return start


@pytest.fixture
def lost(lose: Lose) -> threading.Event:
    """ONNX Runtime's device, lost as soon as this is set."""
    event = threading.Event()
    lose(onnxruntime.BoundRequest, lambda _: event.is_set(), "ONNX Runtime while running: device lost")
    return event
