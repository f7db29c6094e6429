"""Where the journal lives: a directory on a local disk, private to us, per destination.

Relies on the environment only through `candidates`; creates nothing before `prepare` is called, which a
worker does at boot and a script at its first record.
"""

from __future__ import annotations

import logging
import os
import stat
import tempfile

from .config import Settings

logger = logging.getLogger("waxell_workers.spool")

MEMORY_LIMIT = 16 << 20
"""Most that is kept in `/dev/shm`, in bytes: it is memory."""
DISK_LIMIT = 512 << 20
_CLOCK_S = 1.0
"""How much coarser the clock of a file system may be than ours."""
_MEMORY = "/dev/shm"
NETWORK_FILE_SYSTEMS = (
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "lustre", "beegfs"),
    *("fuse.sshfs", "fuse.glusterfs", "fuse.s3fs"),
)
_refused: set[str] = set()


class SpoolUnavailable(OSError):
    """No directory can hold the journal."""


def candidates(settings: Settings) -> list[str]:
    """Return the directories that may hold the spool, best first; a configured one stands alone."""
    if settings.spool_dir:
        return [os.path.abspath(settings.spool_dir)]
    found = []
    systemd = os.environ.get("STATE_DIRECTORY", "").split(":")[0]
    if systemd:
        found.append(f"{systemd}/waxell-workers")
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    if os.path.isabs(state):
        found.append(f"{state}/waxell-workers")
    try:
        found.append(f"{tempfile.gettempdir()}/waxell-workers-{os.geteuid()}")
    except FileNotFoundError:  # no temporary directory can be written to
        pass
    found.append(f"{_MEMORY}/waxell-workers-{os.geteuid()}")
    return found


def prepare(settings: Settings) -> str:
    """Make the destination's directory, private to this user, and return its path.

    Raises:
        SpoolUnavailable: no candidate can be used; the message says why for each.
    """
    reasons = []
    for root in candidates(settings):
        try:
            if not settings.spool_dir:
                _make_private(root)
            else:
                os.makedirs(root, 0o700, exist_ok=True)
            _refuse_network(root)
            directory = f"{root}/{settings.destination}"
            _make_private(directory)
        except OSError as error:
            reasons.append(f"{root}: {error.strerror or error}")
            continue
        return directory
    raise SpoolUnavailable(f"no usable spool directory ({'; '.join(reasons)})")


def is_private(settings: Settings, directory: str) -> bool:
    """True if what `prepare` has returned is still a directory of ours, and no link to another."""
    try:
        return _is_ours(directory) and (bool(settings.spool_dir) or _is_ours(os.path.dirname(directory)))
    except OSError:
        return False


def _is_ours(path: str) -> bool:
    status = os.lstat(path)
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077


def is_writable(directory: str) -> bool:
    """True if files can be made in a directory, as far as rights and the mount say."""
    return os.access(directory, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)


def written_since(settings: Settings, moment: float) -> bool:
    """True if somebody has written to the journal since `moment` (Unix time); creates nothing."""
    for root in candidates(settings):
        directory = f"{root}/{settings.destination}"
        try:
            segments = [name for name in os.listdir(directory) if name[:1].isdecimal()]
            if any(os.stat(f"{directory}/{name}").st_mtime >= moment - _CLOCK_S for name in segments):
                return True
        except OSError:  # not there, or a segment was deleted meanwhile: then somebody ships
            continue
    return False


def limit(settings: Settings, directory: str) -> int:
    """Return the most that the whole spool may hold, in bytes."""
    if settings.spool_limit:
        return settings.spool_limit
    space = os.statvfs(directory)
    most = MEMORY_LIMIT if directory.startswith(f"{_MEMORY}/") else DISK_LIMIT
    return min(most, (space.f_bavail * space.f_frsize + used(directory)) // 10)


def share(settings: Settings, directory: str) -> int:
    """Return the most that one destination may hold, in bytes: seven eighths of what the others leave.

    So a destination whose server is down, or whose key is no longer taken, never has all of the limit.
    """
    others = used(directory) - used_here(directory)
    return (limit(settings, directory) - others) * 7 // 8


def used(directory: str) -> int:
    """Return the bytes of all segments, of this destination and those beside it."""
    return _bytes_below(os.path.dirname(directory))


def used_here(directory: str) -> int:
    """Return the bytes of this destination's segments."""
    return _bytes_below(directory)


def _bytes_below(path: str) -> int:
    total = 0
    for parent, _, names in os.walk(path):
        for name in names:
            if not name[:1].isdecimal():
                continue
            try:
                total += os.lstat(f"{parent}/{name}").st_size
            except OSError:  # deleted since the listing
                continue
    return total


def _make_private(path: str) -> None:
    os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode):
        raise SpoolUnavailable(f"{path} is not a directory")
    if status.st_uid != os.geteuid():
        raise SpoolUnavailable(f"{path} belongs to another user")
    if stat.S_IMODE(status.st_mode) & 0o077:
        os.chmod(path, 0o700)
    if not is_writable(path):
        raise SpoolUnavailable(f"{path} cannot be written to")


def _refuse_network(path: str) -> None:
    kind = file_system(os.path.realpath(path))
    if kind not in NETWORK_FILE_SYSTEMS:
        return
    if path not in _refused:
        _refused.add(path)
        logger.warning("spool directory %s is on a network file system (%s): not used", path, kind)
    raise SpoolUnavailable(f"{path} is on a network file system ({kind})")


def file_system(path: str) -> str:
    """Return the type of the file system that holds `path`, as Linux names it; empty if unknown."""
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
            lines = mounts.read().splitlines()
    except OSError:  # not Linux
        return ""
    best, kind = "", ""
    for line in lines:
        left, _, right = line.partition(" - ")
        mount = left.split(" ")[4]
        inside = mount == "/" or path == mount or path.startswith(f"{mount}/")
        if inside and len(mount) >= len(best):
            best, kind = mount, right.split(" ")[0]
    return kind
