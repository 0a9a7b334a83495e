"""Knobs that cannot matter are not searched."""

from __future__ import annotations

from dataclasses import replace

import psutil
import pytest

from aivmm.models.records import CutPoint, Operator, Structure
from aivmm.runtime.config import Knob
from aivmm.runtime.target import Device, Target
from aivmm.tensors import TensorSpec
from aivmm.tuner.knobs import is_chain, that_can_matter

NAMES = (
    "intra_op_num_threads",
    "execution_mode",
    "session.intra_op.allow_spinning",
    "ENABLE_CPU_PINNING",
    "ENABLE_HYPER_THREADING",
    "ep.cudaexecutionprovider.cudnn_conv_algo_search",
)
KNOBS = [Knob(name, "choice", "for a test", choices=("a", "b"), default="a") for name in NAMES]
T = TensorSpec(name="t", dtype="float32", shape=(1,))


def target(cores: int) -> Target:
    return Target(runtime="toy", name="CPU", device=Device(kind="cpu", model="m", cores=cores), runtime_version="1")


def made(cuts: list[int], *ops: str) -> Structure:
    """Return four nodes of these types with cuts before some of them."""
    operators = tuple(
        Operator(signature=f"s{at}", op_type=op, domain="", description=op, count=1, flops=1.0, bytes=1, nodes=(f"n{at}",))
        for at, op in enumerate(ops)
    )
    points = tuple(CutPoint(position=at, tensors=(T,), bytes=4) for at in cuts)
    return Structure(
        structure="s", content="c", node_count=4, flops=1.0, weight_bytes=0, operators=operators, cut_points=points, blocks=()
    )  # fmt: skip


def kept(structure: Structure, cores: int = 4) -> set[str]:
    return {each.name for each in that_can_matter(KNOBS, target(cores), structure)}


def test_a_chain_has_no_branches_to_run_at_once() -> None:
    assert is_chain(made([1, 2, 3], "Relu")) and not is_chain(made([1, 3], "Relu")) and not is_chain(made([1, 2, 3], "Loop"))
    two = replace(made([1, 2, 3], "Relu"), cut_points=tuple(CutPoint(position=at, tensors=(T, T), bytes=8) for at in (1, 2, 3)))
    assert not is_chain(two)
    assert "execution_mode" in kept(made([1, 3], "Relu")) and "execution_mode" not in kept(made([1, 2, 3], "Relu"))


def test_one_core_has_no_neighbours_and_no_convolutions_need_no_algorithm() -> None:
    assert {"session.intra_op.allow_spinning", "ENABLE_CPU_PINNING"} <= kept(made([], "Relu"))
    assert {"session.intra_op.allow_spinning", "ENABLE_CPU_PINNING"}.isdisjoint(kept(made([], "Relu"), cores=1))
    assert NAMES[-1] in kept(made([], "Conv")) and NAMES[-1] not in kept(made([], "MatMul"))
    assert "intra_op_num_threads" in kept(made([1, 2, 3], "Relu"), cores=1)


@pytest.mark.parametrize("physical", [2, 4])
def test_two_threads_on_a_core_are_a_choice_where_cores_have_two(monkeypatch: pytest.MonkeyPatch, physical: int) -> None:
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 4 if logical else physical)
    assert ("ENABLE_HYPER_THREADING" in kept(made([], "Relu"))) == (physical == 2)
