"""What a machine with NVIDIA cards makes of six models: plans against every default, two cards, what the engine adds. For issue 8.

    python -m benchmarks.gpu --state DIR [--only tune,throughput,overhead,boundaries,two] [--budget 12s] [--models NAMES] [--goals ...]
    python -m benchmarks.gpu --state DIR --render benchmarks/results/h200.md --keep benchmarks/results/h200.md

Each section writes what it found into DIR as it goes, so that a run that is cut short loses the rest only; `--render` makes the page of
whatever is there, above what the page of `--keep` says, word for word. A page that is there is replaced only where it is kept.

What is compared takes turns in one process or in one race, in random order; medians of rounds are shown.

- tune: `aivmm tune` for each model, latency and throughput, at fp32 and with bf16 and fp16 allowed. Ratios are the proof's own: the written
  bundle in a process of its own, raced with the defaults of every target.
- throughput: the throughput plan of ResNet-50 against a default CUDA session called by `session.run` with arrays, one caller; and with its
  input already on the card.
- overhead: `engine.run` against bare ONNX Runtime with I/O binding and the same options on the same input, one caller.
- boundaries: copies between host and card, and between cards, by size.
- two: one card against two (copies that share the requests, and a pipeline), precision and options the same, fed from the host.
- opencl, tune_one, tune_two, two_tuned, beside, pixels, requests (when named): see `benchmarks.gpu_tuned`.
- energy, tune_energy, energy_tuned (when named): see `benchmarks.gpu_energy`. `benchmarks.card_session` runs everything in turn.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from aivmm.probes.timer import several

SECTIONS = ("boundaries", "overhead", "throughput", "two", "tune")
MODELS = ("resnet50", "minilm", "vit", "ultraface", "silero", "magika")
GOALS = ("latency fp32", "latency lower", "throughput fp32", "throughput lower")
_INT32 = 6  # of onnx.TensorProto
_SHARED = {"ultraface": "ultraface_rfb_320.onnx", "silero": "silero_vad_16k_op15.onnx", "magika": "magika_v3_3.onnx"}
_ROUNDS, _BLOCK_S = 6, 0.5
FAST = {"host_memory": "pinned", "provider.prefer_nhwc": "1", "provider.fuse_conv_bias": "1"}
PLAIN = {"host_memory": "pinned"}
_TUNED = ("tune", "opencl", "tune_one", "tune_two", "two_tuned", "tune_energy")  # they keep what they find themselves
Step = Callable[[], object]


def model_file(name: str, folder: Path, shared: Path) -> Path:
    """Return the file of a model, made where it is one of ours."""
    from aivmm.models.demo import write_demo
    from aivmm.models.demo_built import build_encoder, build_vision_transformer

    if name in _SHARED:
        return shared / _SHARED[name]
    path = folder / f"{name}.onnx"
    if path.exists():
        return path
    if name == "resnet50":
        return write_demo(name, folder)
    made = {
        "minilm": lambda: build_encoder(name, layers=6, width=384, heads=12, vocabulary=30522),
        "bert": lambda: build_encoder(name, layers=12, width=768, heads=12, vocabulary=30522),
        "vit": lambda: build_vision_transformer(name),
    }[name]()
    path.write_bytes(made.SerializeToString())
    return path


def fixed(path: Path, batch: int, *, sequence: int = 128, half: bool = False) -> Any:
    """Return a model with its shapes fixed, converted to fp16 where asked for; its inputs and outputs stay float32."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = onnx.load(str(path))
    weights = {each.name for each in model.graph.initializer}
    for value in [each for each in model.graph.input if each.name in weights]:
        model.graph.input.remove(value)
    for value in (*model.graph.input, *model.graph.output):
        dims = value.type.tensor_type.shape.dim
        dims[0].dim_value = batch
        for dim in dims[1:]:
            if dim.dim_param:
                dim.dim_value = sequence
    del model.graph.value_info[:]
    if half:
        model = convert_float_to_float16(model, keep_io_types=True, disable_shape_infer=True)
    return onnx.shape_inference.infer_shapes(model)  # to be cut, a model has to know its tensors


