"""The weights in what OpenVINO exported: checked beside its import, or while it wakes up, and never left unchecked."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import numpy_helper

from aivmm.runtime import blobs
from aivmm.runtime.engine import Engine
from aivmm.runtime.openvino import OpenVino
from tests.making import OPENVINO, Part, chain_model, make_bundle, normal, reference
from tests.runtime.bundles import flip
from tests.runtime.engines import used_cache

MODEL = chain_model(width=512, rows=1, layers=3)
X = {"x": normal(1, 512)}
EXPECTED = reference(MODEL, X)


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def heavy(tmp_path: Path) -> Path:
    """A bundle whose weights fill pages of an exported model."""
    return make_bundle(tmp_path / "heavy.aivmm", MODEL, [Part(OPENVINO)])


def used(bundle: Path) -> dict[str, Any]:
    return used_cache(bundle, X, EXPECTED, rtol=1e-3, atol=1e-4)


def only(cache: Path) -> Path:
    (path,) = cache.rglob("*.blob")
    return path


def weights_of(path: Path) -> tuple[int, int]:
    """Return where a file of the cache says that its weights lie in it."""
    stated = blobs._STATED.search(path.read_bytes()[:4096])
    assert stated is not None
    return 4096 + int(stated[1]), 4096 + int(stated[2])


def test_weights_are_checked_beside_the_import_and_all_else_before(heavy: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used(heavy)
    path = only(cache)
    start, stop = weights_of(path)
    assert stop - start > 2 << 20 and path.stat().st_size - (stop - start) < 64 << 10  # three matrices of a MiB; all else is small
    imports: list[None] = []
    real = OpenVino.import_blob

    def noted(self: OpenVino, *arguments: Any) -> Any:
        imports.append(None)
        return real(self, *arguments)

    monkeypatch.setattr(OpenVino, "import_blob", noted)
    before = ((start - 1, 0), (stop, 0), (path.stat().st_size - 1, 0), (100, 0))
    for at, imported in ((start, 1), ((start + stop) // 2, 1), (stop - 1, 1), *before):
        imports.clear()
        flip(path, at)
        found = used(heavy)
        assert found["hits"] == 0 and found["stored"] == 1 and "is damaged" in found["problems"][0], at
        assert len(imports) == imported, at
        assert used(heavy)["problems"] == []


@pytest.mark.parametrize("wakes_up_s", [0.0, 0.3])
@pytest.mark.parametrize("large", [False, True])
def test_damaged_weights_are_found_whoever_checks_them(
    heavy: Path, cache: Path, wakes_up_s: float, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By who waits for the runtime, or beside the import."""
    used(heavy)
    path = only(cache)
    monkeypatch.setattr(OpenVino, "wakes", lambda self, name: lambda: threading.Event().wait(wakes_up_s))
    if large:
        monkeypatch.setattr(blobs, "_AHEAD_BYTES", 1 << 20)
    assert used(heavy)["hits"] == 1
    flip(path, weights_of(path)[0] + 12345)
    found = used(heavy)
    assert found["hits"] == 0 and found["stored"] == 1 and "its weights do not have the sum" in found["problems"][0]


def test_what_was_read_ahead_of_a_model_is_not_used_for_another_one_in_its_place(heavy: Path, tmp_path: Path) -> None:
    """As where the thread that reads ahead comes too late, and a service then loads a new plan from the same path."""
    used(heavy)
    with Engine.load(heavy) as engine:
        model = engine._bundle.file(engine.plan.stages[0].model)
    OpenVino().look_ahead(model)
    heavy.rename(tmp_path / "old.aivmm")
    other = chain_model(width=32, rows=3, layers=3)
    (tmp_path / "heavy.aivmm.work").rename(tmp_path / "old.work")
    again = make_bundle(heavy, other, [Part(OPENVINO)])
    for _ in range(2):  # compiled, and taken back
        with Engine.load(again) as engine:
            assert engine._bundle.file(engine.plan.stages[0].model) == model
            assert engine._program._executables[0][0].inputs[0].shape == (3, 32)
        OpenVino().look_ahead(model)


@pytest.mark.parametrize("stated", ["4097 to 1", "0 to 999999999999", "4096 to 4096", "99999999999999999 to 999999999999999999"])
def test_a_head_that_states_odd_places_of_weights_is_not_believed(heavy: Path, cache: Path, stated: str) -> None:
    used(heavy)
    path = only(cache)
    data = path.read_bytes()
    odd = blobs._STATED.sub(f"\n{stated}: {'0' * 64}\n".encode(), data[:4096])[:4096].ljust(4096, b"\0")
    path.write_bytes(odd + data[4096:])
    found = used(heavy)
    assert found["hits"] == 0 and found["stored"] == 1 and "is damaged" in found["problems"][0]


def test_where_openvino_puts_its_weights_is_found_or_not_believed(heavy: Path, cache: Path) -> None:
    used(heavy)
    path = only(cache)
    blob = path.read_bytes()[4096:]
    backend = OpenVino()
    start, stop = backend.weights_in(blob)
    weights = [numpy_helper.to_array(each).tobytes() for each in MODEL.graph.initializer]
    assert len(weights) == 3 and all(blob.find(each, start, stop) > 0 for each in weights)
    for other in (blob + b"x", blob[:-1], b"", b"x" * 5000, np.random.default_rng(0).bytes(10000), blob[:200]):
        assert backend.weights_in(other) == (0, 0)
