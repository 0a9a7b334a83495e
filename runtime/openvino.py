"""OpenVINO: Intel CPUs, GPUs and NPUs, and whatever else its plug-ins reach."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from aivmm.errors import ModelError, Unsupported
from aivmm.runtime.backend import Baseline, Buffer, Placement, Request, foreign_dtype, holds_foreign, is_foreign, raw_view
from aivmm.runtime.config import Config, Knob, Setting
from aivmm.runtime.cpu import cpu_device
from aivmm.runtime.nvidia import same_card
from aivmm.runtime.nvml import nvidia_devices
from aivmm.runtime.onnx_interface import Interface, file_state, read_interface
from aivmm.runtime.openvino_blob import constants_in
from aivmm.runtime.openvino_knobs import cpu_knobs, gpu_knobs, npu_knobs
from aivmm.runtime.remedies import remedy
from aivmm.runtime.target import Device, DeviceKind, Target, Unavailable
from aivmm.tensors import TensorSpec

# OPTIMIZATION_CAPABILITIES -> our name, and our name -> INFERENCE_PRECISION_HINT. A hint that the device does not list is
# accepted all the same and can run 6 times slower, so the list is the gate.
_CAPABILITIES = {"FP32": "fp32", "BF16": "bf16", "FP16": "fp16"}
_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}

_READ_BACK = (
    "PERFORMANCE_HINT", "NUM_STREAMS", "INFERENCE_NUM_THREADS", "INFERENCE_PRECISION_HINT", "EXECUTION_MODE_HINT", "ENABLE_CPU_PINNING",
    "ENABLE_HYPER_THREADING", "SCHEDULING_CORE_TYPE", "TBB_PARTITIONER", "CPU_DENORMALS_OPTIMIZATION", "DYNAMIC_QUANTIZATION_GROUP_SIZE",
    "KV_CACHE_PRECISION", "OPTIMAL_NUMBER_OF_INFER_REQUESTS", "MODEL_PRIORITY", "GPU_QUEUE_PRIORITY", "GPU_QUEUE_THROTTLE", "NPU_TURBO",
    "GPU_HOST_TASK_PRIORITY", "NPU_COMPILATION_MODE_PARAMS",
)  # fmt: skip

# What a config may set. OpenVINO takes more, but a plan comes from a stranger: CACHE_DIR would write, and load, compiled blobs anywhere.
_SETTABLE = frozenset(_READ_BACK) - {"OPTIMAL_NUMBER_OF_INFER_REQUESTS"} | {"PERFORMANCE_HINT_NUM_REQUESTS"}

_FIRST = threading.RLock()  # held by who imports OpenVINO or makes the core: a plan's reader may wake it meanwhile
# A page of what is no compiled model, whatever a plug-in takes for its head.
_NO_MODEL = b"no model" * 512
_ahead: dict[Path, tuple[object, Interface]] = {}  # what was read of models about to be imported, with the state their files were in


def _import_openvino() -> Any:
    with _FIRST:
        return _imported()


@cache
def _imported() -> Any:
    # `import openvino` reports itself through openvino_telemetry where that is installed. A None entry makes that import fail, and
    # OpenVINO then uses its own stub. The entry goes away again: what else the process imports later is not ours to decide.
    unseen = "openvino_telemetry" not in sys.modules
    if unseen:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        import openvino
    finally:
        if unseen:
            del sys.modules["openvino_telemetry"]
    return openvino


def _core() -> Any:
    with _FIRST:
        return _made()


@cache
def _made() -> Any:
    # One per process: plug-ins are not shared between cores.
    return _import_openvino().Core()


@cache
def _wake() -> None:
    """Have the CPU's plug-in loaded, which takes 6 ms, and leave the interpreter to others meanwhile.

    Whatever asks a plug-in for a property keeps the interpreter while it is loaded. What takes a model back does not. It is given none, and
    refuses.
    """
    no_model = _import_openvino().Tensor(np.frombuffer(_NO_MODEL, dtype=np.uint8))  # a copy
    with suppress(RuntimeError):
        _core().import_model(no_model, "CPU", {})


def _plain(value: object) -> Setting:
    """Return a property as JSON takes it; enumerations and types by their short name, since Core and CompiledModel disagree on types."""
    if isinstance(value, bool | int | float | str):
        return value
    text = str(value)
    if text.startswith("<Type: '"):
        return text[len("<Type: '") : -2]
    if text.startswith("<"):
        return text.strip("<>").rpartition(".")[2].split(":")[0]
    return text.rpartition(".")[2] if text.count(".") == 1 and " " not in text else text


def _words(error: BaseException) -> str:
    """Return what OpenVINO says, without the source positions of its own call stack."""
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [line for line in lines if line and not line.startswith("Exception from ")]
    text = " ".join(kept) or str(error)
    return text if len(text) <= 600 else text[:600] + " …"


class OpenVino:
    """OpenVINO as a backend."""

    name: ClassVar[str] = "openvino"

    def targets(self) -> Sequence[Target | Unavailable]:
        """List the devices that OpenVINO's plug-ins find, and for GPU and NPU the reason when they find none."""
        try:
            core = _core()
        except (ImportError, RuntimeError, OSError) as error:
            return (Unavailable(target="openvino", reason=_words(error), advice="pip install openvino"),)
        found: list[Target | Unavailable] = [self._target(name) for name in core.available_devices]
        for kind in ("GPU", "NPU"):
            if not any(isinstance(each, Target) and each.name.split(".")[0] == kind for each in found):
                found.append(self._absent(kind, f"openvino:{kind}"))
        return tuple(found)

    def find(self, name: str) -> Target | Unavailable:
        """Return one target by its device's name without looking at the others."""
        try:
            _core()
        except (ImportError, RuntimeError, OSError) as error:
            return Unavailable(target=f"openvino:{name}", reason=_words(error), advice="pip install openvino")
        if name == "AUTO":
            return self._auto()
        if name == "CPU":  # asking for all devices loads the plug-ins of GPU and NPU
            try:
                return self._target(name)
            except RuntimeError as error:
                return Unavailable(target=f"openvino:{name}", reason=_words(error))
        device = name.removesuffix(".0") if name.startswith("GPU") and name not in _core().available_devices else name
        if device not in _core().available_devices:
            return self._absent(name, f"openvino:{name}")
        return self._target(device)

    def wakes(self, name: str) -> Callable[[], object] | None:
        """Return what loads the CPU's plug-in, where that was not done; see `Wakes`."""
        return None if _wake.cache_info().currsize or name != "CPU" else _wake

    def knobs(self, target: Target) -> Sequence[Knob]:
        """List what can be tuned on `target`: those of its knobs that the device itself says may be written."""
        writable = {name for name, mode in _core().get_property(_device(target), "SUPPORTED_PROPERTIES").items() if mode != "RO"}
        kind = target.device.kind
        knobs = cpu_knobs() if kind == "cpu" else gpu_knobs(_most_streams(target)) if kind == "gpu" else npu_knobs()
        return tuple(knob for knob in knobs if knob.name in writable)

    def baselines(self, targets: Sequence[Target], objective: str) -> Sequence[Baseline]:
        """List each device's default and hints, and AUTO."""
        mine = [target for target in targets if target.runtime == self.name]
        found: list[Baseline] = []
        for target in mine:
            found.append(Baseline(name=f"{target} default", target=target, config=Config()))
            found.append(Baseline(name=f"{target} LATENCY hint", target=target, config=Config.of({"PERFORMANCE_HINT": "LATENCY"})))
            if objective == "throughput":
                hint = Config.of({"PERFORMANCE_HINT": "THROUGHPUT"})
                found.append(Baseline(name=f"{target} THROUGHPUT hint", target=target, config=hint, callers=_many(target)))
        if mine:
            found.append(Baseline(name="openvino:AUTO", target=self._auto(), config=Config()))
        return tuple(found)

    def compile(self, model: Path | bytes, target: Target, config: Config) -> _Executable:
        """Compile `model`; see `Backend.compile`."""
        core, device = _core(), _device(target)
        properties = _properties(target, config)
        try:
            compiled = core.compile_model(core.read_model(model if isinstance(model, bytes) else str(model)), device, properties)
        except (RuntimeError, TypeError, ValueError) as error:
            raise Unsupported(f"OpenVINO on {target.name}: {_words(error)}") from error
        return _checked(_Executable(compiled, read_interface(model)), target)

    def memory_in_use(self, target: Target) -> int:
        """Return the bytes that this process holds on an Intel GPU, as the plug-in counts them; host memory that it maps is left out."""
        try:
            held = _core().get_property(_device(target), "GPU_MEMORY_STATISTICS")
        except (RuntimeError, TypeError) as error:
            raise Unsupported(f"{target} does not tell how much of its memory a process holds ({_words(error)})") from error
        return sum(int(size) for kind, size in held.items() if kind != "usm_host")

    def keeps_blobs(self, target: Target) -> bool:
        """Say whether the device's plug-in exports what it compiled."""
        return target.name != "AUTO" and "EXPORT_IMPORT" in _core().get_property(_device(target), "OPTIMIZATION_CAPABILITIES")

    def compile_to_export(self, model: Path, target: Target, config: Config) -> _Executable:
        """Compile `model`: whatever is compiled can be exported."""
        return self.compile(model, target, config)

    def weights_in(self, blob: bytes) -> tuple[int, int]:
        """Name the constants of what the CPU's plug-in exported."""
        return constants_in(blob)

    def look_ahead(self, model: Path) -> None:
        """Read what `model` declares, and what the processor is, which take half a millisecond each when it is done for the first time."""
        cpu_device()
        with suppress(ModelError, OSError):  # found again by who needs it
            _ahead[model] = file_state(model), read_interface(model)

    def import_blob(self, blob: Buffer, model: Path, target: Target, config: Config) -> _Executable:
        """Take back what `export_blob` gave. The device keeps reading its weights where they are in `blob`."""
        tensor = _import_openvino().Tensor(blob, shared_memory=True)
        try:
            compiled = _core().import_model(tensor, _device(target), _properties(target, config))
        except (RuntimeError, TypeError, ValueError) as error:
            raise Unsupported(f"OpenVINO on {target.name}: {_words(error)}") from error
        state, interface = _ahead.pop(model, (None, None))
        stale = interface is None or state != file_state(model)  # read for a load before, maybe, of another bundle there
        return _checked(_Executable(compiled, read_interface(model) if stale else interface, keep=(blob, tensor)), target)

    def _auto(self) -> Target:
        return Target(runtime=self.name, name="AUTO", device=cpu_device(), runtime_version=_version())

    def _target(self, name: str) -> Target:
        core = _core()
        capabilities = core.get_property(name, "OPTIMIZATION_CAPABILITIES")
        precisions = tuple(ours for theirs, ours in _CAPABILITIES.items() if theirs in capabilities)
        kind = name.split(".")[0]
        # Always indexed, so that a second card of the same kind changes no names.
        shown = "GPU.0" if name == "GPU" else name
        device = cpu_device() if kind == "CPU" else self._accelerator(name, kind)
        return Target(runtime=self.name, name=shown, device=device, runtime_version=_version(), precisions=precisions or ("fp32",))

    def _accelerator(self, name: str, kind: str) -> Device:
        properties = _properties_of(name)

        def read(*names: str) -> Any:
            return next((properties[each] for each in names if properties.get(each) not in (None, "")), None)

        memory = read("GPU_DEVICE_TOTAL_MEM_SIZE", "NPU_DEVICE_TOTAL_MEM_SIZE")
        kinds: dict[str, DeviceKind] = {"GPU": "gpu", "NPU": "npu"}
        integrated = str(read("DEVICE_TYPE")).upper().endswith("INTEGRATED")
        uuid = str(read("DEVICE_UUID") or "")
        # OpenCL gives NVIDIA's cards the id that NVML does, which counts their energy and memory, and knows their driver.
        card = next((each for each in nvidia_devices()[0] if same_card(each.uid, uuid)), None)
        return Device(
            kind=kinds.get(kind, "other"),
            model=str(read("FULL_DEVICE_NAME") or name),
            uid=card.uid if card else uuid,
            driver=str(read("GPU_DRIVER_VERSION", "NPU_DRIVER_VERSION") or (card.driver if card else "")),
            memory_bytes=None if integrated or not isinstance(memory, int) else memory,
            power_limit_w=card.power_limit_w if card else None,
            properties=properties,
        )

    def _absent(self, name: str, target: str) -> Unavailable:
        kind = name.split(".")[0]
        try:
            devices = _core().get_property(kind, "AVAILABLE_DEVICES")
        except RuntimeError as error:
            text = _words(error)
            # The path of the plug-in that could not be loaded says nothing to a user; what is missing behind it does.
            reason = text.rpartition('": ')[2] if text.startswith("Cannot load library") else text
        else:
            reason = f"no such device (found: {', '.join(filter(None, devices)) or 'none'})"
        short, advice = remedy(kind, reason)
        return Unavailable(target=target, reason=short, advice=advice)


