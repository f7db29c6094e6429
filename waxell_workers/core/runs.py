"""Runs: what an LLM call belongs to.

A run is one attempt of a task, one `WaxellContext`, or one call of an `@observe`d function. The current one
stands in a contextvar: it follows `await`, and a new thread starts outside any run. Everything said about a
run is a record, written at once; a `Run` holds only what the next record needs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from . import content, w3c
from .encoding import key_text
from .ids import new_id
from .limits import limit_error
from .records import LLMCall, RunEnded, RunStarted, RunUpdated, Step
from .travelling import travelling, with_one

if TYPE_CHECKING:
    from .collector import Collector

MUTED = "muted"
"""The id of every run that is not recorded: what happens inside it is not recorded either."""

_FOR_EVER = 1e11
"""No Unix time in seconds that anybody means."""

_current: ContextVar[Run | None] = ContextVar("waxell_run", default=None)
_content_setting: Callable[[], bool] = bool
"""Returns `capture_content` as it is configured; here until the collector has said how."""


def set_content_setting(setting: Callable[[], bool]) -> None:
    """Have `wants_content` ask this outside any run: what is configured stands above this module."""
    global _content_setting
    _content_setting = setting


def wants_content() -> bool:
    """Return whether content is to be recorded here: the current run's choice, else the setting."""
    run = _current.get()
    return _content_setting() if run is None else run.wants_content


def get_context() -> Run | None:
    """Return the run that is current here, or None outside any run."""
    return _current.get()


