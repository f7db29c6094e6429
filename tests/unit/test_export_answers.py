"""What an answer means: status codes and Retry-After."""

from __future__ import annotations

from datetime import datetime, timezone

import pytest

from waxell_workers.export.answers import Verdict, retry_after_s, verdict_of

NOW = datetime(2030, 1, 1, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    ("verdict", "statuses"),
    [
        (Verdict.OK, [200, 201, 202, 204]),
        (Verdict.RETRY, [408, 425, 429, 500, 502, 503, 504, 599]),
        (Verdict.REFUSED, [400, 409, 413, 422]),
        (Verdict.MISSING, [404, 410]),
        (Verdict.PAUSE, [301, 302, 307, 308, 401, 402, 403, 405, 407, 411, 415, 418, 431, 451]),
    ],
)
def test_every_status_has_its_verdict(verdict: Verdict, statuses: list[int]) -> None:
    assert {status: verdict_of(status) for status in statuses} == dict.fromkeys(statuses, verdict)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("", None),
        ("7", 7.0),
        ("0.5", 0.5),
        ("-3", 0.0),
        ("999999", 3600.0),
        ("inf", 3600.0),
        ("nan", None),
        ("soon", None),
        ("Tue, 01 Jan 2030 00:01:30 GMT", 90.0),
        ("Tue, 01 Jan 2030 00:01:30 -0000", 90.0),
        ("Mon, 31 Dec 2029 23:00:00 GMT", 0.0),
        ("Tue, 99 Jan 2030 00:01:30 GMT", None),
    ],
)
def test_retry_after_is_read_as_seconds_or_as_a_date(header: str | None, seconds: float | None) -> None:
    assert retry_after_s(header, NOW) == seconds
