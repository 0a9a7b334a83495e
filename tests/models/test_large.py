"""A model of more than 2 GB, made sparsely: taken in, taken apart and cut within 1.3 times its weights of memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

WIDE, COUNT = 4096, 34
WEIGHTS = COUNT * 4 * WIDE * WIDE  # 2.1 GiB

STEPS = """
import json, sys
from pathlib import Path
from aivmm.models.graph import analyse
from aivmm.models.prepare import prepare
from aivmm.models.slice import Slicer, WeightStore
from aivmm.probes.machine import peak_memory_bytes

folder, step = Path(sys.argv[1]), sys.argv[2]
found = {}
if step == "prepare":
    found["inputs"] = len(prepare(folder / "large.onnx", folder / "prepared.onnx").inputs)
elif step == "analyse":
    structure = analyse(folder / "prepared.onnx")
    found = {"weights": structure.weight_bytes, "blocks": len(structure.blocks), "alike": [each.count for each in structure.repeats]}
else:
    store = WeightStore(folder / "weights")
    with Slicer(folder / "prepared.onnx") as slicer:
        first = slicer.write(20, 24, folder / "first.onnx", weights=store)
        slicer.write(20, 25, folder / "second.onnx", weights=store)
    found = {"weights": first.weight_bytes, "stored": store.nbytes}
print(json.dumps({**found, "peak": peak_memory_bytes()}))
"""


def write_large(path: Path) -> None:
    """MatMul and Relu in turn; the weights are a hole in a file."""
    nodes, weights, last = [], [], "x"
    with path.with_name("large.data").open("wb") as file:
        file.truncate(WEIGHTS)
    for index in range(COUNT):
        tensor = TensorProto(name=f"w{index}", data_type=TensorProto.FLOAT, dims=(WIDE, WIDE), data_location=TensorProto.EXTERNAL)
        for key, value in (("location", "large.data"), ("offset", index * 4 * WIDE * WIDE), ("length", 4 * WIDE * WIDE)):
            tensor.external_data.add(key=key, value=str(value))
        weights.append(tensor)
        end = "y" if index == COUNT - 1 else f"r{index}"
        nodes += [helper.make_node("MatMul", [last, f"w{index}"], [f"m{index}"]), helper.make_node("Relu", [f"m{index}"], [end])]
        last = end
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, WIDE)) for name in ("x", "y"))
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_model_of_more_than_2_gb_takes_little_more_memory_than_its_weights(tmp_path: Path) -> None:
    write_large(tmp_path / "large.onnx")
    found = {}
    for step in ("prepare", "analyse", "slice"):  # peaks are those of fresh processes
        done = subprocess.run([sys.executable, "-c", STEPS, str(tmp_path), step], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found[step] = json.loads(done.stdout)
        assert found[step]["peak"] < 1.3 * WEIGHTS, found
    assert found["analyse"]["weights"] == WEIGHTS
    assert found["analyse"]["alike"] == [found["analyse"]["blocks"]]
    assert found["slice"]["weights"] == 3 * 4 * WIDE * WIDE
    assert found["slice"]["stored"] == 4 * WIDE * WIDE  # all weights are the same zeros: stored once
    session = ort.InferenceSession(str(tmp_path / "first.onnx"), providers=["CPUExecutionProvider"])
    assert not session.run(None, {session.get_inputs()[0].name: np.ones((1, WIDE), np.float32)})[0].any()
    (tmp_path / "prepared.onnx.data").unlink()
