"""Where a database is: a path, a URL, or the user's data folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from aivmm.errors import DatabaseError
from aivmm.runtime.folders import data_folder

_ADVICE = "give a path, sqlite:///FILE or postgresql+psycopg://USER@HOST/NAME"
_SECRETS = ("password", "passfile", "sslpassword")


@dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """A database's place: `path` for SQLite, None for a server. `shown` is for people and holds no password."""

    url: URL
    path: Path | None
    shown: str

    @classmethod
    def of(cls, location: str | Path | None = None) -> Location:
        """Return the place that `location` names; None is `AIVMM_DB`, or else `performance.db` in the user's data folder, which is made.

        Raises:
            DatabaseError: an unknown URL scheme, an in-memory database, or a data folder that cannot be made.
        """
        location = location or os.environ.get("AIVMM_DB") or _default()
        if isinstance(location, Path) or "://" not in location:
            return cls._file(str(location))
        try:
            url = make_url(location)
        except (ArgumentError, ValueError) as error:  # ValueError: a port that is no number
            scheme = location.partition("://")[0]
            raise DatabaseError(f"a database URL that begins {scheme}:// cannot be read", advice=_ADVICE) from error
        if url.drivername in ("sqlite", "sqlite+pysqlite"):
            if url.query:
                raise DatabaseError("a SQLite URL takes no parameters", advice="give sqlite:///FILE alone")
            return cls._file(url.database or "")
        if url.drivername in ("postgresql", "postgres", "postgresql+psycopg"):
            url = url.set(drivername="postgresql+psycopg")
            masked = url.set(query={name: "***" if name in _SECRETS else value for name, value in url.query.items()})
            return cls(url=url, path=None, shown=masked.render_as_string(hide_password=True))
        raise DatabaseError(f"unknown database URL scheme {url.drivername!r}", advice=_ADVICE)

    @classmethod
    def _file(cls, name: str) -> Location:
        if name in ("", ":memory:"):
            raise DatabaseError("an in-memory database would forget every measurement", advice=_ADVICE)
        path = Path(name).expanduser().absolute()
        return cls(url=URL.create("sqlite", database=str(path)), path=path, shown=str(path))


def _default() -> Path:
    folder = data_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DatabaseError(
            f"cannot make the folder {folder} for the database: {error.strerror or error}",
            advice="set AIVMM_DB, or give --db PATH (db=PATH in Python)",
        ) from error
    return folder / "performance.db"
