"""The shape `ingest`: whole batches as compressed NDJSON in one request, idempotent by record id.

For a server whose configuration offers it; ours does. A line is a record exactly as `core.records` defines
it, so nothing is lost in translation, and a request of unknown outcome can be repeated without harm.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import msgspec

from ..core.exporting import RunBatch
from ..core.records import LLMCall, Record
from .answers import Answer, Verdict
from .delivery import Delivery
from .transport import EncodingError, encode

BODY_LIMIT = 4 << 20
"""Bytes of a request's body before compression; one larger record goes alone."""
_HEADERS = {"Content-Type": "application/x-ndjson", "Content-Encoding": "gzip"}
_NAME = "ingest"
_REASON = len(_NAME) + 2 + 200
"""Characters of a reason that are kept."""


@dataclass(frozen=True, slots=True)
class _Line:
    id: str
    json: bytes


def deliver(delivery: Delivery, path: str, batches: Sequence[RunBatch]) -> Answer:
    """Send all records of all runs, those of a run in their order.

    Returns:
        The answer that ended it: MISSING if there is no such endpoint (any more).
    """
    answer = Answer(Verdict.OK)
    for part in _cut(_lines(delivery, batches)):
        answer = delivery.bisect(
            _NAME,
            part,
            lambda line: line.id,
            lambda lines: _post(delivery, path, lines),
            lambda lines, reply: _settle(delivery, lines, reply),
        )
        if answer.verdict is not Verdict.OK:
            break
    return answer


def _lines(delivery: Delivery, batches: Iterable[RunBatch]) -> Iterator[_Line]:
    for batch in batches:
        for record in batch.records:
            try:
                line = encode(_whole(delivery, record, batch))
            except EncodingError as error:
                delivery.reject([record.id], f"{_NAME}: cannot be encoded ({error})")
            else:
                yield _Line(record.id, line)


def _whole(delivery: Delivery, record: Record, batch: RunBatch) -> Record:
    if not isinstance(record, LLMCall):
        return record
    if not record.run_id:  # made outside any run: it belongs to the one that it has been grouped into
        record = msgspec.structs.replace(record, run_id=batch.run.started.run_id)
    return delivery.priced(record)


def _cut(lines: Iterable[_Line]) -> Iterator[list[_Line]]:
    part: list[_Line] = []
    size = 0
    for line in lines:
        if part and size + len(line.json) + 1 > BODY_LIMIT:
            yield part
            part, size = [], 0
        part.append(line)
        size += len(line.json) + 1
    if part:
        yield part


def _post(delivery: Delivery, path: str, lines: Sequence[_Line]) -> Answer:
    body = gzip.compress(b"".join(line.json + b"\n" for line in lines), compresslevel=5, mtime=0)

    def send() -> Answer:
        answer = delivery.transport.post_bytes(_NAME, path, body, _HEADERS, delivery.deadline)
        if answer.verdict is Verdict.OK and answer.body is None:
            # The reply says which records were rejected; without it nothing is known. A repeat is harmless.
            return replace(answer, verdict=Verdict.RETRY, reason=f"{answer.reason}, no JSON object")
        if answer.verdict is Verdict.OK:
            return _account(answer, lines)
        if answer.status == 405:
            return replace(answer, verdict=Verdict.MISSING)
        return answer

    return delivery.request(_NAME, send)


def _account(answer: Answer, lines: Sequence[_Line]) -> Answer:
    """Believe a reply only if it accounts for each record that was sent."""
    body = answer.body or {}
    accepted, duplicates = (body.get(name) for name in ("accepted", "duplicates"))
    if not _is_count(accepted):
        return replace(answer, verdict=Verdict.RETRY, reason=f"{answer.reason}, no count of records")
    rejected = {line.id for line in lines} & dict(_rejected(body.get("rejected"))).keys()
    if accepted + (duplicates if _is_count(duplicates) else 0) + len(rejected) < len(lines):
        # Something in there has no answer; a repeat is harmless, and in halves it will be found.
        return replace(answer, verdict=Verdict.REFUSED, reason=f"{answer.reason}, not accounted for")
    return answer


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _settle(delivery: Delivery, lines: Sequence[_Line], answer: Answer) -> None:
    rejected = dict(_rejected((answer.body or {}).get("rejected")))
    without_key = delivery.transport.without_key
    with delivery.writing() as outcome:
        for line in lines:
            if line.id in rejected:
                outcome.rejected[line.id] = without_key(f"{_NAME}: {rejected[line.id]}")[:_REASON]
            else:
                outcome.acknowledged.add(line.id)


def _rejected(items: Any) -> Iterator[tuple[str, str]]:
    for item in items if isinstance(items, list) else ():
        if isinstance(item, dict) and isinstance(item.get("id"), str):
            yield item["id"], str(item.get("reason", ""))
