"""What waits in the spool, and who delivers it."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator

from ...core import inspection
from ...core.inspection import Survey
from ..spool_show import age
from .findings import Finding, Findings
from .situation import Situation

BACKLOG = "backlog"
SHIPPER = "shipper"
PATIENCE_S = 60.0
"""A record that waits longer than this, and than some flush intervals, is late."""
_LOG_TAIL = 64 << 10
_COMPLAINT = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ \d+ (WARNING|ERROR|CRITICAL) (?P<message>.*)$")
_RELIEF = "delivering again"
_DRAIN = "waxell-workers ship --drain"


def check_backlog(situation: Situation) -> Findings:
    """Say what waits, for this destination and for others."""
    if not situation.root:
        return
    survey = situation.survey
    if survey is not None and survey.segments:
        yield from _own(situation, survey)
    elif situation.settings.configured:
        yield Finding(BACKLOG, "ok", "nothing was recorded for these settings yet")
    for other in _others(situation):
        yield Finding(
            BACKLOG,
            "warn",
            f"{_waiting(other)}, for another destination: {other.destination} (another key, URL or proxy), "
            f"in {os.path.dirname(other.directory)}",
            f"deliver them with the settings of that time: {_DRAIN}",
        )


def _own(situation: Situation, survey: Survey) -> Findings:
    late_s = max(PATIENCE_S, 3 * situation.settings.flush_interval)
    if survey.ledger.problem:
        yield Finding(
            BACKLOG,
            "fail",
            f"shipper.db is damaged ({survey.ledger.problem}): what is still there is delivered again",
            "nothing: the next shipper puts it aside; waxell-workers spool verify says more",
        )
    if not survey.pending:
        yield Finding(BACKLOG, "ok", "everything that was recorded is delivered")
    elif survey.oldest_at is not None and time.time() - survey.oldest_at > late_s:
        yield Finding(
            BACKLOG,
            "warn",
            _waiting(survey),
            "see shipper and server below" if survey.shipper else f"start a worker, or run {_DRAIN}",
        )
    else:
        yield Finding(BACKLOG, "ok", _waiting(survey))
    if survey.torn:
        yield Finding(
            BACKLOG,
            "warn",
            f"{survey.torn} torn or damaged lines: writers that died in mid-write, or a full disk",
            "waxell-workers spool verify says where",
        )
    if survey.quarantined:
        yield Finding(
            BACKLOG,
            "warn",
            f"the server refused {survey.quarantined:,} records for good",
            f"{survey.directory}/quarantine.ndjson has each with the reason",
        )


def _waiting(survey: Survey) -> str:
    records = "1 record waits" if survey.pending == 1 else f"{survey.pending:,} records wait"
    return f"{records}, the oldest for {age(survey.oldest_at)}" if survey.pending else records


def _others(situation: Situation) -> Iterator[Survey]:
    """Yield the other destinations that wait, in every place where this user's workers may have recorded."""
    for place in situation.places:
        try:
            names = inspection.destinations(place.root)
        except OSError:
            continue
        for name in names:
            directory = f"{place.root}/{name}"
            if directory == situation.directory:
                continue
            try:
                found = inspection.survey(directory)
            except OSError:
                continue
            if found.pending:
                yield found


def check_shipper(situation: Situation) -> Findings:
    """Say who delivers, and what they complain of."""
    survey = situation.survey
    if survey is None or not situation.settings.configured:
        return
    yield _alive(situation, survey)
    complaint = last_complaint(f"{survey.directory}/shipper.log")
    if complaint:
        yield Finding(
            SHIPPER,
            "warn",
            f"its last complaint: {complaint}",
            f"{survey.directory}/shipper.log has more; the checks of the server below may say why",
        )
    committed_at = _committed_at(survey.directory)
    if committed_at is not None:
        yield Finding(SHIPPER, "info", f"something was last delivered or given up {age(committed_at)} ago")
    yield Finding(SHIPPER, "info", _writers(survey))


def _alive(situation: Situation, survey: Survey) -> Finding:
    if survey.shipper and _is_stopped(survey.shipper.pid):
        pid = survey.shipper.pid
        return Finding(
            SHIPPER,
            "fail",
            f"process {pid} is stopped (SIGSTOP, or a debugger): it delivers nothing, and lets nobody else",
            f"kill -CONT {pid}; or kill -KILL {pid}, and a worker starts another",
        )
    if survey.shipper:
        return Finding(SHIPPER, "ok", f"alive, process {survey.shipper.pid or 'of another pid namespace'}")
    if not survey.pending:
        return Finding(SHIPPER, "ok", "none runs, and none is needed: nothing waits")
    if situation.settings.shipper == "external":
        advice = "keep waxell-workers ship running: that is what WAXELL_SHIPPER=external asks of you"
    else:
        advice = f"start a worker, which starts one; or run {_DRAIN}"
    return Finding(SHIPPER, "warn", "none runs, and records wait", advice)


def _is_stopped(pid: int) -> bool:
    """True if a process is stopped or traced; False where the system does not say."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] in ("T", "t")
    except (OSError, IndexError):
        return False


def _writers(survey: Survey) -> str:
    if not survey.writers:
        return "no process that records is alive"
    pids = [str(writer.pid) for writer in survey.writers if writer.pid]
    which = f": {', '.join(pids[:10])}{' …' if len(pids) > 10 else ''}" if pids else ""
    return f"processes that record: {len(survey.writers)}{which}"


def last_complaint(path: str) -> str:
    """Return the shipper's last warning or error, with its time; empty if it has recovered since."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - _LOG_TAIL))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    for line in reversed(lines):
        if line.endswith(_RELIEF):
            return ""
        if _COMPLAINT.match(line):
            return line
    return ""


def _committed_at(directory: str) -> float | None:
    """Return when the ledger was last written, Unix time."""
    times = []
    for name in ("shipper.db", "shipper.db-wal"):
        try:
            times.append(os.stat(f"{directory}/{name}").st_mtime)
        except FileNotFoundError:
            continue
    return max(times, default=None)
