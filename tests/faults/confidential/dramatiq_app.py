"""The confidential tasks under Dramatiq."""

import os

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from work import REDACT, end

import waxell_workers
from waxell_workers.dramatiq import WaxellMiddleware

waxell_workers.init(redact=REDACT)
broker = RedisBroker(url=os.environ["BROKER_URL"])
broker.add_middleware(WaxellMiddleware())
dramatiq.set_broker(broker)


@dramatiq.actor(queue_name=os.environ["QUEUE"], max_retries=0)
def task(how: str, ticket: str, *, customer: str) -> None:
    """Do one task."""
    end(how, ticket, customer)
