"""Data sets are taken as people keep them, checked one sample at a time, and split so that what is held out was never calibrated on."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from aivmm.errors import UsageError
from aivmm.models.dataset import MOST_CALIBRATION, Sample, digest, load_dataset, read_samples, split, split_indices
from aivmm.models.inputs import load_inputs
from aivmm.tensors import TensorSpec


def spec(name: str = "x", dtype: str = "float32", shape: tuple[int | None, ...] = (1, 3)) -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


X = spec()
IDS = spec("ids", "int64", (1, 4))


def rows(count: int, *shape: int, dtype: str = "float32") -> Any:
    """Arrays whose values tell the samples apart."""
    return np.broadcast_to(np.arange(count).reshape(-1, *(1 for _ in shape)), (count, *shape)).astype(dtype)


def npz(folder: Path, name: str = "data.npz", /, **arrays: Any) -> str:
    np.savez(folder / name, **arrays)
    return str(folder / name)


def firsts(samples: Iterable[Sample], name: str = "x") -> list[float]:
    return [float(each.inputs[name].ravel()[0]) for each in samples]


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """Write a module of the user's in the current folder and return how `load` in it is named: anew each time, since modules stay."""
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> str:
        name = f"data_{abs(hash((request.node.name, text))):x}"
        (tmp_path / f"{name}.py").write_text("import numpy as np\n" + textwrap.dedent(text))
        return f"{name}:load"

    return write


def refusal(given: str, *specs: TensorSpec, most: int = 100) -> UsageError:
    with pytest.raises(UsageError) as caught:
        load_dataset(given, specs or (X,), most=most)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 800
    assert caught.value.advice
    return caught.value


# --- files ---


def test_an_npz_with_a_sample_axis_is_several_samples(tmp_path: Path) -> None:
    samples, notes = load_dataset(npz(tmp_path, x=rows(5, 1, 3), ids=rows(5, 1, 4, dtype="int64")), (X, IDS), most=100)
    assert firsts(samples) == firsts(samples, "ids") == [0, 1, 2, 3, 4]
    assert all(each.inputs["x"].shape == (1, 3) and each.inputs["ids"].shape == (1, 4) and not each.extras for each in samples)
    assert notes == []


@pytest.mark.parametrize(
    ("arrays", "specs"),
    [
        ({"x": rows(1, 3)}, (X,)),
        ({"x": rows(4, 1, 3)}, (X,)),
        ({"x": rows(3, 1, 3), "ids": rows(3, 1, 4, dtype="int32")}, (X, IDS)),
        ({"x": rows(4, 2, 3)}, (spec(shape=(2, 3)),)),
        ({"x": rows(2, 3)}, (spec(shape=(2, 3)),)),
        ({"x": rows(6, 3)}, (spec(shape=(None, 3)),)),
        ({"x": rows(6, 1), "sr": np.full(6, 16000)}, (spec(shape=(1,)), spec("sr", "int64", ()))),
    ],
)
def test_what_inputs_takes_means_the_same_here(tmp_path: Path, arrays: dict[str, Any], specs: tuple[TensorSpec, ...]) -> None:
    given = npz(tmp_path, **arrays)
    ours, theirs = load_dataset(given, specs, most=100)[0], load_inputs(Path(given), specs)
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        for name, array in other.items():
            assert mine.inputs[name].dtype == array.dtype and mine.inputs[name].shape == array.shape
            np.testing.assert_array_equal(mine.inputs[name], array)


def test_labels_are_extras_that_line_up_with_the_batch_axis(tmp_path: Path) -> None:
    given = npz(tmp_path, x=rows(4, 3), label=np.arange(4), name=np.array(list("abcd")))
    samples, _ = load_dataset(given, (X,), most=100)
    assert [(each.inputs["x"].shape, each.extras["label"].tolist(), each.extras["name"].tolist()) for each in samples] == [
        ((1, 3), [index], [letter]) for index, letter in enumerate("abcd")
    ]
    whole, _ = load_dataset(npz(tmp_path, x=rows(4, 1, 3), label=np.arange(4)), (X,), most=100)
    assert [each.extras["label"].tolist() for each in whole] == [0, 1, 2, 3]


