"""In which form callers hand in inputs: as the model has them, or in fewer bits. Only what the user asked for, in the words of the option.

The two conventions of `--normalise NAME=MEAN/SCALE` are those of OpenVINO's converter (`mean_values`, `scale_values`): the number that the
model gets is (pixel - mean) / scale, each of them one number, or one a channel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from aivmm.errors import UsageError

MODEL, NARROW, PIXELS = "model", "narrow", "narrow:uint8"
INPUT_CONTRACTS = (MODEL, NARROW, PIXELS)
_EXAMPLE = "write it like --normalise input=127.5/127.5, or with a number a channel: input=123.7,116.3,103.5/58.4,57.1,57.4"


@dataclass(frozen=True, slots=True, kw_only=True)
class Normalisation:
    """What turns a pixel into a number of the model: (pixel - mean) / scale; of each one number, or one a channel."""

    mean: tuple[float, ...] = (0.0,)
    scale: tuple[float, ...] = (1.0,)

    def __str__(self) -> str:
        return f"(pixel - {_numbers(self.mean)}) / {_numbers(self.scale)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class InputContract:
    """What was asked for: one of `INPUT_CONTRACTS`, and for "narrow:uint8" the normalisation of the inputs that the user named."""

    kind: str = MODEL
    normalise: Mapping[str, Normalisation] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in INPUT_CONTRACTS:
            raise UsageError(f"unknown --input-contract {self.kind!r}", advice=f"known: {', '.join(INPUT_CONTRACTS)}")
        if self.normalise and self.kind != PIXELS:
            raise UsageError("--normalise is for inputs taken as uint8", advice=f"add --input-contract {PIXELS}, or leave --normalise away")


def parse_normalise(texts: Iterable[str]) -> dict[str, Normalisation]:
    """Return the normalisation of each input named, from `NAME=MEAN/SCALE`.

    Raises:
        UsageError: it does not read so, a number is not finite, a scale is 0, an input is named twice, or lists have unlike lengths.
    """
    found: dict[str, Normalisation] = {}
    for text in texts:
        name, equals, numbers = text.rpartition("=")
        mean, slash, scale = numbers.partition("/")
        if not (name and equals and slash):
            raise UsageError(f"--normalise {text!r} does not read as NAME=MEAN/SCALE", advice=_EXAMPLE)
        if name in found:
            raise UsageError(f"--normalise names {name!r} twice", advice="keep one of them")
        made = Normalisation(mean=_parsed(text, mean), scale=_parsed(text, scale))
        if 0.0 in made.scale:
            raise UsageError(f"--normalise {text!r} divides by 0", advice=_EXAMPLE)
        if len(made.mean) > 1 < len(made.scale) and len(made.mean) != len(made.scale):
            what = f"--normalise {text!r} has {len(made.mean)} means and {len(made.scale)} scales"
            raise UsageError(what, advice="give one of each, or one a channel")
        found[name] = made
    return found


def _parsed(text: str, numbers: str) -> tuple[float, ...]:
    try:
        values = tuple(float(each) for each in numbers.split(","))
    except ValueError:
        raise UsageError(f"--normalise {text!r} holds what is no number", advice=_EXAMPLE) from None
    if not all(map(math.isfinite, values)):
        raise UsageError(f"--normalise {text!r} holds a number that is not finite", advice=_EXAMPLE)
    return values


def _numbers(values: tuple[float, ...]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"[{', '.join(f'{each:g}' for each in values)}]"
