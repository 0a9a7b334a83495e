"""`aivmm profile` end to end: real processes, both runtimes, one small model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from aivmm.db.database import Database
from aivmm.models.records import Operator
from aivmm.probes.client import WorkerDied
from aivmm.probes.lab import Lab
from aivmm.probes.records import Failed, Measured, ProbeKey
from aivmm.runtime.config import Config
from aivmm.runtime.finding import find_target
from aivmm.runtime.registry import load_backend
from aivmm.tuner import cli, operators
from aivmm.tuner.measure import Counts
from aivmm.tuner.operators import OperatorProber, _batches, _Job
from tests.probes.conftest import TARGET as WILD
from tests.probes.conftest import own_lock as own_lock
from tests.probes.conftest import wild as wild


def write_model(path: Path) -> Path:
    """A convolution that is fused, a shape computation that feeds a Reshape, and a NonZero whose work depends on the data."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((8, 3, 3, 3), dtype=np.float32), "zero": np.array([0], np.int64), "rest": np.array([-1], np.int64)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("Shape", ["r"], ["extents"], name="shape"),
        helper.make_node("Gather", ["extents", "zero"], ["first"], name="gather"),
        helper.make_node("Concat", ["first", "rest"], ["flat"], name="concat", axis=0),
        helper.make_node("Reshape", ["r", "flat"], ["y"], name="reshape"),
        helper.make_node("NonZero", ["y"], ["places"], name="nonzero"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, "side", "side"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None), helper.make_tensor_value_info("places", TensorProto.INT64, None)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "AIVMM_LOCK": str(folder / "lock"), "COLUMNS": "200"}
    command = [sys.executable, "-P", "-m", "aivmm", "profile", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("profile")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    write_model(folder / "m.onnx")
    done = run(folder, "m.onnx", "--db", "p.db", "--dim", "side=16", "--targets", "*:CPU", "--json", "-q")
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def ways(found: dict[str, Any]) -> int:
    """In how many ways each operator is measured: on every target in every precision that it runs natively."""
    named = (each.partition(":") for each in found["targets"])
    return sum(len(find_target(load_backend(runtime), name).precisions) for runtime, _, name in named)


def operator(found: dict[str, Any], name: str) -> dict[str, Any]:
    return next(each for each in found["operators"] if each["op_type"] == name)


def test_every_node_is_measured_with_what_limits_it(found: dict[str, Any]) -> None:
    assert found["targets"] == ["openvino:CPU", "onnxruntime:CPU"]
    assert found["coverage"] == {"measured_nodes": found["model"]["nodes"], "nodes": found["model"]["nodes"]}
    for each in operator(found, "Conv")["targets"]:
        assert each["state"] == "measured"
        assert each["samples"] >= 3
        assert each["flops_per_s"] == pytest.approx(operator(found, "Conv")["flops"] / each["median_s"])
        assert each["bytes_per_s"] == pytest.approx(operator(found, "Conv")["bytes"] / each["median_s"])
        assert each["bound"] in ("compute", "memory", "overhead")
        assert each["ceiling_share"] > 0
    shares = [next(each["share"] for each in one["targets"] if each["target"] == "openvino:CPU") for one in found["operators"]]
    assert sum(shares) == pytest.approx(1.0)


def test_an_operator_is_fed_with_the_extents_that_it_has_inside_the_model(found: dict[str, Any]) -> None:
    assert [each["state"] for each in operator(found, "Reshape")["targets"]] == ["measured"] * ways(found)


def test_ceilings_are_measured_on_each_target(found: dict[str, Any]) -> None:
    assert [(each["target"], each["precision"]) for each in found["ceilings"][:1]] == [("openvino:CPU", "fp32")]
    for each in found["ceilings"]:
        assert each["flops_per_s"] > 1e8
        assert each["bytes_per_s"] > 1e7
        assert 0 < each["call_s"] < 0.1


def test_fused_operators_are_named_as_such(found: dict[str, Any]) -> None:
    for each in found["fusion"]:
        assert each["fused_into"]["relu"] == "conv"
    assert [each["fused_nodes"] for each in operator(found, "Relu")["targets"]] == [1] * ways(found)
    assert [each["fused_nodes"] for each in operator(found, "Conv")["targets"]] == [0] * ways(found)


def test_blocks_are_measured_too(found: dict[str, Any]) -> None:
    assert found["blocks"]
    assert all(each["state"] == "measured" for block in found["blocks"] for each in block["targets"])


def test_a_second_run_measures_nothing_and_says_the_same(folder: Path, found: dict[str, Any]) -> None:
    done = run(folder, "m.onnx", "--db", "p.db", "--dim", "side=16", "--targets", "*:CPU", "--json", "-q")
    again = json.loads(done.stdout)
    assert again["probes"]["measured"] == 0
    assert again["probes"]["reused"] == found["probes"]["measured"] + found["probes"]["reused"]
    assert again["operators"] == found["operators"]
    assert again["ceilings"] == found["ceilings"]


def test_rows_carry_their_rates_and_floors(folder: Path, found: dict[str, Any]) -> None:
    with Database.open(folder / "p.db") as database:
        rows = database.outcomes(kind="operator")
    conv = next(each for each in rows if each.key.subject == operator(found, "Conv")["signature"])
    assert isinstance(conv, Measured)
    names = {"flops_per_s", "bytes_per_s", "ceiling_share", "compute_floor_s", "memory_floor_s", "overhead_floor_s", "compile_s"}
    assert names <= conv.metrics.keys()
    assert {each.key.subject for each in rows} >= {"ceiling:call", "ceiling:matmul:256", "ceiling:copy:16384"}


def test_the_table_names_operators_targets_and_bounds(folder: Path, found: dict[str, Any]) -> None:
    done = run(folder, "m.onnx", "--db", "p.db", "--dim", "side=16", "--rows", "2", "--targets", "openvino")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert "ceilings" in lines[0]
    assert "onnxruntime" not in done.stdout
    assert f"... and {len(found['operators']) - 2} more" in done.stdout
    assert f"{found['model']['nodes']} of {found['model']['nodes']} nodes measured" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.onnx"], "nowhere.onnx"),
        (["demo:nothing"], "demo:squeezenet"),
        (["m.onnx", "--dim", "side=16", "--targets", "quantum"], "available: openvino:CPU"),
        (["m.onnx", "--dim", "side"], "NAME=N"),
        (["m.onnx", "--budget", "soon"], "120s"),
    ],
)
def test_what_a_user_can_fix_is_one_line_and_status_2(
    folder: Path,
    found: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("AIVMM_LOCK", str(folder / "lock"))
    assert cli.run(["profile", *arguments, "--db", "p.db", "-q", "--json"]) == 2  # in this process: half the time
    out, err = capfd.readouterr()
    assert len(err.strip().splitlines()) == 1
    assert words in err
    assert set(json.loads(out)["error"]) == {"message", "advice"}


def test_a_budget_that_is_spent_skips_and_says_so(folder: Path, found: dict[str, Any]) -> None:
    done = run(
        folder, "m.onnx", "--db", "other.db", "--dim", "side=16", "--budget", "0.001s", "--json", "-q", "--no-blocks", "--targets", "*:CPU"
    )
    result = json.loads(done.stdout)
    assert result["probes"]["measured"] == 0
    pairs = len(result["targets"]) ** 2  # of which transfers were not measured
    assert result["probes"]["skipped"] == ways(result) * len(result["operators"]) + pairs
    assert any("--budget" in note for note in result["notes"])


def test_batches_are_small_in_number_in_bytes_and_in_work() -> None:
    def made(size: int, flops: float = 1.0) -> Operator:
        return Operator(signature=str(size), op_type="Relu", domain="", description="", count=1, nodes=("n",), flops=flops, bytes=size)

    assert [len(each) for each in _batches([made(1)] * 40)] == [32, 8]
    assert [len(each) for each in _batches([made(1, 3e9)] * 5)] == [2, 2, 1]
    assert [len(each) for each in _batches([made(200 << 20)] * 3)] == [1, 1, 1]
    assert list(_batches([])) == []


def wild_key(how: str) -> ProbeKey:
    return ProbeKey(kind="operator", subject="a", target="wild:0", environment="e", config=Config.of({"how": how}))


def relu(folder: Path) -> Path:
    """Write a model of one operator."""
    edges = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, (4,))] for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", *edges)
    path = folder / "relu.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_a_crash_costs_one_operator_and_the_others_of_its_batch_are_tried_again(wild: Path, tmp_path: Path) -> None:
    """The wild backend crashes as its config says, so each of the two is tried alone after their batch has died, and fails alone."""
    path, key = relu(tmp_path), wild_key("abort")
    with Lab() as lab:
        nothing: Any = None  # neither the model nor the database is asked
        prober = OperatorProber(lab=lab, subject=nothing, database=nothing, run_id=None, targets=[WILD], folder=tmp_path, counts=Counts())
        jobs = [_Job(key=replace(key, subject=each), target=WILD, path=path) for each in ("a", "b")]
        failed = prober._probe(jobs)
        fine = prober._probe([_Job(key=replace(key, subject="c", config=Config()), target=WILD, path=path)])
    assert [each.key.subject for each in failed] == ["a", "b"]
    assert all(isinstance(each, Failed) and "SIGABRT" in each.reason for each in failed)
    assert isinstance(fine[0], Measured)