def test_consecutive_samples_fill_a_batch_and_the_rest_is_left_out_with_a_note(tmp_path: Path) -> None:
    batch = spec(shape=(4, 3))
    for x in (rows(10, 3), rows(10, 1, 3)):
        samples, notes = load_dataset(npz(tmp_path, x=x, label=np.arange(10)), (batch,), most=100)
        assert [each.inputs["x"][:, 0].tolist() for each in samples] == [[0, 1, 2, 3], [4, 5, 6, 7]]
        assert [each.extras["label"].tolist() for each in samples] == [[0, 1, 2, 3], [4, 5, 6, 7]]
        assert notes == ["10 samples were given; the last 2 do not fill a batch of 4 and are left out"]
    samples, notes = load_dataset(npz(tmp_path, x=rows(10, 3)), (batch,), most=1)
    assert notes[0] == "10 samples were given; the first 4 are used"
    assert "3 samples are fewer than one batch of 4" in str(refusal(npz(tmp_path, x=rows(3, 3)), batch))


def test_what_has_no_batch_axis_has_to_be_the_same_within_a_batch(tmp_path: Path) -> None:
    specs = (spec(shape=(2, 3)), spec("sr", "int64", ()))
    samples, _ = load_dataset(npz(tmp_path, x=rows(4, 3), sr=np.array([8, 8, 16, 16])), specs, most=9)
    assert [int(each.inputs["sr"]) for each in samples] == [8, 16]
    assert "'sr' has different values within one batch of 2" in str(
        refusal(npz(tmp_path, x=rows(4, 3), sr=np.array([8, 16, 16, 16])), *specs)
    )


def test_only_the_first_are_used_and_that_is_said(tmp_path: Path) -> None:
    samples, notes = load_dataset(npz(tmp_path, x=rows(12_000, 3)), (X,), most=1000)
    assert firsts(samples) == list(range(1000))
    assert notes == ["12,000 samples were given; the first 1,000 are used"]
    assert load_dataset(npz(tmp_path, x=rows(1000, 3)), (X,), most=1000)[1] == []


def test_one_sample_is_allowed_with_a_note(tmp_path: Path) -> None:
    samples, notes = load_dataset(npz(tmp_path, x=rows(1, 3)), (X,), most=100)
    assert len(samples) == 1 and len(notes) == 1 and "one sample was given" in notes[0]
    assert split(samples, seed=0) == (samples, samples)


def test_a_folder_is_read_in_natural_order(tmp_path: Path) -> None:
    for index in (10, 9, 1, 2):
        np.save(tmp_path / f"image{index}.npy", np.full((3,), index, dtype=np.float64))
    (tmp_path / "README.txt").write_text("about")
    (tmp_path / "._image1.npy").write_bytes(b"what macOS leaves behind")
    samples, notes = load_dataset(str(tmp_path), (X,), most=3)
    assert firsts(samples) == [1, 2, 9]
    assert samples[0].inputs["x"].dtype == np.float32 and samples[0].inputs["x"].shape == (1, 3)
    assert notes == ["4 samples were given; the first 3 are used"]


def test_a_folder_of_npz_files_holds_one_sample_each(tmp_path: Path) -> None:
    for index in range(3):
        npz(tmp_path, f"{index}.npz", x=np.full((1, 3), index, np.float32), ids=np.full((4,), index), label=np.array(index))
    samples, _ = load_dataset(str(tmp_path), (X, IDS), most=100)
    assert firsts(samples) == firsts(samples, "ids") == [0, 1, 2]
    npz(tmp_path, "3.npz", x=rows(7, 3), ids=rows(7, 4, dtype="int64"))
    assert "3.npz: array 'x' has shape [7, 3], expected [1, 3]" in str(refusal(str(tmp_path), X, IDS))


