"""The lowered forms of the model under study: each is made when it is first asked for, once, in a worker of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from aivmm.errors import Unsupported
from aivmm.models.records import Lowering
from aivmm.probes.client import WorkerDied
from aivmm.probes.lab import Lab, Made
from aivmm.runtime.folders import cache_folder

if TYPE_CHECKING:
    from aivmm.models.lowering_recipes import Recipe


@dataclass(slots=True, kw_only=True)
class Lowerer:
    """Lowers one prepared model with one set of calibration samples.

    `content` is the model's content hash, `calibration_digest` tells sets of samples apart: both are part of every key.
    """

    lab: Lab
    folder: Path
    model: Path
    content: str
    category: str
    calibration: Sequence[Path]
    calibration_digest: str
    real_data: bool  # the samples are the user's
    saturates: bool  # a CPU takes part whose int8 products overflow 16 bits
    notes: list[str]
    recipes: dict[str, Recipe] = field(default_factory=dict)  # by variant: what was asked for, or is known from earlier runs
    judged: set[tuple[str, str]] = field(default_factory=set)  # (target, variant): those whose accuracy was judged on several samples
    _made: dict[str, Made | Unsupported] = field(default_factory=dict)
    _carried: dict[tuple[str, int], Path | Unsupported] = field(default_factory=dict)

    def recipe(self, variant: str) -> Recipe:
        """Return how the model is lowered to a variant ("int8:nncf-mixed"), or, for a precision alone, by its first recipe."""
        from aivmm.models.lowering_recipes import named, recipes  # here: what they import takes a while, before the first line is shown

        if variant not in self.recipes:
            precision, _, name = variant.partition(":")
            found = named(name, {}) if name else recipes(precision, self.category, saturates=self.saturates)[0]
            if found is None:
                raise Unsupported(f"there is no way {name!r} to lower a model to {precision}")
            self.recipes[variant] = found
        return self.recipes[variant]

    def restore(self, records: Sequence[Lowering]) -> None:
        """Know the parts that earlier runs lowered of this model with these samples."""
        from aivmm.models.lowering_recipes import named

        for each in records:
            found = named(each.recipe, each.options)
            if (
                found is not None
                and found.whole is not None
                and each.content == self.content
                and each.calibration == self._calibrated(found)
            ):
                self.recipes[found.variant] = found

    def _calibrated(self, recipe: Recipe) -> str:
        return self.calibration_digest if recipe.needs_data else ""

    def tag(self, variant: str) -> str:
        """Return what tells this way of lowering from others: part of the key of times."""
        recipe = self.recipe(variant)
        return f"{recipe.name}-{recipe.digest()[:8]}"

    def made(self, variant: str) -> Made | None:
        """Return what is known of a variant that was made, None when it was not."""
        found = self._made.get(variant)
        return found if isinstance(found, Made) else None

    def path(self, variant: str) -> Path:
        """Return the model lowered to `variant`, at the batch it was prepared for.

        Raises:
            Unsupported: it cannot be lowered; with the reason, the same each time.
        """
        if variant not in self._made:
            self._made[variant] = self._lower(variant)
        return _or_raise(self._made[variant]).path

    def record(self, variant: str, *, accuracy: Mapping[str, Mapping[str, float]] | None = None) -> Lowering | None:
        """Return what the database keeps of the model lowered to `variant`, None when that was not tried; `accuracy` is by target."""
        recipe, made = self.recipe(variant), self._made.get(variant)
        if made is None:
            return None
        if isinstance(made, Unsupported):
            said: dict[str, Any] = {"reason": made.message}
        else:
            said = {"lowered_content": made.sha256, "weight_bytes": made.weight_bytes, "duration_s": made.duration_s}
        return Lowering(
            content=self.content,
            precision=recipe.precision,
            recipe=recipe.name,
            recipe_digest=recipe.digest(),
            options=dict(recipe.options),
            calibration=self._calibrated(recipe),
            data="real" if self.real_data else "synthetic",
            accuracy=accuracy or {},
            **said,
        )

    def carried(self, variant: str, batch: int, prepared: Path) -> Path:
        """Return the lowered model carried over to another batch, for which the model itself lies at `prepared`. Raises as `path`."""
        if (variant, batch) not in self._carried:
            lowered = self.path(variant)
            destination = self.folder / f"{self.recipe(variant).name}-batch-{batch}.onnx"
            try:
                self.lab.rebatch(lowered, self.model, prepared, destination)
                self._carried[variant, batch] = destination
            except Unsupported as error:
                self._carried[variant, batch] = error
            except WorkerDied as died:
                self._carried[variant, batch] = Unsupported(f"carrying the {variant} model over to batch {batch} {died.reason}")
        return _or_raise(self._carried[variant, batch])

    def _lower(self, variant: str) -> Made | Unsupported:
        recipe = self.recipe(variant)
        try:
            made = self.lab.lower(self.model, _cache(self.folder), recipe, samples=self.calibration, content=self.content)
        except Unsupported as error:
            return error
        except WorkerDied as died:
            return Unsupported(f"lowering to {recipe.precision} with {recipe.name} {died.reason}")
        self.notes.extend(made.notes)
        return made


def _cache(fallback: Path) -> Path:
    folder = cache_folder() / "lowered"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return fallback  # a home that cannot be written is no reason to stop
    return folder


Result = TypeVar("Result")


def _or_raise(made: Result | Unsupported) -> Result:
    if isinstance(made, Unsupported):
        raise made
    return made
