"""Delivering the backlog of one destination to another, because a person has said so: after a change of keys.

Nothing is copied: the shipper of today's settings works in the other directory, with that directory's lock
and ledger. So it may be killed at any instruction and begun again, and to `ingest` each record still goes
once. It takes what was there when it began, if nobody lived then; never a record that is made meanwhile.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from .abandoned import InUse, is_ours
from .config import Settings
from .flush import FlushResult
from .inspection import destinations
from .liveness import Procs, ship_lock
from .segments import segment_numbers
from .shipper import Shipper


def adoptable(settings: Settings, root: str) -> list[str]:
    """Return the destinations of a spool that could be adopted, by name: not the settings' own, and unused.

    Raises:
        OSError: the spool cannot be read.
    """
    return [
        name
        for name in destinations(root)
        if name != settings.destination and not why_not(settings, f"{root}/{name}")
    ]


def why_not(settings: Settings, directory: str) -> str:
    """Return why a destination's directory cannot be adopted just now, or an empty string."""
    if os.path.basename(directory) == settings.destination:
        return "it is the destination of these settings: ship --drain delivers it"
    if not is_ours(directory):
        return "it is not a directory of this user"
    try:
        if not segment_numbers(directory):
            return "nothing was recorded there"
        if Procs(directory).anyone_alive():
            return "a process lives that records to it"
        if ship_lock(directory).taken():
            return "a shipper works there"
    except OSError as error:
        return error.strerror or str(error)
    return ""


def adopt(
    settings: Settings,
    directory: str,
    *,
    timeout: float,
    progress: Callable[[int, int], None] | None = None,
) -> FlushResult:
    """Deliver what another destination's directory holds to the destination of these settings.

    Args:
        settings: where to.
        directory: the other destination's directory.
        timeout: the seconds after which to give up; what remains is kept there.
        progress: called with the records delivered and those known to be pending.

    Returns:
        What was delivered, what is still there, and what the server rejected.

    Raises:
        InUse: it cannot be adopted; the message says why.
    """
    reason = why_not(settings, directory)
    if reason:
        raise InUse(f"{directory}: {reason}")
    shipper = Shipper(settings, directory, stay=False, progress=progress, adopts=True)
    shipper.stop(time.monotonic() + timeout)
    if not shipper.run(0.0):
        raise InUse(f"{directory}: a shipper works there")
    return FlushResult(shipper.delivered, shipper.pending, shipper.rejected)
