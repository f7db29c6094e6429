"""Hearing what the shipper warns of: the library keeps to its loggers, a command tells its user."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class _Hearing(logging.Handler):
    def __init__(self, heard: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._heard = heard

    def emit(self, record: logging.LogRecord) -> None:
        self._heard(record.getMessage())


@contextmanager
def complaints(heard: Callable[[str], None]) -> Iterator[None]:
    """Call `heard` with each warning of ours inside the block, instead of whoever listens otherwise."""
    logger, handler = logging.getLogger("waxell_workers"), _Hearing(heard)
    propagates = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates
