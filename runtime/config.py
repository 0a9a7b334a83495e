"""What one target is compiled with, and the knobs it offers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Literal

Setting = str | int | float | bool

LOWERED = ("int8", "int4")  # precisions that are always written into the model itself; the others may be asked for by a hint


@dataclass(frozen=True, slots=True)
class Config:
    """Settings in the runtime's own names, and the precision asked for; None leaves the precision to the runtime's default.

    A precision that is in the model itself says how it came there: "int8:nncf-mixed", "fp16:ort-half" (docs/decisions/0027).
    """

    settings: tuple[tuple[str, Setting], ...] = ()
    precision: str | None = None

    @classmethod
    def of(cls, settings: Mapping[str, Setting] | None = None, *, precision: str | None = None) -> Config:
        """Make a config whose settings are in one canonical order."""
        return cls(tuple(sorted((settings or {}).items())), precision)

    def as_dict(self) -> dict[str, Setting]:
        """Return the settings alone, as JSON takes them."""
        return dict(self.settings)

    def get(self, name: str) -> Setting | None:
        """Return one setting, or None when it is left to the runtime."""
        return dict(self.settings).get(name)

    def key(self) -> str:
        """Return the canonical JSON of settings and precision: equal configs have equal keys, across processes and versions."""
        return json.dumps({"precision": self.precision, "settings": dict(self.settings)}, sort_keys=True, separators=(",", ":"))

    def digest(self) -> str:
        """Return 16 hexadecimal digits of the key's SHA-256."""
        return hashlib.sha256(self.key().encode()).hexdigest()[:16]

    @property
    def lowered(self) -> str | None:
        """The precision that the model itself has to be lowered to, and how, or None when the model stays as it is."""
        return self.precision if self.precision is not None and (":" in self.precision or self.precision in LOWERED) else None

    @property
    def family(self) -> str | None:
        """The precision without the way it came into the model: "int8"."""
        return None if self.precision is None else self.precision.partition(":")[0]

    def compiled_for(self, native: Sequence[str]) -> Config:
        """Return what a target that runs `native` precisions is asked for: a precision that is in the model itself needs no hint.

        What was left of the model in fp32 is asked to stay so where that can be said: OpenVINO finds no kernels for some models that mix
        int8 with the bf16 of its own default (seen with ResNet-50 on a Xeon with AMX).
        """
        return Config(self.settings, "fp32" if "fp32" in native else None) if self.lowered else self

    def __str__(self) -> str:
        shown = ", ".join(f"{name}={value}" for name, value in self.settings) or "defaults"
        return f"{shown} [{self.precision}]" if self.precision else shown


@dataclass(frozen=True, slots=True)
class Knob:
    """One thing that can be tuned on a target: its range or its choices, the runtime's default, and why it may matter.

    An ordered knob is `int` or `float` with `low` and `high` (a search must see its order); the rest are `choice`.
    `objectives` names the goals it can serve, so that a latency search does not spend trials on streams. `promising` is a value that often
    helps where the others' promising ones are set too: the search looks there first. `families` names the precisions that it can matter
    for ("int8"), where those are not all.
    """

    name: str
    kind: Literal["int", "float", "choice"]
    why: str
    _: KW_ONLY
    low: float = 0
    high: float = 0
    log: bool = False
    choices: tuple[Setting, ...] = ()
    default: Setting | None = None
    promising: Setting | None = None
    objectives: frozenset[str] = frozenset({"latency", "throughput", "energy"})
    families: frozenset[str] = frozenset()
