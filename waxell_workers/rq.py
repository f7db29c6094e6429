"""RQ: a worker class that makes each attempt of each job a run.

    rq worker --worker-class waxell_workers.rq.Worker

`WorkerMixin` is all of it, for a worker class of one's own; `Queue` and `meta` tell a job by which run it was
enqueued. It relies on methods that RQ 1.16 to 3.0 have in common, and calls each of RQ's own as it was
called. What may raise at any instruction (a job's time limit, RQ's signal handlers) is neither caught nor
delayed; and nothing here imports a job's function before RQ does, and where RQ does.
"""

from __future__ import annotations

import datetime
import multiprocessing
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import rq
import rq.exceptions
import rq.worker
from rq.job import Job, JobStatus, Retry

from . import _rq_reasons, _rq_spawn
from .core import lineage, tasks, w3c
from .core.collector import is_off
from .core.encoding import reduce
from .core.runs import Run, get_context, state_of

if TYPE_CHECKING:
    _Worker = rq.worker.BaseWorker
else:
    _Worker = object

__all__ = ["Queue", "SimpleWorker", "Worker", "WorkerMixin", "meta"]

_FRAMEWORK = "rq"
_WORK = "_waxell_work"
_FLUSH_AT_MOST_S = 30.0
"""RQ kills a work-horse 60 s after its job's time limit; the job's callbacks have a part of that."""
_POOL_LOOKS_EVERY_S = 1.0
"""So much later may a pool notice that its last worker has left; the wait for the shipper leaves it that."""
_MAJOR = int(rq.__version__.partition(".")[0])
_RETURNED_RETRIES = hasattr(rq.worker.BaseWorker, "handle_job_retry")
"""RQ 2.1 and later try a job again that has returned a `Retry`; before, that was a result like any other."""
_OF_ONE_JOB = frozenset({"attempt", "eta", "previous", "repeat"})
"""What our header says of one job's own story, and of no job that gets a copy of it."""
_FOR_EVER = 1e11
"""No Unix time in seconds that anybody means."""
_MOST = 1 << 31
_LONGEST = 200
_LISTED = 100
"""So many of the jobs that one has waited for are told."""
_STOP_REQUESTED = getattr(rq.exceptions, "StopRequested", None) or getattr(rq.worker, "StopRequested")  # noqa: B009
"""What RQ's handler of a first SIGTERM raises while the worker is idle."""


# -- enqueuing ---------------------------------------------------------------------------------


def meta(existing: Mapping[str, Any] | None = None, *, schedule: str = "") -> dict[str, Any]:
    """Return what a job's `meta` should be, so that the job is shown as a child of the current run.

        queue.enqueue(charge, 42, meta=waxell_workers.rq.meta())
        cron.register(clean, "default", cron="0 3 * * *", meta=waxell_workers.rq.meta(schedule="nightly"))

    `Queue` does so by itself. Outside any run nothing is added, unless another tracer is in a trace.

    Args:
        existing: what else the job's `meta` holds; it is left as it is.
        schedule: the name of the schedule that enqueues the job, for RQ's cron and the like.
    """
    carried = dict(existing or {})
    if lineage.HEADER in carried:  # copied from another job, or made for a thread
        before = _plain(carried.pop(lineage.HEADER))
        if get_context() is not None or lineage.origin.get() is None:
            carried[lineage.HEADER] = {key: before[key] for key in before if key not in _OF_ONE_JOB}
        else:
            carried.pop(w3c.TRACEPARENT, None)
            carried.pop(w3c.TRACESTATE, None)
    added = lineage.outgoing(carried)
    if not added:  # everything is switched off
        return carried
    carried |= added
    if schedule:
        carried[lineage.HEADER]["schedule"] = schedule
    if carried[lineage.HEADER].keys() == {"enqueued_at"}:  # RQ notes that, too
        del carried[lineage.HEADER]
    return carried


