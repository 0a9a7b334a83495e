"""Placement problems in files: our own JSON, strictly read, and the published instances of Tarnawski et al. (NeurIPS 2020).

Our schema, number 1; keys not listed are refused, and so are NaN, infinity, negative numbers and keys that are there twice:

    {"schema": 1,
     "unit": "s",                                             the unit of all costs, a word for people; default "s"
     "devices": [{"name": "cpu", "count": 1, "memory_bytes": 8e9}],
                                                              count: how many identical ones, default 1; no memory_bytes: no limit
     "choices": [{"name": "openvino:CPU fp32", "target": "openvino:CPU", "device": "cpu"}],
     "nodes": [{"id": "block 0", "costs": {"openvino:CPU fp32": 1.5e-3}, "memory_bytes": 4096, "colocation": "a"}],
                                                              memory_bytes: a number or one per choice, default 0
     "edges": [{"from": "block 0", "to": "block 1", "bytes": 401408, "tensor": "x"}],
                                                              tensor: tells apart several tensors of one node, default ""
     "transfers": [{"from": "openvino:CPU", "to": "openvino:GPU.0", "fixed": 1.5e-5, "per_byte": 2.5e-10}],
     "exports": [{"target": "openvino:GPU.0", "fixed": 1e-5, "per_byte": 1e-10}],
     "unsupported_pairs": [["openvino:NPU", "openvino:GPU.0"]],
     "contention": [{"device": "cpu", "beside": "igpu", "factor": 1.3}]}

What the words mean is in `aivmm.planner.problem`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aivmm.errors import UsageError
from aivmm.planner.problem import Choice, Edge, Move, Node, PlacedDevice, Problem

Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)


class _Device(_Strict):
    name: str
    count: int = Field(default=1, ge=1)
    memory_bytes: Amount | None = None


class _Choice(_Strict):
    name: str
    target: str
    device: str


class _Node(_Strict):
    id: str
    costs: dict[str, Amount]
    memory_bytes: Amount | dict[str, Amount] = 0.0
    colocation: str | None = None


class _Edge(_Strict):
    source: str = Field(alias="from")
    reader: str = Field(alias="to")
    bytes: Amount = 0.0
    tensor: str = ""


class _Transfer(_Strict):
    source: str = Field(alias="from")
    reader: str = Field(alias="to")
    fixed: Amount = 0.0
    per_byte: Amount = 0.0


class _Export(_Strict):
    target: str
    fixed: Amount = 0.0
    per_byte: Amount = 0.0


class _Contention(_Strict):
    device: str
    beside: str
    factor: Annotated[float, Field(ge=1, allow_inf_nan=False)]


class _File(_Strict):
    schema_: Literal[1] = Field(alias="schema")
    unit: str = "s"
    devices: list[_Device]
    choices: list[_Choice]
    nodes: list[_Node]
    edges: list[_Edge] = []
    transfers: list[_Transfer] = []
    exports: list[_Export] = []
    unsupported_pairs: list[Annotated[list[str], Field(min_length=2, max_length=2)]] = []
    contention: list[_Contention] = []


class _PublishedNode(BaseModel):
    id: int
    supportedOnFpga: bool
    cpuLatency: Amount
    fpgaLatency: Amount
    size: Amount
    colorClass: int | None = None
    isBackwardNode: bool = False


class _PublishedEdge(BaseModel):
    sourceId: int
    destId: int
    cost: Amount


class _Published(BaseModel):
    maxFPGAs: int = Field(ge=0)
    maxCPUs: int = Field(ge=0)
    maxSizePerFPGA: Amount
    nodes: list[_PublishedNode]
    edges: list[_PublishedEdge]


def read_problem(path: Path) -> Problem:
    """Return the problem in a file of either kind.

    Raises:
        UsageError: the file cannot be read, is not JSON, or is no problem; the message says where.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}", advice="name a JSON file") from error
    try:
        return problem_from_json(text)
    except UsageError as error:
        raise UsageError(f"{path}: {error.message}", advice=error.advice) from error


def problem_from_json(text: str) -> Problem:
    """Return the problem that a text of either kind holds.

    Raises:
        UsageError: it is not JSON, or no problem.
    """
    try:
        found = json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:  # also an integer of more digits than Python reads
        reason = str(error).partition(";")[0]
        raise UsageError(f"not JSON: {reason}", advice="see `pydoc aivmm.planner.problem_files` for the schema") from error
    if not isinstance(found, dict):
        raise UsageError("the file holds no JSON object", advice="see `pydoc aivmm.planner.problem_files` for the schema")
    try:
        return _published(_Published.model_validate(found)) if "maxFPGAs" in found else _ours(_File.model_validate(found))
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"[{each}]" if isinstance(each, int) else f".{each}" for each in first["loc"]).lstrip(".")
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise UsageError(
            f"{where or 'the file'}: {first['msg']}{more}", advice="see `pydoc aivmm.planner.problem_files` for the schema"
        ) from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if twice:
        raise UsageError(f"the key {twice[0]!r} is there twice in one object", advice="keep one of the two")
    return dict(pairs)


