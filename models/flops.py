"""Floating-point operations and bytes of one node, from shapes alone.

Conventions, so that numbers compare with those of others: a multiply-add is 2 operations; an elementary function (exp, sqrt, erf) is 1,
as in the usual per-layer counts; a composed function counts the operations of its definition in ONNX's operator reference (Sigmoid = neg,
exp, add, div = 4); integer arithmetic of quantised operators counts like that of floats; moving data is 0. None means unknown: a shape that
is not static, a subgraph whose trip count or branch depends on data, an operator of a foreign domain. Nothing is guessed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import onnx_ir as ir

from aivmm.models.order import elements, nbytes, static_shape, subgraphs

Shape = tuple[int, ...]
Formula = Callable[[ir.Node], float | None]


def _costs(table: str) -> dict[str, float]:
    """Read lines of `cost: operator operator ...`."""
    rows = (line.split(":") for line in table.strip().splitlines())
    return {name: float(cost) for cost, names in rows for name in names.split()}


VIEWS = frozenset(("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Dropout"))  # runtimes do these without touching the data
MOVES = VIEWS | frozenset(
    _costs("""
    0: Transpose Concat Split Slice Gather GatherElements GatherND Expand Tile Pad Shape Size Constant ConstantOfShape DepthToSpace
    0: SpaceToDepth OneHot EyeLike Cast CastLike BitCast Compress NonZero ReverseSequence Trilu CenterCropPad Range Unique ScatterElements
    0: ScatterND Scatter TensorScatter SequenceConstruct SequenceEmpty SequenceInsert SequenceErase SequenceAt SequenceLength
    0: SplitToSequence ConcatFromSequence Optional OptionalGetElement OptionalHasElement StringConcat StringSplit RegexFullMatch
    0: StringNormalizer
    """)
)
# Operations for each element of the (first) output, by the definition of each operator.
ELEMENTWISE = _costs("""
    1: Add Sub Mul Div Pow And Or Xor Not Equal Less Greater LessOrEqual GreaterOrEqual Neg Abs Sqrt Exp Log Reciprocal Floor Ceil Round
    1: Sign Relu Where IsNaN IsInf Erf Sin Cos Tan Asin Acos Atan Sinh Cosh Asinh Acosh Atanh Tanh BitShift BitwiseAnd BitwiseOr BitwiseXor
    1: BitwiseNot Mod CumSum CumProd RandomNormal RandomUniform RandomNormalLike RandomUniformLike Bernoulli Hardmax Binarizer
    2: Clip LeakyRelu PRelu ThresholdedRelu Shrink Scaler BatchNormalization DequantizeLinear
    3: Softsign Softplus Elu LpNormalization RotaryEmbedding
    4: Sigmoid HardSigmoid QuantizeLinear
    5: Celu Selu HardSwish Mish Swish QuickGelu Gelu Softmax RMSNormalization SimplifiedLayerNormalization
    6: BiasGelu DynamicQuantizeLinear LogSoftmax SkipSimplifiedLayerNormalization AffineGrid
    7: MeanVarianceNormalization
    8: LayerNormalization InstanceNormalization GroupNormalization
    9: FastGelu QLinearAdd QLinearMul
    10: QLinearSigmoid SkipLayerNormalization
""")
# Operations for each element of the first input.
REDUCTIONS = _costs("""
    1: ReduceSum ReduceMean ReduceMax ReduceMin ReduceProd ReduceLogSum ArgMax ArgMin TopK GlobalMaxPool GlobalAveragePool MaxRoiPool
    2: ReduceL1 ReduceL2 ReduceSumSquare GlobalLpPool
    3: ReduceLogSumExp
