"""The exporter for Waxell's HTTP protocol: asks the server once which shape it takes, and delivers in that.

A server whose `config/` names an `ingest_endpoint` gets whole batches in one request; any other gets the REST
sequence of each run, several runs at a time. Used by the shipper alone, by one thread at a time. It never
raises for what a server or a network does, and nothing of a reply's text gets into a reason or a log.
"""

from __future__ import annotations

import importlib
import logging
import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

import httpx

from ..core.config import Settings
from ..core.exporting import OUT_OF_TIME, Outcome, RunBatch
from ..core.records import LLMCall
from . import ingest
from .answers import Answer, Verdict
from .crew import Crew
from .delivery import Closed, Delivery, Refusals
from .own_prices import PriceFunction, own_prices
from .prices import price, pricing
from .rest import RunDelivery, SpanQueue
from .transport import Transport

CONFIG = "/api/v1/observe/config/"
CONFIG_MAX_AGE_S = 600.0
"""How long the server's choice of shape is believed."""

log = logging.getLogger("waxell_workers.export")

_NOT_FOR_US = frozenset({401, 402, 403, 407})


@dataclass(frozen=True, slots=True)
class _Shape:
    ingest_url: str
    """Empty for REST."""
    asked_at: float


def preload(settings: Settings) -> None:
    """Import all that an export needs later: what httpx and genai-prices leave for their first use.

    And a function with the user's own prices.
    """
    for name in ("certifi", "encodings.idna", "h11", "httpcore", "stringprep"):
        importlib.import_module(name)
    price(LLMCall(id="", at=time.time(), model="gpt-4o", tokens_in=1, tokens_out=1))
    httpx.Client().close()
    own = own_prices(settings.prices) if settings.prices else None
    if isinstance(own, PriceFunction):
        own.load()


