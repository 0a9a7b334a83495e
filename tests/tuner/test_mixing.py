"""For which targets a lowered model is mixed, by what is known of it there. No model is lowered: how each came out is given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from aivmm.models.lowering_recipes import recipes
from aivmm.planner.candidates import Candidate, Score
from aivmm.runtime.config import Config
from aivmm.runtime.target import Device, Target
from aivmm.tuner.precision import Scout
from aivmm.tuner.work import Work

CARD = Target(runtime="onnxruntime", name="CUDA:0", device=Device(kind="gpu", model="a card", memory_bytes=1 << 36), runtime_version="1")
CPU = Target(runtime="onnxruntime", name="CPU", device=Device(kind="cpu", model="a CPU"), runtime_version="1")
INT8 = next(each for each in recipes("int8", "cnn", saturates=False) if each.kind == "static")
FP16 = recipes("fp16", "cnn", saturates=False)[0]


@pytest.mark.parametrize(
    ("on_card", "served"),
    [
        ({INT8.variant: 3.0}, False),  # dequantized and slower than fp32
        ({INT8.variant: 0.5}, False),  # a model computed in fp32 is no lower precision, whatever it takes
        ({FP16.variant: 0.95}, False),
        ({FP16.variant: 0.5}, True),
        ({FP16.variant: 0.5, INT8.variant: 3.0}, True),
    ],
)
def test_a_lowered_model_spares_other_targets_the_mixing_only_where_it_gains(
    on_card: dict[str, float], served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ratios = [(CARD, "fp32", 1.0), *((CARD, name, ratio) for name, ratio in on_card.items()), (CPU, "fp32", 2.0), (CPU, INT8.variant, 1.95)]
    known: dict[str, Any] = {}
    for target, precision, ratio in ratios:
        candidate = Candidate(target=target, config=Config(precision=precision), batch=1)
        known[candidate.key] = (candidate, Score(ratio=ratio, low=ratio, high=ratio, median_s=ratio, metrics={}))
    work = SimpleNamespace(
        subject=SimpleNamespace(lowerer=SimpleNamespace(recipe={each.variant: each for each in (INT8, FP16)}.__getitem__)),
        precisions=lambda target: ("fp32",),
        asked=lambda: False,
    )
    scout = Scout(
        work=cast(Work, work), measurer=cast(Any, None), known=known, barred=lambda target, config: ""
    )  # of whose time nothing is left
    mixed: list[Target] = []
    monkeypatch.setattr(Scout, "_mix", lambda self, target, targets: mixed.append(target))
    scout._mix_where_needed([CPU, CARD])
    assert (CPU not in mixed) is served
