"""The null backend: the contract on both default devices, and the arithmetic against sums done by hand."""

from __future__ import annotations

import gc
import math
import statistics
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from aivmm.errors import Unsupported, UsageError
from aivmm.runtime.backend import Backend
from aivmm.runtime.config import Config
from aivmm.runtime.null import NullBackend, SimulatedTime
from aivmm.runtime.null_device import FakeClock, NullDevice
from aivmm.runtime.null_work import load, work_of
from aivmm.runtime.target import Target, Unavailable
from tests.contract_models import buffer_like, one_node, onnx_model, relu_model
from tests.contracts import BackendContract

# One thread does 1 GFLOP/s, memory moves 1 GB/s, and nothing else costs anything: times can be done in the head.
PLAIN = NullDevice(flops_per_s=1e9, bytes_per_s=1e9, launch_s=0.0, cores=1, serial=0.0, thread_overhead=0.0, stream_overhead=0.0)


class TestNullCpu(BackendContract):
    @pytest.fixture
    def backend(self) -> Backend:
        return NullBackend()


class TestNullGpu(BackendContract):
    @pytest.fixture
    def backend(self) -> Backend:
        return NullBackend()

    @pytest.fixture
    def target(self, backend: Backend) -> Target:
        return only(backend, "GPU.0")


def only(backend: Backend, name: str = "CPU") -> Target:
    return next(each for each in backend.targets() if isinstance(each, Target) and each.name == name)


def device(**changes: object) -> NullDevice:
    """Return PLAIN with some figures changed."""
    return NullDevice(**({name: getattr(PLAIN, name) for name in NullDevice.__dataclass_fields__} | changes))


def run_s(backend: NullBackend, model: bytes, config: Config | None = None, *, callers: int = 1) -> float:
    """Run once with zeros, with `callers` requests open, and return the simulated duration."""
    executable = backend.compile(model, only(backend, next(iter(backend._devices))), config or Config())
    requests = [executable.new_request() for _ in range(callers)]
    for spec in executable.inputs:
        requests[0].bind(spec.name, np.zeros(spec.shape, dtype=spec.dtype))
    requests[0].run()
    executable.close()
    return requests[0].last_s


def matmul(rows: int, inner: int, columns: int) -> bytes:
    inputs = [("a", TensorProto.FLOAT, (rows, inner)), ("b", TensorProto.FLOAT, (inner, columns))]
    return one_node("MatMul", inputs, ("y", TensorProto.FLOAT, (rows, columns))).SerializeToString()


# --- the arithmetic ---


def test_a_node_that_computes_much_takes_its_flops_over_the_speed() -> None:
    assert run_s(NullBackend([PLAIN]), matmul(100, 100, 100)) == pytest.approx(2e6 / 1e9)


def test_a_node_that_computes_little_takes_its_bytes_over_the_bandwidth() -> None:
    assert run_s(NullBackend([PLAIN]), relu_model(1000)) == pytest.approx(8000 / 1e9)


def test_launches_copies_and_efficiency_add_up() -> None:
    slow = device(launch_s=1e-3, copy_bytes_per_s=4e6, copy_s=1e-2, efficiency={"MatMul": 0.5})
    moved = 3 * 4 * 100 * 100
    assert run_s(NullBackend([slow]), matmul(100, 100, 100)) == pytest.approx(2 * 2e-3 + 1e-3 + moved / 4e6 + 3 * 1e-2)


def test_a_lower_precision_computes_faster_and_rounds_its_outputs() -> None:
    backend = NullBackend([device(speed={"fp32": 1.0, "f16": 4.0, "bf16": 2.0})])
    fast = run_s(backend, matmul(200, 200, 200), Config(precision="f16"))
    assert fast == pytest.approx(run_s(backend, matmul(200, 200, 200)) / 4)
    for precision, digits in (("f16", np.float32(np.float16(1.001))), ("bf16", np.float32(1.0))):
        request = backend.compile(relu_model(1), only(backend), Config(precision=precision)).new_request()
        request.bind("x", np.array([1.001], dtype=np.float32))
        request.run()
        assert request.output("y")[0] == digits != np.float32(1.001)


def test_amdahls_law_and_the_overhead_of_threads_have_the_optimum_of_the_textbook() -> None:
    """serial + (1 - serial) / t + overhead * (t - 1) is least at t = sqrt((1 - serial) / overhead)."""
    backend = NullBackend([device(cores=16, serial=0.1, thread_overhead=0.9 / 36)])
    config, seconds = backend.optimum(matmul(100, 100, 100), only(backend))
    assert config.get("threads") == 6
    assert seconds == pytest.approx(2e-3 * (0.1 + 0.9 / 6 + 0.9 / 36 * 5))
    assert run_s(backend, matmul(100, 100, 100), config) == pytest.approx(seconds)


