"""Starting a shipper: as a process of its own beside a worker, or as a daemon thread in a script.

The process is forked twice, in a session of its own, so that it outlives a worker that is killed and leaves
no zombie behind one that lives. Nothing here waits for it. Settings and key go over a pipe: argv and
environment are for everybody to read.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import site
import sys
import threading
import time

import msgspec

from . import user_path
from .config import Settings
from .flush import FlushResult

logger = logging.getLogger("waxell_workers.shipper")

MOST_STARTS = 5
"""How often one process starts a shipper that does not stay, at intervals that double; then seldom."""
_BOOT = (
    "import os, sys\n"
    "os.setsid()\n"  # before the fork: the shipper leads no session, and its group is known by our child's id
    "if os.fork(): os._exit(0)\n"
    "os.chdir('/')\n"
    "os.umask(0o077)\n"
    "try: top = max(map(int, os.listdir('/dev/fd')))\n"
    "except OSError: top = 4095\n"
    "os.closerange(3, top + 1)\n"
    "os.execv(sys.argv[1], [sys.argv[1], '-m', 'waxell_workers.core.foreground'])\n"
)
_NEEDED = (
    *("api_key", "api_url", "exporter", "flush_interval", "flush_max_records"),
    *("spool_limit", "spool_max_age", "fsync_interval", "prices"),
)
_NOT_INHERITED = (
    *("PYTHON", "OTEL_", "DD_", "NEW_RELIC_", "SENTRY_", "COVERAGE_", "COV_CORE_"),
    *("WAXELL_", "WAX_"),  # the key, by both of its names
)
_PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")

_DEFAULT_SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGPIPE,
    signal.SIGCHLD,
    signal.SIGALRM,
)

_IMPORTS_S = 10.0
"""The longest that a fork waits for a shipper thread's imports; more would be a deadlock of somebody's."""

_intermediate: set[int] = set()
_adopted: set[int] = set()
"""What may be ours to wait for where we are process 1 of a container: a shipper, or (negative) a group."""
_threads: dict[str, _ShipperThread] = {}
_inherited: list[object] = []


def can_start_process(settings: Settings) -> bool:
    """True if this interpreter can start a Python of its own (not frozen, embedded, or under uWSGI)."""
    if getattr(sys, "frozen", False) or "uwsgi" in sys.modules or not sys.executable:
        return False
    name = os.path.basename(sys.executable)
    return name.startswith(("python", "pypy")) and os.access(sys.executable, os.X_OK)


def start(settings: Settings, directory: str, *, thread: bool) -> None:
    """Start a shipper and return at once; it gives up by itself if somebody else already ships."""
    if not thread:
        try:
            _start_process(settings, directory)
            return
        except OSError as error:
            logger.warning("no shipper process can be started (%s): shipping from a thread", error)
    _start_thread(settings, directory)


def shipper_thread(directory: str) -> threading.Thread | None:
    """Return this process's shipper thread for a directory, if one is alive here."""
    thread = _threads.get(directory)
    return thread if thread is not None and thread.pid == os.getpid() and thread.is_alive() else None


def drain_here(settings: Settings, directory: str, deadline: float) -> FlushResult | None:
    """Deliver what is there by this process's shipper thread, or on the calling thread, and stop shipping.

    At the interpreter's end no thread can be started on Python 3.12, so that nothing here tries to.

    Args:
        settings: where to.
        directory: the destination's directory.
        deadline: `time.monotonic()` in seconds.

    Returns:
        What came of it; None if somebody else has begun to ship just now.
    """
    from .shipper import Shipper

    thread = shipper_thread(directory)
    if thread is None:
        shipper = Shipper(settings, directory, stay=False)
        shipper.stop(deadline)
        if not shipper.run(0.0):
            return None
        return FlushResult(shipper.delivered, shipper.pending, shipper.rejected)
    own = _threads[directory].shipper
    delivered, rejected = own.delivered, own.rejected
    own.stop(deadline)
    thread.join(max(0.0, deadline - time.monotonic()))
    pending = max(own.pending, int(thread.is_alive()))
    return FlushResult(own.delivered - delivered, pending, own.rejected - rejected)


class _ShipperThread(threading.Thread):
    def __init__(self, settings: Settings, directory: str) -> None:
        super().__init__(name="waxell-shipper", daemon=True)
        from .shipper import Shipper

        self.pid = os.getpid()
        self.loaded = threading.Event()
        self._settings = settings
        self.shipper = Shipper(settings, directory, stay=True)

    def run(self) -> None:
        from .shipper import preload

        try:
            preload(self._settings)
        finally:
            self.loaded.set()
        self.shipper.run()


