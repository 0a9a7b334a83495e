"""The variants that were made of a model: one row each, wherever and however often it is made, with the accuracy on every target."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from aivmm.db.database import Database
from aivmm.db.merge import merge
from aivmm.models.records import Lowering

INT8 = Lowering(
    content="c0" * 32,
    precision="int8",
    recipe="nncf-mixed",
    recipe_digest="0123456789abcdef",
    options={"preset": "mixed", "bits": 8, "reduce": True},
    calibration="5a" * 8,
    data="real",
    lowered_content="ab" * 32,
    weight_bytes=1_250_000,
    duration_s=12.5,
    accuracy={"openvino:CPU": {"cosine": 0.9995, "relative_l2": 0.01}},
)
REFUSED = dataclasses.replace(
    INT8, precision="int4", recipe="ort-weights-int4", lowered_content=None, weight_bytes=None, reason="nothing to lower", accuracy={}
)


def test_variants_come_back_as_they_were_made_those_that_could_not_be_too(database: Database) -> None:
    for each in (INT8, REFUSED, dataclasses.replace(INT8, content="other")):
        database.remember_lowering(each)
    assert database.lowerings(INT8.content) == [INT8, REFUSED]
    assert len(database.lowerings()) == 3
    assert database.check() == []


def test_one_variant_has_one_row_that_gathers_the_accuracy_on_each_target(database: Database) -> None:
    here = {"onnxruntime:CPU": {"cosine": 0.9}}
    first = database.remember_lowering(INT8)
    assert database.remember_lowering(dataclasses.replace(INT8, accuracy=here)) == first
    assert database.lowerings() == [dataclasses.replace(INT8, accuracy={**INT8.accuracy, **here})]
    better = {"onnxruntime:CPU": {"cosine": 0.99}}
    database.remember_lowering(dataclasses.replace(INT8, accuracy=better))
    assert database.lowerings()[0].accuracy == {**INT8.accuracy, **better}


@pytest.mark.parametrize("what", ["content", "precision", "recipe_digest", "calibration"])
def test_what_makes_another_variant_makes_another_row(database: Database, what: str) -> None:
    database.remember_lowering(INT8)
    database.remember_lowering(dataclasses.replace(INT8, **{what: "another"}))
    assert len(database.lowerings()) == 2


def test_an_accuracy_that_is_no_number_is_refused(database: Database) -> None:
    with pytest.raises(ValueError, match="cosine"):
        database.remember_lowering(dataclasses.replace(INT8, accuracy={"openvino:CPU": {"cosine": math.nan}}))
    assert database.lowerings() == []


def test_the_same_variant_of_two_machines_is_one_after_a_merge(database: Database, tmp_path: Path) -> None:
    database.remember_lowering(INT8)
    with Database.open(tmp_path / "theirs.db") as theirs:
        theirs.remember_lowering(INT8)
        theirs.remember_lowering(REFUSED)
    assert merge(database, tmp_path / "theirs.db")["lowering"] == 1
    assert database.lowerings() == [INT8, REFUSED]
