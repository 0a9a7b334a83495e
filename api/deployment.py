"""`aivmm.deploy`: a running engine for a model and what is asked of it, from a plan that is kept, or else from a tuning."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aivmm.errors import AivmmError, BundleError, Unsupported, UsageError
from aivmm.once import alone
from aivmm.planner.constraints import Constraint, check, parse, unjudged
from aivmm.runtime.bundle import FAMILY_FILE, PLAN_FILE, check_destination, is_family, read_root
from aivmm.runtime.engine import Engine
from aivmm.runtime.finding import find_named
from aivmm.runtime.folders import data_folder
from aivmm.runtime.plan import Plan, parse_plan
from aivmm.runtime.reading import file_sha256
from aivmm.runtime.target import matches
from aivmm.runtime.validity import grade_stages

if TYPE_CHECKING:
    from aivmm.runtime.drift import Drift
    from aivmm.runtime.many import ShapedEngine

log = logging.getLogger("aivmm.deploy")

# Names of a plan's numbers -> of what constraints limit.
_LIMITED = {
    "median_s": "latency",
    "p99_s": "p99",
    "throughput_per_s": "throughput",
    "peak_memory_bytes": "memory",
    "device_memory_bytes": "device_memory",
    "compile_s": "compile",
    "first_inference_s": "first_inference",
}


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """What is to be deployed. `options` are those of `aivmm.tune` that decide what is searched, `effort` those that decide how long."""

    model: str
    objective: str
    constraints: tuple[str, ...]
    targets: tuple[str, ...]
    plan: Path | None = None
    store: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    effort: tuple[Any, ...] = ()  # no part of what a plan is kept for

    @cached_property
    def limits(self) -> tuple[Constraint, ...]:
        """The constraints, parsed."""
        return tuple(each for text in self.constraints for each in parse(text))

    @property
    def folder(self) -> Path:
        """Where plans for this model and these options are kept, one for each set of constraints."""
        asked = {"model": self._model_key, "objective": self.objective, "targets": sorted(self.targets), **self.options}
        return (self.store or data_folder() / "plans") / f"{self._stem}-{_digest(asked)}"

    @property
    def asked(self) -> str:
        """What tells this request from any other."""
        return _digest([self.folder.name, self.objective, sorted(map(str, self.limits)), self.effort])

    @property
    def place(self) -> Path:
        """Where a new plan goes."""
        return self.plan or self.folder / f"{_digest(sorted(map(str, self.limits)))}.aivmm"

    def kept(self) -> Iterator[Path]:
        """Yield the plans to look at, that of these very constraints first."""
        yield self.place
        if self.plan is None and self.folder.is_dir():
            yield from (each for each in sorted(self.folder.glob("*.aivmm")) if each != self.place)

    def why_not(self, path: Path) -> str:
        """Return why the bundle at `path` is not what is asked for here; empty when it is. Its files are not looked at."""
        if not ((path / PLAN_FILE).is_file() or (path / FAMILY_FILE).is_file()):
            return "it is a file, and not a bundle's folder (aivmm plan export makes one of a zip)" if path.is_file() else "there is none"
        try:
            plans, fallback = _plans_at(path)
        except (BundleError, OSError) as error:
            return str(error)
        for plan in plans:
            why_not = self._of_another_model(plan) or self._asks_more(plan) or self._elsewhere(plan)
            if why_not:
                return why_not
        return self._of_other_shapes(plans, fallback)

    def _of_other_shapes(self, plans: Sequence[Plan], fallback: bool) -> str:
        """Return why a bundle takes other shapes than those asked for. Only who names the bundle can mean one of other options."""
        if self.plan is None:
            return ""
        if fallback != (self.options.get("other_shapes", "refuse") != "refuse"):
            return f"it {'runs' if fallback else 'refuses'} other shapes"
        for name, listed in self.options.get("shapes", {}).items():
            have = {each.spec.shape for plan in plans for each in plan.model.inputs if each.name == name}
            if have != set(listed):
                return f"its input {name!r} has the shape {', '.join('x'.join(map(str, each)) for each in sorted(have)) or 'of none'}"
        named = self.options.get("dims", {}) if not self.model.startswith("demo:") else {}
        for name, extents in named.items():
            have_extents = {each.spec.shape[axis] for plan in plans for each in plan.model.inputs for axis in self._axes(each.name, name)}
            if not have_extents:
                return f"none of its inputs has a dimension {name!r}"
            if have_extents != set(extents):
                return f"it was made for {name}={','.join(map(str, sorted(each or 0 for each in have_extents)))}"
        return ""

    def _axes(self, name: str, dimension: str) -> list[int]:
        """Return the axes of an input that the model's file gives the name of a dimension."""
        return [axis for axis, declared in enumerate(self._declared.get(name, ())) if declared == dimension]

    @cached_property
    def _declared(self) -> Mapping[str, Sequence[int | str]]:
        from aivmm.models.dataset_shapes import declared_inputs  # it loads onnx

        return declared_inputs(Path(self.model))

    def _of_another_model(self, plan: Plan) -> str:
        if self.model.startswith("demo:"):
            from importlib.metadata import version

            same = (plan.model.name, plan.created_by) == (self._stem, f"aivmm {version('aivmm')}")
        else:
            same = plan.model.sha256 == self._sha256 or plan.model.sha256 == self._sha256_with_weights
        return "" if same else "it was made for another model"

    def _asks_more(self, plan: Plan) -> str:
        if plan.objective != self.objective:
            return f"it was made for {plan.objective}"
        outside = [target for target in plan.targets() if self.targets and not any(matches(each, target) for each in self.targets)]
        if outside:
            return f"it runs on {outside[0]}"
        proven = {str(each) for text in plan.constraints for each in parse(text)}
        open_limits = [each for each in self.limits if str(each) not in proven]
        metrics = {_LIMITED[name]: number.high or number.value for name, number in plan.expected.items() if name in _LIMITED}
        if plan.accuracy is not None:
            metrics[plan.accuracy.metric] = plan.accuracy.value
        broken = check(open_limits, metrics, targets=plan.targets())
        if broken:
            return str(broken[0])
        unknown = unjudged(open_limits, metrics, targets=plan.targets())
        return f"it says nothing of {unknown[0].metric}" if unknown else ""

    def _elsewhere(self, plan: Plan) -> str:
        try:
            targets = {each: find_named(each) for each in plan.targets()}
        except Unsupported as error:
            return str(error)
        validity = grade_stages(plan.stages, plan.environments, targets)
        return "" if validity.grade == "exact" else f"it was proven under other conditions ({validity})"

    @property
    def _stem(self) -> str:
        return self.model.removeprefix("demo:") if self.model.startswith("demo:") else Path(self.model).stem

    @property
    def _model_key(self) -> str:
        return self.model if self.model.startswith("demo:") else self._sha256

    @cached_property
    def _sha256(self) -> str:
        try:
            return file_sha256(Path(self.model))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"{self.model} cannot be read ({reason})", advice="give the path of an .onnx file") from error

    @cached_property
    def _sha256_with_weights(self) -> str:
        """The digest of a model whose weights lie in other files, which only who reads it knows."""
        from aivmm.models.load import load_model

        return load_model(Path(self.model)).sha256


