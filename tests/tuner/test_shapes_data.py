"""A user's samples of several shapes: sorted into listed shapes and padded as the plan pads, or told with the shapes to list."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

import aivmm
from aivmm.models.dataset_shapes import ShapeSurvey, suggested
from aivmm.probes.arrays import save_arrays
from aivmm.probes.compare import Comparison
from aivmm.probes.lab import Lab
from aivmm.runtime.family import Bucket, Crop, Dimension, Served
from aivmm.tensors import TensorSpec
from aivmm.tuner.bucket_data import BucketData
from aivmm.tuner.buckets import BucketTuner
from aivmm.tuner.open_or_padded import OpenOrPadded, Timed, _smaller
from aivmm.tuner.options import TuneOptions
from aivmm.tuner.other_shapes import OpenPlan
from aivmm.tuner.padding import Case, Paddings
from aivmm.tuner.progress import Silent
from aivmm.tuner.shapes import Wanted
from tests.making import ONNXRUNTIME, Part, make_bundle, make_family, normal, onnx_model, token_model, write_model
from tests.tuner.harness import ONE_RUNTIME, SMALL, Finished, Place


def sample(rows: int, seed: int = 0) -> dict[str, Any]:
    return {"x": normal(1, rows, 16, seed=seed), "mask": np.ones((1, rows), np.int64)}


def folder_of(path: Path, lengths: list[int]) -> Path:
    """Write a folder of samples with so many rows, each with a label of its own."""
    path.mkdir()
    for index, rows in enumerate(lengths):
        np.savez(path / f"{index}.npz", **sample(rows, index), label=np.int64(index))
    return path


# --- what to tune for, where no shapes were listed


@pytest.mark.parametrize(
    ("extents", "most", "wanted"),
    [
        ([17], 16, [17]),
        ([80, 17, 33, 17], 16, [17, 33, 80]),
        (range(17, 481), 16, [32, 64, 128, 256, 480]),
        ([5, 6, 7, 300, 301], 16, [8, 301]),  # nothing lies between
        ([5, 6, 7, 300, 301], 1, [301]),
        (range(1, 100_000), 16, [4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 99999]),
        ([16, 32, 64, 128, 256], 16, [16, 32, 64, 128, 256]),
        ([0, 1, 5, 9, 17, 33], 16, [1, 8, 16, 32, 33]),  # no model is tuned for an extent of 0
        ([0], 16, [1]),
    ],
)
def test_suggested_extents_are_few_and_each_takes_a_sample(extents: Any, most: int, wanted: list[int]) -> None:
    assert suggested(list(extents), most) == wanted


def test_a_survey_asks_for_what_the_file_leaves_open_and_nothing_else() -> None:
    specs = (
        TensorSpec(name="x", dtype="float32", shape=(1, 3, 224, 224)),
        TensorSpec(name="ids", dtype="int64", shape=(1, 128)),
    )
    survey = ShapeSurvey(specs, {"x": ("batch", 3, "", ""), "ids": ("batch", "seq")})
    survey.add_bound(3)
    assert survey.refusal("d") is None
    assert survey.add({"x": (3, 64, 48), "ids": (17,)})  # both lack the leading 1
    assert not survey.add({"x": (1, 4, 64, 48), "ids": (1, 17)})  # four channels are in no size of the file's
    assert not survey.add({"x": (2, 3, 64, 48), "ids": (1, 17)})  # and one sample has one batch
    assert not survey.add({"ids": (1, 17)})
    told = str(survey.refusal("d"))
    assert told == (
        "d: its samples have several shapes (x[2]=64,224; x[3]=48,224; seq=17,128), and the model is bound to x[2]=224, x[3]=224, seq=128; "
        "tune for several: --dim seq=17,128 --shape x=1x3x64x48,1x3x224x224"
    )


def test_a_survey_says_nothing_of_extents_that_may_be_any() -> None:
    survey = ShapeSurvey((TensorSpec(name="x", dtype="float32", shape=(1, 3, None, 224)),), {"x": ("batch", 3, "H", "W")})
    survey.add_bound(2)
    assert survey.refusal("d") is None
    assert survey.add({"x": (3, 192, 48)})
    told = "d: its samples have several shapes (W=48,224), and the model is bound to W=224; tune for several: --dim W=48,224"
    assert str(survey.refusal("d")) == told


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        ([3, 9, 5], "its samples have several shapes (seq=3,5,9), and the model is bound to seq=128; tune for several: --dim seq=3,5,9"),
        ([9, 9], "its samples have another shape (seq=9), and the model is bound to seq=128; add: --dim seq=9"),
        ([128, 9], "tune for several: --dim seq=9,128"),
    ],
)
def test_samples_of_other_shapes_say_which_to_tune_for(
    place: Place, in_process: Callable[..., Finished], lengths: list[int], words: str
) -> None:
    write_model(place.work / "tokens.onnx", token_model("seq"))
    folder_of(place.work / "data", lengths)
    done = in_process(place, "tune", "tokens.onnx", "--dataset", "data", *ONE_RUNTIME, "-q")
    assert (done.code, len(done.error_lines)) == (2, 1)
    assert words in done.err


def test_a_callable_of_several_shapes_says_which_to_tune_for(place: Place, in_process: Callable[..., Finished]) -> None:
    write_model(place.work / "tokens.onnx", token_model("rows"))
    (place.work / "data.py").write_text(
        "import numpy as np\n"
        "def load():\n"
        "    for rows in range(1, 41):\n"
        "        yield {'x': np.ones((rows, 16), np.float32), 'mask': np.ones(rows, np.int64)}\n"
    )
    done = in_process(place, "tune", "tokens.onnx", "--dim", "rows=2", "--dataset", "data:load", *ONE_RUNTIME, "-q")
    assert (done.code, len(done.error_lines)) == (2, 1)
    assert "(rows=1 to 40, 40 different), and the model is bound to rows=2; tune for several: --dim rows=1,2,4,8,16,32,40" in done.err


# --- listed shapes


@pytest.mark.slow
def test_each_shape_is_judged_with_the_samples_that_fit_it(tmp_path: Path) -> None:
    place = Place.at(tmp_path)
    write_model(place.work / "tokens.onnx", token_model("rows"))
    folder_of(place.work / "data", [1, 2, 3, 4, 4, 40])
    done = place.aivmm("tune", "tokens.onnx", "--dim", "rows=4,16", "--dataset", "data", *ONE_RUNTIME, *SMALL, "--json")
    assert done.code == 0, done.err
    said = "5 for rows=4 (3 padded), none for rows=16, which is judged on made-up inputs"
    assert f"Samples: {said}; 1 left out, which fit none (rows=40)." in done.json["verdict"]
    buckets = done.json["buckets"]
    assert [each["samples"] for each in buckets] == [{"used": 5, "padded": 3}, {"used": 0, "padded": 0}]
    assert [each["accuracy"]["data"] for each in buckets] == ["real", "synthetic"]
    with aivmm.load_plan(place.work / "tokens.aivmm") as engine:
        assert engine.run(sample(3))["y"].shape == (1, 3, 16)


def test_samples_that_fit_no_listed_shape_are_refused_before_anything_is_tuned(place: Place, in_process: Callable[..., Finished]) -> None:
    """A mean over all rows is padded with nothing, so a sample fits where its very size is listed."""
    write_model(place.work / "tokens.onnx", token_model("rows", mean=True))
    np.savez(place.work / "s.npz", **sample(3))
    done = in_process(place, "tune", "tokens.onnx", "--dim", "rows=4,16", "--inputs", "s.npz", *ONE_RUNTIME, "-q")
    assert done.code == 2
    told = "no sample fits rows=4, rows=16 (exactly); they have rows=3; list shapes with --dim or --shape that take them"
    assert done.error_lines == [f"aivmm: s.npz: {told}"]


def test_a_metric_needs_samples_of_each_shape(place: Place, in_process: Callable[..., Finished]) -> None:
    write_model(place.work / "tokens.onnx", token_model("rows"))
    folder_of(place.work / "data", [3, 4])
    (place.work / "own.py").write_text("def metric(samples, outputs):\n    return 1.0\n")
    asked = ("--metric", "own:metric", "--constraint", "metric>=0.5")
    done = in_process(place, "tune", "tokens.onnx", "--dim", "rows=4,16", "--dataset", "data", *asked, *ONE_RUNTIME, "-q")
    assert done.code == 2
    assert done.error_lines == ["aivmm: --metric judges on your samples, and data has none for rows=16; drop those shapes, or add samples"]


def used_of(lab: Lab, folder: Path, given: Path, shapes: dict[str, tuple[int, ...]], dimension: Dimension) -> list[tuple[int, int]]:
    """Return how many samples of a data set each shape has, and how many of them are padded."""
    (folder / "samples").mkdir(parents=True)
    shares = BucketData(
        lab=lab,
        given=str(given),
        source=folder / "no.onnx",
        folder=folder / "samples",
        buckets=[Bucket(name=name, plan="p", extents={dimension.name: shape[0]}) for name, shape in shapes.items()],
        shapes=[{"x": TensorSpec(name="x", dtype="float32", shape=shape)} for shape in shapes.values()],
        paddings=Paddings(dimensions=(dimension,)),
    ).sorted()
    return [(each.samples, each.padded) for each in shares.shares]


def test_samples_in_one_file_are_single_ones_where_a_batch_of_one_is_listed(tmp_path: Path) -> None:
    images = {"batch=1": (1, 3, 4, 4), "batch=8": (8, 3, 4, 4)}
    batch, nameless = (Dimension(name=name, places=[("x", 0)], padding="zero") for name in ("batch", "x[0]"))
    stacked, one, whole, rows = (tmp_path / name for name in ("stacked.npz", "one.npz", "whole", "rows.npz"))
    np.savez(stacked, x=normal(17, 3, 4, 4))
    np.savez(one, x=normal(3, 4, 4))
    whole.mkdir()
    np.savez(whole / "0.npz", x=normal(8, 3, 4, 4))
    np.savez(whole / "1.npz", x=normal(1, 3, 4, 4))
    np.savez(rows, x=normal(7, 16))
    with Lab() as lab:
        assert used_of(lab, tmp_path / "a", stacked, images, batch) == [(17, 0), (2, 0)]
        assert used_of(lab, tmp_path / "b", stacked, images, nameless) == [(17, 0), (2, 0)]
        assert used_of(lab, tmp_path / "c", one, images, batch) == [(1, 0), (0, 0)]
        assert used_of(lab, tmp_path / "d", whole, images, batch) == [(1, 0), (1, 0)]
        # What leads and is no batch is a sample's own length.
        length = Dimension(name="rows", places=[("x", 0)], padding="zero")
        assert used_of(lab, tmp_path / "e", rows, {"rows=1": (1, 16), "rows=16": (16, 16)}, length) == [(0, 0), (1, 1)]


def test_samples_are_sorted_as_the_plan_will_take_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an input contract that is in fewer bits."""
    monkeypatch.setenv("AIVMM_LOCK", str(tmp_path / "lock"))
    model = onnx_model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [("x", TensorProto.FLOAT, ("rows", 8))],
        [("y", TensorProto.FLOAT, ("rows", 4))],
        {"w": normal(8, 4)},
    )
    source = write_model(tmp_path / "m.onnx", model)
    options = TuneOptions(model=str(source), input_contract="narrow")
    (tmp_path / "prepared").mkdir()
    with Lab() as lab:
        for rows in (1, 4):
            tuner = BucketTuner(options, [], Silent())
            wanted = Wanted(name=f"rows={rows}", shapes={}, dims={"rows": rows})
            found = tuner._inputs(lab, source, wanted, tmp_path / "prepared" / str(rows))
            assert [str(each) for each in found.values()] == [f"x: float16[{rows}, 8]"]


