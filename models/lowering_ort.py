"""Lowering by ONNX Runtime's quantizers: int8 with calibrated or measured-at-run-time ranges, and weight-only int4."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from aivmm.models.lowering_model import quiet

Sample = Mapping[str, npt.NDArray[Any]]
Options = Mapping[str, str | int | float | bool]

# What the integer kernels of CPUs, GPUs and NPUs gain from. ONNX Runtime's own default covers every operator that it can put between
# QuantizeLinear and DequantizeLinear, Softmax and LayerNormalization included: no faster, and it ruins transformers.
_PRODUCTS = ("Conv", "ConvTranspose", "MatMul", "Gemm")
_BETWEEN = ("Add", "AveragePool", "Clip", "Concat", "GlobalAveragePool", "LeakyRelu", "MaxPool", "Mul", "Relu", "Reshape", "Resize",
            "Split", "Squeeze", "Transpose", "Unsqueeze")  # fmt: skip


class _Reader:
    """Hands out the samples as ONNX Runtime's calibration asks for them (it names the methods, and needs no base class)."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = samples
        self._next, self._end = 0, len(samples)

    def __len__(self) -> int:
        return len(self._samples)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._next, self._end = start_index, min(end_index, len(self._samples))

    def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
        if self._next >= self._end:
            return None
        self._next += 1
        return {name: np.asarray(array) for name, array in self._samples[self._next - 1].items()}


def quantize_static(base: Path, out: Path, samples: Sequence[Sample], options: Options) -> None:
    """Write the model at `base` to `out` with weights and activations in int8, ranges calibrated on `samples`.

    Weights are symmetric, one scale for each output channel; activations are uint8 with a zero point unless `symmetric`. Options:
    `calibration` ("MinMax", "Percentile", "Entropy"), `percentile` (99.99), `reduce` (weights of 7 bits: right where int8 products
    saturate, on CPUs without VNNI), `symmetric` (int8 activations), `operators` ("products": matrix products and convolutions alone;
    "most": what lies between convolutions, too), `constant_only` (leave products of two computed tensors, as in attention, alone).
    """
    with quiet():
        from onnxruntime import quantization as q

        symmetric = bool(options.get("symmetric", False))
        extra: dict[str, Any] = {
            "WeightSymmetric": True,
            "ActivationSymmetric": symmetric,
            "MatMulConstBOnly": bool(options.get("constant_only", False)),
            # One sample at a time: histograms are else made of all intermediate values of all samples at once, gigabytes of them.
            "CalibStridedMinMax": 1,
        }
        if "percentile" in options:
            extra["CalibPercentile"] = float(options["percentile"])
        q.quantize_static(
            str(base),
            str(out),
            _Reader(samples),
            quant_format=q.QuantFormat.QDQ,
            op_types_to_quantize=[*_PRODUCTS, *(_BETWEEN if options.get("operators", "most") == "most" else ())],
            per_channel=True,
            reduce_range=bool(options.get("reduce", False)),
            activation_type=q.QuantType.QInt8 if symmetric else q.QuantType.QUInt8,
            weight_type=q.QuantType.QInt8,
            calibrate_method=getattr(q.CalibrationMethod, f"{options['calibration']}"),
            calibration_providers=["CPUExecutionProvider"],
            use_external_data_format=_is_external(base),
            extra_options=extra,
        )


def quantize_dynamic(base: Path, out: Path, options: Options) -> None:
    """Write the model at `base` to `out` with int8 weights, activations lowered by their range at each run.

    `reduce`: weights of 7 bits.
    """
    with quiet():
        from onnxruntime import quantization as q

        q.quantize_dynamic(
            str(base),
            str(out),
            op_types_to_quantize=["MatMul", "Gemm", "LSTM"] if options.get("recurrent", False) else ["MatMul", "Gemm"],
            per_channel=True,
            reduce_range=bool(options.get("reduce", False)),
            weight_type=q.QuantType.QInt8,
            use_external_data_format=_is_external(base),
            extra_options={"WeightSymmetric": True, "MatMulConstBOnly": True},
        )


def quantize_weights(base: Path, out: Path, options: Options) -> None:
    """Write the model at `base` to `out` with the constant weights of MatMul in `bits` (4 or 8), a scale for each `block` of them.

    `symmetric`: no zero points; `form`: "QDQ" (standard operators) or "QOperator" (MatMulNBits of com.microsoft).
    """
    with quiet():
        from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer
        from onnxruntime.quantization.quant_utils import QuantFormat

        config = DefaultWeightOnlyQuantConfig(
            block_size=int(options.get("block", 32)),
            is_symmetric=bool(options.get("symmetric", True)),
            accuracy_level=int(options["accuracy_level"]) if "accuracy_level" in options else None,
            quant_format=QuantFormat[f"{options.get('form', 'QDQ')}"],
            op_types_to_quantize=("MatMul",),
            bits=int(options.get("bits", 4)),
        )
        quantizer = MatMulNBitsQuantizer(onnx.load(base), algo_config=config)
        quantizer.process()
        quantizer.model.save_model_to_file(str(out), use_external_data_format=_is_external(base))


def _is_external(base: Path) -> bool:
    return base.with_name(f"{base.name}.data").exists()
