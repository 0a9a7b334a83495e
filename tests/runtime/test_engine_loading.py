"""Where a plan runs, and whether its numbers hold there: fallbacks said aloud, grades, refusals, and none of the tuning machinery."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from onnx import TensorProto, helper

from aivmm.errors import BundleError, Unsupported
from aivmm.runtime import openvino, ort_library
from aivmm.runtime.engine import Engine
from aivmm.runtime.finding import waking
from aivmm.runtime.onnxruntime import OnnxRuntime
from aivmm.runtime.openvino import OpenVino
from tests.making import ONNXRUNTIME, OPENVINO, Part, chain_model, make_bundle, normal, onnx_model, reference
from tests.runtime.bundles import edit_plan
from tests.runtime.engines import Load, close_to

BOTH = pytest.mark.parametrize("target", [OPENVINO, ONNXRUNTIME])
F, I64 = TensorProto.FLOAT, TensorProto.INT64


@pytest.mark.parametrize("absent", ["openvino:GPU.7", "onnxruntime:CUDA:9", "acme:NPU", "nonsense", "openvino:../x", ":"])
def test_a_fallback_is_taken_aloud(load: Load, caplog: pytest.LogCaptureFixture, absent: str) -> None:
    with caplog.at_level(logging.WARNING, logger="aivmm.engine"):
        engine = load(
            chain_model(), [Part(OPENVINO, 0, 3), Part(absent, 4)], fallbacks=[[Part(absent)], [Part(ONNXRUNTIME)]], conditions=False
        )
    assert [stage.target for stage in engine.stages] == [ONNXRUNTIME]
    text = "\n".join(engine.events)
    assert f"the plan cannot run here: {absent}" in text
    assert "fallback 0 cannot run here" in text
    assert "running the fallback 'fallback 1' instead" in text
    assert all(event in caplog.text for event in engine.events)
    assert engine.stats()["events"] == engine.events
    close_to(engine.run({"x": normal(2, 32)}), reference(chain_model(), {"x": normal(2, 32)}))


@pytest.mark.parametrize(
    ("target", "name", "value"),
    [
        (ONNXRUNTIME, "no_such_option", 1),
        (ONNXRUNTIME, "intra_op_num_threads", -5),
        (ONNXRUNTIME, "intra_op_num_threads", 1_000_000),
        (OPENVINO, "INFERENCE_NUM_THREADS", "many"),
        (OPENVINO, "CACHE_DIR", "blobs"),
        (OPENVINO, "NO_SUCH_OPTION", 1),
    ],
)
def test_a_setting_that_a_runtime_refuses_leads_to_the_fallback(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, name: str, value: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    engine = load(chain_model(), [Part(target, settings=((name, value),))], fallbacks=[[Part(target)]])
    assert any(name in event for event in engine.events)
    engine.run({"x": normal(2, 32)})
    assert not (tmp_path / "blobs").exists()


def test_when_nothing_runs_the_first_reason_is_given(load: Load) -> None:
    with pytest.raises(Unsupported, match=r"openvino:GPU\.7 is not available here"):
        load(chain_model(), [Part("openvino:GPU.7")], fallbacks=[[Part("acme:1")]], conditions=False)
    with pytest.raises(Unsupported, match="acme:1 is not available here: unknown backend 'acme'"):
        load(chain_model(), [Part("acme:1")], conditions=False)


def test_a_precision_that_is_not_offered_is_refused(load: Load) -> None:
    with pytest.raises(Unsupported, match="does not run fp8 natively"):
        load(chain_model(), [Part(ONNXRUNTIME, precision="fp8")])


def test_types_that_numpy_lacks_are_refused_at_load(load: Load) -> None:
    kind = TensorProto.BFLOAT16
    model = onnx_model([helper.make_node("Relu", ["x"], ["y"])], [("x", kind, (4,))], [("y", kind, (4,))])
    code = "bfloat16"
    with pytest.raises(Unsupported, match=code):
        load(model, [Part(OPENVINO)])


@pytest.mark.parametrize(
    ("change", "grade", "event"),
    [
        (lambda c: None, "exact", ""),
        (lambda c: c.update(usable_cores=640), "retune", "640 in the plan"),
        (lambda c: c.update(usable_cores=c["usable_cores"] - 1), "compatible", "usable_cores"),
        (lambda c: c.update(driver="other"), "compatible", "openvino:CPU.driver"),
        (lambda c: c.update(instruction_sets=[*c["instruction_sets"], "x"]), "retune", "instruction_sets"),
        (lambda c: c.update(instruction_sets=[]), "compatible", "instruction_sets"),
        (lambda c: c.update(runtime_version="1.0"), "compatible", "'1.0' in the plan"),
        (lambda c: c.update(device_model="Pentium"), "retune", "'Pentium' in the plan"),
        (lambda c: c.update(system="Plan9-vax"), "retune", "Plan9-vax"),
        (lambda c: c.update(target="openvino:GPU.0"), "retune", "None in the plan"),
    ],
)
def test_the_plan_is_graded_against_this_machine(tmp_path: Path, change: Callable[[Any], object], grade: str, event: str) -> None:
    bundle = make_bundle(tmp_path / "m.aivmm", chain_model(), [Part(OPENVINO)])
    edit_plan(bundle, lambda plan: change(plan["environments"][0]))
    with Engine.load(bundle) as engine:
        assert engine.validity.grade == engine.stats()["validity"] == grade
        assert bool(engine.validity.differences) == (grade != "exact")
        assert event in " ".join(engine.events)
        assert len(engine.events) == (grade != "exact")


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan["stages"][0]["outputs"][0].update(shape=[2, 31]),
        lambda plan: plan["stages"][0]["outputs"][0].update(dtype="int32"),
        lambda plan: plan["stages"][0]["inputs"][0].update(shape=[2, 33]),
        lambda plan: [each.update(shape=[2, 64]) for each in (plan["model"]["inputs"][0], plan["stages"][0]["inputs"][0])],
        lambda plan: [each.update(shape=[1 << 20, 1 << 20]) for each in (plan["model"]["inputs"][0], plan["stages"][0]["inputs"][0])],
        lambda plan: [each.update(dtype="O") for each in (plan["model"]["inputs"][0], plan["stages"][0]["inputs"][0])],
        lambda plan: [each.update(name="w") for each in (plan["model"]["outputs"][0], plan["stages"][1]["outputs"][0])],
        lambda plan: plan["model"]["inputs"][0].update(shape=[1]),
        lambda plan: plan["model"]["inputs"][0].update(dtype="float64"),
        lambda plan: plan["stages"][1]["inputs"][0].update(shape=[7]),
        lambda plan: plan["model"]["outputs"][0].update(shape=[7]),
        lambda plan: plan["model"]["inputs"].append({"name": "x", "dtype": "float32", "shape": [3]}),
    ],
)
def test_a_plan_that_does_not_fit_its_own_files_is_refused(tmp_path: Path, change: Callable[[Any], object]) -> None:
    bundle = make_bundle(tmp_path / "m.aivmm", chain_model(), [Part(OPENVINO, 0, 3), Part(ONNXRUNTIME, 4)], conditions=False)
    edit_plan(bundle, change)
    with pytest.raises(BundleError):
        Engine.load(bundle).close()


FRESH = """
import sys, zlib
import numpy as np
import aivmm
with aivmm.load_plan(sys.argv[1]) as engine:
    print(engine.run({"x": np.ones((2, 32), dtype=np.float32)})["y"].shape, file=sys.stderr)
    engine.stats()
