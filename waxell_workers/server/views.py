"""How values look on a page: times, durations, money, counts, JSON. Pure functions, template filters."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from typing import Any

from .model import RUNNING, RunDetail, RunSummary, Span
from .values import error_line, text

ABSENT = "\N{EN DASH}"

_STATUS_CLASS = {
    RUNNING: "running",
    "success": "good",
    "ok": "good",
    "error": "bad",
    "killed": "dead",
    "retry": "warn",
    "interrupted": "warn",
    "ignored": "calm",
    "rejected": "bad",
    "revoked": "off",
}
_FACTS = (
    "task",
    "task_id",
    "attempt",
    "framework",
    "queue",
    "schedule",
    "repeat",
    "worker",
    "host",
    "pid",
    "redelivered",
    "group_id",
    "root_task_id",
    "wait_s",
    "enqueued_at",
    "eta",
)
"""Metadata of a task in the order in which a person asks for it; everything else follows by name."""
_SHOWN_AS = {
    "wait_s": "wait_s",
    "enqueued_at": "enqueued_at",
    "eta": "eta",
    "clock_skew_s": "wait_s",
    "previous_run_id": "previous_run_id",
    "linked_run_id": "linked_run_id",
    "parent_task_id": "parent_task_id",
}
"""Metadata that a page says in words, where it was understood: then this field of the run is set."""


def status_class(status: str) -> str:
    """Return the CSS class of a status; `other` for what has none."""
    return _STATUS_CLASS.get(status, "other")


def duration(value_ms: float | None) -> str:
    """Write milliseconds in the unit that reads best."""
    if value_ms is None:
        return ABSENT
    if value_ms < 0.95:
        return f"{value_ms:.2f} ms"
    if value_ms < 999.5:
        return f"{value_ms:.0f} ms"
    if value_ms < 59_950:
        return f"{value_ms / 1000:.1f} s"
    seconds = round(value_ms / 1000)
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def waited(value_s: float | None) -> str:
    """Write how long something waited, given in seconds."""
    if value_s is None:
        return ABSENT
    return "< 1 ms" if value_s < 0.001 else duration(value_s * 1000)


def offset(value_ms: float | None) -> str:
    """Write how long after the beginning something was."""
    if not value_ms:
        return ABSENT if value_ms is None else "0"
    return f"+{duration(value_ms)}" if value_ms > 0 else f"\N{MINUS SIGN}{duration(-value_ms)}"


def cost(value_usd: float | None) -> str:
    """Write US dollars with as many digits as say something."""
    if value_usd is None:
        return ABSENT
    if value_usd == 0:
        return "$0"
    if value_usd < 0.000_001:
        return "< $0.000001"
    digits = 2 if value_usd >= 1 else 4 if value_usd >= 0.01 else 6
    return f"${value_usd:,.{digits}f}"


def count(value: int | None) -> str:
    """Write a whole number with a thin space between thousands."""
    return ABSENT if value is None else f"{value:,}".replace(",", "\u202f")


def least(written: str, unknown: int) -> str:
    """Write before a sum that some calls are not in that it is at least that."""
    return (
        f"\N{GREATER-THAN OR EQUAL TO}\N{NO-BREAK SPACE}{written}"
        if unknown and written != ABSENT
        else written
    )


def unknown_of(unknown: int, calls: int) -> str:
    """Say how many calls a sum is without; nothing if it has them all."""
    return f"{unknown} of {calls} unknown" if unknown else ""


def ago(moment: str, now: datetime | None = None) -> str:
    """Write how long ago an ISO 8601 time was."""
    elapsed = ((now or datetime.now(timezone.utc)) - datetime.fromisoformat(moment)).total_seconds()
    if elapsed < -60:
        return "in the future"
    if elapsed < 5:
        return "just now"
    for unit, seconds, until in (("s", 1, 60), ("min", 60, 3600), ("h", 3600, 86_400), ("d", 86_400, 1e12)):
        if elapsed < until:
            return f"{int(elapsed // seconds)} {unit} ago"
    return absolute(moment)


def absolute(moment: str) -> str:
    """Write an ISO 8601 time for people, in UTC."""
    return f"{moment[:10]} {moment[11:19]} UTC"


def after(moment: str, value_ms: float | None) -> str | None:
    """Return the time that is so long after another one, as ISO 8601; None if nobody knows."""
    if value_ms is None:
        return None
    try:
        found = datetime.fromisoformat(moment) + timedelta(milliseconds=value_ms)
    except OverflowError:
        return None
    return found.isoformat(timespec="milliseconds")


def between(earlier: str, later: str) -> float | None:
    """Return the milliseconds from one ISO 8601 time to another; None if it is not later."""
    gone = (datetime.fromisoformat(later) - datetime.fromisoformat(earlier)).total_seconds() * 1000
    return gone if gone >= 0 else None


def never_began(run: RunDetail | RunSummary) -> bool:
    """Tell whether an attempt was given up before anything of it ran; its adapter has said so."""
    return run["metadata"].get("never_began") is True


def says_more(run: RunDetail | RunSummary) -> bool:
    """Tell whether a run's error says more than the reason of its end, not the same with a type before it."""
    message = run["error"].removeprefix(run["error_type"]).removeprefix(": ")
    return bool(run["error"]) and not (run["reason"] and message in run["reason"])


