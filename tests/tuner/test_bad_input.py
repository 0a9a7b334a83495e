"""What a user can get wrong: each is one line on standard error that says what and where, exit code 2, and nothing is touched."""

from __future__ import annotations

import os
import pickle
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from aivmm.db.database import Database
from tests.tuner.harness import TINY, Finished, Place, listing, write_tiny


def assert_one_line(done: Finished, *words: str) -> None:
    """Hold a refused command to the contract: exit code 2, and one line on standard error with these words."""
    assert done.code == 2, (done.code, done.out, done.err)
    assert len(done.error_lines) == 1, done.err
    line = done.error_lines[0]
    assert line.startswith("aivmm: ")
    assert "Traceback" not in done.err
    assert [word for word in words if word.lower() not in line.lower()] == [], line


def assert_error_object(done: Finished, *words: str) -> None:
    """The same with --json: the object on standard output says what the line says."""
    assert_one_line(done, *words)
    found = done.json
    assert found.keys() == {"schema", "error"} and found["schema"] == 1
    assert found["error"].keys() == {"message", "advice"}
    assert found["error"]["message"] in done.error_lines[0]
    assert found["error"]["advice"] in done.error_lines[0]


Attempt = Callable[..., Finished]


@pytest.fixture
def attempt(place: Place, in_process: Callable[..., Finished]) -> Attempt:
    """Run a command in the place with --json, in this process."""

    def attempt(*arguments: str | Path) -> Finished:
        return in_process(place, *arguments, "--json")

    return attempt


@pytest.fixture
def tune(attempt: Attempt, place: Place) -> Attempt:
    """A tune that must be refused; it leaves the current folder as it was."""

    def tune(*arguments: str | Path) -> Finished:
        before = listing(place.work)
        done = attempt("tune", *arguments, "--budget", "4s", "--trials", "1")
        assert listing(place.work) == before
        return done

    return tune