def test_two_callers_hide_copies_behind_compute_and_no_more() -> None:
    backend = NullBackend([device(copy_s=1e-3 / 3)])  # 2 ms of compute, 1 ms of copies
    streams = Config.of({"streams": 2})
    assert run_s(backend, matmul(100, 100, 100)) == pytest.approx(3e-3)
    assert run_s(backend, matmul(100, 100, 100), streams) == pytest.approx(3e-3), "one caller gains nothing from a second stream"
    assert run_s(backend, matmul(100, 100, 100), streams, callers=2) == pytest.approx(2 * 2e-3), "the device computes all the time"
    assert run_s(backend, matmul(100, 100, 100), callers=2) == pytest.approx(2 * 3e-3), "one stream takes one after the other"


def test_the_best_for_throughput_is_not_the_best_for_latency() -> None:
    backend = NullBackend([device(cores=4, serial=0.3, thread_overhead=0.02)])
    target = only(backend)
    latency, _ = backend.optimum(matmul(64, 64, 64), target)
    throughput, _ = backend.optimum(matmul(64, 64, 64), target, callers=4)
    assert latency.get("threads") == 4
    assert throughput.as_dict() == {"streams": 4, "threads": 1}


@settings(max_examples=25, deadline=None)
@given(
    cores=st.integers(1, 4),
    serial=st.floats(0, 1),
    overhead=st.floats(0, 0.5),
    factor=st.floats(0.5, 2),
    callers=st.integers(1, 3),
)
def test_the_optimum_is_never_beaten_by_any_config(cores: int, serial: float, overhead: float, factor: float, callers: int) -> None:
    made = device(
        cores=cores,
        serial=serial,
        thread_overhead=overhead,
        max_streams=2,
        stream_overhead=0.1,
        choices={"layout": {"a": 1.0, "b": factor}},
    )
    backend = NullBackend([made])
    target, model = only(backend), relu_model(64)
    best, seconds = backend.optimum(model, target, callers=callers)
    assert backend.expect_s(model, target, best, callers=callers) == seconds
    for threads in range(1, 2 * cores + 1) if cores > 1 else [None]:
        for streams in (1, 2):
            for layout in ("a", "b"):
                point = {"streams": streams, "layout": layout} | ({"threads": threads} if threads else {})
                assert seconds <= backend.expect_s(model, target, Config.of(point), callers=callers)


def test_the_operators_made_of_multiply_adds_are_counted_as_such() -> None:
    conv = onnx_model(
        [helper.make_node("Conv", ["x", "w"], ["y"], group=2, strides=[2, 2])],
        [("x", TensorProto.FLOAT, (1, 4, 9, 9))],
        [("y", TensorProto.FLOAT, (1, 6, 4, 4))],
        {"w": np.zeros((6, 2, 3, 3), dtype=np.float32)},
    )
    assert work_of(conv).nodes == (("Conv", 2.0 * 6 * 4 * 4 * 2 * 3 * 3, 4 * (4 * 81 + 6 * 2 * 9 + 6 * 16)),)
    gemm = one_node("Gemm", [("a", 1, (5, 7)), ("b", 1, (5, 3))], ("y", 1, (7, 3)), transA=1)
    assert work_of(gemm).nodes[0][1] == 2.0 * 7 * 5 * 3


# --- the clock ---


def test_each_run_moves_the_clock_by_its_own_time_and_nothing_sleeps() -> None:
    clock = FakeClock()
    backend = NullBackend([device(copy_s=1000.0)], clock=clock)
    request = backend.compile(relu_model(4), only(backend), Config()).new_request()
    request.bind("x", np.zeros(4, dtype=np.float32))
    assert clock.now() == 0.0 == request.last_s
    for runs in (1, 2, 3):
        request.run()
        assert isinstance(request, SimulatedTime)
        assert clock.now() == pytest.approx(runs * request.last_s)
    assert request.last_s > 2000


