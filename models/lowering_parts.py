"""Parts of a lowered model: which operators were lowered, what noise each block of them adds, and the model with some left as they were.

A tool lowers by putting QuantizeLinear and DequantizeLinear (and, for SmoothQuant, a Mul) before operators that keep their names. So an
operator is left as it was by giving it back the operands that it had, and no tool runs again: one calibration serves every mixture.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from filelock import FileLock
from onnx_ir.passes import common

from aivmm.errors import Unsupported
from aivmm.models import lowering_model as shared
from aivmm.models.lowering import base_of
from aivmm.models.lowering_recipes import Recipe

Sample = Mapping[str, npt.NDArray[Any]]

HOPELESS = 1e30  # the noise of outputs that are not finite, as a number that JSON has


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Neighbouring blocks whose operators are lowered together, and the noise that they alone add.

    `noise` is ||x - r||^2 / ||r||^2 of the outputs, the worst output's, its mean over the samples: what independent parts add sums up.
    """

    first: int  # block
    last: int  # block, included
    nodes: tuple[str, ...]  # lowered operators, by the names that lowered models keep
    noise: float


def mixed(base: ir.Model, whole: ir.Model, plain: Collection[str]) -> ir.Model:
    """Return `base` lowered as it is in `whole`, but for the nodes named in `plain`. `base` is changed, and returned.

    Raises:
        Unsupported: `whole` does not correspond: it is no model in which operators kept their names.
    """
    ours, theirs = {node.name: node for node in base.graph}, _corresponding(base, whole)
    copier = _Copier(base, ours)
    for name, node in ours.items():
        other = theirs.get(name)
        if other is None or name in plain or other.op_type != node.op_type:
            continue
        copier.copy_operands(other, node)
    common.TopologicalSortPass()(base)
    common.RemoveUnusedNodesPass()(base)
    return base


def touched(base: ir.Model, whole: ir.Model) -> list[str]:
    """Return the names of the operators of `base` that read something else in `whole`, in the order of `base`.

    Those that have no weights of their own are among them: an Add of two quantized values adds to the noise, too.
    """
    ours, theirs = {node.name for node in base.graph}, _corresponding(base, whole)
    found = []
    for node in base.graph:
        other = theirs.get(node.name)
        if other is not None and other.op_type == node.op_type and any(_is_inserted(value, ours) for value in other.inputs):
            found.append(str(node.name))
    return found


def _corresponding(base: ir.Model, whole: ir.Model) -> dict[str | None, ir.Node]:
    """Return the nodes of a lowered model by name; it must still have every operator with weights. (A Relu may be gone in a range.)"""
    theirs = {node.name: node for node in whole.graph}
    for node in base.graph:
        other = theirs.get(node.name)
        if node.op_type in shared.WORK and (other is None or other.op_type != node.op_type):
            raise Unsupported("this way of lowering replaces operators: it cannot be applied to some of them only")
    return theirs


def _is_inserted(value: ir.Value | None, ours: Collection[str | None]) -> bool:
    producer = None if value is None else value.producer()
    return producer is not None and producer.name not in ours


class _Copier:
    """Copies what a tool put before operators from one graph into another."""

    def __init__(self, base: ir.Model, ours: Mapping[str | None, ir.Node]) -> None:
        self._base = base
        self._ours = ours
        self._values = {value.name: value for node in base.graph for value in node.outputs}
        self._values |= {value.name: value for value in base.graph.inputs}
        self._constants = dict(base.graph.initializers)
        self._taken = {*self._values, *self._constants}
        self._copies: dict[ir.Value, ir.Value] = {}

    def copy_operands(self, other: ir.Node, node: ir.Node) -> None:
        """Give `node` the operands that its counterpart `other` has."""
        if len(other.inputs) > len(node.inputs):
            node.resize_inputs(len(other.inputs))
        for index, value in enumerate(other.inputs):
            if value is not None:
                node.replace_input_with(index, self._copied(value))

    def _copied(self, value: ir.Value) -> ir.Value:
        if value not in self._copies:
            self._copies[value] = self._copy(value)
        return self._copies[value]

    def _copy(self, value: ir.Value) -> ir.Value:
        producer = value.producer()
        if producer is None:
            return self._constant(value) if value.const_value is not None else self._known(value.name)
        if producer.name in self._ours:  # a value of the model itself, under its old name or another
            same = self._values.get(value.name)
            return same if same is not None else self._ours[producer.name].outputs[value.index() or 0]
        operands = [None if each is None else self._copied(each) for each in producer.inputs]
        made = ir.Node(
            producer.domain,
            producer.op_type,
            operands,
            [ir.Attr(each.name, each.type, each.value) for each in producer.attributes.values()],
            num_outputs=len(producer.outputs),
            name=self._free(f"{producer.name}"),
        )
        for old, new in zip(producer.outputs, made.outputs, strict=True):
            new.name, new.type, new.shape = self._free(f"{old.name}"), old.type, old.shape
            self._copies[old] = new
        self._base.graph.append(made)
        return self._copies[value]

    def _known(self, name: str | None) -> ir.Value:
        if name not in self._values:
            raise Unsupported(f"the lowered model reads {name!r}, which the model does not have")
        return self._values[name]

    def _constant(self, value: ir.Value) -> ir.Value:
        tensor = value.const_value
        assert tensor is not None
        same = self._constants.get(str(value.name))
        if same is not None and same.const_value is not None and _equal(same.const_value, tensor):
            return same
        name = self._free(str(value.name))
        made = ir.Value(name=name, type=value.type or ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape), const_value=tensor)
        self._base.graph.register_initializer(made)
        return made

    def _free(self, name: str) -> str:
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name


