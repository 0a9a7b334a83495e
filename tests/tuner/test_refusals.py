"""What a target refuses is found in few compiles. The worker is a fake at its own seam: it refuses models by their operators."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from aivmm.errors import Unsupported
from aivmm.models.graph import analyse
from aivmm.models.pieces import cut_around
from aivmm.models.records import Structure
from aivmm.runtime.target import Device, Target
from aivmm.tuner.halving import OddRun
from aivmm.tuner.refusals import Refusals, as_laid_out_before
from tests.making import onnx_model, write_model

CPU = Target(runtime="fake", name="CPU", device=Device(kind="cpu", model="made-up"), runtime_version="1", precisions=("fp32",))
LAYERS = 24


class Picky:
    """A lab whose one worker refuses models that hold some operators, or all of them at once."""

    def __init__(self, refused: Collection[str], together: Collection[str] = ()) -> None:
        self.refused, self.together = set(refused), set(together)

    def worker(self, runtime: str) -> Picky:
        assert runtime == "fake"
        return self

    def call(self, operation: str, *, limit_s: float, model: str, **_: Any) -> dict[str, Any]:
        assert operation == "accepts" and limit_s > 0
        found = {node.op_type for node in onnx.load(model).graph.node}
        if odd := found & self.refused:
            raise Unsupported(f"no {', '.join(sorted(odd))} here")
        if self.together and self.together <= found:
            raise Unsupported("not both")
        return {}


def chain(folder: Path, odd: dict[int, str]) -> tuple[Path, Structure]:
    """Write layers of MatMul and Tanh; after some of them another operator on the same shape stands instead of the Tanh."""
    nodes, weights, last = [], {}, "x"
    for index in range(LAYERS):
        weights[f"w{index}"] = np.full((8, 8), 0.1 + index, np.float32)
        nodes.append(helper.make_node("MatMul", [last, f"w{index}"], [f"m{index}"], name=f"matmul{index}"))
        last = "y" if index == LAYERS - 1 else f"r{index}"
        nodes.append(helper.make_node(odd.get(index, "Tanh"), [f"m{index}"], [last], name=f"after{index}"))
    model = onnx_model(nodes, [("x", TensorProto.FLOAT, (2, 8))], [("y", TensorProto.FLOAT, (2, 8))], weights)
    path = write_model(folder / "model.onnx", model)
    return path, analyse(path, max_blocks=6)


def refine(structure: Structure, path: Path, refused: Sequence[OddRun]) -> Structure:
    return cut_around(path, structure, {name for run in refused for name in run.nodes})


def find(path: Path, structure: Structure, lab: Any) -> tuple[list[tuple[int, int, tuple[str, ...]]], int]:
    search = Refusals(lab, CPU, path, structure, path.parent / "refusals")
    found = search.find("no such thing")
    return [(each.first, each.last, each.op_types) for each in found], search.compiles


def test_one_refused_operator_among_48_nodes_is_found_in_a_few_compiles(tmp_path: Path) -> None:
    path, structure = chain(tmp_path, {13: "Softplus"})
    found, compiles = find(path, structure, Picky({"Softplus"}))
    assert found == [(27, 27, ("Softplus",))]
    assert compiles <= 12


def test_operators_like_one_that_was_refused_cost_fewer_compiles(tmp_path: Path) -> None:
    odd = dict.fromkeys((3, 8, 13, 20), "Softplus")
    path, structure = chain(tmp_path, odd)
    found, compiles = find(path, structure, Picky({"Softplus"}))
    assert found == [(2 * each + 1, 2 * each + 1, ("Softplus",)) for each in odd]
    assert compiles <= 24  # one by one: 48


def test_different_refused_operators_are_all_found_each_with_its_reason(tmp_path: Path) -> None:
    path, structure = chain(tmp_path, {0: "Softplus", 23: "Erf"})
    runs = Refusals(Picky({"Softplus", "Erf"}), CPU, path, structure, tmp_path / "refusals").find("both")  # type: ignore[arg-type]
    assert [(each.first, each.reason) for each in runs] == [(1, "no Softplus here"), (47, "no Erf here")]


def test_what_is_refused_only_together_leaves_nothing_refused(tmp_path: Path) -> None:
    path, structure = chain(tmp_path, {2: "Softplus", 21: "Erf"})
    assert find(path, structure, Picky((), together={"Softplus", "Erf"}))[0] == []


def test_a_target_that_refuses_nearly_everything_is_not_asked_for_ever(tmp_path: Path) -> None:
    path, structure = chain(tmp_path, {})
    found, compiles = find(path, structure, Picky({"MatMul"}))
    assert compiles <= 48
    assert sum(last - first + 1 for first, last, _ in found) >= LAYERS


def test_out_of_time_nothing_more_is_compiled_and_the_whole_counts_as_refused(tmp_path: Path) -> None:
    path, structure = chain(tmp_path, {13: "Softplus"})
    search = Refusals(Picky({"Softplus"}), CPU, path, structure, tmp_path / "refusals", stop=lambda: True)  # type: ignore[arg-type]
    runs = search.find("no such thing")
    assert search.compiles == 0 and runs[0].first == 0 and runs[-1].last == structure.node_count - 1
    assert refine(structure, path, runs) == structure


def test_blocks_are_cut_around_what_is_refused_and_an_earlier_cut_is_remembered(tmp_path: Path) -> None:
    path, structure = chain(tmp_path, {13: "Softplus"})
    runs = Refusals(Picky({"Softplus"}), CPU, path, structure, tmp_path / "refusals").find("no such thing")  # type: ignore[arg-type]
    refined = refine(structure, path, runs)
    assert [dict(each.op_types) for each in refined.blocks if "Softplus" in each.op_types] == [{"Softplus": 1}]
    assert len(refined.blocks) <= len(structure.blocks) + 2
    assert as_laid_out_before(structure, path, refined) is refined
    assert as_laid_out_before(structure, path, None) is structure
    assert as_laid_out_before(refined, path, structure) is refined
    assert as_laid_out_before(structure, path, replace(refined, cut_points=())) is structure


@pytest.mark.parametrize("refused", [[], ["nothing of the kind"]])
def test_no_refused_run_leaves_the_structure_as_it_is(tmp_path: Path, refused: list[str]) -> None:
    path, structure = chain(tmp_path, {})
    assert find(path, structure, Picky(refused))[0] == []
    assert refine(structure, path, []) == structure
