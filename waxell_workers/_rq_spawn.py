"""RQ 2's SpawnWorker makes a plain `rq.Worker` of each work-horse: here it is of the worker's own class.

RQ 3 does so by itself. It relies on what RQ 2.2 to 2.12 have of a work-horse's start.
"""

from __future__ import annotations

import os
import pickle
import sys
import time
from typing import Any

import redis
import rq
import rq.worker
from rq.job import Job


def spawn(worker: rq.worker.BaseWorker, job: Job, queue: rq.Queue, otherwise: type) -> None:
    """Start a Python that performs the job, and remember it as the work-horse.

    Args:
        worker: the worker.
        job: the job that it has taken.
        queue: from where.
        otherwise: the class that is taken where another Python cannot import the worker's own.
    """
    assert worker.execution is not None
    kind = type(worker) if _is_importable(type(worker)) else otherwise
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
            f"from waxell_workers._rq_spawn import be_work_horse; be_work_horse({reading})"
        )
        command = [sys.executable, "-c", source]
        worker._horse_pid = os.posix_spawn(sys.executable, command, os.environ, setpgroup=0)
        os.write(writing, pickle.dumps(order))
    finally:
        os.close(reading)
        os.close(writing)
    worker.procline(f"Spawned {worker._horse_pid} at {time.time()}")  # type: ignore[no-untyped-call]


def be_work_horse(reading: int) -> None:
    """Be the process that performs the job: what `spawn` has written is read from this descriptor."""
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
