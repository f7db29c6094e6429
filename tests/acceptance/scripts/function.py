"""A function as a service, as Lambda runs one: an invocation a line of stdin, and a freeze after each.

The platform stops the process when an invocation has returned and continues it for the next one. So the
handler flushes before it returns. Its answer, a line, is the moment at which the platform may freeze it.
"""

import sys

from asking import ask

import waxell_workers

waxell_workers.init(flush_interval=3600)


def handler(event: str) -> bool:
    try:
        ask(event)
    finally:
        delivered = waxell_workers.force_flush(30)
    return bool(delivered)


while line := sys.stdin.readline():
    print(handler(line.strip()), flush=True)
