"""The local server's application in this process: requests to it, and the records of a run."""

from __future__ import annotations

import asyncio
import gzip
import json
from typing import Any

import httpx

API = "/api/v1/observe"
INGEST = f"{API}/ingest/"
NOW = 1_790_000_000.0


class Client:
    """Requests to an application in this process, one event loop each."""

    def __init__(self, app: Any, address: str = "http://127.0.0.1:4319") -> None:
        self._app = app
        self._address = address

    def request(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        async def once() -> httpx.Response:
            transport = httpx.ASGITransport(app=self._app)
            async with httpx.AsyncClient(transport=transport, base_url=self._address) as client:
                return await client.request(method, path, **arguments)

        return asyncio.run(once())

    def get(self, path: str, **arguments: Any) -> httpx.Response:
        return self.request("GET", path, **arguments)

    def post(self, path: str, json: Any = None, **arguments: Any) -> httpx.Response:
        return self.request("POST", path, **({} if json is None else {"json": json}), **arguments)

    def send(self, *records: dict[str, Any]) -> dict[str, Any]:
        """Post records to ingest, compressed, as the shipper does."""
        lines = "\n".join(json.dumps(record) for record in records)
        answer = self.post(
            INGEST, content=gzip.compress(lines.encode()), headers={"content-encoding": "gzip"}
        )
        assert answer.status_code == 200, answer.text
        return answer.json()

    def run(self, run_id: str) -> dict[str, Any]:
        answer = self.get(f"/api/runs/{run_id}")
        assert answer.status_code == 200, answer.text
        return answer.json()


def started(run_id: str = "r1", **more: Any) -> dict[str, Any]:
    record = {"kind": "run_started", "id": f"s-{run_id}", "at": NOW, "run_id": run_id, "agent_name": "triage"}
    return record | {"workflow_name": "celery"} | more


def call(record_id: str = "c1", run_id: str = "r1", **more: Any) -> dict[str, Any]:
    record = {"kind": "llm_call", "id": record_id, "at": NOW + 1, "run_id": run_id, "model": "gpt-4o-mini"}
    return record | {"tokens_in": 10, "tokens_out": 5, "cost_usd": 0.001} | more


def ended(run_id: str = "r1", **more: Any) -> dict[str, Any]:
    return {"kind": "run_ended", "id": f"e-{run_id}", "at": NOW + 2, "run_id": run_id} | more
