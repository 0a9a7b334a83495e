"""What analysing a model yields: operators, cut points, blocks. Plain values, of use without the model at hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from aivmm.models.input_contract import Normalisation
from aivmm.models.repeats import Repeat, stretches
from aivmm.tensors import TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Category:
    """The family of a model, and what in its graph says so."""

    name: str  # "CNN", "vision transformer", "language transformer", "RNN/speech", "recommender", "scientific/graph", "unknown"
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """One unique operator of a model: the same operator, attributes, shapes and types have the same signature in any model."""

    signature: str  # SHA-256, hexadecimal
    op_type: str
    domain: str
    description: str  # for people: "Conv 3x3 stride 2: 1x3x224x224 -> 1x64x111x111"
    count: int  # how many nodes of the model have this signature
    nodes: tuple[str, ...]  # their names
    flops: float | None  # of one node; None when unknown
    bytes: int | None  # read and written by one node, weights included; None when a shape is unknown
    data_dependent: bool = False  # its time depends on values (NonZero, Loop, ...), so it is keyed by content


@dataclass(frozen=True, slots=True, kw_only=True)
class CutPoint:
    """A place in topological order where few tensors are alive: the graph can be cut before node `position`."""

    position: int
    tensors: tuple[TensorSpec, ...]
    bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """The run of nodes [first, last] between two neighbouring cut points."""

    index: int
    first: int
    last: int  # inclusive
    structure: str  # structure hash: blocks that are alike share it
    content: str  # content hash, with weights
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    op_types: Mapping[str, int]
    flops: float | None
    weight_bytes: int
    data_dependent: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """A prepared model, taken apart."""

    structure: str  # structure hash of the whole
    content: str  # content hash of the whole
    node_count: int
    flops: float | None
    weight_bytes: int
    operators: tuple[Operator, ...]
    cut_points: tuple[CutPoint, ...]
    blocks: tuple[Block, ...]
    data_dependent: bool = False
    pieces: tuple[tuple[str, ...], ...] = ()  # names of all nodes, where positions count in an order in which each of these is a run

    @property
    def repeats(self) -> tuple[Repeat, ...]:
        """Where blocks repeat, by their structure hashes, in order; positions are indices into `blocks`."""
        return tuple(stretches([block.structure for block in self.blocks], [1.0] * len(self.blocks)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """An input that is taken in fewer bits than the model has it, and turned into its numbers inside, since the user asked for that."""

    name: str
    model_dtype: str  # what the model itself has: "float32"
    dtype: str  # what callers give: "float16", "uint8"
    normalisation: Normalisation | None = None  # of pixels; None: none is added, they are only cast

    def __str__(self) -> str:
        if self.dtype == "float16":
            return f"{self.name} as float16"
        how = "only cast inside" if self.normalisation is None else f"normalised inside: {self.normalisation}"
        return f"{self.name} as {self.dtype}, 0 to 255 ({how})"


def normalisation_in(raw: Mapping[str, Any]) -> Normalisation:
    """Return the normalisation whose `asdict` went through JSON."""
    return Normalisation(mean=tuple(raw["mean"]), scale=tuple(raw["scale"]))


def taken_in(raw: Mapping[str, Any]) -> Taken:
    """Return the input whose `asdict` went through JSON."""
    normalisation = raw["normalisation"]
    return Taken(**{**raw, "normalisation": None if normalisation is None else normalisation_in(normalisation)})


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """A prepared model: what the file was, what was done to it, and what it expects."""

    name: str  # the file's stem, or "demo:squeezenet"
    path: str  # as the user gave it
    sha256: str  # of the user's file (with its external data)
    category: Category
    inputs: tuple[TensorSpec, ...]  # with shapes bound
    outputs: tuple[TensorSpec, ...]
    opset: int
    ir_version: int
    batch: int  # the batch bound here
    batchable: bool  # True when another batch could be bound
    notes: tuple[str, ...]  # what was changed on the way in: "opset 1 raised to 17"
    taken: tuple[Taken, ...] = ()  # inputs that the user wanted to give in fewer bits


@dataclass(frozen=True, slots=True, kw_only=True)
class Lowering:
    """A precision variant of a prepared model, known by its content, recipe and calibration; or why it could not be made."""

    content: str  # content hash of the fp32 model
    precision: str
    recipe: str  # its name
    recipe_digest: str  # of the recipe with its options and its tool's version
    options: Mapping[str, str | int | float | bool]
    calibration: str  # digest of the samples it was calibrated on
    data: Literal["real", "synthetic"]  # what those were
    lowered_content: str | None = None  # SHA-256 of the lowered model's file; None when it could not be made
    reason: str = ""  # why not
    weight_bytes: int | None = None  # of all weights, as stored
    duration_s: float = 0.0  # of lowering it
    # target -> metric -> value: against fp32, and what it costs there (peak_memory_bytes of a fresh process, energy_j where counted)
    accuracy: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
