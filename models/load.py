"""Reads an ONNX file that may be anything: what cannot be used is refused with one line that says what it is and what to do."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from aivmm.errors import ModelError, UsageError
from aivmm.models.intake_check import check_graph
from aivmm.models.intake_external import external_files
from aivmm.models.intake_sniff import HEAD_BYTES, sniff
from aivmm.models.model_file import require_file, shown

_LIMIT_BYTES = 2**31 - 1  # protobuf's own limit
_DAMAGED = "the file is truncated or damaged: download or export it again"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A checked model file. External weights are still references in `proto`, so a model of any size can be held."""

    path: Path
    proto: onnx.ModelProto
    sha256: str  # of the file; of the list of hashes, sorted by name, when weights lie in other files
    external: tuple[Path, ...]  # files with weights, in the model's folder


def load_model(path: Path) -> LoadedModel:
    """Read and check an ONNX file.

    Raises `UsageError` for a path that cannot be read, `ModelError` for content that is not a sound ONNX model: not ONNX at all,
    truncated, weights missing or outside its folder, undefined or doubly defined tensors, cycles. Operators are not judged here:
    a runtime may know custom ones.
    """
    content = _read(path)
    proto = _parse(content, path)
    external = external_files(proto, path.parent)
    check_graph(proto)
    return LoadedModel(path=path, proto=proto, sha256=_digest(content, path, external), external=external)


def _read(path: Path) -> bytes:
    info = require_file(path)
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
            guess = sniff(head)
            if guess is not None:
                raise ModelError(f"{shown(path)} is not ONNX: it looks like {guess.what}", advice=guess.advice)
            if info.st_size > _LIMIT_BYTES:
                raise ModelError(
                    f"{shown(path)} has {info.st_size} bytes, more than an ONNX file can hold (2 GiB)",
                    advice="store the weights beside it: onnx.save(..., save_as_external_data=True)",
                )
            return head + file.read()
    except OSError as error:
        raise UsageError(
            f"cannot read {shown(path)}: {error.strerror or error}", advice="give the path of a readable .onnx file"
        ) from error


def _parse(content: bytes, path: Path) -> onnx.ModelProto:
    """Protobuf reads nearly anything as *some* message, so what was read must also look like a model."""
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(content)
    except DecodeError as error:
        raise ModelError(f"{shown(path)} cannot be decoded as ONNX", advice=_DAMAGED) from error
    if not proto.ir_version and not proto.HasField("graph"):
        raise ModelError(f"{shown(path)} is not ONNX (no version and no graph in it)", advice="give a binary .onnx file")
    for missing, lacking in (
        (not proto.HasField("graph"), "no graph"),
        (not proto.graph.node, "a graph without nodes"),
        (not proto.graph.output, "a graph without outputs"),
        (proto.ir_version >= 3 and not proto.opset_import, "no operator set versions (opset_import)"),
    ):
        if missing:
            raise ModelError(f"{shown(path)} has {lacking}", advice=_DAMAGED)
    return proto


def _digest(content: bytes, path: Path, external: tuple[Path, ...]) -> str:
    own = hashlib.sha256(content).hexdigest()
    if not external:
        return own
    whole = hashlib.sha256(f"{own}\n".encode())
    for file in external:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        whole.update(f"{file.relative_to(path.parent).as_posix()}\0{digest}\n".encode())
    return whole.hexdigest()
