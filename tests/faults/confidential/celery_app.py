"""The confidential tasks under Celery."""

import os

from celery import Celery
from work import REDACT, end

import waxell_workers.celery

waxell_workers.init(redact=REDACT)
app = Celery("confidential", broker=os.environ["BROKER_URL"])
app.conf.worker_log_format = app.conf.worker_task_log_format = "%(name)s %(levelname)s %(message)s"


@app.task(bind=True, max_retries=1)
def task(self, how: str, ticket: str, *, customer: str) -> str:
    """Do one task; once more if it is to be tried again."""
    try:
        return end("provider" if how == "retry" else how, ticket, customer)
    except Exception as error:
        if how == "retry":
            raise self.retry(exc=error, countdown=0) from error
        raise
