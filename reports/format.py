"""Numbers and names as people read them. Full precision stays in the database and in `--json`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import datetime

# Control characters, bidirectional overrides (they reorder the text around them), and what UTF-8 or XML cannot carry.
_UNSAFE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u061c\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
_NOTHING = "–"


def clean(text: str) -> str:
    """Return `text` with each character that could disturb its surroundings replaced by U+FFFD. Escaping is not done here."""
    return _UNSAFE.sub("\ufffd", text)


def shorten(text: str, limit: int) -> str:
    """Return `text` cleaned and on one line, with its middle left out when it is longer than `limit` characters."""
    line = " ".join(clean(text[: 50 * limit]).split())
    if len(text) <= 50 * limit and len(line) <= limit:
        return line
    head = (limit - 1) * 2 // 3
    tail = limit - 1 - head
    end = " ".join(clean(text[-limit:]).split())
    return f"{line[:head]}…{end[-tail:] if tail else ''}"


def binary(value: float) -> str:
    """Return a power of two in bytes: `4 KiB`."""
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:g} {unit}"
        value /= 1024
    return f"{value:g} GiB"


def seconds(value: float | None) -> str:
    """Return a duration with three significant digits: `2.71 ms`, `41.3 µs`, `2 min 5 s`."""
    if value is None:
        return _NOTHING
    if value >= 119.5:
        whole = round(value)
        return f"{whole // 60} min {whole % 60} s"
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= factor * 0.9995:
            return f"{_three(value / factor)} {unit}"
    return f"{_three(value * 1e9)} ns"


def tick(text: str) -> str:
    """Return a number with its unit as an axis says it: `2.00 ms` becomes `2 ms`, `0.00 ns` becomes `0`."""
    number, _, unit = text.partition(" ")
    if "." in number and number.replace(".", "").isdigit():
        number = number.rstrip("0").rstrip(".")
    return "0" if number == "0" else f"{number} {unit}".strip()


def size(value: float | None) -> str:
    """Return bytes in decimal units: `4.8 MB`."""
    return _scaled(value, ("B", "kB", "MB", "GB", "TB", "PB"))


def flops(value: float | None) -> str:
    """Return an amount of work: `1.2 GFLOP`."""
    return _scaled(value, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"))


def joules(value: float | None) -> str:
    """Return energy with three significant digits: `41.3 mJ`."""
    if value is None:
        return _NOTHING
    for factor, unit in ((1.0, "J"), (1e-3, "mJ")):
        if value >= factor * 0.9995:
            return f"{_three(value / factor)} {unit}"
    return f"{_three(value * 1e6)} µJ"


def rate(value: float | None, unit: str) -> str:
    """Return a rate of `flop` or `byte` a second: `1.2 GFLOP/s`, `11 GB/s`."""
    if value is None:
        return _NOTHING
    return f"{flops(value) if unit == 'flop' else size(value)}/s"


def per_second(value: float | None) -> str:
    """Return samples a second: `369/s`, `12,300/s`."""
    if value is None:
        return _NOTHING
    return f"{_three(value)}/s" if value < 1000 else f"{float(f'{value:.3g}'):,.0f}/s"


def ratio(value: float | None) -> str:
    """Return a ratio: `1.92×`, `12×`."""
    if value is None:
        return _NOTHING
    return f"{value:.2f}×" if value < 9.995 else f"{value:.1f}×" if value < 99.95 else f"{value:,.0f}×"


def percent(share: float | None) -> str:
    """Return a share as a whole percentage: `18 %`, `<1 %`."""
    if share is None:
        return _NOTHING
    return "<1 %" if 0 < share < 0.01 else f"{share * 100:.0f} %"


def plus_minus(half: float) -> str:
    """Return half of a relative interval: `±1.1 %`."""
    return f"±{half * 100:.1f} %" if half < 0.0995 else f"±{half * 100:.0f} %"


def count(value: float | None, one: str = "", many: str = "") -> str:
    """Return a count with its noun: `1 sample`, `12,345 samples`."""
    if value is None:
        return _NOTHING
    noun = one if value == 1 else (many or (one and one + "s"))
    return f"{value:,.0f} {noun}".strip()


def similarity(value: float | None) -> str:
    """Return a figure near 1 with as many digits as tell it from 1: `0.99998`."""
    if value is None:
        return _NOTHING
    return f"{value:.6f}".rstrip("0").rstrip(".") if 0.9 < value < 1 else f"{value:.4g}"


def moment(value: datetime | None) -> str:
    """Return a moment to the minute, in UTC as it is stored."""
    return value.strftime("%Y-%m-%d %H:%M UTC") if value else _NOTHING


def listing(words: Iterable[str], limit: int = 3) -> str:
    """Return `a, b, c and 4 more`."""
    known = list(words)
    shown = ", ".join(known[:limit])
    return f"{shown} and {len(known) - limit:,} more" if len(known) > limit else shown


def _three(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def _scaled(value: float | None, units: tuple[str, ...]) -> str:
    if value is None:
        return _NOTHING
    step = 0
    while value >= 999.5 and step < len(units) - 1:
        value /= 1000
        step += 1
    return f"{value:.0f} {units[step]}" if step == 0 or value >= 99.95 else f"{value:.1f} {units[step]}"
