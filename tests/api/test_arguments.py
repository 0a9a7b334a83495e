"""What the public functions take, and what is refused in one line before anything is read or measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import aivmm
from aivmm import arguments
from tests.making import ONNXRUNTIME, Part, chain_model, make_bundle

WRONG = [
    ({"constraints": 5}, "constraints takes text, or a list of texts, and not 5; such as constraints="),
    ({"constraints": ["latency<1s", None]}, "constraints takes text, or a list of texts, and not None"),
    ({"constraints": b"latency<1s"}, "constraints takes text"),
    ({"objective": 5}, "objective takes text, and not 5"),
    ({"objective": "speed"}, "unknown objective 'speed'"),
    ({"service_level": "nice"}, "unknown service level 'nice'"),
    ({"targets": 5}, "targets takes text"),
    ({"prefer": [5]}, "prefer takes text"),
    ({"precisions": 32}, "precisions takes text"),
    ({"batches": 4}, "batches takes a list of whole numbers, and not 4"),
    ({"batches": ["8"]}, "batches takes a whole number, and not '8'"),
    ({"shapes": {"x": 5}}, r"shapes\['x'\] takes a shape, or a list of shapes"),
    ({"shapes": {"x": (1, 2.5)}}, r"shapes\['x'\] takes a whole number, and not 2.5"),
    ({"shapes": [(1, 4)]}, "shapes takes a mapping from names"),
    ({"dims": {"rows": 2.5}}, r"dims\['rows'\] takes a whole number, and not 2.5"),
    ({"dims": {"rows": []}}, "'rows' lists \\[\\]; give at least one"),
    ({"dims": {"rows": [4, 4]}}, "give at least one, and each once"),
    ({"dims": {"rows": "no"}}, "^dims 'rows=no'"),
    ({"dims": {"rows": "64..32"}}, "the range 64..32 does not go up"),
    ({"inputs": 5}, "inputs takes a path, and not 5"),
    ({"metric": len}, "metric takes text"),
    ({"db": 5}, "db takes a path, and not 5"),
    ({"inputs": "x.npz", "dataset": "d"}, "^inputs and dataset both give samples"),
    ({"constraints": "metric>=0.5"}, "name your function with metric MODULE:FUNCTION"),
    ({"budget_s": -1}, "a budget of -1.0 s cannot be spent"),
    ({"budget_s": float("nan")}, "a budget of nan s cannot be spent"),
    ({"trials": 0}, "^trials 0 is below 1"),
    ({"seed": -1}, "^seed -1 is not between"),
    ({"batches": [0]}, "^a batch of 0 is below 1"),
    ({"other_shapes": "some"}, "^unknown other_shapes 'some'"),
]


@pytest.mark.parametrize(("given", "words"), WRONG, ids=[f"{given}"[:50] for given, _ in WRONG])
@pytest.mark.parametrize("function", [aivmm.deploy, aivmm.tune])
def test_what_is_of_a_wrong_kind_is_one_line_that_names_the_argument(
    function: Any, given: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(aivmm.UsageError, match=words) as refused:
        function("missing.onnx", quiet=True, **given)
    assert "\n" not in str(refused.value) and "--" not in str(refused.value) and not list(tmp_path.iterdir())


def test_a_model_or_a_plan_that_is_no_path_is_one_line() -> None:
    with pytest.raises(aivmm.UsageError, match="model takes a path, or a list of paths"):
        aivmm.tune(5)  # type: ignore[arg-type]
    for odd in (5, None, "", b"m.onnx", ["m.onnx"]):
        with pytest.raises(aivmm.UsageError, match=r"model takes the path of one \.onnx file, and not"):
            aivmm.deploy(odd, may_tune=False)  # type: ignore[arg-type]
    with pytest.raises(aivmm.UsageError, match="5 is not a path"):
        aivmm.load_plan(5)  # type: ignore[arg-type]


def test_a_path_may_be_of_any_kind(tmp_path: Path) -> None:
    class Kind:
        def __fspath__(self) -> str:
            return str(tmp_path / "missing")

    assert arguments.place("plan", Kind()) == tmp_path / "missing"
    assert arguments.model("model", Kind()) == arguments.location("db", Kind()) == str(tmp_path / "missing")
    assert arguments.places("model", [Kind(), "b"]) == [str(tmp_path / "missing"), "b"]
    with pytest.raises(aivmm.UsageError, match="no kept plan fits"):
        (tmp_path / "missing").write_bytes(chain_model(width=4, rows=1, layers=1).SerializeToString())
        aivmm.deploy(Kind(), store=tmp_path / "store", dataset=Kind(), db=Kind(), may_tune=False)
    with pytest.raises(aivmm.BundleError, match="missing"):
        aivmm.load_plan(Kind())


def test_a_path_of_bytes_is_none() -> None:
    class Kind:
        def __fspath__(self) -> bytes:
            return b"m"

    for asked in (lambda: aivmm.load_plan(Kind()), lambda: aivmm.tune(Kind()), lambda: aivmm.deploy("m.onnx", plan=Kind())):  # type: ignore[arg-type]
        with pytest.raises(aivmm.UsageError, match="path"):
            asked()


def test_what_is_called_later_is_refused_now_where_it_cannot_be() -> None:
    with pytest.raises(aivmm.UsageError, match="on_drift takes a function, and not 5; such as on_drift=print"):
        aivmm.deploy("missing.onnx", on_drift=5)  # type: ignore[arg-type]
    with pytest.raises(aivmm.UsageError, match="on_drift takes a function, and not 5; such as on_drift=print"):
        aivmm.load_plan("missing.aivmm", on_drift=5)  # type: ignore[arg-type]


def test_what_loading_takes_is_checked_in_one_line(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "m.aivmm", chain_model(), [Part(ONNXRUNTIME)])
    for given, words in (
        ({"timeout_s": "5"}, "timeout_s='5' is no time to wait; give seconds above 0, or None"),
        ({"require_signature": 5}, "require_signature takes keys, and not 5; such as require_signature="),
        ({"require_signature": [5]}, "a key is text or a path, and not of type int; give the path of a PEM file"),
        ({"on_mismatch": None}, "on_mismatch=None is unknown; choose from warn, error, fallback"),
    ):
        with pytest.raises(aivmm.UsageError, match=words):
            aivmm.load_plan(bundle, **given)
    with pytest.raises(aivmm.UsageError, match="db takes a path, and not 5"):
        aivmm.evidence(5)  # type: ignore[arg-type]


def test_what_can_be_gone_through_once_is_tuned_for_as_it_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def tune(*_: Any, **options: Any) -> None:
        asked.update(options)
        raise aivmm.ModelError("seen enough")

    monkeypatch.setattr("aivmm.face.tune", tune)
    (tmp_path / "m.onnx").write_bytes(chain_model(width=4, rows=1, layers=1).SerializeToString())
    with pytest.raises(aivmm.ModelError, match="seen enough"):
        aivmm.deploy(
            tmp_path / "m.onnx",
            store=tmp_path / "plans",
            precisions=(each for each in ("fp32", "bf16")),  # type: ignore[arg-type]
            batches=(each for each in (1, 4)),  # type: ignore[arg-type]
            dims={"rows": iter((2, 4))},  # type: ignore[dict-item]
        )
    assert (asked["precisions"], tuple(asked["batches"]), asked["dims"]) == (("fp32", "bf16"), (1, 4), {"rows": (2, 4)})


@pytest.mark.parametrize("name", ["trials", "top", "seed", "min_segments", "budget_s"])
def test_text_is_no_number(name: str) -> None:
    with pytest.raises(aivmm.UsageError, match=f"{name} takes a .*number"):
        aivmm.tune("missing.onnx", quiet=True, **{name: "3"})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (None, {}),
        ({"rows": 4}, {"rows": (4,)}),
        ({"rows": np.int64(4)}, {"rows": (4,)}),
        ({"rows": [16, 4]}, {"rows": (4, 16)}),
        ({"rows": range(4, 13, 4)}, {"rows": (4, 8, 12)}),
        ({"rows": np.array([4, 16])}, {"rows": (4, 16)}),
        ({"rows": "16,4", "side": "32..128"}, {"rows": (4, 16), "side": (32, 64, 128)}),
    ],
)
def test_extents_are_one_a_list_or_as_on_the_command_line(given: Any, meant: dict[str, tuple[int, ...]]) -> None:
    assert arguments.extents(given) == meant


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"sr": ()}, {"sr": ((),)}),
        ({"x": (1, 4)}, {"x": ((1, 4),)}),
        ({"x": np.ones((1, 4)).shape}, {"x": ((1, 4),)}),
        ({"x": [(1, 16), (1, 4)]}, {"x": ((1, 16), (1, 4))}),  # inputs change in step: the order stays
        ({"x": "1x4,1x16"}, {"x": ((1, 4), (1, 16))}),
    ],
)
def test_shapes_are_one_a_list_or_as_on_the_command_line(given: Any, meant: dict[str, tuple[tuple[int, ...], ...]]) -> None:
    assert arguments.shapes(given) == meant


def test_names_may_be_joined_by_commas_as_on_the_command_line() -> None:
    assert (
        arguments.names("targets", "openvino, *:CPU", "") == arguments.names("targets", ["openvino", "*:CPU"], "") == ("openvino", "*:CPU")
    )