def _wait_for_imports() -> None:
    """Let a fork wait while a shipper thread imports, once in its life.

    A module that is being imported has a lock, held by the thread that imports it. A child that is forked
    then has the lock and not the thread, and hangs for ever when it needs the module itself.
    """
    for thread in list(_threads.values()):
        if thread.pid == os.getpid() and thread.is_alive() and thread is not threading.current_thread():
            thread.loaded.wait(_IMPORTS_S)


os.register_at_fork(before=_wait_for_imports)


def _start_thread(settings: Settings, directory: str) -> None:
    if shipper_thread(directory) is not None:
        return
    thread = _ShipperThread(settings, directory)
    try:
        thread.start()
    except RuntimeError as error:  # the interpreter is going down, or there are too many threads
        logger.debug("no shipper thread can be started: %s", error)
        return
    # A forked child inherits the old one, dead; it stays referenced there, so that nothing closes its files.
    _inherited.append(_threads.get(directory))
    _threads[directory] = thread


def _start_process(settings: Settings, directory: str) -> None:
    reap()
    order = {
        "directory": directory,
        "settings": {name: getattr(settings, name) for name in _NEEDED},
        "environ": _proxies_with_passwords(),
        "user_path": user_path.of_this_process() if settings.prices else [],
    }
    log = _open_log(f"{directory}/shipper.log")
    try:
        reading, writing = os.pipe()
    except OSError:
        os.close(log)
        raise
    try:
        os.write(writing, msgspec.json.encode(order) + b"\n")
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-I", "-S", "-c", _BOOT, sys.executable],
            _environment(settings.api_key),
            file_actions=[
                (os.POSIX_SPAWN_DUP2, reading, 0),
                (os.POSIX_SPAWN_DUP2, log, 1),
                (os.POSIX_SPAWN_DUP2, log, 2),
            ],
            setsigmask=[],
            setsigdef=_DEFAULT_SIGNALS,
        )
    finally:
        for descriptor in (reading, writing, log):
            os.close(descriptor)
    _intermediate.add(pid)


def _open_log(path: str) -> int:
    how = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
    try:
        return os.open(path, how | os.O_CREAT, 0o600)
    except OSError:  # a disk that is full or read-only: who is to wait for it can do without
        return os.open(os.devnull, how)


def reap() -> None:
    """Wait, without waiting, for the short-lived processes between us and the shippers that we started.

    And for those shippers, where they are our children: process 1 of a container inherits every orphan.
    """
    for pid in list(_intermediate):
        if _has_ended(pid):
            _intermediate.discard(pid)
            _adopted.add(-pid)  # it has made a group of its own, in which it has left the shipper
    for target in list(_adopted):
        if _has_ended(target):
            _adopted.discard(target)


def adopt(pid: int) -> None:
    """Wait for a shipper that another process has started, if it is, or becomes, our child."""
    if pid > 0:
        _adopted.add(pid)


def _has_ended(target: int) -> bool:
    """True if a child, or (negative) one of a process group, was waited for, or there is none of ours."""
    try:
        return os.waitpid(target, os.WNOHANG)[0] != 0
    except ChildProcessError:  # somebody else waited for it, or it is another's
        return True


def _proxies_with_passwords() -> dict[str, str]:
    found = {name: os.environ[name] for name in _PROXIES if "@" in os.environ.get(name, "")}
    return {name: value for name, value in found.items() if value.isascii()}  # no other is a URL


def _environment(key: str) -> dict[str, str]:
    """Return our environment without secrets, and without what would instrument or misdirect the shipper."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_NOT_INHERITED) and not (key and key in value)
    }
    for name in _proxies_with_passwords():
        kept.pop(name, None)
    kept["PYTHONSAFEPATH"] = "1"
    kept["WAXELL_OBSERVE"] = "false"
    found = _import_path()
    if found:
        kept["PYTHONPATH"] = os.pathsep.join(found)
    return kept


def _import_path() -> list[str]:
    """Return the directories, beyond Python's own, from which the shipper must import its few packages."""
    standard = {os.path.realpath(path) for path in [*site.getsitepackages(), site.getusersitepackages()]}
    found = []
    for name in ("waxell_workers", "msgspec", "httpx"):
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.origin:
            continue
        path = os.path.realpath(os.path.dirname(os.path.dirname(spec.origin)))
        if path not in standard and path not in found:
            found.append(path)
    return found
