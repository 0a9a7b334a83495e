"""A plan's alternatives: another way to run the model, for another goal, from the same bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import aivmm
from aivmm.errors import UsageError
from aivmm.models.graph import analyse
from aivmm.models.prepare import prepare
from aivmm.planner.candidates import Draft, Piece
from aivmm.runtime.config import Config
from aivmm.runtime.engine import Engine
from aivmm.runtime.plan import Number
from aivmm.runtime.registry import load_backend
from aivmm.runtime.target import Target
from aivmm.tuner.emit import Emitter, Other
from tests.making import chain_model, normal, write_model
from tests.tuner.harness import MODELS


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan on ONNX Runtime for one row, which keeps OpenVINO with three rows for throughput, and two threads as a compromise."""
    folder = tmp_path_factory.mktemp("alternatives")
    emitters = {}
    for rows in (1, 3):
        source = write_model(folder / f"source-{rows}.onnx", chain_model(rows=rows))
        facts = prepare(source, folder / f"model-{rows}.onnx")
        structure = analyse(folder / f"model-{rows}.onnx")
        emitters[rows] = Emitter(folder / f"model-{rows}.onnx", facts, structure, folder / f"segments-{rows}", version="test")

    def draft(name: str, runtime: str, rows: int, callers: int, config: Config) -> Draft:
        target = next(each for each in load_backend(runtime).targets() if isinstance(each, Target) and each.name == "CPU")
        return Draft(
            name=name, pieces=(Piece(target=target, config=config, first=0, last=_last(emitters[rows])),), batch=rows, callers=callers
        )

    fp32 = Config(precision="fp32")
    number = {"throughput_per_s": Number(value=9.0, source="measured")}
    others = [
        Other(draft=draft("candidate 2", "openvino", 3, 2, fp32), objective="throughput", expected=number, emitter=emitters[3]),
        Other(
            draft=draft("candidate 3", "onnxruntime", 1, 1, Config.of({"intra_op_num_threads": 2}, precision="fp32")),
            objective="memory",
            expected={},
            emitter=emitters[1],
        ),
    ]
    plan = draft("candidate 1", "onnxruntime", 1, 1, fp32)
    emitters[1].write(
        plan, folder / "plan.aivmm", objective="latency", fallbacks=[draft("instead", "openvino", 1, 1, fp32)], alternatives=others
    )
    for each in emitters.values():
        each.close()
    return folder / "plan.aivmm"


def _last(emitter: Emitter) -> int:
    return len(emitter.node_names()) - 1


def run(engine: object, rows: int) -> np.ndarray:
    assert isinstance(engine, Engine)
    (found,) = engine.run({"x": normal(rows, 32)}).values()
    return found


def test_the_plan_itself_runs_where_nothing_is_asked_for(bundle: Path) -> None:
    with Engine.load(bundle) as engine:
        assert (engine.plan.objective, engine.plan.batch, engine.stages[0].target) == ("latency", 1, "onnxruntime:CPU")
        assert len(engine.plan.alternatives) == 2


def test_what_is_kept_for_another_goal_is_loaded_by_its_name(bundle: Path) -> None:
    with aivmm.load_plan(bundle, alternative="throughput") as engine, Engine.load(bundle) as plain:
        assert isinstance(engine, Engine)
        assert (engine.plan.objective, engine.plan.batch, engine.plan.callers) == ("throughput", 3, 2)
        assert engine.stages[0].target == "openvino:CPU" and engine.inputs[0].shape == (*engine.outputs[0].shape[:1], 32) == (3, 32)
        assert engine.plan.expected["throughput_per_s"].value == 9.0 and engine.plan.accuracy is None
        assert engine.plan.fallbacks == []  # those are for one row
        assert run(engine, 3) == pytest.approx(np.concatenate([run_row(plain, row) for row in normal(3, 32)]), abs=1e-4)


def run_row(engine: Engine, row: np.ndarray) -> np.ndarray:
    (found,) = engine.run({"x": row[None]}).values()
    return found


def test_an_alternative_of_the_plans_own_batch_keeps_its_fallbacks(bundle: Path) -> None:
    with Engine.load(bundle, alternative="memory") as engine:
        assert engine.stages[0].config == {"intra_op_num_threads": 2} and [each.name for each in engine.plan.fallbacks] == ["instead"]
        assert run(engine, 1).shape[0] == 1


def test_what_the_plan_does_not_keep_is_refused_with_what_it_does(bundle: Path) -> None:
    with pytest.raises(UsageError, match="no alternative for 'energy'") as refused:
        aivmm.load_plan(bundle, alternative="energy")
    assert "throughput (candidate 2); memory (candidate 3)" in refused.value.advice


def test_a_models_state_may_have_its_batch_anywhere(tmp_path: Path) -> None:
    """Silero's is [2, batch, 128]: its plan for latency and throughput ended in a traceback."""
    source = MODELS / "silero_vad_16k_op15.onnx"
    if not source.exists():
        pytest.skip("../shared/models is not there")
    target = next(each for each in load_backend("onnxruntime").targets() if isinstance(each, Target) and each.name == "CPU")
    emitters, drafts = {}, {}
    for rows in (1, 4):
        facts = prepare(source, tmp_path / f"model-{rows}.onnx", batch=rows)
        emitters[rows] = Emitter(
            tmp_path / f"model-{rows}.onnx", facts, analyse(tmp_path / f"model-{rows}.onnx"), tmp_path / f"segments-{rows}", version="test"
        )
        piece = Piece(target=target, config=Config(precision="fp32"), first=0, last=_last(emitters[rows]))
        drafts[rows] = Draft(name=f"{rows} rows", pieces=(piece,), batch=rows)
    other = Other(draft=drafts[4], objective="throughput", expected={}, emitter=emitters[4])
    emitters[1].write(drafts[1], tmp_path / "plan.aivmm", objective="latency,throughput", alternatives=[other])
    for each in emitters.values():
        each.close()
    random = np.random.default_rng(0)
    audio, state = (0.1 * random.normal(size=shape).astype(np.float32) for shape in ((4, 512), (2, 4, 128)))
    rate = np.array(16000, np.int64)
    with Engine.load(tmp_path / "plan.aivmm") as one, Engine.load(tmp_path / "plan.aivmm", alternative="throughput") as four:
        found = four.run({"input": audio, "state": state, "sr": rate})
        for row in range(4):
            alone = one.run({"input": audio[row : row + 1], "state": np.ascontiguousarray(state[:, row : row + 1]), "sr": rate})
            np.testing.assert_allclose(found["output"][row : row + 1], alone["output"], atol=1e-5)
            np.testing.assert_allclose(found["stateN"][:, row : row + 1], alone["stateN"], atol=1e-5)
