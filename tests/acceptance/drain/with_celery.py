"""A Celery app whose tasks are traced: `celery -A with_celery worker`."""

import os

import tracers
from celery import Celery

import waxell_workers.celery  # noqa: F401

app = Celery("traced", broker=os.environ["BROKER_URL"])
app.conf.task_default_queue = os.environ["QUEUE"]
app.conf.task_ignore_result = True
app.conf.broker_connection_retry_on_startup = True

ask = app.task(tracers.ask, name="ask")
