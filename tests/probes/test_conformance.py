"""The ONNX project's own backend tests on our backends: a sample here, all of them in the slow tier."""

from __future__ import annotations

import random
import re
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from aivmm.probes.conformance import _differs
from benchmarks import onnx_conformance as suite
from benchmarks.onnx_readings import READINGS, reading_of, reason_of

PAGE = Path(suite.__file__).parent / "results" / "onnx_conformance.md"

# (case, runtime) -> how it is known to come out, and the operators that the rest of the sample is drawn from.
KNOWN: dict[tuple[str, str], suite.Status] = {
    ("test_top_k_same_values", "openvino"): "wrong",
    ("test_top_k_same_values", "onnxruntime"): "passed",
    ("test_resize_downsample_sizes_linear_antialias", "openvino"): "wrong",
    ("test_resize_downsample_sizes_linear_antialias", "onnxruntime"): "passed",
    ("test_det_2d", "openvino"): "refused",
    ("test_det_2d", "onnxruntime"): "passed",
    ("test_roialign_aligned_false", "onnxruntime"): "refused",
    ("test_roialign_aligned_false", "openvino"): "passed",
    ("test_split_equal_parts_1d_opset13", "onnxruntime"): "passed",
    ("test_operator_add_broadcast", "openvino"): "wrong",  # of opset 6: float64 computed as float32
    ("test_operator_add_broadcast", "onnxruntime"): "passed when prepared",
}
OPERATORS = ("topk", "resize", "det", "roialign", "split", "cumsum", "identity", "unique", "nonzero")
DRAWN = 10


def test_a_sample_of_the_suite_comes_out_as_known_and_nothing_crashes_or_hangs(tmp_path: Path) -> None:
    cases = suite.write_cases(tmp_path, OPERATORS)
    known = {name for name, _ in KNOWN}
    others = [each for each in cases if each.name not in known and each.kind != "light"]
    drawn = [each for each in cases if each.name in known] + random.Random(5).sample(others, DRAWN)
    results = suite.run_cases(drawn, tmp_path)
    found = {(each.case, each.runtime): each.status for each in results}
    assert {where: found.get(where) for where in KNOWN} == KNOWN
    check(drawn, results)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_case_of_the_suite_has_a_result_that_somebody_has_read(tmp_path: Path) -> None:
    cases = suite.write_cases(tmp_path)
    assert len(cases) > 2000
    results = suite.run_cases(cases, tmp_path)
    check(cases, results)
    wrong = [each for each in results if each.status == "wrong"]
    used = {reading_of(each.runtime, each.case, each.detail) for each in wrong}
    assert [each for each in READINGS if each not in used and not each.varies] == [], "readings of what is not wrong any more"
    text = PAGE.read_text(encoding="utf-8")
    varying = any(each is not None and each.varies for each in used)
    if not varying and all(f"{name} {version(name)}" in text for name in ("openvino", suite._ORT, "onnx")):
        assert [line for line in suite._table(results) if line not in text] == []  # the page tells of these very versions


def check(cases: list[suite.Case], results: list[suite.Result]) -> None:
    """Hold what is true of any run: each case has a result on each runtime, nothing crashed or hung, and all that is wrong was read."""
    assert len(results) == len(suite.RUNTIMES) * len(cases) == len({(each.case, each.kind, each.runtime) for each in results})
    assert [each for each in results if each.status in ("crashed", "hung")] == []
    assert [each for each in results if each.status == "wrong" and not reading_of(each.runtime, each.case, each.detail)] == []
    assert all(each.detail for each in results if each.status in ("refused", "wrong"))


def test_a_worker_that_dies_costs_one_case_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = suite.write_cases(tmp_path, ())
    squeezenet = [each for each in cases if each.name == "test_squeezenet"]
    monkeypatch.setattr(suite, "COMPILE_LIMIT_S", 1e-3)
    (hung,) = suite.run_cases(squeezenet, tmp_path, runtimes=["onnxruntime"])
    assert hung.status == "hung" and "took longer" in hung.detail


@pytest.mark.parametrize(
    ("wanted", "found", "problem"),
    [
        (np.float32([1, 2]), np.float32([1, 2.0001]), ""),
        (np.float32([1, 2]), np.float32([1, 2.1]), "differs in 1 of 2 elements: 2.0999"),
        (np.float32([np.nan, np.inf]), np.float32([np.nan, np.inf]), ""),
        (np.float32([np.inf]), np.float32([3e38]), "differs in 1 of 1"),
        (np.float32([1]), np.float64([1]), "has type float64"),
        (np.float32([1]), np.float32([[1]]), "has shape [1, 1]"),
        (np.int64([2**40]), np.int64([0]), "differs in 1 of 1"),
        (np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32), ""),
        (np.array(["a", "b"], dtype=object), np.array([b"a", b"b"], dtype=object), ""),
        (np.array(["a"], dtype=object), np.array(["b"], dtype=object), "other strings"),
        ([np.float32([1])], [np.float32([1])], ""),
        ([np.float32([1])], [], "no sequence of 1"),
        (None, np.float32([1]), "should not be"),
    ],
)
def test_outputs_are_compared_as_the_suite_compares_them(wanted: object, found: object, problem: str) -> None:
    said = _differs(wanted, found, 1e-3, 1e-7)
    assert problem in said and bool(problem) == bool(said)


def test_refusals_are_counted_by_reasons_that_we_know() -> None:
    assert reason_of("OpenVINO on CPU: ... No conversion rule found for operations: Det-11") == "no conversion rule for an operator"
    assert reason_of("something new") == "other"
    text = PAGE.read_text(encoding="utf-8")
    assert re.search(r"\*\*openvino\*\* \| 2\d{3} \|", text) and "NOT LOOKED AT" not in text
