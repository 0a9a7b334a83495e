"""Fits inputs into the buckets of a model: which is the smallest that takes them, how they are padded, what of the outputs is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from aivmm.errors import UsageError
from aivmm.runtime.backend import Buffer
from aivmm.runtime.family import Bucket, Crop, Dimension, Padding
from aivmm.runtime.inputs import checked, refuse_unknown
from aivmm.tensors import TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitter:
    """What is known of a model's shapes. `specs` are the inputs, with None for each extent that buckets differ in."""

    specs: Mapping[str, TensorSpec]
    buckets: Sequence[Bucket]
    dimensions: Sequence[Dimension]
    crops: Sequence[Crop] = ()
    has_fallback: bool = False

    def take(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Buffer], dict[str, int]]:
        """Return the inputs as arrays, and the extent that they have in each dimension.

        Raises:
            UsageError: an input is missing, unknown, or of another type or rank, or two inputs disagree on a dimension.
        """
        arrays = {name: checked(inputs.get(name), spec, self.specs) for name, spec in self.specs.items()}
        if len(inputs) != len(arrays):
            refuse_unknown(inputs, self.specs)
        extents: dict[str, int] = {}
        for dimension in self.dimensions:
            found = [arrays[name].shape[axis] for name, axis in dimension.places]
            if len(set(found)) > 1:
                said = ", ".join(f"{extent} in {name!r}" for (name, _), extent in zip(dimension.places, found, strict=True))
                raise UsageError(f"the inputs disagree on {dimension.name}: {said}", advice="pad them to one extent first")
            extents[dimension.name] = found[0]
        return arrays, extents

    def choose(self, extents: Mapping[str, int]) -> Bucket | None:
        """Return the bucket of the fewest elements that takes inputs of `extents`; None where the fallback runs them.

        Raises:
            UsageError: nothing does; the known shapes are named.
        """
        fitting = [each for each in self.buckets if self._fits(each, extents)]
        if fitting:
            smallest = min(fitting, key=self._size)
            return None if smallest.smaller == "open" and smallest.extents != extents else smallest
        if self.has_fallback:
            return None
        given = ", ".join(f"{name}={extent}" for name, extent in extents.items())
        raise UsageError(f"nothing here takes {given}", advice=f"the plan knows {self.known()}; tune for more with --dim or --shape")

    def known(self) -> str:
        """Say which shapes there are, and which smaller ones are padded to them."""
        names = ", ".join(each.name for each in self.buckets)
        padded = [each.name for each in self.dimensions if each.padding != "none"]
        return f"{names} ({'smaller ' + ' and '.join(padded) + ' is padded' if padded else 'exactly'})"

    def pad(self, arrays: Mapping[str, Buffer], bucket: Bucket) -> dict[str, Buffer]:
        """Return the inputs in the shape of `bucket`; those that have it already are passed on as they are."""
        return {name: self._padded(name, array, bucket) for name, array in arrays.items()}

    def crop(self, outputs: Mapping[str, Buffer], extents: Mapping[str, int]) -> dict[str, Buffer]:
        """Return what of the outputs belongs to the inputs that were given, in arrays of their own."""
        kept = dict(outputs)
        for crop in self.crops:
            end = crop.times * extents[crop.dimension]
            array = kept[crop.output]
            if array.shape[crop.axis] > end:
                kept[crop.output] = array[(slice(None),) * crop.axis + (slice(end),)]
        return {name: np.ascontiguousarray(array) if array is not outputs[name] else array for name, array in kept.items()}

    def _fits(self, bucket: Bucket, extents: Mapping[str, int]) -> bool:
        return all(
            extents[each.name] == bucket.extents[each.name]
            or (each.padding != "none" and 0 < extents[each.name] < bucket.extents[each.name])
            for each in self.dimensions
        )

    def _size(self, bucket: Bucket) -> int:
        axes = {place: bucket.extents[each.name] for each in self.dimensions for place in each.places}
        return sum(prod(axes.get((name, axis), extent or 1) for axis, extent in enumerate(spec.shape)) for name, spec in self.specs.items())

    def _padded(self, name: str, array: Buffer, bucket: Bucket) -> Buffer:
        for dimension in self.dimensions:
            for place, axis in dimension.places:
                if place == name and array.shape[axis] < bucket.extents[dimension.name]:
                    array = padded(array, axis, bucket.extents[dimension.name], dimension.padding)
        return array


def padded(array: Buffer, axis: int, extent: int, padding: Padding) -> Buffer:
    """Return `array` filled up behind its end along `axis` to `extent`."""
    missing = extent - array.shape[axis]
    if padding == "edge":
        return np.pad(array, [(0, missing if index == axis else 0) for index in range(array.ndim)], mode="edge")
    shape = (*array.shape[:axis], missing, *array.shape[axis + 1 :])
    filling = np.full(shape, "", dtype=object) if array.dtype.kind == "O" else np.zeros(shape, dtype=array.dtype)
    return np.concatenate([array, filling], axis=axis)
