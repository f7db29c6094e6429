"""How the conformance suite drives a FastAPI app under uvicorn: tasks come by HTTP, one request each."""

import json
import socket
import sys
import time
import urllib.request
import uuid
from pathlib import Path

from waxell_workers.testing.conformance import Expected, Mode, Site, Worker, witness
from waxell_workers.testing.conformance.driver import ENQUEUE, OUTLIVES, REPLACED, THREADS

STARTED = "Application startup complete."
ANSWER_S = 60.0
"""The longest that the app may take to answer, on a busy machine."""
POLL_S = 0.005


class FastAPIDriver:
    """uvicorn, alone or with its worker processes."""

    framework = "fastapi"
    modes = (
        Mode("1 worker", frozenset({THREADS, ENQUEUE}), default=True, broker=""),
        Mode("2 workers", frozenset({THREADS, ENQUEUE, OUTLIVES, REPLACED}), broker=""),
    )
    controls = {
        # what Starlette makes of it once the client has its answer
        "HTTPException": Expected(
            "error", "RuntimeError: Caught handled exception, but response already started."
        ),
        "CancelledError": Expected("interrupted", "CancelledError: not today", "interrupted: "),
    }
    failed = "ValueError: the answer has 30 characters"
    soft_limit_error = ""

    def command(self, mode: Mode, site: Site, *, slots: int, recycle: bool = False) -> list[str]:
        """Return uvicorn's command line; the slots are the requests that `send` has open at once."""
        command = [sys.executable, "-m", "uvicorn", "scenarios:app", "--port", str(site.port)]
        return [*command, *(["--workers", "2"] if mode.name == "2 workers" else [])]

    def ready(self, worker: Worker) -> bool:
        """True once each process has started the app, and somebody listens, which comes after that."""
        processes = 2 if worker.mode.name == "2 workers" else 1
        return worker.text.count(STARTED) >= processes and _listens(worker.site.port)

    def send(
        self,
        worker: Worker,
        scenario: str,
        *arguments: object,
        soft_limit_s: float | None = None,
        hard_limit_s: float | None = None,
    ) -> str:
        """Post once an earlier request has left a slot free; return a name of our own for the task."""
        deadline = time.monotonic() + ANSWER_S
        while _count(worker, "arrived") - _count(worker, "returned") >= worker.slots:
            assert time.monotonic() < deadline, f"no free slot within {ANSWER_S:.0f} s"
            time.sleep(POLL_S)
        handle = uuid.uuid4().hex
        request = urllib.request.Request(
            f"http://127.0.0.1:{worker.site.port}/scenarios/{scenario}",
            json.dumps({"arguments": arguments}).encode(),
            {"Content-Type": "application/json", "X-Handle": handle, "Connection": "close"},
        )
        with urllib.request.urlopen(request, timeout=ANSWER_S) as response:
            assert response.status == 202
        return handle

    def done(self, worker: Worker) -> int:
        """Count the requests whose call has come back to the server, which is after their tasks."""
        return _count(worker, "returned")

    def outcome(self, worker: Worker, handle: str) -> str:
        """Return the exception that has come through to the server, or `returned`."""
        for note in witness.notes(_notes(worker), "outcome"):
            name, _, outcome = note.marker.partition(" ")
            if name == handle:
                return outcome
        return ""


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=ANSWER_S).close()
    except ConnectionError:
        return False
    return True


def _notes(worker: Worker) -> Path:
    return Path(worker.site.settings["WITNESS"])


def _count(worker: Worker, event: str) -> int:
    path = _notes(worker)
    return (b"\n" + path.read_bytes()).count(f"\n{event} ".encode()) if path.exists() else 0


DRIVER = FastAPIDriver()
