"""TensorRT's cache: a folder for each content and config. No TensorRT is needed to say which."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from aivmm.runtime.config import Config
from aivmm.runtime.onnxruntime import OnnxRuntime
from aivmm.runtime.target import Target
from aivmm.runtime.tensorrt_cache import content_sha256, tensorrt_caches
from tests.contracts import run_once
from tests.making import chain_model, normal, onnx_model, reference, write_model

TIMING = {"trt_timing_cache_enable", "trt_timing_cache_path"}
ENGINES = {"trt_engine_cache_enable", "trt_engine_cache_path"}


pytestmark = pytest.mark.usefixtures("cache")


def external_model(folder: Path, *, seed: int = 0) -> Path:
    """Write a model whose weights lie beside it, the same file of the model for every seed."""
    folder.mkdir()
    onnx.save_model(chain_model(seed=seed), folder / "m.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    return folder / "m.onnx"


def place(model: Path | bytes, config: Config | None = None) -> str:
    return tensorrt_caches(model, config or Config())["trt_engine_cache_path"]


def test_other_weights_other_options_and_other_precisions_have_engines_of_their_own(tmp_path: Path) -> None:
    one, again, other = (external_model(tmp_path / name, seed=seed) for name, seed in (("one", 0), ("again", 0), ("other", 1)))
    assert one.read_bytes() == other.read_bytes()  # weights alone tell them apart
    assert place(one) == place(again) != place(other)
    level, streams = ({f"provider.{name}": "2"} for name in ("trt_builder_optimization_level", "trt_auxiliary_streams"))
    configs = [Config(), Config.of(level), Config.of(streams), Config.of({**level, **streams}), Config(precision="fp32")]
    assert len({place(one, each) for each in configs}) == len(configs)
    assert all(Path(place(one, each)).is_dir() for each in configs)
    timing = {tensorrt_caches(each, Config())["trt_timing_cache_path"] for each in (one, other)}
    assert len(timing) == 1  # kernels' timings are anybody's


def test_weights_in_the_model_itself_tell_models_apart(tmp_path: Path) -> None:
    one, other = (chain_model(seed=seed).SerializeToString() for seed in (0, 1))
    assert place(one) == place(one) != place(other)
    assert place(write_model(tmp_path / "m.onnx", chain_model())) == place(write_model(tmp_path / "n.onnx", chain_model()))


def test_weights_inside_of_branches_and_attributes_are_found(tmp_path: Path) -> None:
    def constant(name: str) -> onnx.TensorProto:
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value=f"{name}.bin")
        return tensor

    def branch(name: str) -> onnx.GraphProto:
        value = helper.make_tensor_value_info(f"{name}.y", TensorProto.FLOAT, (4,))
        return helper.make_graph([helper.make_node("Identity", [name], [f"{name}.y"])], name, [], [value], [constant(name)])

    model = onnx_model([helper.make_node("Not", ["c"], ["d"])], [("c", TensorProto.BOOL, ())], [("d", TensorProto.BOOL, ())])
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch("then"), else_branch=branch("else"))
    model.graph.node.extend([node, helper.make_node("Constant", [], ["k"], value=constant("value"))])
    path = write_model(tmp_path / "m.onnx", model)
    seen = {content_sha256(path)}
    assert seen == {None}  # they are not there yet
    for name in ("then", "else", "value"):
        (tmp_path / f"{name}.bin").write_bytes(bytes(16))
    seen.add(content_sha256(path))
    for name in ("then", "else", "value"):
        (tmp_path / f"{name}.bin").write_bytes(bytes(15) + b"x")
        seen.add(content_sha256(path))
    assert len(seen) == 5


@pytest.mark.parametrize("location", ["../weights.bin", "/dev/zero", "missing.bin", "", ".", "pipe"])
def test_where_weights_are_not_at_hand_no_engine_is_kept(tmp_path: Path, location: str) -> None:
    path = external_model(tmp_path / "m")
    (tmp_path / "weights.bin").write_bytes(b"x")
    model = onnx.load(path, load_external_data=False)
    for each in model.graph.initializer:
        next(entry for entry in each.external_data if entry.key == "location").value = location
    if location == "pipe":
        if not hasattr(os, "mkfifo"):
            pytest.skip("no pipes in folders here")
        os.mkfifo(path.parent / "pipe")
    write_model(path, model)
    assert tensorrt_caches(path, Config()).keys() == TIMING
    assert tensorrt_caches(external_model(tmp_path / "bytes").read_bytes(), Config()).keys() == TIMING  # bytes are in no folder


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x3a\x05ab"])
def test_what_is_no_model_keeps_no_engine(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    assert tensorrt_caches(tmp_path / "m.onnx", Config()).keys() == TIMING
    assert tensorrt_caches(tmp_path / "absent.onnx", Config()).keys() == TIMING


def test_where_nobody_may_write_nothing_is_kept(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert tensorrt_caches(chain_model().SerializeToString(), Config()) == {}


def test_the_engines_used_longest_ago_are_removed_when_there_are_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [chain_model(seed=seed).SerializeToString() for seed in range(3)]
    engines = [Path(place(each)) / "kernel_sm90.engine" for each in models]
    for age, each in enumerate(engines):
        each.write_bytes(bytes(100))
        os.utime(each, (1e9 - age, 1e9 - age))
    monkeypatch.setattr("aivmm.runtime.tensorrt_cache.MOST_BYTES", 250)
    place(models[2])  # the oldest, and now in use
    assert [each.exists() for each in engines] == [True, False, True]


@pytest.mark.gpu("onnxruntime:TensorRT")
def test_a_real_engine_is_built_once_and_never_taken_for_other_weights(tmp_path: Path) -> None:
    """ONNX Runtime names an engine by the graph and not by the weights: a folder for each content keeps them apart."""
    backend = OnnxRuntime()
    target = backend.find("TensorRT:0")
    assert isinstance(target, Target)
    array = normal(2, 32)
    engines: list[set[Path]] = []
    for seed in (0, 0, 1):
        model = chain_model(seed=seed)
        path = write_model(tmp_path / "m.onnx", model)
        found = run_once(backend.compile(path, target, Config()), {"x": array})["y"]
        np.testing.assert_allclose(found, reference(model, {"x": array})["y"], atol=2e-2)
        engines.append(set((tmp_path / "cache").rglob("*.engine")))
    assert engines[0] and engines[0] == engines[1] and len(engines[2]) == 2 * len(engines[0])
