"""Puts bundles of one plan together into a bundle of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from aivmm.runtime.bundle import Bundle
from aivmm.runtime.family import Family, Part, write_family
from aivmm.runtime.plan import Alternative, Plan, Stage


def combine(
    destination: Path,
    family: Family,
    bundles: Mapping[str, Path],
    folder: Path,
    *,
    adjust: Mapping[str, Callable[[Plan], Plan]] | None = None,
) -> None:
    """Write `family` at `destination` from the bundles at `bundles` (by plan file), whose segments are gathered in `folder` meanwhile.

    `adjust` (by plan file) changes plans on the way: their replicas, or what is expected of them in company.
    """
    from aivmm.models.gather import Gatherer  # here: it loads onnx

    gatherer = Gatherer(folder)
    parts: dict[str, Part] = {}
    for name, path in bundles.items():
        with Bundle.open(path) as bundle:
            renamed: dict[str, str] = {}
            files: dict[str, Path] = {}
            for model in _models(bundle.plan):
                segment, weights = gatherer.take(bundle.file(model))
                renamed[model] = f"segments/{segment.name}"
                files |= {f"segments/{each.name}": each for each in (segment, *weights)}
            plan = (adjust or {}).get(name, _as_it_is)(bundle.plan)
            parts[name] = Part(plan=_renamed(plan, renamed, files), files=files)
    write_family(destination, family, parts)


def _as_it_is(plan: Plan) -> Plan:
    return plan


def _models(plan: Plan) -> list[str]:
    lists = (plan.stages, *(each.stages for each in (*plan.alternatives, *plan.fallbacks)))
    return list(dict.fromkeys(each.model for stages in lists for stage in stages for each in stage.everywhere()))


def _renamed(plan: Plan, renamed: Mapping[str, str], files: Mapping[str, Path]) -> Plan:
    def stages(given: list[Stage]) -> list[Stage]:
        return [
            each.replaced(model=renamed[each.model], copies=[copy.replaced(model=renamed[copy.model]) for copy in each.copies])
            for each in given
        ]

    def others(given: list[Alternative]) -> list[Alternative]:
        return [each.replaced(stages=stages(each.stages)) for each in given]

    return plan.replaced(
        stages=stages(plan.stages),
        alternatives=others(plan.alternatives),
        fallbacks=others(plan.fallbacks),
        files=dict.fromkeys(files, "0" * 64),  # the real ones come when the family is written
    )
