"""TensorRT's engines and timings in the user's cache folder, where no stranger writes, so that they are built once a machine.

ONNX Runtime names an engine's file by the graph's nodes and tensors, by versions and by the card's kind, and by nothing else: the engine of
other weights, or of another builder level, would be taken for it. So each model has a folder for each config.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

from aivmm.runtime.blobs import MOST_BYTES, prune
from aivmm.runtime.config import Config
from aivmm.runtime.folders import cache_folder
from aivmm.runtime.onnx_interface import _fields, _text

# Message of onnx.proto -> the fields in which tensors are, or what holds some.
_HOLDERS = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}


def tensorrt_caches(model: Path | bytes, config: Config) -> dict[str, str]:
    """Return the options that keep what TensorRT builds for a model; none where nobody may write, and no engines of unknown weights."""
    try:
        root = cache_folder() / "tensorrt"
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        options = {"trt_timing_cache_enable": "1", "trt_timing_cache_path": str(root)}  # of kernels alone: right for any model
        content = content_sha256(model)
        if content is None:
            return options
        folder = root / f"{content[:32]}-{config.digest()}"
        folder.mkdir(mode=0o700, exist_ok=True)
    except (OSError, RuntimeError):  # the latter where a user has no home
        return {}
    with contextlib.suppress(OSError):
        for each in folder.iterdir():
            os.utime(each)  # used now: the last to be removed
    prune(root, suffix=".engine", most_bytes=MOST_BYTES)
    return options | {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(folder)}


def content_sha256(model: Path | bytes) -> str | None:
    """Return a SHA-256 of a model and of all files that its weights are in; None where one of them is not beside it, or cannot be read."""
    if isinstance(model, bytes):
        return hashlib.sha256(model).hexdigest() if _locations(memoryview(model)) == [] else None
    try:
        with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            names = _locations(memoryview(mapped))
        if names is None or not all(map(_is_inside, names)):
            return None
        paths = [model, *(model.parent / name for name in names)]
        if not all(each.is_file() for each in paths):  # a device or a pipe would never end
            return None
        digests = [_file_sha256(each) for each in paths]
    except (OSError, ValueError):  # ValueError: it is empty, or a name that no file can have
        return None
    return hashlib.sha256(repr([*zip(["", *names], digests, strict=True)]).encode()).hexdigest()


def _is_inside(name: str) -> bool:
    path = Path(name)
    return bool(name) and not path.anchor and ".." not in path.parts


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _locations(view: memoryview) -> list[str] | None:
    """Return the files that tensors of a model are in, each once; None where it cannot be read.

    Nothing is raised: an error in flight holds views of the file, which then cannot be unmapped.
    """
    try:
        return sorted(set(_found(view, "model")))
    except (IndexError, ValueError, RecursionError):
        return None


def _found(view: memoryview, kind: str) -> Iterator[str]:
    holders = _HOLDERS[kind]
    for field, value in _fields(view):
        if field not in holders or not isinstance(value, memoryview):
            continue
        if holders[field] != "entry":
            yield from _found(value, holders[field])
        elif _text(value, 1) == "location":
            yield _text(value, 2)
