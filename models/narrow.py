"""Inputs taken in fewer bits than the model has them, and widened where it runs: another contract with callers, only where asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from aivmm.errors import UsageError
from aivmm.models.input_contract import MODEL, PIXELS, InputContract, Normalisation
from aivmm.models.records import Taken

_WIDE = (ir.DataType.FLOAT, ir.DataType.DOUBLE)
_FLOATS = (*_WIDE, ir.DataType.FLOAT16)
_MOST_ELEMENTS = 1 << 22  # of a constant that is looked at: a mean image has some hundred thousand
_PASSED_BY = ("Cast", "Identity", "Dropout", "Transpose", "Reshape", "Unsqueeze", "Squeeze")  # on the way to the first arithmetic
_ARITHMETIC = ("Add", "Sub", "Mul", "Div")
# A network's numbers are about 1: 0 to 255 times more than this is far too large, unless what is subtracted is a brightness of pixels.
_LARGEST_FACTOR = 1 / 32
_BRIGHTNESS = (8.0, 248.0)

_Values = npt.NDArray[np.float64]


def narrow_inputs(model: ir.Model, contract: InputContract, *, shapes: Mapping[str, Sequence[int]], notes: list[str]) -> tuple[Taken, ...]:
    """Take inputs as `contract` asks, and add in front of their readers what turns them into the model's numbers; the notes say which.

    - narrow: each float32 and float64 input that a node reads as float16. Values keep 11 bits of mantissa and have to be below 65504.
    - narrow:uint8: the inputs that the user gave a normalisation for; where there are none, each float input of 1 or 3 channels and rank 4
      whose first nodes are a normalisation of 0 to 255 already, which then are only cast. Normalisations are never made up.

    `shapes` are extents that the user binds.

    Raises:
        UsageError: there is no such input, it is of another kind, or nothing says how its pixels become numbers.
    """
    if contract.kind == MODEL:
        return ()
    taken = _as_pixels(model, contract.normalise, shapes, notes) if contract.kind == PIXELS else _as_half(model)
    if not taken:
        notes.append("--input-contract narrow changes nothing: no input is float32 or float64")
    for each in taken:
        if each.dtype == "float16":
            said = "who calls the plan converts, and numbers are compared with the model on inputs so rounded"
        else:
            inside = f"{each.normalisation} is computed inside" if each.normalisation else "they are only cast inside"
            said = f"who calls the plan gives pixels of 0 to 255, and {inside}"
        notes.append(f"input {each.name} taken as {each.dtype} (--input-contract {contract.kind}): {said}")
    return taken


# --- halves


def _as_half(model: ir.Model) -> tuple[Taken, ...]:
    taken = []
    for value in _readable(model):
        if value.dtype in _WIDE:
            taken.append(Taken(name=str(value.name), model_dtype=_name(value), dtype="float16"))
            _widen(model, value, ir.DataType.FLOAT16, None, ())
    return tuple(taken)


# --- pixels


def _as_pixels(
    model: ir.Model, given: Mapping[str, Normalisation], shapes: Mapping[str, Sequence[int]], notes: list[str]
) -> tuple[Taken, ...]:
    readable = {str(value.name): value for value in _readable(model) if value.dtype in _FLOATS}
    for name in given:
        if name not in readable:
            known = ", ".join(readable) or "none"
            raise UsageError(f"--normalise names {name!r}, which is no input of floats that the model reads", advice=f"there are: {known}")
    chosen = [value for name, value in readable.items() if (name in given if given else _is_image(_extents(value, shapes)))]
    if not chosen:
        what = f"--input-contract {PIXELS}: no input has rank 4 and 1 or 3 channels"
        raise UsageError(what, advice="name the inputs that are pixels with --normalise NAME=MEAN/SCALE")
    taken = []
    for value in chosen:
        name, normalisation = str(value.name), given.get(str(value.name))
        if normalisation is None:
            first = _own_normalisation(value)
            notes.append(f"input {name}: the model's own first nodes ({first}) turn 0 to 255 into its numbers")
        taken.append(Taken(name=name, model_dtype=_name(value), dtype="uint8", normalisation=normalisation))
        _widen(model, value, ir.DataType.UINT8, normalisation, _extents(value, shapes))
    return tuple(taken)


def _readable(model: ir.Model) -> Iterator[ir.Value]:
    outputs = set(model.graph.outputs)
    return (value for value in list(model.graph.inputs) if value not in outputs and value.uses())


def _name(value: ir.Value) -> str:
    assert value.dtype is not None
    return str(value.dtype.numpy().name)


def _extents(value: ir.Value, shapes: Mapping[str, Sequence[int]]) -> tuple[int | None, ...]:
    if (bound := shapes.get(str(value.name))) is not None:
        return tuple(bound)
    return () if value.shape is None else tuple(extent if isinstance(extent, int) else None for extent in value.shape)


def _is_image(extents: Sequence[int | None]) -> bool:
    return len(extents) == 4 and (extents[1] in (1, 3) or extents[3] in (1, 3))


def _own_normalisation(value: ir.Value) -> str:
    """Return the operators with which the model itself normalises pixels of `value`.

    Raises:
        UsageError: its first nodes are no normalisation, or one of other numbers than 0 to 255.
    """
    operators, factor, offset = _first_arithmetic(value)
    advice = f"say how 0 to 255 become its numbers: --normalise {value.name}=MEAN/SCALE, or {value.name}=0/1 where the model takes pixels"
    if not operators:
        what = (
            f"input {value.name!r} cannot be taken as uint8: nothing says how pixels become its numbers, the model does not normalise them"
        )
        raise UsageError(what, advice=advice)
    with np.errstate(divide="ignore", invalid="ignore"):
        zero = -offset / factor
    of_pixels = bool((np.abs(factor) <= _LARGEST_FACTOR).all()) or bool(((zero >= _BRIGHTNESS[0]) & (zero <= _BRIGHTNESS[1])).all())
    if not of_pixels or not np.all(factor):
        what = (
            f"input {value.name!r} cannot be taken as uint8: the model's first nodes ({operators}) are made for other numbers than 0 to 255"
        )
        raise UsageError(what, advice=advice)
    return operators


def _first_arithmetic(value: ir.Value) -> tuple[str, _Values, _Values]:
    """Return the arithmetic with constants that `value` goes through first, its operators and x -> factor * x + offset."""
    factor, offset = np.ones(()), np.zeros(())
    operators: list[str] = []
    while len(uses := list(value.uses())) == 1:
        node, index = uses[0].node, uses[0].idx
        if node.domain or (node.op_type in _PASSED_BY and index):
            break
        if node.op_type in _ARITHMETIC:
            constant = _constant(node.inputs[1 - index])
            if constant is None or (node.op_type == "Div" and index):  # c / x is no normalisation
                break
            try:
                factor, offset = _applied(node.op_type, index, constant, factor, offset)
            except ValueError:  # shapes that do not go together: not for us to judge
                break
            operators.append(node.op_type)
        elif node.op_type not in _PASSED_BY or operators:  # behind a Transpose, channels would be elsewhere
            break
        value = node.outputs[0]
    return ", ".join(operators), factor, offset


def _applied(operator: str, index: int, constant: _Values, factor: _Values, offset: _Values) -> tuple[_Values, _Values]:
    match operator:
        case "Add":
            return factor, offset + constant
        case "Sub":
            return (-factor, constant - offset) if index else (factor, offset - constant)
        case "Mul":
            return factor * constant, offset * constant
        case _:
            with np.errstate(divide="ignore", invalid="ignore"):
                return factor / constant, offset / constant


def _constant(value: ir.Value | None) -> _Values | None:
    tensor: Any = None if value is None or value.is_graph_input() else value.const_value
    if tensor is None or tensor.size > _MOST_ELEMENTS or tensor.dtype not in _FLOATS:
        return None
    return np.asarray(tensor.numpy(), dtype=np.float64)


# --- what is added


def _widen(
    model: ir.Model, value: ir.Value, dtype: ir.DataType, normalisation: Normalisation | None, extents: Sequence[int | None]
) -> None:
    """Declare an input as `dtype`, and let its readers read it cast, less the mean, over the scale. Steps that change nothing are left out.

    The steps are computed in float32 at least: half a float does not hold a mean such as 123.675.
    """
    wide = value.dtype
    assert wide is not None
    computed = ir.DataType.FLOAT if wide == ir.DataType.FLOAT16 and normalisation is not None else wide
    names = {str(made.name) for node in ir.traversal.RecursiveGraphIterator(model.graph) for made in node.outputs}
    names |= {*map(str, model.graph.initializers), *(str(each.name) for each in model.graph.inputs)}
    steps = [_Step("Cast", computed)]
    if normalisation is not None:
        for operator, numbers, nothing in (("Sub", normalisation.mean, 0.0), ("Div", normalisation.scale, 1.0)):
            if any(each != nothing for each in numbers):
                steps.append(_Step(operator, computed, _shaped(value, numbers, extents, computed)))
    if computed != wide:
        steps.append(_Step("Cast", wide))
    readers = list(value.uses())
    anchor, last = model.graph[0], value
    for step in steps:
        last = step.add(model, last, names, anchor, value)
    for use in readers:
        use.node.replace_input_with(use.idx, last)
    value.dtype = dtype


class _Step:
    """One node between an input and its readers."""

    def __init__(self, operator: str, dtype: ir.DataType, constant: npt.NDArray[Any] | None = None) -> None:
        self._operator, self._dtype, self._constant = operator, dtype, constant

    def add(self, model: ir.Model, last: ir.Value, names: set[str], anchor: ir.Node, given: ir.Value) -> ir.Value:
        """Put the node in front of `anchor`, and return what it makes."""
        wish = f"{given.name}.{self._operator.lower()}"
        inputs = [last]
        if self._constant is not None:
            name = _unused(f"{wish}.by", names)
            constant = ir.Value(
                name=name,
                type=ir.TensorType(self._dtype),
                shape=ir.Shape(self._constant.shape),
                const_value=ir.tensor(self._constant, name=name),
            )
            model.graph.register_initializer(constant)
            inputs.append(constant)
        attributes = {"to": int(self._dtype)} if self._operator == "Cast" else {}
        node = ir.node(self._operator, inputs, attributes=attributes, name=wish.replace(".", "/"))
        made = node.outputs[0]
        made.name, made.dtype, made.shape = _unused(wish, names), self._dtype, given.shape
        model.graph.insert_before(anchor, node)
        return made


def _unused(wish: str, names: set[str]) -> str:
    name = wish
    while name in names:
        name += "_"
    names.add(name)
    return name


def _shaped(value: ir.Value, numbers: Sequence[float], extents: Sequence[int | None], dtype: ir.DataType) -> npt.NDArray[Any]:
    """Return numbers so that they meet the channels of an input: on axis 1, or else on the last one."""
    array = np.asarray(numbers, dtype=dtype.numpy())
    if array.size == 1:
        return array.reshape(())
    for axis in (1, len(extents) - 1):
        if 0 < axis < len(extents) and extents[axis] == array.size:
            return array.reshape((array.size,) + (1,) * (len(extents) - axis - 1))
    known = ", ".join("?" if each is None else str(each) for each in extents)
    raise UsageError(
        f"--normalise gives {array.size} numbers for input {value.name!r} of shape [{known}], which has not so many channels",
        advice="channels are on axis 1 or on the last one; bind open extents with --shape",
    )