class WaxellExporter:
    """Delivers batches to a Waxell server, or to one that speaks its protocol, such as the local server.

    Args:
        settings: `api_url`, `api_key` and `prices` are used; the key goes to that origin only.
        parallel: How many runs are delivered at the same time (REST).
    """

    def __init__(self, settings: Settings, *, parallel: int = 8) -> None:
        self.governance: dict[str, int] = {}
        """The server's governance answers, counted by action (`allow`, `block`, …); none is enforced."""
        self._url = settings.api_url
        self._key = settings.api_key
        self._parallel = max(1, parallel)
        self._priced = pricing(settings.prices)
        self._crew = Crew(self._parallel)
        self._transport: Transport | None = None
        self._shape: _Shape | None = None
        self._refusals = Refusals()
        self._spans = SpanQueue()
        self._troubled: set[str] = set()
        self._warned = False
        self._pid = os.getpid()

    @property
    def spans_dropped(self) -> int:
        """Spans (REST) that were given up; their calls are delivered."""
        return self._spans.dropped

    def export(self, batch: Sequence[RunBatch], deadline: float) -> Outcome:
        """Deliver what can be delivered until `deadline` (`time.monotonic()` seconds).

        The `RunState` of a run is brought up to date: `remote_id`, `spans`, and tags and metadata folded into
        `started`. It must be kept together with the acknowledged ids.

        Returns:
            What became of each record; ids that are neither acknowledged nor rejected are to be tried again.
        """
        runs = [run for run in batch if run.records]
        if not runs:
            return Outcome()
        self._leave_parent_behind()
        try:
            transport = self._open()
        except (OSError, ValueError, ImportError, httpx.InvalidURL) as error:
            return Outcome(paused=f"proxy or certificate settings are unusable: {type(error).__name__}")
        delivery = Delivery(transport, deadline, self._refusals, self.governance, self._priced)
        asked = self._shape is None or time.monotonic() - self._shape.asked_at > CONFIG_MAX_AGE_S
        if asked:
            self._run(delivery, [lambda: self._ask(delivery)])
        if self._shape is not None and not delivery.stopped:
            self._run(delivery, self._jobs(delivery, self._shape.ingest_url, runs, asked))
        outcome = delivery.close()
        self._note(outcome, runs, delivery.troubled)
        return outcome

    def close(self) -> None:
        """Close connections and let threads end. The exporter can be used again."""
        self._crew.dismiss()
        if self._transport is not None:
            self._transport.close()
            self._transport = None

    def _jobs(
        self, delivery: Delivery, ingest_url: str, runs: Sequence[RunBatch], asked: bool
    ) -> list[Callable[[], None]]:
        if ingest_url:
            return [lambda: self._ingest(delivery, ingest_url, runs, asked)]
        # Runs that had trouble come last: should they be what upsets the server, the others have got through.
        ordered = sorted(runs, key=lambda run: run.run.started.run_id in self._troubled)
        return [RunDelivery(delivery, run, self._spans) for run in ordered]

    def _ask(self, delivery: Delivery) -> None:
        answer = delivery.request("config", lambda: self._config(delivery))
        if answer.verdict is Verdict.OK:
            ingest_url = self._ingest_url((answer.body or {}).get("ingest_endpoint"))
            self._shape = _Shape(ingest_url, time.monotonic())
        elif answer.verdict is not Verdict.PAUSE and (self._shape is None or answer.down):
            # A known shape is good for longer, if only this endpoint is in trouble.
            self._shape = None
            delivery.fail(answer.reason)

    def _config(self, delivery: Delivery) -> Answer:
        answer = delivery.transport.get("config", CONFIG, delivery.deadline)
        if answer.verdict is Verdict.OK and answer.body is None:
            return replace(answer, verdict=Verdict.RETRY, reason=f"{answer.reason}, no JSON object")
        if (
            400 <= answer.status < 500
            and answer.verdict is not Verdict.RETRY
            and answer.status not in _NOT_FOR_US
        ):
            return Answer(Verdict.OK, body={})  # a server without this endpoint: the plain protocol
        return answer

    def _ingest_url(self, endpoint: object) -> str:
        """Return the absolute URL, or an empty string for what is none or would take the key elsewhere."""
        if not isinstance(endpoint, str) or not endpoint:
            return ""
        usable = endpoint.isascii() and endpoint.isprintable() and not set(endpoint) & set(" \\#")
        if usable and endpoint.startswith("/") and not endpoint.startswith("//"):
            return self._url + endpoint
        if usable and _origin(endpoint) == _origin(self._url) is not None:
            return endpoint
        if not self._warned:
            self._warned = True
            log.warning("the server names an ingest_endpoint of another origin; not used, runs go by REST")
        return ""

    def _ingest(self, delivery: Delivery, url: str, runs: Sequence[RunBatch], asked: bool) -> None:
        answer = ingest.deliver(delivery, url, runs)
        if answer.verdict is Verdict.MISSING:
            self._shape = None  # the server may have been replaced by one that takes only REST
            if asked:
                delivery.pause(answer.reason)
            else:
                delivery.fail(answer.reason)
        elif answer.verdict in (Verdict.RETRY, Verdict.LATE):
            delivery.fail(answer.reason)

    def _run(self, delivery: Delivery, jobs: Sequence[Callable[[], None]]) -> None:
        guarded = [_guarded(delivery, job) for job in jobs]
        transport = delivery.transport
        ended = self._crew.run(guarded, delivery.deadline, transport.abort)
        if transport.aborted:
            self._transport = None
            if ended:
                transport.close()

    def _open(self) -> Transport:
        if self._transport is None:
            self._transport = Transport(self._url, self._key, self._parallel)
        return self._transport

    def _note(self, outcome: Outcome, runs: Sequence[RunBatch], troubled: set[str]) -> None:
        settled = outcome.acknowledged | outcome.rejected.keys()
        left = {
            run.run.started.run_id for run in runs if any(record.id not in settled for record in run.records)
        }
        self._troubled = left & (self._troubled | troubled)
        if left and not outcome.error and not outcome.paused:
            outcome.error = OUT_OF_TIME
        if not left:
            outcome.error = ""

    def _leave_parent_behind(self) -> None:
        if self._pid == os.getpid():
            return
        # A forked child has neither the parent's threads nor a right to its connections.
        self._pid = os.getpid()
        self._crew = Crew(self._parallel)
        self._transport = None


def _guarded(delivery: Delivery, job: Callable[[], None]) -> Callable[[], None]:
    def guarded() -> None:
        try:
            job()
        except Closed:
            pass
        except Exception as error:  # noqa: BLE001  our own mistake may neither kill a thread nor lose a record
            log.error("export failed unexpectedly: %s at %s", type(error).__name__, _place(error))
            try:
                delivery.fail(f"unexpected {type(error).__name__}")
            except Closed:
                pass

    return guarded


def _place(error: BaseException) -> str:
    """Say where an error was raised; its message might quote content."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].name}:{frames[-1].lineno}" if frames else "?"


def _origin(url: str) -> tuple[str, str, int] | None:
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0)
    except ValueError:
        return None
    if not parts.hostname or parts.username or parts.password or not port:
        return None
    return parts.scheme, parts.hostname, port
