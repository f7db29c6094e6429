"""Where `waxell-workers runs` reads: a server's JSON API, or a database file without any server.

An address may lead to anything: what answers there is read within a limit, and must have the shape that is
expected.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypedDict, TypeVar
from urllib.parse import quote

import click

from ..server.model import RunDetail, RunSummary, Stats
from .plain import plain_line

if TYPE_CHECKING:
    import httpx

LARGEST_ANSWER = 256 * 1024 * 1024
"""Bytes of an answer that is read."""
SEARCHED = 1000
"""How many of the newest runs the beginning of an id is looked for in."""


_Answer = TypeVar("_Answer")


class _Runs(TypedDict):
    runs: list[RunSummary]


class Source(Protocol):
    """Something that has runs."""

    def runs(self, limit: int, agent: str = "", status: str = "", before: str = "") -> list[RunSummary]:
        """List runs, newest first; only those older than the run `before`, if one is named."""
        ...

    def run(self, run_id: str) -> RunDetail | None:
        """Return one run with its calls, or None."""
        ...


class ServerSource:
    """A server's JSON API."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def runs(self, limit: int, agent: str = "", status: str = "", before: str = "") -> list[RunSummary]:
        """List runs, newest first; only those older than the run `before`, if one is named."""
        wanted = {"limit": str(limit), "agent": agent, "status": status, "before": before}
        found = self._get("/api/runs", wanted, _Runs)
        if found is None:
            raise self._stranger()
        return found["runs"]

    def run(self, run_id: str) -> RunDetail | None:
        """Return one run with its calls, or None."""
        return self._get(f"/api/runs/{quote(run_id, safe='')}", {}, RunDetail)

    def stats(self) -> Stats:
        """Return the server's figures."""
        found = self._get("/api/stats", {}, Stats)
        if found is None:
            raise self._stranger()
        return found

    def _stranger(self) -> click.ClickException:
        return click.ClickException(f"{self._client.base_url}: no server of waxell-workers")

    def _get(self, path: str, parameters: dict[str, str], shape: type[_Answer]) -> _Answer | None:
        import httpx
        import msgspec

        given = {name: value for name, value in parameters.items() if value}
        try:
            with self._client.stream("GET", path, params=given) as answer:
                if answer.status_code == httpx.codes.NOT_FOUND:
                    return None
                answer.raise_for_status()
                return msgspec.json.decode(_read(answer), type=shape)
        except httpx.HTTPStatusError as error:
            message = f"{error.request.url}: {error.response.status_code}"
            if error.response.status_code == httpx.codes.UNAUTHORIZED:
                message += "; set WAXELL_API_KEY to the server's key"
            raise click.ClickException(plain_line(message)) from error
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            message = f"{self._client.base_url}: this is no answer of waxell-workers serve ({error})"
            raise click.ClickException(plain_line(message)) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise click.ClickException(plain_line(f"{self._client.base_url}: {error}")) from error


def _read(answer: httpx.Response) -> bytes:
    body = bytearray()
    for part in answer.iter_bytes():
        body += part
        if len(body) > LARGEST_ANSWER:
            raise click.ClickException(f"{answer.url}: the answer is larger than {LARGEST_ANSWER:,} bytes")
    return bytes(body)


@contextmanager
def server(url: str, api_key: str) -> Iterator[ServerSource]:
    """Read from the server at `url`."""
    import httpx

    from ..core.config import is_loopback

    headers = {"X-Wax-Key": api_key} if api_key else {}
    # a proxy must not be asked for 127.0.0.1
    with httpx.Client(base_url=url, headers=headers, timeout=10.0, trust_env=not is_loopback(url)) as client:
        yield ServerSource(client)


@contextmanager
def database(path: Path) -> Iterator[Source]:
    """Read from a server's database file; a server may be writing to it."""
    from ..server import Store

    with Store(path, read_only=True) as store:
        yield store


def find(source: Source, run_id: str) -> RunDetail:
    """Return the one run whose id begins with `run_id`.

    Raises:
        ClickException: there is none, or more than one.
    """
    exact = source.run(run_id)
    if exact is not None:
        return exact
    matches = [run["run_id"] for run in source.runs(SEARCHED) if run["run_id"].startswith(run_id)]
    if len(matches) > 1:
        raise click.ClickException(
            plain_line(f"{len(matches)} runs begin with {run_id}: {', '.join(matches[:5])} …")
        )
    found = source.run(matches[0]) if matches else None
    if found is None:
        raise click.ClickException(f"no run begins with {run_id}, among the newest {SEARCHED}")
    return found
