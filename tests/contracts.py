"""The contract of `Backend`, for ours and for anyone's.

    from tests.contracts import BackendContract

    class TestMyBackend(BackendContract):
        @pytest.fixture
        def backend(self) -> Backend:
            return MyBackend()

Each test runs on the backend's first target; override the `target` fixture to hold another one to it. What a target may lack (an element
type, dynamic shapes) it may refuse with `Unsupported`, and the test is then skipped with its words; what it takes it must compute rightly.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from aivmm.errors import AivmmError, Unsupported
from aivmm.runtime.backend import Backend, Buffer, Executable, Request, aligned_empty
from aivmm.runtime.config import Config, Knob, Setting
from aivmm.runtime.target import Target, Unavailable
from tests.contract_models import Arrays, Case, buffer_like, element_types, one_node, onnx_model, perceptron, relu_model, spoilt_models

# What `bind` may raise when it is given something else than it asks for. Which of them is the backend's choice; taking it is not.
REFUSALS = (ValueError, TypeError, KeyError, RuntimeError, AivmmError)


def run_once(executable: Executable, feeds: Arrays) -> dict[str, Buffer]:
    """Bind `feeds`, run, and return copies of all outputs, whether bound (static ones) or left to the runtime."""
    request = executable.new_request()
    for name, array in feeds.items():
        request.bind(name, buffer_like(array))
    for spec in executable.outputs:
        if spec.static:
            request.bind(spec.name, aligned_empty(spec))
    request.run()
    return {spec.name: np.array(request.output(spec.name)) for spec in executable.outputs}


def _values(knob: Knob) -> tuple[Setting, ...]:
    """Return the values of `knob` worth trying: all choices, or both ends."""
    if knob.kind == "choice":
        return knob.choices
    return (int(knob.low), int(knob.high)) if knob.kind == "int" else (float(knob.low), float(knob.high))


def _allows(knob: Knob, value: Setting) -> bool:
    if knob.kind == "choice":
        return value in knob.choices
    number = isinstance(value, int if knob.kind == "int" else int | float) and not isinstance(value, bool)
    return number and knob.low <= float(value) <= knob.high


# By the device's name without its number: what keeps a runtime from computing products of fp32 in fewer bits.
_EXACTLY: Mapping[str, Mapping[str, Setting]] = {"CUDA": {"provider.use_tf32": "0"}}


def exact(target: Target, precision: str | None = "fp32") -> Config:
    """Return the config that computes as the model says. A default may not: OpenVINO's is bf16 on a CPU that has it, CUDA's is TF32."""
    settings = _EXACTLY.get(target.name.partition(":")[0], {}) if precision == "fp32" else {}
    return Config.of(settings, precision=precision if precision in target.precisions else None)


class BackendContract:
    """Every backend passes this. Subclass it and give a `backend` fixture."""

    @pytest.fixture
    def backend(self) -> Backend:
        """The backend under test."""
        raise NotImplementedError("a contract's subclass gives a `backend` fixture")

    @pytest.fixture
    def target(self, backend: Backend) -> Target:
        """The target under test: the first, unless overridden."""
        offered = backend.targets()
        first = next((each for each in offered if isinstance(each, Target)), None)
        if first is None:
            pytest.skip(f"no target here: {'; '.join(map(str, offered)) or 'and no reason given'}")
        return first

    @pytest.fixture
    def compiled(self, backend: Backend, target: Target, request: pytest.FixtureRequest) -> Callable[..., Executable]:
        """Compile for the target under test, to compute exactly unless told otherwise, and close at the end."""

        def compile_one(model: Path | bytes, config: Config | None = None) -> Executable:
            executable = backend.compile(model, target, config or exact(target))
            request.addfinalizer(executable.close)
            return executable

        return compile_one

    # --- what it offers ---

    def test_it_has_the_shape_of_a_backend(self, backend: Backend) -> None:
        assert isinstance(backend, Backend)
        assert backend.name, "a backend has a name"
        assert ":" not in backend.name, "a target is written runtime:name, so the runtime's own name holds no colon"

    def test_targets_are_the_same_when_asked_twice(self, backend: Backend) -> None:
        first, second = backend.targets(), backend.targets()
        assert [repr(each) for each in first] == [repr(each) for each in second]

    def test_targets_are_well_formed(self, backend: Backend) -> None:
        offered = backend.targets()
        assert offered, "a backend without targets says why, by an Unavailable"
        for each in offered:
            if isinstance(each, Unavailable):
                assert each.target.partition(":")[0] == backend.name
                assert each.reason, f"{each.target} is absent for a reason"
                assert "\n" not in str(each)
                continue
            assert each.runtime == backend.name
            assert each.name, "a target names its device"
            assert not any(letter.isspace() or letter == "," for letter in each.name), "or no --targets list could name it"
            assert each.runtime_version, "numbers depend on the runtime's version"
            assert each.device.model, "numbers depend on the device's model"
            assert each.precisions[:1] == ("fp32",)
            assert len(set(each.precisions)) == len(each.precisions)
        names = [each.target if isinstance(each, Unavailable) else str(each) for each in offered]
        assert len(set(names)) == len(names), "a target is offered once"

    def test_every_knob_has_a_reason_a_range_and_a_default_within_it(self, backend: Backend, target: Target) -> None:
        knobs = backend.knobs(target)
        assert len({knob.name for knob in knobs}) == len(knobs)
        for knob in knobs:
            assert knob.name, "a knob has a name"
            assert knob.why.strip(), f"{knob.name} says why it may matter"
            assert knob.objectives, f"{knob.name} serves some objective"
            if knob.kind == "choice":
                assert knob.choices, f"{knob.name} has choices"
                assert len({repr(each) for each in knob.choices}) == len(knob.choices), f"{knob.name} lists a choice once"
            else:
                assert knob.low <= knob.high, f"{knob.name} has a range"
                assert knob.low > 0 or not knob.log, f"{knob.name} cannot be logarithmic from {knob.low}"
            assert knob.default is None or _allows(knob, knob.default), f"{knob.name}'s default {knob.default!r} is one of its own values"

    def test_knobs_are_the_same_when_asked_twice(self, backend: Backend, target: Target) -> None:
        assert list(backend.knobs(target)) == list(backend.knobs(target))

    @pytest.mark.parametrize("objective", ["latency", "throughput"])
    def test_every_baseline_compiles_and_runs(self, backend: Backend, target: Target, objective: str) -> None:
        baselines = backend.baselines([target], objective)
        assert baselines, f"a user who tunes for {objective} would run something without us"
        assert len({each.name for each in baselines}) == len(baselines)
        for each in baselines:
            executable = backend.compile(relu_model(4), each.target, each.config)
            answer = run_once(executable, {"x": np.array([-1, 2, -3, 4], dtype=np.float32)})["y"]
            executable.close()
            assert answer.tolist() == [0, 2, 0, 4], f"{each.name} answers wrongly"

    # --- settings and precisions ---

    def test_each_knob_can_be_turned(self, backend: Backend, target: Target) -> None:
        """A value that this machine refuses is `Unsupported`; the default is never refused, and no value changes the answer."""
        for knob in backend.knobs(target):
            for value in _values(knob):
                try:
                    executable = backend.compile(relu_model(4), target, Config.of({knob.name: value}))
                except Unsupported:
                    assert value != knob.default, f"{knob.name} refuses its own default {value!r}"
                    continue
                answer = run_once(executable, {"x": np.array([-1, 2, -3, 4], dtype=np.float32)})["y"]
                executable.close()
                assert answer.tolist() == [0, 2, 0, 4], f"{knob.name}={value!r} changes the answer"

    def test_the_effective_config_is_read_back_for_each_setting_asked(self, backend: Backend, target: Target) -> None:
        asked = {knob.name: knob.default for knob in backend.knobs(target) if knob.default is not None}
        for settings in [{name: value} for name, value in asked.items()]:
            executable = backend.compile(relu_model(4), target, Config.of(settings))
            effective = dict(executable.effective_config)
            executable.close()
            assert set(settings) <= set(effective), "a setting that was asked for is among those in effect"
            assert all(isinstance(value, str | int | float | bool) for value in effective.values())

    def test_an_unknown_setting_is_refused(self, backend: Backend, target: Target) -> None:
        with pytest.raises(Unsupported, match="no_such_setting"):
            backend.compile(relu_model(4), target, Config.of({"no_such_setting": 1}))

    def test_a_value_of_the_wrong_kind_is_refused(self, backend: Backend, target: Target) -> None:
        for knob in backend.knobs(target):
            with pytest.raises(Unsupported):
                backend.compile(relu_model(4), target, Config.of({knob.name: "no-such-value"})).close()

    def test_each_precision_offered_runs(self, backend: Backend, target: Target) -> None:
        case = perceptron()
        for precision in target.precisions:
            executable = backend.compile(case.model.SerializeToString(), target, exact(target, precision))
            answer = run_once(executable, case.feeds)["y"]
            executable.close()
            error = np.linalg.norm(answer - case.answers["y"]) / np.linalg.norm(case.answers["y"])
            assert error < (1e-4 if precision == "fp32" else 0.1), f"{precision} is off by {error:.1e}"

    @pytest.mark.parametrize("precision", ["bf16", "f16", "int8", "fp3"])
    def test_a_precision_that_is_not_offered_is_refused(self, backend: Backend, target: Target, precision: str) -> None:
        if precision in target.precisions:
            pytest.skip(f"{target} offers {precision}")
        with pytest.raises(Unsupported, match=precision):
            backend.compile(relu_model(4), target, Config(precision=precision))

    # --- models ---

    def test_inputs_and_outputs_are_the_models_in_its_order(self, compiled: Callable[..., Executable]) -> None:
        inputs = [("second", TensorProto.INT64, (2, 1)), ("first", TensorProto.FLOAT, (2, 3))]
        outputs = [("sum", TensorProto.FLOAT, (2, 3)), ("cast", TensorProto.FLOAT, (2, 1))]
        nodes = [
            helper.make_node("Cast", ["second"], ["cast"], to=TensorProto.FLOAT),
            helper.make_node("Add", ["first", "cast"], ["sum"]),
        ]
        executable = compiled(onnx_model(nodes, inputs, outputs).SerializeToString())
        assert [str(each) for each in executable.inputs] == ["second: int64[2, 1]", "first: float32[2, 3]"]
        assert [str(each) for each in executable.outputs] == ["sum: float32[2, 3]", "cast: float32[2, 1]"]

    @pytest.mark.parametrize("case", [perceptron(), *element_types()], ids=lambda case: case.name)
    def test_what_it_takes_it_computes_rightly(self, compiled: Callable[..., Executable], case: Case) -> None:
        try:
            executable = compiled(case.model.SerializeToString())
        except Unsupported as refusal:
            pytest.skip(f"refused: {refusal}")
        answers = run_once(executable, case.feeds)
        assert list(answers) == list(case.answers)
        for name, expected in case.answers.items():
            assert answers[name].dtype == expected.dtype
            np.testing.assert_allclose(answers[name], expected, rtol=1e-4, atol=1e-4)

    def test_a_file_and_its_bytes_are_the_same_model(self, compiled: Callable[..., Executable], tmp_path: Path) -> None:
        case = perceptron()
        file = tmp_path / "a model.onnx"
        onnx.save(case.model, str(file))
        for model in (file, file.read_bytes()):
            np.testing.assert_allclose(run_once(compiled(model), case.feeds)["y"], case.answers["y"], rtol=1e-4, atol=1e-4)

    def test_weights_may_lie_beside_the_file(self, compiled: Callable[..., Executable], tmp_path: Path) -> None:
        case = perceptron()
        model = onnx.ModelProto.FromString(case.model.SerializeToString())
        file = tmp_path / "model.onnx"
        onnx.save(model, str(file), save_as_external_data=True, location="weights.bin", size_threshold=0)
        assert (tmp_path / "weights.bin").is_file()
        np.testing.assert_allclose(run_once(compiled(file), case.feeds)["y"], case.answers["y"], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("spoilt", spoilt_models())
    def test_a_model_it_cannot_take_is_refused_in_words(self, backend: Backend, target: Target, spoilt: str, tmp_path: Path) -> None:
        data = spoilt_models()[spoilt]
        file = tmp_path / "spoilt.onnx"
        file.write_bytes(data)
        for model in (data, file):
            with pytest.raises(Unsupported) as refusal:
                backend.compile(model, target, Config())
            assert refusal.value.message.strip(), "a refusal is the runtime's own words"

    def test_an_extent_that_is_not_known_may_differ_from_run_to_run(self, compiled: Callable[..., Executable]) -> None:
        try:
            executable = compiled(relu_model("batch", 2))
        except Unsupported as refusal:
            pytest.skip(f"refused: {refusal}")
        assert executable.inputs[0].shape == (None, 2)
        assert executable.outputs[0].shape == (None, 2)
        request = executable.new_request()
        for rows in (3, 1, 4):
            x = np.arange(-3, 2 * rows - 3, dtype=np.float32).reshape(rows, 2)
            request.bind("x", buffer_like(x))
            request.run()
            np.testing.assert_array_equal(request.output("y"), np.maximum(x, 0))

    # --- placement ---

    def test_placement_says_which_device_runs_it(self, compiled: Callable[..., Executable]) -> None:
        placement = compiled(perceptron().model.SerializeToString()).placement
        assert placement.devices, "the runtime names the devices that execute"
        assert all(placement.devices)
        assert set(placement.nodes) <= set(placement.devices)
        assert all(count >= 0 for count in placement.nodes.values())
        assert placement.stray == (), "nothing of a plain network strays, or compile would have refused it"

    # --- requests ---

    def test_bound_buffers_are_used_in_place(self, compiled: Callable[..., Executable]) -> None:
        request = compiled(relu_model(2, 2)).new_request()
        x, y = buffer_like(np.array([[-1, 2], [3, -4]], dtype=np.float32)), buffer_like(np.full((2, 2), np.nan, dtype=np.float32))
        request.bind("x", x)
        request.bind("y", y)
        request.run()
        assert y.tolist() == [[0, 2], [3, 0]]
        assert x.tolist() == [[-1, 2], [3, -4]], "an input is only read"
        assert request.output("y").ctypes.data == y.ctypes.data
        x[...] = [[5, -6], [-7, 8]]
        request.run()
        assert y.tolist() == [[5, 0], [0, 8]], "what is written to a bound input is what the next run reads"

    def test_another_buffer_can_be_bound_between_runs(self, compiled: Callable[..., Executable]) -> None:
        request = compiled(relu_model(2)).new_request()
        first, second = (buffer_like(np.full(2, np.nan, dtype=np.float32)) for _ in range(2))
        for y, values in ((first, [1, -1]), (second, [-2, 2])):
            request.bind("x", buffer_like(np.array(values, dtype=np.float32)))
            request.bind("y", y)
            request.run()
        assert first.tolist() == [1, 0], "a buffer that was replaced is left alone"
        assert second.tolist() == [0, 2]

    def test_an_output_that_is_not_bound_can_be_read(self, compiled: Callable[..., Executable]) -> None:
        request = compiled(relu_model(2)).new_request()
        x = buffer_like(np.array([-1, 2], dtype=np.float32))
        request.bind("x", x)
        request.run()
        assert request.output("y").tolist() == [0, 2]
        x[...] = [3, -4]
        request.run()
        assert request.output("y").tolist() == [3, 0]

    @pytest.mark.parametrize(
        ("name", "buffer"),
        [
            ("z", np.zeros((2, 3), dtype=np.float32)),
            ("x", np.zeros((2, 3), dtype=np.float64)),
            ("x", np.zeros((2, 3), dtype=np.int32)),
            ("x", np.zeros((3, 2), dtype=np.float32)),
            ("x", np.zeros(6, dtype=np.float32)),
            ("x", np.zeros((2, 6), dtype=np.float32)[:, ::2]),
            ("y", np.zeros((2, 3), dtype=np.float64)),
            ("y", np.zeros((2, 4), dtype=np.float32)),
        ],
        ids=["unknown name", "float64", "int32", "transposed", "flat", "strided", "output float64", "output too large"],
    )
    def test_a_buffer_that_does_not_fit_is_refused_not_converted(
        self, compiled: Callable[..., Executable], name: str, buffer: np.ndarray[Any, Any]
    ) -> None:
        request = compiled(relu_model(2, 3)).new_request()
        request.bind("x", buffer_like(np.ones((2, 3), dtype=np.float32)))
        request.bind("y", buffer_like(np.zeros((2, 3), dtype=np.float32)))
        with pytest.raises(REFUSALS):  # by the binding or, where that is the runtime's way, by the run
            request.bind(name, buffer)
            request.run()

    def test_one_buffer_joins_two_executables(self, compiled: Callable[..., Executable]) -> None:
        """The boundary between two stages of a plan: an output of one that is an input of the next."""
        negate = one_node("Neg", [("x", TensorProto.FLOAT, (3,))], ("y", TensorProto.FLOAT, (3,))).SerializeToString()
        first, second = compiled(relu_model(3)).new_request(), compiled(negate).new_request()
        x, between, y = (buffer_like(np.zeros(3, dtype=np.float32)) for _ in range(3))
        for request, read, written in ((first, x, between), (second, between, y)):
            request.bind("x", read)
            request.bind("y", written)
        for values in ([1, -2, 3], [-4, 5, -6]):
            x[...] = values
            first.run()
            second.run()
            assert y.tolist() == [-max(value, 0) for value in values]

    def test_requests_in_flight_from_several_threads_answer_rightly(self, compiled: Callable[..., Executable]) -> None:
        case = perceptron()
        executable = compiled(case.model.SerializeToString())
        weights = {each.name: numpy_helper.to_array(each) for each in case.model.graph.initializer}
        callers, start = 3, threading.Barrier(3)

        def serve(caller: int) -> float:
            request: Request = executable.new_request()
            x, y = aligned_empty(executable.inputs[0]), aligned_empty(executable.outputs[0])
            request.bind("x", x)
            request.bind("y", y)
            random, worst = np.random.default_rng(caller), 0.0
            start.wait(timeout=60)
            for _ in range(50):
                x[...] = random.normal(size=x.shape)
                request.run()
                expected = np.maximum(x @ weights["first"] + weights["bias"], 0) @ weights["second"]
                worst = max(worst, float(np.abs(y - expected).max()))
            return worst

        with ThreadPoolExecutor(callers) as pool:
            assert max(pool.map(serve, range(callers))) < 1e-3, "requests disturb each other"

    # --- the end ---

    def test_closing_twice_is_closing_once(self, backend: Backend, target: Target) -> None:
        executable = backend.compile(relu_model(4), target, Config())
        run_once(executable, {"x": np.zeros(4, dtype=np.float32)})
        executable.close()
        executable.close()

    def test_closing_one_executable_leaves_the_others_running(self, backend: Backend, compiled: Callable[..., Executable]) -> None:
        doomed, other = compiled(relu_model(2)), compiled(relu_model(2))
        request = other.new_request()
        x, y = buffer_like(np.array([-1, 2], dtype=np.float32)), buffer_like(np.zeros(2, dtype=np.float32))
        request.bind("x", x)
        request.bind("y", y)
        doomed.close()
        request.run()
        assert y.tolist() == [0, 2]
