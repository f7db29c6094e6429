"""The run that an agent has for a whole day: whoever asks for it before midnight gets the same one."""

from __future__ import annotations

import hashlib
import re
from typing import Any

from starlette.exceptions import HTTPException

from .model import iso
from .store import Store
from .values import dumps, text
from .writes import Start

_DATE = re.compile(r"\d{4}-\d\d-\d\d")


def daily(store: Store, body: dict[str, Any], at: float) -> dict[str, Any]:
    """Return the run of an agent's day, started by the first request for it.

    Args:
        store: where runs are kept.
        body: `agent_slug`, `agent_type`, and the client's own `date`; without one, today's in UTC.
        at: when the request arrived, in Unix seconds.

    Raises:
        HTTPException: 400, there is no `agent_slug`.
    """
    slug, kind = text(body.get("agent_slug")), text(body.get("agent_type"))
    if not slug:
        raise HTTPException(400, "agent_slug: expected a string that is not empty")
    date = text(body.get("date"))
    if not _DATE.fullmatch(date):
        date = iso(at)[:10]
    run_id = "daily-" + hashlib.sha256(dumps([slug, kind, date]).encode()).hexdigest()[:32]
    start = Start(
        agent_name=slug,
        workflow_name="daily",
        started_at=at,
        source="rest",
        metadata={"date": date} | ({"agent_type": kind} if kind else {}),
    )
    with store.write() as writer:
        created = writer.start(run_id, start)
        started_at = writer.started_at(run_id)
    reply = {"run_id": run_id, "workflow_id": run_id, "started_at": iso(started_at)}
    return reply | {"date": date, "created": created}
