"""The shipper's ear: a thread that takes flush requests and answers those whose time is over.

The shipper's own loop answers a request as soon as it is fulfilled; this thread answers it at its deadline,
also while the loop hangs on a server.
"""

from __future__ import annotations

import logging
import os
import selectors
import socket
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from .flush import FlushAnswer, FlushRequest, socket_path
from .segments import Position

logger = logging.getLogger("waxell_workers.shipper")

_BACKLOG = 128
_QUESTION_S = 0.5
_IDLE_S = 0.5
_RETRY_S = 0.02


@dataclass(eq=False, slots=True)
class Waiter:
    """One flush request that waits for its answer."""

    connection: socket.socket
    token: int
    deadline: float
    upto: Position | None = None
    """The journal's end at the request, as the shipper's loop finds it."""
    delivered: int = 0
    dropped: int = 0
    pending: int = -1

    def answer(self) -> None:
        """Send the answer and hang up; whoever asked may be gone."""
        answer = FlushAnswer(self.delivered, self.pending, self.dropped)
        try:
            self.connection.send(msgspec.json.encode(answer) + b"\n")
        except OSError:
            pass
        self.connection.close()


class Listener:
    """Takes requests on the directory's socket."""

    def __init__(self, directory: str, wake: Callable[[], None]) -> None:
        self._directory = directory
        self._wake = wake
        self._lock = threading.Lock()
        self._waiters: list[Waiter] = []
        self._stopping = False
        self._pid = os.getpid()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._thread = threading.Thread(target=self._run, name="waxell-flush", daemon=True)

    def start(self) -> bool:
        """Bind the socket and listen; False if that cannot be done: then every flush stays pending."""
        try:
            with socket_path(self._directory) as path:
                if os.path.lexists(path):
                    os.unlink(path)
                self._socket.bind(path)
                os.chmod(path, 0o600)
            self._socket.listen(_BACKLOG)
            self._socket.setblocking(False)
            self._thread.start()
        except (OSError, RuntimeError) as error:  # RuntimeError: no thread starts at the interpreter's end
            if self._directory not in _deaf:  # tried again and again: told once
                logger.warning("flush requests cannot be taken: %s", error)
            _deaf.add(self._directory)
            self._socket.close()
            return False
        _deaf.discard(self._directory)
        _listening.add(self)
        return True

    def waiters(self) -> list[Waiter]:
        """Return those who wait."""
        with self._lock:
            return list(self._waiters)

    def fulfil(self, waiter: Waiter) -> None:
        """Answer a request, unless its time was over first."""
        with self._lock:
            if waiter not in self._waiters:
                return
            self._waiters.remove(waiter)
        waiter.answer()

    def close(self) -> None:
        """Take no more requests and answer those who wait with what is known."""
        self._stopping = True
        try:
            with socket_path(self._directory) as path:
                os.unlink(path)
        except OSError:
            pass
        try:
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        except OSError:
            pass
        if self._thread.is_alive():
            self._thread.join(2 * _IDLE_S)
        self._socket.close()
        for waiter in self.waiters():
            self.fulfil(waiter)

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            while not self._stopping:
                deadlines = [waiter.deadline for waiter in self.waiters()]
                left = min(deadlines, default=time.monotonic() + _IDLE_S) - time.monotonic()
                if selector.select(min(_IDLE_S, max(0.0, left))):
                    self._accept()
                for waiter in self.waiters():
                    if waiter.deadline <= time.monotonic():
                        self.fulfil(waiter)

    def _accept(self) -> None:
        try:
            connection, _ = self._socket.accept()
        except OSError:  # we are closing, or there are no descriptors
            time.sleep(_RETRY_S)
            return
        try:
            connection.settimeout(_QUESTION_S)
            question = msgspec.json.decode(connection.recv(4096), type=FlushRequest)
        except (OSError, msgspec.MsgspecError):
            connection.close()
            return
        connection.setblocking(False)
        waiter = Waiter(connection, question.token, time.monotonic() + question.within_s)
        with self._lock:
            self._waiters.append(waiter)
        self._wake()

    def forget(self) -> None:
        """In a forked child: let go of the socket, with which others would go on waiting after our death."""
        if self._pid != os.getpid() and not self._stopping and self._socket.fileno() >= 0:
            self._stopping = True
            self._socket.close()


_listening: weakref.WeakSet[Listener] = weakref.WeakSet()
_deaf: set[str] = set()
"""Directories of which it was said that no requests can be taken there."""


def _forget_all() -> None:
    for listener in list(_listening):
        listener.forget()


os.register_at_fork(after_in_child=_forget_all)
