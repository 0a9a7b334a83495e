"""`aivmm run` on a bundle of several models: one is named, and what is not there is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.making import ONNXRUNTIME, OPENVINO, Part, chain_model, make_bundle, make_family, normal, reference
from tests.tuner.harness import Shell


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("running")
    narrow = make_bundle(folder / "narrow.aivmm", chain_model(width=16), [Part(OPENVINO)])
    wide = make_bundle(folder / "wide.aivmm", chain_model(), [Part(ONNXRUNTIME)])
    make_family(folder / "both.aivmm", {"narrow": narrow, "wide": wide}, kind="workload")
    np.savez(folder / "x.npz", x=normal(2, 32))
    return folder


@pytest.fixture
def place(made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.setenv("AIVMM_CACHE", str(made / "cache"))
    return Shell(made, capsys)


def test_the_model_that_is_named_runs_on_its_own_inputs(place: Shell, made: Path) -> None:
    done = place.aivmm("run", "both.aivmm", "--model", "wide", "--inputs", "x.npz", "--output", "y.npz", "--json")
    assert (done.code, done.err) == (0, "")
    assert done.json["targets"] == [ONNXRUNTIME] and done.json["outputs"][0]["shape"] == [2, 32]
    x = {"x": normal(2, 32)}
    with np.load(made / "y.npz") as outputs:
        np.testing.assert_allclose(outputs["y"], reference(chain_model(), x)["y"], rtol=1e-4, atol=1e-5)
    assert place.aivmm("run", "both.aivmm", "--model", "narrow", "--json").json["targets"] == [OPENVINO]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("both.aivmm",), "both.aivmm holds several models; name one of 'narrow', 'wide'"),
        (("both.aivmm", "--model", "other"), "there is no model 'other' in both.aivmm; it holds 'narrow', 'wide'"),
        (("wide.aivmm", "--model", "other"), "there is no model 'other' in wide.aivmm"),
        (("both.aivmm", "--model", "narrow", "--inputs", "x.npz"), "array 'x' has shape [2, 32], expected [2, 16]"),
    ],
)
def test_what_cannot_be_run_is_one_line(place: Shell, arguments: tuple[str, ...], words: str) -> None:
    refused = place.aivmm("run", *arguments)
    assert (refused.code, refused.out) == (2, "") and words in refused.err and len(refused.error_lines) == 1
