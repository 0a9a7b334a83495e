"""Precision scouted before the search: which ways of lowering apply to a target, stay within the limit, and are worth its trials.

Ways are tried best first, as successive halving does: each is judged for accuracy on its target, those within the limit race shortly with
their defaults, and the best two go on into the search as choices of its precision. Where no whole model will do, its blocks are lowered
each alone, and models that leave the costly ones as they were take part.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from aivmm.errors import AivmmError, Unsupported
from aivmm.planner.candidates import Candidate, Rejection, Score
from aivmm.planner.constraints import ACCURACY, check
from aivmm.planner.precision import Choice, Way, adds_up, dequantizes, front, most_noise, searched_front, unfit
from aivmm.probes.accuracy import over_limit
from aivmm.probes.client import WorkerDied
from aivmm.probes.lab import Loaded, Sensitivity
from aivmm.probes.race import Contestant
from aivmm.runtime.config import Config
from aivmm.runtime.target import Target
from aivmm.tuner.measure import Measurer
from aivmm.tuner.work import Work

if TYPE_CHECKING:
    from aivmm.models.lowering_recipes import Recipe

_SHARE, _MOST_S = 0.35, 55.0  # of the budget; what a search may take longer for the sake of lower precisions
_FOR_MIXING = 0.4  # of that, kept for mixtures
_SURVIVORS = 2  # variants of a target that its search goes on with
_GROUP, _GROUP_S = 3, 2.0
_WORTH = 1.15  # a variant this far behind the best of its target does not go on
_MOST_PARTS = 12
_NOISE_SAMPLES = 4
_USELESS = 1.0  # noise as strong as the outputs themselves
_RACING_S = 5.0  # it takes to race parts alone
_LEAST_MIXING_S = 20.0  # to measure the parts' noise in
_LEVELS = (0.9, 0.5, 0.2)  # shares of the noise that the limit allows: the points of the front that are proven
_STATIC = Way(name="static", precision="int8", kind="static")  # any that puts weights and activations in int8
_ENOUGH = 0.9  # lowered models that take less than this share of fp32's time need no mixing

Known = dict[str, tuple[Candidate, Score | Rejection]]


@dataclass(slots=True)
class Scout:
    """Finds the variants that a search on a target may use; `known` takes up how each came out."""

    work: Work
    measurer: Measurer
    known: Known
    barred: Callable[[Target, Config], str]  # why the user lets no plan run a config on a target; "" where one may
    judged: dict[tuple[str, str], Mapping[str, float]] = field(default_factory=dict)  # (target, variant) -> accuracy
    problems: dict[tuple[str, str], str] = field(default_factory=dict)  # (target, variant) -> why it is out
    strays: dict[tuple[str, str], int] = field(default_factory=dict)  # (target, variant) -> how many nodes are on another device
    parts: dict[str, Sensitivity] = field(default_factory=dict)  # by variant of the whole
    seconds: float = 0.0  # that scouting took
    _started: float = 0.0
    _allowed_s: float = 0.0

    def run(self, targets: Sequence[Target]) -> dict[Target, list[str]]:
        """Try ways of lowering, best first, until what may be spent is; return what each target's search goes on with."""
        families = self.work.subject.lowered_precisions
        if not families or not targets:
            return {}
        self.work.progress.phase("lowering the model")
        self._started = time.perf_counter()
        self._allowed_s = min(_MOST_S, _SHARE * self.work.options.budget_s)
        ways = {family: self._ways(family, targets) for family in families}
        first = [recipes[0] for recipes in ways.values() if recipes]
        others = [recipe for rank in range(1, 20) for recipes in ways.values() for recipe in recipes[rank : rank + 1]]
        self._try(first, targets)
        for recipe in others:
            if self._left() <= _FOR_MIXING * self._allowed_s or self.work.asked():
                break
            if not self._settled(recipe, targets):
                self._try([recipe], targets)
        self._try_where_dequantized([*first, *others], targets)
        self._mix_where_needed(targets)
        for target in targets:
            self._race_the_nearest(target)
        self.seconds = time.perf_counter() - self._started
        self._tell(targets)
        return {target: self.survivors(target) for target in targets}

    def survivors(self, target: Target) -> list[str]:
        """Return the variants that are within the limit and nearly as fast on a target as its best one, the best first.

        Tuned for throughput, a card tells little in single calls, which mostly launch kernels: fp16 was 17 % slower than bf16 in them and
        is 2.4 times as fast as fp32 with large batches (ResNet-50 on an H100). There the best go on whatever they lag. What is computed
        in fp32 all the same comes after them, and has to keep up with fp32 where that may be the plan.
        """
        scored = sorted(self._scored(target), key=lambda each: (self._dequantized(target, each[0]), each[1]))
        blind = target.device.memory_bytes is not None and self.work.options.drive == "throughput"
        best = min((ratio for _, ratio in scored), default=math.inf)
        plain = self._plain_ratio(target) if self.work.precisions(target) else None

        def goes_on(variant: str, ratio: float) -> bool:
            if self._dequantized(target, variant):
                return ratio <= _WORTH * min(best, plain or math.inf)
            return blind or ratio <= _WORTH * best

        return [variant for variant, ratio in scored if goes_on(variant, ratio)][:_SURVIVORS]

    # --- which ways there are

    def _ways(self, family: str, targets: Sequence[Target]) -> list[Recipe]:
        """Return the recipes of a precision that apply to any of the targets; say why, where none does."""
        from aivmm.models.lowering_recipes import recipes

        subject = self.work.subject
        known = recipes(family, subject.facts.category.name, saturates=subject.lowerer.saturates)
        fitting = [recipe for recipe in known if any(not self._unfit(recipe, target) for target in targets)]
        for target in targets:
            reasons = [self._unfit(recipe, target) for recipe in known]
            if all(reasons) and family in self.work.options.precisions:
                self.work.note(f"{family} does not apply: {reasons[0]}")
        return fitting

    def _dequantized(self, target: Target, variant: str) -> bool:
        return dequantizes(way_of(self.work.subject.lowerer.recipe(variant)), target)

    def _unfit(self, recipe: Recipe, target: Target) -> str:
        return unfit(way_of(recipe), target, op_types={each.op_type for each in self.work.subject.structure.operators})

    def _settled(self, recipe: Recipe, targets: Sequence[Target]) -> bool:
        """True when a recipe that makes as fast a model, and was tried before, is within the limit wherever this one could run."""
        from aivmm.models.lowering_recipes import pace

        lowerer = self.work.subject.lowerer
        alike = [variant for _, variant in self.judged if pace(lowerer.recipe(variant)) == pace(recipe)]
        where = [target for target in targets if not self._unfit(recipe, target) and not dequantizes(way_of(recipe), target)]
        return all(any(self._is_within(str(target), variant) for variant in alike) for target in where)

    def _is_within(self, target: str, variant: str) -> bool:
        return (target, variant) in self.judged and (target, variant) not in self.problems

    # --- trying them

    def _try_where_dequantized(self, recipes: Sequence[Recipe], targets: Sequence[Target]) -> None:
        """Measure int8 on targets that compute it in fp32: last, and one way that is within the limit is enough. Decision 0068.

        First what is within the limit elsewhere, which is made already.
        """
        where = [target for target in targets if dequantizes(_STATIC, target)]
        static = [each for each in recipes if each.kind == "static"]
        fine = {variant for place, variant in self.judged if self._is_within(place, variant)}
        for number, recipe in enumerate(sorted(static, key=lambda each: each.variant not in fine)):
            left = [target for target in where if not any(self._is_within(str(target), each.variant) for each in static)]
            if not left or self.work.asked() or (number and self._left() <= _FOR_MIXING * self._allowed_s):
                return
            self._try([recipe], left, dequantized=True)

    def _try(self, recipes: Sequence[Recipe], targets: Sequence[Target], *, dequantized: bool = False) -> None:
        """Lower by each recipe, judge the outcome on each target, and race what is within the limit as it was loaded to be judged.

        On targets that would compute it in fp32 only where that is what is asked for.
        """
        racing: list[Candidate] = []
        for recipe in recipes:
            self.work.subject.lowerer.recipes[recipe.variant] = recipe
            for target in targets:
                candidate = self._candidate(target, recipe.variant)
                if self._unfit(recipe, target) or dequantizes(way_of(recipe), target) is not dequantized:
                    continue
                if self._judge(target, recipe.variant) and candidate.key not in self.known:
                    racing += [candidate, *(self._folded(target, recipe.variant) if dequantized else ())]
                else:
                    self.measurer.unload(candidate)
                if len(racing) >= _GROUP:
                    self._race(racing)
                    racing = []
        self._race(racing)

    def _folded(self, target: Target, variant: str) -> list[Candidate]:
        """Return a variant with the settings that are for its precision alone, where the target has some."""
        wanted = [each for each in self.work.lab.knobs(target) if "int8" in each.families and each.promising is not None]
        settings = {each.name: each.promising for each in wanted if each.promising is not None}
        config = Config.of(settings, precision=variant)
        return [replace(self._candidate(target, variant), config=config)] if settings else []

    def _race(self, group: Sequence[Candidate]) -> None:
        if group:
            found = self.measurer.measure(group, budget_s=_GROUP_S, tell=self.work.tell_race)
            self.known.update({each.key: (each, found[each.key]) for each in group})

    def _judge(self, target: Target, variant: str) -> bool:
        """Say whether a variant stays within the limit on a target; its accuracy is stored either way. It stays loaded where it ran."""
        place, subject = (str(target), variant), self.work.subject
        try:
            loaded = self.measurer.load(self._candidate(target, variant))
            if not isinstance(loaded, Loaded):
                raise Unsupported(loaded.reason)
            self.strays[place] = loaded.strays
            samples, references = subject.choosing()
            metrics, problem = self.work.lab.judge(loaded.contestant, samples, references)
            if self.work.options.metric is not None and not problem:
                metrics["metric"] = self._metric(loaded.contestant, samples)
        except (WorkerDied, AivmmError) as error:
            self.problems[place] = error.reason if isinstance(error, WorkerDied) else error.message
            record = subject.lowerer.record(variant)
        else:
            self.judged[place] = metrics
            subject.lowerer.judged.add(place)
            if problem := problem or self._over(metrics):
                self.problems[place] = problem
            lasting = {name: value for name, value in metrics.items() if name != "metric"}  # which is of a function that may change
            record = subject.lowerer.record(variant, accuracy={str(target): lasting})
        if record is not None:
            self.work.database.remember_lowering(record)
        return place not in self.problems

    def _metric(self, contestant: Contestant, samples: Sequence[Path]) -> float:
        """Return what the user's metric says of a loaded variant: it decides here as it does in the proof."""
        assert self.work.options.metric is not None
        outputs = [sample.with_name(f"{sample.stem}-outputs.npz") for sample in samples]
        for sample, path in zip(samples, outputs, strict=True):
            self.work.lab.outputs(contestant, sample, path)
        return self.work.lab.metric(self.work.options.metric, samples, self.work.subject.choosing_extras(), outputs)

    def _over(self, metrics: Mapping[str, float]) -> str:
        """Say which limit on accuracy is broken, or return ""."""
        if not self.work.subject.deterministic:
            return ""
        if self.work.cosine_limit is not None:
            problem = over_limit(metrics.get("cosine", -1.0), metrics.get("relative_l2", 0.0), self.work.cosine_limit)
            if problem:
                return problem
        limits = [each for each in self.work.constraints if each.metric in ACCURACY]
        return next((each.sentence for each in check(limits, metrics)), "")

    def _candidate(self, target: Target, variant: str) -> Candidate:
        return Candidate(target=target, config=Config(precision=variant), batch=self.work.subject.base_batch)

    def outcome(self, target: str, variant: str) -> Score | Rejection | None:
        """Return how a variant came out on a target with default settings; None when it was not raced there."""
        for candidate, outcome in self.known.values():
            if (str(candidate.target), candidate.config) == (target, Config(precision=variant)):
                return outcome
        return None

    def _scored(self, target: Target) -> list[tuple[str, float]]:
        """Return the lowered variants that have a time on a target, over the reference's: the defaults', or the best known."""
        found: dict[str, float] = {}
        for candidate, outcome in self.known.values():
            variant = candidate.config.lowered
            if candidate.target != target or not variant or not isinstance(outcome, Score) or (str(target), variant) in self.problems:
                continue
            if not candidate.config.settings or self._dequantized(target, variant):
                found[variant] = min(outcome.ratio, found.get(variant, math.inf))
        return list(found.items())

    def _left(self) -> float:
        return self._started + self._allowed_s - time.perf_counter()

    # --- mixing

    def _plain_ratio(self, target: Target) -> float | None:
        """Return the best time of the model as it is on a target, over the reference's, of what may be the plan."""
        ratios = [
            outcome.ratio
            for candidate, outcome in self.known.values()
            if candidate.target == target and not candidate.config.lowered and outcome.ratio is not None
            if not self.barred(target, candidate.config)
        ]
        return min(ratios, default=None)

    def _needs_mixing(self, target: Target) -> bool:
        if dequantizes(_STATIC, target) and self.work.precisions(target):
            return False
        plain = self._plain_ratio(target)
        best = min((ratio for _, ratio in self._scored(target)), default=None)
        return best is None or (plain is not None and best > _ENOUGH * plain)

    def _gains_as_it_is(self, target: Target) -> bool:
        """True when a lowered model that is within the limit is worth its place there; not one that is computed in fp32 all the same."""
        plain = self._plain_ratio(target)
        best = min((ratio for variant, ratio in self._scored(target) if not self._dequantized(target, variant)), default=None)
        return best is not None and (plain is None or best <= _ENOUGH * plain)

    def _mix_where_needed(self, targets: Sequence[Target]) -> None:
        """Mix for the fastest target that needs it, and for others as long as there is time.

        The first is mixed for whatever is left of the time, unless a lowered model gains enough on another target as it is.
        """
        served = any(map(self._gains_as_it_is, targets))
        needing = sorted(filter(self._needs_mixing, targets), key=lambda target: self._plain_ratio(target) or float("inf"))
        for number, target in enumerate(needing):
            optional = number > 0 or served
            if self.work.asked() or (optional and (self._left() <= 0 or not self._needs_mixing(target))):
                continue
            self._mix(target, needing)

    def _mix(self, target: Target, targets: Sequence[Target]) -> None:
        """Leave as they were the blocks of a lowered model that cost the most accuracy for their gain, and try what comes out."""
        from aivmm.models.lowering_recipes import part_of

        whole = self._to_mix(target)
        if whole is None:
            return
        found = self._sensitivity(whole)
        if found is None or len(found.parts) < 2:
            return
        lowerer = self.work.subject.lowerer
        everything = {node for _, _, nodes, _ in found.parts for node in nodes}
        recipes = []
        for choice in self._choices(target, whole, found):
            kept = {node for index in choice.parts for node in found.parts[index][2]}
            recipe = part_of(lowerer.recipe(whole), sorted(everything - kept))
            if recipe.plain and recipe.variant not in lowerer.recipes:
                recipes.append(recipe)
        for number, recipe in enumerate(recipes):
            if number == 0 or self._left() > 0:
                self._try([recipe], targets, dequantized=dequantizes(_STATIC, target))

    def _race_the_nearest(self, target: Target) -> None:
        """Where nothing may be the plan on a target, time what comes nearest all the same: the front tells what a limit could be."""
        if self._scored(target) or self.work.precisions(target) or self.work.asked():
            return
        out = [(metrics.get("cosine", -1.0), variant) for (where, variant), metrics in self.judged.items() if where == str(target)]
        racing = [self._candidate(target, variant) for _, variant in sorted(out, reverse=True)[:_GROUP]]
        racing = [each for each in racing if each.key not in self.known]
        self._race(racing)

    def _to_mix(self, target: Target) -> str | None:
        """Return the whole lowered model to take apart: of those whose operators can be given back, the one with the least noise."""
        lowerer = self.work.subject.lowerer
        usable = [
            (metrics["relative_l2"], variant)
            for (where, variant), metrics in self.judged.items()
            if where == str(target) and "relative_l2" in metrics and lowerer.recipe(variant).kind == "static"
            if lowerer.recipe(variant).whole is None
        ]
        return min(usable)[1] if usable else None

    def _sensitivity(self, variant: str) -> Sensitivity | None:
        if variant not in self.parts:
            subject = self.work.subject
            samples, references = subject.choosing()
            try:
                self.parts[variant] = self.work.lab.sensitivity(
                    subject.path,
                    subject.lowerer.path(variant),
                    subject.lowerer.recipe(variant),
                    blocks=[(block.first, block.last) for block in subject.structure.blocks],
                    samples=samples[:_NOISE_SAMPLES],
                    references=references[:_NOISE_SAMPLES],
                    most=_MOST_PARTS,
                    limit_s=max(_LEAST_MIXING_S, self._left()),
                )
            except (Unsupported, WorkerDied) as error:
                self.work.note(f"{variant} cannot be mixed: {error.reason if isinstance(error, WorkerDied) else error.message}")
                return None
        return self.parts[variant]

    def _choices(self, target: Target, whole: str, found: Sensitivity) -> list[Choice]:
        """Return the parts to lower: the points of the front of noise and gain that the limit allows, the largest gain first.

        Parts that alone are over the limit are in none of them.
        """
        limits = {each.metric: each.limit for each in self.work.constraints if each.metric in ACCURACY}
        most = most_noise(limits, self.work.cosine_limit)
        allowed = most if most is not None and most > 0 else min(found.whole, _USELESS)
        usable = [index for index, part in enumerate(found.parts) if part[3] <= allowed]
        if not usable:
            return []
        noises, gains = [found.parts[index][3] for index in usable], self._gains(target, whole, found)
        gains = [gains[index] for index in usable]
        evaluate = partial(self._noise_of, whole, found, usable)
        together = found.whole if len(usable) == len(found.parts) else evaluate(tuple(range(len(usable))))
        if adds_up(noises, together):
            tried: Sequence[Choice] = front(noises, gains, [share * allowed for share in _LEVELS])
        else:
            self.work.note(f"the noise of {whole}'s blocks does not add up ({sum(noises):.2g} for {together:.2g}): mixtures are searched")
            stop = self._is_over(time.perf_counter() + max(_LEAST_MIXING_S, self._left()))
            tried = searched_front(gains, noises, evaluate, trials=12, seed=self.work.options.seed, stop=stop)
        fitting = [each for each in tried if each.noise <= allowed][: len(_LEVELS)]
        return [replace(each, parts=tuple(usable[index] for index in each.parts)) for each in fitting]

    def _noise_of(self, whole: str, found: Sensitivity, usable: Sequence[int], parts: tuple[int, ...]) -> float:
        """Return the noise of the model with some parts lowered, numbered among the usable ones."""
        subject, lowered = self.work.subject, {usable[index] for index in parts}
        samples, references = (each[:_NOISE_SAMPLES] for each in subject.choosing())
        plain = [node for index, part in enumerate(found.parts) if index not in lowered for node in part[2]]
        lowerer = subject.lowerer
        return self.work.lab.noise(subject.path, lowerer.path(whole), lowerer.recipe(whole), plain, samples=samples, references=references)

    def _is_over(self, deadline: float) -> Callable[[], bool]:
        return lambda: time.perf_counter() > deadline or self.work.asked()

    def _gains(self, target: Target, whole: str, found: Sensitivity) -> list[float]:
        """Return what lowering each part is worth.

        Where the lowered model is faster, that is its share of the arithmetic. Where it is not, each part is lowered alone and raced, since
        some parts lose what others gain.
        """
        outcome = self.outcome(str(target), whole)
        plain = self._plain_ratio(target)
        ratio = outcome.ratio if outcome is not None else self._ratio_regardless(target, whole)
        if ratio is not None and plain is not None and ratio > _ENOUGH * plain and self._left() > _RACING_S:
            return self._raced_gains(target, whole, found, plain)
        blocks = self.work.subject.structure.blocks
        flops = [sum(block.flops or 0.0 for block in blocks[first : last + 1]) for first, last, _, _ in found.parts]
        return [max(each, 1.0) for each in flops]

    def _ratio_regardless(self, target: Target, variant: str) -> float | None:
        """Return the time of a variant that is over the limit: it says what its parts may gain."""
        candidate = self._candidate(target, variant)
        outcome = self.measurer.measure([candidate], budget_s=_GROUP_S, tell=self.work.tell_race)[candidate.key]
        self.known[candidate.key] = (candidate, outcome)
        return outcome.ratio

    def _raced_gains(self, target: Target, whole: str, found: Sensitivity, plain: float) -> list[float]:
        from aivmm.models.lowering_recipes import part_of

        lowerer = self.work.subject.lowerer
        everything = {node for _, _, nodes, _ in found.parts for node in nodes}
        alone = {}
        for index, (_, _, nodes, _) in enumerate(found.parts):
            recipe = part_of(lowerer.recipe(whole), sorted(everything.difference(nodes)))
            lowerer.recipes[recipe.variant] = recipe
            alone[index] = self._candidate(target, recipe.variant)
        outcomes = self.measurer.measure(list(alone.values()), budget_s=max(4.0, min(10.0, self._left())), tell=self.work.tell_race)
        ratios = {index: outcomes[candidate.key].ratio for index, candidate in alone.items()}
        return [plain - ratio if (ratio := ratios[index]) is not None else 0.0 for index in range(len(found.parts))]

    # --- telling

    def _tell(self, targets: Sequence[Target]) -> None:
        """Say in one line for each target what became of the ways that were tried there."""
        for target in targets:
            where = str(target)
            tried = list(dict.fromkeys(variant for place, variant in (*self.judged, *self.problems) if place == where))
            fine = [variant for variant in tried if (where, variant) not in self.problems]
            out = [f"; out: {variant} ({self.problems[where, variant]})" for variant in tried if variant not in fine]
            if tried:
                within = f"within the limit: {', '.join(fine)}" if fine else "none is within the limit"
                self.work.note(f"{where}: {len(tried)} ways of lowering the model were tried; {within}{''.join(out)}")
            self._tell_dequantized(target, [variant for variant in fine if self._dequantized(target, variant)])

    def _tell_dequantized(self, target: Target, variants: Sequence[str]) -> None:
        """Say what int8 comes to where there are no kernels for it."""
        ratios = dict(self._scored(target))
        plain = self._plain_ratio(target)
        for variant in variants:
            beside = f", in {ratios[variant] / plain:.2f} times the time of the model as it is" if plain and variant in ratios else ""
            on = "it goes on into the search" if variant in self.survivors(target) else "it is not searched further"
            strays = f" ({self.strays[str(target), variant]} of its nodes on the CPU)" if self.strays.get((str(target), variant)) else ""
            self.work.note(f"{target} has no kernels for {variant}: it dequantizes and computes in fp32{strays}{beside}; {on}")


def way_of(recipe: Recipe) -> Way:
    """Return what decides whether a recipe suits a target."""
    options = dict(recipe.options)
    symmetric = bool(options.get("symmetric")) or options.get("preset") == "performance"
    return Way(
        name=recipe.name, precision=recipe.precision, kind=recipe.kind, symmetric=symmetric, fused=options.get("form") == "QOperator"
    )
