"""Demo image networks: the architectures that the `onnx` package carries for its own tests, given weights that mean something.

There every weight is the constant 0.02 and the output has one value. Here weights are He-normal (He et al. 2015, arXiv:1502.01852),
and one forward pass over a few images sets what training would: batch-norm statistics, and where there is no batch norm a scale and
shift a channel (data-dependent initialisation, Krähenbühl et al. 2016, arXiv:1511.06856). So activations keep their range through the
depth. The classifier looks where images differ, as a trained one does; a random one amplifies rounding tenfold (measured), and would
make int8 and bf16 look worse on a demo than on a real network.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from aivmm.errors import ModelError
from aivmm.models.inputs import image_like

Array = npt.NDArray[Any]

_FILES = {"alexnet": "bvlc_alexnet"}  # where the file's name differs from ours
_OPSET, _IR_VERSION = 17, 8
_CALIBRATION_IMAGES = 8

# What training leaves in a batch norm, roughly: scales below one and a positive shift. Scales of 1 and shifts of 0 make deep random
# networks chaotic: a rounding error of 1e-7 came out as 3e-5.
_SCALE_RANGE, _SHIFT_MEAN, _SHIFT_STD = (0.5, 1.0), 0.5, 0.5
_RESIDUAL_SCALE = 0.4  # on branches that end in a sum, so that depth adds little variance (cf. arXiv:1901.09321)
_LOGIT_VARYING, _LOGIT_COMMON = 1.0, 1.5  # standard deviations: between images, and between classes for the average image


def build_light(name: str) -> onnx.ModelProto:
    """Return the architecture `name` at opset 17 with seeded weights, its batch axis the symbolic dimension `batch`.

    Raises:
        ModelError: this installation of `onnx` does not carry the file.
    """
    path = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light" / f"light_{_FILES.get(name, name)}.onnx"
    if not path.is_file():
        raise ModelError(f"demo:{name} needs {path.name}, which the installed onnx package lacks", advice="install onnx from PyPI")
    nodes, constants, image = _modernise(onnx.load(str(path)).graph)
    shape = tuple(extent.dim_value for extent in image.type.tensor_type.shape.dim)
    _Filler(name, nodes, constants).fill(image.name, shape)
    return _assemble(name, nodes, constants, image.name, shape)


def _modernise(graph: onnx.GraphProto) -> tuple[list[onnx.NodeProto], dict[str, Array], onnx.ValueInfoProto]:
    """Return the nodes at opset 17, the constants by name, and the one real input.

    Constant arithmetic is folded, Dropout (nothing at inference) removed, Softmax given the axis it had, and each fixed batch of 1 in
    a Reshape becomes 0, "as the input has it".
    """
    constants = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    image = next(each for each in graph.input if each.name not in constants)
    renamed: dict[str, str] = {}
    nodes = []
    for old in graph.node:
        inputs = [renamed.get(each, each) for each in old.input]
        if old.op_type == "ConstantOfShape":
            constants[old.output[0]] = np.zeros(constants[inputs[0]], np.float32)
        elif old.op_type == "Unsqueeze":
            axes = next(helper.get_attribute_value(each) for each in old.attribute if each.name == "axes")
            constants[old.output[0]] = np.expand_dims(constants[inputs[0]], tuple(axes))
        elif old.op_type == "Reshape" and inputs[0] in constants:
            constants[old.output[0]] = constants[inputs[0]].reshape(constants[inputs[1]])
        elif old.op_type == "Dropout":
            renamed[old.output[0]] = inputs[0]
        else:
            node = onnx.NodeProto()
            node.CopyFrom(old)
            node.name = old.name or f"{old.op_type}_{old.output[0]}"
            node.input[:] = inputs
            if old.op_type == "Reshape":
                constants[inputs[1]] = np.array([0, *constants[inputs[1]][1:]], np.int64)
            elif old.op_type == "Softmax" and not old.attribute:
                node.attribute.append(helper.make_attribute("axis", 1))  # the default was 1 before opset 13; trailing extents are 1 here
            nodes.append(node)
    return nodes, constants, image


def _assemble(
    name: str, nodes: Sequence[onnx.NodeProto], constants: Mapping[str, Array], image: str, shape: Sequence[int]
) -> onnx.ModelProto:
    """Return the finished model, its edges renamed to `image` and `probabilities` (or `logits` where no Softmax ends it)."""
    last = nodes[-1]
    edges = {image: "image", last.output[0]: "probabilities" if last.op_type == "Softmax" else "logits"}
    for node in nodes:
        node.input[:] = [edges.get(each, each) for each in node.input]
        node.output[:] = [edges.get(each, each) for each in node.output]
    classes: tuple[str | int, ...] = ("batch", 1000) if any(node.op_type == "Gemm" for node in nodes) else ("batch", 1000, 1, 1)
    used = dict.fromkeys(each for node in nodes for each in node.input if each in constants)
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["batch", *shape[1:]])],
        [helper.make_tensor_value_info(last.output[0], onnx.TensorProto.FLOAT, classes)],
        [numpy_helper.from_array(constants[each], each) for each in used],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION, producer_name="aivmm")


class _Filler:
    """One forward pass over calibration images that sets weights and statistics on its way, node by node."""

    def __init__(self, name: str, nodes: Sequence[onnx.NodeProto], constants: dict[str, Array]) -> None:
        self._seed = zlib.crc32(name.encode())
        self._nodes = nodes
        self._constants = constants
        self._run = _node_runner()
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in nodes:
            for each in node.input:
                self._readers.setdefault(each, []).append(node)
        self._classifier = next(node for node in reversed(nodes) if node.op_type in ("Conv", "Gemm"))

    def fill(self, image: str, shape: Sequence[int]) -> None:
        """Set every weight and statistic in `constants`. Activations are dropped after their last reader: VGG's take 100 MB each."""
        values = {image: _calibration_images(self._rng("images"), shape)}
        pending = Counter(each for node in self._nodes for each in node.input)
        for node in self._nodes:
            values[node.output[0]] = self._step(node, values)
            for each in node.input:
                pending[each] -= 1
                if not pending[each]:
                    values.pop(each, None)

    def _rng(self, name: str) -> np.random.Generator:
        return np.random.default_rng([self._seed, zlib.crc32(name.encode())])

    def _step(self, node: onnx.NodeProto, values: Mapping[str, Array]) -> Array:
        if node.op_type in ("Conv", "Gemm"):
            return self._weigh(node, values)
        if node.op_type == "BatchNormalization":
            self._normalise(node, values[node.input[0]])
        return self._evaluate(node, values)

    def _evaluate(self, node: onnx.NodeProto, values: Mapping[str, Array]) -> Array:
        return self._run(node, {each: values[each] if each in values else self._constants[each] for each in node.input})

    def _reader_types(self, node: onnx.NodeProto) -> set[str]:
        return {each.op_type for each in self._readers.get(node.output[0], ())}

    def _weigh(self, node: onnx.NodeProto, values: Mapping[str, Array]) -> Array:
        """Draw the weights of a Conv or Gemm (rows are outputs in both: Gemm has transB=1), set its bias, and return its output."""
        constants, weight = self._constants, node.input[1]
        shape = constants[weight].shape
        fan_in = int(np.prod(shape[1:]))
        drawn = self._rng(weight).standard_normal(shape, dtype=np.float32)
        drawn *= np.float32((2 / fan_in) ** 0.5)
        constants[weight] = drawn
        has_bias = len(node.input) > 2
        if has_bias:
            constants[node.input[2]] = np.zeros(shape[0], np.float32)
        if node is self._classifier:
            return self._classify(node, values)
        output = self._evaluate(node, values)
        if not has_bias or "BatchNormalization" in self._reader_types(node):
            return output
        mean, std = _channel_moments(output)
        scale, shift = self._scale_and_shift(weight, len(mean))
        factor = scale / std
        drawn *= _along_first(factor, drawn.ndim)
        constants[node.input[2]] = shift - mean * factor
        return output * _along_channels(factor, output.ndim) + _along_channels(constants[node.input[2]], output.ndim)

    def _classify(self, node: onnx.NodeProto, values: Mapping[str, Array]) -> Array:
        """Turn the classifier's weights towards the directions in which images differ, and bring its logits to a sane range."""
        constants, weight = self._constants, node.input[1]
        drawn = constants[weight]
        features = _pooled(values[node.input[0]])
        _, strengths, directions = np.linalg.svd(features - features.mean(axis=0), full_matrices=False)
        directions = directions[strengths > 0.1 * strengths[0]]
        flat = drawn.reshape(len(drawn), -1)
        inside = (flat @ directions.T) @ directions * (flat.shape[1] / len(directions)) ** 0.5
        turned = (0.5 * flat + inside).astype(np.float32).reshape(drawn.shape)
        constants[weight] = turned
        logits = _pooled(self._evaluate(node, values))
        common = logits.mean(axis=0)
        factor = np.float32(_LOGIT_VARYING / np.sqrt(np.square(logits - common).mean()))
        constants[weight] = turned * factor
        if len(node.input) > 2:
            centred = (common - common.mean()) * factor
            kept = centred * np.minimum(1, _LOGIT_COMMON / centred.std())
            constants[node.input[2]] = (kept - common * factor).astype(np.float32)
        return self._evaluate(node, values)

    def _normalise(self, node: onnx.NodeProto, value: Array) -> None:
        """Set a batch norm's statistics to those of `value`; its scale and shift go into a Mul and Add after it, where Caffe has them."""
        _, scale_name, shift_name, mean_name, variance_name = node.input
        mean, std = _channel_moments(value)
        scale, shift = self._scale_and_shift(scale_name, len(mean))
        readers = self._readers[node.output[0]]
        if {each.op_type for each in readers} == {"Sum"}:
            scale *= np.float32(_RESIDUAL_SCALE)
        if readers[0].op_type == "Mul":
            (adder,) = self._readers[readers[0].output[0]]
            self._constants[readers[0].input[1]] = _along_first(scale, 3)
            self._constants[adder.input[1]] = _along_first(shift, 3)
            scale, shift = np.ones_like(scale), np.zeros_like(shift)
        self._constants.update({scale_name: scale, shift_name: shift, mean_name: mean, variance_name: np.square(std)})

    def _scale_and_shift(self, name: str, channels: int) -> tuple[Array, Array]:
        rng = self._rng(f"{name}/scale and shift")
        scale = rng.uniform(*_SCALE_RANGE, channels).astype(np.float32)
        return scale, rng.normal(_SHIFT_MEAN, _SHIFT_STD, channels).astype(np.float32)


