"""The family a model belongs to, told from its operators. It names things for the reader; nothing is decided by it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import onnx

from aivmm.models.input_trace import nodes_of, subgraphs, without_functions
from aivmm.models.records import Category

_CONV = frozenset(["Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "FusedConv", "NhwcConv", "NhwcFusedConv", "DeformConv"])
_RECURRENT = frozenset(["LSTM", "GRU", "RNN", "DynamicQuantizeLSTM", "AttnLSTM"])
_FUSED_ATTENTION = frozenset(
    [
        "Attention",
        "MultiHeadAttention",
        "DecoderMaskedMultiHeadAttention",
        "DecoderMaskedSelfAttention",
        "DecoderAttention",
        "GroupQueryAttention",
        "QAttention",
        "PackedAttention",
        "PackedMultiHeadAttention",
        "LongformerAttention",
        "SparseAttention",
        "PagedAttention",
        "RelativePositionAttention",
        "QOrderedAttention",
        "LinearAttention",
    ]
)
_PRODUCT = frozenset(["MatMul", "Gemm", "Einsum", "MatMulInteger", "QLinearMatMul", "FusedMatMul", "TransposeMatMul"])
_DENSE = _PRODUCT | {"MatMulNBits", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QGemm"}
_BETWEEN = frozenset(
    [
        "Cast",
        "Dropout",
        "Identity",
        "QuantizeLinear",
        "DequantizeLinear",
        "Where",
        "Reshape",
        "Transpose",
        "Squeeze",
        "Unsqueeze",
        "Mul",
        "Div",
        "Add",
        "Sub",
        "Expand",
        "Slice",
        "Clip",
        "Max",
        "Concat",
        "Tanh",
    ]
)  # what exporters put between the products of an attention and its softmax
_SOFTMAX = frozenset({"Softmax", "QLinearSoftmax", "BiasSoftmax", "LogSoftmax"})
_SPECTRAL = frozenset({"STFT", "MelWeightMatrix"})
_SCIENCE = frozenset({"DFT", "Rfft", "Irfft", "Det", "Inverse", "ComplexMul"})
_SCATTER = frozenset({"Scatter", "ScatterElements", "ScatterND", "GatherElements"})
_IDS = frozenset(
    [
        "Cast",
        "Reshape",
        "Unsqueeze",
        "Squeeze",
        "Slice",
        "Identity",
        "Transpose",
        "Flatten",
        "Split",
        "Concat",
        "Add",
        "Mod",
        "Clip",
        "Gather",
        "Where",
        "Sub",
        "Max",
        "Min",
    ]
)
_WIDE = {onnx.TensorProto.DOUBLE, onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128}
_INTEGERS = {onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.UINT32, onnx.TensorProto.UINT64}


def detect(model: onnx.ModelProto) -> Category:
    """Return the family of `model` with the operators that say so; `unknown` when nothing does. Subgraphs and functions count too."""
    facts = _Facts.of(without_functions(model))
    return next(_verdicts(facts))


def _verdicts(facts: _Facts) -> Iterator[Category]:
    """Yield what the facts say, the strongest first."""
    seen = ", ".join(facts.seen()) or "no operator that tells a family"
    convolution_wins = facts.conv >= 10 * facts.attention  # YOLO 11 and diffusion U-Nets have a few attentions
    if facts.recurrent and facts.recurrent >= facts.attention:
        yield Category(name="RNN/speech", reason=f"{seen}: recurrent")
    if facts.attention and not convolution_wins:
        if facts.image:
            yield Category(name="vision transformer", reason=f"{seen}, over images")
        if (facts.conv or facts.spectral) and not facts.tables:
            yield Category(name="RNN/speech", reason=f"{seen}, over a signal and not over token ids")
        yield Category(name="language transformer", reason=f"{seen}, over {'token ids' if facts.tables else 'a sequence'}")
    if facts.spectral:
        yield Category(name="RNN/speech", reason=f"{seen}: it takes spectra of a signal")
    if facts.science or facts.wide:
        yield Category(name="scientific/graph", reason=f"{seen}: numerical computing, not a usual network")
    if facts.conv and facts.conv >= facts.scatter:
        without = "" if facts.attention else ", no attention"
        yield Category(name="CNN", reason=f"{seen}{without}")
    if facts.scatter >= 2 or (facts.scatter and facts.loose_gather):
        yield Category(name="scientific/graph", reason=f"{seen}: values go to and come from computed places, as over a graph")
    if facts.tables and (facts.tables >= 2 or facts.dense_input) and facts.dense:
        yield Category(name="recommender", reason=f"{seen}, no attention: ids looked up in tables, then dense layers")
    if facts.loose_gather >= 2:
        yield Category(name="scientific/graph", reason=f"{seen}: values are gathered by indices that are inputs, as over a graph")
    yield Category(name="unknown", reason=f"{seen}: nothing that tells a family" if facts.seen() else seen)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    """Counts of what tells families apart."""

    conv: int
    attention: int
    recurrent: int
    spectral: int
    science: int
    wide: int  # inputs and weights of float64 or complex numbers
    scatter: int
    loose_gather: int  # gathers of computed values by indices that are inputs
    tables: int  # constant tables looked up by integer inputs
    dense: int
    image: bool  # an input has the shape of images
    dense_input: bool  # a float input

    @classmethod
    def of(cls, model: onnx.ModelProto) -> _Facts:
        graph = _Graph(model)
        operators = graph.operators
        image = any(_is_image(each) for each in graph.inputs)
        return cls(
            conv=sum(operators[each] for each in _CONV),
            attention=sum(operators[each] for each in _FUSED_ATTENTION) + sum(map(graph.is_attention, graph.nodes)),
            recurrent=sum(operators[each] for each in _RECURRENT),
            spectral=sum(operators[each] for each in _SPECTRAL),
            science=sum(operators[each] for each in _SCIENCE),
            wide=graph.wide(),
            scatter=sum(operators[each] for each in _SCATTER),
            loose_gather=graph.loose_gathers(),
            tables=graph.tables(),
            dense=sum(operators[each] for each in _DENSE),
            image=image,
            dense_input=any(each.type.tensor_type.elem_type == onnx.TensorProto.FLOAT for each in graph.inputs),
        )

    def seen(self) -> list[str]:
        """Return the counts that are not zero, for people."""
        counts = {
            "Conv": self.conv,
            "attention": self.attention,
            "recurrent layer": self.recurrent,
            "embedding table": self.tables,
            "dense product": self.dense,
            "spectral operator": self.spectral,
            "numerical operator": self.science,
            "float64 or complex tensor": self.wide,
            "Scatter": self.scatter,
            "gather by input ids": self.loose_gather,
        }
        return [
            f"{count} {name}{'s' if count > 1 and name not in ('Conv', 'attention') else ''}" for name, count in counts.items() if count
        ]


class _Graph:
    """A model's nodes, of subgraphs too, with who makes and who reads each tensor."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = list(nodes_of(model.graph))
        self.operators = Counter(node.op_type for node in self.nodes)
        graphs = [model.graph, *(body for node in self.nodes for body in subgraphs(node))]
        self._weights = {each.name: each for graph in graphs for each in graph.initializer}
        self._constant = set(self._weights)
        self._maker: dict[str, onnx.NodeProto] = {}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            computed = [each for each in node.input if each and each not in self._constant]
            if not computed and node.op_type not in ("If", "Loop", "Scan") and not node.op_type.startswith("Random"):
                self._constant.update(node.output)
            self._maker.update(dict.fromkeys(node.output, node))
            for each in node.input:
                self._readers.setdefault(each, []).append(node)
        self.inputs = [each for each in model.graph.input if each.name not in self._weights]

    def is_attention(self, node: onnx.NodeProto) -> bool:
        """Say whether `node` is the softmax of an attention: it weighs computed values by products of computed values."""
        return node.op_type in _SOFTMAX and self._from_product(node) and self._into_product(node)

    def _is_product(self, node: onnx.NodeProto) -> bool:
        return node.op_type in _PRODUCT and sum(each not in self._constant for each in node.input[:2]) == 2

    def _from_product(self, softmax: onnx.NodeProto) -> bool:
        seen: set[str] = set()
        todo = list(softmax.input[:1])
        while todo:
            name = todo.pop()
            maker = self._maker.get(name)
            if name in seen or maker is None:
                continue
            seen.add(name)
            if self._is_product(maker):
                return True
            if maker.op_type in _BETWEEN:
                todo.extend(maker.input)
        return False

    def _into_product(self, softmax: onnx.NodeProto) -> bool:
        seen: set[str] = set()
        todo = list(softmax.output)
        while todo:
            name = todo.pop()
            if name in seen:
                continue
            seen.add(name)
            for reader in self._readers.get(name, ()):
                if self._is_product(reader):
                    return True
                if reader.op_type in _BETWEEN:
                    todo.extend(reader.output)
        return False

    def _ids(self) -> set[str]:
        """Return the tensors that integer inputs flow into as they are, or shifted."""
        names = {each.name for each in self.inputs if each.type.tensor_type.elem_type in _INTEGERS}
        for node in self.nodes:  # in topological order
            if node.op_type in _IDS and node.input and not names.isdisjoint(node.input[1:] if node.op_type == "Where" else node.input[:1]):
                names.update(node.output)
        return names

    def _id_gathers(self) -> Iterator[onnx.NodeProto]:
        ids = self._ids()
        for node in self.nodes:
            if node.op_type in ("Gather", "GatherND", "GatherBlockQuantized") and len(node.input) > 1 and node.input[1] in ids:
                yield node

    def tables(self) -> int:
        """Count constant tables looked up by integer inputs."""
        return (
            len({node.input[0] for node in self._id_gathers() if node.input[0] in self._constant})
            + self.operators["EmbedLayerNormalization"]
        )

    def loose_gathers(self) -> int:
        """Count gathers of computed values by integer inputs."""
        ids = self._ids()
        return sum(node.input[0] not in self._constant and node.input[0] not in ids for node in self._id_gathers())

    def wide(self) -> int:
        """Count float64 and complex tensors among inputs and weights with more than one element: lone ones are exporters' constants."""
        inputs = sum(each.type.tensor_type.elem_type in _WIDE for each in self.inputs)
        return inputs + sum(each.data_type in _WIDE and len(each.dims) > 1 for each in self._weights.values())


def _is_image(value: onnx.ValueInfoProto) -> bool:
    """Say whether an input has four axes of which one, where channels stand, has 1, 3 or 4, and is no table of token ids."""
    extents = [extent.dim_value for extent in value.type.tensor_type.shape.dim]
    if value.type.tensor_type.elem_type in _INTEGERS or len(extents) != 4:
        return False
    return extents[1] in (1, 3, 4) or extents[3] in (1, 3, 4) or not any(extents)
