"""Whether there is a file at all where a model should be: asked before anything is loaded, so that a typing error is told at once."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from aivmm.errors import ModelError, UsageError


def shown(path: Path) -> str:
    """Return a path on one line, whatever characters it has."""
    text = os.fspath(path)
    return text if text.isprintable() else repr(text)


def require_file(path: Path) -> os.stat_result:
    """Return what the file system says of a model's file.

    Raises:
        UsageError: there is none, it is no regular file, or it cannot be looked at.
        ModelError: it is empty.
    """
    try:
        info = path.stat()
        if stat.S_ISDIR(info.st_mode):
            inside = sorted(child.name for child in path.glob("*.onnx"))[:3]
            advice = f"give a file in it: {', '.join(inside)}" if inside else "give the path of a .onnx file"
            raise UsageError(f"{shown(path)} is a directory", advice=advice)
        if not stat.S_ISREG(info.st_mode):
            raise UsageError(f"{shown(path)} is not a regular file", advice="give the path of a .onnx file")
        if info.st_size == 0:
            raise ModelError(f"{shown(path)} is empty", advice="download or export it again")
        return info
    except FileNotFoundError as error:
        raise UsageError(
            f"no such model file: {shown(path)}", advice="give the path of a .onnx file, or a demo (`aivmm-tune demo:`)"
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UsageError(f"cannot read {shown(path)}: {reason}", advice="give the path of a readable .onnx file") from error