def _properties_of(name: str) -> dict[str, Setting]:
    """Return what a device says of itself and cannot be set; single properties raise, and are left out."""
    found: dict[str, Setting] = {}
    for each, mode in _core().get_property(name, "SUPPORTED_PROPERTIES").items():
        if mode == "RO" and each != "SUPPORTED_PROPERTIES":
            try:
                found[each] = _told(_core().get_property(name, each))
            except (RuntimeError, TypeError):
                continue
    return found


def _told(value: object) -> Setting:
    """Return a property as JSON takes it: lists and tables in one line."""
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(str(_plain(each)) for each in value)
    if isinstance(value, dict):
        return ", ".join(f"{_plain(name)}: {_plain(each)}" for name, each in value.items())
    return _plain(value)


def _many(target: Target) -> int:
    """Return how many requests a user who wants throughput keeps in flight: one a core, or a few on an accelerator."""
    return target.device.cores or 4


def _version() -> str:
    # "2026.4.1-22982-e213a147257-releases/2026/4": release and build decide; commit and branch only repeat them.
    return "-".join(str(_import_openvino().__version__).split("-")[:2])


def _properties(target: Target, config: Config) -> dict[str, Any]:
    """Return what OpenVINO is asked for.

    Raises:
        Unsupported: the device has no such setting or precision.
    """
    properties: dict[str, Any] = dict(config.settings)
    if "NUM_STREAMS" in properties:
        properties["NUM_STREAMS"] = str(properties["NUM_STREAMS"])  # the GPU's plug-in takes no number of Python's, the CPU's takes both
    unknown = next((each for each in properties if each not in _SETTABLE), None)
    if unknown is not None:
        raise Unsupported(f"{target} has no setting {unknown!r}", advice="see the target's knobs for what can be set")
    if config.precision is not None:
        if config.precision not in target.precisions:
            known = ", ".join(target.precisions)
            raise Unsupported(f"{target} does not run {config.precision} natively", advice=f"it runs {known}")
        if target.name != "AUTO":
            properties["INFERENCE_PRECISION_HINT"] = _HINTS[config.precision]
    return properties


