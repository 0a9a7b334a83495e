"""ONNX Runtime: its own CPU kernels, NVIDIA's CUDA and TensorRT, and whatever else a build of it offers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar

import numpy as np

from aivmm.errors import Unsupported
from aivmm.runtime.backend import Baseline, Buffer, CopyRoute, DeviceTensor, Placement, Request, Strays, routes_of
from aivmm.runtime.config import Config, Knob, Setting
from aivmm.runtime.cpu import cpu_device
from aivmm.runtime.cuda import Stream, ThreadsCard, pinned_empty
from aivmm.runtime.cuda_copies import CardCopier, index_of
from aivmm.runtime.folders import PrivateFolder
from aivmm.runtime.inputs import is_numpy
from aivmm.runtime.nvidia import cuda_devices, cuda_major, driver_advice, libraries_loaded, missing_library
from aivmm.runtime.ort_library import TRIAL, library, wake, was_woken
from aivmm.runtime.ort_options import (
    EXECUTION_MODES,
    GRAPHS,
    HOST_MEMORIES,
    HOST_MEMORY,
    MOST_THREADS,
    NVIDIA,
    OPTIMIZATION_LEVELS,
    PROVIDER_PREFIX,
    PROVIDERS,
    SESSION_ENTRIES,
    SESSION_SETTINGS,
    cpu_knobs,
    cuda_knobs,
    provider_knobs,
    require_entry,
    tensorrt_knobs,
)
from aivmm.runtime.ort_requests import BoundRequest, FeedRequest, RebindingRequest, StagedRequest, device_tensor, shared_tensor, words
from aivmm.runtime.ort_strays import read_strays
from aivmm.runtime.target import Device, Target, Unavailable
from aivmm.runtime.tensorrt_cache import tensorrt_caches
from aivmm.tensors import TensorSpec

_TYPES = {
    "float": "float32", "double": "float64", "float16": "float16", "bfloat16": "bfloat16", "string": "string", "bool": "bool",
    "int8": "int8", "int16": "int16", "int32": "int32", "int64": "int64", "uint8": "uint8", "uint16": "uint16", "uint32": "uint32",
    "uint64": "uint64", "complex64": "complex64", "complex128": "complex128", "float8e4m3fn": "float8_e4m3fn",
    "float8e4m3fnuz": "float8_e4m3fnuz", "float8e5m2": "float8_e5m2", "float8e5m2fnuz": "float8_e5m2fnuz",
    "float8e8m0": "float8_e8m0fnu", "float4e2m1": "float4_e2m1fn", "int4": "int4", "uint4": "uint4", "int2": "int2", "uint2": "uint2",
}  # fmt: skip
_ADDRESSES = frozenset(PROVIDER_PREFIX + name for name in ("user_compute_stream", "has_user_compute_stream"))  # of this process alone
_PROFILED_CALLS = 10
_MOST_DEVICES = 16  # of one provider: where to stop asking for another one


class OnnxRuntime:
    """ONNX Runtime as a backend."""

    name: ClassVar[str] = "onnxruntime"

    def targets(self) -> Sequence[Target | Unavailable]:
        """List the providers of this build on which a trial model ran, and the reason for each that did not."""
        try:
            offered = library().get_available_providers()
        except (ImportError, OSError) as error:
            return (Unavailable(target="onnxruntime", reason=words(error), advice="pip install onnxruntime"),)
        offers = [kind for kind, provider in PROVIDERS.items() if provider.name in offered]
        return tuple(each for kind in offers for each in self._targets_of(kind))

    def _targets_of(self, kind: str) -> Iterator[Target | Unavailable]:
        provider = PROVIDERS[kind]
        if kind in NVIDIA:
            devices, reason = cuda_devices()
            if not devices:
                yield Unavailable(target=f"onnxruntime:{kind}", reason=reason, advice=driver_advice(reason, provider.advice))
            for index, device in enumerate(devices):
                yield self._try(kind, f"{kind}:{index}", device, index)
        elif kind == "CPU":
            yield self._try(kind, kind, cpu_device(), None)
        elif provider.indexed:
            yield from self._until_refused(kind)
        else:
            yield self._try(kind, kind, Device(kind=provider.kind, model=provider.device or provider.name), None)

    def _until_refused(self, kind: str) -> Iterator[Target | Unavailable]:
        """Yield the devices of a provider that nothing else lists: numbers are tried until one is refused."""
        provider = PROVIDERS[kind]
        for index in range(_MOST_DEVICES):
            device = Device(kind=provider.kind, model=provider.device or provider.name, uid=str(index) if index else "")
            found = self._try(kind, f"{kind}:{index}", device, index)
            if isinstance(found, Target) or index == 0:
                yield found
            if not isinstance(found, Target):
                return

    def find(self, name: str) -> Target | Unavailable:
        """Return one target by its device's name. Each build runs on the CPU, so that needs no trial; those of others can take seconds."""
        try:
            library()
        except (ImportError, OSError) as error:
            return Unavailable(target=f"onnxruntime:{name}", reason=words(error), advice="pip install onnxruntime")
        if name == "CPU":
            return self._found(name, "CPU", cpu_device())
        kind = name.split(":")[0]
        known = kind in PROVIDERS and PROVIDERS[kind].name in library().get_available_providers()
        for each in self._targets_of(kind) if known else ():
            if (str(each) if isinstance(each, Target) else each.target) in (f"onnxruntime:{name}", f"onnxruntime:{kind}"):
                return each
        return Unavailable(target=f"onnxruntime:{name}", reason="this build of ONNX Runtime does not offer it")

    def wakes(self, name: str) -> Callable[[], object] | None:
        """Return what makes a first session, where there was none; see `Wakes`. The CPU's kernels are registered then, which takes 2 ms."""
        return None if was_woken() or name != "CPU" else wake

    def packs_weights(self, name: str) -> bool:
        """Say that the CPU's kernels do; see `PacksWeights`. What goes to a card is not packed here."""
        return name == "CPU"

    def knobs(self, target: Target) -> Sequence[Knob]:
        """List what can be tuned on `target`."""
        kind = _kind(target)
        own = {"CPU": cpu_knobs, "CUDA": cuda_knobs, "TensorRT": tensorrt_knobs}.get(kind)
        return own() if own else provider_knobs(kind)

    def baselines(self, targets: Sequence[Target], objective: str) -> Sequence[Baseline]:
        """List the default session of each target; for throughput also with several callers on it, as a server runs it."""
        found: list[Baseline] = []
        for target in (each for each in targets if each.runtime == self.name):
            found.append(Baseline(name=f"{target} default", target=target, config=Config()))
            callers = target.device.cores or 2
            if objective == "throughput" and callers > 1:
                found.append(Baseline(name=f"{target} default, {callers} callers", target=target, config=Config(), callers=callers))
        return tuple(found)

    def compile(self, model: Path | bytes, target: Target, config: Config) -> _Executable:
        """Compile `model`; see `Backend.compile`. Nodes left on the CPU beside an accelerator are in its placement."""
        return self._session(model if isinstance(model, bytes) else str(model), target, config, {})

    def strays(self, model: Path, target: Target, config: Config, inputs: Mapping[str, Buffer]) -> Strays:
        """Profile some calls; see `ExplainsStrays.strays`."""
        from tempfile import TemporaryDirectory  # here: who runs a plan needs none

        with TemporaryDirectory(prefix="aivmm-") as folder:
            besides = {"enable_profiling": True, "profile_file_prefix": str(Path(folder) / "calls")}
            executable = self._session(str(model), target, config, besides)
            try:
                request = executable.new_request()
                for name, array in inputs.items():
                    request.bind(name, array)
                for _ in range(_PROFILED_CALLS):
                    request.run()
                return read_strays(executable.end_profiling(), PROVIDERS[_kind(target)].name, warmup=_PROFILED_CALLS // 2)
            finally:
                executable.close()

    def routes(self, targets: Sequence[Target]) -> Sequence[CopyRoute]:
        """List the ways between the host and NVIDIA's cards, and between cards; each card once, whichever provider names it."""
        cards = {index_of(each): each for each in reversed(targets) if _kind(each) in NVIDIA}
        return routes_of([cards[index] for index in sorted(cards)])

    def copier(self, route: CopyRoute, size_bytes: int) -> CardCopier:
        """Make what copies along a route."""
        _load_libraries("CUDA")
        return CardCopier(route, size_bytes)

    def keeps_blobs(self, target: Target) -> bool:
        """Say whether an optimized graph can be written: the CPU's can; what a GPU's is worth was never measured."""
        return _kind(target) == "CPU"

    def compile_to_export(self, model: Path, target: Target, config: Config) -> _Executable:
        """Compile `model`, and let the session write its optimized graph meanwhile: it cannot be asked for it afterwards."""
        try:
            folder = PrivateFolder()
        except OSError as error:
            raise Unsupported(f"there is no folder for the optimized graph ({error.strerror or error})") from error
        try:
            written = Path(folder.name) / "optimized.onnx"
            executable = self._session(str(model), target, config, {"optimized_model_filepath": str(written)})
        except BaseException:  # not handled, only cleaned up
            folder.cleanup()
            raise
        executable.written = (written, folder)
        return executable

    def weights_in(self, blob: bytes) -> tuple[int, int]:
        """Name none: large ones lie in the bundle."""
        return 0, 0

    def look_ahead(self, model: Path) -> None:
        """Do nothing: a session says itself what it takes."""

    def import_blob(self, blob: Buffer, model: Path, target: Target, config: Config) -> _Executable:
        """Make a session of an optimized graph, which is not to be optimized again. Weights beside `model` stayed there."""
        level = library().GraphOptimizationLevel.ORT_DISABLE_ALL
        return self._session(blob.tobytes(), target, config, {"graph_optimization_level": level}, weights=model.parent)

    def _session(
        self, source: bytes | str, target: Target, config: Config, besides: Mapping[str, Any], *, weights: Path | None = None
    ) -> _Executable:
        if config.precision is not None and config.precision not in target.precisions:
            raise Unsupported(f"{target} does not run {config.precision} natively", advice=f"it runs {', '.join(target.precisions)}")
        kind = _kind(target)
        options, provider_options = self._options(target, config)
        for name, value in besides.items():
            setattr(options, name, value)
        if weights is not None:  # without a path of its own, a model's weights are looked for in the current folder
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
        provider = PROVIDERS[kind].name
        if kind == "TensorRT":
            provider_options |= tensorrt_caches(source if isinstance(source, bytes) else Path(source), config)
        _load_libraries(kind)
        stream = Stream(index_of(target)) if kind == "CUDA" and _graphed(config) else None
        if stream is not None:  # a session that records serves one request, whose copies can go the way of its kernels
            provider_options["user_compute_stream"] = str(stream.handle)
        try:
            chosen = (provider, provider_options) if provider_options else provider
            session = library().InferenceSession(source, options, providers=[chosen], enable_fallback=0)
        except Exception as error:
            raise Unsupported(f"ONNX Runtime on {target.name}: {words(error)}") from error
        if provider not in session.get_providers():
            raise Unsupported(f"ONNX Runtime could not start {provider} and fell back to {session.get_providers()[0]}")
        if kind not in NVIDIA:
            return _Executable(session, target, config)
        card = _CardExecutable(session, target, config, stream)
        if card.graphed:  # an address is recorded once, so that each request has to have a session of its own
            card.again = lambda: self._session(source, target, config, besides, weights=weights)
        return card

    def _options(self, target: Target, config: Config) -> tuple[Any, dict[str, str]]:
        ort = library()
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        for name, value in PROVIDERS[_kind(target)].session.items():
            _set(options, name, value)
        provider_options: dict[str, str] = {"device_id": target.name.split(":")[1]} if ":" in target.name else {}
        known = PROVIDERS[_kind(target)].options
        for name, value in config.settings:
            option = name.removeprefix(PROVIDER_PREFIX)
            if name.startswith(PROVIDER_PREFIX) and option in known:
                provider_options[option] = str(value)
            elif name == HOST_MEMORY and _kind(target) in NVIDIA:
                if value not in HOST_MEMORIES:
                    raise Unsupported(f"{name}={value!r} is no kind of memory", advice=f"choose from {', '.join(HOST_MEMORIES)}")
            elif name in SESSION_ENTRIES:
                require_entry(name, value)
                options.add_session_config_entry(name, str(value))
            elif name in SESSION_SETTINGS:
                _set(options, name, value)
            else:
                raise Unsupported(f"{target} has no setting {name!r}", advice="see the target's knobs for what can be set")
        return options, provider_options

    def _try(self, kind: str, name: str, device: Device, index: int | None) -> Target | Unavailable:
        """Compile and run the trial model with falling back forbidden: lists of provider names lie."""
        ort, provider = library(), PROVIDERS[kind]
        _load_libraries(kind)
        options = ort.SessionOptions()
        options.log_severity_level = 4
        if kind != "CPU":
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        for setting, value in provider.session.items():
            _set(options, setting, value)
        chosen: Any = provider.name if index is None else (provider.name, {"device_id": str(index)})
        try:
            session = ort.InferenceSession(TRIAL, options, providers=[chosen], enable_fallback=0)
            session.run(None, {"x": np.zeros(4, dtype=np.float32)})
        except Exception as error:  # noqa: BLE001 - see compile
            return Unavailable(target=f"onnxruntime:{name}", reason=_why_not(kind) or words(error), advice=provider.advice)
        return self._found(name, kind, device)

    def _found(self, name: str, kind: str, device: Device) -> Target:
        version = str(library().__version__)
        return Target(runtime=self.name, name=name, device=device, runtime_version=version, precisions=PROVIDERS[kind].precisions)


def _load_libraries(kind: str) -> None:
    """Have the libraries that a provider links against in the process before the provider itself is loaded."""
    if kind in NVIDIA:
        libraries_loaded(tensorrt=kind != "CUDA")


def _why_not(kind: str) -> str:
    """Say which library is missing, where that is why a provider of NVIDIA's did not start: its own words speak of the CPU."""
    if kind not in NVIDIA:
        return ""
    stem = PROVIDERS[kind].name.removesuffix("ExecutionProvider").lower()
    names = (f"libonnxruntime_providers_{stem}.so", f"onnxruntime_providers_{stem}.dll")
    folder = Path(library().__file__).parent / "capi"
    missing = next((missing_library(folder / name) for name in names if (folder / name).exists()), "")
    if not missing:
        return ""
    what = "TensorRT 10" if "nvinfer" in missing or "nvonnx" in missing else f"CUDA {cuda_major()}"
    return f"{what} libraries not found ({missing} is missing)"


def _graphed(config: Config) -> bool:
    return any(str(config.get(PROVIDER_PREFIX + name)) == "1" for name in GRAPHS)


def _kind(target: Target) -> str:
    return target.name.split(":")[0]


def _set(options: Any, name: str, value: Setting) -> None:
    ort = library()
    enumerations = {
        "graph_optimization_level": (ort.GraphOptimizationLevel, OPTIMIZATION_LEVELS),
        "execution_mode": (ort.ExecutionMode, EXECUTION_MODES),
    }
    if name in enumerations:
        enumeration, names = enumerations[name]
        if value not in names:
            raise Unsupported(f"{name}={value!r} is not a setting of ONNX Runtime", advice=f"choose from {', '.join(names)}")
        value = getattr(enumeration, names[str(value)])
    elif name.endswith("_num_threads") and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST_THREADS):
        # Any number is taken, and as many threads are started: a plan that asks for a million would take the machine down.
        raise Unsupported(f"{name}={value!r} is not a setting of ONNX Runtime", advice=f"give 0 (its default) to {MOST_THREADS}")
    try:
        setattr(options, name, value)
    except TypeError as error:
        raise Unsupported(f"{name}={value!r} is not a setting of ONNX Runtime ({words(error)})") from error