class Run:
    """One open run of this process. Adapters open it; `WaxellContext` is the same with `with`.

    Without a collector the run is muted: it can be used like any other, and leaves no record.
    """

    __slots__ = (
        "_began",
        "_collector",
        "_inputs",
        "_left",
        "_metadata",
        "_outer",
        "_pid",
        "_result",
        "_steps",
        "_unwritten",
        "agent_name",
        "ambient",
        "capture_content",
        "parent_run_id",
        "root_run_id",
        "run_id",
        "session_id",
        "tags",
        "task_id",
        "trace",
        "trace_id",
        "user_group",
        "user_id",
        "workflow_name",
    )

    def __init__(
        self,
        collector: Collector | None,
        agent_name: str,
        workflow_name: str = "default",
        inputs: dict[str, Any] | None = None,
        metadata: dict[str, Any] | None = None,
        session_id: str | None = None,
        user_id: str | None = None,
        *,
        user_group: str | None = None,
        parent_run_id: str | None = None,
        root_run_id: str | None = None,
        trace_id: str | None = None,
        trace: w3c.Trace | None = None,
        tags: dict[str, Any] | None = None,
        ambient: dict[str, Any] | None = None,
        task_id: str = "",
        capture_content: bool | None = None,
    ) -> None:
        self.capture_content = capture_content
        self._collector = collector
        self.run_id = new_id() if collector is not None else MUTED
        self.agent_name = agent_name
        self.workflow_name = workflow_name
        self.task_id = task_id
        self._inputs = inputs
        self._metadata = metadata
        self.session_id = session_id
        self.user_id = user_id
        self.user_group = user_group
        self.parent_run_id = parent_run_id
        self.root_run_id = root_run_id
        self.trace_id = trace_id
        self.trace = trace
        """The place of another tracer that this run was begun from, if any; its state and flags go on."""
        self.tags = tags
        self.ambient = ambient
        """Metadata that this run has from outside, and what is set on it: it goes on to the runs below."""
        self._pid = 0
        self._began = 0.0
        self._steps = 0
        self._result: Any = None
        self._outer: Run | None = None
        self._left = False
        self._unwritten: RunStarted | None = None

    @property
    def is_open(self) -> bool:
        """True between start and end, in the process that started the run."""
        return self._pid == os.getpid()

    @property
    def is_muted(self) -> bool:
        """True for a run that is not recorded."""
        return self._collector is None

    @property
    def wants_content(self) -> bool:
        """True if the content of what happens in this run is recorded: its own choice, else the setting.

        The choice is the outer run's, unless this one was given another.
        """
        if self._collector is None:
            return False
        chosen = self.capture_content
        return self._collector.settings.capture_content if chosen is None else chosen

    def connect(self) -> None:
        """Find the run's parent, root and trace, without a word; more than once is once."""
        outer = _current.get()
        if self.capture_content is None and outer is not None:
            self.capture_content = outer.capture_content
        if self.parent_run_id is None and outer is not None and outer is not self:
            self._inherit(outer)
        if not self.root_run_id:
            self.root_run_id = self.run_id if self._collector is not None else self.seen_as or MUTED
        if not self.trace_id:
            self._join()

    def start(self, ago_s: float = 0.0) -> None:
        """Write that the run has begun. Its id exists before, so that an interrupt cannot orphan it.

        Args:
            ago_s: how many seconds ago that was, for a run that is told of later.
        """
        self.connect()
        self._began = time.perf_counter() - ago_s
        collector = self._collector
        if collector is None:
            self._pid = os.getpid()
            return
        # What the user has handed over is compared with None alone: its truth may be the user's code.
        started = self._unwritten = RunStarted(
            id=self.run_id,
            at=time.time() - ago_s,
            proc=collector.token(),
            run_id=self.run_id,
            agent_name=self.agent_name,
            workflow_name=self.workflow_name,
            inputs={} if self._inputs is None else self._inputs,
            metadata={} if self._metadata is None else self._metadata,
            session_id="" if self.session_id is None else self.session_id,
            user_id="" if self.user_id is None else self.user_id,
            user_group="" if self.user_group is None else self.user_group,
            parent_run_id="" if self.parent_run_id is None else self.parent_run_id,
            root_run_id=self.root_run_id or "",
            trace_id=self.trace_id or "",
            task_id=self.task_id,
            tags={} if self.tags is None else self.tags,
            ambient={} if self.ambient is None else self.ambient,
        )
        self._pid = os.getpid()
        collector.open_runs[self.run_id] = self
        collector.write(started)
        self._unwritten = None

    def _inherit(self, outer: Run) -> None:
        """Take from the run around this one what it is part of, and for whom; what was given stays."""
        parent = outer.seen_as
        if parent:
            self.root_run_id = self.root_run_id or outer.root_run_id
            self.trace_id = self.trace_id or outer.trace_id
            self.trace = self.trace or outer.trace
        if self.session_id is None:
            self.session_id = outer.session_id
        if self.user_id is None:
            self.user_id = outer.user_id
        if self.user_group is None:
            self.user_group = outer.user_group
        self.tags = _merged(travelling(outer.tags) or None, self.tags)
        self.ambient = _merged(travelling(outer.passes_on) or None, self.ambient)
        if parent:  # last: an interrupt before has all this done again
            self.parent_run_id = parent

    def _join(self) -> None:
        """Be part of OpenTelemetry's trace, where it is in one; else of the request's; else of one's own."""
        trace = self.trace
        if trace is None:
            trace = self.trace = w3c.of_opentelemetry() or w3c.around.get()
        if trace is not None:
            self.trace_id = trace.trace_id
        elif self.root_run_id != self.run_id and w3c.is_trace_id(self.root_run_id):
            self.trace_id = self.root_run_id
        elif self._collector is not None:
            self.trace_id = self.run_id

    @property
    def seen_as(self) -> str:
        """The run that those below have as their parent; one that is not recorded names its own parent."""
        return (self.parent_run_id or "") if self.is_muted else self.run_id

    @property
    def passes_on(self) -> dict[str, Any] | None:
        """The metadata that the runs below this one have too: all but what an adapter tells of its task."""
        own = self._metadata
        # By its type alone: what the user has handed over may be anything.
        return self.ambient if self.task_id or type(own) is not dict else _merged(self.ambient, own)

    @property
    def place(self) -> w3c.Trace | None:
        """Where in a trace other tracers find this run; None before it has begun.

        One that is not recorded passes on what it has come with, if anything.
        """
        if self.is_muted:
            return self.trace
        if not w3c.is_trace_id(self.trace_id):
            return None
        around = self.trace
        flags, state = ("01", "") if around is None else (around.flags, around.state)
        return w3c.Trace(str(self.trace_id), self.run_id[:16], flags, state)

    def end(
        self,
        state: str = "success",
        error: BaseException | None = None,
        *,
        reason: str = "",
        error_type: str = "",
        error_message: str = "",
        traceback: str = "",
    ) -> None:
        """Write how the run has ended; only the first end counts, and only in the process that began it.

        Args:
            state: one of `records.STATES`.
            reason: why, in words for people, for an end that no error explains; none of the user's own words.
            error: the exception that ended it; its type, text and traceback are kept by the content rules.
            error_type: the error's type where there is no exception to read it from.
            error_message: the error's text, likewise.
            traceback: the formatted traceback, likewise.
        """
        if not self.is_open:
            return
        collector = self._collector
        if collector is None:
            self._pid = 0
            return
        if self._unwritten is not None:  # an interrupt has surfaced there; written twice, it is one record
            collector.write(self._unwritten)
            self._unwritten = None
        if error is not None:
            error_type, error_message, traceback = self.describe(error).values()
        is_limited = bool(error_message) and not self.wants_content
        collector.write(
            RunEnded(
                id=f"{self.run_id}-end",
                at=time.time(),
                proc=collector.token(),
                run_id=self.run_id,
                state=state,
                duration_ms=self.elapsed_s() * 1000,
                reason=reason,
                error_type=error_type,
                error_message=error_message,
                traceback=traceback,
                result=self._result,
            ),
            limit_error if is_limited else None,
        )
        # Only now: an interrupt before the write must not leave a run that nobody ends. Written twice, the
        # end has the same id twice.
        self._pid = 0
        collector.open_runs.pop(self.run_id, None)
        collector.look_for_shipper()

    def describe(self, error: BaseException) -> dict[str, str]:
        """Return an exception's type, text and traceback as `end` takes them, by the content rules."""
        if self._collector is None:
            return {"error_type": "", "error_message": "", "traceback": ""}
        wanted = self.wants_content
        trace = content.traceback_of(error)
        return {
            "error_type": content.error_type(error),
            "error_message": content.error_message(error, wants_content=wanted),
            "traceback": content.format_traceback(trace, wants_content=wanted),
        }

    def enter(self) -> None:
        """Make this run current here; once more after an interrupt, too."""
        outer = inner = _current.get()
        while inner is not None and inner is not self:
            inner = inner._outer
        if inner is None:  # else it is entered already: a run that is its own outer one would have no way out
            self._outer = outer
        self._left = False
        _current.set(self)

    def leave(self) -> None:
        """Make the run current again that was so before `enter`, if this one still is.

        It is not where it was entered in another task, or where blocks are left out of order.
        """
        # Not by token: an adapter's hooks may run in different copies of a context.
        self._left = True
        if _current.get() is not self:
            return
        outer = self._outer
        while outer is not None and outer._left:
            outer = outer._outer
        _current.set(outer)
        self._outer = None  # last: an interrupt before would have us forget where to go back to

    def leave_all(self) -> None:
        """Leave this run, if it was entered, and whatever an interrupt has left current inside it."""
        inner = _current.get()
        while inner is not None and inner is not self:
            inner = inner._outer
        if inner is not None:
            _current.set(self)
            self.leave()

    def elapsed_s(self) -> float:
        """Return the seconds since the start."""
        return time.perf_counter() - self._began

    def record_llm_call(
        self,
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
        """Record one call of a model in this run.

        Args:
            model: the model's name.
            tokens_in: tokens of the prompt; None if unknown.
            tokens_out: tokens of the response, likewise.
            cost: price in USD; None to have known models priced when shipped.
            task: the operation: `chat`, `embeddings`, …
            prompt_preview: text of the prompt, recorded since you hand it over; redacted.
            response_preview: text of the response, likewise.
            fields: further fields of `core.records.LLMCall`, such as `provider` or `duration_ms`.

        Raises:
            TypeError: a field that `LLMCall` does not have.
        """
        if self._collector is not None:
            record_reported_call(
                self._collector,
                self.run_id,
                model=model,
                tokens_in=tokens_in,
                tokens_out=tokens_out,
                cost=cost,
                task=task,
                prompt_preview=prompt_preview,
                response_preview=response_preview,
                fields=fields,
            )

    def record_step(self, name: str, output: Any = None) -> None:
        """Record a named step of this run, with its output (plain data)."""
        collector = self._collector
        if collector is None:
            return
        _, position = self.begin_step()
        collector.record(Step, run_id=self.run_id, name=name, output=output, position=position)

    def begin_step(self) -> tuple[str, int]:
        """Return this run's id, and the position among its steps of one that begins now."""
        self._steps += 1
        return self.run_id, self._steps

    def set_tag(self, key: str, value: Any) -> None:
        """Set a tag of this run, and of those that are begun or enqueued from now on; written at once."""
        name = key_text(key)
        self.tags = with_one(self.tags, name, value)
        if self._collector is not None:
            self._collector.record(RunUpdated, run_id=self.run_id, tags={name: value})

    def set_metadata(self, key: str, value: Any) -> None:
        """Set a metadata field, likewise."""
        name = key_text(key)
        self.ambient = with_one(self.ambient, name, value)
        if self._collector is not None:
            self._collector.record(RunUpdated, run_id=self.run_id, metadata={name: value})

    def set_result(self, result: Any) -> None:
        """Set what the run has produced (plain data); written when it ends."""
        self._result = result


class Body:
    """What is current inside a generator's body: kept from one item to the next, hidden from its consumer."""

    __slots__ = ("_inside", "_is_inside", "_outside")

    def __init__(self, run: Run) -> None:
        self._inside: Run | None = run
        self._outside: Run | None = None
        self._is_inside = False

    def __enter__(self) -> None:
        self._outside = _current.get()
        self._is_inside = True
        _current.set(self._inside)

    def __exit__(self, *exc_info: object) -> None:
        self._inside = _current.get()
        self.hide()

    def hide(self) -> None:
        """Make current what the consumer has, if an interrupt has prevented that."""
        if self._is_inside:
            _current.set(self._outside)
            self._is_inside = False


def _merged(outer: dict[str, Any] | None, inner: dict[str, Any] | None) -> dict[str, Any] | None:
    return outer if inner is None else inner if outer is None else {**outer, **inner}


def state_of(error: BaseException | None) -> str:
    """Return the state of a run that ended with this exception, or with none."""
    if error is None:
        return "success"
    return "error" if isinstance(error, Exception) else "interrupted"


def record_reported_call(
    collector: Collector,
    run_id: str,
    *,
    model: str,
    tokens_in: int | None,
    tokens_out: int | None,
    cost: float | None,
    task: str,
    prompt_preview: str,
    response_preview: str,
    fields: dict[str, Any],
) -> None:
    """Record a call that a user reports, not one that was captured: by the platform's names.

    The arguments are those of `Run.record_llm_call`; an empty `run_id` stands for no run.

    Raises:
        TypeError: a field that `LLMCall` does not have.
    """
    if run_id == MUTED:
        return
    at = time.time()
    given = fields.pop("at", None)
    kind = type(given)
    if (kind is int or kind is float) and 0 <= given < _FOR_EVER:
        at = given
    collector.write(
        LLMCall(
            id=new_id(),
            at=at,
            proc=collector.token(),
            run_id=run_id,
            model=model,
            tokens_in=tokens_in,
            tokens_out=tokens_out,
            cost_usd=cost,
            operation=task,
            prompt=prompt_preview,
            response=response_preview,
            **fields,
        )
    )


def begin_step() -> tuple[str, int]:
    """Return the id of the run in which a step begins here, and its position; empty where none is kept."""
    run = _current.get()
    return ("", 0) if run is None or run.is_muted else run.begin_step()


def current_run_id() -> str:
    """Return the id of the run that is current here, or an empty string."""
    run = _current.get()
    return run.run_id if run is not None else ""
