"""The user's own code runs in a worker: what it gives arrives, and whatever it does instead is one line that names it."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from aivmm.errors import UsageError
from aivmm.probes import wire
from aivmm.probes.arrays import load_arrays, save_arrays
from aivmm.probes.client import Worker
from aivmm.probes.user_code import ask, extras_in_order
from aivmm.tensors import TensorSpec

SPECS = wire.specs_out((TensorSpec(name="x", dtype="float32", shape=(1, 3)),))
Write = Callable[[str], str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("user")


@pytest.fixture(scope="module")
def worker(folder: Path) -> Iterator[Worker]:
    """One worker for all: what one test's code does must not spoil the next one's. It starts in the user's folder."""
    with pytest.MonkeyPatch.context() as patch, Worker("user code") as started:
        patch.chdir(folder)
        yield started


@pytest.fixture
def code(folder: Path, tmp_path: Path) -> Write:
    """Write a module of the user's in the current folder of the worker, and return its name."""

    def write(text: str) -> str:
        name = f"mine_{abs(hash((tmp_path, text))):x}"
        (folder / f"{name}.py").write_text("import os, sys, time\nimport numpy as np\n" + textwrap.dedent(text))
        return name

    return write


def load(worker: Worker, given: str, folder: Path, *, limit_s: float = 60.0, most: int = 100) -> dict[str, Any]:
    return dict(ask(worker, "dataset", limit_s=limit_s, given=given, specs=SPECS, folder=str(folder), most=most, seed=0))


def runs(folder: Path, count: int) -> dict[str, list[str]]:
    """Write samples, labels and outputs of `count` runs; the labels are right in all but the first."""
    for index in range(count):
        save_arrays(folder / f"x{index}", {"x": np.full((1, 3), index, np.float32)})
        save_arrays(folder / f"label{index}", {"label": np.array([index % 3 if index else 2])})
        save_arrays(folder / f"y{index}", {"y": np.eye(3, dtype=np.float32)[[index % 3]]})
    return {kind: [str(folder / f"{stem}{index}") for index in range(count)] for kind, stem in
            (("samples", "x"), ("extras", "label"), ("outputs", "y"))}  # fmt: skip


def value(worker: Worker, function: str, files: dict[str, list[str]], *, limit_s: float = 60.0) -> float:
    answer = ask(worker, "metric", limit_s=limit_s, function=function, **files)
    assert list(answer) == ["value"] and isinstance(answer["value"], float)
    return float(answer["value"])


def refusal(call: Callable[[], object]) -> str:
    """Return the one line of the refusal that `call` has to end in."""
    with pytest.raises(UsageError) as caught:
        call()
    assert caught.value.advice and "\n" not in str(caught.value) and len(str(caught.value)) < 800
    return str(caught.value)


# --- data sets ---


def test_a_data_set_is_written_sample_by_sample_and_split(worker: Worker, code: Write, tmp_path: Path) -> None:
    given = code("def load():\n    for i in range(50): yield {'x': np.full(3, i, 'f4'), 'label': i}") + ":load"
    answer = load(worker, given, tmp_path, most=8)
    assert answer["notes"] == ["more than 8 samples were given; the first 8 are used"]
    assert len(answer["calibration"]) == len(answer["validation"]) == 4
    paths = [*answer["calibration"], *answer["validation"]]
    assert len(set(paths)) == 8 and {Path(path).parent for path in paths} == {tmp_path}
    seen = []
    for path, extra in zip(paths, extras_in_order(paths, answer["extras"]), strict=True):
        arrays = load_arrays(path)
        assert list(arrays) == ["x"] and arrays["x"].shape == (1, 3) and arrays["x"].dtype == np.float32
        assert load_arrays(extra)["label"].tolist() == [arrays["x"][0, 0]]
        seen.append(int(arrays["x"][0, 0]))
    assert sorted(seen) == list(range(8))
    assert load(worker, given, tmp_path, most=8) == answer


def test_files_need_no_extras(worker: Worker, tmp_path: Path) -> None:
    np.savez(tmp_path / "given.npz", x=np.arange(12, dtype=np.float32).reshape(4, 3))
    answer = load(worker, str(tmp_path / "given.npz"), tmp_path)
    assert answer["extras"] == {} and answer["notes"] == [] and extras_in_order(answer["validation"], {}) == ["", ""]


