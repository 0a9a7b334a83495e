"""A real PostgreSQL server for the tests: started from the installed programs, reached through a Unix socket only, gone with the tests."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy

OWNER = "aivmm"  # the server's superuser; it has no password, since the socket's folder is the only way in
PATIENCE_S = 60.0

# Speed, since a crash of the machine loses nothing here that anybody needs.
SETTINGS = {
    "listen_addresses": "",
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "autovacuum": "off",
    "shared_buffers": "64MB",
    "max_connections": "60",
}

# Its standard input is a pipe that only we hold: when we are gone, however suddenly, the server ends and its folder goes too.
KEEPER = """
"$@" > "$FOLDER/log" 2>&1 &
server=$!
read -r _
kill -INT $server 2> /dev/null
wait $server
rm -rf "$FOLDER"
"""


class Missing(Exception):
    """There is no server here, and why."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server on which databases come and go. `engine` is connected to the one from which others are made."""

    engine: sqlalchemy.Engine

    def create(self, *, template: str | None = None) -> str:
        """Make a new database, empty or a copy of another of that name; return its name."""
        name = f"aivmm_{uuid.uuid4().hex}"
        self._run(f"CREATE DATABASE {name}" + (f" TEMPLATE {template}" if template else ""))
        return name

    def drop(self, name: str) -> None:
        """Remove a database, whoever is still connected to it."""
        self._run(f"DROP DATABASE {name} WITH (FORCE)")

    def disconnect(self, name: str) -> int:
        """End every connection to a database, as a server that restarts does; return how many there were."""
        return len(self._run(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"))

    def location(self, name: str) -> str:
        """Return the URL of a database, for `--db`."""
        return self.engine.url.set(database=name).render_as_string(hide_password=False)

    def _run(self, statement: str) -> list[object]:
        with self.engine.connect() as connection:
            result = connection.exec_driver_sql(statement)
            return list(result) if result.returns_rows else []


@contextmanager
def server() -> Iterator[Server]:
    """Give the server that AIVMM_TEST_POSTGRES names, or else one of our own.

    Raises:
        Missing: no driver, or no programs to start one from.
    """
    if importlib.util.find_spec("psycopg") is None:
        raise Missing("the Python package psycopg is not installed (pip install 'psycopg[binary]')")
    if given := os.environ.get("AIVMM_TEST_POSTGRES"):
        with _connected(sqlalchemy.make_url(given)) as engine:
            yield Server(engine=engine)
        return
    if os.name != "posix":
        raise Missing("starting one needs Unix sockets (or set AIVMM_TEST_POSTGRES to the URL of one)")
    programs = _programs()
    # Not pytest's own folder: a socket's path has at most 107 bytes, and the server's user may not enter that folder.
    folder = Path(tempfile.mkdtemp(prefix="aivmm-pg-"))
    try:
        url = sqlalchemy.URL.create("postgresql+psycopg", OWNER, database="postgres", query={"host": str(folder)})
        with _running(programs, folder, url), _connected(url) as engine:
            yield Server(engine=engine)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # the keeper does so too, unless it was killed


def _programs() -> Path:
    """Return the folder of `initdb` and `postgres`: on PATH, or the newest that Debian's package has put aside."""
    on_path = shutil.which("initdb")
    beside = [Path(on_path).resolve().parent] if on_path else []
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda each: float(each.parent.name), reverse=True)
    for folder in [*beside, *debian]:
        if all((folder / name).exists() for name in ("initdb", "postgres")):
            return folder
    raise Missing("no PostgreSQL server is installed (apt-get install postgresql, or set AIVMM_TEST_POSTGRES to the URL of one)")


@contextmanager
def _connected(url: sqlalchemy.URL) -> Iterator[sqlalchemy.Engine]:
    engine = sqlalchemy.create_engine(url, isolation_level="AUTOCOMMIT", pool_pre_ping=True)
    try:
        yield engine
    finally:
        engine.dispose()


@contextmanager
def _running(programs: Path, folder: Path, url: sqlalchemy.URL) -> Iterator[None]:
    user = _user()
    folder.chmod(0o755)  # tests that give up their rights come in as well
    if user:
        os.chown(folder, user["user"], user["group"])
    data = folder / "data"
    variables = {"PATH": os.environ.get("PATH", ""), "LC_ALL": "C", "FOLDER": str(folder)}
    made = subprocess.run(
        [programs / "initdb", "-D", data, "-U", OWNER, "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync"],
        env=variables,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        **user,
    )
    if made.returncode:
        raise RuntimeError(f"initdb failed: {made.stderr}")
    options = [f"-c{name}={value}" for name, value in {**SETTINGS, "unix_socket_directories": str(folder)}.items()]
    command = ["/bin/sh", "-c", KEEPER, "keeper", str(programs / "postgres"), "-D", str(data), *options]
    keeper: subprocess.Popen[bytes] = subprocess.Popen(
        command, stdin=subprocess.PIPE, env=variables, cwd="/", start_new_session=True, **user
    )
    try:
        _wait(keeper, folder / "log", url)
        yield
    finally:
        assert keeper.stdin is not None
        keeper.stdin.close()
        keeper.wait(PATIENCE_S)


def _user() -> dict[str, Any]:
    """Return whom the server runs as, for `subprocess`: it refuses to be root."""
    if os.getuid() != 0:
        return {}
    import pwd

    for name in ("postgres", "nobody"):
        try:
            found = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": found.pw_uid, "group": found.pw_gid, "extra_groups": []}
    raise Missing("the tests run as root, and there is no user 'postgres' or 'nobody' for the server")


def _wait(keeper: subprocess.Popen[bytes], log: Path, url: sqlalchemy.URL) -> None:
    deadline = time.monotonic() + PATIENCE_S
    with _connected(url) as engine:
        while True:
            try:
                engine.connect().close()
                return
            except sqlalchemy.exc.OperationalError as error:
                if keeper.poll() is not None or time.monotonic() >= deadline:
                    raise RuntimeError(f"the server did not start: {log.read_text() if log.exists() else error}") from error
                time.sleep(0.05)