class _Executable:
    """A session."""

    # Binding an array takes 2 µs, and 25 when the model has left the caches cold: as long as a copy of 100 KiB, or of 400.
    copy_limit_bytes = 128 << 10

    def __init__(self, session: Any, target: Target, config: Config) -> None:
        self._session = session
        self._target = target
        self._asked = config
        self._turn: AbstractContextManager[Any] = Lock() if PROVIDERS[_kind(target)].one_call else nullcontext()
        self.written: tuple[Path, PrivateFolder] | None = None  # the optimized graph, until it is asked for
        self.inputs: Sequence[TensorSpec] = tuple(_spec(each) for each in session.get_inputs())
        self.outputs: Sequence[TensorSpec] = tuple(_spec(each) for each in session.get_outputs())

    @cached_property
    def effective_config(self) -> Mapping[str, Setting]:
        """What the session says of itself; entries that it cannot be asked for are left out."""
        options = self._session.get_session_options()
        effective: dict[str, Setting] = {}
        for name in sorted(SESSION_SETTINGS):
            value = getattr(options, name)
            effective[name] = value if isinstance(value, bool | int) and not hasattr(value, "name") else _short(value)
        for name in sorted(SESSION_ENTRIES):
            try:
                effective[name] = str(options.get_session_config_entry(name))
            except RuntimeError:
                continue  # never set: the library's own default holds
        provider = PROVIDERS[_kind(self._target)].name
        for name, value in self._session.get_provider_options().get(provider, {}).items():
            effective[PROVIDER_PREFIX + name] = value
        return effective

    @cached_property
    def placement(self) -> Placement:
        """Which provider the session assigned which nodes to, after fusion."""
        wanted = PROVIDERS[_kind(self._target)].name
        nodes: dict[str, int] = {}
        stray: list[str] = []
        for subgraph in self._session.get_provider_graph_assignment_info():
            names = [each.name for each in subgraph.get_nodes()]
            nodes[subgraph.ep_name] = nodes.get(subgraph.ep_name, 0) + len(names)
            if subgraph.ep_name != wanted:
                stray.extend(names)
        return Placement(devices=tuple(nodes) or (wanted,), nodes=nodes, stray=tuple(stray))

    def new_request(self) -> Request:
        """Make another request. One session serves several at once."""
        if any(spec.dtype in ("string", "unknown") for spec in (*self.inputs, *self.outputs)):
            return FeedRequest(self._session, self.inputs, self.outputs)
        if _kind(self._target) == "CPU":
            return BoundRequest(self._session, self.inputs, self.outputs)
        return RebindingRequest(self._session, self.inputs, self.outputs, around=self._turn)

    def close(self) -> None:
        """Drop the session."""
        self._session = None
        self._drop_written()

    def end_profiling(self) -> Path:
        """Return the file of the profile that the session was asked for."""
        return Path(self._session.end_profiling())

    def export_blob(self) -> bytes:
        """Return the optimized graph, once.

        Raises:
            Unsupported: it was not compiled to be exported, or was exported before.
        """
        if self.written is None:
            raise Unsupported("ONNX Runtime writes its optimized graph only while it compiles")
        try:
            return self.written[0].read_bytes()
        except OSError as error:
            raise Unsupported(f"ONNX Runtime wrote no optimized graph ({error.strerror or error})") from error
        finally:
            self._drop_written()

    def _drop_written(self) -> None:
        if self.written is not None:
            self.written[1].cleanup()
            self.written = None


