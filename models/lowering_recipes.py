"""The ways there are to lower a model: named recipes, which of them suit a kind of model, and the names of what they make."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from aivmm.errors import UsageError

Option = str | int | float | bool

_FORMAT = 2  # to be raised when the same recipe comes to write another model: old files are then not reused
_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One way to lower a model. `name` is stable: it stands in cache keys, the database and reports."""

    name: str  # "nncf-mixed"
    precision: str  # "int8", "int4", "fp16", "bf16"
    tool: str  # "nncf", "onnxruntime", or "aivmm" for what is our own
    options: tuple[tuple[str, Option], ...] = ()
    needs_data: bool = True
    why: str = ""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"a recipe's name is lower-case words joined by hyphens, not {self.name!r}")

    @property
    def variant(self) -> str:
        """What a config calls the precision of a model lowered so: "int8:nncf-mixed"."""
        return f"{self.precision}:{self.name}"

    @property
    def kind(self) -> str:
        """What is lowered, and when ranges are taken: "static", "dynamic", "weights" or "cast"."""
        options = dict(self.options)
        if self.precision in ("fp16", "bf16"):
            return "cast"
        if "mode" in options or "bits" in options:
            return "weights"
        return "static" if self.needs_data else "dynamic"

    @property
    def whole(self) -> Recipe | None:
        """The recipe of the whole model that this one takes a part of; None when it is itself one of the whole."""
        of = dict(self.options).get("of")
        return None if of is None else _RECIPES[f"{of}"]

    @property
    def plain(self) -> tuple[str, ...]:
        """The nodes that stay as they were; empty when all is lowered that can be."""
        return tuple(json.loads(f"{dict(self.options).get('plain', '[]')}"))

    def digest(self) -> str:
        """Hash of everything that shapes the outcome but the model and the data, the tool's version included: 16 hexadecimal digits."""
        said = [_FORMAT, self.name, self.precision, sorted(self.options), self.tool, _version(self.tool)]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def _version(tool: str) -> str:
    if tool == "onnxruntime":  # it comes under several names
        from aivmm.models.lowering_model import import_onnxruntime

        return str(import_onnxruntime().__version__)
    return "" if tool == "aivmm" else importlib.metadata.version(tool)  # `_FORMAT` tells ours apart


def _recipe(name: str, tool: str, why: str, *, precision: str = "int8", needs_data: bool = True, **options: Option) -> Recipe:
    return Recipe(name=name, precision=precision, tool=tool, options=tuple(sorted(options.items())), needs_data=needs_data, why=why)


_7BIT = "weights of 7 bits, so that products do not saturate on CPUs without VNNI"
# fmt: off
_RECIPES = {recipe.name: recipe for recipe in (
    _recipe("nncf-mixed", "nncf", "symmetric weights, asymmetric activations, bias correction", preset="mixed"),
    _recipe("nncf-mixed-7bit", "nncf", f"as nncf-mixed, {_7BIT}", preset="mixed", overflow="enable"),
    _recipe("nncf-symmetric", "nncf", "activations symmetric too: cheaper on some devices", preset="performance"),
    _recipe("nncf-percentile", "nncf", "as nncf-mixed, outliers clipped", preset="mixed", ranges="mean_quantile"),
    _recipe("nncf-histogram", "nncf", "as nncf-mixed, ranges that lose the least", preset="mixed", ranges="histogram"),
    _recipe("nncf-uncorrected", "nncf", "as nncf-mixed, biases as they were: quicker to make", preset="mixed", bias_correction=False),
    _recipe("nncf-smooth", "nncf", "as nncf-mixed, outliers of activations moved into the weights (SmoothQuant)", preset="mixed",
            smooth=0.5),
    _recipe("nncf-transformer", "nncf", "SmoothQuant, attention's own products left alone", preset="mixed", model_type="transformer"),
    _recipe("nncf-transformer-7bit", "nncf", f"as nncf-transformer, {_7BIT}",
            preset="mixed", model_type="transformer", overflow="enable"),
    _recipe("nncf-weights-int8", "nncf", "weights alone: less memory to read", needs_data=False, mode="int8_sym"),
    _recipe("nncf-weights-int4", "nncf", "weights alone, a scale for each 64", precision="int4", needs_data=False,
            mode="int4_sym", group=64),
    _recipe("ort-minmax", "onnxruntime", "full ranges: nothing clipped", calibration="MinMax"),
    _recipe("ort-minmax-7bit", "onnxruntime", f"as ort-minmax, {_7BIT}", calibration="MinMax", reduce=True),
    _recipe("ort-symmetric", "onnxruntime", "as ort-minmax, activations symmetric too", calibration="MinMax", symmetric=True),
    _recipe("ort-percentile", "onnxruntime", "0.01 % of the values clipped", calibration="Percentile", percentile=99.99),
    _recipe("ort-entropy", "onnxruntime", "ranges that lose the least information", calibration="Entropy"),
    _recipe("ort-products", "onnxruntime", "products with weights alone", calibration="MinMax", operators="products",
            constant_only=True),
    _recipe("ort-products-7bit", "onnxruntime", f"as ort-products, {_7BIT}", calibration="MinMax", operators="products",
            constant_only=True, reduce=True),
    _recipe("ort-dynamic", "onnxruntime", "products with weights, ranges taken at each run", needs_data=False),
    _recipe("ort-dynamic-7bit", "onnxruntime", f"as ort-dynamic, {_7BIT}", needs_data=False, reduce=True),
    _recipe("ort-dynamic-recurrent", "onnxruntime", "as ort-dynamic, recurrent cells too", needs_data=False, recurrent=True),
    _recipe("ort-weights-int8", "onnxruntime", "weights alone, a scale for each 32", needs_data=False, bits=8, block=32,
            form="QOperator", accuracy_level=4),
    _recipe("ort-weights-int4", "onnxruntime", "weights alone, a scale for each 32", precision="int4", needs_data=False,
            bits=4, block=32),
    _recipe("ort-weights-int4-fused", "onnxruntime", "as ort-weights-int4, in ONNX Runtime's own operator", precision="int4",
            needs_data=False, bits=4, block=32, form="QOperator", accuracy_level=4),
    _recipe("ort-half", "onnxruntime", "everything that can be, converted", precision="fp16", needs_data=False),
    _recipe("bfloat-products", "aivmm", "products and convolutions, converted", precision="bf16", needs_data=False),
)}
# fmt: on

