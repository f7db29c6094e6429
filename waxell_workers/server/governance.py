"""The platform's endpoints for policies, prompts and configuration: answered, so that its own client goes on.

This server decides nothing and configures nothing. Every check allows, there are no policies, no prompts and
no models, and what is only of use to a running platform (events, partial output, heartbeats, memory) is taken
and thrown away. Which fields the client reads was seen in waxell-observe 0.1.10.
"""

from __future__ import annotations

import time
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .body import Bodies, parse_object
from .model import iso
from .store import Store
from .values import text

_NOT_KEPT = (
    "observe/events/",
    "observe/runs/{run_id}/partial/",
    "observe/agents/{slug}/heartbeat/",
    "observability/runs/{run_id}/memory/episodic/",
    "observability/runs/{run_id}/memory/semantic/",
)


class Governance:
    """The endpoints beside those of runs."""

    def __init__(self, store: Store, bodies: Bodies) -> None:
        self._store = store
        self._bodies = bodies

    def routes(self) -> list[Route]:
        """Return the routes."""
        post = {
            "observe/policy-check/": self.policy_check,
            "observe/governance-decision/": self.governance_decision,
            "observe/prompt-guard/": self.prompt_guard,
        } | dict.fromkeys(_NOT_KEPT, self.not_kept)
        get = {
            "observe/policy-manifest/": self.policy_manifest,
            "observe/prompts/{name:path}/": self.prompt,
            "observe/llm-config/manifest/": self.llm_manifest,
        }
        return [
            *(Route(f"/api/v1/{path}", endpoint, methods=["POST"]) for path, endpoint in post.items()),
            *(Route(f"/api/v1/{path}", endpoint, methods=["GET"]) for path, endpoint in get.items()),
        ]

    async def policy_check(self, request: Request) -> Response:
        """Allow."""
        await self._object(request)
        return JSONResponse({"action": "allow", "reason": "", "metadata": {}, "evaluations": []})

    async def policy_manifest(self, _: Request) -> Response:
        """Answer that there are no policies; version 0 would say that there is no platform."""
        manifest: dict[str, Any] = {"manifest_version": "1", "ttl_seconds": 3600}
        return JSONResponse(manifest | {"checkpoints": [], "surfaces": {}, "policies": []})

    async def governance_decision(self, request: Request) -> Response:
        """Tell whether the run is known: told no, the client asks again for some seconds."""
        run_id = text((await self._object(request)).get("workflow_id"))
        return JSONResponse({"run_found": await run_in_threadpool(self._store.has_run, run_id)})

    async def prompt_guard(self, request: Request) -> Response:
        """Find nothing; the text comes back as it was, for a client that uses it without asking."""
        sent = text((await self._object(request)).get("text"))
        return JSONResponse({"action": "allow", "violations": [], "redacted_text": sent, "scan_time_ms": 0})

    async def prompt(self, _: Request) -> Response:
        """Answer that there is no such prompt: the client raises its own error for 404."""
        return JSONResponse({"error": "this server keeps no prompts"}, 404)

    async def llm_manifest(self, _: Request) -> Response:
        """Answer that no models are configured."""
        empty: dict[str, Any] = {"instances": [], "tenant_models": [], "groups": []}
        tenant = {"tenant_id": "local", "tenant_slug": "local", "generated_at": iso(time.time())}
        return JSONResponse({"schema_version": 1, "capability_overrides": []} | tenant | empty)

    async def not_kept(self, request: Request) -> Response:
        """Take it."""
        await self._object(request)
        return JSONResponse({})

    async def _object(self, request: Request) -> dict[str, Any]:
        return await self._bodies.process(request, parse_object)
