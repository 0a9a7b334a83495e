"""Inputs taken in fewer bits than the model has them, and cast where it runs: another contract with callers, made when asked for alone."""

from __future__ import annotations

import onnx_ir as ir

_WIDE = (ir.DataType.FLOAT, ir.DataType.DOUBLE)


def narrow_inputs(model: ir.Model, notes: list[str]) -> None:
    """Take each float32 and float64 input that a node reads as float16, and cast it in front of its readers; the notes say which.

    Half of the bytes, or a quarter, then cross from the host. Values keep 11 bits of mantissa and have to be below 65504.
    """
    graph = model.graph
    outputs = set(graph.outputs)
    names = []
    for value in graph.inputs:
        if value.dtype not in _WIDE or value in outputs or not value.uses():
            continue
        cast = ir.node("Cast", [value], attributes={"to": int(value.dtype)}, name=f"{value.name}/widen")
        wide = cast.outputs[0]
        wide.name, wide.dtype, wide.shape = f"{value.name}.wide", value.dtype, value.shape
        value.replace_all_uses_with(wide)
        cast.replace_input_with(0, value)
        value.dtype = ir.DataType.FLOAT16
        graph.insert_before(graph[0], cast)
        names.append(str(value.name))
    if names:
        plural = "inputs" if len(names) > 1 else "input"
        notes.append(f"{plural} {', '.join(names)} taken as float16 (--input-contract narrow): who calls the plan converts, and numbers "
                     "are compared with the model on inputs so rounded")  # fmt: skip
    else:
        notes.append("--input-contract narrow changes nothing: no input is float32 or float64")
