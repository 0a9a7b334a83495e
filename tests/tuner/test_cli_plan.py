"""`aivmm plan` and `aivmm run`, as their users run them."""

from __future__ import annotations

import json
import shutil
import stat
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

import aivmm
from aivmm.planner.certificate import certify
from aivmm.planner.evidence import Estimate
from aivmm.runtime.family import Bucket, Dimension, Served
from aivmm.runtime.packing import opened
from aivmm.runtime.plan import Alternative, Number
from aivmm.tuner.bundles import lines_of
from aivmm.tuner.expected import as_planned
from tests.making import ONNXRUNTIME, Part, chain_model, make_bundle, make_family, normal, onnx_model, token_model
from tests.tuner.harness import Place, Shell

MODEL = chain_model(width=16)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    return make_bundle(folder / "m.aivmm", MODEL, [Part(ONNXRUNTIME)], fallbacks=[[Part("openvino:GPU.7")]], verdict="It won.")


@pytest.fixture
def place(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    """A folder with a bundle `m.aivmm`, and a pair of keys `k`."""
    monkeypatch.setenv("AIVMM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    place = Shell(tmp_path / "work", capsys)
    shutil.copytree(made, place.work / "m.aivmm")
    assert place.aivmm("plan", "key", "k").code == 0
    return place


def content(folder: Path) -> dict[str, bytes]:
    return {each.relative_to(folder).as_posix(): each.read_bytes() for each in folder.rglob("*") if each.is_file()}


def test_show_says_what_runs_where(place: Shell) -> None:
    shown = place.aivmm("plan", "show", "m.aivmm")
    assert (shown.code, shown.err) == (0, "")
    for part in ("onnxruntime:CPU in fp32, default settings", "openvino:GPU.7", "x: float32[2, 16]", "It won.", "not signed"):
        assert part in shown.out
    found = place.aivmm("plan", "show", "m.aivmm", "--json").json
    assert found["plans"]["plan.json"] == json.loads((place.work / "m.aivmm" / "plan.json").read_text())
    assert found["size_bytes"] == sum(map(len, content(place.work / "m.aivmm").values()))


def test_show_says_what_it_can_be_traded_for_and_how_sure_it_is(made: Path) -> None:
    with opened(made) as bundle:
        plan = bundle.plans["plan.json"]
    numbers = {"median_s": Number(value=0.012, source="measured"), "peak_memory_bytes": Number(value=5e6, source="measured")}
    others = [
        Alternative(name=name, objective=best, stages=plan.stages, expected=numbers) for name, best in (("a", "memory,size"), ("b", ""))
    ]
    whole = Estimate(seconds=4e-3, sigma=0.0, source="measured")
    found = certify(whole, [whole], objective="latency", looked=None, among="", why_no_bound="it is one")
    lines = list(lines_of(plan.replaced(alternatives=others, certificate=as_planned(found))))
    assert ("otherwise", "a, best in memory and size: median 12 ms, peak memory 5 MB") in lines
    assert ("otherwise", "b: median 12 ms, peak memory 5 MB") in lines
    assert ("sure", found.sentence) in lines


def test_verify_grades_each_way_to_run_it_here(place: Shell) -> None:
    found = place.aivmm("plan", "verify", "m.aivmm", "--json").json
    plan, fallback = found["plans"]["plan.json"]["ways"]
    assert (plan["grade"], plan["differences"]) == ("exact", {})
    assert fallback["grade"] is None and "openvino:GPU.7 is not available here" in fallback["reason"]
    assert "the plan: exact, this machine is as the one that it was proven on" in place.aivmm("plan", "verify", "m.aivmm").out
    (place.work / "m.aivmm" / "segments" / "weights.bin").write_bytes(b"x")
    refused = place.aivmm("plan", "verify", "m.aivmm")
    assert (refused.code, refused.out) == (2, "") and "weights.bin was changed" in refused.err and len(refused.error_lines) == 1


def test_a_signed_plan_stays_signed_as_a_zip_and_as_a_folder(place: Shell) -> None:
    assert place.aivmm("plan", "verify", "m.aivmm", "--key", "k.pub.pem").code == 2
    assert place.aivmm("plan", "sign", "m.aivmm", "--key", "k.pem").code == 0
    assert place.aivmm("plan", "export", "m.aivmm", "-o", "m.zip").code == 0
    assert place.aivmm("plan", "export", "m.zip", "-o", "again.aivmm").code == 0
    for path in ("m.aivmm", "m.zip", "again.aivmm"):
        verified = place.aivmm("plan", "verify", path, "--key", "k.pub.pem")
        assert verified.code == 0 and "signed as required" in verified.out
    assert content(place.work / "again.aivmm") == content(place.work / "m.aivmm")
    place.aivmm("plan", "key", "other")
    refused = place.aivmm("plan", "verify", "m.zip", "--key", "other.pub.pem")
    assert refused.code == 2 and "not by the required key" in refused.err
    assert place.aivmm("plan", "verify", "m.zip", "--key", "other.pub.pem", "--key", "k.pub.pem").code == 0


def test_a_zip_can_be_signed(place: Shell) -> None:
    place.aivmm("plan", "export", "m.aivmm", "-o", "m.zip")
    assert place.aivmm("plan", "sign", "m.zip", "--key", "k.pem").code == 0
    with aivmm.load_plan(place.work / "m.zip", require_signature=place.work / "k.pub.pem") as engine:
        assert engine.run({"x": normal(2, 16)})["y"].shape == (2, 16)
    assert sorted(each.name for each in place.work.iterdir()) == ["k.pem", "k.pub.pem", "m.aivmm", "m.zip"]


def test_equal_bundles_make_equal_zips_that_store_weights_as_they_are(place: Shell) -> None:
    place.aivmm("plan", "export", "m.aivmm", "-o", "one.zip")
    place.aivmm("plan", "export", "one.zip", "-o", "two.zip")
    assert (place.work / "one.zip").read_bytes() == (place.work / "two.zip").read_bytes()
    with zipfile.ZipFile(place.work / "one.zip") as archive:
        assert {each.compress_type for each in archive.infolist()} == {zipfile.ZIP_STORED}


def test_newlines_and_reports_survive_the_way_through_a_zip(place: Shell) -> None:
    plan = place.work / "m.aivmm" / "plan.json"
    plan.write_bytes(plan.read_bytes().replace(b"\n", b"\r\n"))
    (place.work / "m.aivmm" / "report.html").write_bytes("<p>größer</p>\r\n".encode())
    place.aivmm("plan", "sign", "m.aivmm", "--key", "k.pem")
    place.aivmm("plan", "export", "m.aivmm", "-o", "m.zip")
    place.aivmm("plan", "export", "m.zip", "-o", "again.aivmm")
    assert content(place.work / "again.aivmm") == content(place.work / "m.aivmm")
    assert place.aivmm("plan", "verify", "again.aivmm", "--key", "k.pub.pem").code == 0


@pytest.mark.parametrize("output", ["thesis.zip", "thesis"])
def test_export_destroys_nothing(place: Shell, output: str) -> None:
    if output.endswith(".zip"):
        with zipfile.ZipFile(place.work / output, "w") as archive:
            archive.writestr("chapter.tex", "years of work")
    else:
        (place.work / output).mkdir()
        (place.work / output / "chapter.tex").write_text("years of work")
    before = content(place.work)
    refused = place.aivmm("plan", "export", "m.aivmm", "-o", output)
    assert refused.code == 2 and len(refused.error_lines) == 1
    assert content(place.work) == before


def test_the_command_runs_as_a_process_without_a_terminal(place: Shell) -> None:
    outside = Place.at(place.work.parent)
    shown = outside.aivmm("plan", "verify", "m.aivmm")
    assert (shown.code, shown.err) == (0, "") and "all as listed" in shown.out
    assert outside.aivmm("plan", "verify", "missing.aivmm").code == 2


def test_a_damaged_bundle_is_neither_exported_nor_signed(place: Shell) -> None:
    (place.work / "m.aivmm" / "extra").write_text("x")
    before = content(place.work)
    for command in (("export", "m.aivmm", "-o", "m.zip"), ("sign", "m.aivmm", "--key", "k.pem"), ("show", "m.aivmm")):
        refused = place.aivmm("plan", *command)
        assert refused.code == 2 and "'extra', which its plan does not list" in refused.err
    assert content(place.work) == before


def test_diff_names_the_places_and_its_status_says_whether_there_are_any(place: Shell) -> None:
    assert place.aivmm("plan", "diff", "m.aivmm", "m.aivmm").out == "no difference\n"
    make_bundle(place.work / "n.aivmm", MODEL, [Part(ONNXRUNTIME, settings=(("intra_op_num_threads", 1),))], verdict="It won.")
    different = place.aivmm("plan", "diff", "m.aivmm", "n.aivmm")
    assert different.code == 1
    assert "stages[0].config.intra_op_num_threads: (none) -> 1" in different.out
    assert "fallbacks[0].name: fallback 0 -> (none)" in different.out
    assert "created_at" not in different.out and "verdict" not in different.out
    for one, other in (("m.aivmm", "n.aivmm"), ("n.aivmm", "m.aivmm")):  # and not, beside a leaf, what held it and was empty before
        places = [each["place"] for each in place.aivmm("plan", "diff", one, other, "--json").json["differences"]]
        assert "stages[0].config" not in places and "fallbacks" not in places
        assert not [each for each in places if any(further.startswith((f"{each}.", f"{each}[")) for further in places)]
    found = place.aivmm("plan", "diff", "m.aivmm", "n.aivmm", "--json")
    assert found.code == 1
    assert {"place": "stages[0].config.intra_op_num_threads", "first": "(none)", "second": 1} in found.json["differences"]


def test_diff_of_two_models_is_a_page_and_json_has_it_all(place: Shell) -> None:
    names = [f"input_{index}" for index in range(40)]
    inputs = [(name, TensorProto.FLOAT, (1, 4)) for name in names]
    other = onnx_model([helper.make_node("Sum", names, ["y"])], inputs, [("y", TensorProto.FLOAT, (1, 4))])
    make_bundle(place.work / "other.aivmm", other, [Part(ONNXRUNTIME)])
    found = place.aivmm("plan", "diff", "m.aivmm", "other.aivmm", "--json").json["differences"]
    short = place.aivmm("plan", "diff", "m.aivmm", "other.aivmm")
    assert short.code == 1
    lines = short.out.splitlines()
    assert len(found) > 200 > 2 * len(lines)
    assert all(len(each) < 300 for each in lines)
    shown = {each["place"] for each in found if any(line.startswith(f"{each['place']}: ") for line in lines)}
    for section in ("model", "stages"):
        mine = [each["place"] for each in found if each["place"].startswith(section)]
        hidden = [each for each in mine if each not in shown]
        assert f"{section}: and {len(hidden)} more places (all of them with --json)" in lines
    assert f"files: {sum(each['place'].startswith('files') for each in found)} differ" in lines


@pytest.fixture
def shapes(place: Shell) -> Shell:
    """Beside `m.aivmm` two bundles of several shapes: `refuse.aivmm`, and `open.aivmm` that runs other shapes as well."""
    made = {f"{rows}": make_bundle(place.work / f"{rows}.aivmm", token_model(rows), [Part(ONNXRUNTIME)]) for rows in (4, 16)}
    free = make_bundle(place.work / "any.aivmm", token_model("rows"), [Part(ONNXRUNTIME)])
    dimension = Dimension(name="rows", places=[("x", 1), ("mask", 1)], padding="zero", why="padded with zeros: checked at 2")
    buckets = [Bucket(name=f"rows={rows}", plan=f"plans/{index}.json", extents={"rows": rows}) for index, rows in enumerate((4, 16))]
    served = Served(name="tokens", buckets=buckets, dimensions=[dimension])
    make_family(place.work / "refuse.aivmm", made, models=[served])
    open_buckets = [buckets[0], buckets[1].replaced(smaller="open")]
    opened = served.replaced(buckets=open_buckets, fallback="plans/2.json")
    make_family(place.work / "open.aivmm", {**made, "any": free}, models=[opened])
    return place


def test_show_and_verify_say_for_which_shape_each_plan_is(shapes: Shell) -> None:
    shown = shapes.aivmm("plan", "show", "open.aivmm").out
    for line in (
        "shapes     tokens: rows=4, rows=16",
        "smaller    rows padded with zeros: checked at 2",
        "smaller    below rows=16 with open extents",
        "others     run with open extents (plans/2.json)",
        "plan       tokens at rows=16 (plans/1.json)",
        "plan       tokens at other shapes (plans/2.json)",
    ):
        assert f"{line}\n" in shown
    assert "others     are refused\n" in shapes.aivmm("plan", "show", "refuse.aivmm").out
    verified = shapes.aivmm("plan", "verify", "refuse.aivmm").out
    assert [line.split(": ")[0] for line in verified.splitlines()[1:]] == [
        "here       tokens at rows=4, the plan", "here       tokens at rows=16, the plan"
    ]  # fmt: skip


def test_diff_of_bundles_of_several_shapes_tells_a_plan_more_in_one_line(shapes: Shell) -> None:
    lines = shapes.aivmm("plan", "diff", "refuse.aivmm", "open.aivmm").out.splitlines()
    assert "plans.plans/2.json: only in the second" in lines
    assert "family.models[0].fallback: null -> plans/2.json" in lines
    assert "family.models[0].buckets[1].smaller: padded -> open" in lines
    assert any(line.startswith("family.files: ") for line in lines) and len(lines) == 4
    assert "plans.plans/2.json: only in the first" in shapes.aivmm("plan", "diff", "open.aivmm", "refuse.aivmm").out.splitlines()


def test_run_says_which_shape_ran_and_takes_one_by_name(shapes: Shell) -> None:
    """Without inputs it took the smallest in silence, and failed where smaller sizes than the listed ones are refused."""
    unasked = shapes.aivmm("run", "refuse.aivmm")
    assert unasked.code == 0 and unasked.out.startswith("made at rows=4 on onnxruntime:CPU ")
    assert unasked.err == "note: inputs are random, in the first of the shapes rows=4, rows=16; --bucket names another\n"
    named = shapes.aivmm("run", "refuse.aivmm", "--bucket", "rows=16", "--json")
    assert (named.json["bucket"], named.json["outputs"][0]["shape"], named.err) == ("rows=16", [1, 16, 16], "")
    for rows, where in ((3, "rows=4"), (16, "rows=16"), (12, "other shapes"), (17, "other shapes")):
        np.savez(shapes.work / "in.npz", x=normal(1, rows, 16), mask=np.ones((1, rows), np.int64))
        given = shapes.aivmm("run", "open.aivmm", "--inputs", "in.npz")
        assert given.out.startswith(f"made at {where} on ") and not given.err
    for plan, words in (("refuse.aivmm", "the plan has 'rows=4', 'rows=16'"), ("m.aivmm", "the plan has one only; leave --bucket out")):
        refused = shapes.aivmm("run", plan, "--bucket", "rows=5")
        assert refused.code == 2 and words in refused.err
    timed = shapes.aivmm("bench", "refuse.aivmm", "--bucket", "rows=16", "--duration", "100ms")
    assert timed.out.startswith("made at rows=16 on ")


def test_diff_of_one_plan_and_several_takes_the_one_for_the_same_shape(shapes: Shell) -> None:
    """It printed every field of each: two bundles of which one has the other's very plan looked like two models."""
    several = "2 plans: tokens at rows=4, tokens at rows=16"
    same = shapes.aivmm("plan", "diff", "16.aivmm", "refuse.aivmm")
    assert (same.code, same.out) == (1, f"plans: one plan: tokens at rows=16 -> {several}\n")
    reverse = shapes.aivmm("plan", "diff", "refuse.aivmm", "16.aivmm", "--json").json["differences"]
    assert reverse == [{"place": "plans", "first": several, "second": "one plan: tokens at rows=16"}]
    make_bundle(shapes.work / "slow.aivmm", token_model(16), [Part(ONNXRUNTIME, settings=(("intra_op_num_threads", 1),))])
    changed = shapes.aivmm("plan", "diff", "refuse.aivmm", "slow.aivmm").out.splitlines()
    assert changed[0].startswith("plans: ") and "stages[0].config.intra_op_num_threads: (none) -> 1" in changed and len(changed) == 2
    none = shapes.aivmm("plan", "diff", "any.aivmm", "refuse.aivmm")
    assert none.out == f"plans: one plan: x: float32[1, ?, 16], mask: int64[1, ?] -> {several}\n"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other permissions")
def test_a_private_key_is_private_and_never_overwritten(place: Shell) -> None:
    assert stat.S_IMODE((place.work / "k.pem").stat().st_mode) == 0o600
    before = content(place.work)
    refused = place.aivmm("plan", "key", "k")
    assert refused.code == 2 and "File exists" in refused.err
    assert content(place.work) == before


def test_names_from_a_plan_do_not_steer_a_terminal(place: Shell) -> None:
    plan = place.work / "m.aivmm" / "plan.json"
    plan.write_text(plan.read_text().replace("It won.", "\\u001b[31mred [bold]"))
    shown = place.aivmm("plan", "show", "m.aivmm")
    assert "\x1b" not in shown.out and "[31mred [bold]" in shown.out


def test_run_takes_and_gives_npz_and_checks_a_signature(place: Shell) -> None:
    x = normal(2, 16)
    np.savez(place.work / "in.npz", x=x)
    done = place.aivmm("run", "m.aivmm", "--inputs", "in.npz", "-o", "out.npz", "--json")
    with aivmm.load_plan(place.work / "m.aivmm") as engine, np.load(place.work / "out.npz") as written:
        np.testing.assert_array_equal(written["y"], engine.run({"x": x})["y"])
    assert done.json["written"] == "out.npz"
    refused = place.aivmm("run", "m.aivmm", "--key", "k.pub.pem")
    assert refused.code == 2 and "is not signed" in refused.err
    place.aivmm("plan", "sign", "m.aivmm", "--key", "k.pem")
    assert place.aivmm("run", "m.aivmm", "--key", "k.pub.pem").code == 0