print(*sys.modules)
"""
TUNING = {
    "onnx", "onnx_ir", "optuna", "pandas", "matplotlib", "sqlalchemy", "alembic", "nncf", "jinja2", "scipy", "typer", "rich", "filelock",
    "cryptography",
    "aivmm.models", "aivmm.probes", "aivmm.planner", "aivmm.db", "aivmm.reports", "aivmm.tuner",
}  # fmt: skip


def test_loading_and_running_a_plan_imports_none_of_the_tuning_machinery(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "m.aivmm", chain_model(), [Part(OPENVINO, 0, 3), Part(ONNXRUNTIME, 4)])
    done = subprocess.run([sys.executable, "-c", FRESH, str(bundle)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "(2, 32)" in done.stderr, done.stderr
    assert not set(done.stdout.split()) & TUNING


@pytest.mark.parametrize("missing", ["openvino", "onnxruntime"])
def test_a_runtime_that_is_not_installed_is_an_absent_target(tmp_path: Path, missing: str) -> None:
    targets = {"openvino": OPENVINO, "onnxruntime": ONNXRUNTIME}
    other = next(target for runtime, target in targets.items() if runtime != missing)
    bundle = make_bundle(tmp_path / "m.aivmm", chain_model(), [Part(targets[missing])], fallbacks=[[Part(other)]])
    code = f"import sys; sys.modules[{missing!r}] = None\n" + FRESH.replace("print(*sys.modules)", "print(engine.events)")
    done = subprocess.run([sys.executable, "-c", code, str(bundle)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{targets[missing]} is not available here" in done.stdout and "running the fallback" in done.stdout


def test_what_a_runtime_does_once_in_a_process_is_done_on_another_thread_and_may_fail(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = threading.Event()
    threads: list[int] = []

    def wake() -> None:
        threads.append(threading.get_ident())
        begun.set()
        raise RuntimeError("who asks the runtime for more is told")

    asked: list[str] = []

    def wakes(self: OnnxRuntime, name: str) -> Callable[[], object]:
        asked.append(name)
        return wake

    openvino._wake()  # whose turn is before
    monkeypatch.setattr(OnnxRuntime, "wakes", wakes)
    for _ in range(2):  # with nothing in the cache, and from there
        engine = load(chain_model(), [Part(OPENVINO, 0, 3), Part(ONNXRUNTIME, 4)])
        close_to(engine.run({"x": normal(2, 32)}), reference(chain_model(), {"x": normal(2, 32)}))
    assert begun.is_set() and asked == ["CPU"] * 2 and threading.get_ident() not in threads


def naming(*targets: str) -> bytes:
    """Return the text of what might be a plan."""
    return json.dumps({"stages": [{"target": each} for each in targets]}, indent=2).encode()


@pytest.mark.parametrize(("backend", "wake", "target", "other"), [
    (OnnxRuntime, ort_library.wake, ONNXRUNTIME, "CUDA:0"), (OpenVino, openvino._wake, OPENVINO, "GPU.0"),
])  # fmt: skip
def test_a_runtime_is_woken_beside_the_first_load_only(backend: Any, wake: Any, target: str, other: str) -> None:
    wake.cache_clear()
    assert backend().wakes("CPU") is wake and waking(naming("acme:NPU", ":", target)) is wake
    assert backend().wakes(other) is None and waking(naming(f"{backend.name}:{other}", "acme:CPU")) is None
    assert waking(naming(*["acme:NPU"] * 100, target)) is None and waking(b"\xff" * 1000) is None
    wake()
    assert backend().wakes("CPU") is None and waking(naming(target)) is None


LOADED = """
import sys, threading
from concurrent.futures import ThreadPoolExecutor
from aivmm.runtime import openvino
with ThreadPoolExecutor(8) as pool:
    cores = list(pool.map(lambda _: openvino._core(), range(8)))
assert all(each is cores[0] for each in cores)
def plugins():
    return "openvino_intel_cpu_plugin" in open("/proc/self/maps").read()
before = plugins()
openvino._wake()
print(before, plugins(), "openvino_telemetry" in sys.modules)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which libraries are there")
def test_openvinos_plug_in_is_what_is_loaded_and_one_core_is_made_by_many_threads() -> None:
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["False", "True", "False"], "")
