"""Bundles of several plans with real runtimes: the smallest bucket that fits, padding, cropping, models by name, and damaged ones."""

from __future__ import annotations

import asyncio
import json
import shutil
import zipfile
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import aivmm
from aivmm.errors import BundleError, UsageError
from aivmm.runtime.bundle import check_destination
from aivmm.runtime.engine import Engine
from aivmm.runtime.family import Bucket, Crop, Dimension, Padding, Served, open_family
from aivmm.runtime.fitting import Fitter, padded
from aivmm.runtime.many import Engines, ShapedEngine, load_one
from aivmm.runtime.null_memory import NullTensor
from aivmm.runtime.reading import file_sha256
from aivmm.tensors import TensorSpec
from tests.making import ONNXRUNTIME, OPENVINO, Part, chain_model, make_bundle, make_family, normal, reference, token_model

ROWS = {"rows=4": 4, "rows=16": 16, "rows=64": 64}
PLACES: list[tuple[str, int]] = [("x", 1), ("mask", 1)]


def served(padding: Padding = "zero", **fields: Any) -> Served:
    return Served(
        name="tokens",
        buckets=[Bucket(name=name, plan=f"plans/{index}.json", extents={"rows": rows}) for index, (name, rows) in enumerate(ROWS.items())],
        dimensions=[Dimension(name="rows", places=PLACES, padding=padding)],
        crops=[Crop(output="y", axis=1, dimension="rows")] if padding != "none" else [],
        **fields,
    )


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A bundle for each bucket, on both runtimes."""
    folder = tmp_path_factory.mktemp("buckets")
    targets = [OPENVINO, ONNXRUNTIME, ONNXRUNTIME]
    found = zip(ROWS.values(), targets, strict=True)
    return {f"{rows}": make_bundle(folder / f"{rows}.aivmm", token_model(rows), [Part(target)], conditions=False) for rows, target in found}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, bundles: dict[str, Path]) -> Path:
    return make_family(tmp_path_factory.mktemp("family") / "tokens.aivmm", bundles, models=[served()])


@pytest.fixture
def family(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "tokens.aivmm"))


@pytest.fixture
def exact(tmp_path: Path, bundles: dict[str, Path]) -> Path:
    return make_family(tmp_path / "exact.aivmm", bundles, models=[served("none")])


def feeds(rows: int) -> dict[str, Any]:
    return {"x": normal(1, rows, 16, seed=rows), "mask": np.ones((1, rows), dtype=np.int64)}


def shaped(path: Path) -> ShapedEngine:
    engine = aivmm.load_plan(path)
    assert isinstance(engine, ShapedEngine)
    return engine


# --- one model in several shapes ---


def test_arrays_to_be_filled_have_the_shape_that_is_named_and_run_without_padding(made: Path) -> None:
    with shaped(made) as engine:
        arrays = engine.new_inputs("rows=16")
        for name, value in feeds(16).items():
            arrays[name][...] = value
        np.testing.assert_array_equal(engine.run(arrays)["y"], engine.run(feeds(16))["y"])
        assert engine.stats()["padded"] == 0
        with pytest.raises(UsageError, match=r"several shapes, and none is named; give new_inputs one of 'rows=4', 'rows=16', 'rows=64'"):
            engine.new_inputs()
        with pytest.raises(UsageError, match=r"no shape 'rows=5'; give new_inputs one of 'rows=4'"):
            engine.new_inputs("rows=5")


def test_outputs_stay_on_the_device_for_a_plans_own_shapes_and_others_are_refused(tmp_path: Path) -> None:
    bundles = {f"{rows}": make_bundle(tmp_path / f"{rows}", token_model(rows), [Part("null:GPU.0")], conditions=False) for rows in (4, 16)}
    family = served().replaced(buckets=served().buckets[:2])
    with shaped(make_family(tmp_path / "tokens.aivmm", bundles, models=[family])) as engine:
        there = {name: NullTensor(value, "null:GPU.0") for name, value in feeds(16).items()}
        for given in (feeds(16), there, {name: value.tolist() for name, value in feeds(16).items()}):
            found = engine.run_on_device(given)
            assert isinstance(found["y"], NullTensor)
            np.testing.assert_array_equal(found["y"].array, engine.run(feeds(16))["y"])
            np.testing.assert_array_equal(engine.run(given)["y"], engine.run(feeds(16))["y"])
        with pytest.raises(UsageError, match="neither pads nor crops: it takes rows=4, rows=16; use run"):
            engine.run_on_device(feeds(5))
        beyond = {name: NullTensor(value, "null:GPU.0") for name, value in feeds(5).items()}
        for run in (engine.run, engine.run_on_device):
            with pytest.raises(UsageError, match="on a device are not padded: they fit rows=4, rows=16"):
                run(beyond)
        with pytest.raises(UsageError, match="'mask' is missing"):
            engine.run_on_device({"x": feeds(4)["x"]})


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 16, 17, 63, 64])
def test_each_size_runs_in_the_smallest_bucket_and_answers_as_if_it_had_one_of_its_own(made: Path, rows: int) -> None:
    with shaped(made) as engine:
        assert engine.bucket_of(feeds(rows)) == next(name for name, size in ROWS.items() if size >= rows)
        found = engine.run(feeds(rows))
        for name, value in reference(token_model("rows"), feeds(rows)).items():
            assert found[name].shape == value.shape
            np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5)
            assert found[name].flags.c_contiguous
            assert found[name].flags.writeable


@pytest.mark.parametrize("rows", [4, 5])
def test_futures_and_coroutines_give_what_run_gives(made: Path, rows: int) -> None:
    with shaped(made) as engine:
        expected = engine.run(feeds(rows))
        for found in (engine.submit(feeds(rows)).result(timeout=60), asyncio.run(engine.arun(feeds(rows)))):
            for name, value in expected.items():
                np.testing.assert_array_equal(found[name], value)
        with engine.lend(feeds(rows)) as lent:
            for name, value in expected.items():
                np.testing.assert_array_equal(lent[name], value)
        with pytest.raises(UsageError, match="nothing here takes"):
            engine.submit(feeds(65))
        with pytest.raises(UsageError, match="nothing here takes"), engine.lend(feeds(65)):
            pass


def test_a_stream_of_all_sizes_keeps_its_order(made: Path) -> None:
    sizes = [1, 64, 4, 17, 16, 3] * 8
    with shaped(made) as engine:
        found = list(engine.stream(map(feeds, sizes)))
        assert [each["y"].shape[1] for each in found] == sizes
        for rows, outputs in zip(sizes[:6], found, strict=False):
            np.testing.assert_allclose(outputs["y"], reference(token_model("rows"), feeds(rows))["y"], rtol=1e-4, atol=1e-5)
        late = engine.stream(map(feeds, [4, 65, 4]))
        assert next(late)["y"].shape == (1, 4, 16)
        with pytest.raises(UsageError, match="nothing here takes rows=65"):
            next(late)


def test_an_answer_that_cannot_be_cropped_is_an_error_and_hangs_nobody(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(self: Fitter, outputs: Any, extents: Any) -> Any:
        raise MemoryError("no room")

    with shaped(made) as engine:
        monkeypatch.setattr(Fitter, "crop", no_room)
        with pytest.raises(MemoryError, match="no room"):
            engine.submit(feeds(3)).result(timeout=60)


def test_statistics_count_what_was_padded(made: Path) -> None:
    with shaped(made) as engine:
        for rows in (4, 3, 16, 9):
            engine.run(feeds(rows))
        stats = engine.stats()
        assert (stats["runs"], stats["padded"], stats["fallback"]) == (4, 2, 0)
        assert {name: each["runs"] for name, each in stats["buckets"].items()} == {"rows=4": 2, "rows=16": 2, "rows=64": 0}


def test_lists_of_numbers_are_taken_as_by_a_plan_of_one_shape(made: Path) -> None:
    with shaped(made) as engine:
        arrays = feeds(3)
        found = engine.run({name: array.tolist() for name, array in arrays.items()})
        np.testing.assert_allclose(found["y"], engine.run(arrays)["y"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"x": normal(1, 65, 16), "mask": np.ones((1, 65), np.int64)},
            ["nothing here takes rows=65", "rows=4, rows=16, rows=64", "smaller rows"],
        ),
        ({"mask": np.ones((1, 2), np.int64)}, ["disagree on rows", "3 in 'x'", "2 in 'mask'"]),
        ({"x": normal(1, 3, 15)}, ["'x'", "[1, 3, 15]"]),
        ({"x": normal(3, 16)}, ["'x'", "[3, 16]"]),
        ({"mask": np.ones((1, 3), np.int32)}, ["'mask'", "int32", "int64"]),
        ({"more": normal(1)}, ["unknown input 'more'"]),
        ({"x": normal(1, 0, 16), "mask": np.ones((1, 0), np.int64)}, ["rows=0"]),
    ],
    ids=["too long", "disagreeing", "another width", "another rank", "another type", "unknown", "empty"],
)
def test_what_fits_nothing_is_refused_with_what_is_known(made: Path, change: Mapping[str, Any], words: list[str]) -> None:
    with shaped(made) as engine:
        with pytest.raises(UsageError) as caught:
            engine.run({**feeds(3), **change})
        assert all(word in str(caught.value) for word in words), str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_missing_input_is_named(made: Path) -> None:
    with shaped(made) as engine, pytest.raises(UsageError, match="'mask' is missing"):
        engine.run({"x": normal(1, 4, 16)})


def test_without_padding_only_the_buckets_own_sizes_are_taken(exact: Path) -> None:
    with shaped(exact) as engine:
        assert engine.run(feeds(16))["y"].shape == (1, 16, 16)
        with pytest.raises(UsageError, match=r"rows=4, rows=16, rows=64 \(exactly\)"):
            engine.run(feeds(15))


def test_a_declared_fallback_takes_what_no_bucket_does(tmp_path: Path, bundles: dict[str, Path]) -> None:
    free = make_bundle(tmp_path / "free.aivmm", token_model("rows"), [Part(ONNXRUNTIME)], conditions=False)
    path = make_family(tmp_path / "f.aivmm", {**bundles, "any": free}, models=[served(fallback="plans/3.json")])
    with shaped(path) as engine:
        assert engine.bucket_of(feeds(65)) is None
        for rows in (65, 100, 3):
            found = engine.run(feeds(rows))
            for name, value in reference(token_model("rows"), feeds(rows)).items():
                np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5)
        assert engine.stats()["fallback"] == 2


def test_a_bucket_that_leaves_smaller_inputs_to_open_extents_takes_its_own_size_alone(tmp_path: Path, bundles: dict[str, Path]) -> None:
    """And they do not go to a larger bucket instead, which would pad them even more."""
    free = make_bundle(tmp_path / "free.aivmm", token_model("rows"), [Part(ONNXRUNTIME)], conditions=False)
    plain = served(fallback="plans/3.json")
    buckets = [each.replaced(smaller="open") if each.name == "rows=16" else each for each in plain.buckets]
    path = make_family(tmp_path / "f.aivmm", {**bundles, "any": free}, models=[plain.replaced(buckets=buckets)])
    with shaped(path) as engine:
        found = {rows: engine.bucket_of(feeds(rows)) for rows in (3, 4, 5, 15, 16, 17, 64)}
        assert found == {3: "rows=4", 4: "rows=4", 5: None, 15: None, 16: "rows=16", 17: "rows=64", 64: "rows=64"}
        for rows in found:
            outputs = engine.run(feeds(rows))
            for name, value in reference(token_model("rows"), feeds(rows)).items():
                np.testing.assert_allclose(outputs[name], value, rtol=1e-4, atol=1e-5)
        assert (engine.stats()["padded"], engine.stats()["fallback"]) == (2, 2)


def test_a_closed_engine_says_so(made: Path) -> None:
    engine = shaped(made)
    engine.close()
    engine.close()
    for rows in (4, 3):
        with pytest.raises(UsageError, match="closed"):
            engine.run(feeds(rows))


# --- several models by name ---


def test_a_workload_gives_an_engine_for_each_name(tmp_path: Path) -> None:
    models = {"a": chain_model(width=16), "b": chain_model(width=8, seed=1)}
    parts = {"a": [Part(OPENVINO, 0, 3), Part(ONNXRUNTIME, 4)], "b": [Part(ONNXRUNTIME)]}
    bundles = {name: make_bundle(tmp_path / f"{name}.aivmm", models[name], parts[name], conditions=False) for name in models}
    with aivmm.load_plan(make_family(tmp_path / "w.aivmm", bundles, kind="workload")) as engines:
        assert isinstance(engines, Engines)
        assert list(engines) == ["a", "b"]
        for name, width in (("a", 16), ("b", 8)):
            engine = engines[name]
            assert isinstance(engine, Engine)
            x = normal(2, width)
            np.testing.assert_allclose(engine.run({"x": x})["y"], reference(models[name], {"x": x})["y"], rtol=1e-4, atol=1e-5)
        assert {name: each["runs"] for name, each in engines.stats().items()} == {"a": 1, "b": 1}
        with pytest.raises(UsageError, match=r"no model 'c'.*'a', 'b'"):
            engines["c"]
        assert "c" not in engines
        assert engines.get("a") is engines["a"]


def test_one_model_of_several_is_loaded_by_name(tmp_path: Path) -> None:
    bundles = {
        name: make_bundle(tmp_path / f"{name}.aivmm", chain_model(width=width), [Part(ONNXRUNTIME)], conditions=False)
        for name, width in (("a", 16), ("b", 8))
    }
    path = make_family(tmp_path / "w.aivmm", bundles, kind="workload")
    with load_one(path, "b") as engine:
        assert engine.run({"x": normal(2, 8)})["y"].shape == (2, 8)
    with pytest.raises(UsageError, match="several models; name one of 'a', 'b'"):
        load_one(path)
    with pytest.raises(UsageError, match="no model 'c'"):
        load_one(path, "c")


# --- on disk ---


def test_weights_that_buckets_share_are_stored_once(family: Path, bundles: dict[str, Path]) -> None:
    alone = [sum(each.stat().st_size for each in path.glob("segments/*weights*")) for path in bundles.values()]
    assert alone[0] == alone[1] == alone[2] > 0
    assert sum(each.stat().st_size for each in family.glob("segments/*weights*")) == alone[0]
    assert len(list(family.glob("plans/*.json"))) == 3
    assert len(list(family.glob("segments/*.onnx"))) == 3


def test_a_zip_of_it_runs(family: Path, tmp_path: Path) -> None:
    archive = tmp_path / "tokens.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        for each in family.rglob("*"):
            zipped.write(each, each.relative_to(family).as_posix())
    with shaped(archive) as engine:
        assert engine.run(feeds(3))["y"].shape == (1, 3, 16)


def test_a_report_may_lie_beside_it_and_it_is_replaced_like_any_bundle(family: Path, made: Path, bundles: dict[str, Path]) -> None:
    (family / "report.html").write_text("<html>")
    check_destination(family)
    shaped(family).close()
    make_family(family, bundles, models=[served()])
    assert not (family / "report.html").exists()
    (family / "mine.txt").write_text("precious")
    with pytest.raises(UsageError, match="holds other things"):
        check_destination(family)


def edit(path: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file of the family and list it again with its new digest, as a careful stranger would."""
    raw = json.loads((path / name).read_text())
    change(raw)
    (path / name).write_text(json.dumps(raw))
    if name != "family.json":
        edit(path, "family.json", lambda family: family["files"].update({name: file_sha256(path / name)}))


