"""Constraints: `latency<100ms, cosine>=0.999, targets in (openvino:NPU, openvino:GPU)`. Parsed, judged and put in words here.

    constraints = constraint ("," constraint)*
    constraint  = metric ("<" | "<=" | ">" | ">=") number unit
                | "targets" "in" "(" pattern ("," pattern)* ")"

White space is free between the words. A limit is kept in SI units: seconds, bytes, per second, watts, joules, decibels, or a plain number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NoReturn

from aivmm.errors import UsageError
from aivmm.runtime.target import matches

Operator = Literal["<", "<=", ">", ">=", "in"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Quantity:
    """What a metric measures: its units, each in terms of the SI one, from small to large; the SI unit itself is among them."""

    name: str
    units: Mapping[str, float]  # empty: a plain number
    shown: tuple[str, ...] = ()  # those that people are shown; the rest are read only

    def listed(self) -> str:
        """Name each unit once."""
        first: dict[float, str] = {}
        for unit, factor in self.units.items():
            first.setdefault(factor, unit)
        return ", ".join(first.values())


_TIME = _Quantity(
    name="a time",
    units={"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0},
    shown=("ns", "µs", "ms", "s", "min"),
)
_BYTES = _Quantity(
    name="a size",
    units={"B": 1.0, "KB": 1e3, "KiB": 2.0**10, "MB": 1e6, "MiB": 2.0**20, "GB": 1e9, "GiB": 2.0**30, "TB": 1e12},
    shown=("B", "KB", "MB", "GB", "TB"),
)
_RATE = _Quantity(name="a rate", units={"/s": 1.0}, shown=("/s",))
_POWER = _Quantity(name="a power", units={"mW": 1e-3, "W": 1.0}, shown=("mW", "W"))
_ENERGY = _Quantity(name="an energy", units={"mJ": 1e-3, "J": 1.0}, shown=("mJ", "J"))
_DECIBEL = _Quantity(name="a ratio", units={"dB": 1.0}, shown=("dB",))
_PLAIN = _Quantity(name="a plain number", units={})
_QUANTITIES = (_TIME, _BYTES, _RATE, _POWER, _ENERGY, _DECIBEL)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Metric:
    """What can be limited, to which side, within which bounds, and how a user would write it."""

    quantity: _Quantity
    better: Literal["less", "more", "either"]
    example: str
    least: float = 0.0
    most: float = math.inf


_METRICS: Mapping[str, _Metric] = {
    "latency": _Metric(quantity=_TIME, better="less", example="latency<100ms"),
    "p99": _Metric(quantity=_TIME, better="less", example="p99<=20ms"),
    "throughput": _Metric(quantity=_RATE, better="more", example="throughput>=500/s"),
    "memory": _Metric(quantity=_BYTES, better="less", example="memory<4GB"),
    "device_memory": _Metric(quantity=_BYTES, better="less", example="device_memory<8GB"),
    "size": _Metric(quantity=_BYTES, better="less", example="size<50MB"),
    "power": _Metric(quantity=_POWER, better="less", example="power<=15W"),
    "energy": _Metric(quantity=_ENERGY, better="less", example="energy<50mJ"),
    "compile": _Metric(quantity=_TIME, better="less", example="compile<60s"),
    "first_inference": _Metric(quantity=_TIME, better="less", example="first_inference<2s"),
    "cosine": _Metric(quantity=_PLAIN, better="more", example="cosine>=0.999", least=-1.0, most=1.0),
    "top1_agreement": _Metric(quantity=_PLAIN, better="more", example="top1_agreement>=0.99", most=1.0),
    "top5_agreement": _Metric(quantity=_PLAIN, better="more", example="top5_agreement>=0.99", most=1.0),
    "sqnr": _Metric(quantity=_DECIBEL, better="more", example="sqnr>=30dB", least=-math.inf),
    "metric": _Metric(quantity=_PLAIN, better="either", example="metric>=0.9", least=-math.inf),
}

TARGETS = "targets"
_TARGETS_EXAMPLE = "targets in (openvino:NPU, openvino:GPU)"

KNOWN = frozenset({*_METRICS, TARGETS})
_FAR_PERCENT = 900.0  # beyond a limit: what is further off is told as a multiple of it
_LEAST_BEYOND = 1e-9  # the limit itself, where it has to be passed
AGREEMENT = ("top1_agreement", "top5_agreement")  # with the reference, of classifiers
ACCURACY = ("metric", *AGREEMENT, "sqnr", "cosine")  # the user's own first: the one named in a verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraint:
    """One comparison. `limit` is in SI units; `in` has target patterns in `names` instead.

    `text` is as the user wrote it, and takes no part in equality.
    """

    metric: str
    operator: Operator
    limit: float = 0.0
    names: tuple[str, ...] = ()
    text: str = field(default="", compare=False)

    def __str__(self) -> str:
        """Return the canonical form, which parses to this very constraint."""
        if self.operator == "in":
            return f"{self.metric} in ({', '.join(self.names)})"
        return f"{self.metric}{self.operator}{_exact(self.limit, _METRICS[self.metric].quantity)}"

    def allows(self, value: float) -> bool:
        """Say whether a measured value, in SI units, meets the limit."""
        match self.operator:
            case "<":
                return value < self.limit
            case "<=":
                return value <= self.limit
            case ">":
                return value > self.limit
            case ">=":
                return value >= self.limit
            case "in":
                raise ValueError(f"{self} limits targets, not a number")


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """A limit that is not kept: the value, how far it lies beyond the limit in percent of it, and a sentence for people.

    `percent` is infinite where the limit is 0, and for targets.
    """

    constraint: Constraint
    value: float | None  # None for targets
    percent: float
    sentence: str

    def __str__(self) -> str:
        return self.sentence


def parse(expression: str, *, measured: Iterable[str] = KNOWN) -> tuple[Constraint, ...]:
    """Return the constraints of `expression`, in its order.

    `measured` names the metrics that can be judged where this is asked; all of them unless something is known to be missing.

    Raises:
        UsageError: it does not parse, a unit is missing or of another quantity, the metric is unknown or not measured yet, or the
            direction or the limit makes no sense. The message names the place, the advice gives an example.
    """
    reader = _Reader(expression, frozenset(measured))
    found = [reader.constraint()]
    while reader.comma():
        found.append(reader.constraint())
    return tuple(found)


def check(
    constraints: Iterable[Constraint], metrics: Mapping[str, float], *, targets: Sequence[str] | None = None
) -> tuple[Violation, ...]:
    """Return what `metrics` (by the metric's name, in SI units) violate, and which of a plan's `targets` are not allowed.

    What cannot be judged, because its metric is missing or not a number, is no violation: ask `unjudged` for it.
    """
    found = []
    for constraint in constraints:
        if constraint.metric == TARGETS:
            outside = [each for each in targets or () if not any(matches(pattern, each) for pattern in constraint.names)]
            if outside:
                sentence = f"{' and '.join(outside)} {'is' if len(outside) == 1 else 'are'} not among {', '.join(constraint.names)}"
                found.append(Violation(constraint=constraint, value=None, percent=math.inf, sentence=sentence))
        elif not unjudged([constraint], metrics) and not constraint.allows(metrics[constraint.metric]):
            found.append(_violation(constraint, metrics[constraint.metric]))
    return tuple(found)


def unjudged(
    constraints: Iterable[Constraint], metrics: Mapping[str, float], *, targets: Sequence[str] | None = None
) -> tuple[Constraint, ...]:
    """Return the constraints that `check` cannot judge, for want of a number (or of the plan's targets)."""

    def missing(constraint: Constraint) -> bool:
        return targets is None if constraint.metric == TARGETS else math.isnan(metrics.get(constraint.metric, math.nan))

    return tuple(each for each in constraints if missing(each))


def beyond(constraint: Constraint, value: float) -> float:
    """Return how far beyond its limit a value lies, as a share of the limit: above 0 where it is broken, else 0 or less. NaN: no number."""
    if math.isnan(value) or constraint.operator == "in":
        return math.nan
    distance = (value - constraint.limit) / (abs(constraint.limit) or 1.0)
    distance = distance if constraint.operator in ("<", "<=") else -distance
    return min(distance, 0.0) if constraint.allows(value) else max(distance, _LEAST_BEYOND)


def human(value: float, metric: str, *, digits: int = 3) -> str:
    """Return a value in SI units as people read it: 0.00271 of latency is `2.71 ms`. Plain numbers keep three digits more.

    Raises:
        KeyError: `metric` is not a metric with a number.
    """
    quantity = _METRICS[metric].quantity
    if not math.isfinite(value):
        return "unknown" if math.isnan(value) else str(value)
    if not quantity.units:
        return _rounded(value, digits + 3)
    for unit in quantity.shown:
        text = _rounded(value / quantity.units[unit], digits)
        if abs(float(text)) < _handover(unit):
            break
    return f"{text}/s" if unit == "/s" else f"{text} {unit}"


def apart(value: float, limit: float, metric: str) -> tuple[str, str]:
    """Return two values of a metric as `human` does, with as many digits as it takes to see the difference.

    Raises:
        KeyError: `metric` is not a metric with a number.
    """
    texts = ((human(value, metric, digits=digits), human(limit, metric, digits=digits)) for digits in range(3, 18))
    return next((each for each in texts if each[0] != each[1]), (human(value, metric, digits=17), human(limit, metric, digits=17)))


def _handover(unit: str) -> float:
    """Return from which number on the next larger unit reads better."""
    return 120.0 if unit == "s" else 1000.0


def _rounded(value: float, digits: int) -> str:
    """Return `value` to so many significant digits, never in powers of ten when it is above 1."""
    if value == 0:
        return "0"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    if places > 15:
        return f"{value:.{digits}g}"
    text = f"{round(value, places):.{max(0, places)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _violation(constraint: Constraint, value: float) -> Violation:
    limit = constraint.limit
    percent = abs(value - limit) / abs(limit) * 100 if limit else math.inf
    shown, wanted = apart(value, limit, constraint.metric)
    below = constraint.operator in ("<", "<=")
    if value == limit:
        sentence = f"{constraint.metric} is {shown}, not {'below' if below else 'above'} it as {constraint} asks"
    else:
        by_how_much = f"{_rounded(percent, 2)} % " if math.isfinite(percent) else ""
        where = f"{by_how_much}{'above' if below else 'below'}"
        if _FAR_PERCENT < percent < math.inf and value > limit > 0:
            where = f"{_rounded(value / limit, 2)} times"
        sentence = f"{constraint.metric} is {shown}, {where} the limit of {wanted}"
    return Violation(constraint=constraint, value=value, percent=percent, sentence=sentence)


def _exact(limit: float, quantity: _Quantity) -> str:
    """Return `limit` in the unit that people would choose, if that reads back to the very same float; else in the SI unit."""
    for unit in reversed(quantity.shown):
        number = limit / quantity.units[unit]
        if abs(number) >= 1:
            text = _rounded(number, 12)
            if float(text) * quantity.units[unit] == limit:
                return f"{text}{unit}"
    return f"{limit!r}{next((unit for unit, factor in quantity.units.items() if factor == 1.0), '')}"


_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_COMPARISON = re.compile(r"<=|>=|<|>")
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?")
_UNIT = re.compile(r"[^\s,<>=]+")
_PATTERN = re.compile(r"[A-Za-z0-9_.:*-]+")


class _Reader:
    """Reads one expression from left to right."""

    def __init__(self, text: str, measured: frozenset[str]) -> None:
        self._text, self._measured, self._at = text, measured, 0

    def comma(self) -> bool:
        """Step over a comma; False at the end of the text."""
        self._space()
        if self._at == len(self._text):
            return False
        if self._text[self._at] != ",":
            self._fail("expected a comma or the end", _any_example())
        self._at += 1
        return True

    def constraint(self) -> Constraint:
        """Read one comparison."""
        self._space()
        start = self._at
        metric = self._metric()
        if metric == TARGETS:
            names = self._names()
            return Constraint(metric=metric, operator="in", names=names, text=self._text[start : self._at])
        comparison = self._take(_COMPARISON) or self._fail(f"expected <, <=, > or >= after {metric}", _METRICS[metric].example)
        limit = self._limit(metric)
        text = self._text[start : self._at].strip()
        _require_sense(metric, comparison, limit, text)
        operators: dict[str, Operator] = {"<": "<", "<=": "<=", ">": ">", ">=": ">="}
        return Constraint(metric=metric, operator=operators[comparison], limit=limit, text=text)

    def _metric(self) -> str:
        start = self._at
        word = self._take(_WORD)
        if not word:
            self._fail("expected the name of a metric", _any_example())
        if word not in KNOWN:
            self._at = start
            self._fail(f"unknown metric {word!r}", f"choose from {', '.join(sorted(self._measured))}", quote=False)
        if word not in self._measured:
            problem = f"{word} cannot be limited: it is not measured on this machine"
            raise UsageError(problem, advice=f"choose from {', '.join(sorted(self._measured))}")
        return word

    def _limit(self, metric: str) -> float:
        """Read a number and its unit, and return it in SI units."""
        known, start = _METRICS[metric], self._at
        number = self._take(_NUMBER) or self._fail(f"expected a number to compare {metric} with", known.example)
        at = self._at
        unit = self._take(_UNIT)
        units = known.quantity.units
        if unit in units or (not unit and not units):
            limit = float(number) * (units[unit] if unit else 1.0)
            if not math.isfinite(limit):
                self._at = start
                self._fail("the number is too large", known.example)
            return limit
        self._at = at
        if not unit:
            self._fail(f"{metric} is {known.quantity.name} and needs a unit ({known.quantity.listed()})", known.example)
        self._space()
        if not units:
            self._fail(
                f"{metric} takes no unit", f"write a share, like {known.example}" if unit == "%" else known.example, quote=unit != "%"
            )
        other = next((each.name for each in _QUANTITIES if unit in each.units), "")
        likely = next((each for each in units if each.lower() == unit.lower()), "")
        problem = f"{unit!r} is a unit of {other}" if other else f"unknown unit {unit!r}"
        meant = f" (did you mean {likely}?)" if likely else ""
        return self._fail(f"{problem}{meant}, and {metric} is {known.quantity.name} ({known.quantity.listed()})", known.example)

    def _names(self) -> tuple[str, ...]:
        """Read `in (a, b)`."""
        if self._take(_WORD) != "in":
            self._fail("expected `in` after targets", _TARGETS_EXAMPLE)
        self._symbol("(", "expected ( before the targets")
        names = [self._name()]
        while self._peek() == ",":
            self._at += 1
            names.append(self._name())
        self._symbol(")", "expected a comma or ) after a target")
        return tuple(names)

    def _name(self) -> str:
        return self._take(_PATTERN) or self._fail("expected a target", _TARGETS_EXAMPLE)

    def _symbol(self, symbol: str, problem: str) -> None:
        if self._peek() != symbol:
            self._fail(problem, _TARGETS_EXAMPLE)
        self._at += 1

    def _peek(self) -> str:
        self._space()
        return self._text[self._at : self._at + 1]

    def _take(self, what: re.Pattern[str]) -> str:
        """Step over `what`, if it stands next after white space, and return it; else stay there and return nothing."""
        self._space()
        found = what.match(self._text, self._at)
        self._at = found.end() if found else self._at
        return found.group() if found else ""

    def _space(self) -> None:
        while self._at < len(self._text) and self._text[self._at].isspace():
            self._at += 1

    def _fail(self, problem: str, advice: str, *, quote: bool = True) -> NoReturn:
        rest = self._text[self._at :].split(",")[0].strip()[:30]
        place = (
            f"at {rest!r} (character {self._at + 1})"
            if rest
            else "at its end"
            if self._at >= len(self._text)
            else f"at character {self._at + 1}"
        )
        raise UsageError(
            f"constraint {self._text!r} does not parse {place}: {problem}", advice=f"for example {advice}" if quote else advice
        )


def _any_example() -> str:
    return f"{_METRICS['latency'].example}, {_METRICS['memory'].example}"


def _require_sense(metric: str, comparison: str, limit: float, text: str) -> None:
    """Refuse a limit that asks for what nobody wants, or for what cannot be."""
    known = _METRICS[metric]
    upper = comparison in ("<", "<=")
    if known.better == ("more" if upper else "less"):
        turned = comparison.replace("<", ">") if upper else comparison.replace(">", "<")
        problem = f"{text!r} asks for {'a low' if upper else 'a high'} {metric}, and {'more' if upper else 'less'} of it is better"
        raise UsageError(problem, advice=f"did you mean {text.replace(comparison, turned, 1)}?")
    strict = len(comparison) == 1
    if (
        limit < known.least
        or limit > known.most
        or (strict and limit == (known.least if upper else known.most))
        or (upper and limit == 0 == known.least)
    ):
        bounds = f"between {known.least:g} and {known.most:g}" if math.isfinite(known.most) else "above 0"
        raise UsageError(f"{text!r} makes no sense: {metric} lies {bounds}", advice=f"for example {known.example}")
