"""The scenarios in a pool whose processes are spawned, not forked (5.7): `celery -A spawned worker`."""

from scenarios import app

app.conf.worker_pool_start_method = "spawn"
# Each process imports the app anew; on a busy machine that takes longer than the 4 s that Celery grants.
app.conf.worker_proc_alive_timeout = 60.0
