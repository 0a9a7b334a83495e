"""Lowering by NNCF: post-training int8 with bias correction and SmoothQuant, and weight-only int8 and int4."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from aivmm.models.lowering_model import quiet

Sample = Mapping[str, npt.NDArray[Any]]
Options = Mapping[str, str | int | float | bool]


@cache
def _import_nncf() -> Any:
    """Import NNCF so that it cannot send usage data.

    NNCF reports each call through `openvino_telemetry` unless `CI` is set. A None entry makes that import fail, and NNCF then puts a
    stub in its place, for good. The entry goes away again: what else the process imports later is not ours to decide. Should NNCF have
    been imported by someone else before, with telemetry, its sender is replaced.
    """
    unseen = sys.modules.get("openvino_telemetry")
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        with quiet():
            import nncf
            import nncf.telemetry.decorator as decorator
            import nncf.telemetry.wrapper as wrapper
    finally:
        if unseen is None:
            del sys.modules["openvino_telemetry"]
        else:
            sys.modules["openvino_telemetry"] = unseen
    decorator.telemetry = wrapper.telemetry = _Silent()
    return nncf


class _Silent:
    """Takes the place of NNCF's telemetry: it does nothing."""

    def start_session(self, *given: object, **named: object) -> None: ...
    def send_event(self, *given: object, **named: object) -> None: ...
    def end_session(self, *given: object, **named: object) -> None: ...


def quantize(base: Path, samples: Sequence[Sample], options: Options) -> onnx.ModelProto:
    """Return the model at `base` with weights and activations in int8, calibrated on `samples`.

    Options: `preset` ("mixed": symmetric weights, asymmetric activations; "performance": both symmetric), `model_type` ("transformer":
    attention is left alone and SmoothQuant applied), `overflow` ("enable": weights of 7 bits, right where int8 products saturate, on
    CPUs without VNNI; the default spares the first layer alone), `bias_correction` (bool), `ranges` (how activations' ranges are estimated,
    by NNCF's name: "mean_quantile"), `smooth` (SmoothQuant's alpha, in a model that is no transformer).
    """
    nncf = _import_nncf()
    transformer = options.get("model_type") == "transformer"
    more: dict[str, Any] = {}
    if "ranges" in options:
        from nncf.quantization.range_estimator import RangeEstimatorParametersSet

        estimator = getattr(RangeEstimatorParametersSet, f"{options['ranges']}".upper())
        more["activations_range_estimator_params"] = estimator
    if "smooth" in options:
        alpha = float(options["smooth"])
        more["smooth_quant_alphas"] = nncf.AdvancedSmoothQuantParameters(convolution=alpha, matmul=alpha)
    advanced = nncf.AdvancedQuantizationParameters(
        **more,
        overflow_fix=nncf.OverflowFix(f"{options.get('overflow', 'first_layer_only')}"),
        disable_bias_correction=not options.get("bias_correction", True),
        backend_params=_backend_params(base),
    )
    with quiet():
        made: onnx.ModelProto = nncf.quantize(
            _proto(base),
            nncf.Dataset(_fed(samples)),
            preset=nncf.QuantizationPreset(f"{options.get('preset', 'mixed')}"),
            model_type=nncf.ModelType.TRANSFORMER if transformer else None,
            subset_size=len(samples),
            fast_bias_correction=True,
            advanced_parameters=advanced,
        )
    return made


def compress_weights(base: Path, options: Options) -> onnx.ModelProto:
    """Return the model at `base` with constant weights of matrix products and embeddings in int8 or int4; activations stay as they are.

    Options: `mode` ("int8_sym", "int8_asym", "int4_sym", "int4_asym"), `group` (weights that share a scale; int4 only).
    """
    nncf = _import_nncf()
    mode = nncf.CompressWeightsMode(f"{options['mode']}")
    more: dict[str, Any] = {"ignored_scope": nncf.IgnoredScope(types=["Conv", "ConvTranspose"], validate=False)}  # a scale too few
    if "group" in options:
        fallback = nncf.GroupSizeFallbackMode.ADJUST
        more |= {"group_size": int(options["group"]), "ratio": 1.0}
        advanced = nncf.AdvancedCompressionParameters(group_size_fallback_mode=fallback, backend_params=_backend_params(base))
    else:
        advanced = nncf.AdvancedCompressionParameters(backend_params=_backend_params(base))
    with quiet():
        made: onnx.ModelProto = nncf.compress_weights(_proto(base), mode=mode, advanced_parameters=advanced, **more)
    return made


def _proto(base: Path) -> onnx.ModelProto:
    proto = onnx.load(base, load_external_data=False)
    if any(entry.domain in ("", "ai.onnx") for entry in proto.opset_import[1:]):  # NNCF takes the first entry for the standard one
        entries = sorted(proto.opset_import, key=lambda entry: entry.domain not in ("", "ai.onnx"))
        kept = [onnx.helper.make_opsetid(entry.domain, entry.version) for entry in entries]
        del proto.opset_import[:]
        proto.opset_import.extend(kept)
    return proto


def _backend_params(base: Path) -> dict[str, str]:
    return {"external_data_dir": str(base.parent.resolve())}


def _fed(samples: Sequence[Sample]) -> list[dict[str, npt.NDArray[Any]]]:
    return [{name: np.asarray(array) for name, array in sample.items()} for sample in samples]
