"""`plan.json`: strict, and refused with one line that names the place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aivmm.errors import AivmmError, BundleError
from aivmm.runtime.config import Config
from aivmm.runtime.plan import SCHEMA, Batching, Execution, Plan, Tensor, parse_plan, tensors
from aivmm.runtime.plan import settings as stage_settings
from aivmm.tensors import TensorSpec

X, Y, Z = ({"name": name, "dtype": "float32", "shape": [1, None]} for name in "xyz")
DIGEST = "a" * 64


COPY = {"model": "segments/a.onnx", "target": "onnxruntime:CPU", "precision": "fp32"}


def raw(**changes: Any) -> dict[str, Any]:
    stage = {"model": "segments/a.onnx", "target": "openvino:CPU", "precision": "fp32", "config": {"NUM_STREAMS": 2}, "blocks": [0, 3]}
    return {
        "schema": SCHEMA,
        "created_by": "aivmm 0.1.0",
        "created_at": "2026-01-01T00:00:00+00:00",
        "model": {"name": "m", "sha256": DIGEST, "content": "c", "category": "CNN", "inputs": [X], "outputs": [Z]},
        "objective": "latency",
        "batch": 1,
        "stages": [{**stage, "inputs": [X], "outputs": [Y]}, {**stage, "target": "onnxruntime:CPU", "inputs": [Y], "outputs": [Z]}],
        "expected": {"latency_s": {"value": 0.1, "low": 0.09, "high": 0.11, "source": "measured", "samples": 3}},
        "files": {"segments/a.onnx": DIGEST},
        **changes,
    }


def test_a_plan_survives_the_round_trip_through_its_text() -> None:
    plan = parse_plan(json.dumps(raw()), "plan.json")
    assert parse_plan(plan.to_json(), "plan.json") == plan
    assert json.loads(plan.to_json())["schema"] == SCHEMA
    assert plan.targets() == ("openvino:CPU", "onnxruntime:CPU")


@pytest.mark.parametrize(("layers", "fits"), [(2, True), (3, False)])
def test_an_alternative_at_another_batch_may_have_it_at_any_extent_that_was_the_batch(layers: int, fits: bool) -> None:
    """The state of a recurrent model is [layers, batch, width]."""

    def state(*shape: int | None) -> dict[str, Any]:
        return {"name": "state", "dtype": "float32", "shape": list(shape)}

    plan = raw()
    plan["model"]["inputs"] = [X, state(None, 1, layers)]
    plan["stages"][0]["inputs"] = [X, state(None, 1, layers)]
    mine = [{**each, "inputs": [{**X, "shape": [8, None]}, state(2, 8, 2)]} for each in plan["stages"][:1]]
    mine[0]["outputs"] = [{**Y, "shape": [8, None]}]
    rest = {**plan["stages"][1], "inputs": [{**Y, "shape": [8, None]}], "outputs": [{**Z, "shape": [8, None]}]}
    plan["alternatives"] = [{"name": "eight", "objective": "throughput", "batch": 8, "stages": [*mine, rest]}]
    if fits:
        chosen = parse_plan(json.dumps(plan), "plan.json").for_goal("throughput")
        assert [each.shape for each in chosen.model.inputs] == [[8, None], [2, 8, 2]]
    else:
        with pytest.raises(BundleError, match="elsewhere in the plan"):
            parse_plan(json.dumps(plan), "plan.json")


def test_a_stage_tells_what_to_compile_it_with() -> None:
    first = parse_plan(json.dumps(raw()), "plan.json").stages[0]
    assert first.compiled_with == Config.of({"NUM_STREAMS": 2}, precision="fp32")
    assert first.replaced(precision="default").compiled_with.precision is None
    assert stage_settings(first.compiled_with) == {"NUM_STREAMS": 2}


def test_settings_keep_their_types() -> None:
    values = {"a": True, "b": 1, "c": 1.5, "d": "1", "e": 0, "f": False}
    plan = raw()
    plan["stages"][0]["config"] = values
    config = parse_plan(json.dumps(plan), "plan.json").stages[0].config
    assert config == values
    assert [type(config[name]) for name in "abcdef"] == [bool, int, float, str, int, bool]


def test_tensors_become_specs_again() -> None:
    specs = (TensorSpec(name="größe", dtype="int64", shape=(1, None, 0)), TensorSpec(name="", dtype="string", shape=()))
    assert tuple(each.spec for each in tensors(specs)) == specs


def test_a_plan_cannot_be_changed() -> None:
    plan = parse_plan(json.dumps(raw()), "plan.json")
    with pytest.raises(AttributeError, match="immutable"):
        plan.batch = 2


def test_how_stages_are_run_is_part_of_a_plan_and_old_plans_run_one_after_the_other() -> None:
    old = parse_plan(json.dumps(raw()), "plan.json")
    assert old.execution == Execution(mode="sequential", depth=3, batching=None) and [each.replicas for each in old.stages] == [1, 1]
    plan = raw(execution={"mode": "pipelined", "depth": 3, "batching": {"max_batch": 8, "max_wait_s": 0.002}})
    plan["stages"][0]["replicas"] = 2
    new = parse_plan(json.dumps(plan), "plan.json")
    assert new.execution == Execution(mode="pipelined", depth=3, batching=Batching(max_batch=8, max_wait_s=0.002))
    assert [each.replicas for each in new.stages] == [2, 1]
    assert parse_plan(new.to_json(), "plan.json") == new


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda p: p["stages"][0].update(replicas=0), "stages.0.replicas"),
        (lambda p: p["stages"][0].update(replicas=65), "stages.0.replicas"),
        (lambda p: p["stages"][1].update(replicas=32, copies=[COPY | {"replicas": 33}]), "stages.1: 65 replicas"),
        (lambda p: p["stages"][0].update(copies=[COPY] * 64), "stages.0: 65 replicas"),
        (lambda p: p.update(execution={"mode": "parallel"}), "execution.mode"),
        (lambda p: p.update(execution={"depth": 0}), "execution.depth"),
        (lambda p: p.update(execution={"batching": {"max_batch": 0}}), "execution.batching.max_batch"),
        (lambda p: p.update(execution={"batching": {"max_batch": 2, "max_wait_s": -1.0}}), "execution.batching.max_wait_s"),
        (lambda p: p.update(execution={"batching": {}}), "execution.batching.max_batch"),
        (lambda p: p.update(batch="1"), "batch"),
        (lambda p: p.update(batch=True), "batch"),
        (lambda p: p.update(batch=0), "batch"),
        (lambda p: p.update(batch=1.5), "batch"),
        (lambda p: p.update(callers=10**9), "callers"),
        (lambda p: p.update(surprise=1), "surprise"),
        (lambda p: p["stages"][0].update(script="rm"), "stages.0.script"),
        (lambda p: p.update(stages=[]), "stages"),
        (lambda p: p.update(stages={}), "stages"),
        (lambda p: p["stages"][0].update(blocks=[0]), "stages.0.blocks"),
        (lambda p: p["stages"][0]["config"].update(X=None), r"stages\.0\.config\.\*"),
        (lambda p: p["stages"][0]["config"].update(X=[1]), r"stages\.0\.config\.\*"),
        (lambda p: p["model"]["inputs"][0].update(shape=[-1]), "model.inputs.0.shape.0"),
        (lambda p: p["model"]["inputs"][0].update(shape=[2**62]), "model.inputs.0.shape.0"),
        (lambda p: p["model"].update(sha256="A" * 64), "model.sha256"),
        (lambda p: p["files"].update({"segments/a.onnx": DIGEST + "\n"}), "files"),
        (lambda p: p.pop("model"), "model"),
        (lambda p: p["expected"]["latency_s"].update(source="guessed"), r"expected\.\*\.source"),
        (lambda p: p.update(schema=0), "schema"),
        (lambda p: p.update(schema="1"), "schema"),
        (lambda p: p.update(schema=True), "schema"),
    ],
)
def test_what_a_plan_may_not_hold_is_refused_at_its_place(change: Callable[[dict[str, Any]], object], place: str) -> None:
    plan = json.loads(json.dumps(raw()))
    change(plan)
    with pytest.raises(BundleError, match=rf"^here: {place}"):
        parse_plan(json.dumps(plan), "here")


def ways(**changes: Any) -> list[dict[str, Any]]:
    """Return plans of which a way to run the model is changed: the plan's own, an alternative, a fallback."""
    other = {"name": "other", "stages": raw()["stages"], **changes}
    return [raw(**changes), raw(alternatives=[other]), raw(fallbacks=[other])]