class Queue(rq.Queue):
    """RQ's queue; a job that is enqueued inside a run is that run's child.

    With `is_async=False` a job is a run in the process that enqueues it.
    """

    def create_job(self, *args: Any, **kwargs: Any) -> Job:
        """Make the job, for `enqueue`, `enqueue_call`, `enqueue_many`, `enqueue_at` and `enqueue_in`."""
        job = super().create_job(*args, **kwargs)
        if isinstance(job.meta, dict):
            _set_meta(job, meta(job.meta))
        return job

    def enqueue_job(self, job: Job, *args: Any, **kwargs: Any) -> Job:
        """Enqueue a job that may have been made elsewhere."""
        _connect(job)
        return super().enqueue_job(job, *args, **kwargs)

    def schedule_job(self, job: Job, datetime: datetime.datetime, *args: Any, **kwargs: Any) -> Job:
        """Schedule a job, and note for when: RQ forgets that when the time has come."""
        _connect(job)
        if not is_off():
            _set_own(job, {**_own(job), "enqueued_at": time.time(), "eta": _due(datetime)})
        return super().schedule_job(job, datetime, *args, **kwargs)

    def run_sync(self, job: Job) -> Job:
        """Execute a job here and now."""
        work = _Work(job, "", nested=True)
        try:
            return super().run_sync(job)
        finally:
            work.end()


# -- executing ---------------------------------------------------------------------------------


class _Work:
    """One attempt, in the process that executes it; known by its job, whose `perform` it takes over.

    Made before RQ prepares the job, and says of it what was so then.
    """

    def __init__(self, job: Job, worker: str, *, nested: bool = False, ends_process: bool = False) -> None:
        self._job = job
        self._ends_process = ends_process
        self._worker = worker
        self._nested = nested
        self._attempt: tasks.Attempt | None = None
        self.own = _own(job)
        """What the job's `meta` has said of this attempt; RQ's own handlers make it say which is next."""
        self._waited = _waited(job, self.own)
        self.again = ""
        """Which retry comes next, and when, in words."""
        self.abandoned = False
        """True if RQ has come to no end with the job, so that its status says nothing."""
        self._state = ""
        self._error: dict[str, str] = {}
        self._reason = ""
        # On the object, not by a class: the job's class is the user's to choose.
        self._perform: Callable[[], Any] = job.perform
        setattr(job, _WORK, self)
        setattr(job, "perform", self.perform)  # noqa: B010  mypy: a method is not to be assigned to

    def perform(self) -> Any:
        """Open the run, then do what the job's own `perform` does.

        Here RQ's time limit runs already, as it must: finding the options imports the function's module.
        """
        self._begin(tasks.options_of(self._job.func))
        if not self._nested:
            return self._perform()
        try:
            return self._perform()
        except BaseException as error:  # nobody will call `handle_exception` with it
            self.failed(error)
            raise

    def _begin(self, marked: tasks.Options) -> None:
        self._attempt = tasks.prepare(self._describe(), marked)
        tasks.begin(self._attempt)

    def _describe(self) -> tasks.Task:
        job, own = self._job, self.own
        enqueued_at, eta = self._waited
        return tasks.Task(
            framework=_FRAMEWORK,
            name=_name(job),
            task_id=job.id,
            attempt=_number(own, "attempt", 1),
            queue=job.origin or "",
            worker=self._worker,
            eta=eta,
            message=_carried(job) | {lineage.HEADER: own | {"enqueued_at": enqueued_at}},
            group_id=getattr(job, "group_id", None) or "",  # RQ 2.0 has it first
            facts=_facts(job, own),
            inputs=lambda: {"args": reduce(job.args), "kwargs": reduce(job.kwargs)},
            nested=self._nested,
        )

    def run(self) -> Run | None:
        """Return the attempt's run; begun here for a job that has failed before its function was known."""
        if self._attempt is None:
            self._begin(tasks.Options())
        return None if self._attempt is None else self._attempt.run

    def failed(self, error: BaseException, *, told_to_stop: bool = False) -> None:
        """Note why the job has failed, also where it failed before its function was known."""
        if self._state:
            return
        run = self.run()
        if run is not None:
            self._error = run.describe(error)
        state = state_of(error)
        self._reason = _rq_reasons.of_error(error, state, told_to_stop=told_to_stop)
        self._state = state

    def end(self) -> None:
        """Close the run; where RQ's time limit is off, and the job's state is what RQ made of it."""
        try:
            self._close()
        except BaseException:  # a second SIGTERM, while a SimpleWorker is here: it goes on, once this is done
            self._close()
            raise
        if self._attempt is not None:
            tasks.flush(self._attempt, _FLUSH_AT_MOST_S, ends_process=self._ends_process)

    def _close(self) -> None:
        self._job.__dict__.pop("perform", None)
        self._job.__dict__.pop(_WORK, None)
        if self._attempt is not None:
            state, error = self._end()
            tasks.close(self._attempt, state, **error)

    def _end(self) -> tuple[str, dict[str, str]]:
        status = self._job.get_status(refresh=False)
        if self._state:
            if self.abandoned or status in (JobStatus.FAILED, JobStatus.STOPPED):
                return self._state, {"reason": self._reason, **self._error}
            return "retry", {"reason": self.again, **self._error}
        # A status says nothing about a success: a job that repeats is queued again.
        if not _RETURNED_RETRIES or not isinstance(self._job._result, Retry):
            return "success", {}
        if status != JobStatus.FAILED:
            return "retry", {"reason": self.again}
        return "error", {"error_type": "Retry", "error_message": "no retry is left"}


