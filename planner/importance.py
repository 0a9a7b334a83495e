"""Which knobs mattered: Optuna's PED-ANOVA (Watanabe et al., IJCAI 2023) over the trials of a search.

It answers with densities, so it takes milliseconds and loads nothing further; what it says of a handful of trials is a hint. A target's
knobs exist under that target only, so each target is looked at alone, and beside them what all targets share.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import optuna
from optuna.trial import FrozenTrial, TrialState

from aivmm.planner.records import Importance
from aivmm.planner.search import Search

LEAST_TRIALS = 8
_GOOD = 0.25  # the share of trials that counts as good: a tenth of a dozen trials would be one of them
_SHARED = frozenset({"target", "pieces", "batch index", "callers", "replicas", "depth", "contiguous", "cut price index"})


def importances(search: Search) -> list[Importance]:
    """Return the importance of each knob for each objective, greatest first; of targets with fewer than 8 finished trials nothing."""
    # A point that was asked for again was told what it had been told before: it counts once.
    done = list({search.space.canonical(each.params).key: each for each in search.studied() if each.state == TrialState.COMPLETE}.values())
    names = [str(target) for target in search.space.targets]
    found: list[Importance] = []
    for at, objective in enumerate(search.objectives):
        groups: dict[str, list[FrozenTrial]] = {"": done} if len(names) > 1 else {}
        groups |= {name: [each for each in done if each.params.get("target", name) == name] for name in names}
        for target, trials in groups.items():
            # Of all targets only what they share is asked for: a knob of one would be judged by which target it is of.
            own = {name for each in trials for name in each.params if name not in _SHARED and name.startswith(f"{target} ")}
            kept = _SHARED if not target else own | (_SHARED if len(names) == 1 else set())
            for knob, share in _shares(trials, at, kept).items():
                shown = knob.removeprefix(f"{target} ").removesuffix(" index")
                found.append(Importance(objective=objective.name, target=target, knob=shown, share=share, trials=len(trials)))
    return sorted(found, key=lambda each: (each.objective, each.target, -each.share, each.knob))


def _shares(trials: Sequence[FrozenTrial], at: int, kept: set[str] | frozenset[str]) -> dict[str, float]:
    """Return the shares of those parameters of `kept` that every trial has and that vary; nothing where there is too little to see."""
    everywhere = set.intersection(*(set(each.params) for each in trials)) if trials else set()
    vary = [name for name in sorted(everywhere & kept) if len({each.params[name] for each in trials}) > 1]
    if len(trials) < LEAST_TRIALS or not vary:
        return {}
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.add_trials([
        optuna.trial.create_trial(
            value=each.values[at],
            params={name: each.params[name] for name in vary},
            distributions={name: each.distributions[name] for name in vary},
        )
        for each in trials
    ])  # fmt: skip
    if len({each.value for each in study.get_trials(deepcopy=False)}) < 2:
        return {}  # all alike: nothing mattered
    # Here: it loads scikit-learn for another evaluator, which takes a second, and a short search has nothing to ask.
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is experimental, and that there are few trials
        shares = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator(target_quantile=_GOOD))
    return {name: float(value) for name, value in shares.items()}