def _checked(executable: _Executable, target: Target) -> _Executable:
    """Return `executable` unless it runs elsewhere than asked."""
    device = _device(target)
    if target.name != "AUTO" and not all(each.split(".")[0] == device.split(".")[0] for each in executable.devices):
        raise Unsupported(f"OpenVINO put the model on {', '.join(executable.devices)} and not on {target.name}")
    return executable


def _device(target: Target) -> str:
    return "GPU" if target.name == "GPU.0" and "GPU" in _core().available_devices else target.name


def _most_streams(target: Target) -> int:
    """Return how many streams the device takes: it refuses more (an NVIDIA card's plug-in takes 2)."""
    try:
        return int(_core().get_property(_device(target), "RANGE_FOR_STREAMS")[1])
    except (RuntimeError, TypeError, IndexError):
        return 1


class _Executable:
    """A compiled model, with its ports under the names that the ONNX file declares."""

    # Binding an array takes 3 to 8 µs, and several times that when the model has left the caches cold: as long as a copy of this size.
    copy_limit_bytes = 256 << 10

    def __init__(self, compiled: Any, interface: Any, *, keep: Any = None) -> None:
        self._compiled = compiled
        self._keep = keep  # the memory that the device reads its weights from
        self.devices = tuple(str(each).strip("()") for each in compiled.get_property("EXECUTION_DEVICES"))
        self.input_ports = _match_ports(compiled.inputs, interface.inputs)
        self.output_ports = _match_ports(compiled.outputs, interface.outputs)
        missing = [each.name for each in interface.outputs if each.name not in self.output_ports]
        if missing:
            raise Unsupported(f"OpenVINO lost the output {missing[0]!r} in conversion")
        self.inputs: Sequence[TensorSpec] = tuple(each for each in interface.inputs if each.name in self.input_ports)
        self.outputs: Sequence[TensorSpec] = tuple(
            _refine(each, compiled.outputs[self.output_ports[each.name]]) for each in interface.outputs
        )

    @cached_property
    def effective_config(self) -> Mapping[str, Setting]:
        """What the settings came to. Lazy, as `placement` is: who only runs a plan never asks."""
        effective: dict[str, Setting] = {}
        supported = {str(each) for each in self._compiled.get_property("SUPPORTED_PROPERTIES")}
        for name in _READ_BACK:
            if name in supported:
                effective[name] = _plain(self._compiled.get_property(name))
        return effective

    @cached_property
    def placement(self) -> Placement:
        """The device, and the number of nodes after fusion. Lazy: the runtime model takes milliseconds to build."""
        nodes: dict[str, int] = {}
        try:
            for each in self._compiled.get_runtime_model().get_ops():
                kind = each.get_type_name()
                if kind not in ("Parameter", "Constant", "Result"):
                    nodes[self.devices[0]] = nodes.get(self.devices[0], 0) + 1
        except RuntimeError:
            pass  # AUTO and some plug-ins keep no runtime model; the devices alone are then the proof
        return Placement(devices=self.devices, nodes=nodes)

    def new_request(self) -> Request:
        """Make another request."""
        return _Request(self._compiled.create_infer_request(), self)

    def close(self) -> None:
        """Drop the compiled model."""
        self._compiled = self._keep = None

    def export_blob(self) -> bytes:
        """Return the compiled form."""
        try:
            blob: bytes = self._compiled.export_model().getvalue()
        except RuntimeError as error:
            raise Unsupported(f"OpenVINO cannot export: {_words(error)}") from error
        return blob