@pytest.mark.parametrize("name", ["median_s", "p99_s"])
@pytest.mark.parametrize(
    "number", [{"value": 0.0}, {"value": -1.0}, {"value": 1e-320}, {"value": 1.0, "high": -1.0}, {"value": 1.0, "high": 0.0}]
)
def test_a_call_that_takes_no_time_is_refused_in_every_way_through_the_plan(name: str, number: dict[str, float]) -> None:
    """A drift monitor takes the logarithm of it, inside of a request."""
    for plan in ways(expected={name: {**number, "source": "measured"}}):
        with pytest.raises(BundleError, match=rf"^here: (\S+: )?expected: {name} says that a call takes no time, or less; "):
            parse_plan(json.dumps(plan), "here")
    for plan in ways(expected={name: {"value": 1e-9, "low": 0.0, "source": "measured"}, "stray_s": {"value": 0.0, "source": "measured"}}):
        parse_plan(json.dumps(plan), "here")


def test_as_many_executables_as_a_stage_may_have_and_no_more_requests_in_flight_than_a_plan_may_ask_for() -> None:
    plan = raw()
    plan["stages"][1].update(replicas=32, copies=[COPY | {"replicas": 32}])
    assert len(parse_plan(json.dumps(plan), "here").stages[1].kinds()) == 64
    for depth in (8, 9):
        for each in ways(execution={"mode": "pipelined", "depth": depth}, stages=plan["stages"]):
            if depth == 8:
                parse_plan(json.dumps(each), "here")
                continue
            with pytest.raises(
                BundleError, match="2 stages with 9 requests for each, in up to 64 replicas, are 1152 requests in flight, and 1024"
            ):
                parse_plan(json.dumps(each), "here")


