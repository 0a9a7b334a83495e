"""What a workload file may say, and one line about each thing it may not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aivmm.errors import UsageError
from aivmm.tuner.workload_file import name_of, read_workload
from tests.tuner.harness import Finished, Place

MODELS = ["models/a.onnx", "demo:b"]


def read(tmp_path: Path, text: str | bytes, models: list[str] = MODELS) -> object:
    path = tmp_path / "w.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_workload(path, models)


def test_each_model_gets_what_the_file_asks(tmp_path: Path) -> None:
    text = """
    [b]
    priority = 2
    [a]
    latency = "5ms"
    p99 = "20ms"
    rate = "31.5/s"
    dim = { seq = 128 }
    shape = { x = "1x3x8x8" }
    """
    (a, b), notes = read(tmp_path, text)  # type: ignore[misc]
    assert (a.model, a.demand.name, a.demand.priority) == ("models/a.onnx", "a", 1)
    assert (a.demand.latency_s, a.demand.p99_s, a.demand.rate_per_s) == (0.005, 0.02, 31.5)
    assert (a.dims, a.shapes) == ({"seq": 128}, {"x": (1, 3, 8, 8)})
    assert (b.model, b.demand.name, b.demand.priority, b.demand.latency_s, b.demand.rate_per_s) == ("demo:b", "b", 2, None, None)
    assert notes == ()


def test_a_model_that_the_file_leaves_out_is_served_last_and_that_is_said(tmp_path: Path) -> None:
    (a, b), notes = read(tmp_path, "[a]\npriority = 3")  # type: ignore[misc]
    assert (a.demand.priority, b.demand.priority) == (3, 4)
    assert len(notes) == 1
    assert "says nothing of 'b'" in notes[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[a", "is no TOML"),
        ("a = 1\na = 2", "is no TOML"),
        (b"\xff\xfe", "is no TOML"),
        ("a = 1", "'a' is no table"),
        ("[[a]]\npriority = 1", "'a' is no table"),
        ("[c]\npriority = 1", "names the unknown model 'c'; the models given are 'a', 'b'"),
        ("[a]\nprority = 1", "unknown setting 'prority'"),
        ("[a]\npriority = 0", "priority of 'a' is 0"),
        ("[a]\npriority = true", "priority of 'a' is True"),
        ('[a]\npriority = "1"', "priority of 'a' is '1'"),
        ("[a]\nlatency = 5", "latency of 'a' is 5; write it with its unit"),
        ('[a]\nlatency = "5"', "latency of 'a' is '5'"),
        ('[a]\nlatency = "5 kg"', "latency of 'a' is '5 kg'"),
        ('[a]\nlatency = "-5ms"', "latency of 'a' is '-5ms'"),
        ('[a]\nlatency = "5ms, p99<=1ms"', "latency of 'a'"),
        ('[a]\nrate = "5ms"', "rate of 'a' is '5ms'"),
        ('[a]\nrate = "0/s"', "rate of 'a' is"),
        ('[a]\nlatency = "20ms"\np99 = "5ms"', "contradict each other"),
        ("[a]\ndim = 5", "dim of 'a' is 5"),
        ("[a]\ndim = { seq = 1.5 }", "--dim"),
        ('[a]\nshape = { x = "axb" }', "--shape"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_line(tmp_path: Path, text: str | bytes, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(tmp_path, text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_and_models_of_one_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        read_workload(tmp_path / "nowhere.toml", MODELS)
    with pytest.raises(UsageError, match="two models are named 'a'"):
        read(tmp_path, "", ["x/a.onnx", "y/a.onnx"])
    assert name_of("demo:squeezenet") == "squeezenet"


@settings(max_examples=50)
@given(st.text() | st.binary().map(lambda raw: raw.decode("latin-1")))
def test_any_text_is_a_workload_or_one_line_of_refusal(text: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "w.toml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            wishes, _ = read_workload(path, MODELS)
        except UsageError as error:
            assert len(str(error).splitlines()) == 1
        else:
            assert [each.demand.name for each in wishes] == ["a", "b"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("a.onnx", "b.onnx"), "2 models are given; tune one by one, or say with --workload FILE"),
        (("a.onnx", "b.onnx", "--workload", "nowhere.toml"), "cannot read nowhere.toml"),
        (("a.onnx", "b.onnx", "--workload", "w.toml", "--dim", "n=4"), "--dim or --shape is for one model"),
        (("a.onnx", "b.onnx", "--workload", "w.toml", "--constraint", "latency<5ms"), "--constraint is for one model"),
        (("a.onnx", "b.onnx", "--workload", "w.toml", "--inputs", "x.npz"), "--inputs is for one model"),
        (("a.onnx", "b.onnx", "--workload", "w.toml", "--dry-run"), "--dry-run"),
    ],
)
def test_the_command_refuses_what_does_not_go_together(
    place: Place, in_process: Callable[..., Finished], tiny: Path, arguments: tuple[str, ...], words: str
) -> None:
    (place.work / "w.toml").write_text("[a]\npriority = 1\n")
    for name in ("a.onnx", "b.onnx"):
        shutil.copy(tiny, place.work / name)
    done = in_process(place, "tune", *arguments, "-q")
    assert done.code == 2
    assert len(done.error_lines) == 1
    assert words in done.error_lines[0]


def test_what_does_not_fit_one_of_the_models_says_which(place: Place, in_process: Callable[..., Finished], tiny: Path) -> None:
    (place.work / "w.toml").write_text("[a]\npriority = 1\ndim = { seq = 8 }\n")
    for name in ("a.onnx", "b.onnx"):
        shutil.copy(tiny, place.work / name)
    done = in_process(place, "tune", "a.onnx", "b.onnx", "--workload", "w.toml", "-q")
    assert done.code == 2 and done.error_lines[0].startswith("aivmm: a: --dim seq=8: no input has a dimension 'seq'")
