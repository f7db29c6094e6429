"""Where the spool is, or would be made: the same choice as the workers', without making anything.

`core.spool.prepare` makes directories while it looks for one that it can use; a person who only wants to look
must not. Each rule here has its counterpart there.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

from ..core import spool
from ..core.config import Settings
from ..core.inspection import destinations


@dataclass(frozen=True, slots=True)
class Place:
    """A directory that may hold the spool."""

    root: str
    refused: str
    """Why it cannot be used by this user; empty if it can."""
    exists: bool
    file_system: str
    """The type, as Linux names it; empty if unknown."""


def places(settings: Settings) -> list[Place]:
    """Return the candidates, best first; a worker takes the first that is not refused."""
    return [
        Place(
            root,
            _why_not(settings, root),
            os.path.isdir(root),
            spool.file_system(os.path.realpath(_existing(root))),
        )
        for root in spool.candidates(settings)
    ]


def chosen(candidates: list[Place]) -> Place | None:
    """Return the place that a worker of this user takes, or None."""
    return next((place for place in candidates if not place.refused), None)


def found(settings: Settings) -> list[str]:
    """Return the directories of all destinations, in every place where the spool may be."""
    directories = []
    for root in spool.candidates(settings):
        try:
            directories += [f"{root}/{name}" for name in destinations(root)]
        except OSError:  # nobody has recorded there, or it is not ours
            continue
    return directories


def limit(settings: Settings, root: str) -> int:
    """Return the most that a spool may hold, in bytes; the root must exist."""
    return spool.limit(settings, f"{root}/.")


def used(root: str) -> int:
    """Return the bytes of all segments in a spool."""
    return spool.used(f"{root}/.")


def is_full(settings: Settings, directory: str) -> bool:
    """True if a destination whose directory exists can take nothing more."""
    return spool.used_here(directory) >= spool.share(settings, directory)


def _why_not(settings: Settings, root: str) -> str:
    kind = spool.file_system(os.path.realpath(_existing(root)))
    if kind in spool.NETWORK_FILE_SYSTEMS:
        return f"on a network file system ({kind})"
    if not os.path.lexists(root):
        return _unwritable(_existing(root))
    if settings.spool_dir and not os.path.isdir(root):
        return "not a directory"
    why = "" if settings.spool_dir else _not_private(root)
    directory = f"{root}/{settings.destination}"
    if why or not os.path.lexists(directory):
        return why or _unwritable(root)
    why = _not_private(directory)
    return f"{directory}: {why}" if why else ""


def _existing(path: str) -> str:
    """Return the path itself, or the nearest directory above it that exists."""
    while not os.path.lexists(path) and path != "/":
        path = os.path.dirname(path)
    return path


def _not_private(path: str) -> str:
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode):
        return "not a directory"
    if status.st_uid != os.geteuid():
        return f"belongs to another user (uid {status.st_uid})"
    return _unwritable(path)


def _unwritable(path: str) -> str:
    if not os.path.isdir(path):
        return f"{path} is not a directory"
    if os.access(path, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        return ""
    return f"{path} cannot be written to"
