"""waxell-workers: one import. Tasks and calls are recorded without a line in them."""

from contextlib import nullcontext

import waxell_workers.celery  # noqa: F401  records every task of this app

trace = call = nullcontext
