"""The database: how a connection to it is opened, and what a file may be.

A file of an older version is brought up to this one (`migration`). A file of ours that is damaged is moved
aside, whole, and a new one begun: clients then have somewhere to send to again. Any other file is left alone.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from pathlib import Path

from ..core.errors import ConfigError
from . import migration
from .tables import TABLES

logger = logging.getLogger("waxell_workers.server")

VERSION = 3
"""`PRAGMA user_version` of a database of ours."""

APPLICATION = 0x57615857
"""`PRAGMA application_id` of a database of ours: many programs count their versions from 1, too."""

SIDE_FILES = ("-wal", "-shm", "-journal")
"""What SQLite keeps beside a database."""

BUSY_S = 5.0
"""How long a write waits for another process that holds the file locked."""

_DAMAGE = ("malformed", "not a database")
_HEADER = b"SQLite format 3\0"


def connect(path: Path, *, query_only: bool, version: int = VERSION) -> sqlite3.Connection:
    """Open one connection in autocommit mode; the caller begins and ends transactions.

    Args:
        path: the file.
        query_only: True to read only.
        version: the version of a file that is read as it is.

    Raises:
        sqlite3.Error: the file cannot be opened, or is no database.
    """
    # any thread may use it, one at a time: the store sees to that
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw",
        uri=True,
        timeout=BUSY_S,
        isolation_level=None,
        check_same_thread=False,
    )
    try:
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA synchronous = NORMAL")  # a commit survives the death of the process
        if query_only:
            if version < VERSION:
                migration.hide(connection, version)
            connection.execute("PRAGMA query_only = ON")
    except BaseException:
        connection.close()
        raise
    return connection


def create(path: Path) -> sqlite3.Connection:
    """Open the database for writing, and make the file (0600) and its tables if there are none.

    A file of ours that is damaged is moved aside first; see `move_aside`.

    Raises:
        ConfigError: the path cannot be used, or holds something else.
    """
    try:
        return _open(path)
    except sqlite3.Error as error:
        if not (is_damage(error) and _is_ours(path)):
            raise _unusable(path, error) from None
        move_aside(path, str(error))
    try:
        return _open(path)
    except sqlite3.Error as error:
        raise _unusable(path, error) from None


def _open(path: Path) -> sqlite3.Connection:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise _unusable(path, error) from None
    connection = connect(path, query_only=False)
    try:
        empty = not _number(connection, "user_version") and not _tables(connection)
        # before anything is changed: it may be another program's
        if not empty and check(connection, path) < VERSION:
            _examine(connection)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("BEGIN IMMEDIATE")
        version = _number(connection, "user_version")
        if version == 0 and not _tables(connection):
            migration.execute(connection, TABLES)
            connection.execute(f"PRAGMA application_id = {APPLICATION}")
        elif version < VERSION:
            logger.info("%s is of version %d: it is brought up to version %d", path, version, VERSION)
            migration.upgrade(connection, version)
        if version != VERSION:  # setting it, to whatever, writes to the file
            connection.execute(f"PRAGMA user_version = {VERSION}")
        connection.execute("COMMIT")
        check(connection, path)
        _examine(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def check(connection: sqlite3.Connection, path: Path) -> int:
    """Make sure that this is a database of ours, in a version that this code reads, and return that.

    Raises:
        ConfigError: it is not.
        sqlite3.Error: it cannot be read.
    """
    found = _number(connection, "user_version")
    if not 1 <= found <= VERSION:
        raise ConfigError(
            "db", str(path), f"expected a database of this server (version {VERSION}, not {found})"
        )
    # the first databases had no application id
    if _number(connection, "application_id") != APPLICATION and "records" not in _tables(connection):
        raise ConfigError("db", str(path), "expected a database of this server, not another program's")
    return found


def examine(path: Path) -> None:
    """Read the whole file anew, past what other connections remember, and see whether it is damaged.

    Raises:
        sqlite3.Error: it is, or it cannot be read.
    """
    connection = connect(path, query_only=True)
    try:
        _examine(connection)
    finally:
        connection.close()


def _examine(connection: sqlite3.Connection) -> None:
    complaint = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if complaint != "ok":
        raise sqlite3.DatabaseError(f"malformed: {complaint}".replace("\n", " "))


def is_damage(error: sqlite3.Error) -> bool:
    """Tell whether this error says that the file is damaged; others pass (a full disk, a lock)."""
    return any(word in str(error) for word in _DAMAGE)


def move_aside(path: Path, reason: str) -> None:
    """Rename a damaged database, with what belongs to it, and say so. Nothing is deleted.

    Raises:
        ConfigError: the directory cannot be written.
    """
    aside = Path(f"{path}.damaged-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{os.getpid()}")
    try:
        os.rename(path, aside)
        for suffix in SIDE_FILES:
            if os.path.exists(f"{path}{suffix}"):
                os.rename(f"{path}{suffix}", f"{aside}{suffix}")
    except OSError as error:
        raise _unusable(path, error) from None
    logger.error("%s is damaged (%s): it is now %s, and a new one is begun", path, reason, aside.name)


def _is_ours(path: Path) -> bool:
    """Tell by the file's header, which is all that can be trusted, whether it was made by this server."""
    try:
        with path.open("rb") as file:
            header = file.read(100)
    except OSError:
        return False
    version, application = header[60:64], header[68:72]
    return (
        header.startswith(_HEADER)
        and 1 <= int.from_bytes(version, "big") <= VERSION
        and int.from_bytes(application, "big") in (0, APPLICATION)
    )


def _unusable(path: Path, error: Exception) -> ConfigError:
    if isinstance(error, sqlite3.Error) and is_damage(error):
        return ConfigError("db", str(path), f"expected a database of this server; move this away ({error})")
    return ConfigError("db", str(path), f"expected a file that can be written ({error})")


def _number(connection: sqlite3.Connection, pragma: str) -> int:
    return int(connection.execute(f"PRAGMA {pragma}").fetchone()[0])


def _tables(connection: sqlite3.Connection) -> set[str]:
    return {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
