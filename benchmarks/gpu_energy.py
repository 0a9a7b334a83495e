"""Sections of `benchmarks.gpu` on energy, by the card's own counter: issue 8, point 7.

- energy: joules for an inference, beside the rate, of models, batches and precisions; and what the card draws while nothing runs.
- energy_tuned: the plan tuned for energy against the one tuned for throughput, taking turns. `tune_energy` tunes the former.

The counter (NVML's) is the card's alone. It moves every 100 ms or so; power is what it grew by from the first time that it moved to the
last, over the time between, while calls run: windows need not be long for its steps to count little.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any, TypeVar

from aivmm.errors import Unsupported
from aivmm.planner.objectives import OBJECTIVES
from aivmm.probes.timer import several
from benchmarks.gpu import FAST, PLAIN, Step, calls_of, engine, fixed, model_file
from benchmarks.gpu_tuned import bundle_for_cards, engine_steps, feed_for, tuned_bundle

_CARD = "onnxruntime:CUDA:0"
_MODELS: Mapping[str, Mapping[str, str]] = {"resnet50": FAST, "minilm": PLAIN}
_BATCHES = (1, 8, 64)
_PRECISIONS = ("fp32", "fp16")
_CALLERS = 4
_WINDOW_S, _IDLE_S, _WARM_S = 1.2, 2.0, 0.2
_ROUNDS = 4
_POLL_S = 0.002
_LEAST_MOVES = 5
ENERGY_PLAN, THROUGHPUT_PLAN = "tuned for energy", "tuned for throughput"

Read = Callable[[], float]  # joules since some moment in the past
T = TypeVar("T")


def card_counter() -> Read:
    """Return the counter of the card that CUDA calls 0.

    Raises:
        Unsupported: there is no such card, or it has no counter; with the reason.
    """
    from aivmm.runtime.nvidia import cuda_devices
    from aivmm.runtime.nvml import total_energy_j

    devices, reason = cuda_devices()
    if not devices:
        raise Unsupported(f"the energy of a card is not counted here: {reason}")
    uid = devices[0].uid
    total_energy_j(uid)
    return lambda: total_energy_j(uid)


def power_w(read: Read, run: Callable[[], T]) -> tuple[float, T]:
    """Return the mean power while something runs, and what that returns.

    Raises:
        Unsupported: the counter moved too few times meanwhile to tell.
    """
    moves: list[tuple[float, float]] = []
    ended = threading.Event()
    failures: list[Exception] = []

    def watch() -> None:
        try:
            last = read()
            while not ended.wait(_POLL_S):
                if (now := read()) != last:
                    moves.append((time.perf_counter(), now))
                    last = now
        except Exception as error:  # noqa: BLE001 - carried over to the calling thread
            failures.append(error)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = run()
    finally:
        ended.set()
        watcher.join()
    if failures:
        raise failures[0]
    if len(moves) < _LEAST_MOVES:
        raise Unsupported(f"the counter of energy moved {len(moves)} times only while it was watched")
    (began, before), (end, after) = moves[0], moves[-1]
    return (after - before) / (end - began), result


def of_calls(read: Read, calls: Sequence[Step], batch: int, *, seconds: float = _WINDOW_S) -> dict[str, float]:
    """Run calls side by side, warmed up; return `joules` for a sample, `watts`, and samples per second."""
    several(calls, _WARM_S, 2)
    watts, durations = power_w(read, lambda: several(calls, seconds, 2))
    rate = batch / fmean(durations)
    return {"joules": watts / rate, "watts": watts, "rate": rate}


def idle_w(read: Read, *, seconds: float = _IDLE_S) -> float:
    """Return what is drawn while nothing is asked of the card."""
    return power_w(read, lambda: time.sleep(seconds))[0]


def in_turns(read: Read, steps: Mapping[str, tuple[int, Sequence[Step]]], *, rounds: int, seconds: float) -> dict[str, list[Any]]:
    """Return what `of_calls` returns for each contestant (batch, and a step for each caller), once a round, in random order."""
    order, found = random.Random(0), {name: [] for name in steps}
    for _ in range(rounds):
        for name in order.sample(list(steps), len(steps)):
            batch, calls = steps[name]
            found[name].append(of_calls(read, calls, batch, seconds=seconds))
    return found


def energy(folder: Path, shared: Path) -> dict[str, Any]:
    """Count what candidates use for an inference, one after the other, and what an idle card draws before and between."""
    from tests.making import Part

    try:
        read = card_counter()
        found: dict[str, Any] = {"idle_w": idle_w(read), "candidates": []}
    except Unsupported as error:
        return _absent(error)
    for name, settings in _MODELS.items():
        path = model_file(name, folder, shared)
        for batch in _BATCHES:
            for precision in _PRECISIONS:
                model = fixed(path, batch, half=precision == "fp16")
                part = Part(_CARD, settings=tuple(settings.items()))
                with engine(folder, f"{name}-energy", model, [part], batch=batch, callers=_CALLERS) as running:
                    counted = of_calls(read, calls_of(running, model, _CALLERS), batch)
                    if "loaded_w" not in found:  # a card with a session keeps its clocks up
                        found["loaded_w"] = idle_w(read)
                found["candidates"].append({"model": name, "precision": precision, "batch": batch, "callers": _CALLERS, **counted})
    return found


def energy_bundle(folder: Path) -> Path:
    """Return where ResNet-50 tuned for energy is."""
    return folder / "resnet50-energy.aivmm"


def tune_energy(folder: Path, shared: Path, *, budget: str) -> bool:
    """Tune ResNet-50 on one card for energy, driven as for throughput; return whether there is a plan."""
    place = folder / "models-for-energy"  # others may be writing the same model
    place.mkdir(parents=True, exist_ok=True)
    found = tuned_bundle(
        model_file("resnet50", place, shared),
        energy_bundle(folder),
        targets=_CARD,
        options=("--precisions", "fp32,fp16"),
        budget=budget,
        objective="energy,throughput",
    )
    print(f"resnet50 for energy: {found}", flush=True)
    return isinstance(found, Path)


def energy_tuned(folder: Path, shared: Path) -> dict[str, Any]:
    """Race the plan tuned for energy with the one tuned for throughput, each with its own batch and callers, by what they use."""
    try:
        read = card_counter()
    except Unsupported as error:
        return _absent(error)
    bundles = {ENERGY_PLAN: energy_bundle(folder), THROUGHPUT_PLAN: bundle_for_cards(folder, "resnet50", 1)}
    feed = feed_for("resnet50", folder, shared)
    steps, plans, running = {}, {}, []
    try:
        for label, bundle in bundles.items():
            made, rows, calls = engine_steps(bundle, feed)
            running.append(made)
            steps[label], plans[label] = (rows, calls), made.plan.verdict
        return {"plans": plans, "rounds": in_turns(read, steps, rounds=_ROUNDS, seconds=_WINDOW_S)}
    finally:
        for each in running:
            each.close()


def _absent(error: Unsupported) -> dict[str, Any]:
    print(error, flush=True)
    return {"refused": str(error)}


def page_energy(found: Mapping[str, Any]) -> list[str]:
    """Return the lines of the page."""
    if "refused" in found:
        return [f"Not run: {found['refused']}."]
    idle = found["idle_w"]
    lines = [
        f"An idle card draws {idle:.0f} W, with a session on it that nobody calls {found['loaded_w']:.0f} W. By the card's own counter:",
        "nothing counts here what the host uses. Beside what is drawn, what an inference adds to the idle card's.",
        "",
        "| model | precision | batch | samples/s | W | mJ an inference | above idle |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in found["candidates"]:
        above = max(0.0, each["watts"] - idle) / each["rate"]
        lines.append(
            f"| {each['model']} | {each['precision']} | {each['batch']} | {each['rate']:,.0f} | {each['watts']:.0f} | "
            f"{1e3 * each['joules']:.1f} | {1e3 * above:.1f} |"
        )
    return [*lines, "", f"Each with {_CALLERS} callers, page-locked memory, {_WINDOW_S} s, one after the other."]


def page_energy_tuned(found: Mapping[str, Any]) -> list[str]:
    """Return the lines of the page: each plan, and how they compare round by round."""
    if "refused" in found:
        return [f"Not run: {found['refused']}."]
    lines = ["| ResNet-50 | mJ an inference | of rounds | W | samples/s |", "|---|---|---|---|---|"]
    for label, rounds in found["rounds"].items():
        joules = [1e3 * each["joules"] for each in rounds]
        middle = {name: median(each[name] for each in rounds) for name in ("watts", "rate")}
        lines.append(
            f"| {label} | {median(joules):.2f} | {min(joules):.2f} to {max(joules):.2f} | {middle['watts']:.0f} | {middle['rate']:,.0f} |"
        )
    pairs = zip(found["rounds"][ENERGY_PLAN], found["rounds"][THROUGHPUT_PLAN], strict=True)
    ratios = [mine["joules"] / theirs["joules"] for mine, theirs in pairs]
    worse = min(ratios) > 1 or median(ratios) > 1 + OBJECTIVES["energy"].tolerance  # in every round, or by more than a tuning tells apart
    lines += [
        "",
        f"The plan for energy uses {median(ratios):.3f} times what the one for throughput does ({min(ratios):.3f} to {max(ratios):.3f}): "
        + ("**it is worse**." if worse else "it is not worse."),
        *(f"- {label}: {said}" for label, said in found["plans"].items()),
    ]
    return lines