@pytest.mark.parametrize("lets", [2, 9])
def test_one_by_one_after_a_crash_only_within_the_budget(own_lock: None, tmp_path: Path, lets: int) -> None:
    """Each of a batch that hangs may hang again: what is not tried any more is skipped, not known and not lost from the count."""
    calls: list[int] = []

    class Dying:
        def call(self, *_: Any, models: list[Any], **__: Any) -> Any:
            calls.append(len(models))
            raise WorkerDied("hung")

    worker = Dying()
    prober = OperatorProber(
        lab=cast(Any, SimpleNamespace(worker=lambda _: worker, wait_for_others=lambda _: None)),
        subject=cast(Any, SimpleNamespace(base_batch=1)),
        database=cast(Any, SimpleNamespace(add_many=lambda *_, **__: None)),
        run_id=None,
        targets=[WILD],
        folder=tmp_path,
        counts=Counts(),
        stop=lambda: len(calls) >= lets,
    )
    batch = [
        Operator(signature=each, op_type="Relu", domain="", description="", count=1, nodes=("n",), flops=1.0, bytes=1) for each in "abcd"
    ]
    models = cast(Any, SimpleNamespace(build=lambda _: b"", values_needed=lambda _: {}))
    prober._probe_batch(models, batch, [(each, WILD, "fp32") for each in batch])
    tried = min(lets - 1, len(batch))
    assert calls == [4] + [1] * tried
    assert (len(prober.found), prober.skipped) == (tried, 4 - tried)


def test_an_operator_that_hangs_is_waited_for_as_long_as_there_is_budget_and_little_longer(
    wild: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was two minutes, whatever the budget. What is stopped so is not said to have hung, and is asked again by the next run."""
    monkeypatch.setattr(operators, "_MARGIN_S", 1.0)
    path = relu(tmp_path)
    with Lab() as lab:
        nothing: Any = None
        prober = OperatorProber(lab=lab, subject=nothing, database=nothing, run_id=None, targets=[WILD], folder=tmp_path, counts=Counts())
        prober._ends = time.perf_counter() + 0.5
        started = time.perf_counter()
        assert prober._probe([_Job(key=replace(wild_key("run idle"), subject=each), target=WILD, path=path) for each in "ab"]) == []
        assert time.perf_counter() - started < operators._LIMIT_S / 2
        # One that is only slow, and was begun in time, is waited for: here it takes a thousand times what is left.
        prober._ends = time.perf_counter() + 1e-5
        (slow,) = prober._probe([_Job(key=wild_key("run slow"), target=WILD, path=path)])
    assert isinstance(slow, Measured)
