"""A synthetic run, the whole way: into the journal, through the shipper, to the server.

It is marked as synthetic, and named so that nobody takes it for a task. It goes as every record goes: where a
shipper is at work, that one delivers it; else what waits is delivered here, and this run after it.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ...core import foreground
from ...core.encoding import encode
from ...core.flush import FlushResult, request_flush
from ...core.ids import new_id
from ...core.inspection import holders
from ...core.journal import Journal
from ...core.records import LLMCall, Record, RunEnded, RunStarted
from ..complaints import complaints
from .findings import Finding, Findings
from .shipping import last_complaint
from .situation import Situation

AREA = "end to end"
AGENT = "waxell-workers.doctor"
_MARK = {"synthetic": True}
_SHIP = "everything stays in the journal; waxell-workers ship --drain tries again"


def check(situation: Situation) -> Findings:
    """Write a run, have it delivered, and say what became of it."""
    if not situation.settings.configured:
        return
    in_the_way = situation.failed & {"spool", "server"}
    if in_the_way:
        yield Finding(AREA, "info", f"no synthetic run was sent: {' and '.join(sorted(in_the_way))} failed")
    elif not situation.send:
        yield Finding(AREA, "info", "no synthetic run was sent, as you asked")
    else:
        yield from _try(situation)


def _try(situation: Situation) -> Findings:
    began = time.monotonic()
    journal = Journal(situation.settings)
    records = synthetic_run(journal.token())
    written = sum(journal.append(encode(record)) for record in records)
    if written < len(records):
        reasons = ", ".join(journal.dropped)
        yield Finding(
            AREA, "fail", f"the journal refuses records ({reasons})", "see the checks of the spool above"
        )
        return
    deadline = began + situation.timeout_s
    if holders(f"{journal.directory}/ship.lock"):
        yield _by_shipper(journal, deadline, began)
    else:
        yield _by_hand(situation, deadline, began)


def synthetic_run(token: int) -> list[Record]:
    """Return the records of a run with one call, which cost nothing."""
    run_id, now = new_id(), time.time()
    return [
        RunStarted(
            id=run_id,
            at=now,
            proc=token,
            run_id=run_id,
            agent_name=AGENT,
            workflow_name="doctor",
            metadata=_MARK,
            root_run_id=run_id,
            trace_id=run_id,
        ),
        LLMCall(
            id=new_id(),
            at=now,
            proc=token,
            run_id=run_id,
            model="synthetic",
            provider="waxell-workers",
            cost_usd=0.0,
            duration_ms=0.0,
            metadata=_MARK,
        ),
        RunEnded(id=f"{run_id}-end", at=time.time(), proc=token, run_id=run_id, duration_ms=0.0),
    ]


def _by_shipper(journal: Journal, deadline: float, began: float) -> Finding:
    answer = request_flush(journal.directory, journal.token(), deadline)
    complaint = last_complaint(f"{journal.directory}/shipper.log")
    if answer is None:
        return _pending("the running shipper did not answer", complaint)
    result = FlushResult(answer.delivered, abs(answer.pending), answer.dropped)
    return _verdict(result, "by the running shipper", began, complaint)


def _by_hand(situation: Situation, deadline: float, began: float) -> Finding:
    heard: list[str] = []
    with _signals_kept(), complaints(heard.append):
        try:
            left = max(0.1, deadline - time.monotonic())
            result = foreground.run(situation.settings, drain=True, timeout=left)
        except OSError as error:
            return _pending(f"nothing can be shipped ({error.strerror or error})", "")
    return _verdict(result, "from here, since no shipper runs", began, heard[-1] if heard else "")


def _verdict(result: FlushResult, how: str, began: float, complaint: str) -> Finding:
    if result:
        took_ms = (time.monotonic() - began) * 1000
        return Finding(AREA, "ok", f"a synthetic run ({AGENT}) was delivered {how}, in {took_ms:.0f} ms")
    if result.dropped:
        text = f"the server refused {result.dropped} records"
        return Finding(AREA, "fail", text, "quarantine.ndjson in the spool has the reason of each")
    return _pending(f"{result.pending:,} records are still pending", complaint)


def _pending(what: str, complaint: str) -> Finding:
    return Finding(AREA, "fail", f"the synthetic run was not delivered: {complaint or what}", _SHIP)


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Put back the signal handlers that shipping in the foreground replaces."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