def feed_of(model: Any, seed: int = 0) -> dict[str, Any]:
    """Return inputs for a model with fixed shapes."""
    rng, feed = np.random.default_rng(seed), {}
    for value in model.graph.input:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        if value.name == "attention_mask":
            feed[value.name] = np.ones(shape, np.int64)
        elif value.name == "input_ids":
            feed[value.name] = rng.integers(0, 30000, shape)
        elif value.type.tensor_type.elem_type == _INT32:  # bytes, as magika's
            feed[value.name] = rng.integers(0, 256, shape, np.int32)
        else:
            feed[value.name] = rng.standard_normal(shape, dtype=np.float32)
    return feed


def race(steps: Mapping[str, tuple[int, Sequence[Step]]], *, rounds: int = _ROUNDS, seconds: float = _BLOCK_S) -> dict[str, list[float]]:
    """Return samples per second of each contestant (batch, and a step for each caller), a number for each round, taking turns."""
    order, found = random.Random(0), {name: [] for name in steps}
    for number in range(-1, rounds):
        for name in order.sample(list(steps), len(steps)):
            batch, calls = steps[name]
            rate = batch / statistics.fmean(several(calls, seconds if number >= 0 else 0.2, 2))
            if number >= 0:
                found[name].append(rate)
    return found


def session(model: Any, options: Mapping[str, str], device: int = 0) -> Any:
    """Return a session on a card."""
    import onnxruntime

    chosen = onnxruntime.SessionOptions()
    chosen.log_severity_level = 4
    provider = ("CUDAExecutionProvider", {"device_id": str(device), **options})
    return onnxruntime.InferenceSession(model.SerializeToString(), chosen, providers=[provider], enable_fallback=0)


def engine(folder: Path, name: str, model: Any, parts: Sequence[Any], **fields: Any) -> Any:
    """Return the engine of a bundle."""
    from aivmm.runtime.engine import Engine
    from tests.making import make_bundle

    place = folder / f"{name}-{time.monotonic_ns()}.aivmm"
    return Engine.load(make_bundle(place, model, parts, **fields), cache=False)


def calls_of(running: Any, model: Any, callers: int) -> list[Step]:
    """Return a step for each caller, each with arrays of its own."""
    return [partial(running.run, feed_of(model, seed)) for seed in range(callers)]


def _provider(settings: Mapping[str, str]) -> dict[str, str]:
    return {name.removeprefix("provider."): value for name, value in settings.items() if name.startswith("provider.")}


# --- sections


def throughput(folder: Path, shared: Path) -> dict[str, Any]:
    """Race plans of ResNet-50 against the default session with one caller."""
    from tests.making import Part

    path, steps, note = model_file("resnet50", folder, shared), {}, {}
    plans = {
        "fp32 plan: pinned, 8 callers, batch 64": (fixed(path, 64), PLAIN, 64, 8),
        "fp16 plan: pinned, nhwc, fused, 4 callers, batch 64": (fixed(path, 64, half=True), FAST, 64, 4),
        "fp16 plan: pinned, nhwc, fused, 8 callers, batch 128": (fixed(path, 128, half=True), FAST, 128, 8),
        "fp16 plan: pageable, nhwc, fused, 8 callers, batch 128": (
            fixed(path, 128, half=True),
            {**FAST, "host_memory": "pageable"},
            128,
            8,
        ),
    }
    for batch in (1, 32, 64, 128):
        model = fixed(path, batch)
        raw, feed = session(model, {}), feed_of(model)
        steps[f"default session, 1 caller, batch {batch}"] = (batch, [partial(raw.run, None, feed)])
        if batch == 64:
            feeds = [feed_of(model, seed) for seed in range(2)]
            steps["default session, 2 callers, batch 64"] = (batch, [partial(raw.run, None, each) for each in feeds])
    for name, (model, settings, batch, callers) in plans.items():
        running = engine(
            folder, "resnet", model, [Part("onnxruntime:CUDA:0", settings=tuple(settings.items()))], batch=batch, callers=callers
        )
        steps[name] = (batch, calls_of(running, model, callers))
        note[name] = dict(running.plan.stages[0].config)
        import onnxruntime

        feeds = [feed_of(model, seed) for seed in range(callers)]
        locked = [running.new_inputs() for _ in feeds]
        for mine, feed in zip(locked, feeds, strict=True):
            for key, value in feed.items():
                mine[key][...] = value
        steps[f"{name}, arrays of the engine's own"] = (batch, [partial(running.run, each) for each in locked])
        there = [{key: onnxruntime.OrtValue.ortvalue_from_numpy(value, "cuda", 0) for key, value in feed.items()} for feed in feeds]
        steps[f"{name}, input on the card"] = (batch, [partial(running.run, each) for each in there])
    return {"rates": race(steps), "settings": note}


