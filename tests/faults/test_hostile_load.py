"""Many at once: two hundred clients that write, read and leave, and a store that stays within its size."""

from __future__ import annotations

import gzip
import json
import random
import socket
import sqlite3
import threading
import time
from collections import Counter
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import httpx

from tests.faults.hostile import (
    ANSWER_S,
    API,
    INGEST,
    NO_TLS,
    NOW,
    call,
    ended,
    ndjson,
    request,
    serving,
    started,
)
from tests.torture import effort, found

CLIENTS = 200
MEMORY_MIB = 500


def test_two_hundred_clients_are_all_answered_and_every_record_is_stored_once(tmp_path: Path) -> None:
    """Given 200 clients at once that send, repeat, read every page and leave, all is stored, exactly once."""
    rounds = effort(1, 20)
    statuses: Counter[str] = Counter()
    unexpected: list[str] = []
    gate = threading.Barrier(CLIENTS)

    with serving(tmp_path) as server:
        server.forget_memory()

        def client(name: int) -> None:
            def told(kind: str, method: str, path: str, **options: Any) -> None:
                answer = connection.request(method, path, **options)
                while answer.status_code == 503:  # a busy machine: nothing was stored, and it may come again
                    statuses["sent away"] += 1
                    time.sleep(float(answer.headers["retry-after"]))
                    answer = connection.request(method, path, **options)
                statuses[f"{kind} {answer.status_code}"] += 1
                if answer.status_code != 200:
                    unexpected.append(f"{kind}: {answer.status_code} {answer.text[:200]}")

            with httpx.Client(base_url=server.url, timeout=ANSWER_S * 3, verify=NO_TLS) as connection:
                gate.wait(ANSWER_S * 3)
                for n in range(rounds):
                    run = f"r{name}-{n}"
                    batch = [started(run), *(call(run, f"{run}-c{k}") for k in range(5)), ended(run)]
                    body = gzip.compress(ndjson(batch))
                    for _ in range(2):  # a repeat, as after an answer that was lost
                        told("ingest", "POST", INGEST, content=body, headers={"content-encoding": "gzip"})
                    ours = {"waxell": {"run_id": f"rest-{run}"}}
                    told("start", "POST", f"{API}/runs/start/", json={"agent_name": "a", "metadata": ours})
                    sent = {"calls": [{"model": "m", "tokens_in": 1}] * 3}
                    told("calls", "POST", f"{API}/runs/rest-{run}/llm-calls/", json=sent)
                    for path in ("/", "/api/runs", f"/runs/{run}", f"/api/runs/rest-{run}", "/api/stats"):
                        told("read", "GET", path)
                    leave(server.port, random.Random(name * 1000 + n))

        def guarded(name: int) -> None:
            try:
                client(name)
            except Exception as error:  # noqa: BLE001  whatever it is, it is a finding
                unexpected.append(repr(error))

        threads = [threading.Thread(target=guarded, args=(name,)) for name in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        peak = server.memory_mib()
        stats = server.get("/api/stats").json()
        away = statuses.pop("sent away", 0)
        found(
            "clients at once", clients=CLIENTS, answers=sum(statuses.values()), sent_away=away, peak_mib=peak
        )
        assert unexpected == []
        runs = CLIENTS * rounds
        assert statuses == {
            "ingest 200": 2 * runs,
            "start 200": runs,
            "calls 200": runs,
            "read 200": 5 * runs,
        }
        assert stats["runs"] == {"success": runs, "running": runs}
        assert (stats["calls"], stats["accepted"], stats["duplicates"]) == (8 * runs, 7 * runs, 7 * runs)
        assert "database is locked" not in server.said
        assert "Traceback" not in server.said
        assert peak < MEMORY_MIB
        assert server.end() == 0
    with closing(sqlite3.connect(server.db)) as connection:
        assert connection.execute(
            "SELECT count(*), count(DISTINCT call_id) FROM calls WHERE call_id <> ''"
        ).fetchone() == (
            5 * runs,
            5 * runs,
        )
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def leave(port: int, chance: random.Random) -> None:
    """Begin a request and go away: in its headers, its body or its answer."""
    body = ndjson([started("left")])
    whole = request("POST", INGEST, body=body)
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), ANSWER_S) as connection:
        connection.sendall(whole[: chance.randrange(1, len(whole) - 1)])
        if chance.random() < 0.5:  # a reset instead of an end
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")


SMALL = (
    "import waxell_workers.server.store as store\n"
    "store.MAX_SIZE = 4 << 20\n"
    "keep = store.Store.__init__.__kwdefaults__\n"
    "keep['max_size'], keep['max_runs'] = 4 << 20, 400\n"
)
"""A store of 4 MiB and 400 runs, in the process itself."""


def test_the_file_stays_within_its_size_while_many_write(tmp_path: Path) -> None:
    """Given writers that send many times what may be kept, the file is bounded, and the newest runs stay."""
    runs = effort(60, 400)
    with serving(tmp_path, before=SMALL) as server:
        failed: list[str] = []

        def writer(name: int) -> None:
            with httpx.Client(base_url=server.url, timeout=ANSWER_S, verify=NO_TLS) as connection:
                for n in range(runs):
                    run = f"w{name}-{n:05d}"
                    at = NOW + n
                    batch = [
                        started(run) | {"at": at},
                        call(run, f"c-{run}", prompt="p" * 20_000) | {"at": at},
                        ended(run) | {"at": at + 1},
                    ]
                    answer = connection.post(INGEST, content=ndjson(batch))
                    if answer.status_code != 200 or answer.json()["accepted"] != 3:
                        failed.append(answer.text)

        def reader() -> None:
            with httpx.Client(base_url=server.url, timeout=ANSWER_S, verify=NO_TLS) as connection:
                while any(thread.is_alive() for thread in threads):
                    listed = connection.get("/api/runs?limit=1000")
                    shown = connection.get("/")
                    if {listed.status_code, shown.status_code} != {200}:
                        failed.append(listed.text)
                        return

        threads = [threading.Thread(target=writer, args=(name,)) for name in range(8)]
        readers = [threading.Thread(target=reader) for _ in range(2)]
        for thread in [*threads, *readers]:
            thread.start()
        for thread in [*threads, *readers]:
            thread.join()
        listed = server.get("/api/runs?limit=1000").json()["runs"]
        size = server.db.stat().st_size
        found("runs sent to a small store", sent=8 * runs, kept=len(listed), file_kib=size // 1024)
        assert failed == []
        assert 50 < len(listed) < min(8 * runs, 401)  # some were deleted: the limit was met
        assert size < (6 << 20)
        assert {f"w{name}-{runs - 1:05d}" for name in range(8)} <= {run["run_id"] for run in listed}
        assert server.end() == 0
    with closing(sqlite3.connect(server.db)) as connection:
        for table in ("calls", "records"):
            query = f"SELECT count(*) FROM {table} WHERE run_id NOT IN (SELECT run_id FROM runs)"
            assert connection.execute(query).fetchone() == (0,)
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_one_run_alone_cannot_fill_the_disk(tmp_path: Path) -> None:
    """Given a run that never ends and is larger than all that may be kept, the file stays bounded."""
    with serving(tmp_path, before=SMALL) as server:
        for n in range(effort(20, 100)):
            body = json.dumps(call("endless", f"e{n}", prompt="p" * 1_000_000)).encode()
            assert server.post(INGEST, body).status_code == 200
        assert server.db.stat().st_size < (8 << 20)
        server.send(started("after"))
        assert server.get("/runs/after").status_code == 200
