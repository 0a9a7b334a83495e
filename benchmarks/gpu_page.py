"""The page of what `benchmarks.gpu` found."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.gpu import GOALS, MODELS, code_of
from benchmarks.gpu_energy import page_energy, page_energy_tuned
from benchmarks.gpu_tuned import page_rates, page_requests, page_two_tuned

_DATE = re.compile(r"20\d\d-\d\d-\d\d")


def render(state: Path, to: Path, *, keep: Path | None = None) -> None:
    """Write the page of what is in `state`, above all that the page `keep` says, word for word."""
    new = page(state)
    if keep is not None:
        old = keep.read_text(encoding="utf-8")
        date = max(_DATE.findall(old), default="no date")
        code = code_of("--", str(keep.resolve()))
        new = f"{new}\n# Earlier ({date}{f', page of {code}' if code else ''})\n\n{old}"
    draft = to.with_suffix(".part")
    draft.write_text(new, encoding="utf-8")
    draft.replace(to)


def page(state: Path) -> str:
    """Return the page of whatever sections left in `state`."""
    found = {each.stem: json.loads(each.read_text()) for each in sorted(state.glob("*.json"))}
    sections = (
        ("throughput", "ResNet-50, fp32 input, images a second", _throughput),
        ("two", "One card and two, samples a second, fed from the host, fp16", _two),
        ("overhead", "The engine beside bare ONNX Runtime with I/O binding (µs, batch 1)", _overhead),
        ("requests", "Kinds of requests beside bare I/O binding (µs, batch 1)", page_requests),
        ("two_tuned", "One card and two, as tuned", page_two_tuned),
        ("beside", "The CPU beside a card, by hand", page_rates),
        ("pixels", "ResNet-50 in fp16, by the type of its input", page_rates),
        ("energy", "Energy of an inference, on one card", page_energy),
        ("energy_tuned", "The plan for energy beside the one for throughput", page_energy_tuned),
        ("boundaries", "Copies of one caller", _boundaries),
    )
    machine = found.get("environment", {})
    lines = [_title(machine), "", *_environment(machine)]
    lines += ["", *_left_out([name for name, _, _ in sections if name not in found], {key for key in found if key.startswith("tune.")})]
    for name, title, section in sections:
        if name in found:
            lines += ["", f"## {title}", "", *section(found[name])]
    tunes = {key: value for key, value in found.items() if key.startswith("tune.")}
    if tunes:
        lines += ["", "## Plans against the defaults of every target", "", *_tunes(tunes)]
    opencl = {f"tune.{key.removeprefix('opencl.')}": value for key, value in found.items() if key.startswith("opencl.")}
    if opencl:
        lines += ["", "## The same with OpenVINO's GPU among the targets", "", *_tunes(opencl)]
    tests = {key.removeprefix("session."): value for key, value in found.items() if key.startswith("session.tests")}
    if tests:
        lines += ["", "## Tests with the marker `gpu`", ""]
        lines += [
            f"- {name}, {each['at']}: {(_tail(each).strip().splitlines() or ['nothing was said'])[-1]}" for name, each in tests.items()
        ]
    failed = sorted(state.glob("*.failed"))
    if failed:
        lines += ["", "## Not finished", "", *(f"- {each.stem}: {_last(each)}" for each in failed)]
    return "\n".join(lines) + "\n"


def _title(machine: Mapping[str, Any]) -> str:
    kinds = [each.split(",")[0] for each in machine.get("cards", ())]
    cards = " and ".join(f"{kinds.count(each)} x {each}" for each in dict.fromkeys(kinds)) or "no card"
    date = (_DATE.findall(machine.get("at", "")) or ["no date"])[0]
    return f"# A machine with NVIDIA cards: {date}, {cards}, code of {machine.get('code') or 'a commit that was not noted'}"


def _left_out(sections: Sequence[str], tunes: set[str]) -> list[str]:
    missing = len(MODELS) * len(GOALS) - len(tunes)
    without = [*sections, *([f"{missing} of {missing + len(tunes)} tunings"] if missing > 0 else [])]
    said = f"Not run, or lost with the state that held it: {', '.join(without)}." if without else "All of it was run."
    return [f"This part holds what was found then, and nothing older. {said}"]


def _tail(found: Mapping[str, Any]) -> str:
    return str(found["tail"] if "tail" in found else found["tails"][0])  # as older sessions kept it


def _last(path: Path) -> str:
    return (path.read_text().strip().splitlines() or ["nothing was said"])[-1][:200]


def _environment(found: Mapping[str, Any]) -> list[str]:
    cards = "; ".join(found.get("cards", ())) or "no card"
    return [
        f"Cards (name, driver, memory, power limit): {cards}.",
        f"Host: {found.get('cpu', '?')}, {found.get('cores', '?')} cores, {found.get('system', '?')}, Python {found.get('python', '?')}; "
        f"ONNX Runtime {found.get('onnxruntime', '?')}, OpenVINO {found.get('openvino', '?')}; {found.get('at', '')}.",
    ]


def _spread(rates: Sequence[float]) -> str:
    return f"{median(rates):,.0f} | {min(rates):,.0f} to {max(rates):,.0f}"


def _throughput(found: Mapping[str, Any]) -> list[str]:
    rates = found["rates"]
    default = max(median(each) for name, each in rates.items() if name.startswith("default session, 1 caller"))
    lines = ["| how | median | of rounds | x the best default with one caller |", "|---|---|---|---|"]
    lines += [f"| {name} | {_spread(each)} | {median(each) / default:.2f} |" for name, each in rates.items()]
    lines += [
        "",
        "Taking turns, in random order, in one process. The default is `InferenceSession.run` with arrays, at its best batch. Input is",
    ]
    lines += ["copied from the callers' own arrays, read where it is from arrays that `engine.new_inputs` gave, or on the card already."]
    return lines


def _two(found: Mapping[str, Any]) -> list[str]:
    if "refused" in found:
        return [f"Not run: {found['refused']}."]
    lines = ["| model | how | median | of rounds | x the best with one card |", "|---|---|---|---|---|"]
    for model, rates in found.items():
        best = max(median(each) for name, each in rates.items() if name.startswith("one card"))
        lines += [f"| {model} | {name} | {_spread(each)} | {median(each) / best:.2f} |" for name, each in rates.items()]
    return lines


def _overhead(found: Mapping[str, Any]) -> list[str]:
    lines = [
        "| model, options | bare p50 | the same again | engine p50 | allowed | | bare p99 | engine p99 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, each in found.items():
        if "refused" in each:
            lines.append(f"| {name} | refused: {each['refused'][:80]} | | | | | | |")
            continue
        bare, again, ours = (1e6 * each[key][0] for key in ("bare", "again", "engine"))
        allowed = max(0.02 * bare, 10)
        said = "ok" if ours - bare <= allowed else "**failed**"
        lines.append(
            f"| {name} | {bare:.0f} | {again:.0f} | {ours:.0f} | +{allowed:.0f} | {said} | {1e6 * each['bare'][1]:.0f} | "
            f"{1e6 * each['engine'][1]:.0f} |"
        )
    return lines


def _boundaries(found: Mapping[str, Any]) -> list[str]:
    sizes = list(next(iter(found.values())))
    lines = ["| copy | " + " | ".join(_size(int(each)) for each in sizes) + " |", "|---" * (len(sizes) + 1) + "|"]
    for name, times in found.items():
        cells = (f"{1e6 * times[size]:,.0f} µs, {int(size) / times[size] / 1e9:.1f} GB/s" for size in sizes)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _size(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"


def _tunes(found: Mapping[str, Any]) -> list[str]:
    lines = [
        "`x` is how many times as long a default takes for a sample as the plan, in the plan's own proof (above 1 the plan is faster)."
    ]
    lines += ["A default that is over the accuracy limit is in brackets.", ""]
    lines += ["| model | goal | plan | ms a call | samples/s | cosine | x the best eligible default | each target's best default |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for model in MODELS:
        for goal in GOALS:
            tuned = found.get(f"tune.{model}.{goal.replace(' ', '.')}")
            if tuned is not None:
                lines.append(_tuned(model, goal, tuned))
    return lines


def _tuned(model: str, goal: str, tuned: Mapping[str, Any]) -> str:
    if not tuned.get("plan"):
        return f"| {model} | {goal} | none: {tuned.get('verdict', '')[:120]} | | | | | |"
    stages = tuned["plan"]["stages"]
    settings = "; ".join(
        ", ".join([each["target"], each["precision"], *(f"{k}={v}" for k, v in each["config"].items())]) for each in stages
    )
    plan = f"{settings}; batch {tuned['plan']['batch']}" + (f", {tuned['plan']['callers']} callers" if tuned["plan"].get("callers") else "")
    measured, accuracy = tuned["measured"], tuned["accuracy"]
    known = [each for each in tuned["baselines"] if each.get("ratio_to_plan")]
    eligible = [each for each in known if each["eligible"]]
    least = min(eligible, key=lambda each: each["ratio_to_plan"], default=None)
    best: dict[str, Mapping[str, Any]] = {}
    for each in known:
        if each["target"] not in best or each["ratio_to_plan"] < best[each["target"]]["ratio_to_plan"]:
            best[each["target"]] = each
    shown = ", ".join(
        f"{target} {each['ratio_to_plan']:.2f}" if each["eligible"] else f"({target} {each['ratio_to_plan']:.2f})"
        for target, each in best.items()
    )
    against = f"{least['ratio_to_plan']:.2f} ({least['verdict']}) {least['name']}" if least else "-"
    cosine = accuracy.get("value")
    return (
        f"| {model} | {goal} | {plan} | {1e3 * measured['median_s']:.3f} | {measured['throughput_per_s']:,.0f} | "
        f"{'-' if cosine is None else f'{cosine:.6f}'} | {against} | {shown} |"
    )
