"""What the suites inside the environment share: a server, and what was heard of the calls made to it.

Importing this installs the capture, before any SDK is there: each is instrumented as its suite imports it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from waxell_workers import capture

from . import server

URL = server.start()
MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}]
TOKENS = (server.TOKENS_IN, server.TOKENS_OUT)
NONE = (None, None)

_calls: list[dict[str, Any]] = []
capture.install(
    lambda **call: _calls.append(call), names=None, current_run=lambda: "run", wants_content=lambda: True
)


class Call:
    """One call that was heard."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.fields = fields

    def __getattr__(self, name: str) -> Any:
        return self.fields.get(name)

    def __repr__(self) -> str:
        return repr({name: value for name, value in self.fields.items() if value})

    @property
    def tokens(self) -> tuple[int | None, int | None]:
        """Tokens in and out."""
        return self.tokens_in, self.tokens_out

    @property
    def is_left(self) -> bool:
        """True if its stream was left before the end."""
        return bool(self.metadata)


@contextmanager
def hearing() -> Iterator[list[Call]]:
    """Give a list that has, after the block, the calls that ended in it."""
    _calls.clear()
    heard: list[Call] = []
    yield heard
    heard.extend(map(Call, _calls))
    _calls.clear()


@contextmanager
def hearing_one() -> Iterator[Call]:
    """Give the one call that ends in the block, once it has."""
    call = Call({})
    with hearing() as heard:
        yield call
    assert len(heard) == 1, heard
    call.fields = heard[0].fields
    assert call.run_id == "run"
    assert call.duration_ms > 0