""")
_INPUT_OF_WEIGHT = {"QLinearConv": 3, "QLinearMatMul": 3}  # elsewhere the second input
_STANDARD = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft", "ai.onnx.preview"})


def flops(node: ir.Node) -> float | None:
    """Return the operations of one run of `node`, None when unknown."""
    if node.domain not in _STANDARD or any(True for _ in subgraphs(node)):
        return None
    if node.op_type in MOVES:
        return 0.0
    if node.op_type in FORMULAS:
        return FORMULAS[node.op_type](node)
    if node.op_type in ELEMENTWISE:
        shape = _output(node)
        return None if shape is None else ELEMENTWISE[node.op_type] * elements(shape)
    if node.op_type in REDUCTIONS:
        shape = _input(node, 0)
        return None if shape is None else REDUCTIONS[node.op_type] * elements(shape)
    return None


def bytes_moved(node: ir.Node) -> int | None:
    """Return the bytes that `node` must read and write once: inputs, weights and outputs, None when a size is unknown.

    Operators that pick from a table (Gather, Slice, ...) read what they pick, not the table; Shape and Size read nothing.
    """
    if any(True for _ in subgraphs(node)):
        return None
    sizes = [nbytes(value) for value in node.outputs if value.name]
    if node.op_type in ("Shape", "Size"):
        read: list[int | None] = []
    elif node.op_type in ("Gather", "GatherElements", "GatherND", "Slice"):
        read = [*sizes[:1], *(nbytes(value) for value in node.inputs[1:] if value is not None)]
    else:
        read = [nbytes(value) for value in dict.fromkeys(node.inputs) if value is not None]
    known = [size for size in (*sizes, *read) if size is not None]
    return sum(known) if len(known) == len(sizes) + len(read) else None


def _input(node: ir.Node, index: int) -> Shape | None:
    return static_shape(node.inputs[index]) if index < len(node.inputs) else None


def _has(node: ir.Node, index: int) -> bool:
    return index < len(node.inputs) and node.inputs[index] is not None


def _output(node: ir.Node) -> Shape | None:
    return static_shape(node.outputs[0]) if node.outputs else None


def _int(node: ir.Node, name: str, default: int) -> int:
    return int(node.attributes.get_int(name, default))


def _variadic(node: ir.Node) -> float | None:
    """Sum, Max, Min, Mean of n tensors: n - 1 operations an element, one more for the division of a mean."""
    shape = _output(node)
    extra = 1 if node.op_type == "Mean" else 0
    return None if shape is None else float(elements(shape) * max(0, len(node.inputs) - 1 + extra))


def _convolution(node: ir.Node) -> float | None:
    """2 · outputs · (input channels / groups) · kernel, plus the bias: weights are [M, C/groups, k1, k2, ...] (Sze et al. 2017, eq. 1)."""
    index = _INPUT_OF_WEIGHT.get(node.op_type, 1)
    weight, output = _input(node, index), _output(node)
    if weight is None or output is None:
        return None
    bias = _has(node, 8) if node.op_type == "QLinearConv" else node.op_type in ("Conv", "FusedConv") and _has(node, 2)
    sampling = 8 * elements(weight[1:]) if node.op_type == "DeformConv" else 0  # a bilinear sample is 4 multiply-adds
    return float(elements(output) * (2 * elements(weight[1:]) + sampling + bias))


def _transposed(node: ir.Node) -> float | None:
    """2 · inputs · (output channels / groups) · kernel, plus the bias: an input is spread over a kernel; weights are [C, M/groups, ...]."""
    weight, data, output = _input(node, 1), _input(node, 0), _output(node)
    if weight is None or data is None or output is None:
        return None
    return float(2 * elements(data) * elements(weight[1:]) + _has(node, 2) * elements(output))


def _gemm(node: ir.Node) -> float | None:
    """2·M·N·K for alpha·A·B, plus M·N for C."""
    left, output = _input(node, 0), _output(node)
    if left is None or output is None or len(left) != 2:
        return None
    depth = left[0] if _int(node, "transA", 0) else left[1]
    return float(elements(output) * (2 * depth + _has(node, 2)))


def _matmul(node: ir.Node) -> float | None:
    """2 · outputs · K, where K is the last extent of A, the last but one when A is transposed."""
    left, output = _input(node, 0), _output(node)
    if not left or output is None:
        return None
    depth = left[-2] if _int(node, "transA", 0) and len(left) > 1 else left[-1]
    return float(2 * elements(output) * depth)


def _pool(node: ir.Node) -> float | None:
    """One operation for each element under the kernel, for each output; LpPool also raises each to a power."""
    output, kernel = _output(node), node.attributes.get_ints("kernel_shape", [])
    if output is None or not kernel:
        return None
    return float(elements(output) * elements(kernel) * (2 if node.op_type == "LpPool" else 1))


def _lrn(node: ir.Node) -> float | None:
    """x / (bias + alpha/size · sum of `size` squares) ^ beta: 2·size + 4 an element."""
    shape = _output(node)
    return None if shape is None else float(elements(shape) * (2 * _int(node, "size", 1) + 4))


def _recurrent(node: ir.Node) -> float | None:
    """gates · [2·H·(I + H) + biases] a step, sample and direction, plus the cell's elementwise work (ONNX reference: LSTM, GRU, RNN).

    Elementwise operations a hidden unit: LSTM 18 (3 sigmoids of 4, 2 tanh, 3 multiplications, 1 addition), GRU 14 (2 sigmoids,
    1 tanh, 3 multiplications, 1 subtraction, 1 addition), RNN 1. W is [directions, gates·H, I].
    """
    data, weight, recurrent = _input(node, 0), _input(node, 1), _input(node, 2)
    if data is None or weight is None or recurrent is None or len(data) != 3:
        return None
    elementwise = {"LSTM": 18, "GRU": 14, "RNN": 1}[node.op_type]
    directions, gated, size = weight
    hidden = recurrent[2]
    step = 2 * gated * (size + hidden) + 2 * gated + elementwise * hidden
    return float(data[0] * data[1] * directions * step)


def _einsum(node: ir.Node) -> float | None:
    """Without a contraction order every index is looped over: operands · product of all extents; None for ellipses and repeated indices."""
    equation = str(node.attributes.get_string("equation", "")).replace(" ", "")
    terms = equation.split("->")[0].split(",")
    shapes = [_input(node, index) for index in range(len(node.inputs))]
    if "." in equation or len(terms) != len(shapes):
        return None
    extents: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        if shape is None or len(shape) != len(term) or len(set(term)) != len(term):
            return None
        extents.update({letter: max(extent, extents.get(letter, 1)) for letter, extent in zip(term, shape, strict=True)})
    return float(len(terms) * math.prod(extents.values()))


def _attention(node: ir.Node) -> float | None:
    """ONNX Attention: Q·Kᵀ and P·V, 2·B·H·L·S·(E + Ev), plus 5 for each score (softmax) and 1 for the scale. Past keys lengthen S."""
    query, key, value = (_input(node, index) for index in range(3))
    if query is None or key is None or value is None or len(query) not in (3, 4):
        return None
    if len(query) == 4:
        batch, heads, length, size = query
        span, out = key[2], value[3]
    else:
        heads, key_heads = _int(node, "q_num_heads", 0), _int(node, "kv_num_heads", 0)
        if not heads or not key_heads:
            return None
        batch, length, size = query[0], query[1], query[2] // heads
        span, out = key[1], value[2] // key_heads
    if _has(node, 4):
        past = _input(node, 4)
        if past is None:
            return None
        span += past[2]
    return float(batch * heads * length * span * (2 * (size + out) + 6))


def _fused_attention(node: ir.Node) -> float | None:
    """com.microsoft Attention: the projection 2·B·L·I·(all of Q, K, V) and the attention over `num_heads`; None with a past."""
    data, weight, output = _input(node, 0), _input(node, 1), _output(node)
    heads = _int(node, "num_heads", 0)
    if data is None or weight is None or output is None or len(data) != 3 or not heads or _has(node, 4):
        return None
    batch, length, size = data
    hidden = output[2]
    return float(2 * batch * length * size * weight[1] + batch * length * length * (4 * hidden + 6 * heads))


def _multi_head_attention(node: ir.Node) -> float | None:
    """com.microsoft MultiHeadAttention on unpacked [B, L, E] queries, keys, values; None for packed ones and with a past."""
    query, key, value = (_input(node, index) for index in range(3))
    heads = _int(node, "num_heads", 0)
    if query is None or key is None or value is None or not len(query) == len(key) == len(value) == 3 or not heads or _has(node, 6):
        return None
    return float(query[0] * query[1] * key[1] * (2 * (query[2] + value[2]) + 6 * heads))


def _matmul_nbits(node: ir.Node) -> float | None:
    """com.microsoft MatMulNBits: 2 · outputs · K, with K in an attribute because B is packed."""
    output = _output(node)
    depth = _int(node, "K", 0)
    return None if output is None or not depth else float(2 * elements(output) * depth)


def _resize(node: ir.Node) -> float | None:
    """Nearest moves data; linear blends 2^d and cubic 4^d neighbours an output by multiply-adds, d being the extents that change."""
    data, output = _input(node, 0), _output(node)
    mode = str(node.attributes.get_string("mode", "nearest"))
    if data is None or output is None or len(data) != len(output):
        return None
    neighbours = {"nearest": 0, "linear": 2, "bilinear": 2, "cubic": 4}.get(mode, 0)
    changed = sum(before != after for before, after in zip(data, output, strict=True))
    return float(2 * elements(output) * neighbours**changed) if neighbours and changed else 0.0


def _grid_sample(node: ir.Node) -> float | None:
    """2^d (linear) or 4^d (cubic) multiply-adds an output, d spatial extents, plus 4·d a grid point to find the place."""
    grid, output = _input(node, 1), _output(node)
    if grid is None or output is None:
        return None
    mode = str(node.attributes.get_string("mode", "linear"))
    neighbours = 0 if mode == "nearest" else 4 if "cubic" in mode else 2
    return float(2 * elements(output) * neighbours ** grid[-1] * bool(neighbours) + 4 * elements(grid))


def _fourier(node: ir.Node) -> float | None:
    """5·N·log2(N) a transform, the customary count of FFT benchmarks (FFTW: "mflops"); N is the frame of STFT, the axis of DFT's output."""
    output = _output(node)
    if output is None or len(output) < 2:
        return None
    size = output[-2]
    return float(5 * elements(output[:-2]) * size * math.log2(size)) if size > 1 else 0.0


FORMULAS: dict[str, Formula] = {
    **dict.fromkeys(("Conv", "FusedConv", "ConvInteger", "QLinearConv", "DeformConv"), _convolution),
    **dict.fromkeys(("MatMul", "FusedMatMul", "MatMulInteger", "QLinearMatMul", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"), _matmul),
    **dict.fromkeys(("Gemm", "FusedGemm"), _gemm),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), _recurrent),
    **dict.fromkeys(("MaxPool", "AveragePool", "LpPool"), _pool),
    **dict.fromkeys(("Sum", "Max", "Min", "Mean"), _variadic),
    **dict.fromkeys(("Resize", "Upsample"), _resize),
    **dict.fromkeys(("DFT", "STFT"), _fourier),
    "ConvTranspose": _transposed,
    "Einsum": _einsum,
    "LRN": _lrn,
    "MatMulNBits": _matmul_nbits,
    "MultiHeadAttention": _multi_head_attention,
    "GridSample": _grid_sample,
}


def _attention_of_domain(node: ir.Node) -> float | None:
    return _fused_attention(node) if node.domain == "com.microsoft" else _attention(node)


FORMULAS["Attention"] = _attention_of_domain