def _calibration_images(rng: np.random.Generator, shape: Sequence[int]) -> Array:
    """Return images of both kinds a demo meets: with structure, as ours are, and white noise, as many people's first test is."""
    half = _CALIBRATION_IMAGES // 2
    images = np.concatenate([image_like(rng, (half, *shape[1:])), rng.standard_normal((half, *shape[1:]), dtype=np.float32)])
    images[-1] = images[-1] * np.float32(0.3) + np.float32(0.5)  # and like pixels in 0..1
    return images


def _channel_moments(value: Array) -> tuple[Array, Array]:
    """Return mean and standard deviation over all axes but the channels (axis 1); no deviation is below 1e-3, which a dead channel has."""
    axes = (0, *range(2, value.ndim))
    return value.mean(axis=axes), np.maximum(value.std(axis=axes), np.float32(1e-3))


def _pooled(value: Array) -> Array:
    pooled: Array = value.reshape(*value.shape[:2], -1).mean(axis=2)
    return pooled


def _along_first(vector: Array, rank: int) -> Array:
    return vector.reshape(-1, *[1] * (rank - 1))


def _along_channels(vector: Array, rank: int) -> Array:
    return vector.reshape(1, -1, *[1] * (rank - 2))


def _node_runner() -> Callable[[onnx.NodeProto, Mapping[str, Array]], Array]:
    """Return a function that runs one node alone on onnxruntime's CPU and gives its first output.

    A session a node costs about a millisecond. Sessions over all that precedes each batch norm would cost the square of the depth.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 3

    def run(node: onnx.NodeProto, feeds: Mapping[str, Array]) -> Array:
        inputs = [
            helper.make_tensor_value_info(each, helper.np_dtype_to_tensor_dtype(feeds[each].dtype), feeds[each].shape) for each in feeds
        ]
        graph = helper.make_graph([node], "node", inputs, [onnx.ValueInfoProto(name=node.output[0])])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION)
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        output: Array = session.run([node.output[0]], dict(feeds))[0]
        return output

    return run
