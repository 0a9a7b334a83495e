"""Targets, and the patterns that name them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aivmm.errors import UsageError
from aivmm.runtime.target import Device, Target, Unavailable, matches, select


def target(written: str, *, model: str = "some device", version: str = "1") -> Target:
    runtime, _, name = written.partition(":")
    return Target(runtime=runtime, name=name, device=Device(kind="other", model=model), runtime_version=version)


HERE = tuple(map(target, ["openvino:CPU", "openvino:GPU.0", "openvino:GPU.1", "openvino:GPU.10", "onnxruntime:CPU", "onnxruntime:CUDA:0"]))
WRITTEN = st.sampled_from([str(each) for each in HERE])


def selected(*patterns: str) -> list[str]:
    return [str(each) for each in select(HERE, patterns)]


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("openvino", ["openvino:CPU", "openvino:GPU.0", "openvino:GPU.1", "openvino:GPU.10"]),
        ("openvino:*", ["openvino:CPU", "openvino:GPU.0", "openvino:GPU.1", "openvino:GPU.10"]),
        ("openvino:GPU", ["openvino:GPU.0", "openvino:GPU.1", "openvino:GPU.10"]),
        ("openvino:GPU.1", ["openvino:GPU.1"]),
        ("*:CPU", ["openvino:CPU", "onnxruntime:CPU"]),
        ("onnxruntime:CUDA", ["onnxruntime:CUDA:0"]),
        ("onnxruntime:CUDA:0", ["onnxruntime:CUDA:0"]),
        ("OpenVINO:cpu", ["openvino:CPU"]),
        (" openvino:CPU ", ["openvino:CPU"]),
        ("*", [str(each) for each in HERE]),
    ],
)
def test_a_shorter_form_names_all_that_it_prefixes(pattern: str, wanted: list[str]) -> None:
    assert selected(pattern) == wanted


@pytest.mark.parametrize(
    "pattern", ["openvin", "openvino:C", "openvino:GPU.", "openvino:GPU.2", "CPU", "onnxruntime:CUDA:", "openvino:CPU:0"]
)
def test_a_part_of_a_word_names_nothing(pattern: str) -> None:
    assert not any(matches(pattern, str(each)) for each in HERE)


@given(WRITTEN, WRITTEN)
def test_a_whole_name_names_itself_and_no_other(pattern: str, written: str) -> None:
    assert matches(pattern, written) is (pattern == written)


@given(WRITTEN, st.sampled_from([str.upper, str.lower, str.title, str.swapcase]))
def test_case_makes_no_difference(written: str, change: object) -> None:
    assert matches(change(written), written)  # type: ignore[operator]


def test_targets_are_selected_once_each_in_their_own_order() -> None:
    assert selected("onnxruntime:CPU", "openvino:CPU", "*:CPU") == ["openvino:CPU", "onnxruntime:CPU"]


def test_no_pattern_selects_nothing() -> None:
    assert selected() == []


def test_a_pattern_that_names_nothing_is_answered_with_what_there_is() -> None:
    with pytest.raises(UsageError, match=r"unknown target 'openvino:TPU'; available: openvino:CPU, openvino:GPU\.0, .*onnxruntime:CUDA:0"):
        selected("openvino:CPU", "openvino:TPU")
    with pytest.raises(UsageError, match=r"unknown target 'openvino'; available: none"):
        select((), ["openvino"])


def test_a_known_absence_is_answered_with_its_reason() -> None:
    absent = [Unavailable(target="openvino:NPU", reason="no NPU driver", advice="install it")]
    for pattern in ("openvino:NPU", "*:npu"):
        with pytest.raises(UsageError, match="is not available here: no NPU driver; available: openvino:CPU"):
            select(HERE, [pattern], absent)
    assert select(HERE, ["openvino:CPU"], absent) == HERE[:1]


def test_a_target_is_the_same_whatever_is_known_of_its_device() -> None:
    one, other = target("openvino:CPU"), target("openvino:CPU", model="another", version="2")
    assert one == other
    assert hash(one) == hash(other)
    assert one != target("onnxruntime:CPU")


def test_an_absence_is_told_in_one_line() -> None:
    assert str(Unavailable(target="openvino:NPU", reason="no driver")) == "openvino:NPU: no driver"
    assert str(Unavailable(target="openvino:NPU", reason="no driver", advice="install it")) == "openvino:NPU: no driver (install it)"
