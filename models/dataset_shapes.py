"""What the samples of a data set say of the shapes to tune for, where they have another shape than the one that the model was bound to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from aivmm.errors import UsageError
from aivmm.tensors import TensorSpec

Shape = tuple[int, ...]
Declared = Mapping[str, tuple[int | str, ...]]  # by input: numbers, the names of open dimensions, and "" for those without a name

_FEW = 4  # so many extents are each worth a plan of their own
_MOST = 16  # shapes of one bundle
_NAME = re.compile(r"[^\s,=+*/()]+")  # what --dim takes as a name, and no arithmetic


def declared_inputs(path: Path) -> Declared:
    """Return the extents of each input as the model's file has them; inputs without a rank are left out. Raises as `load_model`."""
    from aivmm.models.load import load_model  # here: it loads onnx, and whoever reads a data set need not

    found: dict[str, tuple[int | str, ...]] = {}
    for value in load_model(path).proto.graph.input:
        if value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            found[value.name] = tuple(each.dim_value if each.HasField("dim_value") else each.dim_param.strip() for each in dims)
    return found


@dataclass(slots=True)
class ShapeSurvey:
    """Counts the extents that samples have where a model's file leaves them open. `specs` are the inputs as they were bound."""

    specs: Sequence[TensorSpec]
    declared: Declared
    _extents: dict[str, dict[int, int]] = field(default_factory=dict)  # by dimension: how many samples have each extent
    _bound: dict[str, int] = field(default_factory=dict)
    _shapes: dict[str, set[Shape]] = field(default_factory=dict)  # by input, where nameless axes differ

    def add(self, shapes: Mapping[str, Shape], count: int = 1) -> bool:
        """Count `count` samples of `shapes` (by input), whole or without a leading 1; False where the model takes them in no size."""
        found: dict[str, int] = {}
        bound_to: dict[str, int] = {}
        whole: dict[str, Shape] = {}
        for spec in self.specs:
            shape = shapes.get(spec.name)
            declared = self.declared.get(spec.name)
            if shape is None or declared is None or len(declared) != len(spec.shape):
                return False
            if len(shape) == len(declared) - 1 and spec.shape[0] == 1:
                shape = (1, *shape)
            if len(shape) != len(declared):
                return False
            for axis, (extent, known, bound) in enumerate(zip(shape, declared, spec.shape, strict=True)):
                if isinstance(known, int) and known > 0:
                    if extent != known:
                        return False
                    continue
                if bound is None:
                    continue  # it takes any
                name = known if isinstance(known, str) and _NAME.fullmatch(known) else f"{spec.name}[{axis}]"
                if found.setdefault(name, extent) != extent:
                    return False  # the inputs of one sample disagree
                bound_to[name] = bound
            whole[spec.name] = shape
        for name, extent in found.items():
            counted = self._extents.setdefault(name, {})
            counted[extent] = counted.get(extent, 0) + count
        for name, shape in whole.items():
            self._shapes.setdefault(name, set()).add(shape)
        self._bound |= bound_to
        return True

    def add_bound(self, count: int) -> None:
        """Count samples that have the shape that the model was bound to."""
        if count:
            self.add({each.name: tuple(extent or 0 for extent in each.shape) for each in self.specs}, count)

    def refusal(self, given: str) -> UsageError | None:
        """Return what to say of a data set that does not fit, with the options to add; None where all that was counted does fit."""
        moving = {name: sorted(each) for name, each in self._extents.items() if set(each) != {self._bound[name]}}
        if not moving:
            return None
        several = any(len(each) > 1 for each in moving.values())
        found = "; ".join(_said(name, extents) for name, extents in moving.items())
        bound = ", ".join(f"{name}={self._bound[name]}" for name in moving)
        what = f"{given}: its samples have {'several shapes' if several else 'another shape'} ({found}), and the model is bound to {bound}"
        return UsageError(what, advice=f"{'tune for several' if several else 'add'}: {self._options(moving)}")

    def _options(self, moving: Mapping[str, Sequence[int]]) -> str:
        most = _most_each(len([each for each in moving.values() if len(each) > 1]))
        dims = [f"--dim {name}={_listed(suggested(each, most))}" for name, each in moving.items() if not name.endswith("]")]
        nameless = {name.rpartition("[")[0] for name in moving if name.endswith("]")}
        shapes = []
        for name in sorted(nameless):
            seen = sorted(self._shapes[name])
            ends = dict.fromkeys((seen[0], seen[-1]) if len(seen) > _FEW else seen)
            shapes.append(f"--shape {name}={','.join('x'.join(map(str, each)) for each in ends)}")
        return " ".join((*dims, *shapes))


def suggested(extents: Sequence[int], most: int = _MOST) -> list[int]:
    """Return the extents to tune for, given those that samples have: all where they are few, else the largest and its neighbours by twos.

    Powers of two between which no sample lies are left out, and so is an extent of 0, which no model is tuned for. At most `most`, the
    larger ones.
    """
    known = sorted({each for each in extents if each > 0}) or [1]
    if len(known) <= min(_FEW, most):
        return known
    rising = [*(1 << power for power in range(known[0].bit_length() - 1, known[-1].bit_length()) if 1 << power < known[-1]), known[-1]]
    kept, below = [], 0
    for each in rising:
        if any(below < extent <= each for extent in known):
            kept.append(each)
        below = each
    return kept[-most:]


def _most_each(dimensions: int) -> int:
    """Return how many extents each of several dimensions may have, since every one is combined with those of the others."""
    return max(1, int(_MOST ** (1 / max(1, dimensions))))


def _listed(extents: Iterable[int]) -> str:
    return ",".join(map(str, extents))


def _said(name: str, extents: Sequence[int]) -> str:
    if len(extents) <= _FEW:
        return f"{name}={_listed(extents)}"
    return f"{name}={extents[0]} to {extents[-1]}, {len(extents)} different"