# --- options: refused before anything is opened --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--objective", "speed"], ["speed", "latency", "throughput"]),
        (["--precisions", "fp13"], ["fp13", "fp32", "bf16"]),
        (["--constraint", "latency<10"], ["latency<10", "unit", "ms"]),
        (["--constraint", "latncy<10ms"], ["latncy", "latency"]),
        (["--constraint", "latency<10ms,"], ["constraint"]),
        (["--constraint", "latency<abc"], ["number", "latency<100ms"]),
        (["--constraint", "latency>10ms"], ["did you mean", "latency<10ms"]),
        (["--budget", "soon"], ["--budget", "soon", "120s"]),
        (["--budget", "0s"], ["budget"]),
        (["--trials", "0"], ["--trials"]),
        (["--trials", "many"], ["--trials"]),
        (["--top", "0"], ["--top"]),
        (["--min-segments", "0"], ["--min-segments"]),
        (["--batch", "1,big"], ["--batch", "big"]),
        (["--batch", "0"], ["--batch"]),
        (["--shape", "input"], ["--shape", "input=1x3x224x224"]),
        (["--shape", "input=1x3x?"], ["--shape"]),
        (["--dim", "side=wide"], ["--dim"]),
        (["--bugdet", "4s"], ["--bugdet", "--help"]),
        (["another.onnx"], ["2 models are given", "--workload"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("-") else None,
)
def test_an_option_that_cannot_be_read_is_refused_with_what_can(
    place: Place, tiny: Path, attempt: Attempt, arguments: list[str], words: list[str]
) -> None:
    before = listing(place.folder)
    assert_error_object(attempt("tune", tiny, *arguments), *words)
    assert listing(place.folder) == before


def test_a_refusal_without_json_leaves_standard_output_empty(place: Place, tiny: Path) -> None:
    done = place.aivmm("tune", tiny, "--objective", "speed")
    assert_one_line(done, "speed")
    assert done.out == ""
    assert listing(place.folder) == {}


# --- models --------------------------------------------------------------------------------------------------------------------------


def external(folder: Path, location: str, *, keep: bool) -> Path:
    """Write a model whose weights lie at `location`, below its folder or not; without `keep` they are gone again."""
    weights = np.ones((64, 64), dtype=np.float32)
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[1, 64] x) => (float[1, 64] y) <float[64, 64] w = {'
        + ", ".join(["1"] * 4096)
        + "}> { y = MatMul(x, w) }"
    )
    tensor = model.graph.initializer[0]
    tensor.ClearField("float_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": "0", "length": str(weights.nbytes)}.items():
        tensor.external_data.add(key=key, value=value)
    if keep:
        (folder / location).write_bytes(weights.tobytes())
    path = folder / "external.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def truncated(folder: Path, tiny: Path) -> Path:
    whole = tiny.read_bytes()
    path = folder / "truncated.onnx"
    path.write_bytes(whole[: len(whole) // 2])
    return path


def written(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


BAD_MODELS: dict[str, tuple[Callable[[Path, Path], Path], list[str]]] = {
    "missing": (lambda folder, tiny: folder / "missing.onnx", ["missing.onnx"]),
    "directory": (lambda folder, tiny: folder, ["directory"]),
    "empty": (lambda folder, tiny: written(folder, "empty.onnx", b""), ["empty.onnx"]),
    "text": (lambda folder, tiny: written(folder, "text.onnx", b"hello, this is no model\n" * 9), ["text.onnx", "text"]),
    "html": (lambda folder, tiny: written(folder, "page.onnx", b"<!DOCTYPE html><html>Not Found</html>"), ["page.onnx", "HTML"]),
    "pickle": (lambda folder, tiny: written(folder, "net.onnx", pickle.dumps({"weights": [1.0] * 99})), ["net.onnx", "pickle"]),
    "bytes": (lambda folder, tiny: written(folder, "noise.onnx", np.random.default_rng(0).bytes(4096)), ["noise.onnx"]),
    "truncated": (truncated, ["truncated.onnx"]),
    "external-missing": (lambda folder, tiny: external(folder, "weights.bin", keep=False), ["weights.bin"]),
    "external-outside": (lambda folder, tiny: external(folder, "../weights.bin", keep=True), ["../weights.bin"]),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_file_that_is_no_model_is_refused_with_what_it_is(place: Place, tiny: Path, tune: Attempt, case: str) -> None:
    make, words = BAD_MODELS[case]
    models = place.folder / "models"
    models.mkdir()
    model = make(models, tiny)
    before = listing(models)
    assert_error_object(tune(model), *words)
    assert listing(models) == before


def test_an_unknown_demo_is_refused_with_the_known_ones(place: Place, tune: Attempt) -> None:
    assert_error_object(tune("demo:squeezenot"), "demo:squeezenot", "demo:squeezenet", "demo:encoder")


def test_a_dimension_that_cannot_be_guessed_is_asked_for_with_the_option_to_add(tune: Attempt, tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "light.onnx", layers=1, width=1)  # trial runs try to guess it first
    assert_error_object(tune(model), "side", "--dim side=")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shape", "input=1x4x16x16"], ["input", "3"]),
        (["--shape", "input=1x3x16"], ["input"]),
        (["--shape", "picture=1x3x16x16"], ["picture", "input"]),
        (["--dim", "side=16", "--dim", "depth=3"], ["depth", "side"]),
        (["--dim", "side=16", "--shape", "input=1x3x16x8"], ["side"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("-") else None,
)
def test_a_shape_that_does_not_fit_is_refused(place: Place, tiny: Path, tune: Attempt, arguments: list[str], words: list[str]) -> None:
    assert_error_object(tune(tiny, *arguments), *words)


# --- targets and precisions: known once the machine was looked at ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What `aivmm devices` finds on this machine."""
    return Place.at(tmp_path_factory.mktemp("devices")).aivmm("devices", "--json").json


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--targets", "openvyno"], ["openvyno", "openvino:CPU", "onnxruntime:CPU"]),
        (["--constraint", "targets in (openvino:CPUU)"], ["openvino:CPUU", "onnxruntime:CPU"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("-") else None,
)
def test_an_unknown_target_is_refused_with_the_known_ones(
    place: Place, tiny: Path, tune: Attempt, arguments: list[str], words: list[str]
) -> None:
    assert_error_object(tune(tiny, *TINY, *arguments), *words)


def test_operators_that_the_model_has_not_are_refused_with_those_it_has(tiny: Path, tune: Attempt) -> None:
    assert_error_object(tune(tiny, *TINY, "--cut-around", "Relu,Convv"), "--cut-around", "'Convv'", "Conv", "MatMul")


def test_a_target_that_is_absent_here_is_refused_with_the_reason(tiny: Path, here: Any, tune: Attempt) -> None:
    absent = here["unavailable"]
    if not absent:
        pytest.skip("every target that a user could ask for is available here")
    done = tune(tiny, *TINY, "--targets", absent[0]["target"])
    assert_error_object(done, absent[0]["target"], absent[0]["reason"][:40])


def test_a_precision_that_nothing_here_runs_is_refused_with_those_it_runs(tiny: Path, here: Any, tune: Attempt) -> None:
    known = {precision for each in here["targets"] for precision in each["precisions"]}
    lacking = sorted({"bf16", "fp16"} - known)
    if not lacking:
        pytest.skip("this machine runs every precision that can be asked for")
    assert_error_object(tune(tiny, *TINY, "--precisions", lacking[0]), lacking[0], "fp32")


# --- inputs --------------------------------------------------------------------------------------------------------------------------

IMAGE = np.zeros((1, 3, 16, 16), dtype=np.float32)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (None, ["in.npz", "no such file"]),
        ({"picture": IMAGE}, ["in.npz", "picture", "input"]),
        ({"input": IMAGE.astype(np.int32)}, ["in.npz", "int32", "float32"]),
    ],
    ids=["missing file", "missing array", "mistyped"],
)
def test_inputs_that_do_not_fit_are_refused(
    place: Place, tiny: Path, tune: Attempt, tmp_path: Path, arrays: dict[str, np.ndarray] | None, words: list[str]
) -> None:
    if arrays is not None:
        np.savez(tmp_path / "in.npz", **arrays)
    assert_error_object(tune(tiny, *TINY, "--inputs", tmp_path / "in.npz"), *words)


def test_pickled_inputs_are_refused_unread(place: Place, tiny: Path, tune: Attempt, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "sprung",)

    np.savez(tmp_path / "in.npz", input=np.array([Trap()], dtype=object), allow_pickle=True)
    assert_one_line(tune(tiny, *TINY, "--inputs", tmp_path / "in.npz"), "in.npz", "Python objects")
    assert not (tmp_path / "sprung").exists()


# --- where the plan goes -------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="links take rights on Windows")
@pytest.mark.parametrize("output", ["afile/plan.aivmm", "nowhere/plan.aivmm", "afile", "full", "link"])
def test_an_output_that_cannot_be_written_is_refused_at_once_and_left_as_it_is(
    place: Place, tiny: Path, tune: Attempt, output: str
) -> None:
    (place.work / "afile").write_text("a file")
    (place.work / "full").mkdir()
    (place.work / "full" / "thesis.txt").write_text("somebody's work")
    (place.work / "link").symlink_to("full")
    done = tune(tiny, *TINY, "-o", output)
    assert_error_object(done, output.partition("/")[0], "-o DIR")
    assert "reading the model" not in done.err


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permissions do not bind root")
def test_an_output_in_a_read_only_folder_is_refused(place: Place, tiny: Path, tune: Attempt) -> None:
    folder = place.work / "sealed"
    folder.mkdir(mode=0o555)
    assert_error_object(tune(tiny, *TINY, "-o", folder / "plan.aivmm"), "sealed")


# --- the database --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def current(tmp_path: Path) -> bytes:
    """A database of this version, as one file."""
    with Database.open(tmp_path / "current.db"):
        pass
    return (tmp_path / "current.db").read_bytes()


def refused_database(place: Place, tiny: Path, tune: Attempt, *words: str) -> None:
    """Tune into the place's database, which is bad: it is refused, and left as it is, byte for byte, with nothing beside it."""
    around = {name: content for name, content in listing(place.folder).items() if name.startswith("tune.db")}
    assert_error_object(tune(tiny, *TINY), "tune.db", *words)
    assert {name: content for name, content in listing(place.folder).items() if name.startswith("tune.db")} == around


def test_a_database_that_is_none_is_refused(place: Place, tiny: Path, tune: Attempt) -> None:
    place.db.write_bytes(b"certainly not SQLite " * 100)
    refused_database(place, tiny, tune, "not a SQLite database", "--db")


def test_somebody_elses_database_is_refused(place: Place, tiny: Path, tune: Attempt) -> None:
    with sqlite3.connect(place.db) as connection:
        connection.execute("CREATE TABLE accounts (name TEXT)")
    connection.close()
    refused_database(place, tiny, tune, "something else", "--db")


def test_a_corrupted_database_is_refused(place: Place, tiny: Path, tune: Attempt, current: bytes) -> None:
    broken = bytearray(current)
    broken[4096 : 4096 + 8192] = b"\xff" * 8192
    place.db.write_bytes(bytes(broken))
    refused_database(place, tiny, tune, "damaged", "--db")


def test_a_database_of_a_newer_version_is_refused(place: Place, tiny: Path, tune: Attempt, current: bytes) -> None:
    place.db.write_bytes(current)
    connection = sqlite3.connect(place.db)
    with connection:
        connection.execute("UPDATE aivmm_version SET version_num = '9999'")
    connection.close()  # this folds the log into the file
    refused_database(place, tiny, tune, "newer", "upgrade")


def test_a_folder_as_the_database_is_refused(place: Place, tiny: Path, tune: Attempt) -> None:
    place.db.mkdir()
    refused_database(place, tiny, tune, "directory", "--db")


def test_a_database_in_no_folder_is_refused(place: Place, tiny: Path, tune: Attempt) -> None:
    done = tune(tiny, *TINY, "--db", place.folder / "nowhere" / "tune.db")
    assert_error_object(done, "nowhere", "does not exist")
    assert not (place.folder / "nowhere").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permissions do not bind root")
def test_a_read_only_database_is_refused(place: Place, tiny: Path, tune: Attempt, current: bytes) -> None:
    place.db.write_bytes(current)
    place.db.chmod(0o444)
    refused_database(place, tiny, tune, "not writable")


@pytest.mark.slow  # it waits 30 s for the other process, and that is what it should do
def test_a_locked_database_is_refused_after_waiting(place: Place, tiny: Path, tune: Attempt, current: bytes) -> None:
    place.db.write_bytes(current)
    hold = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('BEGIN EXCLUSIVE'); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", hold, str(place.db)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        done = tune(tiny, *TINY)
        holder.kill()
    assert_error_object(done, "tune.db", "locked by another process", "--db")


def test_an_unknown_kind_of_database_is_refused_without_its_password(place: Place, tiny: Path, tune: Attempt) -> None:
    done = tune(tiny, *TINY, "--db", "mysql://me:geheim@host/db")
    assert_error_object(done, "mysql", "postgresql")
    assert "geheim" not in done.err + done.out


# --- other commands ------------------------------------------------------------------------------------------------------------------


def test_a_plan_that_is_none_is_refused(place: Place, attempt: Attempt) -> None:
    (place.work / "folder").mkdir()
    assert_error_object(attempt("run", "missing.aivmm"), "missing.aivmm")
    assert_error_object(attempt("run", "folder"), "plan.json")


def test_a_report_of_a_run_that_is_not_there_is_refused(place: Place, attempt: Attempt) -> None:
    done = attempt("report", "deadbeef")
    assert_error_object(done)
    assert listing(place.work) == {}


def test_an_unknown_command_is_refused(place: Place, attempt: Attempt) -> None:
    assert_error_object(attempt("tone"), "tone")
