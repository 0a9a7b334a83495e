"""Text for terminals."""

from __future__ import annotations


def printable(text: str) -> str:
    """Return text without control characters: a name from a model must not steer a terminal."""
    return "".join(each if each.isprintable() else "\ufffd" for each in " ".join(text.split()))
