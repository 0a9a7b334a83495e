"""Models: what they are made of, so that two models that share an operator or a block share its measurements."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, delete, select

from aivmm.db import codec
from aivmm.db.schema import model, model_block, model_operator, operator, segment
from aivmm.db.store import Store, now, put
from aivmm.models.records import Block, ModelFacts, Operator, Structure


class ModelStore(Store):
    """What is measured. A model is known by its content hash and the batch it is bound to."""

    def remember_model(self, facts: ModelFacts, structure: Structure) -> str:
        """Store a model, its operators and its blocks; return its id, the digest of content hash and batch.

        The same model again changes nothing; what is known better now (a corrected FLOP formula, another path) replaces what was known.
        """
        identity = model_id(structure.content, facts.batch)
        with self._writing() as connection:
            if _facts(connection, identity) != facts or load_structure(connection, identity) != structure:
                _put_model(connection, identity, facts, structure)
                _put_operators(connection, identity, structure.operators)
                _put_blocks(connection, identity, structure.blocks)
        return identity

    def structure(self, content: str, batch: int) -> Structure | None:
        """Return the analysed model with this content hash and batch, or None."""
        with self._reading() as connection:
            return load_structure(connection, model_id(content, batch))

    def models(self) -> list[ModelFacts]:
        """Return the facts of all models, the first seen first."""
        with self._reading() as connection:
            query = select(model.c.facts).order_by(model.c.first_seen_at, model.c.id)
            return [codec.facts_from_json(facts) for facts in connection.scalars(query)]


def model_id(content: str, batch: int) -> str:
    """Return the id of the model with this content hash, bound to `batch`."""
    return codec.digest("model", content, batch)


def _put_model(connection: Connection, identity: str, facts: ModelFacts, structure: Structure) -> None:
    row = {
        "id": identity,
        "content": structure.content,
        "batch": facts.batch,
        "structure": structure.structure,
        "sha256": facts.sha256,
        "name": facts.name,
        "category": facts.category.name,
        "node_count": structure.node_count,
        "flops": structure.flops,
        "weight_bytes": structure.weight_bytes,
        "data_dependent": structure.data_dependent,
        "facts": codec.facts_to_json(facts),
        "cut_points": [codec.cut_point_to_json(cut) for cut in structure.cut_points],
        "pieces": [list(piece) for piece in structure.pieces] or None,
        "first_seen_at": now(),
    }
    put(connection, model, [row], on=["id"], keep=["first_seen_at"])


def _put_operators(connection: Connection, identity: str, operators: tuple[Operator, ...]) -> None:
    known = {
        each.signature: {
            "signature": each.signature,
            "op_type": each.op_type,
            "domain": each.domain,
            "description": each.description,
            "flops": each.flops,
            "io_bytes": each.bytes,
            "data_dependent": each.data_dependent,
        }
        for each in operators
    }
    put(connection, operator, [known[signature] for signature in sorted(known)], on=["signature"])
    connection.execute(delete(model_operator).where(model_operator.c.model_id == identity))
    rows = [
        {"model_id": identity, "signature": each.signature, "position": position, "node_count": each.count, "nodes": list(each.nodes)}
        for position, each in enumerate(operators)
    ]
    if rows:
        connection.execute(model_operator.insert(), rows)


def _put_blocks(connection: Connection, identity: str, blocks: tuple[Block, ...]) -> None:
    known = {
        each.structure: {
            "structure": each.structure,
            "op_types": dict(each.op_types),
            "flops": each.flops,
            "data_dependent": each.data_dependent,
        }
        for each in blocks
    }
    put(connection, segment, [known[structure] for structure in sorted(known)], on=["structure"])
    connection.execute(delete(model_block).where(model_block.c.model_id == identity))
    rows = [
        {
            "model_id": identity,
            "position": each.index,
            "structure": each.structure,
            "content": each.content,
            "first_node": each.first,
            "last_node": each.last,
            "weight_bytes": each.weight_bytes,
            "inputs": [codec.spec_to_json(spec) for spec in each.inputs],
            "outputs": [codec.spec_to_json(spec) for spec in each.outputs],
        }
        for each in blocks
    ]
    if rows:
        connection.execute(model_block.insert(), rows)


def _facts(connection: Connection, identity: str) -> ModelFacts | None:
    facts = connection.scalars(select(model.c.facts).where(model.c.id == identity)).first()
    return None if facts is None else codec.facts_from_json(facts)


def load_structure(connection: Connection, identity: str) -> Structure | None:
    row = connection.execute(select(model).where(model.c.id == identity)).first()
    if row is None:
        return None
    operators = select(model_operator, operator).join(operator).where(model_operator.c.model_id == identity)
    blocks = select(model_block, segment).join(segment).where(model_block.c.model_id == identity)
    return Structure(
        structure=row.structure,
        content=row.content,
        node_count=row.node_count,
        flops=row.flops,
        weight_bytes=row.weight_bytes,
        operators=tuple(map(_operator, connection.execute(operators.order_by(model_operator.c.position)))),
        cut_points=tuple(map(codec.cut_point_from_json, row.cut_points)),
        blocks=tuple(map(_block, connection.execute(blocks.order_by(model_block.c.position)))),
        data_dependent=row.data_dependent,
        pieces=tuple(map(tuple, row.pieces or ())),
    )


def _operator(row: Any) -> Operator:
    return Operator(
        signature=row.signature,
        op_type=row.op_type,
        domain=row.domain,
        description=row.description,
        count=row.node_count,
        nodes=tuple(row.nodes),
        flops=row.flops,
        bytes=row.io_bytes,
        data_dependent=row.data_dependent,
    )


def _block(row: Any) -> Block:
    return Block(
        index=row.position,
        first=row.first_node,
        last=row.last_node,
        structure=row.structure,
        content=row.content,
        inputs=tuple(map(codec.spec_from_json, row.inputs)),
        outputs=tuple(map(codec.spec_from_json, row.outputs)),
        op_types=row.op_types,
        flops=row.flops,
        weight_bytes=row.weight_bytes,
        data_dependent=row.data_dependent,
    )
