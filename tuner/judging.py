"""How near the entrants of a proof come to the reference: each on the samples of the proof, the plan on all that was held out."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aivmm.errors import AivmmError
from aivmm.planner.constraints import Constraint, beyond
from aivmm.probes.accuracy import combined, over_limit
from aivmm.probes.client import WorkerDied, run_limit_s
from aivmm.tuner.proof import Entrant

if TYPE_CHECKING:
    from aivmm.tuner.subject import Further

Metric = Callable[[Sequence[Path], Sequence[Path | None], Sequence[Path]], float]  # samples, extras, outputs


def judged_on(entrant: Entrant) -> int:
    """Return how many samples an entrant was judged on."""
    return len(entrant.judged) or len(entrant.samples) + 1


class Judge:
    """Judges entrants by the default limit and by the user's metric, where there is one."""

    def __init__(
        self,
        *,
        cosine_limit: float | None,
        metric: Metric | None,
        further: Callable[[], Further] | None = None,
        constraints: Sequence[Constraint] = (),
    ) -> None:
        """`further` gives the held-out samples that the plan alone is judged on; it is called once, and only for a plan that needs them.

        `constraints` say which way the user's metric is better; without one on it, more is.
        """
        self._cosine_limit = cosine_limit
        self._metric = metric
        self._limits = [each for each in constraints if each.metric == "metric"]
        self._further = further
        self._found: Further | None = None
        self._asking = threading.Lock()  # several entrants are loaded at a time, and one process holds the user's code

    def proof(self, entrant: Entrant, loaded: Mapping[str, Any]) -> tuple[dict[str, float], str]:
        """Return an entrant's accuracy on its samples, and why it cannot be the plan; `loaded` is what loading it found on its own sample.

        Raises:
            WorkerDied, AivmmError: it died, or the user's metric failed.
        """
        samples, references = [*entrant.samples, entrant.sample], [*entrant.references, entrant.reference]
        problem = str(loaded["problem"])
        found, other = self._compared(entrant, samples[:-1], references[:-1])
        entrant.judged = [*found, loaded["accuracy"]]
        problem = problem or other
        accuracy = combined(entrant.judged)
        if self._metric is not None and not problem:
            accuracy["metric"] = self._asked(entrant, samples, entrant.extras)
        return accuracy, problem or self._over(accuracy)

    def on_all(self, entrant: Entrant, tell: Callable[[str], None]) -> bool:
        """Judge an entrant on what else was held out; True when its metrics are new.

        An fp32 plan is left alone, unless a metric of the user's is to be known: there is nothing more to learn of its outputs.
        """
        plain = all(each.precision == "fp32" for each in entrant.draft.all_configs)
        if self._further is None or len(entrant.judged) > len(entrant.samples) + 1 or (plain and self._metric is None):
            return False
        if not entrant.samples or len(entrant.extras) not in (0, len(entrant.samples) + 1):
            return False  # another batch than the samples'
        if self._found is None:
            tell("judging the plan on all held-out samples")
            self._found = self._further()
        more = self._found
        if not more.samples:
            return False
        try:
            found, problem = self._compared(entrant, more.samples, more.references)
            entrant.judged += found
            accuracy = combined(entrant.judged)
            if self._metric is not None and not problem:
                everything = [*entrant.samples, entrant.sample, *more.samples]
                extras = [*(entrant.extras or [None] * (len(entrant.samples) + 1)), *more.extras]
                accuracy["metric"] = self._asked(entrant, everything, extras)
        except (WorkerDied, AivmmError) as error:
            entrant.problem, entrant.fatal = error.reason if isinstance(error, WorkerDied) else error.message, True
            return False
        entrant.metrics |= accuracy
        entrant.problem = entrant.problem or problem or self._over(accuracy)
        return True

    def _compared(self, entrant: Entrant, samples: Sequence[Path], references: Sequence[Path]) -> tuple[list[dict[str, float]], str]:
        """Run an entrant on samples; return the measures of each, and what makes its outputs unusable ("" if nothing)."""
        assert entrant.worker is not None
        found, problem = [], ""
        for sample, reference in zip(samples, references, strict=True):
            answer = entrant.worker.call("judge", limit_s=run_limit_s(), name="engine", inputs=str(sample), reference=str(reference))
            problem = problem or answer["problem"]
            found.append(answer["accuracy"])
        return found, problem

    def _asked(self, entrant: Entrant, samples: Sequence[Path], extras: Sequence[Path | None]) -> float:
        """Return what the user's metric says of an entrant's outputs; where it runs in several places, of the worst of them."""
        assert entrant.worker is not None and self._metric is not None
        made: list[list[Path]] = []  # sample by sample, of each place
        for index, sample in enumerate(samples):
            path = entrant.bundle.with_name(f"{entrant.bundle.name}.outputs-{index}.npz")
            answer = entrant.worker.call(
                "outputs", limit_s=run_limit_s(), name="engine", inputs=str(sample), destination=str(path), everywhere=True
            )
            made.append([Path(each) for each in answer["files"]])
        with self._asking:
            return self._worst([self._metric(samples, extras or [None] * len(samples), outputs) for outputs in zip(*made, strict=True)])

    def _worst(self, values: Sequence[float]) -> float:
        """Return the value that is furthest beyond its limits, or nearest to them."""
        return max(values, key=lambda value: max((beyond(each, value) for each in self._limits), default=-value))

    def _over(self, accuracy: Mapping[str, float]) -> str:
        if self._cosine_limit is None:
            return ""
        return over_limit(accuracy.get("cosine", -1.0), accuracy.get("relative_l2", math.inf), self._cosine_limit)