def test_an_npy_file_is_the_only_input(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", rows(4, 3))
    assert firsts(load_dataset(str(tmp_path / "x.npy"), (X,), most=2)[0]) == [0, 1]
    assert "the model has 2 inputs" in str(refusal(str(tmp_path / "x.npy"), X, IDS))


@pytest.mark.parametrize(
    ("dtype", "array", "expected"),
    [
        ("float32", np.array([0.1]), np.array([0.1], np.float32)),
        ("float16", np.array([1.5], ">f4"), np.array([1.5], np.float16)),
        ("int64", np.array([7], np.int32), np.array([7])),
        ("int32", np.array([-7]), np.array([-7], np.int32)),
        ("uint8", np.array([255], np.int64), np.array([255], np.uint8)),
        ("bool", np.array([True]), np.array([True])),
        ("string", np.array(["größe"]), np.array(["größe"], object)),
        ("bfloat16", np.array([1.5], ml_dtypes.bfloat16), np.array([1.5], ml_dtypes.bfloat16)),
    ],
)
def test_types_are_cast_where_nothing_is_lost(tmp_path: Path, dtype: str, array: Any, expected: Any) -> None:
    (sample,), _ = load_dataset(npz(tmp_path, x=array), (spec(dtype=dtype, shape=(1,)),), most=1)
    assert sample.inputs["x"].dtype == expected.dtype
    np.testing.assert_array_equal(sample.inputs["x"], expected)


@pytest.mark.parametrize(
    ("dtype", "array", "problem"),
    [
        ("float32", np.array([1]), "is int64, expected float32"),
        ("int64", np.array([1.0]), "is float64, expected int64"),
        ("int64", np.array([True]), "is bool, expected int64"),
        ("float32", np.array(["1"]), "expected float32"),
        ("float32", np.array([np.nan]), "holds NaN"),
        ("float32", np.array([-np.inf]), "holds infinity"),
        ("float32", np.array([1e39]), "too large for float32"),
        ("float16", np.array([70000.0]), "too large for float16"),
        ("int32", np.array([2**31]), "which int32 cannot hold"),
        ("uint8", np.array([-1]), "which uint8 cannot hold"),
        ("int64", np.array([2**63], np.uint64), "which int64 cannot hold"),
    ],
)
def test_what_would_lose_values_is_refused(tmp_path: Path, dtype: str, array: Any, problem: str) -> None:
    error = refusal(npz(tmp_path, x=array), spec(dtype=dtype, shape=(1,)))
    assert problem in error.message and "'x'" in error.message


def test_a_bad_sample_is_named(tmp_path: Path) -> None:
    x = rows(5, 3)
    x[3, 1] = np.nan
    assert "data.npz, sample 3: array 'x' holds NaN" in str(refusal(npz(tmp_path, x=x)))
    assert len(load_dataset(npz(tmp_path, x=x), (X,), most=3)[0]) == 3


@pytest.mark.parametrize(
    ("arrays", "problem"),
    [
        ({"y": rows(5, 3)}, "no array for input x: float32[1, 3]; name the arrays of --dataset as the inputs; found: y"),
        ({"x": rows(0, 3)}, "no samples"),
        ({"x": rows(0, 1, 3)}, "no samples"),
        ({"x": rows(5, 4)}, "array 'x' has shape [5, 4], expected [1, 3]; several samples have one more axis in front: [samples, 1, 3]"),
        ({"x": rows(5, 3), "label": np.arange(4)}, "array 'x' holds 5 samples, 'label' 4"),
        ({"x": rows(5, 3), "label": np.array(1)}, "array 'x' holds 5 samples, 'label' no sample axis"),
        ({}, "found: no arrays"),
    ],
)
def test_an_npz_that_does_not_fit_is_refused(tmp_path: Path, arrays: dict[str, Any], problem: str) -> None:
    assert problem in str(refusal(npz(tmp_path, **arrays)))


def test_files_that_are_no_data_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "empty.npy").touch()
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY\x01\x00")
    with zipfile.ZipFile(tmp_path / "photos.npz", "w") as archive:
        archive.writestr("x", b"no array")
    whole = Path(npz(tmp_path, x=rows(5000, 3))).read_bytes()
    (tmp_path / "damaged.npz").write_bytes(whole[:9000] + b"#" * 40 + whole[9040:])
    for name, problem in {
        "text.npz": "not an .npz or .npy file",
        "empty.npy": "not an .npz or .npy file",
        "cut.npy": "cannot be read",
        "photos.npz": "'x' is not an array",
        "damaged.npz": "cannot be read",
        "missing.npz": "no such file or folder",
        "C:\\data\\missing.npz": "no such file or folder",
        "data:": "no such file or folder",
        ":load": "no such file or folder",
        "my-data:load": "no such file or folder",
    }.items():
        assert refusal(name).message.startswith(f"{name}: {problem}")


