"""Ids that are unique over processes, forks and hosts, made without a lock.

A process takes 80 random bits and a random start once, and counts; a forked child notices its new pid and
takes its own. Together they make 32 hexadecimal digits, the form of a W3C trace id. The count comes first,
in large odd steps, so that a few digits tell the runs of one process apart. It is in the right half, too,
added to what is random there: that half alone is the trace for systems of 64 bits, and what samplers go by.
"""

from __future__ import annotations

import os
from itertools import count

_STEP = 0x9E3779B97F4B  # odd: every multiple up to 2**48 is another number
_MASK = (1 << 48) - 1
_RIGHT_STEP = 0x9E3779B97F4A7C15  # likewise, up to 2**64
_RIGHT_MASK = (1 << 64) - 1

_pid = 0
_base = 0
_right = 0
_process = ""
_counter = count(1)


def new_id() -> str:
    """Return 32 hexadecimal digits, unique; safe in signal handlers, threads and forked children."""
    global _pid, _base, _right, _process
    pid = os.getpid()
    if pid != _pid:
        # Two threads may renew at once: each assignment yields values that are good by themselves.
        _base = int.from_bytes(os.urandom(6), "big")
        _right = int.from_bytes(os.urandom(8), "big")
        _process = os.urandom(2).hex()
        _pid = pid
    number = next(_counter)
    right = (_right + number * _RIGHT_STEP) & _RIGHT_MASK
    return f"{(_base + number * _STEP) & _MASK:012x}{_process}{right:016x}"
