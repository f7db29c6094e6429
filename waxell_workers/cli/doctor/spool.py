"""Where records wait: which directory, whether it can be written to, and whether it lasts."""

from __future__ import annotations

import os
import stat

from ..spool_places import Place, is_full, limit, used
from ..spool_show import size
from .findings import Finding, Findings
from .situation import Situation

AREA = "spool"
MEMORY = ("tmpfs", "ramfs", "devtmpfs")
IN_CONTAINER = ("overlay", "aufs", "fuse.fuse-overlayfs")
LITTLE_SPACE = 100 << 20
FEW_INODES = 1000
NEARLY_FULL = 0.8


def check(situation: Situation) -> Findings:
    """Find the spool, as a worker of this user would."""
    if situation.problem or not situation.settings.observe:
        return
    for place in situation.places:
        if not place.refused:
            yield from _usable(situation, place)
            return
        yield _refused(situation, place)
    yield Finding(
        AREA,
        "fail",
        "no directory can hold the journal: every record is dropped",
        "set WAXELL_SPOOL_DIR to a directory on a local disk to which the workers' user may write",
    )


def _refused(situation: Situation, place: Place) -> Finding:
    text = f"{place.root} is not used: {place.refused}"
    if "another user" in place.refused:
        advice = "run this as the workers' user"
    elif "network" in place.refused:
        advice = "set WAXELL_SPOOL_DIR to a directory on a local disk"
    else:
        advice = "if the workers run as this user, make it usable, or set WAXELL_SPOOL_DIR"
    return Finding(AREA, "warn", text, advice)


def _usable(situation: Situation, place: Place) -> Findings:
    kind = place.file_system or "an unknown file system"
    made = "" if place.exists else ", made at the first record"
    yield Finding(AREA, "ok", f"{place.root} ({kind}{made}), as user {_user()}")
    yield from _lasting(place)
    yield from _space(place)
    if place.exists:
        yield from _filled(situation, place)
        yield from _private(situation)


def _lasting(place: Place) -> Findings:
    if place.file_system in MEMORY:
        yield Finding(
            AREA,
            "warn",
            f"it is memory ({place.file_system}): what waits there is lost with the host or the container",
            "set WAXELL_SPOOL_DIR to a directory on a disk",
        )
    elif place.file_system in IN_CONTAINER:
        yield Finding(
            AREA,
            "warn",
            "it is inside the container: what waits there is lost with the container",
            "mount a volume, and set WAXELL_SPOOL_DIR to it",
        )


def _space(place: Place) -> Findings:
    root = place.root
    while not os.path.isdir(root):
        root = os.path.dirname(root)
    status = os.statvfs(root)
    free = status.f_bavail * status.f_frsize
    inodes = f"{status.f_favail:,} inodes" if status.f_files else "inodes without limit"
    text = f"{size(free)} and {inodes} free"
    if free < LITTLE_SPACE or (status.f_files and status.f_favail < FEW_INODES):
        yield Finding(AREA, "warn", f"{text}: records are dropped when it is full", "free some space")
    else:
        yield Finding(AREA, "ok", text)


def _filled(situation: Situation, place: Place) -> Findings:
    most, filled = limit(situation.settings, place.root), used(place.root)
    text = f"{size(filled)} used of {size(most)}"
    advice = "see why nothing is delivered (server, shipper); or set WAXELL_SPOOL_LIMIT to more"
    here = situation.directory
    if filled >= most or (os.path.isdir(here) and is_full(situation.settings, here)):
        yield Finding(AREA, "fail", f"{text}: full, records are dropped", advice)
    elif filled > NEARLY_FULL * most:
        yield Finding(AREA, "warn", text, advice)
    else:
        yield Finding(AREA, "ok", text)


def _private(situation: Situation) -> Findings:
    try:
        mode = stat.S_IMODE(os.lstat(situation.directory).st_mode)
    except FileNotFoundError:
        return
    if mode & 0o077:
        yield Finding(
            AREA,
            "warn",
            f"{situation.directory} can be read by others (mode {mode:03o})",
            f"chmod 700 {situation.directory}; a worker does so when it starts",
        )


def _user() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a container's user without an entry
        return f"uid {os.geteuid()}"