def test_pickles_are_refused_unread(tmp_path: Path) -> None:
    objects = np.array([{}, {}], dtype=object)
    np.save(tmp_path / "x.npy", objects, allow_pickle=True)
    (tmp_path / "raw.npy").write_bytes(b"\x80\x04]\x94.")
    assert "Python objects (a pickle), which are not read" in str(refusal(npz(tmp_path, x=objects)))
    assert "Python objects (a pickle), which are not read" in str(refusal(str(tmp_path / "x.npy")))
    assert "not an .npz or .npy file" in str(refusal(str(tmp_path / "raw.npy")))


def test_folders_without_samples_are_refused(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").touch()
    assert "a folder without .npy and .npz files; --dataset takes" in str(refusal(str(tmp_path)))
    np.save(tmp_path / "0.npy", rows(1, 3))
    assert "the model has 2 inputs" in str(refusal(str(tmp_path), X, IDS))
    npz(tmp_path, "1.npz", x=rows(1, 3))
    assert "both .npy and .npz" in str(refusal(str(tmp_path)))


# --- callables ---


@pytest.mark.parametrize(
    "body",
    [
        "def load(): return [{'x': np.full(3, i, np.float32), 'label': i} for i in range(5)]",
        "def load():\n    for i in range(5): yield {'x': [[float(i)] * 3], 'label': [i]}",
        "class load:\n    def __len__(self): return 5\n    def __getitem__(self, i): return {'x': np.full((1, 3), i, 'f4'), 'label': [i]}",
        "class Maker:\n    def __call__(self): return tuple({'x': np.full(3, i, 'f8'), 'label': i} for i in range(5))\nload = Maker()",
        "x = np.empty((1, 3), np.float32)\ndef load():\n    for i in range(5):\n        x[:] = i\n        yield {'x': x, 'label': [i]}",
        "class Stream:\n    def __len__(self): raise TypeError('no len')\n    def __iter__(self): return iter("
        "[{'x': [float(i)] * 3, 'label': i} for i in range(5)])\ndef load(): return Stream()",
    ],
    ids=["list", "generator", "torch-like data set", "callable object", "one buffer used again", "no length"],
)
def test_a_callable_gives_samples(code: Any, body: str) -> None:
    samples, notes = load_dataset(code(body), (X,), most=100)
    assert firsts(samples) == [0, 1, 2, 3, 4] and notes == []
    assert [each.extras["label"].tolist() for each in samples] == [[0], [1], [2], [3], [4]]


def test_no_more_than_needed_is_taken_from_an_endless_callable(code: Any) -> None:
    given = code(
        """
        def load():
            try:
                for i in range(10**9):
                    if i > 8: raise RuntimeError("too many were taken")
                    yield {"x": np.full(3, i, np.float32)}
            finally:
                open("closed", "w").close()
                raise RuntimeError("last words")
        """
    )
    samples, notes = load_dataset(given, (X,), most=8)
    assert firsts(samples) == list(range(8)) and notes == ["more than 8 samples were given; the first 8 are used"]
    assert Path("closed").exists()


def test_a_callable_is_found_in_the_current_folder_in_a_file_and_in_a_package(code: Any, tmp_path: Path) -> None:
    body = "from helping_code import rows\ndef load():\n    import helping_later\n    return [{'x': row} for row in rows]\n"
    for folder in (tmp_path, tmp_path / "deep"):
        folder.mkdir(exist_ok=True)
        (folder / "helping_code.py").write_text("import numpy as np\nrows = np.ones((2, 3), np.float32)\n")
        (folder / "helping_later.py").touch()
    before = list(sys.path)
    assert len(load_dataset(code(body), (X,), most=9)[0]) == 2
    (tmp_path / "deep" / "json.py").write_text(body)  # a name of the standard library's, which stays what it is
    assert len(load_dataset(str(tmp_path / "deep" / "json.py:load"), (X,), most=9)[0]) == 2
    assert len(load_dataset("deep/json.py:load", (X,), most=9)[0]) == 2
    (tmp_path / "deep" / "inner_part.py").write_text(
        f"class Data:\n    @staticmethod\n    def load(): return [{{'x': {[1.0, 2.0, 3.0]}}}]\n"
    )
    assert len(load_dataset("deep.inner_part:Data.load", (X,), most=9)[0]) == 1
    assert sys.path == before and "JSONDecoder" in dir(sys.modules["json"])


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("other = 1", "no 'load' in data_"),
        ("def loaded(): pass", "did you mean 'loaded'?"),
        ("load = 5", "not callable, but int"),
        ("def load(path): pass", "missing a required argument: 'path'; it is called as load()"),
        ("def load(): return 5", "returned int, expected an iterable of dicts"),
        ("def load(): return {'x': np.ones((2, 3))}", "returned dict, expected an iterable of dicts"),
        ("def load(): pass", "returned NoneType, expected an iterable"),
        ("def load(): return []", "no samples"),
        ("def load(): yield np.ones(3)", "sample 0: it yielded ndarray, expected a dict"),
        ("def load(): yield ({'x': np.ones(3)}, 1)", "sample 0: it yielded tuple, expected a dict"),
        ("def load(): yield {0: np.ones(3)}", "sample 0: the name 0 is no string"),
        ("def load(): yield {'y': np.ones(3)}", "sample 0: no array for input x"),
        ("def load(): yield {'x': [[1.0], [1.0, 2.0]]}", "cannot make an array of 'x' in sample 0: it raised ValueError"),
        ("def load(): yield {'x': None}", "has shape [], expected [1, 3]"),
        ("def load(): yield {'x': [None] * 3}", "array 'x' is object, expected float32"),
        ("def load(): yield {'x': [1.0] * 3, 'label': {}}", "'label' holds Python objects, expected numbers or strings"),
        ("def load(): yield {'x': np.ones((32, 3), 'f4')}", "has shape [32, 3], expected [1, 3]; give --dataset one sample at a time"),
        ("def load():\n    raise KeyError('lost')", "raised KeyError: 'lost' (data_HERE.py:3)"),
        ("def load():\n    yield {'x': [1.0] * 3}\n    np.linalg.inv(np.zeros((2, 2)))", "LinAlgError: Singular matrix (data_HERE.py:4)"),
        ("def load():\n    raise ValueError('a\\nb' * 9999)", "raised ValueError: a b"),
        ("class Odd(BaseException):\n    def __str__(self): raise self\ndef load():\n    raise Odd", "raised Odd: ? (data_HERE.py:5)"),
        ("def load():\n    raise StopIteration", "raised StopIteration (data_HERE.py:3)"),
        ("import sys\ndef load():\n    sys.exit(3)", "called sys.exit(3) (data_HERE.py:4)"),
        ("import sys\nsys.exit('bye')", "called sys.exit(bye) (data_HERE.py:3)"),
        ("def load(:\n    pass", "raised SyntaxError"),
        ("import not_a_module_anywhere", "raised ModuleNotFoundError: No module named 'not_a_module_anywhere' (data_HERE.py:2)"),
    ],
)  # fmt: skip
def test_a_callable_that_fails_is_one_line_with_the_place(code: Any, body: str, problem: str) -> None:
    given = code(body)
    message = str(refusal(given))
    assert problem.replace("data_HERE", given.partition(":")[0]) in message
    assert given in message and "--dataset" in message


