"""Ids that are unique over processes, forks and hosts, made without a lock.

A process takes a random prefix once and counts; a forked child notices its new pid and takes a prefix of
its own. 80 random bits and a counter of 48 make 32 hexadecimal digits, the form of a W3C trace id.
"""

from __future__ import annotations

import os
from itertools import count

_pid = 0
_prefix = ""
_counter = count(1)


def new_id() -> str:
    """Return 32 hexadecimal digits, unique; safe in signal handlers, threads and forked children."""
    global _pid, _prefix
    pid = os.getpid()
    if pid != _pid:
        # Two threads may renew at once: each assignment yields a prefix that is good by itself.
        _prefix = os.urandom(10).hex()
        _pid = pid
    return f"{_prefix}{next(_counter):012x}"