def model_of(raw: dict[str, Any]) -> Any:
    return raw["models"][0]


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("family.json", lambda raw: raw.update(schema=2), "schema 2"),
        ("family.json", lambda raw: raw.pop("schema"), "no schema"),
        ("family.json", lambda raw: raw.update(schema=True), "schema: Expected `int`"),
        ("family.json", lambda raw: raw.update(more=1), "more"),
        ("family.json", lambda raw: raw.update(kind="other"), "kind"),
        ("family.json", lambda raw: raw.update(models=[]), "models"),
        ("family.json", lambda raw: raw["models"].append(model_of(raw)), "one model"),
        ("family.json", lambda raw: model_of(raw)["buckets"].append(model_of(raw)["buckets"][0]), "there twice"),
        ("family.json", lambda raw: model_of(raw)["buckets"][0].update(plan="plans/9.json"), "plans/9.json"),
        ("family.json", lambda raw: model_of(raw)["buckets"][0].update(plan="../plan.json"), r"plan.json"),
        ("family.json", lambda raw: model_of(raw)["buckets"][0].update(extents={}), "each dimension an extent"),
        ("family.json", lambda raw: model_of(raw)["buckets"][0].update(smaller="open"), "no plan has those"),
        ("family.json", lambda raw: model_of(raw)["buckets"][0].update(smaller="else"), "smaller"),
        ("family.json", lambda raw: model_of(raw)["buckets"][0].update(extents={"rows": 5}), "should be 5"),
        ("family.json", lambda raw: model_of(raw)["dimensions"][0].update(padding="mirror"), "padding"),
        ("family.json", lambda raw: model_of(raw)["dimensions"][0]["places"].append(["x", 7]), "no axis 7"),
        ("family.json", lambda raw: model_of(raw)["dimensions"][0]["places"].append(["z", 0]), "'z'"),
        ("family.json", lambda raw: model_of(raw)["dimensions"][0]["places"].append(["x", 1]), "there twice"),
        ("family.json", lambda raw: model_of(raw)["dimensions"][0]["places"].pop(), "axis 1 of the input 'mask'"),
        ("family.json", lambda raw: model_of(raw)["crops"][0].update(output="z"), "'z'"),
        ("family.json", lambda raw: model_of(raw)["crops"][0].update(axis=3), "no axis 3"),
        ("family.json", lambda raw: model_of(raw)["crops"][0].update(dimension="other"), "no dimension"),
        ("family.json", lambda raw: model_of(raw)["crops"][0].update(times=0), "times"),
        ("family.json", lambda raw: model_of(raw).update(fallback="plans/9.json"), "plans/9.json"),
        ("family.json", lambda raw: model_of(raw).update(promise={"latency_s": float("nan")}), "NaN"),
        ("plans/1.json", lambda raw: raw["model"]["outputs"].pop(), "other tensors than the first plan"),
        ("plans/1.json", lambda raw: raw["files"].update({"segments/weights.bin": "0" * 64}), "otherwise"),
        ("plans/1.json", lambda raw: raw["files"].update({"../secret": "0" * 64}), "otherwise"),
        ("plans/1.json", lambda raw: raw.update(batch=0), "batch"),
    ],
)  # fmt: skip
def test_a_family_that_does_not_hold_together_is_refused_in_one_line(
    family: Path, name: str, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    edit(family, name, change)
    with pytest.raises(BundleError, match=words) as caught:
        aivmm.load_plan(family)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["plans/0.json", "segments/weights.bin"])
