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
    from aivmm.models.lowering import Recipe


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
    _made: dict[str, Made | Unsupported] = field(default_factory=dict)
    _carried: dict[tuple[str, int], Path | Unsupported] = field(default_factory=dict)

    def recipe(self, precision: str) -> Recipe:
        """Return how the model is lowered to `precision`."""
        from aivmm.models.lowering import recipes  # here: it loads onnx_ir, a second before the first line is shown

        return recipes(precision, self.category, saturates=self.saturates)[0]

    def tag(self, precision: str) -> str:
        """Return what tells this way of lowering from others: part of the key of times."""
        recipe = self.recipe(precision)
        return f"{recipe.name}-{recipe.digest()[:8]}"

    def path(self, precision: str) -> Path:
        """Return the model lowered to `precision`, at the batch it was prepared for.

        Raises:
            Unsupported: it cannot be lowered; with the reason, the same each time.
        """
        if precision not in self._made:
            self._made[precision] = self._lower(precision)
        return _or_raise(self._made[precision]).path

    def record(self, precision: str, *, accuracy: Mapping[str, Mapping[str, float]] | None = None) -> Lowering | None:
        """Return what the database keeps of the model lowered to `precision`, None when that was not tried; `accuracy` is by target."""
        recipe, made = self.recipe(precision), self._made.get(precision)
        if made is None:
            return None
        if isinstance(made, Unsupported):
            said: dict[str, Any] = {"reason": made.message}
        else:
            said = {"lowered_content": made.sha256, "weight_bytes": made.weight_bytes, "duration_s": made.duration_s}
        return Lowering(
            content=self.content,
            precision=precision,
            recipe=recipe.name,
            recipe_digest=recipe.digest(),
            options=dict(recipe.options),
            calibration=self.calibration_digest if recipe.needs_data else "",
            data="real" if self.real_data else "synthetic",
            accuracy=accuracy or {},
            **said,
        )

    def carried(self, precision: str, batch: int, prepared: Path) -> Path:
        """Return the lowered model carried over to another batch, for which the model itself lies at `prepared`. Raises as `path`."""
        if (precision, batch) not in self._carried:
            lowered = self.path(precision)
            destination = self.folder / f"{precision}-batch-{batch}.onnx"
            try:
                self.lab.rebatch(lowered, self.model, prepared, destination)
                self._carried[precision, batch] = destination
            except Unsupported as error:
                self._carried[precision, batch] = error
            except WorkerDied as died:
                self._carried[precision, batch] = Unsupported(f"carrying the {precision} model over to batch {batch} {died.reason}")
        return _or_raise(self._carried[precision, batch])

    def _lower(self, precision: str) -> Made | Unsupported:
        recipe = self.recipe(precision)
        try:
            made = self.lab.lower(
                self.model, _cache(self.folder), recipe, category=self.category, samples=self.calibration, content=self.content
            )
        except Unsupported as error:
            return error
        except WorkerDied as died:
            return Unsupported(f"lowering to {precision} with {recipe.name} {died.reason}")
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
