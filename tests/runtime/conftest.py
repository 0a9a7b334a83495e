"""What tests of the runtime share: bundles, and engines that are closed again."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import aivmm
from aivmm.runtime.engine import Engine
from tests.making import ONNXRUNTIME, OPENVINO, Part, chain_model, make_bundle
from tests.runtime.engines import LOADING, Load


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


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of two stages, without conditions; for all tests of a file, so none may leave it changed."""
    parts = [Part(OPENVINO, 0, 3), Part(ONNXRUNTIME, 4)]
    return make_bundle(tmp_path_factory.mktemp("made") / "m.aivmm", chain_model(width=16), parts, conditions=False)


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    """A copy of it, for one test to spoil."""
    return Path(shutil.copytree(made, tmp_path / "m.aivmm"))