def rewired(**stage_edges: tuple[int, str, list[dict[str, Any]]]) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads(json.dumps(raw()))
    for stage, edge, value in stage_edges.values():
        plan["stages"][stage][edge] = value
    return plan


def test_a_stage_that_needs_a_tensor_nobody_makes_is_refused() -> None:
    with pytest.raises(BundleError, match="onnxruntime:CPU needs 'y', which nothing before it makes"):
        parse_plan(json.dumps(rewired(a=(0, "outputs", [X | {"name": "w"}]))), "here")


def test_a_stage_that_needs_its_own_output_is_refused() -> None:
    with pytest.raises(BundleError, match="needs 'z'"):
        parse_plan(json.dumps(rewired(a=(1, "inputs", [Z]))), "here")


def test_an_output_of_the_model_that_no_stage_makes_is_refused() -> None:
    with pytest.raises(BundleError, match="no stage makes the output 'z'"):
        parse_plan(json.dumps(rewired(a=(1, "outputs", []))), "here")


def test_two_stages_that_make_one_tensor_are_refused() -> None:
    with pytest.raises(BundleError, match="two stages make 'y'"):
        parse_plan(json.dumps(rewired(a=(1, "outputs", [Y, Z]))), "here")


def test_fallbacks_and_alternatives_are_held_to_the_same() -> None:
    for kind in ("fallbacks", "alternatives"):
        plan = raw(**{kind: [{"name": "other", "stages": [raw()["stages"][1]]}]})
        with pytest.raises(BundleError, match="needs 'y'"):
            parse_plan(json.dumps(plan), "here")


def test_a_stage_whose_file_is_not_listed_is_refused() -> None:
    with pytest.raises(BundleError, match="not listed in files"):
        parse_plan(json.dumps(raw(files={})), "here")