def _work_of(job: Job) -> _Work | None:
    work = getattr(job, _WORK, None)
    return work if isinstance(work, _Work) else None


class WorkerMixin(_Worker):
    """All of it, for a worker class of one's own: `class Own(waxell_workers.rq.WorkerMixin, rq.Worker)`."""

    _waxell_executed = False

    # -- in the process that executes a job: the work-horse, or a SimpleWorker's own

    def main_work_horse(self, job: Job, queue: rq.Queue) -> None:
        """Be the work-horse; RQ leaves it by `os._exit`, so that nothing can be done after the job."""
        tasks.pool_process_started()
        super().main_work_horse(job, queue)

    def perform_job(self, job: Job, queue: rq.Queue, *args: Any, **kwargs: Any) -> bool:
        """Perform a job, as a run."""
        work = _Work(job, self.name, ends_process=self.is_horse)
        try:
            return super().perform_job(job, queue, *args, **kwargs)
        except BaseException as error:  # Redis is gone, or a signal handler has raised
            work.failed(error, told_to_stop=self._shutdown_requested_date is not None)
            work.abandoned = True
            raise
        finally:
            work.end()

    def handle_exception(self, job: Job, *exc_info: Any) -> None:
        """Note the exception, which lives here in every version, and here alone."""
        work = _work_of(job)
        if work is not None and isinstance(exc_info[1], BaseException):
            work.failed(exc_info[1], told_to_stop=self._shutdown_requested_date is not None)
        super().handle_exception(job, *exc_info)

    def handle_job_retry(self, job: Job, *args: Any, **kwargs: Any) -> None:
        """Retry a job that has returned a `Retry`, as RQ 2.1 and later do."""
        retry, done = job._result, job.number_of_retries or 0
        if isinstance(retry, Retry) and done < retry.max:
            _count(job, done + 1, retry.max, Retry.get_interval(done, retry.intervals))
        super().handle_job_retry(job, *args, **kwargs)

    def handle_job_success(self, job: Job, *args: Any, **kwargs: Any) -> None:
        """Say of a job that RQ 2.2 and later repeat which repetition is next."""
        if (getattr(job, "repeats_left", None) or 0) > 0:
            _count_repetition(job)
        super().handle_job_success(job, *args, **kwargs)

    # -- here, or in the process that looks after the work-horse

    def handle_job_failure(self, job: Job, *args: Any, **kwargs: Any) -> None:
        """Count the attempts, which RQ does not; say of a stopped job what has become of it."""
        if self._stopped_job_id != job.id:
            if job.retries_left and job.retries_left > 0:
                done = _number(_own_of_attempt(job), "attempt", 1)
                _count(job, done, done - 1 + job.retries_left, job.get_retry_interval())
        elif _work_of(job) is None:
            tasks.task_lost(job.id, "stopped by user", "JobStopped")
        super().handle_job_failure(job, *args, **kwargs)

    # -- the worker's main process

    def work(self, *args: Any, **kwargs: Any) -> bool:
        """Work, with a shipper beside the worker."""
        tasks.worker_booting()
        tasks.worker_ready()
        try:
            return super().work(*args, **kwargs)
        finally:
            if self._waxell_executed:
                if multiprocessing.parent_process() is not None:
                    _stopping(spent_s=_POOL_LOOKS_EVERY_S)
                elif tasks.drains():  # Python 3.12 can start no thread in `atexit`
                    _stopping()

    def heartbeat(self, *args: Any, **kwargs: Any) -> None:
        """Look after the shipper as often as RQ says that the worker lives."""
        super().heartbeat(*args, **kwargs)
        if not self.is_horse:
            tasks.look_after_shipper()

    def execute_job(self, job: Job, queue: rq.Queue) -> None:
        """Have a job executed; a second SIGTERM kills the work-horse and ends the worker."""
        self._waxell_executed = True
        try:
            super().execute_job(job, queue)
        except SystemExit:
            if self.horse_pid:
                tasks.task_lost(job.id, "the worker was told twice to stop", "ColdShutdown")
            raise

    def handle_work_horse_killed(self, job: Job, retpid: Any, ret_val: Any, rusage: Any) -> None:
        """Say why a work-horse is gone."""
        tasks.task_lost(
            job.id,
            _rq_reasons.of_work_horse(ret_val, job.timeout, _timestamp(job.started_at)),
            "WorkHorseKilled",
        )
        super().handle_work_horse_killed(job, retpid, ret_val, rusage)  # type: ignore[no-untyped-call]


