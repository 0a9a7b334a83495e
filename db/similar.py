"""What was best for models like a new one: where its search may begin."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import select

from aivmm.db.runs import RunStore
from aivmm.db.schema import environment, model, model_operator, operator, run, run_environment, study, trial
from aivmm.models.records import Structure
from aivmm.planner.similar import ALIKE, similarity
from aivmm.runtime.config import Config

_MOST = 3  # of each asks is one that the search lacks for something else


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """A config that was best for another model, in an environment of today."""

    model: str
    environment: str
    config: Config
    callers: int
    batch: int = 1
    replicas: int = 1


class SimilarStore(RunStore):
    """Questions about other models' searches."""

    def best_of_similar(self, structure: Structure, environments: Collection[str], *, objective: str) -> list[Suggestion]:
        """Return the best trial of each of the three models most like `structure`, which were searched for the same objective.

        Only those of these environments, by fingerprint: what was best on another device says little. The model itself is left out: what is
        known of it is no suggestion.
        """
        mine: dict[str, int] = defaultdict(int)
        for each in structure.operators:
            mine[each.op_type] += each.count
        with self._reading() as connection:
            counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
            query = select(model_operator.c.model_id, operator.c.op_type, model_operator.c.node_count)
            query = query.join(operator, operator.c.signature == model_operator.c.signature)
            query = query.join(model, model.c.id == model_operator.c.model_id).where(model.c.content != structure.content)
            for model_id, op_type, count in connection.execute(query):
                counts[model_id][op_type] += count
            alike = {model_id: similarity(mine, found) for model_id, found in counts.items()}
            alike = {model_id: value for model_id, value in alike.items() if value >= ALIKE}
            if not alike:
                return []
            query = select(run.c.model_id, run.c.model_name, environment.c.fingerprint, trial).join(study, study.c.id == trial.c.study_id)
            query = query.join(run, run.c.id == study.c.run_id).join(run_environment, run_environment.c.run_id == run.c.id)
            query = query.join(environment, environment.c.fingerprint == run_environment.c.environment)
            query = query.where(
                run.c.model_id.in_(list(alike)),
                run.c.objective == objective,
                study.c.name == "search",
                environment.c.fingerprint.in_(list(environments)),
                environment.c.target == trial.c.target,
                trial.c.state == "complete",
                trial.c.value.is_not(None),
            )
            rows, configs = self._with_configs(connection, query.order_by(trial.c.value, trial.c.id))
        best = {row.model_id: row for row in reversed(rows)}
        ranked = sorted(best.values(), key=lambda row: (-alike[row.model_id], row.model_name, row.model_id))
        return [
            Suggestion(
                model=row.model_name,
                environment=row.fingerprint,
                config=configs[row.config_digest],
                callers=row.callers,
                batch=row.batch,
                replicas=int((row.policy or {}).get("replicas", 1)),
            )
            for row in ranked[:_MOST]
        ]
