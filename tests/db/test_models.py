"""Models and what they are made of."""

from __future__ import annotations

import dataclasses

import sqlalchemy

from aivmm.db.database import Database
from aivmm.db.schema import metadata
from aivmm.models.records import ModelFacts, Structure


def count(database: Database, table: str) -> int:
    with database._reading() as connection:
        return connection.scalar(sqlalchemy.select(sqlalchemy.func.count()).select_from(metadata.tables[table])) or 0


def test_a_model_comes_back_whole_and_is_stored_once(database: Database, facts: ModelFacts, structure: Structure) -> None:
    first = database.remember_model(facts, structure)
    assert database.remember_model(facts, structure) == first
    assert database.structure(structure.content, facts.batch) == structure
    assert database.models() == [facts]
    assert {name: count(database, name) for name in ("model", "operator", "segment", "model_operator", "model_block")} == {
        "model": 1,
        "operator": 2,
        "segment": 2,  # two of the three blocks are alike
        "model_operator": 2,
        "model_block": 3,
    }


def test_another_batch_is_another_model_and_unknown_ones_are_none(database: Database, facts: ModelFacts, structure: Structure) -> None:
    first = database.remember_model(facts, structure)
    assert database.structure(structure.content, 8) is None
    assert database.structure("unknown", 1) is None
    assert database.remember_model(dataclasses.replace(facts, batch=8), structure) != first
    assert database.structure(structure.content, 8) == structure


def test_models_share_operators_and_segments(database: Database, facts: ModelFacts, structure: Structure) -> None:
    other = dataclasses.replace(structure, content="other", operators=structure.operators[:1], blocks=structure.blocks[:2])
    database.remember_model(facts, structure)
    database.remember_model(dataclasses.replace(facts, sha256="cd" * 32), other)
    assert count(database, "operator") == count(database, "segment") == 2
    assert database.structure("other", 1) == other
    assert database.structure(structure.content, 1) == structure


def test_what_is_known_better_later_replaces_what_was_known(database: Database, facts: ModelFacts, structure: Structure) -> None:
    database.remember_model(facts, structure)
    better = dataclasses.replace(
        structure, operators=(dataclasses.replace(structure.operators[0], flops=16.0),), blocks=structure.blocks[:1], cut_points=()
    )
    moved = dataclasses.replace(facts, path="elsewhere/squeezenet.onnx")
    database.remember_model(moved, better)
    assert database.structure(structure.content, 1) == better
    assert database.models() == [moved]


def test_a_model_without_any_part_is_stored_too(database: Database, facts: ModelFacts) -> None:
    empty = Structure(structure="s", content="c", node_count=0, flops=0.0, weight_bytes=0, operators=(), cut_points=(), blocks=())
    database.remember_model(facts, empty)
    assert database.structure("c", 1) == empty
