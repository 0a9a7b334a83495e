"""Anything may be given as a model: each file that is none is refused in one line that says what it is."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from aivmm.errors import AivmmError, ModelError, UsageError
from aivmm.models.load import load_model

F = TensorProto.FLOAT


def info(name: str, shape: list[int | str] | None = None, kind: int = F) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape if shape is not None else [1, 4])


def small(nodes: list[onnx.NodeProto] | None = None, *, opset: int = 17, ir: int = 8, **graph: object) -> onnx.ModelProto:
    nodes = nodes if nodes is not None else [helper.make_node("Relu", ["x"], ["y"], name="relu")]
    proto = helper.make_graph(nodes, "g", [info("x")], [info("y")], **graph)
    return helper.make_model(proto, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)


def write(folder: Path, model: onnx.ModelProto) -> Path:
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def refusal(path: Path, kind: type[AivmmError] = ModelError) -> str:
    with pytest.raises(kind) as caught:
        load_model(path)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 500
    return text


def external(folder: Path, location: str = "w.bin", *, offset: int = 0, length: int | None = 16, data: bytes = b"\0" * 16) -> Path:
    """A model whose weight lies in `location`; the file w.bin always exists with `data`."""
    tensor = TensorProto(name="w", data_type=F, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    (folder / "w.bin").write_bytes(data)
    return write(folder, small([helper.make_node("Add", ["x", "w"], ["y"])], initializer=[tensor]))


def test_a_sound_model_is_read_with_the_hash_of_its_file(tmp_path: Path) -> None:
    path = write(tmp_path, small())
    loaded = load_model(path)
    assert loaded.path == path
    assert [node.op_type for node in loaded.proto.graph.node] == ["Relu"]
    assert len(loaded.sha256) == 64
    assert loaded.external == ()
    assert load_model(write(tmp_path, small(opset=18))).sha256 != loaded.sha256


def test_paths_that_hold_no_file_are_usage_errors(tmp_path: Path) -> None:
    assert "no such model file" in refusal(tmp_path / "absent.onnx", UsageError)
    write(tmp_path, small())
    assert "is a directory; give a file in it: m.onnx" in refusal(tmp_path, UsageError)
    assert "cannot read" in refusal(Path("a\0b.onnx"), UsageError)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are a thing of POSIX")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.onnx")
    assert "not a regular file" in refusal(tmp_path / "pipe.onnx", UsageError)


def test_a_file_name_with_a_line_break_stays_on_one_line(tmp_path: Path) -> None:
    refusal(tmp_path / "two\nlines.onnx", UsageError)


def zipped(*names: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return stream.getvalue()


NOT_ONNX: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "text": (b"Hello, this is a note about models.\n", "looks like text"),
    "html": (b"<!DOCTYPE html>\n<html><body>404</body></html>", "HTML page"),
    "json": (b'{"a": [1, 2]}', "JSON"),
    "pickle": (pickle.dumps({"w": [1.0, 2.0]}), "Python pickle"),
    "torch": (zipped("archive/data.pkl", "archive/version"), "PyTorch checkpoint"),
    "zip": (zipped("model.txt"), "zip archive"),
    "npz": (zipped("arr_0.npy"), "--inputs"),
    "tflite": (b"\x1c\0\0\0TFL3" + b"\0" * 40, "TensorFlow Lite"),
    "ort": (b"\x1c\0\0\0ORTM" + b"\0" * 40, ".ort"),
    "openvino": (b'<?xml version="1.0"?>\n<net name="m" version="11"><layers/></net>', "OpenVINO IR"),
    "gzip": (b"\x1f\x8b\x08" + b"\0" * 20, "gzip"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + b"\0" * 20, "HDF5"),
    "safetensors": (b"\x40\0\0\0\0\0\0\0" + b'{"w":{"dtype":"F32"}}', "safetensors"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
    "textproto": (b'ir_version: 8\nproducer_name: "x"\n', "ONNX written as text"),
    "noise": (bytes(np.random.default_rng(0).integers(0, 256, 999, dtype=np.uint8)), "cannot be decoded"),
    "zeros": (b"\0" * 64, "cannot be decoded"),
    "other protobuf": (b"\x7a\x03abc", "not ONNX"),
}


@pytest.mark.parametrize("name", NOT_ONNX)
def test_a_file_that_is_not_onnx_is_named_for_what_it_is(tmp_path: Path, name: str) -> None:
    content, words = NOT_ONNX[name]
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert words in refusal(path)


def test_a_model_cut_anywhere_is_refused(tmp_path: Path) -> None:
    weights = numpy_helper.from_array(np.ones(4, np.float32), "w")
    content = small([helper.make_node("Add", ["x", "w"], ["y"])], initializer=[weights]).SerializeToString()
    path = tmp_path / "cut.onnx"
    for length in range(1, len(content)):
        path.write_bytes(content[:length])
        refusal(path)


@pytest.mark.parametrize(("field", "words"), [("node", "without nodes"), ("output", "without outputs")])
def test_a_graph_that_lacks_a_part_is_refused(tmp_path: Path, field: str, words: str) -> None:
    model = small()
    model.graph.ClearField(field)
    assert words in refusal(write(tmp_path, model))


# --- wiring


def test_an_undefined_input_is_named_with_its_node(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, small([helper.make_node("Add", ["x", "ghost"], ["y"], name="plus")])))
    assert "'plus' (Add)" in message
    assert "'ghost'" in message


def test_a_tensor_written_twice_is_named_with_both_nodes(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"], name="one"), helper.make_node("Abs", ["x"], ["y"], name="two")]
    message = refusal(write(tmp_path, small(nodes)))
    assert "'y'" in message
    assert "'one'" in message
    assert "'two'" in message


def test_a_cycle_is_shown_with_its_nodes_only(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], name="before"),
        helper.make_node("Add", ["r", "c"], ["b"], name="b"),
        helper.make_node("Abs", ["b"], ["c"], name="c"),
        helper.make_node("Neg", ["c"], ["y"], name="after"),
    ]
    message = refusal(write(tmp_path, small(nodes)))
    assert "cycle of 2 nodes" in message
    assert "before" not in message
    assert "after" not in message


def test_an_undefined_output_is_refused(tmp_path: Path) -> None:
    assert "output 'y'" in refusal(write(tmp_path, small([helper.make_node("Relu", ["x"], ["z"])])))


def test_nodes_out_of_order_are_fine(tmp_path: Path) -> None:
    nodes = [helper.make_node("Abs", ["r"], ["y"]), helper.make_node("Relu", ["x"], ["r"])]
    assert len(load_model(write(tmp_path, small(nodes))).proto.graph.node) == 2


def test_a_branch_may_read_around_itself_but_nothing_undefined(tmp_path: Path) -> None:
    def model(read: str) -> onnx.ModelProto:
        branch = helper.make_graph([helper.make_node("Relu", [read], ["t"])], "branch", [], [info("t")])
        cond = numpy_helper.from_array(np.array(True), "cond")
        return small([helper.make_node("If", ["cond"], ["y"], then_branch=branch, else_branch=branch)], initializer=[cond])

    load_model(write(tmp_path, model("x")))
    assert "'ghost'" in refusal(write(tmp_path, model("ghost")))


def test_unknown_operators_are_left_to_the_runtimes(tmp_path: Path) -> None:
    model = small([helper.make_node("Magic", ["x"], ["y"], domain="com.example")])
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    assert load_model(write(tmp_path, model)).proto.graph.node[0].domain == "com.example"


def test_an_operator_set_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    assert "opset 999" in refusal(write(tmp_path, small(opset=999)))


def test_weights_that_do_not_fill_their_shape_are_refused(tmp_path: Path) -> None:
    tensor = TensorProto(name="w", data_type=F, dims=[4], raw_data=b"\0" * 12)
    model = small([helper.make_node("Add", ["x", "w"], ["y"])], initializer=[tensor])
    assert "holds 12 bytes, but its shape and type need 16" in refusal(write(tmp_path, model))


# --- external weights


def test_external_weights_stay_outside_and_enter_the_hash(tmp_path: Path) -> None:
    before = load_model(external(tmp_path))
    assert before.external == (tmp_path / "w.bin",)
    assert not before.proto.graph.initializer[0].raw_data
    after = load_model(external(tmp_path, data=b"\1" * 16))
    assert after.sha256 != before.sha256


@pytest.mark.parametrize("location", ["/etc/hostname", "C:\\w.bin", "\\\\host\\w.bin", "../w.bin", "a/../../w.bin", "..\\w.bin"])
def test_external_weights_outside_the_folder_are_refused(tmp_path: Path, location: str) -> None:
    message = refusal(external(tmp_path, location))
    assert "absolute path" in message or "leaves the model's folder" in message


def test_missing_external_weights_are_named(tmp_path: Path) -> None:
    assert "no file 'other.bin'" in refusal(external(tmp_path, "other.bin"))
    (tmp_path / "sub").mkdir()
    assert "not a regular file" in refusal(external(tmp_path, "sub"))


@pytest.mark.parametrize(("offset", "length"), [(8, 16), (-4, 16), (2**40, 16)])
def test_external_weights_beyond_the_end_of_their_file_are_refused(tmp_path: Path, offset: int, length: int) -> None:
    assert "beyond the file's 16 bytes" in refusal(external(tmp_path, offset=offset, length=length))


def test_external_weights_whose_length_is_wrong_or_absurd_are_refused(tmp_path: Path) -> None:
    assert "need 16" in refusal(external(tmp_path, length=8))
    path = external(tmp_path, length=None, data=b"\0" * 8)
    assert "beyond the file's 8 bytes" in refusal(path)


def link(make: Callable[[], object]) -> None:
    try:
        make()
    except (OSError, NotImplementedError) as error:
        pytest.skip(f"no links here: {error}")


def test_external_weights_behind_a_symbolic_link_are_refused(tmp_path: Path) -> None:
    path = external(tmp_path, "link.bin")
    link(lambda: (tmp_path / "link.bin").symlink_to(tmp_path / "w.bin"))
    assert "symbolic link" in refusal(path)


def test_external_weights_with_a_second_hard_link_are_refused(tmp_path: Path) -> None:
    path = external(tmp_path)
    link(lambda: os.link(tmp_path / "w.bin", tmp_path / "second.bin"))
    assert "2 hard links" in refusal(path)


def test_a_folder_on_the_way_that_is_a_link_is_refused(tmp_path: Path) -> None:
    path = external(tmp_path, "sub/w.bin")
    link(lambda: (tmp_path / "sub").symlink_to(tmp_path, target_is_directory=True))
    assert "symbolic link" in refusal(path)