class _CardExecutable(_Executable):
    """A session on a card, whose inputs and outputs can be page-locked on the host or stay on the card."""

    copy_limit_bytes = 32 << 10  # what is bound is not read by the session, but copied to the card

    def __init__(self, session: Any, target: Target, config: Config, stream: Stream | None) -> None:
        super().__init__(session, target, config)
        self._device = index_of(target)
        self.memory = f"cuda:{self._device}"
        self.graphed = _graphed(config)
        self._stream = stream  # the one that the session computes on, where it is ours
        self._pinned = self.graphed or config.get(HOST_MEMORY) == "pinned"
        self.again: Callable[[], _Executable] | None = None  # makes the session anew
        self._more: list[_CardExecutable] = []
        self._taken = False  # by a request

    def new_request(self) -> Request:
        """Make another request. One whose run is recorded as a CUDA graph has a session of its own."""
        specs = (*self.inputs, *self.outputs)
        if self.graphed and not all(spec.static for spec in specs):
            raise Unsupported("a CUDA graph needs fixed shapes", advice="bind them with --dim or --shape")
        if any(spec.dtype in ("string", "unknown") for spec in specs):
            return super().new_request()
        if not self._pinned or not all(spec.static for spec in specs):  # the provider's own copies: ours took a tenth longer on an H100
            return RebindingRequest(self._session, self.inputs, self.outputs, around=ThreadsCard())
        owner = self
        if self.graphed and self._taken:
            assert self.again is not None
            made = self.again()
            assert isinstance(made, _CardExecutable)
            owner = made
            self._more.append(owner)
        self._taken = True
        return StagedRequest(
            owner._session,
            self.inputs,
            self.outputs,
            stream=owner._stream or Stream(self._device),
            place=self.device_tensor,
            pinned=not self.graphed,  # one caller at a time waits for the driver's own pieces no longer than for ours
            recorded=self.graphed,
            ordered=owner._stream is not None,
            around=ThreadsCard(),
        )

    def host_buffer(self, spec: TensorSpec) -> Buffer | None:
        """Return page-locked memory where the config asks for it."""
        return pinned_empty(spec) if self._pinned and spec.dtype not in ("string", "unknown") and is_numpy(spec.dtype) else None

    def device_tensor(self, spec: TensorSpec) -> DeviceTensor:
        """Return a tensor in the card's memory."""
        return device_tensor(spec, self._device)

    def from_dlpack(self, array: Any, spec: TensorSpec) -> DeviceTensor:
        """Return a caller's tensor on the card."""
        return shared_tensor(array, spec, self._device)

    @cached_property
    def effective_config(self) -> Mapping[str, Setting]:
        """What the session says of itself, and our own setting."""
        said = {name: value for name, value in super().effective_config.items() if name not in _ADDRESSES}
        return {**said, HOST_MEMORY: "pinned" if self._pinned else "pageable"}

    def close(self) -> None:
        """Drop the sessions."""
        for each in self._more:
            each.close()
        self._more.clear()
        super().close()
        self._stream = None  # after the session that computes on it


def _short(value: Any) -> str:
    for names in (OPTIMIZATION_LEVELS, EXECUTION_MODES):
        for ours, theirs in names.items():
            if theirs == getattr(value, "name", ""):
                return ours
    return str(value)


def _spec(argument: Any) -> TensorSpec:
    inner = argument.type.partition("(")[2].rstrip(")")
    dtype = _TYPES.get(inner, "unknown") if argument.type.startswith("tensor(") else "unknown"
    shape = tuple(extent if isinstance(extent, int) and extent >= 0 else None for extent in argument.shape)
    return TensorSpec(name=argument.name, dtype=dtype, shape=shape)
