"""Ids that are unique over processes, forks and hosts, made without a lock.

A process takes 80 random bits and a random start once, and counts; a forked child notices its new pid and
takes its own. Together they make 32 hexadecimal digits, the form of a W3C trace id. The count comes first,
in large odd steps, so that a few digits tell the runs of one process apart.
"""

from __future__ import annotations

import os
from itertools import count

_STEP = 0x9E3779B97F4B  # odd: every multiple up to 2**48 is another number
_MASK = (1 << 48) - 1

_pid = 0
_base = 0
_process = ""
_counter = count(1)


def new_id() -> str:
    """Return 32 hexadecimal digits, unique; safe in signal handlers, threads and forked children."""
    global _pid, _base, _process
    pid = os.getpid()
    if pid != _pid:
        # Two threads may renew at once: each assignment yields values that are good by themselves.
        _base = int.from_bytes(os.urandom(6), "big")
        _process = os.urandom(10).hex()
        _pid = pid
    return f"{(_base + next(_counter) * _STEP) & _MASK:012x}{_process}"