def overhead(folder: Path, shared: Path) -> dict[str, Any]:
    """Time the engine against bare I/O binding, call by call in random order."""
    from tests.making import Part

    found = {}
    for name in ("resnet50", "minilm", "ultraface"):
        path = model_file(name, folder, shared)
        model = fixed(path, 1)
        feed = feed_of(model)
        for label, settings in (("default", {}), ("graph", {"provider.enable_cuda_graph": "1"})):
            try:
                part = Part("onnxruntime:CUDA:0", settings=tuple(settings.items()))
                running = engine(folder, name, model, [part])
                # On the engine's own session: of two the one that is called twice as often finds its own things in the caches, which made
                # 1 to 6 % on H200s. Not with a graph, which holds the addresses that it was recorded with.
                graph = label == "graph"
                own = session(model, _provider(settings)) if graph else running._program._executables[0][0]._session
                bare = _bare(own, feed, graph=graph)
                found[f"{name}, {label}"] = _alternate({"bare": bare, "again": bare, "engine": partial(running.run, feed)})
            except Exception as error:  # noqa: BLE001 - a model that a graph refuses is a line of the table
                found[f"{name}, {label}"] = {"refused": str(error)[:200]}
    return found


def _bare(raw: Any, feed: Mapping[str, Any], *, graph: bool) -> Step:
    """Return what somebody who knows ONNX Runtime would write by hand: arrays in, arrays out."""
    import onnxruntime

    binding, kind = raw.io_binding(), onnxruntime.OrtValue
    if not graph:
        shapes = [np.empty_like(each) for each in raw.run(None, dict(feed))]
        for each, array in zip(raw.get_outputs(), shapes, strict=True):
            binding.bind_ortvalue_output(each.name, kind.ortvalue_from_numpy(array))

        def step() -> object:
            for name, array in feed.items():
                binding.bind_cpu_input(name, array)  # which copies it to the card
            raw.run_with_iobinding(binding)
            return [array.copy() for array in shapes]

        return step
    there = {name: kind.ortvalue_from_numpy(array, "cuda", 0) for name, array in feed.items()}
    made = [kind.ortvalue_from_shape_and_type(each.shape, np.float32, "cuda", 0) for each in raw.get_outputs()]
    for name, value in there.items():
        binding.bind_ortvalue_input(name, value)
    for each, value in zip(raw.get_outputs(), made, strict=True):
        binding.bind_ortvalue_output(each.name, value)

    def replay() -> object:
        for name, array in feed.items():
            there[name].update_inplace(array)
        raw.run_with_iobinding(binding)
        return [value.numpy() for value in made]

    return replay


def _alternate(steps: Mapping[str, Step], calls: int = 400) -> dict[str, list[float]]:
    order, found = random.Random(0), {name: [] for name in steps}
    for number in range(-30, calls):
        for name in order.sample(list(steps), len(steps)):
            started = time.perf_counter()
            steps[name]()
            if number >= 0:
                found[name].append(time.perf_counter() - started)
    return {name: [float(np.quantile(each, q)) for q in (0.5, 0.99)] for name, each in found.items()}


