"""Empty databases for tests: SQLite files, and PostgreSQL from a server that lives as long as the tests."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import psycopg

_USER = "tests"
_numbers = count(1)


def postgres_is_here() -> bool:
    return shutil.which("initdb") is not None and shutil.which("postgres") is not None


@contextmanager
def postgres_server() -> Generator[Path]:
    """A server that listens on a socket in the folder it gives, and nowhere else."""
    account = _account()
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    try:
        if account is not None:
            os.chown(folder, account.pw_uid, account.pw_gid)
        user = account.pw_name if account else None
        settings = ["-U", _USER, "-A", "trust", "-E", "UTF8", "--no-sync", "--locale=C"]
        subprocess.run(
            ["initdb", "-D", folder / "data", *settings],
            check=True,
            capture_output=True,
            user=user,
            group=account.pw_gid if account else None,
            cwd=folder,
        )
        server = subprocess.Popen(
            ["postgres", "-D", folder / "data", "-k", folder, "-c", "listen_addresses=", "-F"],
            stderr=subprocess.PIPE,
            text=True,
            user=user,
            group=account.pw_gid if account else None,
            cwd=folder,
        )
        try:
            assert server.stderr is not None
            said = []
            for line in server.stderr:
                said.append(line)
                if "ready to accept connections" in line:
                    break
            else:
                raise RuntimeError("".join(said))
            yield folder
        finally:
            server.terminate()
            server.communicate()
    finally:
        shutil.rmtree(folder)


def new_postgres_database(folder: Path) -> str:
    """The URL of an empty schema, which is made much faster than a database."""
    name = f"test{next(_numbers)}"
    with psycopg.connect(f"host={folder} user={_USER} dbname=postgres", autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {name}".encode())
    return f"postgresql://{_USER}@/postgres?host={folder}&options=-csearch_path%3D{name}"


def _account() -> pwd.struct_passwd | None:
    """PostgreSQL refuses to run as root."""
    return pwd.getpwnam("nobody") if os.geteuid() == 0 else None