def _equal(one: ir.TensorProtocol, other: ir.TensorProtocol) -> bool:
    return one.dtype == other.dtype and tuple(one.shape) == tuple(other.shape) and one.tobytes() == other.tobytes()


# --- how much noise each part adds


class Taken:
    """A lowered model taken apart: the noise of its parts, and of any mixture of them with the model as it was.

    Keeps the model as the tool was given it on disk meanwhile: a mixture is made of what is read anew each time.
    """

    def __init__(self, prepared: Path, whole: Path, recipe: Recipe) -> None:
        self.complete = False  # all parts were measured
        self._prepared, self._whole, self._recipe = prepared, whole, recipe
        self._shop = contextlib.ExitStack()

    def __enter__(self) -> Taken:
        with contextlib.ExitStack() as entered:
            self._enter(entered)
            self._shop = entered.pop_all()
        return self

    def _enter(self, entered: contextlib.ExitStack) -> None:
        beside = self._whole.with_suffix(".parts")
        entered.enter_context(FileLock(beside.with_name(f"{beside.name}.lock")))  # a second process waits, and reads what the first wrote
        for left in beside.parent.glob(f"{shared.workshop_prefix(beside)}*"):
            shutil.rmtree(left, ignore_errors=True)
        self._folder = entered.enter_context(shared.workshop(beside))
        self._base = self._folder / "base.onnx"
        shared.save(base_of(self._prepared, self._recipe), self._base)
        self.names = touched(shared.read(self._base), shared.read(self._whole))

    def __exit__(self, *error: object) -> None:
        self._shop.close()

    def parts(
        self, blocks: Sequence[tuple[int, int]], samples: Sequence[Sample], references: Sequence[Sample], *, most: int, limit_s: float
    ) -> Iterator[Part]:
        """Yield the parts, at most `most`, each with the noise that it alone adds. `blocks` are runs of nodes of the prepared model.

        What is not measured within `limit_s` seconds is left out.
        """
        deadline = perf_counter() + limit_s
        for first, last, nodes in _grouped(shared.read(self._prepared), shared.read(self._base), self.names, blocks, most):
            if perf_counter() > deadline:
                return
            found = self.noise(set(self.names).difference(nodes), samples, references)
            yield Part(first=first, last=last, nodes=tuple(nodes), noise=found)
        self.complete = True

    def keep(self, path: Path, text: str) -> None:
        """Write `text` to `path`, whole or not at all; what a killed process leaves of it is swept with the folder."""
        draft = self._folder / "kept"
        with draft.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(path)

    def noise(self, plain: Collection[str], samples: Sequence[Sample], references: Sequence[Sample]) -> float:
        """Return the noise of the lowered model with the nodes `plain` as they were, computed by ONNX Runtime on its CPU.

        `HOPELESS` when an output is not finite.
        """
        path = self._folder / "part.onnx"
        shared.save(mixed(shared.read(self._base), shared.read(self._whole), plain), path)
        session = shared.must_load(path, optimised=True)
        found = []
        for sample, reference in zip(samples, references, strict=True):
            made = session.run(list(reference), dict(sample))
            found.append(max((_noise(x, r) for x, r in zip(made, reference.values(), strict=True)), default=0.0))
        return min(float(np.mean(found)), HOPELESS)


def _noise(actual: npt.NDArray[Any], reference: npt.NDArray[Any]) -> float:
    if np.asarray(reference).dtype.kind not in "fc":
        return float(np.mean(np.asarray(actual) != np.asarray(reference))) if np.size(reference) else 0.0
    r, x = np.asarray(reference, np.float64).ravel(), np.asarray(actual, np.float64).ravel()
    usable = np.isfinite(r)
    if not np.isfinite(x[usable]).all():
        return float("inf")
    power = float(r[usable] @ r[usable])
    difference = x[usable] - r[usable]
    error = float(difference @ difference)
    return error / power if power else (0.0 if error == 0 else float("inf"))


def _grouped(
    prepared: ir.Model, base: ir.Model, names: Sequence[str], blocks: Sequence[tuple[int, int]], most: int
) -> list[tuple[int, int, list[str]]]:
    """Gather lowered operators by the block that they stand in, and neighbouring blocks until at most `most` groups are left."""
    place = {value.name: index for index, node in enumerate(prepared.graph) for value in node.outputs}
    outputs = {node.name: [value.name for value in node.outputs] for node in base.graph}
    found: dict[int, list[str]] = {}
    block = 0
    for name in names:
        position = next((place[each] for each in outputs[name] if each in place), None)
        if position is not None:  # what the converter renamed stands beside its neighbour
            block = next((index for index, (first, last) in enumerate(blocks) if first <= position <= last), block)
        found.setdefault(block, []).append(name)
    groups = [(index, index, nodes) for index, nodes in sorted(found.items())]
    while len(groups) > max(1, most):
        at = min(range(len(groups) - 1), key=lambda each: len(groups[each][2]) + len(groups[each + 1][2]))
        (first, _, one), (_, last, other) = groups[at], groups[at + 1]
        groups[at : at + 2] = [(first, last, [*one, *other])]
    return groups
