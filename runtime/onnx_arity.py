"""Whether the nodes of a model have the inputs that their operators cannot do without.

OpenVINO's reader reads past the inputs of a node that has too few (seen with 2026.4: a Conv without weights ends the process), and ONNX
Runtime refuses such a model. So it is refused before either sees it. Read from the protobuf bytes, without `onnx`, as in `onnx_interface`.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator

from aivmm.runtime.onnx_interface import _fields

# Fewest inputs -> the operators of the standard domain that need as many, in any version; tests hold it against `onnx.defs`.
_NEEDED = {
    1: (
        "Abs Acos Acosh ArgMax ArgMin Asin Asinh Atan Atanh AveragePool Bernoulli BitCast BitwiseNot BlackmanWindow Cast Ceil "
        "Celu Clip Concat ConcatFromSequence ConstantOfShape Cos Cosh DFT DepthToSpace Det Dropout DynamicQuantizeLinear Einsum "
        "Elu Erf Exp EyeLike Flatten Floor Gelu GlobalAveragePool GlobalLpPool GlobalMaxPool HammingWindow HannWindow "
        "HardSigmoid HardSwish Hardmax Identity If ImageDecoder IsInf IsNaN LRN LeakyRelu Log LogSoftmax LpNormalization LpPool "
        "Max MaxPool Mean MeanVarianceNormalization Min Mish Multinomial Neg NonZero Not OptionalGetElement Pad "
        "RandomNormalLike RandomUniformLike Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean "
        "ReduceMin ReduceProd ReduceSum ReduceSumSquare RegexFullMatch Relu Reshape Resize Round Scan Selu SequenceConstruct "
        "SequenceErase SequenceLength SequenceMap Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign "
        "SpaceToDepth Split SplitToSequence Sqrt Squeeze StringNormalizer StringSplit Sum Swish Tan Tanh TfIdfVectorizer "
        "ThresholdedRelu TopK Transpose Trilu Unique Unsqueeze Upsample"
    ),
    2: (
        "Add AffineGrid And BitShift BitwiseAnd BitwiseOr BitwiseXor CastLike CausalConvWithState CenterCropPad Compress Conv "
        "ConvInteger ConvTranspose CumProd CumSum DequantizeLinear Div Equal Expand Gather GatherElements GatherND Gemm Greater "
        "GreaterOrEqual GridSample LayerNormalization Less LessOrEqual Loop MatMul MatMulInteger MaxRoiPool MaxUnpool Mod Mul "
        "NegativeLogLikelihoodLoss NonMaxSuppression Or PRelu Pow QuantizeLinear RMSNormalization ReverseSequence STFT "
        "SequenceAt SequenceInsert SoftmaxCrossEntropyLoss StringConcat Sub SwiGLU TensorScatter Tile Xor"
    ),
    3: (
        "Attention Col2Im DeformConv GRU GroupNormalization InstanceNormalization LSTM LinearAttention OneHot RNN Range "
        "RoiAlign RotaryEmbedding Scatter ScatterElements ScatterND Where"
    ),
    5: ("BatchNormalization MelWeightMatrix"),
    8: ("QLinearConv QLinearMatMul"),
}
LEAST_INPUTS = {name: count for count, names in _NEEDED.items() for name in names.split()}


def short_of_inputs(model: mmap.mmap | bytes) -> str:
    """Return what is wrong with the first node of a model that has too few inputs; empty when none has, or it cannot be read.

    All graphs and functions are looked at. What is no protobuf the runtimes refuse themselves. Nothing may be raised out of here: an error
    in flight holds views of the file, which then cannot be unmapped.
    """
    view = memoryview(model)
    try:
        for field, value in _fields(view):
            if isinstance(value, memoryview) and field in (7, 25):  # the graph, and functions: their nodes are fields 1 and 7
                found = next(_short(value, 1 if field == 7 else 7), "")
                if found:
                    return found
    except (IndexError, ValueError, RecursionError):
        pass
    return ""


def _short(graph: memoryview, nodes: int) -> Iterator[str]:
    for field, node in _fields(graph):
        if field != nodes or not isinstance(node, memoryview):
            continue
        inputs, operator, domain = [], "", ""
        for part, value in _fields(node):
            if not isinstance(value, memoryview):
                continue
            if part == 1:
                inputs.append(len(value) > 0)
            elif part == 4:
                operator = bytes(value).decode()
            elif part == 7:
                domain = bytes(value).decode()
            elif part == 5:  # an attribute: subgraphs are its fields 6 and 11
                for kind, inner in _fields(value):
                    if kind in (6, 11) and isinstance(inner, memoryview):
                        yield from _short(inner, 1)
        least = LEAST_INPUTS.get(operator, 0) if domain in ("", "ai.onnx") else 0
        if inputs[:least].count(True) < least:
            yield f"a {operator} without the {least} input{'s' * (least > 1)} that it needs"