# A first guess from cosines on the demo models (times were too noisy to rank by); which one wins differs by model and CPU: try several.
_CONVOLUTIONAL = ("nncf-mixed", "ort-minmax", "ort-percentile", "nncf-percentile", "nncf-symmetric", "ort-symmetric", "ort-entropy",
                  "nncf-uncorrected", "nncf-smooth", "nncf-mixed-7bit", "ort-minmax-7bit")  # fmt: skip
_WEIGHTS = ("nncf-weights-int8", "ort-dynamic", "ort-weights-int8", "ort-dynamic-7bit")
_TRANSFORMER = ("nncf-transformer", "ort-products", "ort-dynamic", "nncf-mixed", "nncf-weights-int8", "ort-weights-int8", "ort-percentile",
                "ort-entropy", "nncf-symmetric", "nncf-transformer-7bit", "ort-products-7bit", "ort-dynamic-7bit")  # fmt: skip
_DENSE = ("nncf-mixed", "ort-products", "nncf-mixed-7bit", "ort-products-7bit", *_WEIGHTS, "nncf-percentile", "ort-percentile",
          "nncf-smooth")  # fmt: skip
_RECURRENT = ("nncf-mixed", "ort-dynamic-recurrent", *_DENSE[1:])
_INT8 = {
    "CNN": _CONVOLUTIONAL,
    "language transformer": _TRANSFORMER,
    "vision transformer": _TRANSFORMER,
    "RNN/speech": _RECURRENT,
    "recommender": _DENSE,
}
_OTHERS = {
    "int4": ("ort-weights-int4", "nncf-weights-int4", "ort-weights-int4-fused"),
    "fp16": ("ort-half",),
    "bf16": ("bfloat-products",),
}
LOWERABLE = ("int8", *_OTHERS)  # precisions that a model can be lowered to


def recipes(precision: str, category: str, *, saturates: bool = False) -> tuple[Recipe, ...]:
    """Return the ways to lower a model of `category` (as `category.detect` names it) to a precision, the best default first.

    `saturates` says that sums of int8 products overflow 16 bits on the CPU, as on x86 without VNNI: weights of 7 bits then come first.

    Raises:
        UsageError: no such precision can be lowered to.
    """
    if precision not in LOWERABLE:
        raise UsageError(f"no recipe lowers a model to {precision!r}", advice=f"choose from {', '.join(LOWERABLE)}")
    names: Sequence[str] = _INT8.get(category, _DENSE) if precision == "int8" else _OTHERS[precision]
    if saturates:
        names = sorted(names, key=lambda name: not name.endswith("-7bit"))
    return tuple(_RECIPES[name] for name in names)


def part_of(whole: Recipe, plain: Sequence[str]) -> Recipe:
    """Return the recipe that lowers as `whole` does, but leaves the nodes named in `plain` as they were."""
    named = json.dumps(sorted(plain))
    mark = hashlib.sha256(named.encode()).hexdigest()[:8]
    options = (("of", whole.name), ("plain", named))
    why = f"as {whole.name}, but for {len(plain)} operators"
    return Recipe(
        name=f"{whole.name}-but-{mark}", precision=whole.precision, tool=whole.tool, options=options, needs_data=whole.needs_data, why=why
    )


def named(name: str, options: Mapping[str, Option]) -> Recipe | None:
    """Return the recipe of that name, or the part of one that `options` describe; None when this version has no such recipe."""
    if "of" not in options:
        return _RECIPES.get(name)
    whole = _RECIPES.get(f"{options['of']}")
    try:
        made = None if whole is None else part_of(whole, list(map(str, json.loads(f"{options['plain']}"))))
    except (KeyError, ValueError, TypeError):  # written by hand, or by another version
        return None
    return made if made is not None and made.name == name else None


def pace(recipe: Recipe) -> tuple[object, ...]:
    """Return what is equal for recipes that write the same operators with other numbers: what they make is equally fast."""
    options = dict(recipe.options)
    return (
        recipe.precision,
        recipe.kind,
        recipe.tool,
        recipe.name if recipe.kind != "static" or recipe.whole else "",
        options.get("preset") == "performance" or bool(options.get("symmetric")),
        options.get("model_type"),
        options.get("operators"),
    )
