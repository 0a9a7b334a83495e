"""What the command line says of bundles: a summary, a check, a comparison. Plain values; `cli_plan` prints them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import starmap
from pathlib import Path
from typing import Any

from aivmm.errors import AivmmError
from aivmm.runtime.finding import find_named
from aivmm.runtime.packing import Opened, opened
from aivmm.runtime.plan import Number, Plan, Stage
from aivmm.runtime.signing import Key
from aivmm.runtime.validity import grade_stages

MISSING = "(none)"
_WHOLE_PLAN, _PLAN = re.compile(r"plans\.[^.]*\.json"), re.compile(r"(plans\.[^.]*\.json)\.")  # of a bundle of several
_MOST_SHOWN, _MOST_OF_TWO_MODELS, _MOST_TEXT = 8, 3, 100  # differences of one section, and characters of a value
_UNITS = {"per_s": (1.0, " /s"), "_s": (1e3, " ms"), "_bytes": (1e-6, " MB")}  # by what a number's name ends with


def shown(bundle: Opened) -> dict[str, Any]:
    """Return what `aivmm plan show --json` gives: each plan as it is in its file, and what the bundle is as a whole."""
    return {
        "schema": 1,
        "path": str(bundle.path),
        "files": len(bundle.all_files),
        "size_bytes": bundle.size_bytes,
        "signed_by": bundle.signers,
        "family": None if bundle.family is None else bundle.family.as_json(),
        "plans": {name: plan.as_json() for name, plan in bundle.plans.items()},
    }


def titles(bundle: Opened) -> dict[str, str]:
    """Return what each plan of a bundle is for, by its file: a model, and the shape of several, or all other shapes."""
    if bundle.family is None:
        return {name: plan.model.name for name, plan in bundle.plans.items()}
    found: dict[str, str] = {}
    for served in bundle.family.models:
        found |= {each.plan: f"{served.name} at {each.name}" if each.name else served.name for each in served.buckets}
        if served.fallback is not None:
            found[served.fallback] = f"{served.name} at other shapes"
    return found


def shape_lines(bundle: Opened) -> Iterator[tuple[str, str]]:
    """Yield for each model of several shapes which there are, and what runs inputs that have none of them: a heading and a line."""
    for served in bundle.family.models if bundle.family is not None else ():
        if not served.dimensions:
            continue
        yield "shapes", f"{served.name}: {', '.join(each.name for each in served.buckets)}"
        for dimension in served.dimensions:
            yield "smaller", f"{dimension.name} {dimension.why or {'none': 'is not padded'}.get(dimension.padding, 'is padded')}"
        opened = [each.name for each in served.buckets if each.smaller == "open"]
        if opened:
            yield "smaller", f"below {', '.join(opened)} with open extents"
        yield "others", "are refused" if served.fallback is None else f"run with open extents ({served.fallback})"


def lines_of(plan: Plan) -> Iterator[tuple[str, str]]:
    """Yield the summary of a plan for people: a heading and a line."""
    yield "model", f"{plan.model.name} ({plan.model.category}), SHA-256 {plan.model.sha256[:16]}"
    yield "made", f"{plan.created_at} by {plan.created_by}"
    limits = f", limited by {', '.join(plan.constraints)}" if plan.constraints else ""
    yield "objective", plan.objective + limits
    for each in plan.model.inputs:
        yield "input", str(each.spec)
    for taken in plan.model.taken:
        yield "taken", str(taken)
    for each in plan.model.outputs:
        yield "output", str(each.spec)
    batching = plan.execution.batching
    together = f", up to {batching.max_batch} rows together" if batching else ""
    deep = f", {plan.execution.depth} requests for each stage" if plan.execution.mode == "pipelined" else ""
    yield "runs", f"{plan.execution.mode}{deep}, batch {plan.batch}, callers {plan.callers}{together}"
    for stage in plan.stages:
        yield "stage", stage_line(stage)
    for other in plan.fallbacks:
        yield "fallback", f"{other.name}: {' + '.join(stage_line(stage) for stage in other.stages)}"
    for other in plan.alternatives:
        best = f", best in {other.objective.replace(',', ' and ')}" if other.objective else ""
        yield "otherwise", f"{other.name}{best}: {', '.join(starmap(_value, other.expected.items()))}"
    for name, number in plan.expected.items():
        yield "expected", f"{_spoken(name)} {number_line(name, number)}"
    if plan.certificate is not None:
        yield "sure", plan.certificate.sentence
    if plan.accuracy is not None:
        found = plan.accuracy
        yield "accuracy", f"{found.metric} {found.value:.6g} (limit {found.limit:.6g}) on {found.data} data against {found.reference}"
    for where in plan.environments:
        cores = f", {where.usable_cores} cores" if where.usable_cores else ""
        yield "proven on", f"{where.target}: {where.device_model}{cores}, version {where.runtime_version}, {where.system}"
    if plan.verdict:
        yield "verdict", plan.verdict


def stage_line(stage: Stage) -> str:
    """Return a stage in one line."""
    config = ", ".join(f"{name}={value}" for name, value in stage.config.items()) or "default settings"
    copies = f", {stage.replicas} replicas" if stage.replicas > 1 else ""
    text = (
        f"{stage.target} in {_precision(stage.precision)}, {config}{copies} (blocks {stage.blocks[0]} to {stage.blocks[1]}, {stage.model})"
    )
    for each in stage.everywhere()[1:]:
        part = "" if each.share is None else f"{each.share:.0%} of the requests "
        copies = f" in {each.replicas} replicas" if each.replicas > 1 else ""
        text += f", beside it {part}on {each.target} in {_precision(each.precision)}{copies}"
    return text


def number_line(name: str, number: Number) -> str:
    """Return a number with its unit, its interval and where it comes from."""
    scale, unit = _unit(name)
    value = f"{number.value * scale:.4g}{unit}"
    if number.low is not None and number.high is not None:
        value += f" ({number.low * scale:.4g} to {number.high * scale:.4g}{unit})"
    return f"{value}, {number.source}" + (f", {number.samples} samples" if number.samples else "")


def _value(name: str, number: Number) -> str:
    scale, unit = _unit(name)
    return f"{_spoken(name)} {number.value * scale:.4g}{unit}"


def _precision(name: str) -> str:
    return "its default precision" if name == "default" else name


def _spoken(name: str) -> str:
    """Return what a number is called, without the unit that it has in files: `peak_memory_bytes` is the peak memory."""
    suffix = next((each for each in ("_per_s", "_s", "_bytes") if name.endswith(each)), "")
    return name.removesuffix(suffix).replace("_", " ")


def _unit(name: str) -> tuple[float, str]:
    return next((known for suffix, known in _UNITS.items() if name.endswith(suffix)), (1.0, ""))


def verified(path: Path, keys: Sequence[Key] | None) -> dict[str, Any]:
    """Check the bundle at `path` and say how far it is valid on this machine, as `aivmm plan verify --json` gives it.

    Nothing is compiled.

    Raises:
        BundleError: the bundle is damaged or unsafe, or not signed by one of `keys` where there are some.
    """
    with opened(path, signed_by=keys) as bundle:
        return {
            "schema": 1,
            "path": str(path),
            "files": len(bundle.all_files),
            "size_bytes": bundle.size_bytes,
            "signed_by": bundle.signers,
            "signature_checked": bool(keys),
            "plans": {name: {"title": titles(bundle)[name], **_on_this_machine(plan)} for name, plan in bundle.plans.items()},
        }


def _on_this_machine(plan: Plan) -> dict[str, Any]:
    """Return a plan's grade and what differs, or why it cannot run here; the same of each fallback."""
    found: list[dict[str, Any]] = []
    for name, stages in (("the plan", plan.stages), *((each.name, each.stages) for each in plan.fallbacks)):
        try:
            targets = {each.target: find_named(each.target) for stage in stages for each in stage.everywhere()}
        except AivmmError as error:
            found.append({"name": name, "grade": None, "differences": {}, "reason": str(error)})
            continue
        grade = grade_stages(stages, plan.environments, targets)
        differences = {key: {"here": here, "plan": there} for key, (here, there) in grade.differences.items()}
        found.append({"name": name, "grade": grade.grade, "differences": differences, "reason": str(grade)})
    return {"model": plan.model.name, "ways": found}


