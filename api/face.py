"""The public functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aivmm.errors import Infeasible, UsageError
from aivmm.keywords import as_keywords

if TYPE_CHECKING:
    import pandas as pd

    from aivmm.result import TuneResult
    from aivmm.runtime.drift import Drift
    from aivmm.runtime.engine import Engine
    from aivmm.runtime.many import Engines, ShapedEngine
    from aivmm.runtime.target import Target


def load_plan(
    path: str | PathLike[str],
    *,
    on_mismatch: str = "warn",
    require_signature: str | bytes | PathLike[str] | Sequence[str | bytes | PathLike[str]] | None = None,
    on_drift: Callable[[Drift], None] | None = None,
    timeout_s: float | None = None,
    alternative: str | None = None,
) -> Engine | ShapedEngine | Engines:
    """Load the bundle at `path` (a folder or a zip of one), check it, compile it, and return a running engine.

    A bundle of several shapes gives one engine that picks the plan by its inputs' shapes; that of a workload a mapping, with an engine for
    each model's name.

    `on_mismatch` decides what runs where the machine is another than the one that the plan was proven on: `warn` (the plan), `fallback`
    (the plan's first fallback that can) or `error`. `require_signature` names public keys, one of which must have signed the plan.
    `on_drift` is called, once each time, when calls have left the latency that the plan was proven with, with what was seen to take the
    time; `stats()["drift"]` has the state.
    `timeout_s` is how long a request may take before its stage is taken to hang, and the next fallback takes over (`Engine.timeout_s`).
    `alternative` names another objective of those that the model was tuned for (`--objective latency,throughput`): what runs is what the
    plan can be traded for there.

    Raises:
        UsageError: `path` is no path, `on_drift` no function, `require_signature` no key, `timeout_s` no time to wait; or the plan has no
            such alternative (the message lists what it has).
        BundleError: the bundle is missing, damaged, changed, unsafe, newer than this version, or not signed as required.
        Unsupported: neither the plan nor a fallback of it that `on_mismatch` allows runs on this machine.
    """
    from aivmm.runtime.bundle import is_family
    from aivmm.runtime.engine import Engine

    if require_signature is not None and not isinstance(require_signature, str | bytes | PathLike | Sequence):
        raise UsageError(
            f"require_signature takes keys, and not {require_signature!r}", advice='such as require_signature="release.pub.pem"'
        )
    named = fspath(path) if isinstance(path, str | PathLike) else None
    if not isinstance(named, str):
        raise UsageError(f"{path!r} is not a path", advice='load_plan("model.aivmm")')
    if on_drift is not None and not callable(on_drift):
        raise UsageError(f"on_drift takes a function, and not {on_drift!r}", advice="such as on_drift=print")
    if not is_family(named):  # what serves several plans takes a tenth of a second to import
        single = Engine.load(named, on_mismatch=on_mismatch, require_signature=require_signature, alternative=alternative)
        _set(single, [single], on_drift, timeout_s)
        return single

    if alternative is not None:
        raise UsageError(f"{named} holds several plans, and alternatives belong to one", advice="load the one plan's own bundle")

    from aivmm.runtime.many import load, plain

    engine = load(named, on_mismatch=on_mismatch, require_signature=require_signature)
    _set(engine, plain(engine), on_drift, timeout_s)
    return engine


def _set(
    engine: Engine | ShapedEngine | Engines, plain: Iterable[Engine], on_drift: Callable[[Drift], None] | None, timeout_s: float | None
) -> None:
    """Tell the plain engines that `engine` is made of what to do; it is closed where one refuses."""
    try:
        for each in plain:
            each.on_drift, each.timeout_s = on_drift, timeout_s
    except BaseException:  # not handled, only cleaned up: nobody else could close it
        engine.close()
        raise


@as_keywords
def deploy(
    model: str | PathLike[str],
    *,
    constraints: str | Sequence[str] = (),
    objective: str | None = None,
    service_level: str | None = None,
    targets: str | Sequence[str] = (),
    precisions: str | Sequence[str] = (),
    batches: Sequence[int] = (),
    shapes: Mapping[str, str | Sequence[int] | Sequence[Sequence[int]]] | None = None,
    dims: Mapping[str, int | str | Sequence[int]] | None = None,
    other_shapes: str = "refuse",
    inputs: str | PathLike[str] | None = None,
    dataset: str | PathLike[str] | None = None,
    metric: str | None = None,
    prefer: str | Sequence[str] = (),
    budget_s: float | None = None,
    trials: int | None = None,
    seed: int = 0,
    db: str | PathLike[str] | None = None,
    plan: str | PathLike[str] | None = None,
    store: str | PathLike[str] | None = None,
    may_tune: bool = True,
    on_drift: Callable[[Drift], None] | None = None,
    quiet: bool = False,
) -> Engine | ShapedEngine:
    """Return a running engine for `model`: from a plan that is kept, or else from a new one, which is kept.

    A kept plan is reused when it was made for this very model and these options, on a machine like this one (grade `exact`), and its
    numbers keep the constraints. Else `aivmm.tune` makes one first, with progress on standard error; `may_tune=False` refuses instead.
    Plans are kept below `store`, by default in the user's data folder; `plan` names one bundle to use, and to write, instead. Where a
    target fails to compile, the plan's fallbacks are tried, and then what a tuning finds on the targets that are left. Lists in `shapes`
    and `dims` (also the command line's "32,128" and "32..512") ask for a plan for each, as in `tune`. `prefer` counts when a plan is made,
    and plans made with another order are kept apart. Threads and processes that ask for the same plan at once, as workers of a server do,
    wait for the first of them to tune, and use what it made; where it failed, they fail as it did.

        with aivmm.deploy("model.onnx", constraints="latency<100ms") as engine:
            outputs = engine.run({"input": array})

    Raises:
        AivmmError: as `aivmm.tune`; or no kept plan fits and none may be made.
        Infeasible: no plan meets the constraints.
    """
    from aivmm import arguments
    from aivmm.deployment import Deployment, content_of, run
    from aivmm.models.demo import demo_of
    from aivmm.planner.objectives import parse_objectives
    from aivmm.tuner.options import DEFAULT_BUDGET_S, TuneOptions

    name = arguments.model("model", model)
    demo_of(name)  # refused here, where no plan could be for it
    arguments.called("on_drift", on_drift)
    database = arguments.location("db", db)
    objective, limits = _goal(service_level, objective, constraints)
    among, order = _patterns("targets", targets), _patterns("prefer", prefer)
    listed = (arguments.shapes(shapes), arguments.extents(dims))
    samples, data = arguments.location("inputs", inputs), arguments.location("dataset", dataset)
    lowered, rows = _precisions(precisions), arguments.several("batches", batches, _BATCHES)
    judge = arguments.text("metric", metric, _METRIC)
    options = {
        "precisions": lowered,
        "batches": rows,
        "shapes": {name: tuple(sorted(each)) for name, each in listed[0].items()},
        "dims": listed[1],
        "other_shapes": other_shapes,
        "inputs": None if samples is None else content_of(samples),
        "dataset": None if data is None else content_of(data),
        "metric": judge,
        **({"prefer": order} if order else {}),
    }
    spent_s = arguments.seconds("budget_s", budget_s)
    TuneOptions(  # refuses what a tuning would, also where a kept plan makes one needless: the next machine has none
        model=name,
        objective=objective,
        constraints=limits,
        precisions=lowered,
        batches=rows,
        inputs=None if samples is None else Path(samples),
        dataset=data,
        metric=judge,
        other_shapes=other_shapes,
        budget_s=DEFAULT_BUDGET_S if spent_s is None else spent_s,
        trials=None if trials is None else arguments.whole("trials", trials, "trials=100"),
        seed=arguments.whole("seed", seed, "seed=0"),
    )
    deployment = Deployment(
        model=name,
        objective=",".join(each.name for each in parse_objectives(objective)),  # as plans spell it
        constraints=limits,
        targets=among,
        plan=arguments.place("plan", plan),
        store=arguments.place("store", store),
        options=options,
        effort=(spent_s, trials, seed, database),
    )

    def make(*, output: Path, targets: Sequence[str]) -> TuneResult:
        return tune(
            model,
            output=output,
            targets=targets,
            objective=objective,
            constraints=limits,
            precisions=lowered,  # as read above: what can be gone through only once is empty by now
            batches=rows,
            shapes=shapes,
            dims=listed[1],
            other_shapes=other_shapes,
            inputs=inputs,
            dataset=dataset,
            metric=metric,
            prefer=order,
            budget_s=budget_s,
            trials=trials,
            seed=seed,
            db=db,
            quiet=quiet,
        )

    return run(deployment, tune=make if may_tune else None, on_drift=on_drift)


_BATCHES = "batches=[1, 8, 32]"
_METRIC = 'metric="my_module:my_function"'


def _goal(level: str | None, objective: str | None, constraints: str | Sequence[str]) -> tuple[str, tuple[str, ...]]:
    from aivmm import arguments
    from aivmm.planner.levels import goal

    objective = arguments.text("objective", objective, 'objective="latency"')
    return goal(level, objective, arguments.texts("constraints", constraints, 'constraints="latency<100ms"'))


def _patterns(name: str, value: str | Sequence[str]) -> tuple[str, ...]:
    from aivmm import arguments

    return arguments.names(name, value, f'{name}="onnxruntime:CPU"')


def _precisions(value: str | Sequence[str]) -> tuple[str, ...]:
    from aivmm import arguments

    return arguments.names("precisions", value, 'precisions="fp32,bf16"')


def devices() -> tuple[Target, ...]:
    """Return every target that runs on this machine, proved by a trial in a worker process."""
    from aivmm.tuner.inventory import find_devices

    return find_devices()[0]


def evidence(db: str | PathLike[str] | None = None, **filters: Any) -> pd.DataFrame:
    """Return the probes of a performance database as a frame, a row each; see `aivmm.db.frames.evidence` for the filters."""
    from aivmm import arguments
    from aivmm.db.database import Database
    from aivmm.db.frames import evidence as frame

    with Database.open(arguments.location("db", db), make=False) as database:
        return frame(database, **filters)


@as_keywords
def tune(
    model: str | PathLike[str] | Sequence[str | PathLike[str]],
    *,
    output: str | PathLike[str] | None = None,
    db: str | PathLike[str] | None = None,
    objective: str | None = None,
    constraints: str | Sequence[str] = (),
    targets: str | Sequence[str] = (),
    precisions: str | Sequence[str] = (),
    batches: Sequence[int] = (),
    shapes: Mapping[str, str | Sequence[int] | Sequence[Sequence[int]]] | None = None,
    dims: Mapping[str, int | str | Sequence[int]] | None = None,
    workload: str | PathLike[str] | None = None,
    inputs: str | PathLike[str] | None = None,
    dataset: str | PathLike[str] | None = None,
    metric: str | None = None,
    service_level: str | None = None,
    prefer: str | Sequence[str] = (),
    budget_s: float | None = None,
    trials: int | None = None,
    min_segments: int = 1,
    input_contract: str = "model",
    normalise: str | Sequence[str] = (),
    other_shapes: str = "refuse",
    cut_around: str | Sequence[str] = (),
    top: int = 3,
    seed: int = 0,
    fresh: bool = False,
    retry_failed: bool = False,
    quiet: bool = False,
) -> TuneResult:
    """Find, prove and save the best plan for `model` on this machine; the options are those of `aivmm tune`.

    Lists in `shapes` and `dims` ask for a plan for each (`other_shapes="dynamic"` runs what fits none of them, too), several models with
    `workload` (a file) for a division of the machine; then `result.load()` gives what `load_plan` says of such bundles.

    Raises:
        AivmmError: something the caller can fix: the model, an option, the database, the output folder.
        Infeasible: no plan meets the constraints; the message says which binds and what comes nearest. The report is written all the same.
    """
    from aivmm import arguments
    from aivmm.result import TuneResult
    from aivmm.tuner import entry
    from aivmm.tuner.many import ManyOutcome
    from aivmm.tuner.options import DEFAULT_BUDGET_S, TuneOptions
    from aivmm.tuner.progress import make_progress
    from aivmm.tuner.shapes import wanted

    models, database = arguments.places("model", model), arguments.location("db", db)
    if not models:
        raise UsageError("no model is given", advice="give the path of one")
    each_shape = wanted(arguments.shapes(shapes), arguments.extents(dims))
    assumed_objective = objective is None and service_level is None
    objective, limits = _goal(service_level, objective, constraints)
    budget_s = arguments.seconds("budget_s", budget_s)
    options = TuneOptions(
        model=models[0],
        output=arguments.place("output", output),
        db=database,
        objective=objective,
        assumed_objective=assumed_objective,
        prefer=_patterns("prefer", prefer),
        constraints=limits,
        targets=_patterns("targets", targets),
        precisions=_precisions(precisions),
        batches=arguments.several("batches", batches, _BATCHES),
        shapes=each_shape[0].shapes,
        dims=each_shape[0].dims,
        inputs=arguments.place("inputs", inputs),
        dataset=arguments.location("dataset", dataset),
        metric=arguments.text("metric", metric, _METRIC),
        service_level=service_level,
        budget_s=DEFAULT_BUDGET_S if budget_s is None else budget_s,
        trials=None if trials is None else arguments.whole("trials", trials, "trials=100"),
        min_segments=arguments.whole("min_segments", min_segments, "min_segments=2"),
        input_contract=input_contract,
        normalise=arguments.texts("normalise", normalise, 'normalise="x=127.5/127.5"'),
        other_shapes=other_shapes,
        cut_around=arguments.texts("cut_around", cut_around, 'cut_around="Resize"'),
        top=arguments.whole("top", top, "top=3"),
        seed=arguments.whole("seed", seed, "seed=0"),
        fresh=fresh,
        retry_failed=retry_failed,
    )
    progress = make_progress(quiet=quiet)
    try:
        file = arguments.place("workload", workload)
        outcome = entry.run(options, each_shape, models, file, progress, command=f"aivmm.tune({', '.join(map(repr, models))})")
    finally:
        progress.close()
    assert not isinstance(outcome, dict)  # what a dry run gives
    if outcome.plan_path is None:
        raise Infeasible(str(outcome.summary["verdict"]), advice=f"see {outcome.report_path}")
    first = outcome.outcomes[0] if isinstance(outcome, ManyOutcome) else outcome
    return TuneResult(
        plan_path=outcome.plan_path,
        report_path=outcome.report_path,
        run_id=first.run.id,
        database=first.database,
        summary=outcome.summary,
        _db=options.db,
    )
