"""What the results of the ONNX suite mean: each wrong result read by hand, and refusals by reason.

A wrong result that matches no reading has not been looked at, and a reading that matches nothing is out of date; the slow test says so.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Reading:
    """What was found out about wrong results: `cases` matches their names, `found` their details."""

    runtime: str
    cases: str
    text: str
    found: str = ""
    varies: bool = False  # right on some machines, with the same versions

    def matches(self, runtime: str, case: str, detail: str) -> bool:
        """Say whether it speaks of this result."""
        return runtime == self.runtime and bool(re.fullmatch(self.cases, case)) and bool(re.search(self.found, detail))


_OV, _ORT = "openvino", "onnxruntime"
_ROUNDING = "rounding only: zeros come out as 1e-6 of the largest value, and the suite's atol is 1e-7"
_ALIGNED = "both runtimes agree with each other, and not with the suite, on align_corners at fractional sizes"
_RANDOM = "random numbers: the runtime's generator is not the suite's, no result is wrong as such"
_PAST_MASK = r"test_attention_4d_with_past_and_present_qk_matmul_bias_[34]d_mask_causal"
READINGS = (
    Reading(_OV, r"test_attention_.*_expanded", "rows that a mask hides wholly give NaN where the specification wants 0", "nan"),
    Reading(_OV, r"test_attention_4d_causal_padded_kv_bf16", "rows that a mask hides wholly give the mean of the values", varies=True),
    Reading(_OV, r"test_attention.*(window).*", "the attributes of Attention-26/27 for local windows are ignored in silence"),
    Reading(_OV, _PAST_MASK, "the causal mask ignores the past's length"),
    Reading(_OV, r"test_bernoulli.*", _RANDOM),
    Reading(_OV, r"test_bitshift_.*", "shifts of signed integers (new in opset 28) saturate, or fill with zeros, instead of shifting bits"),
    Reading(_OV, r"test_cast(like)?_.*DOUBLE.*", "float64 is computed as float32, and infinity becomes 3.4e38", r"3\.40282"),
    Reading(_OV, r"test_cast(like)?_.*_FLOAT8E.*", "casts to float8 overflow instead of saturating, as `saturate=1` asks", "(nan|inf) at"),
    Reading(_OV, r"test_cast_e8m0_.*", "casts to float8e8m0 round to the nearest instead of up"),
    Reading(_OV, r"test_dft_axis", "the axis, an input since opset 20, is ignored in silence", "450"),
    Reading(_OV, r"test_dft_i?rfft.*", "real input or output: the trailing dimension of 1 is misread, so the shape is wrong", "has shape"),
    Reading(_OV, r"test_dft.*", _ROUNDING, r"relative L2 \de-0[78]"),
    Reading(_OV, r"test_dynamicquantizelinear.*", "rounding only: off by one where a value lies within 1e-5 of a half"),
    Reading(_OV, r"test_(gru|lstm|simple_rnn)_batchwise", "layout=1 (batch first) gives wrong sequences"),
    Reading(_OV, r"test_lstm_with_peepholes", "peepholes are ignored in silence"),
    Reading(_OV, r"test_maxpool_2d_ceil_output_size_reduce_by_one", "a last window that starts in the padding is not dropped"),
    Reading(_OV, r"test_nonmaxsuppression_iou_threshold_boundary", "a box at exactly the threshold is dropped"),
    Reading(_OV, r"test_reduce_max_empty_set", "the maximum of nothing is -3.4e38 instead of -infinity"),
    Reading(_OV, r"test_resize_.*_exclude_outside", "exclude_outside is ignored in silence"),
    Reading(_OV, r"test_resize_.*_align_corners", _ALIGNED),
    Reading(_OV, r"test_resize_.*_antialias", "antialias=1 is computed differently (RUNTIMES.md A)"),
    Reading(_OV, r"test_resize_.*_not_(larger|smaller)", "keep_aspect_ratio_policy is ignored in silence"),
    Reading(_OV, r"test_roialign_mode_max", "mode=max pools interpolated values in another way"),
    Reading(_OV, r"test_spacetodepth_crd_mode_example", "mode=CRD, new in opset 27, is ignored in silence"),
    Reading(
        _OV,
        r"test_squeezenet",
        "rounding only: a thousand equal logits of 9.5e9, whose last bits decide what Softmax makes of them",
        varies=True,  # wrong with AVX-512, right with AVX2
    ),
    Reading(_OV, r"test_tile", "Tile by repeats that are an input gives garbage; OpenVINO's plain API does so too"),
    Reading(_OV, r"test_top_k_same_values.*", "of equal values the lower index has to come first"),
    Reading(_OV, r"test_operator_add.*", "float64 is computed as float32", r"3\.40282"),
    Reading(_ORT, r"test_attention_4d_causal_fp16", "rounding of one float16 beyond the suite's rtol of 1e-3"),
    Reading(_ORT, _PAST_MASK, "masked scores are -3.4e38 instead of -infinity"),
    Reading(_ORT, r"test_(dft|stft).*", _ROUNDING, r"relative L2 \de-0[78]"),
    Reading(_ORT, r"test_maxunpool_export_with_output_shape", "output_shape is not used to place the values"),
    Reading(_ORT, r"test_resize_.*_align_corners", _ALIGNED),
    Reading(_ORT, r"test_training_dropout.*", _RANDOM),
)  # fmt: skip

# The first pattern that a refusal's words match gives its reason.
_REASONS = (
    (r"whose elements share bytes", "2- or 4-bit values at the model's edge: refused by our backends, since runtimes pack them"),
    (r"No conversion rule found for operations: (.*)", "no conversion rule for an operator"),
    (r"Failed operations detailed log", "the conversion of an operator fails"),
    (r"Unsupported type|Unsupported data type", "an element type that it does not know"),
    (r"dynamic rank", "an operator whose output's rank is not known before the run"),
    (r"SequenceMark|Sequence|takes only tensors", "sequences or optionals"),
    (r"src_prc: string", "strings in an operator that takes them elsewhere"),
    (r"it cannot be lowered", "an opset beyond 26 that our preparation cannot lower"),
    (r"Could not find an implementation for|Failed to find kernel", "no kernel for an operator in this version or type"),
    (r"is not a registered function/op", "an operator that it does not know"),
    (r"INVALID_GRAPH|Type Error", "it finds the graph invalid (attributes or types of later versions)"),
    (r"locale name not valid", "the locale en_US.UTF-8 is not installed on this machine"),
    (r"Unsupported model IR version|only \*guarantees\* support", "a version that is too new, in a model that our preparation refuses"),
    (r"while running", "refused while running"),
)  # fmt: skip


def reading_of(runtime: str, case: str, detail: str) -> Reading | None:
    """Return what is known of a wrong result, or None when nobody has looked at it."""
    return next((each for each in READINGS if each.matches(runtime, case, detail)), None)


def reason_of(detail: str) -> str:
    """Return the reason of a refusal in our words."""
    return next((reason for pattern, reason in _REASONS if re.search(pattern, detail)), "other")


def operators_without_rule(detail: str) -> list[str]:
    """Return the operators that OpenVINO names as those it cannot convert, without their versions."""
    found = re.search(r"No conversion rule found for operations: ([\w.:, -]+)", detail)
    return [re.sub(r"-\d+$", "", each.strip()) for each in found[1].split(",")] if found else []
