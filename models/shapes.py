"""Binds a model's open extents: what the user says, then the batch, then names that say what they are, then what the graph accepts.

Nothing is guessed without a note that names the option to choose otherwise, and what cannot be guessed is asked for with the option to add.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from aivmm.errors import UsageError
from aivmm.models.intake_search import Found, search

SEQUENCE_DEFAULT = 128
IMAGE_DEFAULT = 224

_BATCH = re.compile(r"^(n|b|bs|bsz)$|batch", re.IGNORECASE)
_SEQUENCE = re.compile(r"seq|token|time|frame|length|(^|_)len($|_)|(^|_)t$", re.IGNORECASE)
_IMAGE = re.compile(r"^(h|w)$|height|width|^(image|img)(_?size)?$", re.IGNORECASE)
_NOT_BATCH = re.compile(r"node|edge|point|box|roi|atom|sample|word|char|channel|feature", re.IGNORECASE)
# Names that exporters invent say nothing: tf2onnx's unk__12, PyTorch's input_dynamic_axes_1, Linear_dim_0 and s0.
_INVENTED = re.compile(r"^(unk__\d+|.*_dynamic_axes_\d+|.*_dim_\d+|s\d+|d\d+|dim_?\d+)$", re.IGNORECASE)
_STATE = re.compile(r"state|hidden|cell|cache|(^|_)(h|c)_?(0|n|in)?$", re.IGNORECASE)
_NAMELESS = ("", "?", "-1", "None", "none", "*")


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenInput:
    """A model input as its file declares it: extents are numbers, symbols, or None; the whole is None when even the rank is unknown."""

    name: str
    dims: tuple[int | str | None, ...] | None
    image_like: bool = False  # a floating point tensor of rank 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """What was decided."""

    shapes: Mapping[str, tuple[int, ...]]  # one for each input
    symbols: Mapping[str, int]
    batch: int
    batchable: bool
    notes: tuple[str, ...]


class Asks(Protocol):
    """What a trial run can tell; see `aivmm.models.intake_trial.Trial`. A protocol, since binding needs no runtime to be tested."""

    reason: str

    def extents(self) -> frozenset[int]: ...
    def accepts(self, shapes: Mapping[str, tuple[int, ...]]) -> bool | None: ...


def bind(inputs: Sequence[OpenInput], *, shapes: Mapping[str, tuple[int, ...]], dims: Mapping[str, int], batch: int, trial: Asks) -> Bound:
    """Return a number for every extent of every input.

    Raises `UsageError` for a shape or dimension that does not fit, and for extents that cannot be guessed, with the options to add.
    """
    binding = _Binding(inputs)
    binding.take_shapes(shapes)
    binding.take_dims(dims)
    binding.take_batch(batch)
    binding.guess(trial)
    return binding.result()


def names_the_batch(symbol: str) -> bool:
    """Say whether an open dimension of this name is the batch by its name alone."""
    return bool(_BATCH.search(symbol)) and not _SEQUENCE.search(symbol)


@dataclass(slots=True)
class _Axis:
    """One extent to be bound: every place with the same symbol, or one nameless place."""

    key: str  # the symbol, or "input[1]"
    symbol: str | None
    places: list[tuple[str, int]] = field(default_factory=list)

    def __str__(self) -> str:
        name, index = self.places[0]
        return f"dimension {self.symbol!r} of input {name!r}" if self.symbol else f"axis {index} of input {name!r}"


class _Binding:
    def __init__(self, inputs: Sequence[OpenInput]) -> None:
        self.inputs = {given.name: given for given in inputs}
        self.dims: dict[str, list[int | str] | None] = {}  # numbers, keys of axes, or expressions of symbols
        self.axes: dict[str, _Axis] = {}
        self.formulas: dict[str, ast.Expression] = {}
        self.values: dict[str, int] = {}
        self.source: dict[str, str] = {}  # where a value came from, for conflicts
        self.batch_keys: list[str] = []
        self.notes: list[str] = []
        for given in inputs:
            self.dims[given.name] = None if given.dims is None else [self._key(given, i, dim) for i, dim in enumerate(given.dims)]

    def _key(self, given: OpenInput, index: int, dim: int | str | None) -> int | str:
        if isinstance(dim, int) and dim >= 0:  # 0 is an extent like any other: an empty cache, say
            return dim
        symbol = dim.strip() if isinstance(dim, str) else ""
        if symbol in _NAMELESS:
            key = f"{given.name}[{index}]"
            self.axes[key] = _Axis(key, None, [(given.name, index)])
            return key
        formula = _formula(symbol)
        if formula is not None:
            self.formulas[symbol] = formula
            for name in _names(formula):
                self.axes.setdefault(name, _Axis(name, name)).places.append((given.name, index))
            return symbol
        self.axes.setdefault(symbol, _Axis(symbol, symbol)).places.append((given.name, index))
        return symbol

    # --- what the user says

    def take_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        for name, shape in shapes.items():
            option = f"--shape {name}={_x(shape)}"
            if name not in self.inputs:
                raise UsageError(f"{option}: no input is named {name!r}", advice=f"the inputs are {_list(self.inputs)}")
            if any(extent < 1 for extent in shape):
                raise UsageError(f"{option}: extents must be at least 1")
            dims = self.dims[name]
            if dims is None:
                self.dims[name] = list(shape)
                continue
            if len(shape) != len(dims):
                advice = f"give {len(dims)} extents: {self._example(name)}" if dims else "leave --shape away: the input is a scalar"
                raise UsageError(f"{option}: input {name!r} has {len(dims)} axes, not {len(shape)}", advice=advice)
            for index, (extent, dim) in enumerate(zip(shape, dims, strict=True)):
                if isinstance(dim, int) and dim != extent:
                    raise UsageError(
                        f"{option}: axis {index} of input {name!r} is fixed at {dim}, not {extent}", advice=self._example(name)
                    )
                if isinstance(dim, str) and dim in self.axes:
                    self._set(dim, extent, option)
                elif isinstance(dim, str):
                    dims[index] = extent  # an expression: the user's number stands

    def take_dims(self, dims: Mapping[str, int]) -> None:
        symbols = [axis.symbol for axis in self.axes.values() if axis.symbol]
        for name, extent in dims.items():
            if name not in symbols:
                known = f"the dimensions are {_list(symbols)}" if symbols else "the model has no named dimensions; use --shape"
                raise UsageError(f"--dim {name}={extent}: no input has a dimension {name!r}", advice=known)
            if extent < 1:
                raise UsageError(f"--dim {name}={extent}: an extent must be at least 1")
            self._set(name, extent, f"--dim {name}={extent}")

    def _set(self, key: str, extent: int, source: str) -> None:
        if self.values.get(key, extent) != extent:
            raise UsageError(f"{source} conflicts with {self.source[key]}: {self.axes[key]} cannot be both {extent} and {self.values[key]}")
        self.values[key] = extent
        self.source[key] = source

    # --- the batch

    def take_batch(self, batch: int) -> None:
        if batch < 1:
            raise UsageError(f"batch {batch} is not possible: it must be at least 1")
        self.batch_keys = [key for key in self.axes if self._is_batch(self.axes[key])]
        for key in self.batch_keys:
            if key in self.values and batch not in (1, self.values[key]):
                raise UsageError(f"{self.source[key]} conflicts with batch {batch}")
            if key not in self.values:
                self.values[key] = batch
                self.source[key] = f"batch {batch}"
                self.notes.append(f"{self.axes[key]} taken for the batch and bound to {batch}")
        fixed = self._fixed_batch()
        if not self.batch_keys and batch not in (1, fixed):
            raise UsageError(f"batch {batch} is not possible: the model has no open batch dimension", advice=f"use batch {fixed}")

    def _fixed_batch(self) -> int:
        """Return the batch of a model that leaves none open: what its images have in front, all the same; else 1."""
        leading = {given.dims[0] for given in self.inputs.values() if given.image_like and given.dims}
        first = next(iter(leading), 1)
        return first if len(leading) == 1 and isinstance(first, int) and first > 0 else 1

    def _is_batch(self, axis: _Axis) -> bool:
        if axis.symbol and _BATCH.search(axis.symbol):
            return names_the_batch(axis.symbol)
        if axis.symbol and any(pattern.search(axis.symbol) for pattern in (_SEQUENCE, _IMAGE, _NOT_BATCH)):
            return False
        if axis.symbol is None or _INVENTED.match(axis.symbol):
            # A recurrent state is [layers, batch, size], its layers fixed.
            return any(index == 0 or (index == 1 and self._is_state(name)) for name, index in axis.places)
        # A symbol that says nothing known: the batch if it leads every input that has an open axis, and nothing else is called the batch.
        if any(other.symbol and _BATCH.search(other.symbol) for other in self.axes.values()):
            return False
        leading = [name for name, index in axis.places if index == 0]
        return all(name in leading for name, dims in self.dims.items() if dims and any(isinstance(dim, str) for dim in dims))

    def _is_state(self, name: str) -> bool:
        dims = self.dims[name]
        return dims is not None and len(dims) == 3 and isinstance(dims[0], int) and isinstance(dims[2], int) and bool(_STATE.search(name))

    # --- guesses

    def guess(self, trial: Asks) -> None:
        """Give the axes left their usual extents if the model runs with them; else look for what it accepts; else ask."""
        rankless = [name for name, dims in self.dims.items() if dims is None]
        if rankless:
            wishes = " ".join(f"--shape {name}=1x3x224x224" for name in rankless)
            raise UsageError(f"the rank of input {rankless[0]!r} is not known", advice=f"add its shape, e.g. {wishes}")
        left = [key for key in self.axes if key not in self.values]
        if not left:
            return
        usual = self._usual(left)
        open_keys = [key for key in left if key not in usual]
        self.values |= usual
        if not open_keys:
            verdict = trial.accepts(self._shapes())
            if verdict is not False:
                self._tell_usual(usual, "" if verdict else f" (not tried: {trial.reason or 'no trial run was possible'})")
                return
        group = open_keys or list(usual)
        values = {usual.get(key) for key in group}
        found = self._search(group, usual.get(group[0]), trial) if len(group) == 1 or (not open_keys and len(values) == 1) else None
        if found is None:
            raise self._ask(group, usual, trial)
        self._tell_usual({key: value for key, value in usual.items() if key not in group}, "")
        for key in group:
            self.values[key] = found.extent
            self.notes.append(f"{self.axes[key]} guessed {found.extent}: {found.why}; use {self._option(key, found.extent)} to choose")

    def _usual(self, keys: Iterable[str]) -> dict[str, int]:
        """The stated defaults, for axes whose name (or place in an image) says what they are."""
        usual: dict[str, int] = {}
        for key in keys:
            axis = self.axes[key]
            if axis.symbol and _SEQUENCE.search(axis.symbol):
                usual[key] = SEQUENCE_DEFAULT
            elif (axis.symbol and _IMAGE.search(axis.symbol)) or self._is_picture_side(axis):
                usual[key] = IMAGE_DEFAULT
        past, own = (next((key for key in self.axes if pattern.match(key)), None) for pattern in (_PAST, _OWN))
        for key in usual:  # a decoder's attention mask spans the cached tokens and the new ones
            if _TOTAL.match(key) and past is not None and own is not None:
                usual[key] = self.values.get(past, usual.get(past, 0)) + self.values.get(own, usual.get(own, 0))
        return usual

    def _is_picture_side(self, axis: _Axis) -> bool:
        name, index = axis.places[0]
        dims = self.dims[name]
        if (axis.symbol and not _INVENTED.match(axis.symbol)) or dims is None or not self.inputs[name].image_like:
            return False
        return (dims[1] in (1, 3, 4) and index in (2, 3)) or (dims[3] in (1, 3, 4) and index in (1, 2))

    def _search(self, group: Sequence[str], usual: int | None, trial: Asks) -> Found | None:
        def accepts(extent: int) -> bool | None:
            self.values |= dict.fromkeys(group, extent)
            try:
                return trial.accepts(self._shapes())
            except UsageError:  # an expression of this extent is below 1
                return False

        # The sides of a picture grow together, so the cost grows with the square.
        found = search(accepts, mentioned=trial.extents(), usual=usual, limit=4096 if len(group) == 1 else 1024)
        for key in group:
            del self.values[key]
        return found

    def _tell_usual(self, usual: Mapping[str, int], doubt: str) -> None:
        for key, extent in usual.items():
            self.notes.append(f"{self.axes[key]} set to the default {extent}{doubt}; use {self._option(key, extent)} to choose")

    def _ask(self, group: Sequence[str], usual: Mapping[str, int], trial: Asks) -> UsageError:
        options = dict.fromkeys(self._option(key, usual.get(key, SEQUENCE_DEFAULT)) for key in group)
        what = " and ".join(str(self.axes[key]) for key in group)
        verb = "is" if len(group) == 1 else "are"
        refused = all(key in usual for key in group)
        tried = ", ".join(str(extent) for extent in dict.fromkeys(usual[key] for key in group)) if refused else ""
        because = f" (the model does not run with {tried}: {trial.reason or 'its results are not finite'})" if refused else ""
        return UsageError(f"{what} {verb} not known{because}", advice=f"add {' '.join(options)}")

    # --- words and results

    def _option(self, key: str, extent: int) -> str:
        axis = self.axes[key]
        return f"--dim {axis.symbol}={extent}" if axis.symbol else self._example(axis.places[0][0])

    def _example(self, name: str) -> str:
        dims = self.dims[name] or []
        usual = self._usual(key for key in self.axes if key not in self.values)
        extents = [dim if isinstance(dim, int) else self.values.get(dim, usual.get(dim, SEQUENCE_DEFAULT)) for dim in dims]
        for index, dim in enumerate(dims):
            if isinstance(dim, str) and dim not in self.values and dim in self.axes and self._is_batch(self.axes[dim]):
                extents[index] = 1
        return f"--shape {name}={_x(extents)}"

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(self._number(name, index, dim) for index, dim in enumerate(dims or ())) for name, dims in self.dims.items()}

    def _number(self, name: str, index: int, dim: int | str) -> int:
        if isinstance(dim, int):
            return dim
        if dim in self.values:
            return self.values[dim]
        extent = _value(self.formulas[dim], self.values)
        if extent < 1:
            raise UsageError(f"axis {index} of input {name!r} is {dim!r}, which is {extent} here: an extent must be at least 1")
        return extent

    def result(self) -> Bound:
        batches = {self.values[key] for key in self.batch_keys}
        named = {axis.symbol: self.values[key] for key, axis in self.axes.items() if axis.symbol}
        return Bound(
            shapes=self._shapes(),
            symbols=named,
            batch=batches.pop() if len(batches) == 1 else self._fixed_batch() if not batches else 1,
            batchable=bool(self.batch_keys) and len({self.values[key] for key in self.batch_keys}) == 1,
            notes=tuple(self.notes),
        )


_PAST = re.compile(r"^past_(seq|sequence|kv)\w*$|^past$", re.IGNORECASE)
_OWN = re.compile(r"^(seq|sequence|seq_len|sequence_length|seq_length)$", re.IGNORECASE)
_TOTAL = re.compile(r"^total_(seq|sequence|kv)\w*$", re.IGNORECASE)


def _formula(symbol: str) -> ast.Expression | None:
    """`symbol` as arithmetic over names ("past_length + 1", as exporters write it), or None when it is a plain name or no arithmetic."""
    try:
        tree = ast.parse(symbol, mode="eval")
    except (SyntaxError, ValueError):
        return None
    if isinstance(tree.body, ast.Name) or not _names(tree):
        return None
    allowed = (ast.Expression, ast.BinOp, ast.Name, ast.Load, ast.Constant, ast.Add, ast.Sub, ast.Mult, ast.FloorDiv)
    nodes = list(ast.walk(tree))
    whole = all(isinstance(node.value, int) for node in nodes if isinstance(node, ast.Constant))
    return tree if whole and all(isinstance(node, allowed) for node in nodes) else None


def _names(tree: ast.AST) -> list[str]:
    return list(dict.fromkeys(node.id for node in ast.walk(tree) if isinstance(node, ast.Name)))


def _value(tree: ast.AST, values: Mapping[str, int]) -> int:
    match tree:
        case ast.Expression(body=body):
            return _value(body, values)
        case ast.Name(id=name):
            return values[name]
        case ast.Constant(value=int(number)):
            return number
        case ast.BinOp(left=left, op=op, right=right):
            a, b = _value(left, values), _value(right, values)
            match op:
                case ast.Add():
                    return a + b
                case ast.Sub():
                    return a - b
                case ast.Mult():
                    return a * b
            return a // b if b else 0
    raise TypeError(f"not arithmetic: {ast.dump(tree)}")


def _x(shape: Iterable[int]) -> str:
    return "x".join(str(extent) for extent in shape)


def _list(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)