def test_a_changed_byte_a_missing_and_an_unlisted_file_are_refused(family: Path, name: str) -> None:
    text = (family / name).read_bytes()
    (family / name).write_bytes(text[:-1] + bytes([text[-1] ^ 1]))
    with pytest.raises(BundleError, match="was changed"):
        open_family(family)
    (family / name).unlink()
    with pytest.raises(BundleError, match="lacks"):
        open_family(family)
    (family / name).write_bytes(text)
    (family / "plan.json").write_text("{}")
    with pytest.raises(BundleError, match=r"'plan.json', which its plan does not list"):
        open_family(family)


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"[" * 100_000, b'{"schema": 1}', b'{"schema": 1, "kind": NaN}', b"\xff"])
def test_what_is_no_family_is_refused_in_one_line(family: Path, text: bytes) -> None:
    (family / "family.json").write_bytes(text)
    with pytest.raises(BundleError) as caught:
        aivmm.load_plan(family)
    assert "\n" not in str(caught.value)


# --- choosing, for any buckets ---


@st.composite
def fitters(draw: st.DrawFn) -> tuple[Fitter, dict[str, int]]:
    names = draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=3, unique=True))
    dimensions = [Dimension(name=name, places=[(f"x{name}", 0)], padding=draw(st.sampled_from(["none", "zero", "edge"]))) for name in names]
    sizes = st.fixed_dictionaries({name: st.integers(1, 9) for name in names})
    found = draw(st.lists(sizes, min_size=1, max_size=6, unique_by=lambda each: tuple(each.items())))
    buckets = [Bucket(name=str(each), plan=f"{index}", extents=each) for index, each in enumerate(found)]
    specs = {f"x{name}": TensorSpec(name=f"x{name}", dtype="float32", shape=(None, 3)) for name in names}
    return Fitter(specs=specs, buckets=buckets, dimensions=dimensions), draw(sizes)


