"""Inputs in fewer bits: what is taken, what is said of it, and what comes out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from aivmm.errors import UsageError
from aivmm.models.prepare import prepare
from aivmm.tuner.options import TuneOptions
from tests.making import chain_model, onnx_model, write_model


def test_wide_floats_are_taken_as_float16_and_cast_inside(tmp_path: Path) -> None:
    model = chain_model(rows=2, width=16)
    source = write_model(tmp_path / "m.onnx", model)
    facts = prepare(source, tmp_path / "narrow.onnx", narrow=True)
    assert [str(each) for each in facts.inputs] == ["x: float16[2, 16]"] and [each.dtype for each in facts.outputs] == ["float32"]
    assert any("input x taken as float16 (--input-contract narrow)" in each for each in facts.notes)
    onnx.checker.check_model(onnx.load(tmp_path / "narrow.onnx"), full_check=True)
    array = np.random.default_rng(0).standard_normal((2, 16)).astype(np.float16)
    narrow = onnxruntime.InferenceSession(tmp_path / "narrow.onnx").run(None, {"x": array})[0]
    wide = onnxruntime.InferenceSession(source).run(None, {"x": array.astype(np.float32)})[0]
    np.testing.assert_array_equal(narrow, wide)


def test_integers_and_what_is_handed_through_stay_as_they_are(tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", ["i", "i"], ["y"])]
    model = onnx_model(nodes, [("i", TensorProto.INT64, (2,)), ("unread", TensorProto.FLOAT, (2,))], [("y", TensorProto.INT64, (2,))])
    facts = prepare(write_model(tmp_path / "m.onnx", model), tmp_path / "narrow.onnx", narrow=True)
    assert [each.dtype for each in facts.inputs] == ["int64", "float32"]
    assert any("changes nothing" in each for each in facts.notes)


def test_nothing_is_narrowed_unasked(tmp_path: Path) -> None:
    facts = prepare(write_model(tmp_path / "m.onnx", chain_model()), tmp_path / "plain.onnx")
    assert facts.inputs[0].dtype == "float32" and not any("narrow" in each for each in facts.notes)
    with pytest.raises(UsageError, match="unknown --input-contract 'uint8'"):
        TuneOptions(model="m.onnx", input_contract="uint8")