def differences(first: Path, second: Path) -> list[dict[str, Any]]:
    """Return where two bundles differ, as `{"place", "first", "second"}`, in the order of the first; the time of making is left out.

    One plan is held against the one of several that takes the same inputs; where there is none, all that is said is which plans there are.

    Raises:
        BundleError: one of them is damaged or unsafe.
    """
    with opened(first) as one, opened(second) as other:
        if (one.family is None) != (other.family is None):
            return _one_and_several(one, other)
        return _differing(_content(one), _content(other))


def _differing(one: dict[str, Any], other: dict[str, Any]) -> list[dict[str, Any]]:
    mine, theirs = dict(_flat("", one)), dict(_flat("", other))
    _leave_out_empty(mine, theirs)
    _leave_out_empty(theirs, mine)
    places = [*mine, *(each for each in theirs if each not in mine)]
    return [
        {"place": place, "first": mine.get(place, MISSING), "second": theirs.get(place, MISSING)}
        for place in places
        if mine.get(place, MISSING) != theirs.get(place, MISSING)
    ]


def _leave_out_empty(leaves: dict[str, Any], of_other: Mapping[str, Any]) -> None:
    """Take out the empty places of one plan that the other has something in: what is in them is said, leaf by leaf."""
    places = list(of_other)
    for place in [place for place, value in leaves.items() if value in ({}, [], None) and place not in of_other]:
        if any(each.startswith((f"{place}.", f"{place}[")) for each in places):
            del leaves[place]