def _match_ports(ports: Sequence[Any], specs: Sequence[TensorSpec]) -> dict[str, int]:
    """Map declared names to port numbers. Ports whose names got lost are paired in order when type and rank leave no doubt."""
    found = {name: index for index, port in enumerate(ports) for name in port.get_names()}
    matched = {spec.name: found[spec.name] for spec in specs if spec.name in found}
    lost = [index for index in range(len(ports)) if index not in matched.values()]
    unmatched = [spec for spec in specs if spec.name not in matched]
    if lost and len(lost) == len(unmatched):
        for index, spec in zip(lost, unmatched, strict=True):
            if ports[index].get_partial_shape().rank.get_length() != len(spec.shape):
                raise Unsupported(f"OpenVINO renamed {spec.name!r} and it cannot be told which port it is")
            matched[spec.name] = index
    elif lost:
        raise Unsupported(f"OpenVINO renamed inputs or outputs ({', '.join(sorted(ports[lost[0]].get_names()))})")
    return matched


def _refine(spec: TensorSpec, port: Any) -> TensorSpec:
    """Fill extents that the file leaves open with those OpenVINO inferred."""
    if spec.static and spec.shape:
        return spec
    shape = port.get_partial_shape()
    if shape.rank.is_dynamic or (spec.shape and shape.rank.get_length() != len(spec.shape)):
        return spec
    return TensorSpec(name=spec.name, dtype=spec.dtype, shape=tuple(dim.get_length() if dim.is_static else None for dim in shape))


