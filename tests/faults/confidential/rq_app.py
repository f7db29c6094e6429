"""The confidential tasks under RQ."""

import os

from work import REDACT, end

import waxell_workers

REDIS_URL = os.environ["BROKER_URL"]
waxell_workers.init(redact=REDACT)


def task(how: str, ticket: str, *, customer: str) -> str:
    """Do one task."""
    return end(how, ticket, customer)
