"""A candidate's device memory, and what becomes of one that has no room: in real workers, on the null backend's card and on real ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from aivmm.errors import Unsupported
from aivmm.probes import device_memory, wire
from aivmm.probes.arrays import save_arrays
from aivmm.probes.client import Worker
from aivmm.probes.device_memory import memory_of
from aivmm.probes.race import Contestant
from aivmm.runtime.config import Config
from aivmm.runtime.no_room import is_no_room
from aivmm.runtime.null import NullBackend
from aivmm.runtime.nvml import process_memory_bytes
from aivmm.runtime.onnxruntime import OnnxRuntime
from aivmm.runtime.target import Target
from tests.contract_models import onnx_model
from tests.making import chain_model, normal, write_model


def null_card() -> Target:
    return next(each for each in NullBackend().targets() if isinstance(each, Target) and each.name == "GPU.0")


def growing_model(path: Path, extent: int) -> Path:
    """y = the largest of an outer product, `extent` x `extent`, doubled: a small file that holds two large tensors while it runs."""
    nodes = [
        helper.make_node("Mul", ["x", "column"], ["scaled"]),  # nothing large is constant, or it would be computed ahead, on the host
        helper.make_node("MatMul", ["scaled", "row"], ["wide"]),
        helper.make_node("Add", ["wide", "wide"], ["twice"]),
        helper.make_node("ReduceMax", ["twice"], ["y"], keepdims=0),
    ]
    ones = np.ones(extent, dtype=np.float32)
    weights = {"column": ones[:, None], "row": ones[None, :]}
    onnx.save(onnx_model(nodes, [("x", TensorProto.FLOAT, (1,))], [("y", TensorProto.FLOAT, ())], weights), path)
    return path


def compiled(worker: Worker, name: str, model: Path, target: Target, inputs: Path, config: Config | None = None) -> dict[str, Any]:
    return worker.call(
        "compile",
        limit_s=120,
        name=name,
        model=str(model),
        target=wire.target_out(target),
        config=wire.config_out(config or Config()),
        inputs=str(inputs),
    )


def test_a_candidate_without_room_is_refused_and_the_worker_lives_on(tmp_path: Path) -> None:
    one = tmp_path / "one.npz"
    save_arrays(one, {"x": np.ones(1, dtype=np.float32)})
    with Worker("memory") as worker:
        fits = compiled(worker, "fits", growing_model(tmp_path / "fits.onnx", 32), null_card(), one)
        before = worker.pid
        with pytest.raises(Unsupported) as refused:  # two tensors of 1.6 GB, and the card has 2 GB
            compiled(worker, "large", growing_model(tmp_path / "large.onnx", 20_000), null_card(), one)
        assert is_no_room(refused.value.message)
        assert worker.pid == before and worker.call("timed", limit_s=60, name="fits", seconds=0.01)["durations"]
    assert 2 * 4 * 32**2 <= fits["device_memory_bytes"] < 3 * 4 * 32**2


def test_memory_is_a_candidates_own_whatever_else_the_worker_holds(tmp_path: Path) -> None:
    model, inputs = write_model(tmp_path / "chain.onnx", chain_model()), tmp_path / "inputs.npz"
    save_arrays(inputs, {"x": normal(2, 32)})
    with Worker("memory") as worker:
        first, second = (compiled(worker, name, model, null_card(), inputs)["device_memory_bytes"] for name in ("first", "second"))
    weights = sum(int(np.prod(each.dims)) * 4 for each in onnx.load(model).graph.initializer)
    assert first == second > weights


def test_a_cpu_has_no_memory_of_its_own_to_count(tmp_path: Path) -> None:
    target, inputs = OnnxRuntime().find("CPU"), tmp_path / "inputs.npz"
    assert isinstance(target, Target)
    save_arrays(inputs, {"x": normal(2, 32)})
    with Worker("memory") as worker:
        answer = compiled(worker, "m", write_model(tmp_path / "chain.onnx", chain_model()), target, inputs)
    assert "device_memory_bytes" not in answer


class _Carded(NullBackend):
    """A null backend whose card is one of NVIDIA's to whoever counts memory. NVML says what it was seen to say, before and after a load."""

    loads = 0

    def compile(self, model: Path | bytes, target: Target, config: Config) -> Any:
        self.loads += 1
        return super().compile(model, target, config)


def carded(monkeypatch: pytest.MonkeyPatch, process: Callable[[int], int]) -> tuple[_Carded, Target]:
    """Return a backend and its card, which 1000 bytes of others are on, and 500 more for each load; `process` is NVML's answer by loads."""
    backend, card = _Carded(), null_card()
    monkeypatch.setattr(device_memory, "card_memory_bytes", lambda uid: 1000 + 500 * backend.loads)
    monkeypatch.setattr(device_memory, "process_memory_bytes", lambda uid, pid: process(backend.loads))
    return backend, replace(card, device=replace(card.device, uid="GPU-0"))