def test_modules_that_are_not_there_are_told_from_modules_that_fail(code: Any) -> None:
    code("")
    assert "no module 'not_a_module_anywhere'" in str(refusal("not_a_module_anywhere:load"))
    assert "no module 'not_a_module_anywhere'" in str(refusal("not_a_module_anywhere.sub:load"))
    assert "no such file; --dataset takes" in str(refusal("not/there.py:load"))


def test_what_user_code_does_to_the_process_is_undone(code: Any, tmp_path: Path) -> None:
    given = code("import os\ndef load():\n    os.chdir('/')\n    yield {'x': [1.0] * 3}\n")
    before = list(sys.path)
    load_dataset(given, (X,), most=9)
    assert Path.cwd() == tmp_path and sys.path == before


# --- memory, and what is imported ---


def test_samples_are_read_one_at_a_time(code: Any) -> None:
    given = code("made = []\ndef load():\n    for i in range(9):\n        made.append(i)\n        yield {'x': [float(i)] * 3}\n")
    notes: list[str] = []
    samples = read_samples(given, (X,), most=9, notes=notes)
    next(samples)
    next(samples)
    assert sys.modules[given.partition(":")[0]].made == [0, 1]
    samples.close()


def test_onnx_is_not_needed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import aivmm.models.dataset, sys; print('onnx' in sys.modules)"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


