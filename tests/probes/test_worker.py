"""Workers: whatever native code does there, the parent goes on, and nothing is left behind."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from aivmm.errors import Unsupported, UsageError
from aivmm.probes import wire
from aivmm.probes.arrays import load_arrays, save_arrays
from aivmm.probes.client import Worker, WorkerDied, WorkerLate
from aivmm.probes.lab import Lab
from aivmm.runtime.config import Config, Knob
from aivmm.runtime.finding import find_target
from aivmm.runtime.registry import load_backend
from aivmm.runtime.target import Device, Target, Unavailable
from tests.contracts import exact
from tests.making import ONNXRUNTIME, OPENVINO, Part, chain_model, make_bundle, normal, reference, write_model

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals and forks are those of POSIX")
Compile = Callable[..., dict[str, Any]]


def works(worker: Worker) -> bool:
    return bool(worker.call("memory", limit_s=30)["peak_bytes"] > 0)


@posix
def test_what_native_code_sets_in_our_environment_is_not_the_workers(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    native = ctypes.CDLL(None)
    monkeypatch.setenv("AIVMM_TEST_OF_THE_USER", "kept")
    native.setenv(b"AIVMM_TEST_OF_A_LIBRARY", b"set", 1)  # as PoCL sets OCL_ICD_FILENAMES where it is loaded: a child sees no other driver
    try:
        assert works(worker)
        seen = psutil.Process(worker.pid).environ()
        assert seen.get("AIVMM_TEST_OF_THE_USER") == "kept"
        assert "AIVMM_TEST_OF_A_LIBRARY" not in seen
    finally:
        native.unsetenv(b"AIVMM_TEST_OF_A_LIBRARY")


# --- what goes wrong in it ---


@posix
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("segfault", r"crashed \(SIGSEGV\)"),
        ("run segfault", r"crashed \(SIGSEGV\)"),
        ("abort", r"crashed \(SIGABRT\)"),
        ("exit", "exited with status 7"),
        ("vanish", "exited with status 9"),
    ],
)
def test_a_crash_is_a_report_and_the_next_call_starts_a_fresh_worker(compile_wild: Compile, worker: Worker, how: str, reason: str) -> None:
    assert works(worker)
    pid, generation = worker.pid, worker.generation
    with pytest.raises(WorkerDied, match=reason):
        compile_wild(how)
    assert worker.pid == 0
    assert works(worker)
    assert worker.pid not in (0, pid)
    assert worker.generation == generation + 1


@pytest.mark.parametrize("how", ["busy", "idle", "run idle"])
def test_what_hangs_is_stopped_at_its_limit(compile_wild: Compile, worker: Worker, how: str) -> None:
    assert works(worker)
    pid = worker.pid
    started = time.perf_counter()
    with pytest.raises(WorkerDied, match="took longer than 1 s and was stopped"):
        compile_wild(how, limit_s=1.0)
    assert 0.9 < time.perf_counter() - started < 60  # what hangs does so for an hour
    assert not psutil.pid_exists(pid)
    assert works(worker)


@pytest.mark.parametrize("how", ["idle", "run busy"])
def test_what_has_no_more_time_is_stopped_and_not_said_to_hang(compile_wild: Compile, worker: Worker, how: str) -> None:
    """Unlike what takes longer than anything that is healthy: nobody waited long enough to tell."""
    with pytest.raises(WorkerLate, match="was stopped after 1 s, when time was up"):
        compile_wild(how, limit_s=60.0, run_limit_s=60.0, patience_s=1.0)
    assert worker.pid == 0
    with pytest.raises(WorkerDied, match="took longer than 1 s") as caught:
        compile_wild("idle", limit_s=1.0, patience_s=60.0)
    assert not isinstance(caught.value, WorkerLate)
    assert works(worker)


@posix
def test_a_hundred_megabytes_of_output_neither_block_nor_fill_the_memory(compile_wild: Compile, worker: Worker) -> None:
    before = psutil.Process().memory_info().rss
    assert compile_wild("print")["first_inference_s"] > 0
    assert psutil.Process().memory_info().rss - before < 30 << 20
    assert sum(map(len, worker._printed)) < 256 << 10


@posix
def test_the_last_words_are_kept_and_no_more(compile_wild: Compile) -> None:
    with pytest.raises(WorkerDied) as caught:
        compile_wild("print and die")
    assert "last words" in caught.value.output
    assert "wild_runtime.py" in caught.value.output  # the Python stack at the end of it
    assert len(caught.value.output) <= 8 << 10


def test_reading_standard_input_finds_it_empty_and_eats_no_request(compile_wild: Compile, worker: Worker) -> None:
    compile_wild("read", limit_s=20)
    assert works(worker)


def test_a_bug_of_ours_keeps_its_traceback_and_the_worker_lives(compile_wild: Compile, worker: Worker) -> None:
    works(worker)
    generation = worker.generation
    with pytest.raises(RuntimeError, match=r"(?s)in worker test, timed:.*Traceback.*KeyError: 'nobody'"):
        worker.call("timed", limit_s=30, name="nobody", seconds=0.0)
    assert works(worker) and worker.generation == generation


def test_a_bug_of_a_plug_in_is_a_report_and_the_worker_lives(compile_wild: Compile, worker: Worker) -> None:
    works(worker)
    generation = worker.generation
    with pytest.raises(WorkerDied, match=r"failed in its plug-in \(KeyError: 'a bug of the plug-in'\)") as caught:
        compile_wild("raise")
    assert "wild_runtime.py" in caught.value.output
    with pytest.raises(WorkerDied, match=r"cannot be sent \(a object is no JSON\)"):
        compile_wild("not json")
    assert compile_wild("")["effective_config"] == {"odd": 1.0}
    with pytest.raises(Unsupported, match="out of memory"):
        compile_wild("memory")
    assert works(worker) and worker.generation == generation


def test_refusals_arrive_in_their_class_with_their_advice(worker: Worker) -> None:
    with pytest.raises(UsageError, match="unknown backend 'acme'; choose from openvino") as caught:
        worker.call("discover", limit_s=30, backends=["acme"])
    assert caught.value.advice.startswith("choose from")


def test_outputs_that_are_not_numbers_are_a_problem(compile_wild: Compile, tmp_path: Path) -> None:
    save_arrays(tmp_path / "reference.npz", {"y": np.ones(4, dtype=np.float32)})
    answer = compile_wild("nan", reference=str(tmp_path / "reference.npz"))
    assert "NaN" in answer["problem"]
    assert compile_wild("", reference=str(tmp_path / "reference.npz"))["problem"] == ""


def test_an_interrupted_question_is_not_answered_to_the_next(compile_wild: Compile, worker: Worker) -> None:
    works(worker)
    pid = worker.pid
    timer = threading.Timer(0.5, signal.raise_signal, [signal.SIGINT]) if sys.platform == "win32" else None
    alarm = timer or threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT])
    alarm.start()
    with pytest.raises(KeyboardInterrupt):
        compile_wild("run idle", limit_s=20)
    assert not psutil.pid_exists(pid)
    assert works(worker)


def test_a_worker_killed_between_calls_is_replaced(worker: Worker) -> None:
    works(worker)
    psutil.Process(worker.pid).kill()
    while worker.pid:  # until all of its threads are gone
        time.sleep(0.01)
    assert works(worker)
    assert worker.generation == 2


def test_closing_twice_is_fine_and_a_closed_worker_can_be_asked_again() -> None:
    worker = Worker("test")
    worker.close()
    assert works(worker)
    pid = worker.pid
    worker.close()
    worker.close()
    assert worker.pid == 0 and not psutil.pid_exists(pid)
    assert works(worker)
    worker.close()


def test_modules_in_the_current_folder_are_not_picked_up(worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnx", "numpy", "json", "aivmm"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')")
    monkeypatch.chdir(tmp_path)
    path = worker.call("demo", limit_s=60, name="recommender", folder=str(tmp_path / "demo"))["path"]
    assert Path(path).is_file()


# --- the parent ---

PARENT = """
import sys, time, threading
from aivmm.probes.client import Worker
from aivmm.probes import wire
from aivmm.runtime.config import Config
from aivmm.runtime.target import Device, Target

