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
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import redis
import rq
import rq.exceptions
import rq.worker
from rq.job import Job, JobStatus, Retry

from .core import lineage, tasks, w3c
from .core.encoding import reduce
from .core.runs import get_context, state_of

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
_STOP_REQUESTED = getattr(rq.exceptions, "StopRequested", None) or getattr(rq.worker, "StopRequested")  # noqa: B009
"""What RQ's handler of a first SIGTERM raises while the worker is idle."""


# -- enqueuing ---------------------------------------------------------------------------------


def meta(existing: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return what a job's `meta` should be, so that the job is shown as a child of the current run.

        queue.enqueue(charge, 42, meta=waxell_workers.rq.meta())

    `Queue` does so by itself. Outside any run nothing is added.

    Args:
        existing: what else the job's `meta` holds; it is left as it is.
    """
    carried = dict(existing or {})
    run = get_context()
    if run is None or run.is_muted:
        return carried
    if (
        carried.pop(lineage.HEADER, None) is not None
    ):  # copied from another job, which had a parent of its own
        carried.pop(w3c.TRACEPARENT, None)
    return carried | lineage.outgoing(carried)


class Queue(rq.Queue):
    """RQ's queue; a job that is enqueued inside a run is that run's child.

    With `is_async=False` a job is a run in the process that enqueues it.
    """

    def create_job(self, *args: Any, **kwargs: Any) -> Job:
        """Make the job, for `enqueue`, `enqueue_call`, `enqueue_many`, `enqueue_at` and `enqueue_in`."""
        job = super().create_job(*args, **kwargs)
        _set_meta(job, meta(job.meta))
        return job

    def enqueue_job(self, job: Job, *args: Any, **kwargs: Any) -> Job:
        """Enqueue a job that may have been made elsewhere."""
        if lineage.HEADER not in job.meta:
            _set_meta(job, meta(job.meta))
        return super().enqueue_job(job, *args, **kwargs)

    def schedule_job(self, job: Job, datetime: datetime.datetime, *args: Any, **kwargs: Any) -> Job:
        """Schedule a job, and note for when: RQ forgets that when the time has come."""
        own = {**_own(job), "eta": datetime.timestamp(), "enqueued_at": time.time()}
        _set_meta(job, {**job.meta, lineage.HEADER: own})
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
    """One attempt, in the process that executes it; known by its job, whose `perform` it takes over."""

    def __init__(self, job: Job, worker: str, *, nested: bool = False, ends_process: bool = False) -> None:
        self._job = job
        self._ends_process = ends_process
        self._worker = worker
        self._nested = nested
        self._attempt: tasks.Attempt | None = None
        self.abandoned = False
        """True if RQ has come to no end with the job, so that its status says nothing."""
        self._state = ""
        self._error: dict[str, str] = {}
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
        self._attempt = tasks.prepare(_describe(self._job, self._worker, nested=self._nested), marked)
        tasks.begin(self._attempt)

    def failed(self, error: BaseException) -> None:
        """Note why the job has failed, also where it failed before its function was known."""
        if self._state:
            return
        if self._attempt is None:
            self._begin(tasks.Options())
        if self._attempt is not None:
            self._error = self._attempt.run.describe(error)
        self._state = state_of(error)

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
            stays = self.abandoned or status in (JobStatus.FAILED, JobStatus.STOPPED)
            return (self._state if stays else "retry"), self._error
        # A status says nothing about a success: a job that repeats is queued again.
        if not _RETURNED_RETRIES or not isinstance(self._job._result, Retry):
            return "success", {}
        if status != JobStatus.FAILED:
            return "retry", {}
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
            work.failed(error)
            work.abandoned = True
            raise
        finally:
            work.end()

    def handle_exception(self, job: Job, *exc_info: Any) -> None:
        """Note the exception, which lives here in every version, and here alone."""
        work = _work_of(job)
        if work is not None and isinstance(exc_info[1], BaseException):
            work.failed(exc_info[1])
        super().handle_exception(job, *exc_info)

    def handle_job_retry(self, job: Job, *args: Any, **kwargs: Any) -> None:
        """Retry a job that has returned a `Retry`, as RQ 2.1 and later do."""
        _count(job)
        super().handle_job_retry(job, *args, **kwargs)

    # -- here, or in the process that looks after the work-horse

    def handle_job_failure(self, job: Job, *args: Any, **kwargs: Any) -> None:
        """Count the attempts, which RQ does not; say of a stopped job what has become of it."""
        if self._stopped_job_id != job.id:
            if job.retries_left:
                _count(job)
        elif _work_of(job) is None:
            tasks.task_lost(job.id, "stopped by request", "JobStopped")
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
                tasks.task_lost(job.id, "cold shutdown: the worker was told twice to stop", "ColdShutdown")
            raise

    def handle_work_horse_killed(self, job: Job, retpid: Any, ret_val: Any, rusage: Any) -> None:
        """Say why a work-horse is gone."""
        tasks.task_lost(job.id, _reason(job, ret_val), "WorkHorseKilled")
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
                _spawn(self, job, queue)


def _stopping(spent_s: float = 0.0) -> None:
    """Have delivered what is there: a pool's worker ends without `atexit`, where other processes do this."""
    try:
        tasks.worker_stopping(spent_s)
    except _STOP_REQUESTED:
        # A first SIGTERM, to a worker that is leaving already: RQ raises wherever it is.
        pass


# -- RQ 2's SpawnWorker ------------------------------------------------------------------------


def _spawn(worker: rq.worker.BaseWorker, job: Job, queue: rq.Queue) -> None:
    """Start a Python that performs the job, and remember it as the work-horse."""
    assert worker.execution is not None
    kind = type(worker) if _is_importable(type(worker)) else SpawnWorker
    os.environ["RQ_WORKER_ID"] = worker.name
    os.environ["RQ_JOB_ID"] = job.id
    os.environ["RQ_EXECUTION_ID"] = worker.execution.id
    order = {
        "kind": kind,
        "key": worker.key,
        "serializer": getattr(worker, "_serializer_arg", None),
        "redis": (worker.connection.connection_pool.connection_class, _connection_kwargs(worker.connection)),
        "job": job.id,
        "queue": queue.name,
        "execution": worker.execution.id,
    }
    # By a pipe: Redis' password is in it, and a command line is for everybody to read.
    reading, writing = os.pipe()
    try:
        os.set_inheritable(reading, True)
        source = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            f"from waxell_workers.rq import _be_work_horse; _be_work_horse({reading})"
        )
        command = [sys.executable, "-c", source]
        worker._horse_pid = os.posix_spawn(sys.executable, command, os.environ, setpgroup=0)
        os.write(writing, pickle.dumps(order))
    finally:
        os.close(reading)
        os.close(writing)
    worker.procline(f"Spawned {worker._horse_pid} at {time.time()}")  # type: ignore[no-untyped-call]


