"""Connections that do not wait for ever: uvicorn waits for a request's headers as long as a client likes.

A client that trickles headers, or never reads its answer, holds a descriptor and, at worst, memory; with a
thousand of them, nobody else gets in. Bodies have a limit of their own, in `body`.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

PATIENCE_S = 20.0
"""How long a connection may be without a request under way, and without reading what was answered."""

_LOOKS_S = PATIENCE_S / 4


class PatientProtocol(H11Protocol):
    """HTTP/1.1, for a while."""

    _watch: asyncio.TimerHandle | None = None
    _idle_s = 0.0
    _unread = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        self._watch = self.loop.call_later(_LOOKS_S, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._watch is not None:
            self._watch.cancel()
        super().connection_lost(exc)

    def resume_writing(self) -> None:
        self._idle_s = 0.0  # somebody reads
        super().resume_writing()

    def _look(self) -> None:
        """Cut the connection off if nothing has come of it for too long."""
        unread, before = self.transport.get_write_buffer_size(), self._unread
        self._unread = unread
        # an answer is under way until its last byte is handed to the kernel
        at_work = self.cycle is not None and not self.cycle.response_complete
        if (at_work and not unread) or unread < before:
            self._idle_s = 0.0
        else:
            self._idle_s += _LOOKS_S
        if self._idle_s >= PATIENCE_S:
            self.transport.abort()
            return
        self._watch = self.loop.call_later(_LOOKS_S, self._look)