@given(fitters())
def test_the_chosen_bucket_takes_the_inputs_and_none_that_does_is_smaller(case: tuple[Fitter, dict[str, int]]) -> None:
    fitter, extents = case
    exact = {each.name for each in fitter.dimensions if each.padding == "none"}

    def takes(bucket: Bucket) -> bool:
        return all(bucket.extents[name] == size if name in exact else bucket.extents[name] >= size for name, size in extents.items())

    fitting = [each for each in fitter.buckets if takes(each)]
    if not fitting:
        with pytest.raises(UsageError, match="nothing here takes"):
            fitter.choose(extents)
        return
    chosen = fitter.choose(extents)
    assert chosen in fitting
    assert sum(chosen.extents.values()) == min(sum(each.extents.values()) for each in fitting)
    arrays = {f"x{name}": normal(size, 3) for name, size in extents.items()}
    filled = fitter.pad(arrays, chosen)
    for name, size in extents.items():
        assert filled[f"x{name}"].shape == (chosen.extents[name], 3)
        np.testing.assert_array_equal(filled[f"x{name}"][:size], arrays[f"x{name}"])


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(0, 2), st.integers(0, 5), st.sampled_from(["zero", "edge"]))
def test_padding_keeps_what_was_there_and_fills_up_behind_it(shape: list[int], axis: int, more: int, padding: Padding) -> None:
    axis %= len(shape)
    array = np.arange(1, prod(shape) + 1, dtype=np.int64).reshape(shape)
    found = padded(array, axis, shape[axis] + more, padding)
    assert found.shape == tuple(extent + more * (index == axis) for index, extent in enumerate(shape))
    kept, rest = np.split(found, [shape[axis]], axis=axis)
    np.testing.assert_array_equal(kept, array)
    last = np.take(array, [-1], axis=axis) if padding == "edge" else 0
    assert np.array_equal(rest, np.broadcast_to(last, rest.shape))


def test_flags_and_strings_are_padded_in_their_own_kind() -> None:
    assert padded(np.array([True]), 0, 2, "zero").tolist() == [True, False]
    assert padded(np.array(["a"], dtype=object), 0, 3, "zero").tolist() == ["a", "", ""]