def percent(part: float) -> str:
    """Write a part of a whole, from 0 to 1."""
    if 0 < part < 0.01:
        return "less than 1 %"
    if 0.99 < part < 1:
        return "more than 99 %"
    return f"{part * 100:.0f} %"


def shorten(text: str, length: int = 160) -> str:
    """Return the first line of a text, cut at `length` characters, visibly."""
    line = text.strip().split("\n", 1)[0].strip()
    return line if len(line) <= length else line[: length - 1].rstrip() + "…"


def as_text(value: Any) -> str:
    """Write a value for people: a string as it is, anything else as indented JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=2)


def one_line(value: Any, length: int) -> str:
    """Write a value on one line, cut at `length` characters, visibly."""
    return shorten(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), length)


def span_error(span: Span) -> str:
    """Return what a span says about its failure, or nothing."""
    told = span["attributes"]
    return error_line(
        told.get("error.type") or told.get("exception.type"),
        told.get("error.message") or told.get("exception.message"),
    )


def messages(sent: list[Any]) -> list[tuple[str, str]]:
    """Return role and text of each message, whatever a client has sent as such."""
    found = [each if isinstance(each, dict) else {"text": each} for each in sent]
    return [(text(each.get("role")), _told(each.get("text"))) for each in found]


def tools(asked: list[Any]) -> list[tuple[str, str, str]]:
    """Return name, id and arguments of each tool that a model asked for; empty what was not recorded."""
    found = [each if isinstance(each, dict) else {"name": each} for each in asked]
    return [
        (text(each.get("name")) or "?", text(each.get("id")), _told(each.get("arguments"))) for each in found
    ]


def _told(value: Any) -> str:
    return "" if value is None else as_text(value)


def facts(metadata: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return metadata in reading order: the task's own facts, then the rest by name; none that is empty."""
    known = [name for name in _FACTS if name in metadata]
    names = known + sorted(set(metadata) - set(known))
    return [(name, metadata[name]) for name in names if metadata[name] not in (None, "", [], {})]


def other_facts(run: RunDetail) -> list[tuple[str, Any]]:
    """Return the facts of a run that its page has not said in words elsewhere."""
    told: dict[str, Any] = {**run}
    return [
        (name, value)
        for name, value in facts(run["metadata"])
        if not (name in _SHOWN_AS and told.get(_SHOWN_AS[name]) not in (None, ""))
        and not (name == "depends_on" and is_texts(value))
    ]


def is_texts(value: object) -> bool:
    """Tell whether this is a list of texts, and not an empty one."""
    return isinstance(value, list) and bool(value) and all(isinstance(each, str) for each in value)


FILTERS = {
    "status_class": status_class,
    "duration": duration,
    "waited": waited,
    "after": after,
    "between": between,
    "never_began": never_began,
    "says_more": says_more,
    "percent": percent,
    "offset": offset,
    "cost": cost,
    "count": count,
    "least": least,
    "unknown_of": unknown_of,
    "messages": messages,
    "tools": tools,
    "ago": ago,
    "absolute": absolute,
    "shorten": shorten,
    "as_text": as_text,
    "one_line": one_line,
    "span_error": span_error,
    "other_facts": other_facts,
}