def boundaries(folder: Path, shared: Path) -> dict[str, Any]:
    """Time copies of one caller, from arrays and to them, and between cards where there are two."""
    from aivmm.runtime.cuda import Stream, pinned_empty
    from aivmm.runtime.ort_requests import device_tensor
    from aivmm.tensors import TensorSpec

    found: dict[str, Any] = {}
    count = len(cards())
    for size in (1 << 12, 1 << 16, 1 << 20, 1 << 24, 1 << 27):
        spec = TensorSpec(name="x", dtype="uint8", shape=(size,))
        here: list[Any] = [device_tensor(spec, index) for index in range(min(2, count))]
        stream, page, pinned = Stream(0), np.ones(size, np.uint8), pinned_empty(spec)
        pinned[...] = 1
        card, host, locked = here[0].data_ptr(), page.ctypes.data, pinned.ctypes.data
        moves: dict[str, Step] = {
            "host to card, pageable": partial(stream.copy, card, host, size),
            "host to card, pageable through page-locked pieces": partial(stream.upload, card, page),
            "host to card, page-locked": partial(stream.copy, card, locked, size),
            "card to host, pageable": partial(stream.copy, host, card, size),
            "card to host, page-locked": partial(stream.copy, locked, card, size),
        }
        if len(here) > 1:
            moves["card to card"] = partial(stream.copy, here[1].data_ptr(), card, size)
        for name, move in moves.items():
            times = []
            for _ in range(30 if size < 1 << 24 else 8):
                started = time.perf_counter()
                move()
                stream.wait()
                times.append(time.perf_counter() - started)
            found.setdefault(name, {})[str(size)] = statistics.median(times)
    return found


def two(folder: Path, shared: Path) -> dict[str, Any]:
    """Race one card against two."""
    from aivmm.models.order import PreparedGraph
    from aivmm.runtime.plan import Copy, Execution
    from tests.making import Part, write_model

    if len(cards()) < 2:
        return {"refused": "one card only"}
    rates: dict[str, Any] = {}
    for name, batch, settings in (("bert", 32, PLAIN), ("resnet50", 64, FAST)):
        model = fixed(model_file(name, folder, shared), batch, half=True)
        setting = tuple(settings.items())
        other = Copy(model="x.onnx", target="onnxruntime:CUDA:1", precision="fp32", config=dict(settings))
        steps, running = {}, []
        for callers in (4, 8):
            one = engine(folder, name, model, [Part("onnxruntime:CUDA:0", settings=setting)], batch=batch, callers=callers)
            both = engine(
                folder, name, model, [Part("onnxruntime:CUDA:0", settings=setting, copies=(other,))], batch=batch, callers=2 * callers
            )
            running += [one, both]
            steps[f"one card, {callers} callers"] = (batch, calls_of(one, model, callers))
            steps[f"copies on two cards, {2 * callers} callers"] = (batch, calls_of(both, model, 2 * callers))
        if name == "bert":
            names = [node.name for node in PreparedGraph(write_model(folder / "half.onnx", model)).nodes]
            cut = min(index for index, each in enumerate(names) if str(each).startswith(("layer6.", "layer6/")))
            for copies in (1, 2):
                parts = [
                    Part("onnxruntime:CUDA:0", 0, cut - 1, settings=setting, replicas=copies),
                    Part("onnxruntime:CUDA:1", cut, -1, settings=setting, replicas=copies),
                ]
                waiting = 4 * copies  # of each replica of both stages two
                mode = Execution(mode="pipelined", depth=2)
                pipeline = engine(folder, name, model, parts, batch=batch, callers=waiting, execution=mode)
                running.append(pipeline)
                steps[f"pipeline over two cards, {copies} of each stage, {waiting} callers"] = (batch, calls_of(pipeline, model, waiting))
        rates[name] = race(steps, rounds=5, seconds=0.6)
        for each in running:
            each.close()
    return rates


