"""Request bodies: read within a limit, unpacked within the same limit, decoded as JSON, one at a time.

What strangers send costs a bounded amount of memory: all bodies together share `MAX_HELD`, a body becomes at
most `MAX_VALUES` objects, and only one is turned into objects at a time (the database takes one writer, and
Python one thread, anyway). Whoever finds no room is told to come again.

A body that is too large is read to its end and thrown away (up to a bound), since a client that is cut off in
the middle of sending never sees the answer that says why.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from .values import MAX_DEPTH, too_deep

MAX_BYTES = 32 * 1024 * 1024
"""The largest body that is taken, before and after unpacking."""

MAX_HELD = 4 * MAX_BYTES
"""Bytes of all bodies larger than `SMALL` that are being received or wait; those below have as much again."""

SMALL = 1024 * 1024

MAX_VALUES = 2_000_000
"""How many values one JSON text may have, as far as commas and brackets tell."""

MAX_MEMBERS = 1000
"""How many gzip members a body may have."""

BODY_S = 60.0
"""How long a client may take to send a body."""

PATIENCE_S = 10.0
"""How long a body that has arrived waits for its turn."""

_DISCARD = 4 * MAX_BYTES
_CHUNK = 64 * 1024
_T = TypeVar("_T")


class Bodies:
    """Takes request bodies, within the limits of all of them together."""

    def __init__(self) -> None:
        self._held = 0
        self._turn = asyncio.Semaphore(1)

    async def process(self, request: Request, work: Callable[[bytes], _T]) -> _T:
        """Read the body and return what `work` makes of it, in a thread.

        Raises:
            HTTPException: 413, it is larger than `MAX_BYTES`; 400, the client went away; 408, it took too
                long; 503, there is no room, or no turn within `PATIENCE_S`.
        """
        body = _Body(self)
        try:
            await asyncio.wait_for(body.receive(request), BODY_S)
            await asyncio.wait_for(self._turn.acquire(), PATIENCE_S)
        except (TimeoutError, asyncio.TimeoutError):  # the same from Python 3.11 on
            body.drop()
            raise _busy() if body.complete else _too_slow() from None
        except BaseException:
            body.drop()
            raise
        try:
            return await run_in_threadpool(work, body.take())
        finally:
            self._turn.release()
            body.drop()

    def has_room(self, size: int, more: int) -> bool:
        """Tell whether a body of `size` bytes may take `more` of them."""
        return self._held + more <= (MAX_HELD if size > SMALL else 2 * MAX_HELD)

    def hold(self, more: int) -> None:
        """Count bytes that are held; below 0: let go of."""
        self._held += more


class _Body:
    """One body, as far as it has come."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self._parts: list[bytes] = []
        self._held = 0
        self.complete = False

    async def receive(self, request: Request) -> None:
        """Read the body to its end, which is kept only if there is room for all of it."""
        refusal: HTTPException | None = None
        size = 0
        try:
            async for part in request.stream():
                size += len(part)
                if size > MAX_BYTES:
                    refusal = too_large()
                elif refusal is None and not self._bodies.has_room(size, len(part)):
                    refusal = _busy()
                if refusal is None:
                    self._parts.append(part)
                    self._held += len(part)
                    self._bodies.hold(len(part))
                else:
                    self.drop()
                if size > _DISCARD:
                    break
        except ClientDisconnect:
            raise HTTPException(400, "the body ended early") from None
        if refusal is not None:
            raise refusal
        self.complete = True

    def take(self) -> bytes:
        """Return the body, and keep none of it."""
        body = b"".join(self._parts)
        self._parts.clear()
        return body

    def drop(self) -> None:
        """Let go of what was held; a second call does nothing."""
        self._parts.clear()
        self._bodies.hold(-self._held)
        self._held = 0


def unpack(body: bytes, encoding: str) -> bytes:
    """Undo `Content-Encoding`, never holding more than `MAX_BYTES` of what comes out.

    Raises:
        HTTPException: 413, more would come out; 400, no valid gzip; 415, another encoding.
    """
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding != "gzip":
        raise HTTPException(415, "Content-Encoding: expected gzip, or none")
    parts: list[bytes] = []
    room = MAX_BYTES
    position = members = 0
    while position < len(body):  # one gzip member a turn: RFC 1952 allows several
        members += 1
        if members > MAX_MEMBERS:
            raise HTTPException(400, f"the body has more than {MAX_MEMBERS} gzip members")
        member = zlib.decompressobj(wbits=31)
        while not member.eof:
            if position >= len(body):
                raise HTTPException(400, "the body is no complete gzip")
            # in chunks: what follows a member is copied, and that would be the rest of the body each time
            chunk = body[position : position + _CHUNK]
            position += len(chunk)
            try:
                part = member.decompress(chunk, room + 1)
            except zlib.error:
                raise HTTPException(400, "the body is no valid gzip") from None
            room -= len(part)
            if room < 0:
                raise too_large()
            parts.append(part)
        position -= len(member.unused_data)
    return b"".join(parts)


def parse_object(body: bytes) -> dict[str, Any]:
    """Decode a JSON object.

    Raises:
        HTTPException: 400, it is none, or nested too deeply; 413, it has too many values.
    """
    if not is_bounded(body):
        raise HTTPException(413, f"the body has more than {MAX_VALUES:,} values")
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise HTTPException(400, f"the body is no valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise HTTPException(400, "expected a JSON object")
    if is_nested(body) and too_deep(found):
        raise HTTPException(400, f"the body is nested deeper than {MAX_DEPTH}")
    return found


def is_bounded(text: bytes) -> bool:
    """Tell whether JSON text has at most `MAX_VALUES` values: each takes far more memory than its text."""
    return text.count(b",") + text.count(b"[") + text.count(b"{") <= MAX_VALUES


def is_nested(text: bytes) -> bool:
    """Tell whether JSON text can be nested deeper than `MAX_DEPTH`; most cannot, and need no closer look."""
    return text.count(b"[") + text.count(b"{") > MAX_DEPTH


def too_large() -> HTTPException:
    """Make the error of a body beyond the limit."""
    return HTTPException(413, f"the body is larger than {MAX_BYTES} bytes", {"connection": "close"})


def _too_slow() -> HTTPException:
    return HTTPException(408, f"the body took longer than {BODY_S:g} s", {"connection": "close"})


def _busy() -> HTTPException:
    wait = {"connection": "close", "retry-after": "2"}
    return HTTPException(503, "too much is being sent at once: try again later", wait)