def _ours(file: _File) -> Problem:
    pairs = Counter((each.source, each.reader) for each in file.transfers)
    pairs.update((each.device, each.beside) for each in file.contention)
    exports = Counter(each.target for each in file.exports)
    twice = [key for key, count in (*pairs.items(), *exports.items()) if count > 1]
    if twice:
        raise UsageError(f"{twice[0]!r} is there twice in transfers, exports or contention", advice="keep one of the two")
    return Problem(
        unit=file.unit,
        devices=[
            PlacedDevice(name=each.name, count=each.count, memory_bytes=math.inf if each.memory_bytes is None else each.memory_bytes)
            for each in file.devices
        ],
        choices=[Choice(name=each.name, target=each.target, device=each.device) for each in file.choices],
        nodes=[Node(id=each.id, costs=each.costs, memory_bytes=each.memory_bytes, colocation=each.colocation) for each in file.nodes],
        edges=[Edge(source=each.source, reader=each.reader, bytes=each.bytes, tensor=each.tensor) for each in file.edges],
        transfers={(each.source, each.reader): Move(each.fixed, each.per_byte) for each in file.transfers},
        exports={each.target: Move(each.fixed, each.per_byte) for each in file.exports},
        unsupported=frozenset((one, other) for one, other in file.unsupported_pairs),
        contention={(each.device, each.beside): each.factor for each in file.contention},
    )


def problem_to_json(problem: Problem) -> str:
    """Return the problem as text that `problem_from_json` reads back as the same problem."""
    file: dict[str, Any] = {
        "schema": 1,
        "unit": problem.unit,
        "devices": [
            {"name": each.name, "count": each.count} | ({} if each.memory_bytes == math.inf else {"memory_bytes": each.memory_bytes})
            for each in problem.devices
        ],
        "choices": [{"name": each.name, "target": each.target, "device": each.device} for each in problem.choices],
        "nodes": [
            {"id": each.id, "costs": dict(each.costs)}
            | ({"memory_bytes": each.memory_bytes if isinstance(each.memory_bytes, float | int) else dict(each.memory_bytes)})
            | ({} if each.colocation is None else {"colocation": each.colocation})
            for each in problem.nodes
        ],
        "edges": [
            {"from": each.source, "to": each.reader, "bytes": each.bytes} | ({"tensor": each.tensor} if each.tensor else {})
            for each in problem.edges
        ],
        "transfers": [
            {"from": pair[0], "to": pair[1], "fixed": move.fixed, "per_byte": move.per_byte} for pair, move in problem.transfers.items()
        ],
        "exports": [{"target": name, "fixed": move.fixed, "per_byte": move.per_byte} for name, move in problem.exports.items()],
        "unsupported_pairs": sorted([one, other] for one, other in problem.unsupported),
        "contention": [{"device": pair[0], "beside": pair[1], "factor": factor} for pair, factor in problem.contention.items()],
    }
    return json.dumps(file, allow_nan=False, indent=1)


def _published(file: _Published) -> Problem:
    """Translate: an accelerator pays `cost` once to send a result to host memory and once to fetch one; a CPU core pays nothing.

    The published `cost` is a time, not a size, so it stands in for the bytes at one unit of time a byte.
    """
    if any(each.isBackwardNode for each in file.nodes):
        raise UsageError("the instance is a training workload (isBackwardNode)", advice="use an inference workload")
    acc, cpu = "acc", "cpu"
    costs = {
        each.id: ({acc: each.fpgaLatency} if each.supportedOnFpga and file.maxFPGAs else {})
        | ({cpu: each.cpuLatency} if file.maxCPUs else {})
        for each in file.nodes
    }
    both = [(acc, file.maxFPGAs, file.maxSizePerFPGA), (cpu, file.maxCPUs, math.inf)]
    here = [name for name, count, _ in both if count]
    return Problem(
        unit="ms",
        devices=[PlacedDevice(name=name, count=count, memory_bytes=memory) for name, count, memory in both if count],
        choices=[Choice(name=name, target=name, device=name) for name in here],
        nodes=[
            Node(
                id=str(each.id),
                costs=costs[each.id],
                memory_bytes=each.size,
                colocation=None if each.colorClass is None else str(each.colorClass),
            )
            for each in file.nodes
        ],
        edges=[Edge(source=str(each.sourceId), reader=str(each.destId), bytes=each.cost) for each in file.edges],
        transfers={(one, other): Move(0.0, 1.0 if other == acc else 0.0) for one in here for other in here},
        exports={acc: Move(0.0, 1.0)} if acc in here else {},
    )
