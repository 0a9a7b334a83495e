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
from aivmm.planner.constraints import Constraint, check, parse, unjudged
from aivmm.runtime.bundle import PLAN_FILE, file_sha256, read_root
from aivmm.runtime.engine import Engine
from aivmm.runtime.finding import find_named
from aivmm.runtime.folders import data_folder
from aivmm.runtime.plan import Plan, parse_plan
from aivmm.runtime.target import matches
from aivmm.runtime.validity import grade_stages

if TYPE_CHECKING:
    from aivmm.runtime.drift import Drift

log = logging.getLogger("aivmm.deploy")

# Names of a plan's numbers -> of what constraints limit.
_LIMITED = {
    "median_s": "latency",
    "p99_s": "p99",
    "throughput_per_s": "throughput",
    "peak_memory_bytes": "memory",
    "compile_s": "compile",
    "first_inference_s": "first_inference",
}


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """What is to be deployed. `options` are those of `aivmm.tune` that decide what is searched."""

    model: str
    objective: str
    constraints: tuple[str, ...]
    targets: tuple[str, ...]
    plan: Path | None = None
    store: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

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
        if not (path / PLAN_FILE).is_file():
            return "there is none"
        try:
            plan = parse_plan(read_root(path, PLAN_FILE, path), str(path / PLAN_FILE))
        except (BundleError, OSError) as error:
            return str(error)
        return self._of_another_model(plan) or self._asks_more(plan) or self._elsewhere(plan)

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


def run(deployment: Deployment, *, tune: Callable[..., Any] | None, on_drift: Callable[[Drift], None] | None) -> Engine:
    """Return a running engine. `tune` makes a plan (`output` and `targets` are given to it); None when only a kept one may be used.

    Raises:
        UsageError: no kept plan fits, and none may be made; says why not.
        AivmmError: as `tune`.
        Unsupported: nothing that is left of the targets runs the model.
    """
    first: AivmmError | None = None
    reasons: list[str] = []
    for path in deployment.kept():
        why_not = deployment.why_not(path)
        if not why_not:
            try:
                return _started(path, on_drift)
            except (Unsupported, BundleError) as error:
                first, why_not = first or error, str(error)
        reasons.append(f"{path}: {why_not}")
        log.info("not reused: %s", reasons[-1])
    if tune is None:
        raise first or UsageError(f"no kept plan fits: {reasons[-1]}", advice="let deploy tune, or tune beforehand with aivmm-tune")
    return _tuned(deployment, tune, on_drift)


def _tuned(deployment: Deployment, tune: Callable[..., Any], on_drift: Callable[[Drift], None] | None) -> Engine:
    """Tune and start; where what was found does not start, leave its targets out and tune again."""
    place, targets = deployment.place, deployment.targets
    if deployment.plan is None:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = f"plans cannot be kept in {place.parent}: {error.strerror or error}"
            raise UsageError(problem, advice="name a folder with store=..., or the bundle with plan=...") from error
    while True:
        made = tune(output=place, targets=targets)
        try:
            return _started(made.plan_path, on_drift)
        except Unsupported as error:
            failed = {*made.plan.targets(), *made.plan.fallback_targets()}
            left = tuple(each for each in _targets_here(targets) if each not in failed)
            if not left:
                raise
            log.warning("%s; tuning again on %s", error, ", ".join(left))
            targets = left


def _targets_here(patterns: Sequence[str]) -> list[str]:
    from aivmm.tuner.inventory import find_devices

    return [str(each) for each in find_devices()[0] if not patterns or any(matches(pattern, str(each)) for pattern in patterns)]


def _started(path: Path, on_drift: Callable[[Drift], None] | None) -> Engine:
    engine = Engine.load(path)
    engine.on_drift = on_drift
    return engine


def content_of(name: str) -> str:
    """Return what tells one source of samples from another: the digest of a file, else the name (of a folder, or of a function)."""
    path = Path(name)
    return file_sha256(path) if path.is_file() else name


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
