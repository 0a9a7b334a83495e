"""Brings a model's IR version and operator set into the range that runtimes read, and says what it changed."""

from __future__ import annotations

import onnx
import onnx_ir as ir
from onnx import ModelProto, version_converter

from aivmm.errors import ModelError
from aivmm.models.intake_check import subgraphs
from aivmm.models.intake_native import skeleton, with_weights
from aivmm.models.intake_old import fill_attribute_types, raise_to_7

OLDEST_OPSET, NEWEST_OPSET, GOOD_OPSET = 7, 26, 17
OLDEST_IR, GOOD_IR = 8, 10  # every runtime here reads IR 8 to 10; ONNX Runtime 1.31 reads up to 13

# The IR version in which an element type appeared, for those later than IR 10.
_TYPE_IR = {"FLOAT4E2M1": 11, "FLOAT8E8M0": 12, "INT2": 13, "UINT2": 13}


def repair_old(model: ModelProto, notes: list[str]) -> bool:
    """Make a model of IR version 1 or 2, or of an opset below 7, one of opset 7, in place; True when it was of such an opset.

    To be called before anything else reads the model. Spells the standard domain "" throughout, too.
    """
    _one_spelling(model)
    if not any(entry.domain in ("", "ai.onnx") for entry in model.opset_import):
        if model.opset_import or model.ir_version >= 3:
            return False  # only custom operators
        model.opset_import.append(onnx.helper.make_opsetid("", 1))
        notes.append("no operator set was named: read as opset 1, as IR versions before 3 mean it")
    if model.ir_version < 3:
        fill_attribute_types(model)
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if opset >= OLDEST_OPSET:
        return False
    raise_to_7(model)
    notes.append(f"opset {opset} carried over to opset {OLDEST_OPSET}: old broadcasting and attributes rewritten")
    return True


def _one_spelling(model: ModelProto) -> None:
    """The standard operators' domain is "", also written "ai.onnx"."""
    for entry in (*model.opset_import, *(entry for function in model.functions for entry in function.opset_import)):
        if entry.domain == "ai.onnx":
            entry.domain = ""
    waiting = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    while waiting:
        node = waiting.pop()
        if node.domain == "ai.onnx":
            node.domain = ""
        waiting.extend(inner for graph in subgraphs(node) for inner in graph.node)


def fit_versions(model: ir.Model, *, was_old: bool, notes: list[str]) -> ir.Model:
    """Return a model of opset 7 to 26 and IR version 8 to 13 (the lowest that fits); raise `ModelError` when it cannot be lowered.

    A model that `repair_old` touched is raised further, to opset 17, when onnx's converter can.
    """
    opset, before = model.opset_imports.get("", 0), model.ir_version
    if was_old or opset > NEWEST_OPSET:
        target = GOOD_OPSET if was_old else NEWEST_OPSET
        converted = convert(model, target)
        if isinstance(converted, ir.Model):
            model = converted
            notes.append(f"opset {opset} converted to opset {target}")
        elif not was_old:
            raise ModelError(
                f"the model uses opset {opset}, runtimes read up to {NEWEST_OPSET}, and it cannot be lowered: {converted}",
                advice=f"export it with opset {NEWEST_OPSET} or lower",
            )
        else:
            notes.append(f"left at opset {opset}: the converter cannot raise it to {target} ({converted})")
    after = _fitting_ir(model)
    model.ir_version = after
    if before != after:
        notes.append(f"IR version {before} {'raised' if after > before else 'lowered'} to {after}")
    return model


def convert(model: ir.Model, target: int) -> ir.Model | str:
    """The converted model, or the converter's own words in one line."""
    bare = skeleton(model)
    try:
        converted = version_converter.convert_version(bare, target)
        _must_exist(converted.graph, target)
    except Exception as error:  # noqa: BLE001 - the native converter raises RuntimeError, ConvertError and InferenceError alike
        return " ".join(str(error).split())[:200]
    return with_weights(converted, model.graph.initializers.values())


def _must_exist(graph: onnx.GraphProto, opset: int) -> None:
    """The converter passes over operators that it does not know; each must exist in the new operator set, attributes included."""
    for node in graph.node:
        if node.domain not in ("", "ai.onnx"):
            continue
        if not onnx.defs.has(node.op_type, opset, ""):
            raise ValueError(f"{node.op_type} does not exist in opset {opset}")
        schema = onnx.defs.get_schema(node.op_type, opset, "")
        unknown = sorted(attribute.name for attribute in node.attribute if attribute.name not in schema.attributes)
        if unknown or schema.deprecated:
            raise ValueError(f"{node.op_type} of opset {opset} has no attribute {unknown[0]!r}" if unknown else f"{node.op_type} is gone")
        for inner in subgraphs(node):
            _must_exist(inner, opset)


def _fitting_ir(model: ir.Model) -> int:
    used = {value.dtype for graph in model.graphs() for node in graph for value in node.outputs}
    for graph in model.graphs():
        used |= {value.dtype for value in (*graph.inputs, *graph.outputs, *graph.initializers.values())}
    needed: int = max((_TYPE_IR.get(dtype.name, 0) for dtype in used if dtype is not None), default=0)
    return max(needed, min(max(int(model.ir_version), OLDEST_IR), GOOD_IR))