def test_samples_given_twice_are_told(worker: Worker, tmp_path: Path) -> None:
    x = np.zeros((4, 3), np.float32)
    np.savez(tmp_path / "given.npz", x=x)
    answer = load(worker, str(tmp_path / "given.npz"), tmp_path)
    assert answer["notes"] == ["all 4 samples are the same, so the model is calibrated and judged on the same one"]
    x[3] = 1
    np.savez(tmp_path / "given.npz", x=x)
    answer = load(worker, str(tmp_path / "given.npz"), tmp_path)
    assert answer["notes"] == ["2 of 4 samples repeat another one; such are not both calibrated and judged on"]
    np.savez(tmp_path / "given.npz", x=x[:1])
    answer = load(worker, str(tmp_path / "given.npz"), tmp_path)
    assert answer["calibration"] == answer["validation"] and len(answer["notes"]) == 1 and "one sample was given" in answer["notes"][0]


def test_a_folder_that_cannot_be_written_is_said(worker: Worker, tmp_path: Path) -> None:
    np.savez(tmp_path / "given.npz", x=np.zeros((4, 3), np.float32))
    assert "sample 0 cannot be kept in" in refusal(lambda: load(worker, str(tmp_path / "given.npz"), tmp_path / "missing"))


# --- the metric ---

ACCURACY = """
def accuracy(samples, outputs):
    assert all(list(each) == ["x", "label"] for each in samples)
    return np.mean([output["y"].argmax(-1) == sample["label"] for sample, output in zip(samples, outputs)])
"""


def test_the_metric_sees_inputs_labels_and_outputs_together(worker: Worker, code: Write, tmp_path: Path) -> None:
    function = code(ACCURACY) + ":accuracy"
    assert ask(worker, "check_metric", limit_s=60, function=function) == {}
    assert value(worker, function, runs(tmp_path, 10)) == pytest.approx(0.9)


def test_samples_without_labels_are_inputs_alone(worker: Worker, code: Write, tmp_path: Path) -> None:
    function = code("def f(samples, outputs): return float([list(each) for each in samples] == [['x']] * 3)") + ":f"
    assert value(worker, function, {**runs(tmp_path, 3), "extras": [""] * 3}) == 1.0


@pytest.mark.parametrize("returned", ["0.5", "np.float32(0.5)", "np.array(0.5)", "np.array([[0.5]])", "[0.5]"])
def test_one_number_of_any_kind_is_taken(worker: Worker, code: Write, tmp_path: Path, returned: str) -> None:
    assert value(worker, code(f"def f(samples, outputs): return {returned}") + ":f", runs(tmp_path, 1)) == 0.5


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("return float('nan')", "returned nan, expected a finite number"),
        ("return np.float32('-inf')", "returned -inf, expected a finite number"),
        ("pass", "returned NoneType None, expected one number"),
        ("return '0.9'", "returned str 0.9, expected one number"),
        ("return True", "returned bool True, expected one number"),
        ("return 1j", "returned complex 1j, expected one number"),
        ("return np.ones(3)", "returned an array of 3 elements, expected one number"),
        ("return [[1], [1, 2]]", "cannot make a number of what it returned: it raised ValueError"),
        ("return samples[0]['labels']", "raised KeyError: 'labels' (mine_HERE.py:4)"),
        ("return np.linalg.inv(outputs[0]['y'])", "raised LinAlgError"),
        ("sys.exit(3)", "called sys.exit(3) (mine_HERE.py:4)"),
        ("return f(samples, outputs)", "raised RecursionError: maximum recursion depth exceeded"),
    ],
)
def test_a_metric_that_gives_no_number_is_one_line(worker: Worker, code: Write, tmp_path: Path, body: str, problem: str) -> None:
    name = code(f"def f(samples, outputs):\n    {body}")
    message = refusal(lambda: value(worker, f"{name}:f", runs(tmp_path, 1)))
    assert f"--metric {name}:f" in message and problem.replace("mine_HERE", name) in message