class Worker(WorkerMixin, rq.Worker):
    """RQ's default worker, which forks for each job."""


class SimpleWorker(WorkerMixin, rq.SimpleWorker):
    """RQ's worker that executes jobs in its own process."""


if hasattr(rq.worker, "SpawnWorker"):  # RQ 2.2 has it first
    __all__ += ["SpawnWorker"]

    class SpawnWorker(WorkerMixin, rq.worker.SpawnWorker):
        """RQ's worker that starts a new Python for each job."""

        def fork_work_horse(self, job: Job, queue: rq.Queue) -> None:
            """Start the work-horse; RQ 2 makes a plain `rq.Worker` of it, whatever this class is."""
            if _MAJOR > 2:
                super().fork_work_horse(job, queue)
            else:
                _rq_spawn.spawn(self, job, queue, SpawnWorker)


def _stopping(spent_s: float = 0.0) -> None:
    """Have delivered what is there: a pool's worker ends without `atexit`, where other processes do this."""
    try:
        tasks.worker_stopping(spent_s)
    except _STOP_REQUESTED:
        # A first SIGTERM, to a worker that is leaving already: RQ raises wherever it is.
        pass


# -- translation -------------------------------------------------------------------------------


def _name(job: Job) -> str:
    try:
        return job.func_name or "unknown"
    except rq.exceptions.DeserializationError:
        return "unknown"


def _facts(job: Job, own: Mapping[str, Any]) -> dict[str, Any]:
    waited_for = [each for each in getattr(job, "_dependency_ids", None) or () if type(each) is str]
    schedule = own.get("schedule")
    return {
        "depends_on": waited_for[:_LISTED] or None,
        "schedule": schedule[:_LONGEST] if type(schedule) is str else None,
        "repeat": None if getattr(job, "repeats_left", None) is None else _number(own, "repeat", 0),
    }