def _refused(error: BaseException) -> Unsupported:
    return Unsupported(f"OpenVINO while running: {_words(error)}")


class _Request:
    """An infer request with shared tensors."""

    def __init__(self, request: Any, executable: _Executable) -> None:
        openvino = _import_openvino()
        self._request = request
        # The library's own method in C++: that of its class in Python looks at inputs, of which there are none, and wraps the answer.
        plain: Any = super(openvino.InferRequest, request) if isinstance(request, openvino.InferRequest) else request
        self._infer = plain.infer
        self._tensor = openvino.Tensor
        self._inputs = executable.input_ports
        self._outputs = executable.output_ports
        self._types = {each.name: each.dtype for each in (*executable.inputs, *executable.outputs)}
        self._bound: dict[str, Buffer] = {}

    def bind(self, name: str, buffer: Buffer) -> None:
        """Share `buffer` with the request."""
        tensor = self._shared(name, buffer)
        try:
            if name in self._inputs:
                self._request.set_input_tensor(self._inputs[name], tensor)
            else:
                self._request.set_output_tensor(self._outputs[name], tensor)
        except RuntimeError as error:
            raise Unsupported(f"OpenVINO takes no such array for {name!r}: {_words(error)}") from error
        self._bound[name] = buffer

    def forget_inputs(self) -> None:
        """Let go of the inputs' arrays; see `ForgetsInputs`. The request keeps their addresses, and does not look there."""
        for name in self._inputs:
            self._bound.pop(name, None)

    def _shared(self, name: str, buffer: Buffer) -> Any:
        """Return a tensor over the array's own memory; strings have to be copied."""
        if not isinstance(buffer, np.ndarray):
            raise Unsupported(f"OpenVINO takes only tensors, and {name!r} is a {type(buffer).__name__}")
        if buffer.dtype.kind in "OSU":
            return self._tensor(buffer)
        if not (buffer.flags.c_contiguous and buffer.flags.writeable):
            raise Unsupported(f"the array for {name!r} is not C-contiguous or read-only, so it cannot be shared")
        if holds_foreign(buffer):
            ports, index = (self._request.model_outputs, self._outputs)
            if name in self._inputs:
                ports, index = (self._request.model_inputs, self._inputs)
            return self._tensor(raw_view(buffer, name), _import_openvino().Shape(buffer.shape), ports[index[name]].element_type)
        # C's `long long` is the same as `long` to NumPy's eyes, and unknown to OpenVINO's.
        return self._tensor(buffer.view(np.dtype(buffer.dtype.name)), shared_memory=True)

    def run(self) -> None:
        """Run. The synchronous call: waking a parked thread for the asynchronous one costs 100 µs on an idle machine."""
        try:
            self._infer({}, share_outputs=True, decode_strings=False)
        except RuntimeError as error:
            raise _refused(error) from error

    def direct(self) -> tuple[Callable[[], object], Callable[[BaseException], Exception | None]] | None:
        """Return the library's call, and what makes an error of ours of one of its."""
        return partial(self._infer, {}, True, False), lambda error: _refused(error) if isinstance(error, RuntimeError) else None

    def output(self, name: str) -> Buffer:
        """Return the output's array."""
        bound = self._bound.get(name)
        if bound is not None:
            return bound
        tensor = self._request.get_output_tensor(self._outputs[name])
        data: Buffer = tensor.str_data if str(tensor.element_type) == "<Type: 'string'>" else tensor.data
        dtype = self._types[name]
        # OpenVINO shows a bfloat16 as a float16 of the same bits, and a float8 as a byte.
        return data.view(foreign_dtype(dtype, name)) if is_foreign(dtype) else data