# --- the split ---


def test_the_halves_are_disjoint_shuffled_and_the_same_every_time() -> None:
    samples = [Sample(inputs={"x": np.full(1, index)}, extras={}) for index in range(20)]
    calibration, validation = split(samples, seed=1)
    assert len(calibration) == len(validation) == 10
    order = [int(each.inputs["x"][0]) for each in [*calibration, *validation]]
    assert sorted(order) == list(range(20)) and order != list(range(20))
    assert order == [int(each.inputs["x"][0]) for half in split(samples, seed=1) for each in half]
    assert order != [int(each.inputs["x"][0]) for half in split(samples, seed=2) for each in half]
    # Measurements are remembered by it: it must not change with a version of anything.
    assert split_indices(list("abcdef"), seed=0) == ([4, 3, 2], [0, 5, 1])


@pytest.mark.parametrize(("count", "calibrate"), [(2, 1), (3, 1), (8, 4), (600, 300), (601, MOST_CALIBRATION), (5000, MOST_CALIBRATION)])
def test_half_calibrates_but_at_most_three_hundred(count: int, calibrate: int) -> None:
    calibration, validation = split_indices([str(index) for index in range(count)], seed=0)
    assert len(calibration) == calibrate and len(validation) == count - calibrate
    assert not set(calibration) & set(validation)


def test_samples_with_the_same_inputs_stay_on_one_side() -> None:
    digests = [str(index % 7) for index in range(100)]
    for seed in range(20):
        calibration, validation = split_indices(digests, seed=seed)
        assert calibration and validation
        assert not {digests[index] for index in calibration} & {digests[index] for index in validation}
    assert split_indices(["a"] * 3, seed=0) == ([0, 1, 2], [0, 1, 2])
    lopsided = ["a"] * 500 + ["b"]
    for seed in range(4):
        calibration, validation = split_indices(lopsided, seed=seed)
        assert 1 <= len(calibration) <= MOST_CALIBRATION and validation


def test_a_digest_sees_names_types_shapes_and_values_and_not_labels() -> None:
    def of(name: str, array: Any, label: int = 0) -> str:
        return str(digest(Sample(inputs={name: np.asarray(array)}, extras={"label": np.asarray(label)})))

    base = np.zeros((2, 3), np.float32)
    others = [of("y", base), of("x", base.T.copy()), of("x", base.view(np.int32)), of("x", base + 1), of("x", base.astype(object))]
    assert len({of("x", base), *others}) == 6
    assert of("x", base) == of("x", base, label=1) == of("x", np.zeros((3, 2), np.float32).T)