def cards() -> list[str]:
    """Return a line for each card: its name, driver, memory and power limit."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,power.limit", "--format=csv,noheader"]
    if shutil.which(query[0]) is None:
        return []
    asked = subprocess.run(query, capture_output=True, text=True)
    return asked.stdout.strip().splitlines()


def code_of(*arguments: str) -> str:
    """Return the commit that the code is of, or that `arguments` choose; nothing where there is no repository."""
    if shutil.which("git") is None:
        return ""
    asked = subprocess.run(["git", "log", "-1", "--format=%h", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent)
    return asked.stdout.strip()


def environment() -> dict[str, Any]:
    """Return what the machine is, and the code."""
    import onnxruntime
    import openvino

    from aivmm.runtime.cpu import cpu_device, usable_cores

    return {
        "cards": cards(),
        "cpu": cpu_device().model,
        "cores": usable_cores(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "onnxruntime": onnxruntime.__version__,
        "openvino": openvino.__version__,
        "at": time.strftime("%Y-%m-%d %H:%M"),
        "code": code_of(),
    }


def _tuned_section(name: str, asked: argparse.Namespace, *, models: Sequence[str]) -> bool:
    """Run a section that tunes, or races what was tuned; those keep what they find themselves. Return whether all of it was found."""
    from benchmarks import gpu_tuned as more

    if name in ("tune", "opencl"):
        return more.tune(
            asked.folder, asked.shared, models=models, goals=asked.goals.split(","), budget=asked.budget, state=asked.state, kind=name
        )
    if name == "two_tuned":
        return more.two_tuned(asked.folder, asked.shared, models=models, budget=asked.budget, state=asked.state)
    if name == "tune_energy":
        from benchmarks.gpu_energy import tune_energy

        return tune_energy(asked.folder, asked.shared, budget=asked.budget)
    count = 2 if name == "tune_two" else 1
    found = more.tune_for_cards(asked.folder, asked.shared, models=models, budget=asked.budget, count=count)
    return all(isinstance(each, Path) for each in found.values())


def _section(name: str) -> Callable[[Path, Path], dict[str, Any]]:
    from benchmarks import gpu_energy  # here: they are made of what is above
    from benchmarks import gpu_tuned as more

    own = {"throughput": throughput, "overhead": overhead, "boundaries": boundaries, "two": two}
    energy = {"energy": gpu_energy.energy, "energy_tuned": gpu_energy.energy_tuned}
    return {**own, **energy, "beside": more.beside, "pixels": more.pixels, "requests": more.requests}[name]


def main() -> None:
    """Run sections, or render what they found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/aivmm-gpu"))
    parser.add_argument("--shared", type=Path, default=Path("../shared/models"))
    parser.add_argument("--only", default=",".join(SECTIONS))
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--goals", default=",".join(GOALS))
    parser.add_argument("--budget", default="12s")
    parser.add_argument("--render", type=Path)
    parser.add_argument("--keep", type=Path, help="with --render: a page that goes below what is new")
    asked = parser.parse_args()
    if asked.render:
        from benchmarks.gpu_page import render

        if asked.render.exists() and not (asked.keep and asked.keep.exists() and asked.keep.samefile(asked.render)):
            parser.error(f"{asked.render} is there, and what it says would be lost: add --keep {asked.render}")
        render(asked.state, asked.render, keep=asked.keep)
        return
    for each in (asked.state, asked.folder):
        each.mkdir(parents=True, exist_ok=True)
    (asked.state / "environment.json").write_text(json.dumps(environment()))
    succeeded = True
    for name in asked.only.split(","):
        began = time.monotonic()
        if name in _TUNED:
            succeeded &= _tuned_section(name, asked, models=asked.models.split(","))
            continue
        found = _section(name)(asked.folder, asked.shared)
        (asked.state / f"{name}.json").write_text(json.dumps(found))
        print(f"{name}: {time.monotonic() - began:.0f} s", json.dumps(found)[:1500], flush=True)
    if not succeeded:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
