"""Which hot path is used, C's or its reference in Python, and whether their clocks are alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aivmm.errors import UsageError
from aivmm.runtime import clocks, hot
from aivmm.runtime.plan import Batching, Execution
from tests.making import ONNXRUNTIME, Part, chain_model, make_bundle
from tests.runtime.engines import Load
from tests.runtime.test_hot import plus_one


@settings(max_examples=40, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 2**50), st.tuples(st.integers(1, 3000))), max_size=12), st.integers(-1, 2000))
def test_both_clocks_remember_the_same(notes: list[Any], many: int) -> None:
    if hot.native is None:
        pytest.skip(hot.why_not)
    both = (clocks.PythonClock(), hot.native.Clock())
    for each in both:
        each.fill()
        for note in notes:
            for number in range(*note) if isinstance(note, tuple) else [note]:
                each.note(number)
                each.count += 1
    ours, native = both
    assert ours.newest(many) == native.newest(many) and ours.count == native.count
    assert ours.newest_ns(many) == native.newest_ns(many) == sum(ours.newest(many))
    for without, step, most_ns in ((0, 16, 1 << 62), (1, 67, 1000), (max(many, 0), 1, 5), (3, 5000, 1 << 40)):
        assert ours.sums(many, without, step, most_ns) == native.sums(many, without, step, most_ns)
    assert len(native.newest(clocks.RING + 1)) == min(ours.count, clocks.RING)
    for each in both:
        with pytest.raises(ValueError):
            each.sums(many, 0, 0, 1)  # and not for ever


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 400), st.integers(0, 3000)), min_size=1, max_size=12),
    st.integers(1, 300),
    st.integers(1, 6000),
    st.sampled_from([0.0, 1000.0, 1500.0, 1e12]),
    st.sampled_from([0.0, 1e12]),
    st.sampled_from([0, 1, 50, 500]),
)
def test_both_clocks_wait_for_as_long(
    phases: list[tuple[int, int]], step: int, most: int, call_ns: float, ratio: float, later: int
) -> None:
    if hot.native is None:
        pytest.skip(hot.why_not)
    both = (clocks.PythonClock(), hot.native.Clock())
    waited: list[list[Any]] = [[], []]
    for each, found in zip(both, waited, strict=True):
        each.fill()
        each.wait(0, step, min(most, 1000), 100_000, 500_000, call_ns, ratio, later)
        now_ns = 0
        for calls, took_ns in phases:
            for _ in range(calls):
                now_ns += took_ns
                each.note(took_ns)
                each.count += 1
                if each.count >= each.due or now_ns >= each.due_ns:
                    found.append((each.count, each.may_wait(now_ns), each.may_wait(now_ns) and each.due, each.due_ns))
                    if not each.may_wait(now_ns):
                        each.wait(now_ns, step, min(most, 1000), 100_000, 500_000, call_ns, ratio, later)
    assert waited[0] == waited[1]


ANSWER = """
import json, sys
if sys.argv[2] == "hidden":
    sys.modules["aivmm.runtime._hot"] = None
from aivmm.errors import UsageError
from aivmm.runtime.engine import Engine
from aivmm.runtime.plan import Batching, Execution
import numpy
try:
    engine = Engine.load(sys.argv[1])
except UsageError as error:
    raise SystemExit(str(error))
with engine:
    for _ in range(1200):
        engine.run({"x": numpy.zeros((2, 32), numpy.float32)})
    stats, kinds = engine.stats(), [each.__name__ for each in type(engine.one_lane()).__mro__]
print(json.dumps([stats["hot_path"], stats["hot_path_reason"], stats["runs"], stats["stages"][0]["p50_s"] > 0, kinds[-2]]))
"""
Answered = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Answered:
    """Answer by a plan in a process of its own, and print what `stats()` says; `hidden` hides that the module was built."""
    bundle = make_bundle(tmp_path_factory.mktemp("hot") / "m.aivmm", chain_model(), [Part(ONNXRUNTIME)])

    def run(*, hidden: bool = False, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name != hot.VARIABLE} | variables
        command = [sys.executable, "-c", ANSWER, str(bundle), "hidden" if hidden else ""]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    return run


def test_without_the_module_all_works_and_says_so(answered: Answered) -> None:
    path, reason, *rest = json.loads(answered(hidden=True).stdout)
    assert path == "python" and reason.startswith("it was not built") and rest == [1200, True, "PythonClock"]


def test_the_module_is_left_alone_where_that_is_asked_for(answered: Answered) -> None:
    path, reason, *rest = json.loads(answered(AIVMM_HOT_PATH="python").stdout)
    assert path == "python" and reason == "AIVMM_HOT_PATH=python asks for it" and rest == [1200, True, "PythonClock"]


def test_what_cannot_be_had_is_refused(answered: Answered) -> None:
    refused = answered(hidden=True, AIVMM_HOT_PATH="native")
    assert refused.returncode == 1 and "there is no native hot path: it was not built" in refused.stderr
    refused = answered(AIVMM_HOT_PATH="fast")
    assert refused.returncode == 1 and "AIVMM_HOT_PATH is 'fast'; set it to python or native" in refused.stderr


@pytest.mark.skipif(hot.native is None, reason=hot.why_not)
def test_who_asks_for_python_when_c_is_loaded_is_told(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(hot.VARIABLE, "python")
    with pytest.raises(UsageError, match=r"AIVMM_HOT_PATH=python came too late: .*; set it before aivmm is imported"):
        load(chain_model(), [Part(ONNXRUNTIME)])


@pytest.mark.skipif(hot.native is None, reason=hot.why_not)
def test_a_module_that_does_not_fit_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(array: Any) -> tuple[Any, ...]:
        raise TypeError("this is no array")

    monkeypatch.delenv(hot.VARIABLE, raising=False)
    assert hot._load() is hot.native
    with monkeypatch.context() as other:
        other.setattr(hot.native, "array_fields", refuses)
        with pytest.raises(ImportError, match="lays out arrays in another way"):
            hot._load()
    monkeypatch.delattr(hot.native, "VERSION")  # as of before there was one
    with pytest.raises(ImportError, match="another version of its source: install again"):
        hot._load()


def test_requests_that_go_another_way_say_so(load: Load) -> None:
    for how in (Execution(mode="pipelined"), Execution(batching=Batching(max_batch=2))):
        assert load(plus_one(1, 16), [Part(ONNXRUNTIME)], execution=how).stats()["hot_path_reason"] == "stages run on threads of their own"
    assert "a shape is open" in load(plus_one("n", 16), [Part(ONNXRUNTIME)]).stats()["hot_path_reason"]
    engine = load(chain_model(), [Part(ONNXRUNTIME)])
    engine.timeout_s = 60
    assert engine.stats()["hot_path"] == "python" and "threads of their own" in engine.stats()["hot_path_reason"]
