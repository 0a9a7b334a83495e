"""The JSON Schemas of a bundle's own files, from the models that check them: `python -m aivmm.runtime.plan_schema docs` writes them there.

They say what a file may look like. What a file must also be, so that it is accepted (stages that connect, files that are listed, paths that
stay inside), is checked in `aivmm.runtime.plan` and `aivmm.runtime.bundle` and written down in docs/bundle.md.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from msgspec.json import schema

from aivmm.runtime.family import Family
from aivmm.runtime.plan import Plan
from aivmm.runtime.signing import Signatures
from aivmm.runtime.strict import Strict

SCHEMAS: dict[str, type[Strict]] = {"plan.schema.json": Plan, "family.schema.json": Family, "signature.schema.json": Signatures}


def json_schema(name: str) -> dict[str, Any]:
    """Return one of `SCHEMAS`, in JSON Schema 2020-12."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema(SCHEMAS[name])}


def text_of(name: str) -> str:
    """Return the text of a schema's file."""
    return json.dumps(json_schema(name), indent=2, sort_keys=True) + "\n"


def write(folder: Path) -> None:
    """Write all schemas to `folder`."""
    for name in SCHEMAS:
        (folder / name).write_text(text_of(name), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