def _one_and_several(one: Opened, other: Opened) -> list[dict[str, Any]]:
    """Return where a bundle of one plan and one of several differ, in the order in which they are given."""
    single, several = (one, other) if one.family is None else (other, one)
    ((_, plan),) = single.plans.items()
    names = titles(several)
    member = _like(plan, several)
    shape = ", ".join(str(each.spec) for each in plan.model.inputs) if member is None else names[member]
    plans = f"{len(names)} plans: {', '.join(names.values())}"
    alone = {"plans": f"one plan: {shape}", **({} if member is None else _content(single))}
    among = {"plans": plans, **({} if member is None else _member_content(several, member, plan))}
    return _differing(alone, among) if single is one else _differing(among, alone)


def _like(plan: Plan, several: Opened) -> str | None:
    """Return the plan of several, by its file, that takes the same inputs; of several models that of the same name, if any."""
    alike = [name for name, each in several.plans.items() if [a.spec for a in each.model.inputs] == [b.spec for b in plan.model.inputs]]
    alike.sort(key=lambda name: several.plans[name].model.name != plan.model.name)
    return next(iter(alike), None)


def _member_content(several: Opened, member: str, plan: Plan) -> dict[str, Any]:
    """Return one plan of several as `_content` returns it alone; files of the same content have the names that they have in `plan`."""
    content = several.plans[member].as_json()
    del content["created_at"]
    by_digest = {digest: name for name, digest in plan.files.items()}
    renamed = {name: by_digest[digest] for name, digest in several.plans[member].files.items() if digest in by_digest}
    content["files"] = {renamed.get(name, name): digest for name, digest in content["files"].items()}
    return {**_with_names(content, renamed), "signed_by": several.signers}


def _with_names(value: Any, renamed: Mapping[str, str]) -> Any:
    """Return a JSON document whose stages name their models as `renamed` says."""
    if isinstance(value, dict):
        return {
            key: renamed.get(each, each) if key == "model" and isinstance(each, str) else _with_names(each, renamed)
            for key, each in value.items()
        }
    return [_with_names(each, renamed) for each in value] if isinstance(value, list) else value


def shortened(found: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Yield what `differences` found for people: a place and what became of it; of each section its first places and how many there are.

    Digests say only that something differs, so of files there is a count; of two models' plans each section is shorter. `--json` has all.
    """
    of_two_models = any(each["place"].endswith("model.sha256") and MISSING not in (each["first"], each["second"]) for each in found)
    most = _MOST_OF_TWO_MODELS if of_two_models else _MOST_SHOWN
    alone = _one_sided(found)
    sections: dict[str, list[dict[str, Any]]] = {}
    for each in found:
        sections.setdefault(_section(each["place"], alone), []).append(each)
    for name, differing in sections.items():
        if _WHOLE_PLAN.fullmatch(name):
            yield name, f"only in the {'second' if differing[0]['first'] == MISSING else 'first'}"
            continue
        if name.endswith("files"):
            yield name, f"{len(differing)} differ"
            continue
        few = most if len(differing) > most + 1 else len(differing)
        for each in differing[:few]:
            one, other = (_cut(each[name]) for name in ("first", "second"))
            if one == other:  # they differ behind what is shown
                one, other = (json.dumps(each[name]) for name in ("first", "second"))
            yield each["place"], f"{one} -> {other}"
        if len(differing) > few:
            yield name, f"and {len(differing) - few} more places (all of them with --json)"


def _one_sided(found: Sequence[dict[str, Any]]) -> set[str]:
    """Return the plans of bundles of several that only one of the two has."""
    sides: dict[str, set[str]] = {}
    for each in found:
        plan = _PLAN.match(each["place"])
        if plan is not None:
            side = "second" if each["first"] == MISSING else "first" if each["second"] == MISSING else "both"
            sides.setdefault(plan[1], set()).add(side)
    return {plan for plan, seen in sides.items() if len(seen) == 1 and seen != {"both"}}


def _section(place: str, alone: set[str]) -> str:
    """Return the part of a plan that a place is in; in a bundle of several plans, of one of them. One that is `alone` is one part."""
    plan = _PLAN.match(place)
    if plan is not None and plan[1] in alone:
        return plan[1]
    whole = re.match(r"(plans\.[^.]*\.json\.|family\.)?(\w+)", place)
    return whole[0] if whole else place


def _cut(value: Any) -> str:
    text = value if isinstance(value, str) else f"{value:.6g}" if isinstance(value, float) else json.dumps(value)
    return text if len(text) <= _MOST_TEXT else f"{text[: _MOST_TEXT - 3]}..."


def _content(bundle: Opened) -> dict[str, Any]:
    content = shown(bundle)
    plans = content["plans"]
    for each in (*plans.values(), *([content["family"]] if content["family"] else [])):
        del each["created_at"]
    if bundle.family is None:  # one plan against one: no need to name its file each time
        (content,) = plans.values()
        return {**content, "signed_by": bundle.signers}
    return {"family": content["family"], "plans": plans, "signed_by": bundle.signers}


def _flat(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a JSON document with their places."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(f"{place}.{key}" if place else str(key), inner)
    elif isinstance(value, list) and any(isinstance(each, dict) for each in value):
        for index, inner in enumerate(value):
            yield from _flat(f"{place}[{index}]", inner)
    else:
        yield place, json.loads(json.dumps(value))
