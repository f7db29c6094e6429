"""The shape REST: the request sequence of one run, as the platform's own client speaks it.

`start`, `llm-calls`, `steps`, `spans`, `complete`, each acknowledging exactly its records as soon as the
server has taken them, so that what fails later repeats nothing. Calls are the money: they are never sent
again once acknowledged, and never given up. Spans are detail (durations, times, ids) about calls that the
server has: those that could not be sent wait in memory, bounded, and are all that dies with the shipper.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import quote

from ..core.exporting import RunBatch
from ..core.records import LLMCall, Record, RunEnded, RunStarted, RunUpdated, Step, TaskLost
from . import bodies
from .answers import Answer, Verdict
from .delivery import Closed, Delivery

RUNS = "/api/v1/observe/runs/"
SPANS_PER_RUN = 50_000
"""The platform's client sends no more (WIRE section 5)."""
SPANS_WAITING = 10_000
"""Spans kept in memory over all runs."""
CONTENT_WAITING = 16 << 20
"""Characters of messages and answers that wait with them; beyond, spans have the previews only."""
SPANS_ATTEMPTS = 3
"""A server that is up but cannot take a run's spans is asked so often; then the run goes without."""

_RUN_ID = re.compile(r"(?!\.{1,2}$)[!-~]{1,200}")
"""What can stand in an address; anything else would stand in the way of its run for ever."""

_DONE = Answer(Verdict.OK)


@dataclass(slots=True)
class _Waiting:
    spans: list[dict[str, Any]] = field(default_factory=list)
    content: int = 0
    """Characters of content in them."""
    failures: int = 0
    rooted: bool = False
    """The root span is among the spans, or was sent."""


class SpanQueue:
    """Spans that are not at the server yet, by run. Each run is touched by one thread at a time."""

    def __init__(self) -> None:
        self.dropped = 0
        """Spans given up: refused, too many, or tried often enough."""
        self._runs: dict[str, _Waiting] = {}
        self._lock = threading.Lock()

    def of(self, run_id: str) -> _Waiting:
        """Return what waits for a run."""
        with self._lock:
            return self._runs.setdefault(run_id, _Waiting())

    def add(self, run_id: str, span: dict[str, Any]) -> None:
        """Queue a span, unless there are too many."""
        with self._lock:
            if sum(len(waiting.spans) for waiting in self._runs.values()) >= SPANS_WAITING:
                self.dropped += 1
                return
            content = bodies.content_size(span)
            if content and content + sum(each.content for each in self._runs.values()) > CONTENT_WAITING:
                span, content = bodies.without_content(span), 0
            waiting = self._runs.setdefault(run_id, _Waiting())
            waiting.spans.append(span)
            waiting.content += content

    def clear(self, run_id: str, *, dropped: int = 0) -> None:
        """Forget a run's spans; they are delivered, or given up."""
        with self._lock:
            self.dropped += dropped
            if waiting := self._runs.get(run_id):
                waiting.spans, waiting.content, waiting.failures = [], 0, 0
                if not waiting.rooted:
                    del self._runs[run_id]

    def forget(self, run_id: str) -> None:
        """Forget a run that has been closed."""
        with self._lock:
            self._runs.pop(run_id, None)


