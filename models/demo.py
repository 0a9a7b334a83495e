"""The demo models: well-known architectures written out on the spot, with seeded weights, so that nothing is downloaded."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from aivmm.errors import UsageError

if TYPE_CHECKING:
    import onnx


PREFIX = "demo:"


@dataclass(frozen=True, slots=True)
class _Demo:
    description: str
    build: Callable[[str], onnx.ModelProto]


def _light(name: str) -> onnx.ModelProto:
    from aivmm.models.demo_light import build_light

    return build_light(name)


def _built(name: str) -> onnx.ModelProto:
    from aivmm.models import demo_built

    return demo_built.BUILDERS[name]()


_DEMOS: Mapping[str, _Demo] = {
    "squeezenet": _Demo("SqueezeNet 1.1, CNN, image 3x224x224, 1.2 M weights", _light),
    "shufflenet": _Demo("ShuffleNet v1 with 4 groups, CNN, image 3x224x224, 1.4 M weights", _light),
    "resnet50": _Demo("ResNet-50, CNN, image 3x224x224, 26 M weights", _light),
    "densenet121": _Demo("DenseNet-121, CNN, image 3x224x224, 8 M weights", _light),
    "inception_v1": _Demo("GoogLeNet, CNN without batch norm, image 3x224x224, 7 M weights", _light),
    "inception_v2": _Demo("Inception v2, CNN, image 3x224x224, 11 M weights", _light),
    "alexnet": _Demo("AlexNet, CNN, image 3x224x224, 61 M weights (244 MB)", _light),
    "zfnet512": _Demo("ZFNet-512, CNN, image 3x224x224, 87 M weights (349 MB)", _light),
    "vgg19": _Demo("VGG-19, CNN, image 3x224x224, 144 M weights (575 MB)", _light),
    "encoder": _Demo("BERT-like encoder, 4 layers of width 256, dynamic batch and sequence, 5 M weights", _built),
    "lstm": _Demo("speech-like: 2 LSTM layers over 80 features a frame, dynamic batch and time, 0.9 M weights", _built),
    "recommender": _Demo("DLRM-like: 8 embedding tables and 13 dense features to a click score, dynamic batch, 1.6 M weights", _built),
}


def demo_names() -> Mapping[str, str]:
    """Return each demo's name (without the `demo:` prefix) with one line on what it is."""
    return MappingProxyType({name: demo.description for name, demo in _DEMOS.items()})


def demo_of(given: str) -> str | None:
    """Return the name of the demo that a user means by `given`, which begins with `demo:`; None where that is a path.

    Raises:
        UsageError: no demo has this name; lists those there are.
    """
    if not given.startswith(PREFIX):
        return None
    name = given.removeprefix(PREFIX)
    if name not in _DEMOS:
        raise UsageError(f"unknown demo model {given!r}", advice=f"known: {', '.join(PREFIX + each for each in _DEMOS)}")
    return name


def write_demo(name: str, folder: Path) -> Path:
    """Write the demo `name` as `<folder>/<name>.onnx` and return that path; the same bytes each time on one machine.

    A forward pass on onnxruntime's CPU sets the statistics of the image networks, so call this where native code may run.

    Raises:
        UsageError: no demo has this name, or the folder cannot be written.
        ModelError: the installed `onnx` package lacks the architecture.
    """
    if name not in _DEMOS:
        raise UsageError(f"unknown demo model {name!r}", advice=f"choose from {', '.join(_DEMOS)}")
    data = _DEMOS[name].build(name).SerializeToString(deterministic=True)
    path = folder / f"{name}.onnx"
    partial = folder / f".{name}.{os.getpid()}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        partial.replace(path)  # so that a killed process leaves no half a model under the real name
    except OSError as error:
        with contextlib.suppress(OSError):  # it may never have come to be
            partial.unlink()
        raise UsageError(f"cannot write {path}: {error.strerror or error}", advice="choose a folder that can be written") from error
    return path
