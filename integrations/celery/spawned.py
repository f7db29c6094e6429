"""The scenarios in a pool whose processes are spawned, not forked (5.7): `celery -A spawned worker`."""

from scenarios import app

app.conf.worker_pool_start_method = "spawn"
