"""The published JSON Schemas are those of the code, and refuse and accept with it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aivmm.errors import BundleError
from aivmm.runtime.plan import SCHEMA, parse_plan
from aivmm.runtime.plan_schema import SCHEMAS, json_schema, text_of
from aivmm.runtime.signing import parse_signatures
from tests.runtime.test_plan import raw

DOCS = Path(__file__).parent.parent.parent / "docs"
VALIDATOR = jsonschema.Draft202012Validator(json_schema("plan.schema.json"))


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_published_schema_is_the_one_of_the_code(name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == text_of(name), "run: python -m aivmm.runtime.plan_schema docs"


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_schema_is_a_valid_schema(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema(name))


def test_a_plan_that_the_code_writes_is_valid() -> None:
    text = parse_plan(json.dumps(raw()), "plan.json").to_json()
    VALIDATOR.validate(json.loads(text))


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan.update(schema=SCHEMA + 1),
        lambda plan: plan.update(batch="1"),
        lambda plan: plan.update(surprise=1),
        lambda plan: plan.update(stages=[]),
        lambda plan: plan["stages"][0].update(blocks=[0]),
        lambda plan: plan["stages"][0]["config"].update(X=None),
        lambda plan: plan["model"].update(sha256="A" * 64),
        lambda plan: plan.pop("model"),
        lambda plan: plan["expected"]["latency_s"].update(source="guessed"),
    ],
)
def test_what_the_schema_can_say_it_refuses_as_the_code_does(change: Callable[[dict[str, Any]], object]) -> None:
    plan = json.loads(json.dumps(raw()))
    change(plan)
    assert not VALIDATOR.is_valid(plan)
    with pytest.raises(BundleError):
        parse_plan(json.dumps(plan), "here")


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the way to each value in a JSON document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(each for key, inner in items for each in places(inner, (*at, key)))]


VALUES = st.sampled_from([None, True, 0, -1, 1, 2**63, 1.5, "", "x", "segments/a.onnx", [], {}, [0, 3], ["a"], {"x": 1}])


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_whatever_the_code_accepts_is_valid(data: st.DataObject) -> None:
    plan = json.loads(json.dumps(raw()))
    for _ in range(data.draw(st.integers(1, 2))):
        *way, last = data.draw(st.sampled_from([each for each in places(plan) if each]))
        holder = plan
        for key in way:
            holder = holder[key]
        holder[last] = copy.deepcopy(data.draw(VALUES))  # later draws may change what is inside
    try:
        parse_plan(json.dumps(plan), "here")
    except BundleError:
        return
    VALIDATOR.validate(plan)


def test_a_signature_file_that_the_code_accepts_is_valid() -> None:
    entry = {"algorithm": "ed25519", "key": "a" * 64, "signature": "b" * 128}
    validator = jsonschema.Draft202012Validator(json_schema("signature.schema.json"))
    validator.validate(json.loads(parse_signatures(json.dumps({"schema": 1, "signatures": [entry]}).encode(), "here").to_json()))
    for wrong in ({"schema": 2, "signatures": [entry]}, {"schema": 1, "signatures": []}, {"schema": 1, "signatures": [entry | {"x": 1}]}):
        assert not validator.is_valid(wrong)
        with pytest.raises(BundleError):
            parse_signatures(json.dumps(wrong).encode(), "here")