class RunDelivery:
    """The delivery of one run's records. A job: call it.

    Args:
        delivery: The export call's ledger.
        batch: The run and its records; the `RunState` is brought up to date on the way.
        spans: The exporter's queue.
    """

    def __init__(self, delivery: Delivery, batch: RunBatch, spans: SpanQueue) -> None:
        self._delivery = delivery
        self._run = batch.run
        self._records = batch.records
        self._spans = spans
        self._run_id = batch.run.started.run_id

    def __call__(self) -> None:
        """Deliver what can be delivered now."""
        try:
            answer = self._sequence()
            if answer.verdict is Verdict.MISSING:
                self._forget_remote()
                answer = self._sequence()
            if answer.verdict in (Verdict.RETRY, Verdict.MISSING):
                self._delivery.fail(answer.reason, self._run_id)
        except Closed:
            pass  # the deadline has passed: what this thread has just done counts as unknown

    def _sequence(self) -> Answer:
        left = [record for record in self._records if not self._delivery.settled(record.id)]
        self._fold(left)
        if any(isinstance(record, (RunStarted, LLMCall, Step, RunEnded)) for record in left):
            answer = self._start(left)
            if answer.verdict is not Verdict.OK:
                return answer
        for deliver in (self._calls, self._steps):
            answer = deliver(left)
            if answer.verdict is not Verdict.OK:
                return answer
        ends = [record for record in left if isinstance(record, RunEnded)]
        answer = self._details(ends[0] if ends else None)
        if not ends or answer.verdict is not Verdict.OK:
            return answer
        return self._complete(ends)

    def _fold(self, left: Sequence[Record]) -> None:
        with self._delivery.writing() as outcome:
            for record in left:
                if isinstance(record, RunUpdated):
                    self._run.started = bodies.fold(self._run.started, record)
                    outcome.acknowledged.add(record.id)
                elif isinstance(record, TaskLost):
                    outcome.acknowledged.add(record.id)  # the shipper has made a RunEnded of it

    def _start(self, left: Sequence[Record]) -> Answer:
        beginnings = [record.id for record in left if isinstance(record, RunStarted)]
        if self._run.remote_id:
            self._delivery.acknowledge(beginnings)
            return _DONE
        answer = self._delivery.post("start", f"{RUNS}start/", bodies.start(self._run.started))
        refusal = answer.reason if answer.verdict is Verdict.REFUSED else ""
        if refusal:
            # Its calls are worth more than its inputs: without those, and they go to quarantine.
            bare = bodies.start(self._run.started, bare=True)
            answer = self._delivery.post("start", f"{RUNS}start/", bare)
        if answer.verdict is Verdict.REFUSED:
            if not self._delivery.refused("start", [record.id for record in left], answer.reason):
                return self._delivery.refuses_all("start", answer.reason)
            return answer
        if answer.verdict is Verdict.MISSING:
            self._delivery.pause(answer.reason)
            return replace(answer, verdict=Verdict.PAUSE)
        if answer.verdict is not Verdict.OK:
            return answer
        remote_id = (answer.body or {}).get("run_id")
        if not isinstance(remote_id, str) or not _RUN_ID.fullmatch(remote_id):
            return replace(answer, verdict=Verdict.RETRY, reason=f"{answer.reason}, no run_id")
        with self._delivery.writing() as outcome:
            self._run.remote_id = remote_id
            if refusal:
                reason = f"{refusal}, started without inputs and metadata"
                outcome.rejected.update(dict.fromkeys(beginnings, reason))
            else:
                outcome.acknowledged.update(beginnings)
        return _DONE

    def _calls(self, left: Sequence[Record]) -> Answer:
        calls = [self._delivery.priced(record) for record in left if isinstance(record, LLMCall)]
        if not calls:
            return _DONE

        def send(part: Sequence[LLMCall]) -> Answer:
            return self._post(
                "llm-calls", {"calls": [bodies.call(call) for call in part], "hardware_uuid": ""}
            )

        def taken(part: Sequence[LLMCall], answer: Answer) -> None:
            with self._delivery.writing() as outcome:
                for call in part:
                    outcome.acknowledged.add(call.id)
                    if self._run.spans < SPANS_PER_RUN:
                        self._run.spans += 1
                        span = bodies.llm_span(call, self._run.started, self._run.spans)
                        self._spans.add(self._run_id, span)

        return self._delivery.bisect("llm-calls", calls, lambda call: call.id, send, taken)

    def _steps(self, left: Sequence[Record]) -> Answer:
        steps = [record for record in left if isinstance(record, Step)]
        if not steps:
            return _DONE

        def send(part: Sequence[Step]) -> Answer:
            return self._post("steps", {"steps": [bodies.step(step) for step in part], "hardware_uuid": ""})

        def taken(part: Sequence[Step], answer: Answer) -> None:
            self._delivery.acknowledge(step.id for step in part)

        return self._delivery.bisect("steps", steps, lambda step: step.id, send, taken)

    def _details(self, ended: RunEnded | None) -> Answer:
        if not self._run.remote_id:
            return _DONE
        waiting = self._spans.of(self._run_id)
        if ended is not None and not waiting.rooted:
            with self._delivery.writing():
                waiting.rooted = True
                self._spans.add(self._run_id, bodies.root_span(self._run.started, ended))
        if not waiting.spans:
            self._spans.clear(self._run_id)
            return _DONE
        answer = self._post("spans", {"spans": waiting.spans})
        with self._delivery.writing():
            if answer.verdict is Verdict.OK:
                self._spans.clear(self._run_id)
                return _DONE
            if answer.verdict is Verdict.RETRY and not answer.down:
                waiting.failures += 1
            if answer.verdict in (Verdict.REFUSED, Verdict.MISSING) or waiting.failures >= SPANS_ATTEMPTS:
                self._spans.clear(self._run_id, dropped=len(waiting.spans))
                return _DONE
        # As long as the end is still to come, they can wait for it: nothing else needs to be tried again.
        return answer if ended is not None or answer.verdict is Verdict.PAUSE else _DONE

    def _complete(self, ends: Sequence[RunEnded]) -> Answer:
        ids = [ended.id for ended in ends]
        answer = self._post("complete", bodies.complete(self._run.started, ends[0]))
        if answer.verdict is Verdict.REFUSED:
            refusal = answer.reason
            answer = self._post("complete", bodies.complete(self._run.started, ends[0], bare=True))
            if answer.verdict is Verdict.OK:
                self._delivery.reject(ids, f"{refusal}, completed without result and error")
            elif answer.verdict is Verdict.REFUSED:
                if not self._delivery.refused("complete", ids, answer.reason):
                    return self._delivery.refuses_all("complete", answer.reason)
                self._spans.forget(self._run_id)
                return answer
        if answer.verdict is Verdict.OK:
            with self._delivery.writing() as outcome:
                outcome.acknowledged.update(set(ids) - outcome.rejected.keys())
                self._spans.forget(self._run_id)
        return answer

    def _post(self, name: str, payload: object) -> Answer:
        return self._delivery.post(name, f"{RUNS}{quote(self._run.remote_id, safe='')}/{name}/", payload)

    def _forget_remote(self) -> None:
        with self._delivery.writing():
            self._run.remote_id = ""
            self._spans.of(self._run_id).rooted = False