def _not_told(loads: int) -> int:
    if loads:
        raise Unsupported("NVML lists no process 7; in a container it knows processes by the host's ids")
    return 0  # nobody is on the card yet


@pytest.mark.parametrize(
    ("process", "context"),
    [(_not_told, 500), (lambda loads: 0, 500), (lambda loads: 700 + 500 * loads, 1200)],
    ids=["by the host's ids", "no process at all", "told"],
)
def test_how_to_ask_is_chosen_once_the_process_is_on_the_card(
    monkeypatch: pytest.MonkeyPatch, process: Callable[[int], int], context: int
) -> None:
    backend, card = carded(monkeypatch, process)
    contexts: dict[Target, int] = {}
    for _ in range(2):  # the context is taken once, and added each time
        memory = memory_of(backend, card, contexts)
        assert memory is not None and contexts == {card: context}
        backend.loads += 1
        assert memory.look() == context + 500


def test_a_card_that_tells_no_more_costs_no_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: object) -> int:
        raise Unsupported("NVML failed")

    backend, card = carded(monkeypatch, _not_told)
    memory = memory_of(backend, card, {})
    assert memory is not None and memory.look() == 500
    monkeypatch.setattr(device_memory, "card_memory_bytes", silent)
    backend.loads += 1
    assert memory.look() == 500
    assert memory_of(backend, card, {}) is None and memory_of(backend, card, {card: 500}) is None
    assert memory_of(backend, replace(card, device=replace(card.device, kind="cpu", uid="")), {}) is None and backend.loads == 2


class _Full:
    """A worker whose runtime says that there is no room, in the middle of a race."""

    generation, pid = 1, 1

    def call(self, operation: str, **_: Any) -> dict[str, Any]:
        raise Unsupported("ONNX Runtime while running: Failed to allocate memory for requested buffer of size 112000000000")


def test_no_room_in_the_middle_of_a_race_is_a_refusal_and_no_failure() -> None:
    contestant = Contestant("m", _Full())  # type: ignore[arg-type]
    contestant.block(0)
    assert contestant.refused and not contestant.racing and not contestant.lost
    assert contestant.failed is not None and is_no_room(contestant.failed.reason)


@pytest.mark.gpu
def test_a_real_card_counts_a_candidates_memory_and_its_growth(tmp_path: Path) -> None:
    target, one = OnnxRuntime().find("CUDA:0"), tmp_path / "one.npz"
    assert isinstance(target, Target)
    save_arrays(one, {"x": np.ones(1, dtype=np.float32)})
    with Worker("memory") as worker:
        worker.call("discover", limit_s=120, backends=["onnxruntime"])  # it leaves a context behind, as it does in a tune
        small = compiled(worker, "small", growing_model(tmp_path / "small.onnx", 32), target, one)["device_memory_bytes"]
        large = compiled(worker, "large", growing_model(tmp_path / "large.onnx", 1 << 14), target, one)["device_memory_bytes"]
        worker.call("timed", limit_s=60, name="large", seconds=0.05)
        grown = worker.call("timed", limit_s=60, name="large", seconds=0.05)["device_memory_bytes"]  # 2.9 to 7.2 GB was seen
        held = process_memory_bytes(target.device.uid, worker.pid)
    assert large <= grown <= held <= grown + small, "both are in this process, and its context once"
    assert small < large and large - small >= 1 << 30, "one tensor of 1 GiB at least"


@pytest.mark.gpu
def test_a_real_cards_full_memory_is_a_refusal_and_the_worker_lives_on(tmp_path: Path) -> None:
    target, one = OnnxRuntime().find("CUDA:0"), tmp_path / "one.npz"
    assert isinstance(target, Target)
    save_arrays(one, {"x": np.ones(1, dtype=np.float32)})
    elements = (target.device.memory_bytes or 0) // 4  # of one tensor, and there are two
    with Worker("memory") as worker:
        compiled(worker, "fits", growing_model(tmp_path / "fits.onnx", 32), target, one)
        before = worker.pid
        with pytest.raises(Unsupported) as refused:
            compiled(worker, "all", growing_model(tmp_path / "all.onnx", math.isqrt(elements)), target, one)
        assert is_no_room(refused.value.message), refused.value.message
        limited = Config.of({"provider.gpu_mem_limit": str(1 << 30)})
        with pytest.raises(Unsupported) as refused:
            compiled(worker, "limited", growing_model(tmp_path / "some.onnx", 1 << 14), target, one, limited)
        assert is_no_room(refused.value.message), refused.value.message
        assert worker.pid == before and worker.call("timed", limit_s=60, name="fits", seconds=0.01)["durations"]