def _waited(job: Job, own: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Return when a job was enqueued, and when it was due if that was later.

    RQ itself notes when a job has come into its queue, each time: for one that waits for others when they had
    ended, for one that was scheduled some time after it was due. What we have noted of that counts, unless it
    is of an earlier time, because the job was requeued since.
    """
    enqueued_at, eta = _time(own.get("enqueued_at")), _time(own.get("eta"))
    if enqueued_at is None or eta is None:
        return _timestamp(job.enqueued_at), None
    began = _timestamp(job.started_at)
    if job.worker_name and (began is None or enqueued_at < began):
        return _timestamp(job.enqueued_at), None
    return enqueued_at, eta


# -- what travels ------------------------------------------------------------------------------


def _plain(header: object) -> dict[str, Any]:
    # By its type alone: of an object that was pickled into it, every question is the user's code.
    return header if type(header) is dict else {}


def _carried(job: Job) -> dict[str, Any]:
    return dict(job.meta) if isinstance(job.meta, dict) else {}


def _own(job: Job) -> dict[str, Any]:
    return dict(_plain(_carried(job).get(lineage.HEADER)))


def _own_of_attempt(job: Job) -> dict[str, Any]:
    work = _work_of(job)
    return _own(job) if work is None else work.own


def _connect(job: Job) -> None:
    """Have a job that was made elsewhere say by which run it is enqueued, unless it does."""
    if _own(job) or not isinstance(job.meta, dict):
        return
    run = get_context()
    if run is not None and run.task_id == job.id:  # it enqueues itself
        _set_meta(job, job.meta | lineage.outgoing(job.meta, again=True))
    else:
        _set_meta(job, meta(job.meta))


def _count(job: Job, retry: int, of: int, interval_s: float) -> None:
    """Have a job's `meta` say which attempt is next, after which run, and when it is due.

    RQ writes it down as it enqueues the job again.
    """
    if is_off():
        return
    before, added = _own_of_attempt(job), {}
    work = _work_of(job)
    if work is not None:
        work.again = _rq_reasons.of_retry(retry, of, interval_s)
        if work.run() is get_context():
            added = lineage.outgoing(_carried(job) | {lineage.HEADER: before}, again=True)
    attempt = _number(before, "attempt", 1) + 1
    own = {key: before[key] for key in before if key not in ("eta", "previous")}
    own |= {**added.pop(lineage.HEADER, {}), "attempt": attempt}
    _set_own(job, _in(own, interval_s), added)


def _count_repetition(job: Job) -> None:
    """Have a job's `meta` say which repetition is next, and when it is due."""
    if is_off():
        return
    before = _own_of_attempt(job)
    intervals = job.repeat_intervals or [0]
    # RQ 3 takes the first and leaves the others; RQ 2 counts them from the end.
    interval_s = intervals[0] if _MAJOR > 2 else intervals[min(job.repeats_left or 1, len(intervals)) - 1]
    own = {key: before[key] for key in before if key not in _OF_ONE_JOB}
    _set_own(job, _in({**own, "repeat": _number(before, "repeat", 0) + 1}, interval_s))


def _in(own: dict[str, Any], interval_s: float) -> dict[str, Any]:
    now = time.time()
    own = {**own, "enqueued_at": now}
    own.pop("eta", None)
    return {**own, "eta": (now + interval_s) // 1} if interval_s else own  # as RQ has it, in whole seconds


def _set_own(job: Job, own: dict[str, Any], more: Mapping[str, Any] | None = None) -> None:
    if isinstance(job.meta, dict):
        _set_meta(job, {**job.meta, **(more or {}), lineage.HEADER: own})


def _set_meta(job: Job, changed: dict[str, Any]) -> None:
    # RQ 3 keeps what it could not read here, and writes it back as it was as long as nobody touches it.
    if getattr(job, "_unreadable_meta", None) is None:
        job.meta = changed


def _number(own: Mapping[str, Any], key: str, least: int) -> int:
    value = own.get(key)
    return value if type(value) is int and least <= value < _MOST else least


def _time(value: object) -> float | None:
    # By its type alone, as above.
    return float(value) if (type(value) is float or type(value) is int) and 0 <= value < _FOR_EVER else None


def _due(moment: datetime.datetime) -> float | None:
    try:
        # As RQ has it: in whole seconds, and a naive one is of this machine's zone.
        return float(moment.timestamp() // 1)
    except (OverflowError, ValueError, OSError):  # at the end of times
        return None


def _timestamp(moment: datetime.datetime | None) -> float | None:
    if moment is None:
        return None
    # RQ 1's are naive, in UTC.
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.timezone.utc)).timestamp()