@pytest.mark.parametrize(
    ("named", "problem"),
    [
        ("not_a_module_anywhere:f", "no module 'not_a_module_anywhere'"),
        ("HERE:accuracies", "did you mean 'accuracy'?"),
        ("HERE:np", "not callable, but module"),
        ("HERE:one", "too many positional arguments; it is called as one(samples, outputs)"),
        ("HERE", "not MODULE:FUNCTION; such as --metric"),
        ("data.npz", "not MODULE:FUNCTION"),
        ("missing.py:f", "no such file"),
        ("", "not MODULE:FUNCTION"),
    ],
)
def test_a_typo_is_found_before_anything_is_measured(worker: Worker, code: Write, named: str, problem: str) -> None:
    function = named.replace("HERE", code(ACCURACY + "\ndef one(samples): pass"))
    empty: dict[str, list[str]] = {"samples": [], "extras": [], "outputs": []}
    for call in (lambda: ask(worker, "check_metric", limit_s=60, function=function), lambda: value(worker, function, empty)):
        message = refusal(call)
        assert message.startswith(f"--metric {function}: ") and problem in message


# --- what no exception tells ---


@pytest.mark.parametrize("loop", ["while True: pass", "time.sleep(3600)"])
def test_code_that_never_ends_is_stopped(worker: Worker, code: Write, tmp_path: Path, loop: str) -> None:
    name = code(f"def f(*_):\n    {loop}\ndef load():\n    yield {{'x': [1.0] * 3}}\n    {loop}")
    files = runs(tmp_path, 1)
    for call, option, function in (
        (lambda: load(worker, f"{name}:load", tmp_path, limit_s=2), "--dataset", "load"),
        (lambda: value(worker, f"{name}:f", files, limit_s=2), "--metric", "f"),
    ):
        ask(worker, "check_metric", limit_s=60, function=f"{name}:f")  # starts it: what is limited is the user's code
        pid = worker.pid
        assert f"{option} {name}:{function} took longer than 2 s and was stopped" in refusal(call)
        assert not psutil.pid_exists(pid)


def test_a_module_that_never_ends_is_stopped(worker: Worker, code: Write) -> None:
    ask(worker, "check_metric", limit_s=60, function=code("def f(samples, outputs): pass") + ":f")
    name = code("time.sleep(3600)")
    assert "took longer than 2 s" in refusal(lambda: ask(worker, "check_metric", limit_s=2, function=f"{name}:f"))


def test_code_that_ends_the_process_is_named_with_its_last_words(worker: Worker, code: Write, tmp_path: Path) -> None:
    name = code("def f(*_): os._exit(7)\ndef load():\n    print('about to go', flush=True)\n    os._exit(9)")
    message = refusal(lambda: load(worker, f"{name}:load", tmp_path))
    assert message == f"--dataset {name}:load exited with status 9; the last that it printed: about to go"
    assert f"--metric {name}:f exited with status 7" in refusal(lambda: value(worker, f"{name}:f", runs(tmp_path, 1)))
    assert value(worker, code(ACCURACY) + ":accuracy", runs(tmp_path, 4)) == pytest.approx(0.75)


def test_ten_megabytes_of_output_are_no_answer_and_block_nothing(worker: Worker, code: Write, tmp_path: Path) -> None:
    noise = "print('{\"result\": {}}\\n' * 350_000); os.write(1, b'x' * 5_000_000); sys.stderr.write('y' * 5_000_000); sys.stdin.read()"
    name = code(f"def f(samples, outputs):\n    {noise}\n    return 0.25\ndef load():\n    {noise}\n    yield {{'x': [1.0] * 3}}")
    assert value(worker, f"{name}:f", runs(tmp_path, 1)) == 0.25
    assert len(load(worker, f"{name}:load", tmp_path)["validation"]) == 1


def test_a_folder_it_changes_to_is_left_again(worker: Worker, code: Write, tmp_path: Path) -> None:
    rude = code("def f(samples, outputs):\n    os.chdir('/')\n    return 1.0")
    assert value(worker, f"{rude}:f", runs(tmp_path, 1)) == 1.0
    assert value(worker, code(ACCURACY) + ":accuracy", runs(tmp_path, 2)) == pytest.approx(0.5)
