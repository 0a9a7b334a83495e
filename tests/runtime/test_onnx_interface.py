"""What a file declares, without `onnx`: the same that `onnx` says, and a plain error for any other bytes."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from aivmm.errors import ModelError
from aivmm.models.demo import write_demo
from aivmm.runtime.onnx_interface import ELEMENT_TYPES, read_interface
from aivmm.tensors import TensorSpec
from tests.making import chain_model, interface_of, onnx_model, write_model

SHARED = Path(__file__).parents[3] / "shared" / "models"
FILES = sorted(SHARED.glob("*.onnx"))
SMALL = chain_model(width=8, layers=2).SerializeToString()


def same(path: Path) -> None:
    inputs, outputs = interface_of(onnx.load(path, load_external_data=False))
    found = read_interface(path)
    assert found.inputs == inputs
    assert found.outputs == outputs
    assert read_interface(path.read_bytes()) == found


@pytest.mark.parametrize("name", ["squeezenet", "encoder", "lstm", "recommender"])
def test_the_demo_models_are_read_as_onnx_reads_them(name: str, tmp_path: Path) -> None:
    same(write_demo(name, tmp_path))


@pytest.mark.skipif(not FILES, reason=f"no models in {SHARED}")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_real_models_are_read_as_onnx_reads_them(path: Path) -> None:
    same(path)


def test_every_element_type_of_the_installed_onnx_has_a_name() -> None:
    kinds = {number for name, number in TensorProto.DataType.items() if name != "UNDEFINED"}
    assert kinds <= ELEMENT_TYPES.keys()
    for kind in kinds - {TensorProto.STRING}:
        assert ELEMENT_TYPES[kind] == helper.tensor_dtype_to_np_dtype(kind).name


def test_symbolic_missing_and_negative_extents_are_unknown_and_zero_is_zero() -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, None, 0, -1])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [value], [value])
    found = read_interface(helper.make_model(graph).SerializeToString())
    assert found.inputs == (TensorSpec(name="x", dtype="float32", shape=(None, 3, None, 0, None)),)


def test_scalars_sequences_and_unicode_names() -> None:
    scalar = helper.make_tensor_value_info("größe/\0x", TensorProto.INT64, [])
    sequence = helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, [2])
    graph = helper.make_graph([], "g", [scalar, sequence], [scalar])
    found = read_interface(helper.make_model(graph).SerializeToString())
    assert found.inputs == (
        TensorSpec(name="größe/\0x", dtype="int64", shape=()),
        TensorSpec(name="s", dtype="unknown", shape=()),
    )


def test_weights_that_old_files_list_as_inputs_are_left_out() -> None:
    model = onnx_model(
        [helper.make_node("Add", ["x", "w"], ["y"])], [("x", 1, (2,)), ("w", 1, (2,))], [("y", 1, (2,))], {"w": np.ones(2, "f")}
    )
    values = numpy_helper.from_array(np.ones(1, dtype=np.float32), "sparse")
    indices = numpy_helper.from_array(np.zeros(1, dtype=np.int64))
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4]))
    model.graph.input.append(helper.make_tensor_value_info("sparse", TensorProto.FLOAT, [4]))
    assert [each.name for each in read_interface(model.SerializeToString()).inputs] == ["x"]


def test_reading_it_imports_neither_onnx_nor_a_runtime(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.onnx", chain_model())
    code = (
        "import sys, pathlib\nfrom aivmm.runtime.onnx_interface import read_interface\n"
        f"read_interface(pathlib.Path({str(path)!r}))\nprint(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"onnx", "openvino", "onnxruntime", "google.protobuf"}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"<html>not a model</html>",
        b"\x80\x04\x95",
        b"PK\x03\x04",
        b"\xff" * 64,
        b"\x3a\xff\xff\xff\xff\x0f",
        b"\x0b" * 9,
        b"\x09",
        b"\x3a\x01\x2d",
    ],
    ids=repr,
)
def test_bytes_that_are_no_model_are_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    with pytest.raises(ModelError, match="not a readable ONNX file"):
        read_interface(data)
    with pytest.raises(ModelError, match=r"m\.onnx"):
        read_interface(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(share: float, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(SMALL[: int(len(SMALL) * share)])
    with pytest.raises(ModelError):
        read_interface(path)


@pytest.mark.parametrize("name", ["missing.onnx", "."])
def test_a_missing_file_and_a_folder_are_refused_with_their_path(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        read_interface(tmp_path / name)


@settings(max_examples=300, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_are_read_or_refused_and_nothing_else(data: st.DataObject, tmp_path: Path) -> None:
    damaged = bytearray(SMALL)
    for _ in range(data.draw(st.integers(1, 6))):
        # Most of the file is weights, which are skipped: aim at the rest as often.
        at = data.draw(st.one_of(st.integers(0, 60), st.integers(0, len(SMALL) - 1), st.integers(len(SMALL) - 120, len(SMALL) - 1)))
        damaged[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.just(len(damaged)), st.integers(0, len(damaged))))
    path = tmp_path / "m.onnx"
    path.write_bytes(damaged[:cut])
    for source in (bytes(damaged[:cut]), path):
        try:
            found = read_interface(source)
        except ModelError:
            continue
        assert all(isinstance(each, TensorSpec) for each in (*found.inputs, *found.outputs))


@given(data=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        read_interface(data)
    except ModelError as error:
        assert "\n" not in str(error)


def test_a_file_can_be_removed_and_replaced_after_it_was_refused(tmp_path: Path) -> None:
    """The mapping is let go of even when reading fails, as Windows insists."""
    path = tmp_path / "m.onnx"
    path.write_bytes(SMALL[:-3])
    before = len(open_maps(path))
    with pytest.raises(ModelError):
        read_interface(path)
    assert len(open_maps(path)) == before


def open_maps(path: Path) -> list[str]:
    maps = Path("/proc/self/maps")
    text = maps.read_text() if maps.exists() else ""
    return [line for line in io.StringIO(text) if str(path) in line]