def test_a_plan_without_a_schema_is_refused() -> None:
    plan = raw()
    del plan["schema"]
    with pytest.raises(BundleError, match="names no schema"):
        parse_plan(json.dumps(plan), "here")


def test_a_newer_schema_is_refused_with_the_way_out() -> None:
    with pytest.raises(BundleError, match=r"has schema 2; this aivmm knows up to 1; upgrade aivmm"):
        parse_plan(json.dumps({"schema": SCHEMA + 1, "other": "shape"}), "here")


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_numbers_that_are_none_are_refused(text: str) -> None:
    data = json.dumps(raw()).replace("0.1,", f"{text},", 1)
    with pytest.raises(BundleError):
        parse_plan(data, "here")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "1",
        "{",
        "{'schema': 1}",
        b"\xff\xfe",
        "9" * 5000,
        '{"schema": 1',
        '"\\ud800"',
        '{"schema": ' + "9" * 5000 + "}",
        "\ufeff{}",
    ],
    ids=lambda text: repr(text)[:20],
)
def test_what_is_not_a_plan_is_refused_in_one_line(text: str | bytes) -> None:
    with pytest.raises(BundleError) as caught:
        parse_plan(text, "here")
    assert str(caught.value).startswith("here") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("once", "twice", "key"),
    [
        ('"batch": 1', '"batch": 1, "batch": 1', "batch"),
        ('"batch": 1', '"batch": 1, "\\u0062atch": 2', "batch"),
        ('"NUM_STREAMS": 2', '"NUM_STREAMS": 2, "NUM_STREAMS": 1', "NUM_STREAMS"),
        ('"segments/a.onnx": "aaa', '"segments/a.onnx": "' + "b" * 64 + '", "segments/a.onnx": "aaa', "'segments/a.onnx'"),
        ('"schema": 1', '"schema": 1, "schema": 1', "schema"),
    ],
    ids=["same", "spelled otherwise", "setting", "file", "schema"],
)
def test_a_key_that_is_there_twice_is_refused(once: str, twice: str, key: str) -> None:
    """Who checks a plan with another reader of JSON, which keeps the first, would have checked another plan."""
    text = json.dumps(raw())
    assert once in text
    parse_plan(text, "here")
    with pytest.raises(BundleError, match=f"^here is not valid JSON \\(the key {key} is there twice in one object\\)") as caught:
        parse_plan(text.replace(once, twice, 1), "here")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("depth", [50, 200, 300, 500, 900, 960, 980, 990, 995, 1000, 5000, 100_000])
@pytest.mark.parametrize("brackets", ["[]", "{}"])
def test_deep_nesting_is_refused(depth: int, brackets: str) -> None:
    opening = '{"a":' if brackets == "{}" else "["
    nest = opening * depth + "1" + brackets[1] * depth
    for text in (nest, json.dumps(raw()).replace('"batch": 1', f'"batch": {nest}')):
        with pytest.raises(BundleError):
            parse_plan(text, "here")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_plan_with_anything_put_anywhere_is_read_or_refused(data: st.DataObject) -> None:
    plan: Any = json.loads(json.dumps(raw(fallbacks=[{"name": "f", "stages": raw()["stages"]}])))
    spot = plan
    while True:
        key = data.draw(st.sampled_from(sorted(spot) if isinstance(spot, dict) else range(len(spot))))
        inner = spot[key]
        if not isinstance(inner, dict | list) or not inner or data.draw(st.booleans()):
            break
        spot = inner
    spot[key] = data.draw(JSON)
    try:
        assert isinstance(parse_plan(json.dumps(plan), "here"), Plan)
    except AivmmError as error:
        assert "\n" not in str(error)


def test_the_fields_of_a_tensor_are_those_of_the_spec() -> None:
    assert set(Tensor.__struct_fields__) == {"name", "dtype", "shape"}


def test_the_text_is_ascii_with_unix_line_ends(tmp_path: Path) -> None:
    plan = parse_plan(json.dumps(raw(verdict="2.7 ms ± 3 % \ud83d\ude00")), "here")
    assert plan.to_json().isascii() and plan.to_json().endswith("}\n")
