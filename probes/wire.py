"""Records as JSON, for the messages between parent and worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from aivmm.models.input_contract import InputContract
from aivmm.models.records import Category, ModelFacts, normalisation_in, taken_in
from aivmm.runtime.config import Config, Knob
from aivmm.runtime.target import Device, Target, Unavailable
from aivmm.tensors import TensorSpec


def config_out(config: Config) -> dict[str, Any]:
    """Return a config as JSON takes it."""
    return {"settings": config.as_dict(), "precision": config.precision}


def config_in(raw: Mapping[str, Any]) -> Config:
    """Return the config that `config_out` wrote."""
    return Config.of(raw["settings"], precision=raw["precision"])


def specs_out(specs: tuple[TensorSpec, ...]) -> list[dict[str, Any]]:
    """Return tensor descriptions as JSON takes them."""
    return [asdict(each) for each in specs]


def specs_in(raw: Sequence[Mapping[str, Any]]) -> tuple[TensorSpec, ...]:
    """Return the descriptions that `specs_out` wrote."""
    return tuple(TensorSpec(name=each["name"], dtype=each["dtype"], shape=tuple(each["shape"])) for each in raw)


def target_out(target: Target | Unavailable) -> dict[str, Any]:
    """Return a target, or why it is absent, as JSON takes it."""
    return asdict(target)


def target_in(raw: Mapping[str, Any]) -> Target | Unavailable:
    """Return what `target_out` wrote."""
    if "reason" in raw:
        return Unavailable(**raw)
    device = dict(raw["device"])
    device["instruction_sets"] = tuple(device["instruction_sets"])
    return Target(
        runtime=raw["runtime"],
        name=raw["name"],
        device=Device(**device),
        runtime_version=raw["runtime_version"],
        precisions=tuple(raw["precisions"]),
    )


def facts_out(facts: ModelFacts) -> dict[str, Any]:
    """Return a model's facts as JSON takes them."""
    return asdict(facts)


def facts_in(raw: Mapping[str, Any]) -> ModelFacts:
    """Return the facts that `facts_out` wrote."""
    return ModelFacts(
        **{
            **raw,
            "category": Category(**raw["category"]),
            "inputs": specs_in(raw["inputs"]),
            "outputs": specs_in(raw["outputs"]),
            "notes": tuple(raw["notes"]),
            "taken": tuple(map(taken_in, raw["taken"])),
        }
    )


def contract_out(contract: InputContract) -> dict[str, Any]:
    """Return how inputs are to be taken as JSON takes it."""
    return asdict(contract)


def contract_in(raw: Mapping[str, Any]) -> InputContract:
    """Return the contract that `contract_out` wrote."""
    return InputContract(kind=raw["kind"], normalise={name: normalisation_in(each) for name, each in raw["normalise"].items()})


def knob_out(knob: Knob) -> dict[str, Any]:
    """Return a knob as JSON takes it."""
    return {**asdict(knob), "choices": list(knob.choices), "objectives": sorted(knob.objectives), "families": sorted(knob.families)}


def knob_in(raw: Mapping[str, Any]) -> Knob:
    """Return the knob that `knob_out` wrote."""
    sets = {name: frozenset(raw[name]) for name in ("objectives", "families")}
    return Knob(**{**raw, "choices": tuple(raw["choices"]), **sets})