def _plans_at(path: Path) -> tuple[list[Plan], bool]:
    """Return the plans of a bundle, one a shape, and whether it runs other shapes as well. Its other files are not looked at.

    Raises:
        BundleError: it cannot be read, or serves several models.
    """
    if not is_family(path):
        return [parse_plan(read_root(path, PLAN_FILE, path), str(path / PLAN_FILE))], False
    from aivmm.runtime.family import parse_family

    family = parse_family(read_root(path, FAMILY_FILE, path), str(path / FAMILY_FILE))
    if family.kind != "shapes":
        raise BundleError(f"{path} serves several models", advice="load it with aivmm.load_plan")
    (served,) = family.models
    plans = [parse_plan(read_root(path, each.plan, path), str(path / each.plan)) for each in served.buckets]
    return plans, served.fallback is not None


def run(deployment: Deployment, *, tune: Callable[..., Any] | None, on_drift: Callable[[Drift], None] | None) -> Engine | ShapedEngine:
    """Return a running engine. `tune` makes a plan (`output` and `targets` are given to it); None when only a kept one may be used.

    Raises:
        UsageError: no kept plan fits, and none may be made; says why not.
        AivmmError: as `tune`; also where another one's tuning for the same failed while this one waited for its plan.
        Unsupported: nothing that is left of the targets runs the model.
    """
    engine, why_not = _kept(deployment, on_drift)
    if engine is not None:
        return engine
    if tune is None:
        assert why_not is not None
        raise why_not
    _make_room(deployment)
    with alone(deployment.place, deployment.model, deployment.asked) as turn:
        engine, _ = _kept(deployment, on_drift)  # which another one may have made meanwhile
        if engine is not None:
            return engine
        failure = turn.failure()
        if failure is not None:
            raise failure
        try:
            engine = _tuned(deployment, tune, on_drift)
        except AivmmError as error:
            turn.failed(error)
            raise
        turn.succeeded()
        return engine


