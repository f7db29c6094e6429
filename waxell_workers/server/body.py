"""Request bodies: read within a limit, unpacked within the same limit, decoded as JSON.

A body that is too large is read to its end and thrown away (up to a bound), since a client that is cut off in
the middle of sending never sees the answer that says why.
"""

from __future__ import annotations

import zlib
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

MAX_BYTES = 32 * 1024 * 1024
"""The largest body that is taken, before and after unpacking."""

_DISCARD = 4 * MAX_BYTES


async def receive(request: Request) -> bytes:
    """Read the body as it was sent.

    Raises:
        HTTPException: 413, it is larger than `MAX_BYTES`; 400, the client went away.
    """
    parts: list[bytes] = []
    size = 0
    try:
        async for part in request.stream():
            size += len(part)
            if size <= MAX_BYTES:
                parts.append(part)
            elif size > _DISCARD:
                break
    except ClientDisconnect:
        raise HTTPException(400, "the body ended early") from None
    if size > MAX_BYTES:
        raise too_large()
    return b"".join(parts)


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
    while body:  # one gzip member a turn: RFC 1952 allows several
        member = zlib.decompressobj(wbits=31)
        try:
            part = member.decompress(body, room + 1)
        except zlib.error:
            raise HTTPException(400, "the body is no valid gzip") from None
        room -= len(part)
        if room < 0:
            raise too_large()
        if not member.eof:
            raise HTTPException(400, "the body is no complete gzip")
        parts.append(part)
        body = member.unused_data
    return b"".join(parts)


def parse_object(body: bytes) -> dict[str, Any]:
    """Decode a JSON object.

    Raises:
        HTTPException: 400, it is none.
    """
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise HTTPException(400, f"the body is no valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise HTTPException(400, "expected a JSON object")
    return found


def too_large() -> HTTPException:
    """Make the error of a body beyond the limit."""
    return HTTPException(413, f"the body is larger than {MAX_BYTES} bytes")
