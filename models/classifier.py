"""Which outputs of a model are a classifier's: rows of scores over classes, of which a caller takes the best.

A shape alone does not tell: an embedding is a row of floats too, and its largest element means nothing. What made the output does.
"""

from __future__ import annotations

import re
from pathlib import Path

import onnx_ir as ir

_LEAST_CLASSES = 3
_SCORES = frozenset({"Softmax", "LogSoftmax"})
_HANDS_ON = frozenset({"Cast", "Dropout", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
_POOLS = frozenset({"AveragePool", "GlobalAveragePool", "ReduceMean"})
_SAYS_CLASSES = re.compile(r"logit|prob|class|score|softmax|label|pred|(^|[^a-z])fc([^a-z]|$)", re.IGNORECASE)
_SAYS_VECTOR = re.compile(r"embed|feature|vector|pooled|pooler|hidden|latent|proj|encod|repr|state", re.IGNORECASE)
_MOST_STEPS = 8


def class_outputs(prepared: Path) -> tuple[str, ...]:
    """Return the names of the outputs of a prepared model that are a classifier's.

    Such an output has the shape [rows, classes] (or [rows, classes, 1, 1]) with three classes or more, and comes from a softmax, from a
    last dense layer with a bias, or from a pooled convolution, unless its name speaks of an embedding; of any other operator if its name
    speaks of classes.
    """
    model = ir.load(prepared)
    return tuple(str(value.name) for value in model.graph.outputs if _has_classes(value) and _is_scores(value))


def _has_classes(value: ir.Value) -> bool:
    shape = None if value.shape is None else [each if isinstance(each, int) else None for each in value.shape]
    if shape is None or len(shape) < 2 or value.dtype is None or not value.dtype.is_floating_point():
        return False
    return shape[1] is not None and shape[1] >= _LEAST_CLASSES and all(extent == 1 for extent in shape[2:])


def _is_scores(value: ir.Value) -> bool:
    maker, name = _maker(value), str(value.name)
    if maker is None:
        return False
    if maker.op_type in _SCORES:
        return True
    return not _SAYS_VECTOR.search(name) and (bool(_SAYS_CLASSES.search(name)) or _is_last_layer(maker))


def _maker(value: ir.Value | None) -> ir.Node | None:
    """Return the node that made a value, beyond those that only hand it on."""
    node = None if value is None else value.producer()
    for _ in range(_MOST_STEPS):
        if node is None or node.op_type not in _HANDS_ON or node.inputs[0] is None:
            break
        node = node.inputs[0].producer()
    return node


def _is_last_layer(maker: ir.Node) -> bool:
    """Say whether a node ends a network as classifiers end: a dense layer with a bias, or a convolution, pooled."""
    if maker.op_type == "Gemm":
        return len(maker.inputs) > 2 and maker.inputs[2] is not None
    if maker.op_type == "Add":
        constant = any(each is not None and each.const_value is not None for each in maker.inputs)
        return constant and any(made is not None and made.op_type == "MatMul" for made in map(_maker, maker.inputs))
    if maker.op_type in _POOLS:
        before = _maker(maker.inputs[0])
        if before is not None and before.op_type == "Relu":
            before = _maker(before.inputs[0])
        return before is not None and before.op_type == "Conv"
    return False
