"""Tells what a file that is not ONNX looks like, and what to do about it, from its first bytes; nothing is ever unpacked."""

from __future__ import annotations

import re
from dataclasses import dataclass

HEAD_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Guess:
    """What a file looks like ("a PyTorch checkpoint") and what to do with it."""

    what: str
    advice: str


_TORCH = "export it with torch.onnx.export and give the .onnx file"
_PLAIN = "give a binary .onnx file"

# (offset, magic, what it is, advice): only magics that cannot begin a serialised ModelProto, whose first byte is a small field tag.
_MAGICS: tuple[tuple[int, bytes, str, str], ...] = (
    (4, b"TFL3", "a TensorFlow Lite model", "convert it with tf2onnx (python -m tf2onnx.convert --tflite ...) and give the .onnx file"),
    (4, b"ORTM", "an ONNX Runtime .ort model", "give the .onnx file that it was made from"),
    (0, b"\x89HDF\r\n", "an HDF5 file (Keras?)", "convert it with tf2onnx and give the .onnx file"),
    (0, b"GGUF", "a GGUF model", "give an ONNX export of the same model"),
    (0, b"\x1f\x8b", "a gzip archive", "unpack it and give the .onnx file inside"),
    (0, b"BZh", "a bzip2 archive", "unpack it and give the .onnx file inside"),
    (0, b"\xfd7zXZ", "an xz archive", "unpack it and give the .onnx file inside"),
    (0, b"(\xb5/\xfd", "a zstd archive", "unpack it and give the .onnx file inside"),
    (0, b"7z\xbc\xaf", "a 7-Zip archive", "unpack it and give the .onnx file inside"),
    (0, b"\x93NUMPY", "a NumPy array", _PLAIN),
    (0, b"\x89PNG", "a PNG image", _PLAIN),
    (0, b"\xff\xd8\xff", "a JPEG image", _PLAIN),
    (0, b"%PDF", "a PDF document", _PLAIN),
    (0, b"\x7fELF", "a program or library", _PLAIN),
    (257, b"ustar", "a tar archive", "unpack it and give the .onnx file inside"),
)


def sniff(head: bytes) -> Guess | None:
    """Return what the first bytes of a file say it is, or None when they may be ONNX."""
    for offset, magic, what, advice in _MAGICS:
        if head[offset : offset + len(magic)] == magic:
            return Guess(what=what, advice=advice)
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return _zip(head)
    if len(head) > 1 and head[0] == 0x80 and 2 <= head[1] <= 5:
        return Guess(what="a Python pickle (a PyTorch checkpoint?); pickles are never opened", advice=_TORCH)
    if head[8:10] == b'{"' and head[4:8] == b"\0\0\0\0":
        return Guess(what="a safetensors file: weights without a graph", advice="export the model to ONNX")
    return _text(head)


def _zip(head: bytes) -> Guess:
    if b"data.pkl" in head or b"/version" in head or b"archive/" in head:
        return Guess(what="a PyTorch checkpoint (zip)", advice=_TORCH)
    if b".npy" in head:
        return Guess(what="a NumPy archive (.npz)", advice="give it with --inputs, and a .onnx file as the model")
    if b"config.json" in head and b"metadata.json" in head:
        return Guess(what="a Keras model (zip)", advice="convert it with tf2onnx and give the .onnx file")
    return Guess(what="a zip archive", advice="unpack it and give the .onnx file inside")


def _text(head: bytes) -> Guess | None:
    """Text has no control characters but white space; a ModelProto begins with field tags, which are control characters."""
    text = head.decode("utf-8", errors="ignore").lstrip("\ufeff")
    if not text.strip() or re.search(r"[\x00-\x08\x0b\x0e-\x1a\x1c-\x1f]", text) or len(text.encode()) < len(head) - 6:
        return None
    start = text.lstrip()[:1000].lower()
    if start.startswith("version https://git-lfs"):
        return Guess(what="a Git LFS pointer, not the model itself", advice="run `git lfs pull`")
    if start.startswith(("<!doctype html", "<html")):
        return Guess(what="an HTML page (a download that went wrong?)", advice="download the .onnx file itself")
    if re.match(r"(<\?xml[^>]*>\s*)?<net\b", start):
        return Guess(what="an OpenVINO IR (.xml)", advice="give the .onnx file that it was converted from")
    if start.startswith("<"):
        return Guess(what="an XML or HTML file", advice=_PLAIN)
    if re.match(r"""[\[{]\s*["\[{\]}\d-]""", start):
        return Guess(what="JSON text", advice=_PLAIN)
    if re.match(r"(ir_version:|producer_name:|<\s*ir_version)", start):
        return Guess(what="ONNX written as text", advice="convert it: onnx.save(onnx.load(path, format='textproto'), 'model.onnx')")
    return Guess(what="text", advice=_PLAIN)
