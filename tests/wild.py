"""Answers of servers that are out of their mind: what `mode("raw", play=…)` of `tests.faulty` does.

A play is handed a connection whose request was read, and a function that says whether the fault still stands.
"""

from __future__ import annotations

import gzip
import json
import socket
import time
import zlib
from collections.abc import Callable
from typing import Any

Still = Callable[[], bool]
Play = Callable[[socket.socket, Still], None]

_POLL_S = 0.02
BOMB_BYTES = 256 << 20
"""What a bomb is after it was unpacked."""


def response(status: int = 200, body: bytes | object = b"", **headers: str) -> bytes:
    """Return a response; a body that is not bytes goes out as JSON."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = {"Content-Type": "application/json", "Content-Length": str(len(content))}
    head |= {name.replace("_", "-"): value for name, value in headers.items()}
    return b"".join([_head(status, head), content])


def _head(status: int, headers: dict[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} Whatever", *(f"{name}: {value}" for name, value in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def says(*parts: bytes) -> Play:
    """Say it and hang up."""

    def play(connection: socket.socket, still: Still) -> None:
        connection.sendall(b"".join(parts))

    return play


def answers(status: int = 200, body: bytes | object = b"", **headers: str) -> Play:
    """Give a whole answer."""
    return says(response(status, body, **headers))


def says_and_hangs(*parts: bytes) -> Play:
    """Say it, and leave the client waiting for more."""

    def play(connection: socket.socket, still: Still) -> None:
        connection.sendall(b"".join(parts))
        while still():
            time.sleep(_POLL_S)

    return play


def goes_on(beginning: bytes, more: bytes, interval_s: float = 0.0) -> Play:
    """Say the beginning, and then more of the same, without end."""

    def play(connection: socket.socket, still: Still) -> None:
        connection.sendall(beginning)
        while still():
            connection.sendall(more)
            if interval_s:
                time.sleep(interval_s)

    return play


def trickles(beginning: bytes, rest: bytes, interval_s: float = 0.05) -> Play:
    """Say the beginning at once and the rest byte by byte, over and over."""

    def play(connection: socket.socket, still: Still) -> None:
        connection.sendall(beginning)
        while True:
            for at in range(len(rest)):
                if not still():
                    return
                connection.sendall(rest[at : at + 1])
                time.sleep(interval_s)

    return play


CHUNKED = _head(200, {"Content-Type": "application/json", "Transfer-Encoding": "chunked"})


def chunk(content: bytes) -> bytes:
    """Return a chunk of a chunked body."""
    return f"{len(content):x}\r\n".encode() + content + b"\r\n"


def bomb(times: int = 1) -> bytes:
    """Return an answer that is short as it comes, and huge once it is unpacked `times` times."""
    packer = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS | 16)
    megabyte = b" " * (1 << 20)
    packed = b"".join([*(packer.compress(megabyte) for _ in range(BOMB_BYTES >> 20)), packer.flush()])
    for _ in range(times - 1):
        packed = gzip.compress(packed)
    return response(200, packed, Content_Encoding=", ".join(["gzip"] * times))


def packed(value: Any) -> bytes:
    """Return a healthy answer that is compressed, although nobody asked for that."""
    return response(200, gzip.compress(json.dumps(value).encode()), Content_Encoding="gzip")
