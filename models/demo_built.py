"""Demo models built here node by node: a text encoder, a recurrent network over speech-like features, and a recommender."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

_OPSET, _IR_VERSION = 17, 8


class _Net:
    """Collects nodes and seeded weights; each method returns the name of the tensor it made."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, npt.NDArray[Any]] = {}

    def constant(self, name: str, value: npt.ArrayLike, dtype: npt.DTypeLike = np.int64) -> str:
        """Store a given value."""
        self._constants[name] = np.asarray(value, dtype=dtype)
        return name

    def normal(self, name: str, *shape: int, std: float, mean: float = 0.0) -> str:
        """Store normal float32 values that depend on the model's and the tensor's name alone."""
        rng = np.random.default_rng([zlib.crc32(self._name.encode()), zlib.crc32(name.encode())])
        self._constants[name] = rng.standard_normal(shape, dtype=np.float32) * np.float32(std) + np.float32(mean)
        return name

    def op(self, op_type: str, name: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Add a node with one output."""
        output = output or name
        self._nodes.append(helper.make_node(op_type, list(inputs), [output], name=name, **attributes))
        return output

    def dense(self, name: str, value: str, fan_in: int, fan_out: int, *, gain: float = 1.0, output: str = "") -> str:
        """Add a linear layer over the last axis; with gain 1 it keeps the variance of its input."""
        weight = self.normal(f"{name}.weight", fan_in, fan_out, std=gain * fan_in**-0.5)
        bias = self.normal(f"{name}.bias", fan_out, std=0.1)
        return self.op("Add", f"{name}/Add", self.op("MatMul", f"{name}/MatMul", value, weight), bias, output=output)

    def relu_dense(self, name: str, value: str, fan_in: int, fan_out: int) -> str:
        """Add a linear layer (He-normal) with ReLU."""
        return self.op("Relu", f"{name}/Relu", self.dense(name, value, fan_in, fan_out, gain=2**0.5))

    def layer_norm(self, name: str, value: str, width: int, *, output: str = "") -> str:
        """Normalise the last axis."""
        scale = self.normal(f"{name}.scale", width, std=0.1, mean=1.0)
        return self.op("LayerNormalization", name, value, scale, self.normal(f"{name}.bias", width, std=0.1), output=output, axis=-1)

    def model(self, inputs: Mapping[str, tuple[int, Sequence[str | int]]], outputs: Mapping[str, Sequence[str | int]]) -> onnx.ModelProto:
        """Return the finished model; `inputs` maps names to element type and shape, outputs are float32."""
        graph = helper.make_graph(
            self._nodes,
            self._name,
            [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
            [numpy_helper.from_array(value, name) for name, value in self._constants.items()],
        )
        opset = helper.make_opsetid("", _OPSET)
        return helper.make_model(graph, opset_imports=[opset], ir_version=_IR_VERSION, producer_name="aivmm")


def build_encoder(
    name: str = "encoder", *, layers: int = 4, width: int = 256, heads: int = 4, vocabulary: int = 8192, positions: int = 512
) -> onnx.ModelProto:
    """Return a BERT-like encoder (post-norm, arXiv:1810.04805).

    Inputs `input_ids` and `attention_mask`, int64 [batch, seq]; outputs `last_hidden_state`
    [batch, seq, width] and `pooled` [batch, width].
    """
    net = _Net(name)
    zero, one = net.constant("zero", [0]), net.constant("one", [1])
    words = net.op("Gather", "embed/words", net.normal("embed.words", vocabulary, width, std=1.0), "input_ids")
    # RoBERTa's positions count the tokens that are not masked. Unlike BERT's slice of the table, they leave no shape for run time.
    counted = net.op("CumSum", "embed/counted", "attention_mask", net.constant("embed.axis", 1))
    places = net.op("Mul", "embed/position_ids", counted, "attention_mask")
    places = net.op("Gather", "embed/positions", net.normal("embed.positions", positions + 1, width, std=0.5), places)
    hidden = net.layer_norm("embed/norm", net.op("Add", "embed/sum", words, places), width)
    mask = net.op("Unsqueeze", "mask/unsqueeze", "attention_mask", net.constant("mask.axes", [1, 2]))
    hole = net.op("Sub", "mask/hole", net.constant("mask.one", 1, np.float32), net.op("Cast", "mask/float", mask, to=TensorProto.FLOAT))
    bias = net.op("Mul", "mask/bias", hole, net.constant("mask.low", -1e4, np.float32))
    for layer in range(layers):
        output = "last_hidden_state" if layer == layers - 1 else ""
        hidden = _encoder_layer(net, f"layer{layer}", hidden, bias, width=width, heads=heads, output=output)
    first = net.op("Squeeze", "pool/first", net.op("Slice", "pool/slice", hidden, zero, one, one), one)
    net.op("Tanh", "pool/tanh", net.dense("pool", first, width, width), output="pooled")
    tokens = (TensorProto.INT64, ("batch", "seq"))
    return net.model(
        {"input_ids": tokens, "attention_mask": tokens},
        {"last_hidden_state": ("batch", "seq", width), "pooled": ("batch", width)},
    )


def build_vision_transformer(
    name: str = "vit", *, layers: int = 12, width: int = 384, heads: int = 6, patch: int = 16, pixels: int = 224, classes: int = 1000
) -> onnx.ModelProto:
    """Return a vision transformer (arXiv:2010.11929; the defaults are ViT-S/16), with the norms where BERT has them.

    Input `pixel_values`, float32 [batch, 3, pixels, pixels]; output `logits` [batch, classes].
    """
    net = _Net(name)
    places = (pixels // patch) ** 2
    kernel = net.normal("embed.kernel", width, 3, patch, patch, std=(3 * patch * patch) ** -0.5)
    patches = net.op("Conv", "embed/patches", "pixel_values", kernel, strides=[patch, patch], kernel_shape=[patch, patch])
    tokens = net.op("Reshape", "embed/flat", patches, net.constant("embed.flat", [0, width, places]))
    tokens = net.op("Transpose", "embed/tokens", tokens, perm=(0, 2, 1))
    hidden = net.op("Add", "embed/sum", tokens, net.normal("embed.positions", places, width, std=0.5))
    hidden = net.layer_norm("embed/norm", hidden, width)
    nothing = net.constant("mask.nothing", 0, np.float32)
    for layer in range(layers):
        hidden = _encoder_layer(net, f"layer{layer}", hidden, nothing, width=width, heads=heads, output="")
    mean = net.op("ReduceMean", "pool/mean", hidden, axes=[1], keepdims=0)
    net.dense("head", mean, width, classes, output="logits")
    image = (TensorProto.FLOAT, ("batch", 3, pixels, pixels))
    return net.model({"pixel_values": image}, {"logits": ("batch", classes)})


def _encoder_layer(net: _Net, name: str, hidden: str, bias: str, *, width: int, heads: int, output: str) -> str:
    """Add self-attention and a GELU feed-forward part, each with its residual sum and norm after it."""
    split, merged = net.constant("heads.split", [0, 0, heads, width // heads]), net.constant("heads.merged", [0, 0, width])

    def project(which: str, perm: tuple[int, ...]) -> str:
        value = net.op("Reshape", f"{name}/{which}/split", net.dense(f"{name}.{which}", hidden, width, width), split)
        return net.op("Transpose", f"{name}/{which}/heads", value, perm=perm)

    query, key, value = project("query", (0, 2, 1, 3)), project("key", (0, 2, 3, 1)), project("value", (0, 2, 1, 3))
    scores = net.op("Div", f"{name}/scale", net.op("MatMul", f"{name}/scores", query, key), _scalar(net, "root", (width / heads) ** 0.5))
    weights = net.op("Softmax", f"{name}/softmax", net.op("Add", f"{name}/masked", scores, bias), axis=-1)
    mixed = net.op("Transpose", f"{name}/back", net.op("MatMul", f"{name}/mix", weights, value), perm=(0, 2, 1, 3))
    attended = net.dense(f"{name}.attended", net.op("Reshape", f"{name}/merge", mixed, merged), width, width)
    hidden = net.layer_norm(f"{name}/norm1", net.op("Add", f"{name}/sum1", hidden, attended), width)
    inner = _gelu(net, f"{name}/gelu", net.dense(f"{name}.inner", hidden, width, 4 * width))
    outer = net.dense(f"{name}.outer", inner, 4 * width, width)
    return net.layer_norm(f"{name}/norm2", net.op("Add", f"{name}/sum2", hidden, outer), width, output=output)


def _scalar(net: _Net, name: str, value: float) -> str:
    return net.constant(f"scalar.{name}", value, np.float32)


def _gelu(net: _Net, name: str, value: str) -> str:
    """Add x (1 + erf(x / sqrt 2)) / 2, in the nodes that exporters write before opset 20."""
    erf = net.op("Erf", f"{name}/erf", net.op("Div", f"{name}/div", value, _scalar(net, "sqrt2", 2**0.5)))
    product = net.op("Mul", f"{name}/mul", value, net.op("Add", f"{name}/add", erf, _scalar(net, "one", 1.0)))
    return net.op("Mul", f"{name}/half", product, _scalar(net, "half", 0.5))


def build_lstm() -> onnx.ModelProto:
    """Return a speech-like network: `features` float32 [batch, time, 80], 2 LSTM layers of 256, `logits` [batch, time, 64]."""
    features, width, classes = 80, 256, 64
    net = _Net("lstm")
    direction = net.constant("direction", [1])
    value = net.op("Transpose", "time_first", "features", perm=(1, 0, 2))
    for layer, fan_in in enumerate((features, width)):
        name = f"lstm{layer}"
        weights = net.normal(f"{name}.w", 1, 4 * width, fan_in, std=fan_in**-0.5)
        recurrent = net.normal(f"{name}.r", 1, 4 * width, width, std=width**-0.5)
        bias = net.normal(f"{name}.b", 1, 8 * width, std=0.1)
        value = net.op("LSTM", name, value, weights, recurrent, bias, hidden_size=width)
        value = net.op("Squeeze", f"{name}/squeeze", value, direction)
    value = net.op("Transpose", "batch_first", value, perm=(1, 0, 2))
    net.dense("classes", value, width, classes, gain=4.0, output="logits")  # an LSTM's outputs are small: about 0.3
    return net.model({"features": (TensorProto.FLOAT, ("batch", "time", features))}, {"logits": ("batch", "time", classes)})


_TABLES = {"user": 20000, "item": 20000, "ad": 5000, "city": 2000, "publisher": 1000, "category": 500, "device": 50, "hour": 24}


def build_recommender() -> onnx.ModelProto:
    """Return a DLRM-like network (arXiv:1906.00091): eight `<table>_id` int64 [batch], `dense` float32 [batch, 13], `score` [batch, 1]."""
    width, dense = 32, 13
    net = _Net("recommender")
    bottom = net.relu_dense("bottom1", net.relu_dense("bottom0", "dense", dense, 128), 128, width)
    axis = net.constant("axis", [1])
    rows = [net.op("Unsqueeze", "bottom/row", bottom, axis)]
    for table, size in _TABLES.items():
        weights = net.normal(f"{table}.table", size, width, std=width**-0.25)  # so that products of two rows have deviation 1
        rows.append(net.op("Unsqueeze", f"{table}/row", net.op("Gather", f"{table}/lookup", weights, f"{table}_id"), axis))
    stacked = net.op("Concat", "interact/rows", *rows, axis=1)
    products = net.op("MatMul", "interact/products", stacked, net.op("Transpose", "interact/columns", stacked, perm=(0, 2, 1)))
    count = len(rows)
    lower = np.flatnonzero(np.tri(count, k=-1))
    flat = net.op("Reshape", "interact/flat", products, net.constant("interact.shape", [0, count * count]))
    pairs = net.op("Gather", "interact/pairs", flat, net.constant("interact.lower", lower), axis=1)
    value = net.op("Concat", "top/features", bottom, pairs, axis=1)
    value = net.relu_dense("top1", net.relu_dense("top0", value, width + len(lower), 256), 256, 128)
    net.op("Sigmoid", "top/sigmoid", net.dense("top2", value, 128, 1), output="score")
    inputs: dict[str, tuple[int, Sequence[str | int]]] = {f"{table}_id": (TensorProto.INT64, ("batch",)) for table in _TABLES}
    return net.model({**inputs, "dense": (TensorProto.FLOAT, ("batch", dense))}, {"score": ("batch", 1)})


BUILDERS: Mapping[str, Callable[[], onnx.ModelProto]] = {
    "encoder": build_encoder,
    "lstm": build_lstm,
    "recommender": build_recommender,
}
