"""RQ's workers, with the application imported before they fork: `rq worker --worker-class with_rq.Worker`."""

import tracers  # noqa: F401

from waxell_workers.rq import SimpleWorker, Worker  # noqa: F401