def _kept(deployment: Deployment, on_drift: Callable[[Drift], None] | None) -> tuple[Engine | ShapedEngine | None, AivmmError | None]:
    """Return the first kept plan that fits, running; where none does, what to tell who may not tune."""
    first: AivmmError | None = None
    reasons: list[str] = []
    for path in deployment.kept():
        why_not = deployment.why_not(path)
        if not why_not:
            try:
                return _started(path, on_drift), None
            except (Unsupported, BundleError) as error:
                first, why_not = first or error, str(error)
        reasons.append(f"{path}: {why_not}")
        log.info("not reused: %s", reasons[-1])
    return None, first or UsageError(f"no kept plan fits: {reasons[-1]}", advice="let deploy tune, or tune beforehand with aivmm-tune")


def _make_room(deployment: Deployment) -> None:
    """Make sure that a plan can be kept, before an hour is spent on one.

    Raises:
        UsageError: it cannot be.
    """
    place = deployment.place
    if deployment.plan is not None:
        try:
            check_destination(place)
        except UsageError as error:
            raise UsageError(error.message, advice="name another bundle with plan=...") from None
        return
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"plans cannot be kept in {place.parent}: {error.strerror or error}"
        raise UsageError(problem, advice="name a folder with store=..., or the bundle with plan=...") from None


def _tuned(deployment: Deployment, tune: Callable[..., Any], on_drift: Callable[[Drift], None] | None) -> Engine | ShapedEngine:
    """Tune and start; where what was found does not start, leave its targets out and tune again."""
    place, targets = deployment.place, deployment.targets
    while True:
        made = tune(output=place, targets=targets)
        try:
            return _started(made.plan_path, on_drift)
        except Unsupported as error:
            plans, _ = _plans_at(made.plan_path)
            failed = {target for plan in plans for target in (*plan.targets(), *plan.fallback_targets())}
            left = tuple(each for each in _targets_here(targets) if each not in failed)
            if not left:
                raise
            log.warning("%s; tuning again on %s", error, ", ".join(left))
            targets = left


def _targets_here(patterns: Sequence[str]) -> list[str]:
    from aivmm.tuner.inventory import find_devices

    return [str(each) for each in find_devices()[0] if not patterns or any(matches(pattern, str(each)) for pattern in patterns)]


def _started(path: Path, on_drift: Callable[[Drift], None] | None) -> Engine | ShapedEngine:
    if not is_family(path):  # what serves several plans takes a tenth of a second to import
        single = Engine.load(path)
        single.on_drift = on_drift
        return single
    from aivmm.runtime.many import load_one, plain

    engine = load_one(path)
    for each in plain(engine):
        each.on_drift = on_drift
    return engine


def content_of(name: str) -> str:
    """Return what tells one source of samples from another: the digest of a file, else the name (of a folder, or of a function)."""
    path = Path(name)
    return file_sha256(path) if path.is_file() else name


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