workers = [Worker("a"), Worker("b")]
def start(worker):
    worker.call("memory", limit_s=30)
threads = [threading.Thread(target=start, args=(worker,)) for worker in workers]
for each in threads: each.start()
for each in threads: each.join()
time.sleep(0.3)  # the threads that started them are gone: the workers must not be
assert all(worker.pid for worker in workers)
print(*(worker.pid for worker in workers), flush=True)
"""
HANG = """
target = Target(runtime="wild", name="0", device=Device(kind="other", model="wild"), runtime_version="1")
config = {"settings": {"how": "busy"}, "precision": None}
workers[0].call("compile", limit_s=60, name="m", model="x", target=wire.target_out(target), config=config, inputs=sys.argv[1])
"""


def gone(pid: int, within_s: float = 30.0) -> bool:
    end = time.perf_counter() + within_s
    while time.perf_counter() < end:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("doing", ["idle", "busy in native code"])
def test_a_parent_that_is_killed_leaves_no_orphans(wild: Path, tmp_path: Path, doing: str) -> None:
    save_arrays(tmp_path / "x.npz", {"x": np.ones(4, dtype=np.float32)})
    code = PARENT + ("time.sleep(60)" if doing == "idle" else HANG)
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "x.npz")], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        pids = [int(each) for each in parent.stdout.readline().split()]
        assert len(pids) == 2 and all(map(psutil.pid_exists, pids))
        time.sleep(0.3)
        parent.kill()
    assert all(map(gone, pids))


def test_a_parent_that_just_ends_leaves_no_orphans() -> None:
    done = subprocess.run([sys.executable, "-c", PARENT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(gone(int(each)) for each in done.stdout.split())


def test_a_program_that_had_workers_ends_without_a_warning() -> None:
    code = "from aivmm.probes.client import Worker\nwith Worker('w') as worker: worker.call('memory', limit_s=60)"
    done = subprocess.run([sys.executable, "-X", "dev", "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


@posix
def test_ctrl_c_reaches_the_parent_and_not_its_workers() -> None:
    code = PARENT + textwrap.dedent("""
        try:
            print("ready", flush=True)  # within the try: an interrupt that comes between the two would be nobody's
            time.sleep(60)
        except KeyboardInterrupt:
            print(*(worker.call("memory", limit_s=60)["peak_bytes"] > 0 for worker in workers), *(worker.generation for worker in workers))
    """)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True) as parent:
        assert parent.stdout
        workers = [int(each) for each in parent.stdout.readline().split()]
        assert parent.stdout.readline() == "ready\n"
        os.killpg(parent.pid, signal.SIGINT)  # the terminal sends it to the whole group
        for each in workers:  # which they are no part of; some send it to all the same
            os.kill(each, signal.SIGINT)
        assert parent.stdout.readline().split() == ["True", "True", "1", "1"]


# --- what travels ---

HOSTILE = [
    "../../x",
    "/etc/passwd",
    "",
    "file",
    "a\0b",
    "\0",
    "größe \U0001f600",
    "array_0",
    "__names__",
    "x" * 5000,
    "a\nb",
    "con",
    "x.npy",
]


def test_arrays_travel_under_any_name(tmp_path: Path) -> None:
    arrays = {name: np.full((2,), index, dtype=np.float32) for index, name in enumerate(HOSTILE)}
    save_arrays(tmp_path / "a.npz", arrays)
    found = load_arrays(str(tmp_path / "a.npz"))
    assert list(found) == HOSTILE
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
    assert [each.name for each in tmp_path.iterdir()] == ["a.npz"]


@pytest.mark.parametrize(
    "array",
    [
        np.array(1.5), np.array(True), np.zeros((0, 3), dtype=np.int8), np.arange(6).reshape(2, 3).T, np.full(2, np.nan, np.float16),
        np.array(["a", "größe", "", "nul\0", "\0"], dtype=object), np.array("scalar", dtype=object), np.empty((0, 2), dtype=object),
        np.array([["a"], ["bb"]]), np.array([1 + 2j]), np.array([2**63], dtype=np.uint64),
    ],
    ids=repr,
)  # fmt: skip
def test_every_kind_of_array_arrives_as_it_was(tmp_path: Path, array: Any) -> None:
    save_arrays(tmp_path / "a.npz", {"x": array})
    found = load_arrays(str(tmp_path / "a.npz"))["x"]
    assert found.shape == array.shape
    assert found.dtype == (object if array.dtype.kind in "OU" else array.dtype)
    np.testing.assert_array_equal(found, array)


def test_no_arrays_are_no_arrays(tmp_path: Path) -> None:
    save_arrays(tmp_path / "a.npz", {})
    assert load_arrays(str(tmp_path / "a.npz")) == {}
    save_arrays(tmp_path / "a.npz", {"": np.ones(1)})
    assert list(load_arrays(str(tmp_path / "a.npz"))) == [""]


def test_pickles_are_not_loaded(tmp_path: Path) -> None:
    with (tmp_path / "a.npz").open("wb") as file:
        names, strings = (np.frombuffer(text, dtype=np.uint8) for text in (b'["x"]', b"{}"))
        np.savez(file, __names__=names, __strings__=strings, array_0=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="pickle"):
        load_arrays(str(tmp_path / "a.npz"))


def test_records_survive_json() -> None:
    device = Device(kind="gpu", model="m", uid="u", driver="d", memory_bytes=1, instruction_sets=("a",), cores=2, power_limit_w=3.5)
    target = Target(runtime="r", name="n", device=device, runtime_version="v", precisions=("fp32", "bf16"))
    found = wire.target_in(json.loads(json.dumps(wire.target_out(target))))
    assert isinstance(found, Target) and found == target and found.device == device and found.precisions == target.precisions
    absent = Unavailable(target="r:n", reason="gone", advice="look")
    assert wire.target_in(json.loads(json.dumps(wire.target_out(absent)))) == absent
    config = Config.of({"b": True, "a": 1.5, "c": "x"}, precision="bf16")
    assert wire.config_in(json.loads(json.dumps(wire.config_out(config)))) == config
    knob = Knob("k", "choice", "why", choices=("a", True, 3), default="a", objectives=frozenset({"latency"}))
    assert wire.knob_in(json.loads(json.dumps(wire.knob_out(knob)))) == knob


# --- the laboratory ---


@pytest.mark.parametrize("target", [OPENVINO, ONNXRUNTIME])
def test_a_model_is_loaded_timed_judged_and_asked_for_outputs(tmp_path: Path, target: str) -> None:
    model = chain_model()
    path = write_model(tmp_path / "m.onnx", model)
    x = normal(2, 32)
    save_arrays(tmp_path / "x.npz", {"x": x})
    save_arrays(tmp_path / "y.npz", reference(model, {"x": x}))
    runtime, _, name = target.partition(":")
    with Lab() as lab:
        found = find_target(load_backend(runtime), name)
        loaded = lab.load(path, found, exact(found), inputs=tmp_path / "x.npz", reference=tmp_path / "y.npz")
        assert loaded.problem == "" and loaded.accuracy["relative_l2"] < 1e-4 and loaded.compile_s > 0
        loaded.contestant.block(0)
        loaded.contestant.block(1)
        samples = loaded.contestant.samples()
        assert samples and set(samples.rounds) == {0, 1} and 0 < samples.median_s < 1
        lab.outputs(loaded.contestant, tmp_path / "x.npz", tmp_path / "out.npz")
        np.testing.assert_allclose(load_arrays(str(tmp_path / "out.npz"))["y"], reference(model, {"x": x})["y"], rtol=1e-4, atol=1e-5)
        lab.unload(loaded.contestant)
        assert len(lab.pids()) == 1
    assert lab.pids() == []


def test_a_bundle_is_timed_as_a_user_runs_it(tmp_path: Path, worker: Worker) -> None:
    bundle = make_bundle(tmp_path / "m.aivmm", chain_model(), [Part(OPENVINO, 0, 3), Part(ONNXRUNTIME, 4)], callers=2)
    save_arrays(tmp_path / "x.npz", {"x": normal(2, 32)})
    answer = worker.call("load_bundle", limit_s=60, name="b", bundle=str(bundle), inputs=str(tmp_path / "x.npz"))
    assert answer["events"] == [] and answer["load_s"] >= answer["compile_s"] > 0
    started = time.perf_counter()
    durations = worker.call("timed", limit_s=60, name="b", seconds=0.1)["durations"]  # of windows, of two callers
    assert durations and all(1e-6 < each < time.perf_counter() - started for each in durations)


@pytest.mark.parametrize(("target", "found"), [(OPENVINO, 1), (ONNXRUNTIME, 1), ("openvino:AUTO", 0)])
def test_a_bundle_is_loaded_from_the_stages_that_can_be_kept(tmp_path: Path, worker: Worker, target: str, found: int) -> None:
    bundle = make_bundle(tmp_path / "m.aivmm", chain_model(), [Part(target)], conditions=False)
    answer = worker.call("load_cached", limit_s=120, bundle=str(bundle))
    assert answer["load_s"] > 0 and (answer["found"], answer["problems"]) == (found, [])


@posix
def test_what_was_loaded_in_a_worker_that_died_is_lost_and_says_so(compile_wild: Compile, worker: Worker) -> None:
    from aivmm.probes.race import Contestant

    compile_wild("")
    contestant = Contestant("m", worker)
    contestant.block(0)
    assert contestant.failed is None and contestant.durations
    with pytest.raises(WorkerDied):
        compile_wild("abort")
    works(worker)
    contestant.block(1)
    assert contestant.failed and "lost with its worker" in contestant.failed.reason
    assert set(contestant.rounds) == {0}


def test_a_laboratory_that_closes_while_it_looks_for_devices_leaves_no_worker() -> None:
    """As when the model cannot be read: nobody waits for the devices, and the thread that looks for them must start nothing more."""
    with Lab() as lab:
        looking = threading.Thread(target=lab.discover, args=(["onnxruntime"],))
        looking.start()
    looking.join(timeout=60)
    assert not looking.is_alive()
    assert lab.pids() == []


@pytest.mark.parametrize("how", ["raise", "vanish", "memory"])
def test_a_plug_in_that_fails_while_looking_is_absent_and_the_others_are_found(
    wild: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setenv("WILD_DISCOVERY", how)
    with Lab() as lab:
        targets, absent = lab.discover(["wild", "onnxruntime"])
    assert ONNXRUNTIME in map(str, targets)
    (reason,) = (each.reason for each in absent if each.target == "wild")
    assert {"raise": "a bug of the plug-in", "vanish": "exited with status 9", "memory": "out of memory"}[how] in reason


def test_a_plug_in_that_cannot_be_imported_is_absent(wild: Path) -> None:
    (wild / "wild_runtime.py").write_text("import a_library_that_is_missing")
    with Lab() as lab:
        targets, absent = lab.discover(["wild"])
    assert not targets and "a_library_that_is_missing" in absent[0].reason
