"""Blocks cut along branches around what a target refuses or computes wrong; real runtimes, in real workers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

import aivmm
from aivmm.errors import AivmmError, UsageError
from aivmm.models.graph import analyse
from aivmm.models.order import PreparedGraph
from aivmm.models.pieces import cut_around
from aivmm.models.prepare import prepare
from aivmm.models.records import Structure
from aivmm.models.slice import Slicer
from aivmm.planner.candidates import Draft, Piece
from aivmm.probes.arrays import load_arrays, save_arrays
from aivmm.probes.lab import Lab
from aivmm.runtime.config import Config
from aivmm.runtime.target import Target
from aivmm.tuner.anatomy import answers, evaluator, tolerance, trusted_for, wrong_numbers
from aivmm.tuner.emit import Emitter
from aivmm.tuner.layout import cut_as_asked
from aivmm.tuner.miscalculations import Miscalculations
from aivmm.tuner.refusals import Refusals, as_laid_out_before
from tests.making import ONNXRUNTIME, OPENVINO, normal
from tests.tuner.harness import reference
from tests.tuner.planted import write_planted

FP32 = Config(precision="fp32")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab() as lab:
        yield lab


@pytest.fixture(scope="module")
def targets(lab: Lab) -> dict[str, Target]:
    return {str(each): each for each in lab.discover(["openvino", "onnxruntime"])[0]}


def prepared(name: str, folder: Path) -> tuple[Path, Structure]:
    path = folder / "model.onnx"
    prepare(write_planted(name, folder), path)
    return path, analyse(path)


def why_refused(lab: Lab, path: Path, target: Target, inputs: Path) -> str:
    try:
        lab.unload(lab.load(path, target, FP32, inputs=inputs).contestant)
    except AivmmError as error:
        return error.message
    return ""


def test_a_plan_along_branches_runs_the_rest_of_them_where_a_part_is_refused(tmp_path: Path, lab: Lab, targets: dict[str, Target]) -> None:
    """The whole way: found, cut, written, loaded by the engine; OpenVINO has all six branches but for two nodes in two of them."""
    path, structure = prepared("refused_in_branches", tmp_path)
    inputs = tmp_path / "x.npz"
    save_arrays(inputs, {"x": normal(1, 3, 16, 16)})
    reason = why_refused(lab, path, targets[OPENVINO], inputs)
    assert "Det" in reason
    search = Refusals(lab, targets[OPENVINO], path, structure, tmp_path / "refusals")
    found = search.find(reason)
    assert [run.op_types for run in found] == [("Det",), ("Det",)] and search.compiles <= 20
    laid_out = cut_around(path, structure, {name for run in found for name in run.nodes})
    assert len(laid_out.pieces) == 3
    odd = [block.index for block in laid_out.blocks if "Det" in block.op_types]
    assert [dict(laid_out.blocks[index].op_types) for index in odd] == [{"Det": 2}]
    facts = prepare(tmp_path / "refused_in_branches.onnx", tmp_path / "again.onnx")
    emitter = Emitter(path, facts, laid_out, tmp_path / "segments", version="test")
    spans = [(0, odd[0] - 1, OPENVINO), (odd[0], odd[0], ONNXRUNTIME), (odd[0] + 1, len(laid_out.blocks) - 1, OPENVINO)]
    pieces = tuple(Piece(target=targets[name], config=FP32, first=first, last=last) for first, last, name in spans)
    emitter.write(Draft(name="hybrid", pieces=pieces), tmp_path / "hybrid.aivmm", objective="latency")
    emitter.close()
    sample = {"x": normal(1, 3, 16, 16, seed=7)}
    with aivmm.load_plan(tmp_path / "hybrid.aivmm") as engine:
        answer = engine.run(sample)["y"]
    wanted = reference(tmp_path / "refused_in_branches.onnx", sample)["y"]
    assert np.linalg.norm(answer - wanted) <= 1e-5 * np.linalg.norm(wanted)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("wrong_in_a_branch", {"QLinearAdd"}),
        ("resize_in_a_branch", {"Resize"}),
        pytest.param("integers_in_a_branch", {"Mul", "Div"}, marks=pytest.mark.slow),
        pytest.param("doubles_in_a_branch", {"Add", "Exp", "Log"}, marks=pytest.mark.slow),
    ],
)
def test_what_is_wrong_in_one_branch_is_found_to_the_node(
    tmp_path: Path, lab: Lab, targets: dict[str, Target], name: str, wrong: set[str]
) -> None:
    path, structure = prepared(name, tmp_path)
    block = next(each for each in structure.blocks if wrong <= set(each.op_types) and "Conv" in each.op_types)
    assert block.last > block.first
    values = tmp_path / "x.npz"
    save_arrays(values, {"x": normal(1, 3, 16, 16)})
    with Slicer(path) as slicer:
        before = slicer.write(0, block.first - 1, tmp_path / "before.onnx")
    inputs = tmp_path / "inputs.npz"
    assert answers(lab, before.path, targets[ONNXRUNTIME], values, inputs)
    search = Miscalculations(lab, targets[OPENVINO], path, structure, tmp_path / "wrong", trusted=list(targets.values()))
    runs = search.within(block, inputs, "gave wrong numbers")
    search.close()
    assert {op_type for run in runs for op_type in run.op_types} == wrong and search.trials <= 14, runs
    assert all(run.first == run.last and run.reason.startswith("gave wrong numbers: ") for run in runs)
    again = Miscalculations(lab, targets[OPENVINO], path, structure, tmp_path / "late", trusted=list(targets.values()), stop=lambda: True)
    gave_up = again.within(block, inputs, "gave wrong numbers")
    again.close()
    assert again.trials == 0 and (gave_up[0].first, gave_up[-1].last) == (block.first, block.last)


def test_what_only_one_runtime_takes_is_held_against_the_evaluator_of_onnx(tmp_path: Path, lab: Lab, targets: dict[str, Target]) -> None:
    path, structure = prepared("refused_by_onnxruntime", tmp_path)
    structure = cut_as_asked(structure, path, ["Max"])
    block = next(each for each in structure.blocks if "Max" in each.op_types)
    inputs, outputs = tmp_path / "inputs.npz", tmp_path / "outputs.npz"
    steps = normal(1, 16, 16, 16) * 100
    save_arrays(inputs, {block.inputs[0].name: steps.astype(np.int16)})
    with Slicer(PreparedGraph(path, pieces=structure.pieces)) as slicer:
        part = slicer.write(block.first, block.last, tmp_path / "part.onnx").path
    order = [targets[ONNXRUNTIME], targets[OPENVINO]]
    assert trusted_for(block, order) == [order[0], evaluator(), order[1]]
    assert trusted_for(replace(block, flops=1e12), order) == order  # the evaluator would take minutes
    assert not answers(lab, part, order[0], inputs, outputs)
    assert answers(lab, part, evaluator(), inputs, outputs)
    assert np.array_equal(load_arrays(str(outputs))[block.outputs[0].name], np.maximum(steps.astype(np.int16), 8))


def test_numbers_may_differ_by_more_where_kernels_round_elsewhere(targets: dict[str, Target]) -> None:
    cpu = targets[OPENVINO]
    assert tolerance(cpu, ["Conv", "Relu"]) == 1e-3
    assert tolerance(cpu, ["Conv", "DequantizeLinear"]) == tolerance(cpu, ["QLinearConv"]) == 1e-2
    assert tolerance(replace(cpu, device=replace(cpu.device, kind="gpu")), ["Conv"]) == 1e-2
    assert wrong_numbers("", 2e-3, 1e-3) and not wrong_numbers("", 2e-3, 1e-2) and wrong_numbers("not finite", 0.0, 1e-2)


def test_a_layout_is_found_again_only_for_the_model_that_it_was_made_for(tmp_path: Path) -> None:
    path, structure = prepared("refused_in_branches", tmp_path)
    laid_out = cut_as_asked(structure, path, ["Det"])
    assert laid_out.pieces and as_laid_out_before(structure, path, laid_out) is laid_out
    assert as_laid_out_before(structure, path, replace(laid_out, cut_points=())) is structure
    strange = replace(laid_out, pieces=tuple(tuple(f"{name}'" for name in piece) for piece in laid_out.pieces))
    assert as_laid_out_before(structure, path, strange) is structure
    turned = replace(laid_out, pieces=(laid_out.pieces[0] + laid_out.pieces[2], laid_out.pieces[1]))  # not convex
    assert as_laid_out_before(structure, path, turned) is structure


def test_blocks_are_cut_around_what_is_asked_for(tmp_path: Path) -> None:
    path, structure = prepared("refused_in_branches", tmp_path)
    convolutions = sum(node.op_type == "Conv" for node in onnx.load(path).graph.node)
    by_type = cut_as_asked(structure, path, ["Det", "Concat"])
    assert all(set(block.op_types) <= {"Det", "Concat"} or not set(block.op_types) & {"Det", "Concat"} for block in by_type.blocks)
    assert sum(block.op_types.get("Conv", 0) for block in by_type.blocks) == convolutions
    name = next(str(node.name) for node in PreparedGraph(path).nodes if node.op_type == "Det")
    by_name = cut_as_asked(structure, path, [name])
    assert next(dict(block.op_types) for block in by_name.blocks if block.op_types.get("Det")) == {"Det": 1}
    assert cut_as_asked(structure, path, []) is structure
    with pytest.raises(UsageError, match="--cut-around 'Dett' is neither") as refused:
        cut_as_asked(structure, path, ["Dett"])
    assert "Conv, Det" in str(refused.value.advice)
