"""Data sets, metrics and limits that a user can get wrong: one line that says what and where, before anything is measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.tuner.harness import ONE_RUNTIME, TINY, Finished, Place, listing

SAMPLES = np.random.default_rng(5).standard_normal((20, 1, 3, 16, 16)).astype(np.float32)
NAN = SAMPLES.copy()
NAN[7, 0, 0, 0, 0] = np.nan
CODE = """
import numpy as np

def fine():
    print("this is no part of the answer")
    for _ in range(12):
        print("nor this")
        yield {"input": np.random.default_rng(_).standard_normal((1, 3, 16, 16)).astype(np.float32)}

def raises():
    yield from list(fine())[:3]
    raise LookupError("sample 4 is not there")

def returns_none():
    return None

def nan(samples, outputs):
    return float("nan")

def several(samples, outputs):
    return np.ones(3)

def breaks(samples, outputs):
    raise ZeroDivisionError("no labels")
"""
FEW = ("--precisions", "fp32,int8", "--budget", "4s", "--trials", "1", *ONE_RUNTIME)


@pytest.fixture
def refused(place: Place, tiny: Path, in_process: Callable[..., Finished]) -> Callable[..., str]:
    """Tune with options that must be refused with exit code 2; return the one line, and see that nothing was written."""
    (place.work / "mine.py").write_text(CODE)

    def refused(*options: str) -> str:
        before = listing(place.work)
        done = in_process(place, "tune", tiny, *TINY, *FEW, *options, "--json")
        assert done.code == 2, (done.code, done.out, done.err)
        assert len(done.error_lines) == 1 and "Traceback" not in done.err, done.err
        assert done.json["error"]["message"] in done.error_lines[0]
        assert {name for name in listing(place.work) if "__pycache__" not in name} == {name for name in before if "__pycache__" not in name}
        return done.error_lines[0]

    return refused


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"image": SAMPLES}, ["no array for input", "input", "found: image"]),
        ({"input": SAMPLES[:, :, :, :, :8]}, ["shape [20, 1, 3, 16, 8]", "expected [1, 3, 16, 16]"]),
        ({"input": SAMPLES.astype(np.int32)}, ["int32", "float32"]),
        ({"input": NAN}, ["sample 7", "NaN"]),
        ({"input": SAMPLES[:0]}, ["no samples"]),
        ({"input": SAMPLES, "label": np.zeros(3)}, ["20 samples", "'label' 3"]),
    ],
    ids=["names", "shapes", "types", "NaN", "zero samples", "labels of another length"],
)
def test_a_data_set_that_does_not_fit_is_one_line(
    place: Place, refused: Callable[..., str], arrays: dict[str, np.ndarray], words: list[str]
) -> None:
    np.savez(place.work / "data.npz", **arrays)
    line = refused("--dataset", "data.npz")
    assert [word for word in ("data.npz", *words) if word not in line] == [], line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"), [("raises", ["LookupError", "sample 4 is not there", "mine.py:"]), ("returns_none", ["NoneType", "dicts"])]
)
def test_a_callable_that_fails_is_one_line(refused: Callable[..., str], name: str, words: list[str]) -> None:
    line = refused("--dataset", f"mine:{name}")
    assert [word for word in (f"mine:{name}", *words) if word not in line] == [], line


@pytest.mark.parametrize("name", ["nan", pytest.param("several", marks=pytest.mark.slow), pytest.param("breaks", marks=pytest.mark.slow)])
def test_a_metric_without_a_number_for_the_fp32_outputs_is_one_line_before_anything_is_measured(
    refused: Callable[..., str], name: str
) -> None:
    words = {"nan": "returned nan", "several": "3 elements", "breaks": "ZeroDivisionError: no labels"}[name]
    assert words in refused("--dataset", "mine:fine", "--metric", f"mine:{name}")


@pytest.mark.slow
def test_one_sample_serves_and_that_is_said_and_what_a_callable_prints_is_no_part_of_the_answer(
    place: Place, tiny: Path, in_process: Callable[..., Finished]
) -> None:
    (place.work / "mine.py").write_text(CODE)
    np.savez(place.work / "one.npz", input=SAMPLES[0])
    one = in_process(place, "tune", tiny, *TINY, *FEW, "--dataset", "one.npz", "-o", "one.aivmm", "-v")
    assert one.code == 0 and "one sample was given, so the model is calibrated and judged on the same one" in " ".join(one.out.split())
    printed = in_process(place, "tune", tiny, *TINY, *FEW, "--dataset", "mine:fine", "-o", "fine.aivmm", "--json")
    assert printed.code == 0 and printed.json["accuracy"]["data"] == "real"


@pytest.mark.slow
def test_a_precision_that_does_not_apply_to_the_model_gives_no_plan_and_the_reason(
    place: Place, tiny: Path, in_process: Callable[..., Finished]
) -> None:
    done = in_process(place, "tune", tiny, *TINY, "--precisions", "int4", "--budget", "4s", *ONE_RUNTIME, "-o", "none.aivmm", "--json")
    assert done.code == 3 and done.json["plan"] is None
    assert "int4" in done.json["verdict"], done.json["verdict"]
    assert not (place.work / "none.aivmm").exists()
