"""The functions that a user calls, re-exported by `waxell_workers`; here, core and capture meet."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from typing import Any

from . import capture as capturing
from .core.collector import Collector, Stats, configure, current, when_configured
from .core.config import resolve
from .core.errors import ConfigError
from .core.flush import FlushResult
from .core.runs import begin_step, current_run_id, record_reported_call, wants_content
from .core.values import Redactor
from .drain import Drain

logger = logging.getLogger("waxell_workers")


def init(
    api_key: str | None = None,
    api_url: str | None = None,
    *,
    agent_name: str | None = None,
    flush: str | None = None,
    flush_interval: float | None = None,
    flush_max_records: int | None = None,
    flush_timeout: float | None = None,
    shutdown_timeout: float | None = None,
    drain: Iterable[str] | None = None,
    capture: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
    propagate: str | None = None,
    capture_content: bool | None = None,
    content_limit: int | None = None,
    redact: Redactor | None = None,
    prices: str | os.PathLike[str] | None = None,
    spool_dir: str | None = None,
    spool_limit: int | str | None = None,
    spool_max_age: float | str | None = None,
    fsync_interval: float | None = None,
    shipper: str | None = None,
    exporter: str | None = None,
    observe: bool | None = None,
) -> None:
    """Configure the library. Creates no file, process or thread: a worker's boot or the first record does.

    An argument beats the environment (`WAXELL_API_KEY`, `WAXELL_FLUSH`, …), which beats the default. A second
    call with equal settings does nothing; with others it warns once, and the first stays.

    Args:
        api_key: the key of the Waxell platform; none is needed for a loopback URL.
        api_url: the server's address.
        agent_name: the agent name of runs that have no better one.
        flush: `periodic` (default) or `task`: nothing, or a flush, at each task's end.
        flush_interval: the longest that a record waits for its export, in seconds (5).
        flush_max_records: how many records are exported sooner (512).
        flush_timeout: the longest that a flush waits, in seconds (2).
        shutdown_timeout: the longest that a stopping worker waits, in seconds (3).
        drain: names of other tracers (`openai-agents`, `opentelemetry`) to flush where we flush, and where a
            worker's child process ends, within the same deadline; none unless given.
        capture: names of the SDKs to listen to; all that are supported unless given.
        exclude: patterns of task names that are not recorded.
        propagate: how a task is connected with what has enqueued it: `parent` (default), its child in the
            same trace; `link`, a trace of its own that names the other; `none`.
        capture_content: True to record prompts, responses, arguments, and errors in full.
        content_limit: how many characters are kept of a captured call's prompt, of its response, and of all
            its messages together (10,000).
        redact: a function from a record, a dict of plain data, to what may be written of it; called before
            each write. `redact_texts` makes one of a function from text to text.
        prices: your own prices: the path of a JSON file, or `module:function`, imported where records are
            delivered.
        spool_dir: where the journal lives.
        spool_limit: the most that the spool may hold, in bytes, or as `64 MiB`.
        spool_max_age: how long the backlog of a destination is kept that nobody uses any more, in seconds, or
            as `7d` (7 days); 0 for ever.
        fsync_interval: how often the journal is written through to the disk, in seconds; 0 (default): never.
        shipper: `auto`, `process`, `thread` or `external`.
        exporter: `waxell`.
        observe: False to switch everything off.

    Raises:
        ConfigError: a value that cannot be used.
    """
    configure(resolve(dict(locals())))


def shutdown(timeout: float = 3.0) -> FlushResult:
    """Deliver what is there, for at most `timeout` seconds, and stop shipping from this process."""
    return current().shutdown(timeout)


def force_flush(timeout: float | None = None) -> FlushResult:
    """Wait until what this process has recorded is at the server; never raises, never outlasts `timeout`.

    Args:
        timeout: seconds; `flush_timeout` unless given.

    Returns:
        True as a truth value only if nothing is pending and nothing was dropped.
    """
    return current().force_flush(timeout)


async def aforce_flush(timeout: float | None = None) -> FlushResult:
    """Do what `force_flush` does without blocking the event loop."""
    import asyncio  # not at the top: most workers have no use for it

    return await asyncio.to_thread(force_flush, timeout)


def stats() -> Stats:
    """Return what this process has recorded and lost."""
    return current().stats()


def record_llm_call(
    *,
    model: str,
    tokens_in: int | None = None,
    tokens_out: int | None = None,
    cost: float | None = None,
    task: str = "chat",
    prompt_preview: str = "",
    response_preview: str = "",
    **fields: Any,
) -> None:
    """Record a call of a model in the current run, or for the background collector if there is none.

    The arguments are those of `WaxellContext.record_llm_call`.

    Raises:
        TypeError: a field that a call does not have.
    """
    record_reported_call(
        current(),
        current_run_id(),
        model=model,
        tokens_in=tokens_in,
        tokens_out=tokens_out,
        cost=cost,
        task=task,
        prompt_preview=prompt_preview,
        response_preview=response_preview,
        fields=fields,
    )


def _listen(collector: Collector) -> None:
    settings = collector.settings
    if not collector.active:
        capturing.uninstall()
        return
    try:
        capturing.install(
            collector.record_call,
            names=settings.capture,
            current_run=current_run_id,
            wants_content=wants_content,
            begin_step=begin_step,
            step_sink=collector.record_step,
        )
    except ConfigError as error:
        if not collector.implicit:
            raise
        logger.error("no calls will be captured: %s", error)  # a variable must not fail the first task


def _drain(collector: Collector) -> None:
    settings = collector.settings
    if collector.others is None and settings.observe and settings.drain:
        collector.others = Drain(settings.drain, lambda: collector.journal.directory)


when_configured(_listen)
when_configured(_drain)