@pytest.mark.slow
def test_single_samples_are_put_together_for_a_listed_batch(tmp_path: Path) -> None:
    place = Place.at(tmp_path)
    model = onnx_model(
        [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Softmax", ["m"], ["y"], axis=-1)],
        [("x", TensorProto.FLOAT, ("batch", 8))],
        [("y", TensorProto.FLOAT, ("batch", 4))],
        {"w": normal(8, 4)},
    )
    write_model(place.work / "m.onnx", model)
    np.savez(place.work / "s.npz", x=normal(9, 1, 8))
    done = place.aivmm("tune", "m.onnx", "--dim", "batch=1,4", "--dataset", "s.npz", *ONE_RUNTIME, *SMALL, "--json")
    assert done.code == 0, done.err
    assert [each["samples"]["used"] for each in done.json["buckets"]] == [9, 2]
    assert [each["accuracy"]["data"] for each in done.json["buckets"]] == ["real", "real"]


# --- open extents or padding


def test_what_is_padded_to_hundreds_of_rows_runs_with_open_extents_instead(tmp_path: Path) -> None:
    """A row of a thousand costs hardly anything at its own size, on whatever machine; a row of two is nearer to that than to noise."""
    width, sizes = 64, (2, 1024)
    plans = {f"{rows}": make_bundle(tmp_path / f"{rows}.aivmm", token_model(rows, width=width), [Part(ONNXRUNTIME)]) for rows in sizes}
    free = make_bundle(tmp_path / "open.aivmm", token_model("rows", width=width), [Part(ONNXRUNTIME)])
    buckets = [Bucket(name=f"rows={rows}", plan=f"plans/{index}.json", extents={"rows": rows}) for index, rows in enumerate(sizes)]

    def trial(opened: OpenPlan | None) -> Path:
        padding: Any = "zero" if opened is None else "none"
        dimension = Dimension(name="rows", places=[("x", 1), ("mask", 1)], padding=padding)
        crops = [Crop(output="y", axis=1, dimension="rows")]
        fallback = None if opened is None else "plans/2.json"
        served = Served(name="tokens", buckets=buckets, dimensions=[dimension], crops=crops, fallback=fallback)
        bundles = plans if opened is None else {**plans, "open": opened.bundle}
        return make_family(tmp_path / f"{padding}.aivmm", bundles, models=[served])

    def case(bucket: Bucket, rows: int) -> Case:
        path = tmp_path / f"sample-{rows}.npz"
        save_arrays(path, {"x": normal(1, rows, width), "mask": np.ones((1, rows), np.int64)})
        return Case(bucket=bucket, extents={"rows": rows}, samples=(path,), references=())

    plan = OpenPlan(target=ONNXRUNTIME, bundle=free, cases=(case(buckets[1], 2000),), line="Other shapes run open.")
    found = OpenOrPadded(plans=[plan], buckets=buckets, between=[case(buckets[1], 3)], trial=trial).run()
    assert [each.smaller for each in found.buckets] == ["padded", "open"]  # nothing was timed below two rows
    (timed,) = found.timed
    assert (timed.bucket, timed.extents, timed.found.verdict) == ("rows=1024", {"rows": 3}, "faster") and timed.found.high < 0.9
    assert found.lines[0] == "Other shapes run open."
    ratio = f"{timed.found.ratio:.2f} (faster) at rows=3"
    said = f"Inputs smaller than rows=1024 run with open extents on {ONNXRUNTIME}: open extents take {ratio}"
    assert found.lines[1].startswith(said) and "a size that is new takes up to" in found.lines[1]


def test_what_cannot_be_timed_is_padded_and_says_so(tmp_path: Path) -> None:
    bucket = Bucket(name="rows=4", plan="plans/0.json", extents={"rows": 4})
    case = Case(bucket=bucket, extents={"rows": 3}, samples=(tmp_path / "absent.npz",), references=())
    plan = OpenPlan(target=ONNXRUNTIME, bundle=tmp_path, cases=(case,), line="Other shapes run open.")
    found = OpenOrPadded(plans=[plan], buckets=[bucket], between=[case], trial=lambda _: tmp_path / "absent.aivmm").run()
    assert (found.plan, found.buckets) == (plan, (bucket,))
    assert (
        found.lines[1].startswith("Whether open extents are faster than padding could not be timed (") and "absent.aivmm" in found.lines[1]
    )


@pytest.mark.parametrize(
    ("verdicts", "smaller"),
    [
        (["faster", "faster"], "open"),
        (["faster", "same"], "open"),
        (["same", "same"], "padded"),
        (["faster", "ambiguous"], "padded"),
        (["faster", "slower"], "padded"),
        ([], "padded"),
    ],
)
def test_open_extents_replace_padding_where_they_are_faster_and_nowhere_slower(verdicts: list[Any], smaller: str) -> None:
    def timed(bucket: str, verdict: Any) -> Timed:
        found = Comparison(ratio=1.0, low=0.9, high=1.1, pairs=8, verdict=verdict)
        return Timed(bucket=bucket, extents={"rows": 3}, found=found, first_s=0.01)

    rows = Bucket(name="rows=4", plan="plans/0.json", extents={"rows": 4})
    assert _smaller(rows, [timed("other", "slower"), *(timed("rows=4", each) for each in verdicts)]) == smaller
