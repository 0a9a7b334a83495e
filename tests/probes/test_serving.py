"""Serving several models at once in a worker: arrivals by rate, answers judged, what could not be served counted."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aivmm.probes.arrays import save_arrays
from aivmm.probes.client import Worker
from aivmm.probes.serving import Client, _served, arrivals_s, client_of
from tests.making import ONNXRUNTIME, OPENVINO, Part, chain_model, make_bundle, make_family, normal, reference


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    made = Worker("serving")
    yield made
    made.close()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serving")
    targets = {"a": ONNXRUNTIME, "b": OPENVINO}
    bundles = {
        name: make_bundle(folder / f"{name}.aivmm", chain_model(), [Part(target)], conditions=False) for name, target in targets.items()
    }
    save_arrays(folder / "x.npz", {"x": normal(2, 32)})
    save_arrays(folder / "y.npz", reference(chain_model(), {"x": normal(2, 32)}))
    save_arrays(folder / "wrong.npz", {"y": normal(2, 32, seed=9)})
    return make_family(folder / "w.aivmm", bundles, kind="workload")


def serve(worker: Worker, bundle: Path, *, seconds: float = 0.5, right: str = "y.npz", **rates: float | None) -> dict[str, Any]:
    folder = bundle.parent
    models = {
        name: {"inputs": str(folder / "x.npz"), "reference": str(folder / right), "rate_per_s": rate, "callers": 1}
        for name, rate in rates.items()
    }
    answer = worker.call("serve", limit_s=120, run_limit_s=60, bundle=str(bundle), models=models, seconds=seconds, alone_s=0.2, seed=3)
    return answer["models"]  # type: ignore[no-any-return]


def test_each_model_is_served_at_its_rate_or_as_fast_as_it_goes(worker: Worker, bundle: Path) -> None:
    found = serve(worker, bundle, a=40.0, b=None)
    together = found["a"]["together"]
    assert together["offered"] == len(arrivals_s(40.0, 0.5, 3))
    assert 0 < together["served"] <= together["offered"]
    assert len(together["latencies_s"]) == len(together["durations_s"]) == together["served"]
    assert all(wait >= call > 0 for wait, call in zip(together["latencies_s"], together["durations_s"], strict=True))
    assert found["b"]["together"]["served"] == found["b"]["together"]["offered"] > 0
    assert found["b"]["alone"]["served"] > 0
    assert all(each["problem"] == "" and each["accuracy"]["cosine"] > 0.999 for each in found.values())


def test_who_had_no_turn_before_the_end_has_answered_one_request_all_the_same() -> None:
    class Quick:
        def run(self, inputs: Any) -> None:
            pass

    now = time.perf_counter()
    one, due = Client(Quick(), {}, None, 1), Client(Quick(), {}, [0.3], 1)  # type: ignore[arg-type]
    for each in (one, due):
        each.drive(now - 0.5, now - 0.25)
    assert len(one.durations_s) == 1 and due.durations_s == []  # which had not arrived by then


def test_more_than_a_model_can_answer_is_counted_and_ends_in_time(worker: Worker, bundle: Path) -> None:
    together = serve(worker, bundle, seconds=0.05, a=10_000_000.0)["a"]["together"]
    assert together["served"] < together["offered"]


def test_wrong_answers_are_told(worker: Worker, bundle: Path) -> None:
    assert serve(worker, bundle, right="wrong.npz", a=20.0)["a"]["accuracy"]["cosine"] < 0.999


def test_a_rate_at_which_none_would_arrive_in_time_is_served_all_the_same(worker: Worker, bundle: Path) -> None:
    found = serve(worker, bundle, seconds=0.3, a=0.01)["a"]
    assert found["together"]["offered"] == found["together"]["served"] == 1
    assert found["alone"]["served"] > 5  # one after the other: else nobody knows what a call takes alone


@pytest.mark.parametrize(
    ("rate_per_s", "alone", "closed", "callers"),
    [(0.01, True, True, 1), (0.01, False, False, 3), (100.0, True, False, 3), (None, True, True, 3)],
)
def test_what_a_call_takes_alone_is_not_slowed_by_other_callers(rate_per_s: float | None, alone: bool, closed: bool, callers: int) -> None:
    engine: Any = None  # nobody calls it
    found = client_of(engine, {}, rate_per_s, 3, for_s=1.0, seed=3, alone=alone)
    assert (found.due_s is None, found.callers) == (closed, callers)


def test_a_bug_in_a_client_is_no_quiet_client() -> None:
    class Broken:
        def run(self, inputs: Any) -> None:
            raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError):
        _served({"a": Client(Broken(), {}, None, 2)}, 0.1)  # type: ignore[arg-type]


@given(st.floats(0.01, 1000), st.integers(0, 1000))
def test_arrivals_are_in_order_within_the_time_and_the_same_for_the_same_seed(rate: float, seed: int) -> None:
    found = arrivals_s(rate, 2.0, seed)
    assert found == sorted(found) == arrivals_s(rate, 2.0, seed)
    assert found and all(0 < each < 2.0 for each in found)


def test_arrivals_come_at_their_rate_on_average() -> None:
    counts = [len(arrivals_s(50.0, 2.0, seed)) for seed in range(200)]
    assert mean(counts) == pytest.approx(100, rel=0.03)