def _be_work_horse(reading: int) -> None:
    from rq.executions import Execution  # not in RQ 1

    with os.fdopen(reading, "rb") as pipe:
        order = pickle.load(pipe)
    connection_class, kwargs = order["redis"]
    pool = redis.ConnectionPool(connection_class=connection_class, **kwargs)
    connection = redis.Redis(connection_pool=pool)
    serializer = order["serializer"]
    worker = order["kind"].find_by_key(order["key"], connection=connection, serializer=serializer)
    if worker is None:
        sys.exit(1)
    job = Job.fetch(order["job"], connection=connection, serializer=worker.serializer)
    queue = rq.Queue(order["queue"], connection=connection, serializer=worker.serializer)
    worker.execution = Execution.fetch(order["execution"], job.id, connection=connection)
    worker.main_work_horse(job, queue)


def _is_importable(kind: type) -> bool:
    if kind.__module__ == "__main__":
        return False
    try:
        pickle.dumps(kind)
    except (pickle.PicklingError, AttributeError):  # a class in a function
        return False
    return True


def _connection_kwargs(connection: redis.Redis) -> dict[str, Any]:
    """Return what another process needs to connect likewise, and can be told."""
    clean = getattr(rq.connections, "get_connection_kwargs", None)  # RQ 2.7 and later know of redis-py 8
    kwargs = clean(connection) if clean is not None else connection.connection_pool.connection_kwargs
    return {name: value for name, value in kwargs.items() if _can_travel(value)}


def _can_travel(value: object) -> bool:
    if type(value) is object:  # a mark that is known by its identity
        return False
    try:
        pickle.dumps(value)
    except (pickle.PicklingError, TypeError, AttributeError):  # a lock in it, a lambda
        return False
    return True


# -- translation -------------------------------------------------------------------------------


def _describe(job: Job, worker: str, *, nested: bool) -> tasks.Task:
    own = _own(job)
    attempt = own.get("attempt", 1)
    # RQ notes when it has put a job into the queue, again for each attempt; one that was scheduled has waited
    # since it was due.
    enqueued_at = own.get("enqueued_at") if own.get("eta") and attempt == 1 else _timestamp(job.enqueued_at)
    return tasks.Task(
        framework=_FRAMEWORK,
        name=_name(job),
        task_id=job.id,
        attempt=attempt,
        queue=job.origin or "",
        worker=worker,
        eta=own.get("eta"),
        message={**job.meta, lineage.HEADER: {**own, "enqueued_at": enqueued_at}},
        group_id=getattr(job, "group_id", None) or "",  # RQ 2.0 has it first
        inputs=lambda: {"args": reduce(job.args), "kwargs": reduce(job.kwargs)},
        nested=nested,
    )


def _name(job: Job) -> str:
    try:
        return job.func_name or "unknown"
    except rq.exceptions.DeserializationError:
        return "unknown"


def _own(job: Job) -> dict[str, Any]:
    own = job.meta.get(lineage.HEADER) if isinstance(job.meta, dict) else None
    return dict(own) if isinstance(own, Mapping) else {}


def _count(job: Job) -> None:
    """Have a job's `meta` say which attempt is next; RQ writes it down as it enqueues the job again."""
    own = _own(job)
    own["attempt"] = own.get("attempt", 1) + 1
    _set_meta(job, {**job.meta, lineage.HEADER: own})


def _set_meta(job: Job, changed: dict[str, Any]) -> None:
    # RQ 3 keeps what it could not read here, and writes it back as it was as long as nobody touches it.
    if getattr(job, "_unreadable_meta", None) is None:
        job.meta = changed


def _timestamp(moment: datetime.datetime | None) -> float | None:
    if moment is None:
        return None
    # RQ 1's are naive, in UTC.
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.timezone.utc)).timestamp()


def _reason(job: Job, ret_val: int | None) -> str:
    if ret_val is None:  # RQ 1.16 to 3.0 do not keep it when they kill a work-horse that hangs
        return f"killed by RQ: it went on for more than 60 s after its time limit of {job.timeout} s"
    if os.WIFSIGNALED(ret_val):
        number = os.WTERMSIG(ret_val)
        return f"killed by signal {number} ({_signal_name(number)})"
    return f"the work-horse ended with status {os.waitstatus_to_exitcode(ret_val)}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return "unknown"