def test_requests_in_flight_share_the_clock_whatever_the_order_of_their_threads() -> None:
    backend = NullBackend([device(copy_s=1e-3, max_streams=3)])
    executable = backend.compile(relu_model(250), only(backend), Config.of({"streams": 3}))
    requests = [executable.new_request() for _ in range(3)]

    def serve(index: int) -> None:
        for _ in range(10):
            requests[index].run()

    for request in requests:
        request.bind("x", np.zeros(250, dtype=np.float32))
    threads = [threading.Thread(target=serve, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert backend.clock.now() == pytest.approx(10 * requests[0].last_s), "three callers work side by side, ten runs each"
    assert requests[0].last_s == pytest.approx(2e-3 + 2e-6)


def test_noise_is_seeded_and_centred_on_the_exact_time() -> None:
    def series(seed: int) -> list[float]:
        backend = NullBackend([device(noise=0.03)], seed=seed)
        request = backend.compile(relu_model(1000), only(backend), Config()).new_request()
        request.bind("x", np.zeros(1000, dtype=np.float32))
        samples = []
        for _ in range(200):
            request.run()
            samples.append(request.last_s)
        return samples

    first = series(1)
    assert first == series(1)
    assert first != series(2)
    assert statistics.median(first) == pytest.approx(8e-6, rel=0.01)
    assert statistics.stdev(map(math.log, first)) == pytest.approx(0.03, rel=0.2)


def test_a_dynamic_model_takes_time_by_the_shapes_it_is_run_with() -> None:
    backend = NullBackend([PLAIN])
    request = backend.compile(relu_model("n", 100), only(backend), Config()).new_request()
    for rows in (10, 1000):
        request.bind("x", np.zeros((rows, 100), dtype=np.float32))
        request.run()
        assert request.last_s == pytest.approx(rows * 800 / 1e9)


# --- memory, and what is refused ---


def perceptron_with(weight_bytes: int) -> onnx.ModelProto:
    weight = np.zeros((weight_bytes // 4, 1), dtype=np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    return onnx_model([node], [("x", 1, (1, len(weight)))], [("y", 1, (1, 1))], {"w": weight})


def test_what_does_not_fit_is_refused_with_both_numbers(tmp_path: Path) -> None:
    backend = NullBackend([device(memory_bytes=10_000)])
    file = tmp_path / "big.onnx"
    onnx.save(perceptron_with(8000), str(file))
    with pytest.raises(Unsupported, match=r"big needs 16004 bytes, null:CPU has 10000"):
        backend.compile(file, only(backend), Config())


def test_memory_is_held_by_streams_and_given_back_on_closing_or_forgetting() -> None:
    backend = NullBackend([device(memory_bytes=10_000)])
    target, model = only(backend), relu_model(500)  # 2000 bytes in, 2000 out
    first = backend.compile(model, target, Config.of({"streams": 2}))
    assert backend.memory_in_use(target) == 8000
    with pytest.raises(Unsupported, match="needs 4000 bytes, null:CPU has 2000"):
        backend.compile(model, target, Config())
    first.close()
    first.close()
    assert backend.memory_in_use(target) == 0
    second = backend.compile(model, target, Config())
    assert backend.memory_in_use(target) == 4000
    del second
    gc.collect()
    assert backend.memory_in_use(target) == 0


def test_activations_are_counted_at_their_worst_moment_not_in_sum() -> None:
    names = ["x", "a", "b", "c", "y"]
    nodes = [helper.make_node("Relu", [names[i]], [names[i + 1]]) for i in range(4)]
    work = work_of(onnx_model(nodes, [("x", 1, (100,))], [("y", 1, (100,))]))
    # The input is the caller's and stays; of the chain two tensors are alive at once.
    assert work.activation_bytes == 3 * 400


def test_an_operator_the_device_lacks_is_refused_even_inside_a_body() -> None:
    backend = NullBackend([device(op_types=frozenset({"If", "Relu"}))])
    bodies = {}
    for branch, op_type in (("then_branch", "Relu"), ("else_branch", "Neg")):
        output = helper.make_tensor_value_info(branch, 1, (2,))
        bodies[branch] = helper.make_graph([helper.make_node(op_type, ["x"], [branch])], branch, [], [output])
    model = onnx_model([helper.make_node("If", ["c"], ["y"], **bodies)], [("c", TensorProto.BOOL, ()), ("x", 1, (2,))], [("y", 1, (2,))])
    with pytest.raises(Unsupported, match="null:CPU does not support Neg"):
        backend.compile(model.SerializeToString(), only(backend), Config())
    backend.compile(relu_model(2), only(backend), Config())


def test_a_value_outside_a_knobs_range_is_refused_with_the_range() -> None:
    backend = NullBackend()
    for value in (0, 9, True, 2.0):
        with pytest.raises(Unsupported, match="it takes 1 to 8"):
            backend.compile(relu_model(2), only(backend), Config.of({"threads": value}))
    with pytest.raises(Unsupported, match="it takes nchw, nhwc"):
        backend.compile(relu_model(2), only(backend, "GPU.0"), Config.of({"layout": "chwn"}))


def test_a_target_of_another_backend_is_refused() -> None:
    stranger = NullBackend([device(name="NPU")])
    with pytest.raises(Unsupported, match=r"null:NPU is not a device of the null backend; it has null:CPU, null:GPU\.0"):
        NullBackend().compile(relu_model(2), only(stranger, "NPU"), Config())


def test_a_closed_executable_cannot_be_run() -> None:
    backend = NullBackend()
    executable = backend.compile(relu_model(2), only(backend), Config())
    request = executable.new_request()
    request.bind("x", np.zeros(2, dtype=np.float32))
    executable.close()
    for attempt in (request.run, executable.new_request):
        with pytest.raises(RuntimeError, match="closed"):
            attempt()


def test_a_run_with_an_unbound_input_is_refused() -> None:
    backend = NullBackend()
    request = backend.compile(relu_model(2), only(backend), Config()).new_request()
    with pytest.raises(ValueError, match="input x is not bound"):
        request.run()


def test_strings_can_be_read_but_not_bound_as_outputs() -> None:
    backend = NullBackend()
    model = one_node("Identity", [("x", TensorProto.STRING, (2,))], ("y", TensorProto.STRING, (2,))).SerializeToString()
    request = backend.compile(model, only(backend), Config()).new_request()
    words = np.array(["one", "two"], dtype=object)
    request.bind("x", words)
    with pytest.raises(ValueError, match="read it with output"):
        request.bind("y", words.copy())
    request.run()
    assert request.output("y").tolist() == ["one", "two"]


def test_a_weight_that_is_also_listed_as_an_input_is_not_asked_for() -> None:
    backend = NullBackend()
    model = onnx_model([helper.make_node("Add", ["x", "w"], ["y"])], [("x", 1, (2,))], [("y", 1, (2,))], {"w": np.ones(2, np.float32)})
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, (2,)))
    executable = backend.compile(model.SerializeToString(), only(backend), Config())
    assert [each.name for each in executable.inputs] == ["x"]
    request = executable.new_request()
    request.bind("x", buffer_like(np.array([1, 2], dtype=np.float32)))
    request.run()
    assert request.output("y").tolist() == [2, 3]
    assert executable.work.weight_bytes == 8


# --- what it says of itself ---


def test_differently_made_devices_are_told_apart_where_numbers_are_keyed() -> None:
    one, same, other = (only(NullBackend([each])) for each in (PLAIN, device(), device(launch_s=1e-6)))
    assert one.device == same.device != other.device


def test_absent_devices_are_listed_with_their_reason() -> None:
    absent = Unavailable(target="null:NPU", reason="nobody imagined one", advice="pass it to NullBackend")
    assert NullBackend(unavailable=[absent]).targets()[-1] == absent


def test_a_device_with_impossible_figures_is_refused() -> None:
    for changes in ({"flops_per_s": 0.0}, {"serial": 1.5}, {"launch_s": -1.0}, {"efficiency": {"Conv": 0.0}}, {"noise": math.nan}):
        with pytest.raises(UsageError, match="no device can be made"):
            device(**changes)
    with pytest.raises(UsageError, match="fp32"):
        device(speed={"f16": 1.0})
    with pytest.raises(UsageError, match="other names"):
        device(choices={"threads": {1: 1.0}})


def test_listing_devices_imports_no_onnx() -> None:
    code = "import sys; from aivmm.runtime.null import NullBackend; NullBackend().targets(); print('onnx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_sequence_at_the_edge_of_a_model_is_refused() -> None:
    node = helper.make_node("SequenceConstruct", ["x"], ["s"])
    graph = helper.make_graph(
        [node],
        "sequence",
        [helper.make_tensor_value_info("x", 1, (2,))],
        [helper.make_tensor_sequence_value_info("s", 1, (2,))],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with pytest.raises(Unsupported, match="takes tensors only"):
        load(model.SerializeToString())


def test_a_recurrent_layer_counts_each_step() -> None:
    steps, batch, inputs, hidden = 5, 2, 3, 4
    weights = {"w": np.zeros((1, 4 * hidden, inputs), np.float32), "r": np.zeros((1, 4 * hidden, hidden), np.float32)}
    node = helper.make_node("LSTM", ["x", "w", "r"], ["y"], hidden_size=hidden)
    model = onnx_model([node], [("x", 1, (steps, batch, inputs))], [("y", 1, (steps, 1, batch, hidden))], weights)
    assert work_of(model).nodes[0][1] == 2.0 * steps * batch * 4 * hidden * (inputs + hidden)
