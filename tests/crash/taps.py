"""Two taps outside all processes that are killed: one before the server, one on the disk.

`Wire` stands between shippers and server. It knows when the server said of a record that it has it, how often
each came, and loses an answer when told to, so that the shipper must repeat a request that was carried out.
`Disk` holds every segment open from its first moment, so that its bytes can be read after it was deleted.
"""

from __future__ import annotations

import gzip
import http.client
import json
import os
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

_LOOK_S = 0.003
_KEPT_S = 3.0
"""How long a deleted segment is held: whoever had it open has written his last line by then."""
_SERVER_S = 30.0


class Wire:
    """A proxy before the server."""

    def __init__(self) -> None:
        self.server_url = ""
        """Where requests go; changed when the server is started anew."""
        self.sent: Counter[str] = Counter()
        """How often each record id went to the server."""
        self.arrived: dict[str, float] = {}
        """When (`time.monotonic()`) the server first said that it has a record, by what that is about."""
        self.rejected: dict[str, str] = {}
        self.lost_answers = 0
        self.answer_to_lose = threading.Event()
        self.other_paths: set[str] = set()
        self._begun = threading.Condition()
        self._begun_count = 0
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"wire": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        self._http.block_on_close = False
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> Wire:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(10)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def await_request(self, timeout_s: float) -> bool:
        """Wait until the next batch comes by."""
        with self._begun:
            seen = self._begun_count
            return self._begun.wait_for(lambda: self._begun_count > seen, timeout_s)

    def pass_on(self, request: BaseHTTPRequestHandler) -> tuple[int, bytes] | None:
        """Have the server answer a request; None if nobody is to get an answer."""
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        is_batch = request.command == "POST"
        if is_batch:
            with self._begun:
                self._begun_count += 1
                self._begun.notify_all()
            if not request.path.endswith("/ingest/"):
                self.other_paths.add(request.path)
        answer = self._ask_server(request, body)
        if not is_batch or answer is None:
            return answer
        self._note(body, *answer)
        if answer[0] == 200 and self.answer_to_lose.is_set():
            self.answer_to_lose.clear()
            self.lost_answers += 1
            return None
        return answer

    def _ask_server(self, request: BaseHTTPRequestHandler, body: bytes) -> tuple[int, bytes] | None:
        server = http.client.HTTPConnection(urlsplit(self.server_url).netloc, timeout=_SERVER_S)
        headers = {
            name: value
            for name, value in request.headers.items()
            if name.lower() not in ("host", "connection")
        }
        try:
            server.request(request.command, request.path, body, headers)
            reply = server.getresponse()
            return reply.status, reply.read()
        except (OSError, http.client.HTTPException):  # it was killed, or is not up again
            return None
        finally:
            server.close()

    def _note(self, body: bytes, status: int, reply: bytes) -> None:
        now = time.monotonic()
        records = [json.loads(line) for line in gzip.decompress(body).splitlines() if line]
        rejected = json.loads(reply)["rejected"] if status == 200 else []
        with self._lock:
            self.rejected.update((item["id"], item["reason"]) for item in rejected)
            for record in records:
                self.sent[record["id"]] += 1
                if status == 200:
                    self.arrived.setdefault(subject(record), now)


class _Handler(BaseHTTPRequestHandler):
    wire: Wire
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        answer = self.wire.pass_on(self)
        if answer is None:
            self.close_connection = True
            return
        status, body = answer
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:  # who asked was killed
            self.close_connection = True


def subject(record: dict[str, Any]) -> str:
    """Return what a record is about, as the writers' notes name it: a marker, or what became of a run."""
    kind = record["kind"]
    if kind == "llm_call":
        return str(record["metadata"]["marker"])
    if kind == "step":
        return str(record["name"])
    if kind == "run_updated":
        return next(iter(record["tags"]))
    return f"{kind} {record['run_id']}"


class Disk:
    """Whoever looks at the spool every few milliseconds, and remembers each line of it."""

    def __init__(self, spool: Path) -> None:
        self._spool = spool
        self._held: dict[int, tuple[int, float]] = {}
        """Segment's number to its descriptor and, once it was deleted, the time of that."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.highest = 0
        self.seen: set[int] = set()
        self.lines: Counter[str] = Counter()
        """How often each record was written in full, by its id."""
        self.places: dict[str, list[int]] = {}
        """What a record is about to the segments in which it stands."""
        self.torn = 0

    def __enter__(self) -> Disk:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)
        for number in list(self._held):
            self._digest(number)

    def directory(self) -> Path | None:
        """Return the one destination's directory, once it is there."""
        return next((path for path in self._spool.glob("*") if path.is_dir()), None)

    def await_rotation(self, timeout_s: float) -> bool:
        """Wait until the next segment appears; look as often as can be."""
        before, deadline = self._numbers()[-1:], time.monotonic() + timeout_s
        while self._numbers()[-1:] == before:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.0005)
        return True

    def _numbers(self) -> list[int]:
        directory = self.directory()
        if directory is None:
            return []
        return sorted(int(name[:-7]) for name in os.listdir(directory) if name[:-7].isdecimal())

    def _watch(self) -> None:
        while not self._stop.wait(_LOOK_S):
            for number in self._numbers():
                if number not in self.seen:
                    self._hold(number)
            now = time.monotonic()
            for number, (descriptor, deleted_at) in list(self._held.items()):
                if deleted_at and now - deleted_at > _KEPT_S:
                    self._digest(number)
                elif not deleted_at and os.fstat(descriptor).st_nlink == 0:
                    self._held[number] = (descriptor, now)

    def _hold(self, number: int) -> None:
        try:
            descriptor = os.open(f"{self.directory()}/{number:06d}.ndjson", os.O_RDONLY)
        except FileNotFoundError:
            return
        self.seen.add(number)
        self.highest = max(self.highest, number)
        self._held[number] = (descriptor, 0.0)

    def _digest(self, number: int) -> None:
        descriptor, _ = self._held.pop(number)
        with open(descriptor, "rb") as segment:
            *lines, rest = segment.read().split(b"\n")
        self.torn += bool(rest)
        for line in filter(None, lines):
            try:
                record = json.loads(line)
            except ValueError:
                self.torn += 1
                continue
            if record["kind"] == "segment":
                continue
            self.lines[record["id"]] += 1
            about = subject(record)
            self.places.setdefault(about, []).append(number)
